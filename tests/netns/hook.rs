//! Steering by the egress hook: what it closes, and who comes and goes.

use std::{fs, thread};

use common::backend::{backend, replies};
use common::fleet::{
    Fleet, Result, assert_same, check, dual, expect, lab, needs_owners, open, policy, settled,
    sources, tool,
};
use egress_datapath::alloc::TableRange;
use egress_datapath::datapath::observe;
use egress_datapath::testing::lab::{EIP_B, EIP_C, Host, POD_A, Proto, SERVER, STRANGER, probe};
use egress_datapath::{
    Backend, Cluster, Family, KernelDatapath, MarkLayout, Ownership, Reconciler, Replies, Steering,
};

const B: Option<&str> = Some("node-b");

fn by_hook(cluster: &mut Cluster) {
    (cluster.backend, cluster.steering) = (Backend::Nftables, Steering::EgressHook);
}

/// What is there of either way of steering.
fn steers_by(host: &Host) -> Result<[usize; 3]> {
    let found = observe(&mut host.netns.run(KernelDatapath::open)??)?;
    let rules = found.rules.iter().filter(|rule| rule.family == Family::V4).count();
    let neighbours = found.neighbours.keys().filter(|ip| ip.is_ipv4()).count();
    Ok([usize::from(found.hook.is_some()), rules, neighbours])
}

#[test]
fn egress_hook_missing_object_no_leak_and_restored() -> Result {
    let lab = lab();
    let policies = [policy("p", &[POD_A], B, dual(EIP_B))?];
    let mut fleet = Fleet::with(&lab, by_hook)?;
    fleet.apply(&policies)?;
    check(&[expect(&lab.pod_a, SERVER, EIP_B)]);
    let tunnel = replies(&MarkLayout::SEED, backend()) == Replies::Tunnel;
    assert_eq!(steers_by(&lab.node_a)?, [1, if tunnel { 10 } else { 2 }, 1]);
    sources(&lab);
    for (damage, closed) in [
        (&["nft delete table netdev egress_datapath"][..], true),
        (&["nft flush chain netdev egress_datapath egress"], true),
        (&["nft insert rule netdev egress_datapath egress return"], true),
        (&["nft flush map netdev egress_datapath next_hop"], true),
        (&["nft add table netdev egress_datapath { flags dormant ; }"], true),
        (
            &[
                "nft flush chain netdev egress_datapath egress",
                "nft delete chain netdev egress_datapath egress",
            ],
            true,
        ),
        (&["nft add chain netdev egress_datapath stray"], false),
        (&["nft flush ruleset"], false),
        (&["ip link set egress.vxlan down"], true),
        (&["ip link del egress.vxlan"], true),
        (&["ip link set egress.vxlan down", "ip link set egress.vxlan name other"], true),
        (&["ip neigh flush all dev egress.vxlan nud permanent"], true),
        (&["ip -4 rule del pref 102", "ip -6 rule del pref 102"], false),
        (&["ip -4 rule del pref 104", "ip -6 rule del pref 104"], false),
        (&["ip -4 rule flush proto 69", "ip -6 rule flush proto 69"], true),
        (&["ip -4 route flush table all proto 69", "ip -6 route flush table all proto 69"], true),
    ] {
        for line in damage {
            tool(&lab.node_a.netns, line)?;
        }
        let pod = &lab.pod_a;
        if damage != ["nft flush ruleset"] {
            let answered = thread::scope(|scope| {
                let asked = SERVER.map(|to| scope.spawn(move || probe(pod, Proto::Udp, to)));
                asked.map(|asked| asked.join().is_ok_and(|answer| answer.is_ok()))
            });
            assert_eq!(answered, [!closed; 2], "after {damage:?}");
        }
        fleet.mend_unleaked(&lab, &policies, &damage)?;
    }
    Ok(())
}

