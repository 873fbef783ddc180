//! A node that spidernet's egressgateway has programmed becomes one of ours under flood.
//!
//! Its state is written here with the kernel's tools, as its agent writes it.

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::net::IpAddr;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use common::fleet::{Fleet, Result, assert_same, dual, lab, policy, tool};
use common::stream::{self, MANY, Pod};
use egress_datapath::iptables::{IptablesDatapath, Predecessor};
use egress_datapath::state::Variant;
use egress_datapath::testing::lab::{EIP_B, Host, Lab, Netns, POD_A, POD_B, SERVER};
use egress_datapath::{DeviceName, Family};

/// Marks that its controller has given to the nodes.
const MARKS: [u32; 3] = [0x26d9_b723, 0x2601_0001, 0x26ff_ff01];
const SET: &str = "0123456789abcdef0";
const PER_SECOND: u64 = 4_000;

/// What is done, and when that begins.
type Step = (String, Instant);

/// What is like theirs and is not.
const DECOYS: [&str; 13] = [
    "ipset create egress-src-v4-short hash:net",
    "ipset add egress-src-v4-short 10.244.1.10",
    "ipset create egress-ingore-cidr hash:net",
    "ipset create egress-dst-v4-0123456789abcdef1 hash:ip",
    "ipset create egress-src-v6-0123456789abcdef1 hash:net family inet",
    "IPTABLES -t mangle -N EGRESSGATEWAY-OTHER",
    "IPTABLES -t mangle -A EGRESSGATEWAY-OTHER -m comment --comment egw:short -j RETURN",
    "IPTABLES -t nat -A POSTROUTING -s 203.0.113.7 -m comment --comment not-egw:0123456789abcdef -j RETURN",
    "IPTABLES -t filter -A FORWARD -m mark --mark 0x26000000/0xff000000 -j ACCEPT",
    "ip rule add pref 99 fwmark 0x26aaaa01 lookup 777",
    "ip rule add pref 99 fwmark 0x26aaaa01/0xffffff00 lookup 648718849",
    "ip rule add pref 98 fwmark 0x26aaaa01 lookup 648718849",
    "ip link add egress.other type vxlan id 100 dstport 7790 dev eth0 nolearning",
];

#[test]
fn a_node_of_spidernet_is_taken_over_without_a_leak() -> Result {
    for variant in Variant::BOTH {
        harness::needs(&[variant.command(Family::V4), "ipset", "ip", "bridge"]);
        let lab = lab();
        take_over(&lab, variant).map_err(|error| format!("from {variant:?}: {error}"))?;
    }
    Ok(())
}

fn take_over(lab: &Lab, variant: Variant) -> Result {
    let iptables = variant.command(Family::V4);
    stream::forget_after(lab, "0")?;
    for host in lab.nodes() {
        for line in DECOYS {
            tool(&host.netns, &line.replace("IPTABLES", iptables))?;
        }
    }
    let before = lab.nodes().map(|host| listing(&host.netns));
    for host in lab.nodes() {
        theirs(host, variant)?;
        let found = find(&host.netns)?;
        // It has the usual name, VNI and port, as ours would.
        if found.in_the_way(&lab.cluster(host)?.tunnel).is_none() {
            return Err(format!("nothing is in the way on {}", host.name).into());
        }
    }
    let mut fleet = Fleet::with(lab, |cluster| {
        cluster.tunnel.vni = 101;
        if let Ok(name) = DeviceName::new("egress.ours") {
            cluster.tunnel.device = name;
        }
    })?;
    let policies = [policy("p", &[POD_A, POD_B], Some("node-b"), dual(EIP_B))?];
    let pods = [
        Pod { netns: &lab.pod_a, address: POD_A, allowed: &[EIP_B] },
        Pod { netns: &lab.pod_b, address: POD_B, allowed: &[EIP_B] },
    ];
    let pause = || sleep(Duration::from_millis(300));
    let to = (&lab.server, SERVER);
    let (done, tally) = stream::during(to, &pods, MANY, PER_SECOND, |progress| {
        let mut work = || -> Result<([u64; 4], Vec<Step>)> {
            let mut steps = vec![("theirs alone".to_owned(), Instant::now())];
            let mut begin = |what: &str, host: &Host| {
                steps.push((format!("{what} {}", host.name), Instant::now()));
            };
            pause();
            let mut at = [progress.sent(), 0, 0, 0];
            for host in [&lab.node_b, &lab.node_c, &lab.node_a] {
                begin("ours on", host);
                host.netns.run(|| {
                    let mut datapath = IptablesDatapath::open()?;
                    let found = datapath.predecessor()?;
                    datapath.set_predecessor_aside(&found).map(drop)
                })??;
                fleet.apply_to(host.name, &policies)?;
                pause();
            }
            at[1] = progress.sent();
            pause();
            for host in lab.nodes() {
                begin("theirs off", host);
                remove(&host.netns)?;
                pause();
            }
            at[2] = progress.sent();
            pause();
            at[3] = progress.sent();
            Ok((at, steps))
        };
        work().map_err(|error| error.to_string())
    })?;
    let ([alone, ours, removed, end], steps) = done?;
    let lost = |from, to| tally.lost.iter().filter(|number| (from..to).contains(*number)).count();
    writeln!(
        io::stderr(),
        "take over, {iptables:<28} {:>7} packets {:>3} leaked, lost: {} before, {} while ours \
         comes, {} while theirs goes, {} afterwards",
        tally.sent,
        tally.leaked.len(),
        lost(0, alone),
        lost(alone, ours),
        lost(ours, removed),
        lost(removed, end),
    )?;
    let step = |when: &Instant| steps.iter().rev().find(|(_, begin)| begin <= when);
    let leaks: BTreeSet<_> =
        tally.leaked.iter().map(|(ip, when)| (ip, step(when).map(|(what, _)| what))).collect();
    assert!(leaks.is_empty(), "leaked {leaks:?}");
    let excused = tally.overflowed + 5;
    assert!(lost(0, alone) <= excused, "theirs was never whole");
    assert!(lost(removed, end) <= excused, "ours is not whole");
    fleet.remove()?;
    for (host, before) in lab.nodes().into_iter().zip(before) {
        assert_same(&before?, &listing(&host.netns)?);
    }
    Ok(())
}

