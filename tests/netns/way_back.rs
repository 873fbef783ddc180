//! The kernel looks up where a packet came from, and where an answer of its own goes, with our
//! mark; neither is to end in the tunnel.

use std::io;

use common::backend::{backend, replies, steering};
use common::fleet::{Fleet, Result, check, dual, expect, lab, nft, policy, tool};
use egress_datapath::datapath::observe;
use egress_datapath::testing::lab::{
    EIP_B, EIP_C, Netns, POD_A, POD_C, Proto, SERVER, STRANGER, probe,
};
use egress_datapath::{Family, KernelDatapath, MarkLayout, Replies, Steering};

const B: Option<&str> = Some("node-b");
const C: Option<&str> = Some("node-c");

/// Forwarding asks with the packet's mark whether its sender is where it came from.
fn looks_back(netns: &Netns, filter: &str) -> io::Result<()> {
    netns.sysctl(&[
        ("ipv4/conf/all/rp_filter", filter),
        ("ipv4/conf/all/src_valid_mark", "1"),
        ("ipv4/fwmark_reflect", "1"),
        ("ipv6/fwmark_reflect", "1"),
    ])
}

fn is_refused(pod: &Netns) -> bool {
    let refused = |to| {
        let error = probe(pod, Proto::Udp, to).err();
        error.is_some_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
    };
    SERVER.into_iter().all(refused)
}

#[test]
fn rp_filter_with_src_valid_mark_packets_steered() -> Result {
    let lab = lab();
    let policies =
        [policy("p", &[POD_A], B, dual(EIP_B))?, policy("q", &[STRANGER], C, dual(EIP_C))?];
    let mut fleet = Fleet::open(&lab)?;
    fleet.apply(&policies)?;
    for filter in ["1", "2", "0"] {
        for node in lab.nodes() {
            looks_back(&node.netns, filter)?;
        }
        check(&[
            expect(&lab.pod_a, SERVER, EIP_B),
            expect(&lab.stranger, SERVER, EIP_C),
            expect(&lab.pod_a, POD_C, POD_A),
        ]);
    }
    // Strictly, a node that is reconciled from the start.
    fleet.remove()?;
    looks_back(&lab.node_a.netns, "1")?;
    fleet.apply(&policies)?;
    check(&[expect(&lab.pod_a, SERVER, EIP_B), expect(&lab.stranger, SERVER, EIP_C)]);
    Ok(())
}

#[test]
fn icmp_error_with_reflected_mark_reaches_pod() -> Result {
    let lab = lab();
    harness::needs(&["nft"]);
    let node = &lab.node_a.netns;
    let mut fleet = Fleet::open(&lab)?;
    fleet.apply(&[policy("p", &[POD_A], B, dual(EIP_B))?])?;
    looks_back(node, "1")?;
    check(&[expect(&lab.pod_a, SERVER, EIP_B)]);
    // Where the packet still has its mark.
    nft(
        node,
        &[],
        "table inet refuse {
            chain forward {
                type filter hook forward priority -200;
                meta mark & 0xff000000 == 0x26000000 counter reject with icmpx port-unreachable
            }
        }",
    )?;
    assert!(is_refused(&lab.pod_a), "the pod heard nothing of it");
    if steering(&MarkLayout::SEED) == Steering::Tables {
        // So that the test is about the rule: without it the answer is sent to the gateway.
        for family in ["-4", "-6"] {
            tool(node, &format!("ip {family} rule del pref 101 iif lo"))?;
        }
        assert!(!is_refused(&lab.pod_a), "the answers went another way");
    }
    Ok(())
}

#[test]
fn gateway_table_has_default_and_unreachable_route() -> Result {
    let lab = lab();
    if steering(&MarkLayout::SEED) != Steering::Tables {
        harness::limit("the egress hook has one rule and one table for all gateways");
    }
    harness::needs(&["ip"]);
    Fleet::open(&lab)?.apply(&[policy("p", &[POD_A], B, dual(EIP_B))?])?;
    let node = &lab.node_a.netns;
    for family in ["-4", "-6"] {
        let rules = tool(node, &format!("ip {family} rule show pref 102"))?;
        let table = rules.split_whitespace().skip_while(|word| *word != "lookup").nth(1);
        let table = table.ok_or("no rule")?;
        let routes = tool(node, &format!("ip {family} route show table {table}"))?;
        let kinds: Vec<_> = routes.lines().map(|line| line.split(' ').next()).collect();
        assert_eq!(kinds, [Some("default"), Some("unreachable")], "{routes}");
    }
    Ok(())
}

#[test]
fn rules_in_any_order_removed() -> Result {
    let lab = lab();
    if steering(&MarkLayout::SEED) != Steering::Tables {
        harness::limit("the egress hook has one rule and one table for all gateways");
    }
    // A gateway in either half.
    let policies =
        [policy("p", &[POD_A], B, dual(EIP_B))?, policy("q", &[STRANGER], C, dual(EIP_C))?];
    let mut fleet = Fleet::open(&lab)?;
    let node = &lab.node_a.netns;
    let ours = |family| -> Result<usize> {
        let rules = observe(&mut node.run(KernelDatapath::open)??)?.rules;
        Ok(rules.iter().filter(|rule| rule.family == family).count())
    };
    let over = "pref 102 fwmark 0x26001000/0xff001000";
    let tunnel = replies(&MarkLayout::SEED, backend()) == Replies::Tunnel;
    let left = if tunnel { 12 } else { 6 };
    for gone in ["pref 101", "pref 101 iif lo", "pref 101 iif egress.vxlan", over, "pref 103"] {
        fleet.apply(&policies)?;
        // What is put back is the last of its priority, and the kernel deletes the first that fits.
        for (option, family) in [("-4", Family::V4), ("-6", Family::V6)] {
            tool(node, &format!("ip {option} rule del {gone}"))?;
            assert_eq!(ours(family)?, left, "{gone}");
        }
        if gone == over {
            check(&[expect(&lab.pod_a, SERVER, EIP_B), expect(&lab.stranger, SERVER, EIP_C)]);
        }
        fleet.mend(&policies, &gone)?;
        check(&[expect(&lab.pod_a, SERVER, EIP_B), expect(&lab.stranger, SERVER, EIP_C)]);
        fleet.remove()?;
        for family in Family::BOTH {
            assert_eq!(ours(family)?, 0, "{gone:?}");
        }
    }
    Ok(())
}