#[test]
fn egress_hook_frame_to_shared_next_hop_dropped() -> Result {
    let lab = lab();
    let mut fleet = Fleet::with(&lab, by_hook)?;
    fleet.apply(&[policy("p", &[POD_A], B, dual(EIP_B))?])?;
    let node = &lab.node_a.netns;
    let sent = || -> Result<Vec<u64>> {
        let devices = node.run(|| fs::read_to_string("/proc/thread-self/net/dev"))??;
        let line = devices.lines().find_map(|line| line.trim().strip_prefix("egress.vxlan:"));
        // Behind eight numbers about what was received.
        let numbers = line.unwrap_or_default().split_whitespace().skip(8);
        Ok(numbers.map(str::parse).collect::<std::result::Result<_, _>>()?)
    };
    // As if nothing looked at what the device is given.
    tool(node, "nft insert rule netdev egress_datapath egress return")?;
    let [_, before, _, dropped, ..] = sent()?[..] else { return Err("no counters".into()) };
    for to in SERVER {
        assert!(probe(&lab.pod_a, Proto::Udp, to).is_err());
    }
    let [_, after, _, dropped_after, ..] = sent()?[..] else { return Err("no counters".into()) };
    assert_eq!(after, before, "frames were sent");
    assert!(dropped_after >= dropped + 2, "{dropped} to {dropped_after} frames were dropped");
    Ok(())
}

#[test]
fn steering_change_restart_is_noop() -> Result {
    let lab = lab();
    harness::needs(&["ip", "nft"]);
    let mut before = Vec::new();
    for host in lab.nodes() {
        before.push(settled(&host.netns)?);
    }
    let policies = [
        policy("p", &[POD_A], B, dual(EIP_B))?,
        policy("q", &[STRANGER], Some("node-c"), dual(EIP_C))?,
    ];
    let ask = || {
        check(&[expect(&lab.pod_a, SERVER, EIP_B), expect(&lab.stranger, SERVER, EIP_C)]);
    };
    for steering in [Steering::Tables, Steering::EgressHook, Steering::Tables, Steering::EgressHook]
    {
        for host in lab.nodes().into_iter().rev() {
            let cluster = lab.cluster(host)?.with_steering(steering);
            open(host, MarkLayout::SEED)?.reconcile(&cluster, &policies)?;
            let again = open(host, MarkLayout::SEED)?.reconcile(&cluster, &policies)?.changes;
            assert!(again.is_empty(), "{steering:?}: {again}");
        }
        ask();
        // With tables three guards, one for each half of the gateways and one between them, and
        // the closing one.
        let wanted = if steering == Steering::Tables { [0, 7, 2] } else { [1, 2, 1] };
        assert_eq!(steers_by(&lab.node_a)?, wanted, "{steering:?}");
    }
    for host in lab.nodes() {
        open(host, MarkLayout::SEED)?.remove()?;
    }
    // The hosts know each other now, and their pods.
    let ours = |text: &str| -> String {
        text.lines()
            .filter(|line| !line.contains(" lladdr "))
            .flat_map(|line| [line, "\n"])
            .collect()
    };
    for (host, before) in lab.nodes().into_iter().zip(before) {
        assert_same(&ours(&before), &ours(&settled(&host.netns)?));
    }
    Ok(())
}

#[test]
fn egress_hook_owned_table_protected_and_taken_over() -> Result {
    let lab = lab();
    needs_owners(&lab)?;
    let host = &lab.node_a;
    let policies = [policy("p", &[POD_A], B, dual(EIP_B))?];
    let mut cluster = lab.cluster(host)?;
    by_hook(&mut cluster);
    let exclusive = || -> Result<Reconciler<KernelDatapath>> {
        let (marks, tables) = (MarkLayout::SEED, TableRange::default());
        Ok(host.netns.run(|| Reconciler::open_as(Ownership::Exclusive, marks, tables))??)
    };
    for first in [true, false] {
        let mut owner = exclusive()?;
        let changes = owner.reconcile(&cluster, &policies)?.changes;
        assert_eq!(changes.is_empty(), !first, "{changes}");
        for line in [
            "nft delete table netdev egress_datapath",
            "nft flush map netdev egress_datapath next_hop",
        ] {
            let refused = tool(&host.netns, line).unwrap_err().to_string();
            assert!(refused.contains("not permitted"), "{refused}");
        }
    }
    let mut last = exclusive()?;
    last.remove()?;
    assert!(observe(last.datapath())?.is_empty());
    Ok(())
}