fn find(netns: &Netns) -> Result<Predecessor> {
    Ok(netns.run(|| IptablesDatapath::open()?.predecessor())??)
}

fn remove(netns: &Netns) -> Result {
    let left = netns.run(|| {
        let mut datapath = IptablesDatapath::open()?;
        let found = datapath.predecessor()?;
        datapath.remove_predecessor(&found)?;
        datapath.predecessor()
    })??;
    if left.is_empty() { Ok(()) } else { Err(format!("this is left:\n{left}").into()) }
}

/// All that others may have, but for counters, dates and tables that were only looked at.
fn listing(netns: &Netns) -> Result<String> {
    let mut text = String::new();
    for line in [
        "iptables-legacy-save",
        "ip6tables-legacy-save",
        "iptables-nft-save",
        "ip6tables-nft-save",
        "ipset save",
        "ip rule",
        "ip -6 rule",
        "ip route show table all",
        "ip -6 route show table all",
        "ip -br link",
    ] {
        let said = tool(netns, line)?;
        let chain = |line: &str| line.starts_with(':') && !line.contains("EGRESSGATEWAY");
        let is_content =
            |line: &&str| !line.starts_with(['#', '*']) && !chain(line) && *line != "COMMIT";
        text.extend(["# ", line, "\n"]);
        said.lines().filter(is_content).for_each(|line| text.extend([line, "\n"]));
    }
    Ok(text)
}

fn number(host: &Host) -> usize {
    ["node-a", "node-b", "node-c"].iter().position(|name| *name == host.name).unwrap_or_default()
}

/// What their agent writes on a node, for a policy of pod-a and pod-b with node-b as gateway.
fn theirs(host: &Host, variant: Variant) -> Result {
    let here = number(host);
    let one = here + 1;
    let mut lines = vec![
        format!(
            "ip link add egress.vxlan address 66:00:00:00:00:0{one} type vxlan id 100 dev eth0 \
             local 10.10.0.1{one} dstport 7789 nolearning"
        ),
        format!("ip addr add 172.30.0.{one}/16 dev egress.vxlan"),
        format!("ip -6 addr add fd12::{one}/112 dev egress.vxlan nodad"),
        "sysctl -qw net/ipv4/conf/egress.vxlan/rp_filter=2".to_owned(),
        "ip link set egress.vxlan up".to_owned(),
    ];
    for (peer, mark) in MARKS.into_iter().enumerate().filter(|(peer, _)| *peer != here) {
        let (peer, dev) = (peer + 1, "dev egress.vxlan");
        let mac = format!("66:00:00:00:00:0{peer}");
        lines.extend([
            format!("bridge fdb add {mac} {dev} dst 10.10.0.1{peer} self permanent"),
            format!("ip neigh add 172.30.0.{peer} lladdr {mac} {dev} nud permanent"),
            format!("ip -6 neigh add fd12::{peer} lladdr {mac} {dev} nud permanent"),
            format!("ip rule add pref 99 fwmark {mark:#x} lookup {mark}"),
            format!("ip -6 rule add pref 99 fwmark {mark:#x} lookup {mark}"),
            format!("ip route add default via 172.30.0.{peer} {dev} table {mark}"),
            format!("ip -6 route add default via fd12::{peer} {dev} table {mark}"),
        ]);
    }
    for (family, inet, inside) in [
        ("4", "inet", ["10.244.0.0/16", "10.10.0.0/24"]),
        ("6", "inet6", ["fd44::/16", "fd10::/64"]),
    ] {
        let pods = POD_A.into_iter().chain(POD_B).filter(|ip| ip.is_ipv6() == (family == "6"));
        let cluster = format!("egress-cluster-cidr-ipv{family}");
        lines.push(format!("ipset create {cluster} hash:net family {inet}"));
        lines.extend(inside.map(|net| format!("ipset add {cluster} {net}")));
        for side in ["src", "dst"] {
            let set = format!("egress-{side}-v{family}-{SET}");
            lines.push(format!("ipset create {set} hash:net family {inet}"));
        }
        lines.extend(pods.map(|pod| format!("ipset add egress-src-v{family}-{SET} {pod}")));
    }
    for line in lines {
        tool(&host.netns, &line)?;
    }
    for (family, eip) in Family::BOTH.into_iter().zip(EIP_B) {
        let program = format!("{}-restore", variant.command(family));
        let script = tables(here, family, eip);
        let status = host.netns.run(|| {
            let mut child =
                Command::new(&program).args(["--noflush", "-w"]).stdin(Stdio::piped()).spawn()?;
            if let Some(mut stdin) = child.stdin.take() {
                stdin.write_all(script.as_bytes())?;
            }
            child.wait()
        })??;
        if !status.success() {
            return Err(format!("{program} refused\n{script}").into());
        }
    }
    Ok(())
}

