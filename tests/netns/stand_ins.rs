//! Stand-ins make what the programs make that they stand in for.

use std::process::Command;

use common::fleet::Result;
use egress_datapath::testing::lab::Netns;

/// Commands whose effects can be listed, in an order in which each finds what it needs.
const COMMANDS: &[&str] = &[
    "ip link add u0 address 02:00:00:00:00:01 mtu 1400 type veth peer name u1",
    "ip link set u1 address 02:00:00:00:00:02",
    "ip link set u0 addrgenmode none",
    "ip link set u1 addrgenmode none alias other",
    "ip link add br0 address 02:00:00:00:00:03 type bridge",
    "ip link set br0 addrgenmode none",
    "ip link set u1 master br0",
    "ip addr add 192.0.2.1/24 dev u0",
    "ip -6 addr add 2001:db8::1/64 dev u0 nodad",
    "ip addr add 192.0.2.7/32 dev u0",
    "ip link set u0 up",
    "ip link set u1 up",
    "ip link add e0 address 02:00:00:00:00:04 group 7 type vxlan id 7 local 192.0.2.1 dev u0 dstport 4790 nolearning",
    "ip link set e0 type vxlan ttl 3 learning",
    "ip link set e0 addrgenmode none up",
    "ip -6 addr change 2001:db8::1/64 dev u0 preferred_lft 0",
    "ip addr del 192.0.2.7/32 dev u0",
    "ip route add 9.9.9.9 via 192.0.2.9 dev u0",
    "ip route add default via 192.0.2.9 dev u0 onlink table 3000 proto 69",
    "ip route prepend default via 192.0.2.8 dev u0 table 3000 proto 69",
    "ip route add throw 10.0.0.0/8 table 3000 proto static",
    "ip route add unreachable default metric 4278198272 table 3000 proto 69",
    "ip route add blackhole 198.51.100.0/24 tos 8 table 77 proto 69",
    "ip route replace 10.2.0.0/16 table 9 proto 70 nexthop via 192.0.2.8 dev u0 nexthop via 192.0.2.9 dev u0",
    "ip -6 route add default via 2001:db8::9 dev u0 table 3000 proto 69 metric 1",
    "ip -6 route append default via 2001:db8::8 dev u0 table 3000 proto 69 metric 1",
    "ip -6 route add throw fd00::/8 table 3000 proto 69",
    "ip route del throw 10.0.0.0/8 table 3000",
    "ip rule add pref 102 fwmark 0x26000000/0xff000000 lookup 3000 protocol 69",
    "ip rule add pref 101 not fwmark 0x26000000/0xff000000 goto 32766 protocol 69",
    "ip rule add pref 101 iif lo fwmark 9 goto 32766 protocol 70",
    "ip -6 rule add pref 9 not from fd00::/8 prohibit protocol 69",
    "ip rule add pref 9 from 10.0.0.0/8 iif u0 ipproto udp dport 53 lookup 9 protocol 69",
    "ip rule add pref 50 lookup main suppress_prefixlength 0 protocol 70",
    "ip rule add pref 104 fwmark 0x26000000/0xff000000 unreachable protocol 70",
    "ip rule del pref 101 iif lo",
    "ip neigh add 192.0.2.9 lladdr 66:00:00:00:00:01 dev u0 nud permanent",
    "ip neigh add 2001:db8::9 lladdr 66:00:00:00:00:01 dev u0",
    "bridge fdb add 66:00:00:00:00:02 dev e0 dst 192.0.2.2",
    "bridge fdb append 00:00:00:00:00:00 dev e0 dst 192.0.2.3 self permanent",
    "bridge fdb append 00:00:00:00:00:00 dev e0 dst 192.0.2.4 self permanent",
    "bridge fdb replace 66:00:00:00:00:02 dev e0 dst 192.0.2.5 port 99 self permanent",
    "bridge fdb add 66:00:00:00:00:06 dev e0 dst 192.0.2.6 vni 99 self permanent",
    "bridge fdb del 00:00:00:00:00:00 dev e0 dst 192.0.2.3",
    "ip route flush table 9 proto 70",
    "ip neigh flush dev u0 nud permanent",
    "ip rule flush protocol 69",
    "ip -6 route flush table all proto 69",
    "ip -4 addr flush dev u0",
    "ip link set e0 down",
    "ip link set e0 name e1",
    "ip link del br0",
];

