//! What others break is put right, and nothing gets out meanwhile.

use std::thread;

use common::backend::{backend, steering};
use common::fleet::{
    Expect, Fleet, Result, check, dual, expect, expect_nothing, lab, policy, sources, tool,
    unless_beyond,
};
use egress_datapath::datapath::observe;
use egress_datapath::state::RuleAction;
use egress_datapath::testing::lab::{EIP_B, POD_A, POD_B, POD_C, Proto, SERVER, STRANGER, probe};
use egress_datapath::{
    Backend, Cluster, Finding, KernelDatapath, MarkLayout, Node, NodeName, Steering,
};
use ipnet::IpNet;

const B: Option<&str> = Some("node-b");

#[test]
fn policy_without_gateway_reported_by_every_node() -> Result {
    let lab = lab();
    let policies = [policy("p", &[POD_A, POD_B], None, dual(EIP_B))?];
    let reports = Fleet::open(&lab)?.apply(&policies)?;
    assert_eq!(reports.iter().map(|report| report.findings.len()).collect::<Vec<_>>(), [2; 3]);
    Ok(())
}

#[test]
fn invalid_policies_and_nodes_silent_beside_a_valid_policy() -> Result {
    let lab = lab();
    let stale = |name: &str, tunnel: &[&str]| -> Result<Node> {
        let tunnel = tunnel.iter().map(|net| net.parse()).collect::<std::result::Result<_, _>>()?;
        Ok(Node::new(NodeName::new(name)?, vec!["10.10.0.99".parse()?], tunnel))
    };
    let stale = [
        stale("no-tunnel", &[])?,
        stale("old", &["172.31.0.98/16"])?,
        stale("new", &["172.31.0.99/16"])?,
    ];
    let beside = |cluster: &mut Cluster| cluster.nodes.extend(stale.clone());
    let mut by_host_bits = policy("host-bits", &[POD_C], B, dual(EIP_B))?;
    for net in &mut by_host_bits.sources {
        *net = IpNet::new(net.addr(), net.max_prefix_len() - 8)?;
    }
    let policies = [
        policy("good", &[POD_A], B, dual(EIP_B))?,
        policy("unknown", &[STRANGER], Some("gone"), dual(EIP_B))?,
        policy("left-out", &[POD_B], Some("old"), dual(EIP_B))?,
        by_host_bits,
        policy("nobody", &[], B, dual(EIP_B))?,
    ];
    // The second time all nodes begin anew, with what the first have left in the kernel.
    for first in [true, false] {
        let mut fleet = Fleet::with(&lab, beside)?;
        for report in fleet.apply(&policies)? {
            let codes: Vec<_> = report.findings.iter().map(Finding::code).collect();
            assert_eq!(
                codes,
                [
                    "shared_by_nodes",
                    "no_tunnel",
                    "shared_by_nodes",
                    "host_bits",
                    "gateway_left_out",
                    "no_sources",
                    "unknown_gateway",
                ]
            );
            assert!(first || report.changes.is_empty(), "{}", report.changes);
        }
        check(&[
            expect(&lab.pod_a, SERVER, EIP_B),
            expect_nothing(&lab.stranger, SERVER),
            expect_nothing(&lab.pod_b, SERVER),
            expect_nothing(&lab.pod_c, SERVER),
        ]);
        assert_eq!(sources(&lab), EIP_B.into_iter().collect());
    }
    Ok(())
}

#[test]
fn missing_ipv6_leaves_ipv4_in_force() -> Result {
    let lab = lab();
    for host in lab.nodes() {
        let off = [("ipv6/conf/default/disable_ipv6", "1"), ("ipv4/conf/default/forwarding", "0")];
        host.netns.sysctl(&off)?;
    }
    let policies = [policy("p", &[POD_A], B, dual(EIP_B))?];
    let mut fleet = Fleet::open(&lab)?;
    // A datapath that is called from another namespace cannot enable IPv6 in its own.
    let enables = backend() != Backend::Nftables;
    for again in [false, true] {
        for report in fleet.apply(&policies)? {
            let codes: Vec<_> = report.findings.iter().map(Finding::code).collect();
            assert_eq!(codes, if enables { vec![] } else { vec!["family_unavailable"] });
            assert!(!again || report.changes.is_empty(), "{}", report.changes);
        }
    }
    let v6 = if enables { Some(EIP_B[1]) } else { None };
    check(&[Expect { from: &lab.pod_a, to: SERVER, source: [Some(EIP_B[0]), v6] }]);
    assert!(sources(&lab).is_subset(&EIP_B.into_iter().collect()));
    for host in lab.nodes() {
        host.netns.sysctl(&[("ipv6/conf/egress.vxlan/disable_ipv6", "0")])?;
    }
    fleet.audit()?;
    for report in fleet.apply(&policies)? {
        assert!(report.findings.is_empty() && report.changes.is_empty(), "{report:?}");
    }
    check(&[expect(&lab.pod_a, SERVER, EIP_B)]);
    sources(&lab);
    // The interface loses its IPv6 objects, and all of IPv6 is left out again.
    lab.node_a.netns.sysctl(&[("ipv6/conf/egress.vxlan/disable_ipv6", "1")])?;
    fleet.mend(&policies, &"IPv6 disabled on the tunnel interface")?;
    check(&[Expect { from: &lab.pod_a, to: SERVER, source: [Some(EIP_B[0]), v6] }]);
    assert_eq!(sources(&lab).len(), if enables { 2 } else { 1 });
    Ok(())
}