/// Its rules, each with its hash and what it says it is for.
fn tables(here: usize, family: Family, eip: IpAddr) -> String {
    let digit = if family == Family::V4 { '4' } else { '6' };
    let is_gateway = here == 1;
    let mut count = 0;
    let mut rule = |chain: &str, why: &str, what: &str| {
        count += 1;
        format!(
            "-A {chain} -m comment --comment \"egw:{count:016}\" -m comment --comment \"{why}\" {what}\n"
        )
    };
    let selected = format!(
        "-m set --match-set egress-src-v{digit}-{SET} src -m set ! --match-set \
         egress-cluster-cidr-ipv{digit} dst -m conntrack --ctdir ORIGINAL"
    );
    let prefix = "-m mark --mark 0x26000000/0xff000000";
    let base = "-m mark --mark 0x26000000/0xffffffff";
    let accept = "Accept for egress traffic from pod going to EgressTunnel";
    let mut text = String::from(
        "*mangle\n:EGRESSGATEWAY-MARK-REQUEST - [0:0]\n:EGRESSGATEWAY-REPLY-ROUTING - [0:0]\n",
    );
    text += &rule(
        "PREROUTING",
        "Checking for EgressPolicy matched traffic",
        "-j EGRESSGATEWAY-MARK-REQUEST",
    );
    let passes = format!("{prefix} -j ACCEPT");
    text += &rule("PREROUTING", "EgressGateway traffic accept datapath rule", &passes);
    if is_gateway {
        let reply = "EgressGateway reply datapath rule, rule is from the EgressGateway";
        text += &rule("PREROUTING", reply, "-j EGRESSGATEWAY-REPLY-ROUTING");
        text += &rule("PREROUTING", reply, &passes);
    }
    let reset = format!("{prefix} -j MARK --set-xmark 0x26000000/0xffffffff");
    text += &rule("FORWARD", accept, &reset);
    text += &rule("POSTROUTING", accept, &format!("{base} -j ACCEPT"));
    if !is_gateway {
        let mark = format!("{selected} -j MARK --set-xmark {:#x}/0xffffffff", MARKS[1]);
        text += &rule("EGRESSGATEWAY-MARK-REQUEST", "Set mark for EgressPolicy default-p", &mark);
    }
    for (peer, mark) in MARKS.into_iter().enumerate().filter(|(peer, _)| *peer != here) {
        let chain = "EGRESSGATEWAY-REPLY-ROUTING";
        let from = format!("-i egress.vxlan -m mac --mac-source 66:00:00:00:00:0{}", peer + 1);
        let first = format!(
            "{from} -m conntrack --ctdir ORIGINAL -j MARK --set-xmark {mark:#x}/0xffffffff"
        );
        text += &rule(chain, "Mark the traffic from the EgressGateway tunnel", &first);
        let save = format!(
            "-m mark --mark {mark:#x}/0xffffffff -j CONNMARK --save-mark --mask 0xffffffff"
        );
        text += &rule(chain, "Save mark to the connection", &save);
        let clear = format!("{from} -j MARK --set-xmark 0x26000000/0xffffffff");
        text += &rule(chain, "Clear Mark of the inner package", &clear);
    }
    let restore = "-m conntrack --ctdir REPLY -j CONNMARK --restore-mark --mask 0xffffffff";
    text += &rule("EGRESSGATEWAY-REPLY-ROUTING", "label for restoring connections", restore);
    text += "COMMIT\n*nat\n:EGRESSGATEWAY-SNAT-EIP - [0:0]\n";
    text += &rule("PREROUTING", "EgressGateway traffic accept datapath rule", &passes);
    text += &rule("POSTROUTING", "SNAT for egress traffic", "-j EGRESSGATEWAY-SNAT-EIP");
    text += &rule("POSTROUTING", accept, &format!("{base} -j ACCEPT"));
    if is_gateway {
        let snat = format!("{selected} -j SNAT --to-source {eip}");
        text += &rule("EGRESSGATEWAY-SNAT-EIP", "snat policy default-p", &snat);
    }
    text += "COMMIT\n*filter\n";
    text += &rule("FORWARD", accept, &format!("{base} -j ACCEPT"));
    text += &rule("OUTPUT", accept, &format!("{base} -j ACCEPT"));
    text + "COMMIT\n"
}