/// Commands that empty the FDB of a VXLAN device at once.
const FLUSH: &[&str] = &[
    "ip link add e0 address 02:00:00:00:00:04 type vxlan id 7 dstport 4790",
    "bridge fdb append 00:00:00:00:00:00 dev e0 dst 192.0.2.3 self permanent",
    "bridge fdb add 66:00:00:00:00:06 dev e0 dst 192.0.2.6 self permanent",
    "bridge fdb flush dev e0",
];

/// Rules whose effects `nft` lists.
const RULES: &[&str] = &[
    "add table inet cni",
    "table inet cni {
        set two { type ipv4_addr; elements = { 192.0.2.1, 192.0.2.2 }; }
        chain postrouting {
            type nat hook postrouting priority srcnat;
            ip daddr != 10.244.0.0/16 ip saddr 10.244.0.0/16 masquerade
            ip6 daddr != fd44::/16 ip6 saddr fd44::/16 masquerade
        }
        chain services {
            type nat hook prerouting priority dstnat;
            ip daddr 10.96.0.50 dnat ip to 198.51.100.10
            ip6 daddr fd96::50 dnat ip6 to 2001:db8:51::10
        }
        chain early {
            type filter hook prerouting priority -300;
            meta mark set meta mark | 0x4000
            ct state new counter
            ip saddr 10.244.0.0/16 ct original zone set 5
        }
        chain late { type filter hook prerouting priority -90; meta mark set 0x10; }
        chain quiet {
            type filter hook output priority 0;
            icmp type destination-unreachable drop
            icmpv6 type destination-unreachable drop
        }
    }
    table ip other {
        chain guard { type filter hook postrouting priority 101; ip saddr 192.0.2.1 drop; }
    }",
    "add chain inet cni stray",
    "add set inet cni marks { type mark ; }",
    "add rule inet cni stray counter accept",
    "insert rule inet cni stray drop",
    "delete element inet cni two { 192.0.2.2 }",
    "flush chain inet cni late",
    "delete table ip other",
    "add table inet cni { flags dormant; }",
    "flush table inet cni",
    "flush ruleset",
];

/// Connections put into the kernel's table.
const CONNECTIONS: &[&str] = &[
    "-I -s 10.244.7.1 -d 198.51.100.9 -p udp --sport 1 --dport 53 -t 600",
    "-I -s 10.244.7.2 -d 198.51.100.9 -p tcp --sport 2 --dport 80 -t 600 --state ESTABLISHED",
    "-I -s fd44::7:1 -d 2001:db8::9 -p udp --sport 3 --dport 53 -t 600",
];

/// Runs a command, by the program or by its stand-in, and returns what it prints.
fn run(netns: &Netns, program: &str, words: &[&str], by_stand_in: bool) -> Result<String> {
    let mut command = if by_stand_in { harness::stand_in(program)? } else { Command::new(program) };
    let output = netns.run(|| command.args(words).output())??;
    if output.status.success() {
        return Ok(String::from_utf8(output.stdout)?);
    }
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    Err(format!("{program} {words:?}, by its stand-in {by_stand_in}: {said}").into())
}

/// All that the kernel lists of a namespace, message by message.
fn listed(netns: &Netns) -> Result<String> {
    let list = |line: &str| {
        let words: Vec<&str> = line.split(' ').collect();
        let text = run(netns, words[0], &words[1..], true)?;
        let mut lines: Vec<&str> = text.lines().collect();
        if line == "ip neigh" {
            // The kernel asks for a neighbour when it likes to send it a frame, and forgets it later.
            let stays = |line: &&str| {
                // The state, behind family and interface: NUD_NOARP, NUD_PERMANENT.
                line.split(", ").nth(8).is_some_and(|state| ["40", "80"].contains(&state))
            };
            lines.retain(stays);
        }
        // Of rules and routes the order matters; the kernel has the others in hashes.
        if !line.contains("rule") && !line.contains("route") {
            lines.sort_unstable();
        }
        Ok(format!("{line}\n{}\n", lines.join("\n")))
    };
    let lines = ["ip addr", "ip rule", "ip -6 rule", "ip neigh", "bridge fdb", "ip -d link"];
    let routes = ["ip route show table all", "ip -6 route show table all"];
    lines.into_iter().chain(routes).map(list).collect()
}