#[test]
fn missing_object_no_leak_and_restored() -> Result {
    let lab = lab();
    let policies = [policy("p", &[POD_A], B, dual(EIP_B))?];
    let mut fleet = Fleet::open(&lab)?;
    fleet.apply(&policies)?;
    tool(&lab.node_a.netns, "ip link add bridge type bridge")?;
    tool(&lab.node_a.netns, "ip link set bridge up")?;
    for damage in [
        &["ip link set egress.vxlan down"][..],
        &["ip link del egress.vxlan"],
        &["ip -4 rule del pref 102", "ip -6 rule del pref 102"],
        &["ip -4 rule del pref 102", "ip -6 rule del pref 102", "ip link set egress.vxlan down"],
        &["ip -4 rule del pref 101", "ip -6 rule del pref 101"],
        &["ip -4 rule del pref 101 iif lo", "ip -6 rule del pref 101 iif lo"],
        &["ip -4 rule del pref 101 iif egress.vxlan", "ip -6 rule del pref 101 iif egress.vxlan"],
        &[
            "ip -4 rule del pref 101 iif lo",
            "ip -6 rule del pref 101 iif lo",
            "ip -4 rule del pref 102",
            "ip -6 rule del pref 102",
        ],
        &["ip -4 rule del pref 104", "ip -6 rule del pref 104"],
        &["ip -4 rule flush proto 69", "ip -6 rule flush proto 69"],
        &["ip -4 route flush table all proto 69", "ip -6 route flush table all proto 69"],
        &["ip neigh flush all dev egress.vxlan nud permanent"],
        &["ip addr flush dev egress.vxlan"],
        &[
            "ip -4 route prepend default via 10.10.0.1 table TABLE proto 69",
            "ip -6 route add default via fd10::1 table TABLE metric 1 proto 69",
        ],
        &[
            "ip -4 rule add pref 50 from 10.244.0.0/16 lookup main proto 69",
            "ip -6 rule add pref 50 from fd44::/16 lookup main proto 69",
        ],
        &["ip link set egress.vxlan alias uplink", "ip link set egress.vxlan down"],
        &["ip link set egress.vxlan master bridge"],
    ] {
        let hook = steering(&MarkLayout::SEED) == Steering::EgressHook;
        if hook && damage.iter().any(|line| line.contains("pref 101")) {
            // There is no guard where there is but one rule to be spared.
            continue;
        }
        let rules = observe(&mut lab.node_a.netns.run(KernelDatapath::open)??)?.rules;
        let table = rules.into_iter().find_map(|rule| match rule.action {
            RuleAction::Lookup(table) => Some(table.to_string()),
            RuleAction::Unreachable | RuleAction::Goto(_) => None,
        });
        for line in damage {
            let line = line.replace("TABLE", table.as_deref().unwrap_or_default());
            tool(&lab.node_a.netns, &line)?;
        }
        let pod = &lab.pod_a;
        thread::scope(|scope| {
            for to in SERVER {
                // Answered or not: what counts is what the server sees.
                scope.spawn(move || probe(pod, Proto::Udp, to));
            }
        });
        fleet.mend_unleaked(&lab, &policies, &damage)?;
    }
    Ok(())
}

#[test]
fn table_changed_by_others_restored() -> Result {
    unless_beyond("there is no table of nf_tables; see objects_changed_by_others_restored");
    let lab = lab();
    let policies = [policy("p", &[POD_A], B, dual(EIP_B))?];
    let mut fleet = Fleet::open(&lab)?;
    fleet.apply(&policies)?;
    for damage in [
        "nft flush ruleset",
        "nft delete table inet egress_datapath",
        "nft flush table inet egress_datapath",
        "nft flush chain inet egress_datapath nat_postrouting",
        "nft flush map inet egress_datapath source4",
        "nft add rule inet egress_datapath prerouting counter",
        "nft insert rule inet egress_datapath forward drop",
        "nft add chain inet egress_datapath stray",
        "nft add table inet egress_datapath { flags dormant ; }",
        "nft add set inet egress_datapath stray { type mark ; }",
        "nft add element inet egress_datapath source4 { 10.244.1.99 : 7:7 }",
        "nft add element inet egress_datapath excluded4 { 198.51.100.0/24 }",
    ] {
        for host in [&lab.node_a, &lab.node_b] {
            tool(&host.netns, damage)?;
        }
        fleet.mend(&policies, &damage)?;
        check(&[expect(&lab.pod_a, SERVER, EIP_B)]);
    }
    Ok(())
}