/// What is different in another listing.
fn difference(one: &str, other: &str) -> String {
    let only = |one: &str, other: &str| -> Vec<String> {
        one.lines().filter(|line| !other.lines().any(|it| it == *line)).map(str::to_owned).collect()
    };
    format!("{:#?}\n{:#?}", only(one, other), only(other, one))
}

/// Runs each command by the program and by its stand-in, and compares what the kernel lists.
fn have_the_same_effect(commands: &[&str]) -> Result {
    let [programs, stand_ins] = [(); 2].map(|()| harness::given("network namespace", Netns::new()));
    for line in commands {
        let words: Vec<&str> = line.split(' ').collect();
        run(&programs, words[0], &words[1..], false)?;
        run(&stand_ins, words[0], &words[1..], true)?;
        if line.ends_with("peer name u1") {
            // The other end has an address by chance until the next command.
            continue;
        }
        // The kernel tells of the carrier later.
        let mut different = String::new();
        for _ in 0..6000 {
            let [one, other] = [listed(&programs)?, listed(&stand_ins)?];
            different = if one == other { String::new() } else { difference(&one, &other) };
            if different.is_empty() {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        assert_eq!(different, "", "after {line}, by the program and by its stand-in");
    }
    Ok(())
}

#[test]
fn ip_and_bridge() -> Result {
    harness::needs(&["ip", "bridge"]);
    have_the_same_effect(COMMANDS)
}

#[test]
fn bridge_fdb_flush() -> Result {
    harness::needs(&["ip", "bridge"]);
    let netns = harness::given("network namespace", Netns::new());
    run(&netns, "ip", &["link", "add", "e0", "type", "vxlan", "id", "7", "dstport", "4790"], true)?;
    let flushed = run(&netns, "bridge", &["fdb", "flush", "dev", "e0"], false);
    let has = !flushed.is_err_and(|error| error.to_string().contains("not supported"));
    harness::needs_kernel("flush of a VXLAN device's FDB (Linux 6.7)", has);
    have_the_same_effect(FLUSH)
}

#[test]
fn nft() -> Result {
    harness::needs(&["nft"]);
    let [programs, stand_ins] = [(); 2].map(|()| harness::given("network namespace", Netns::new()));
    for rules in RULES {
        let list = ["-s", "list", "ruleset"];
        run(&programs, "nft", &[rules], false)?;
        run(&stand_ins, "nft", &[rules], true)?;
        let [one, other] =
            [run(&programs, "nft", &list, false)?, run(&stand_ins, "nft", &list, false)?];
        assert_eq!(one, other, "after {rules}, by the program and by its stand-in");
    }
    Ok(())
}

#[test]
fn conntrack() -> Result {
    harness::needs(&["conntrack"]);
    let [programs, stand_ins] = [(); 2].map(|()| harness::given("network namespace", Netns::new()));
    let listed = |netns: &Netns| -> Result<Vec<Vec<String>>> {
        let mut found = Vec::new();
        for family in ["ipv4", "ipv6"] {
            let text = run(netns, "conntrack", &["-L", "-f", family], false)?;
            for line in text.lines() {
                let mut words: Vec<_> = line.split_whitespace().map(str::to_owned).collect();
                // The seconds that are left.
                words.remove(2);
                found.push(words);
            }
        }
        found.sort_unstable();
        Ok(found)
    };
    let all: Vec<&str> = CONNECTIONS.iter().copied().chain(["-F"]).collect();
    for (number, line) in all.iter().enumerate() {
        let words: Vec<&str> = line.split(' ').collect();
        run(&programs, "conntrack", &words, false)?;
        run(&stand_ins, "conntrack", &words, true)?;
        let [one, other] = [listed(&programs)?, listed(&stand_ins)?];
        assert_eq!(one, other, "after {line}, by the program and by its stand-in");
        assert_eq!(one.len(), (number + 1) % all.len(), "after {line}");
    }
    Ok(())
}
