//! What packets do.

use std::collections::BTreeSet;
use std::net::IpAddr;

use egress_datapath::{Destinations, EgressIp, EgressPolicy, Mark, MarkLayout};
use ipnet::IpNet;

use crate::fleet::{
    Expect, Fleet, Result, check, dual, expect, expect_nothing, have, lab, nft, policy, sources,
    tool,
};
use crate::lab::{
    EIP_B, EIP_C, NODE_A, NODE_B_OUTSIDE, OTHER_SERVER, POD_A, POD_B, POD_C, Pair, Proto, SERVER,
    STRANGER, hosts, net, probe,
};

const B: Option<&str> = Some("node-b");
const C: Option<&str> = Some("node-c");

#[test]
fn the_lab_shows_every_source_as_it_is() -> Result {
    let Some(lab) = lab()? else { return Ok(()) };
    check(&[
        expect(&lab.pod_a, SERVER, POD_A),
        expect(&lab.stranger, OTHER_SERVER, STRANGER),
        expect(&lab.pod_b, SERVER, POD_B),
        expect(&lab.node_a.netns, SERVER, NODE_A),
        expect(&lab.pod_a, POD_C, POD_A),
        expect(&lab.server, POD_A, SERVER),
    ]);
    let all = [POD_A, STRANGER, POD_B, NODE_A].concat();
    assert_eq!(sources(&lab), all.into_iter().collect::<BTreeSet<_>>());
    Ok(())
}

#[test]
fn a_selected_pod_wears_the_egress_ip_and_nobody_else_does() -> Result {
    let Some(lab) = lab()? else { return Ok(()) };
    let policies = [policy("p", &[POD_A], B, dual(EIP_B))?];
    Fleet::open(&lab)?.apply(&policies)?;
    check(&[
        expect(&lab.pod_a, SERVER, EIP_B),
        expect(&lab.pod_a, OTHER_SERVER, EIP_B),
        expect(&lab.stranger, SERVER, STRANGER),
        expect(&lab.pod_b, SERVER, POD_B),
        expect(&lab.node_a.netns, SERVER, NODE_A),
        expect(&lab.pod_a, POD_C, POD_A),
        expect(&lab.pod_a, POD_B, POD_A),
    ]);
    let all = [EIP_B, STRANGER, POD_B, NODE_A].concat();
    assert_eq!(sources(&lab), all.into_iter().collect::<BTreeSet<_>>());
    Ok(())
}

#[test]
fn a_list_of_destinations_steers_nothing_else() -> Result {
    let Some(lab) = lab()? else { return Ok(()) };
    let mut policy = policy("p", &[POD_A], B, dual(EIP_B))?;
    policy.destinations = Destinations::Nets(hosts(&[OTHER_SERVER]));
    Fleet::open(&lab)?.apply(&[policy])?;
    check(&[expect(&lab.pod_a, OTHER_SERVER, EIP_B), expect(&lab.pod_a, SERVER, POD_A)]);
    Ok(())
}

#[test]
fn a_list_with_prefixes_of_several_lengths_goes_by_the_longest() -> Result {
    let Some(lab) = lab()? else { return Ok(()) };
    let mut wide = policy("wide", &[POD_A], B, dual(EIP_B))?;
    wide.priority = 1;
    wide.destinations = Destinations::Nets(around(SERVER, [24, 64]));
    let mut narrow = policy("narrow", &[POD_A], C, dual(EIP_C))?;
    narrow.destinations = Destinations::Nets(around(OTHER_SERVER, [30, 126]));
    Fleet::open(&lab)?.apply(&[wide, narrow])?;
    check(&[expect(&lab.pod_a, OTHER_SERVER, EIP_C), expect(&lab.pod_a, SERVER, EIP_B)]);
    Ok(())
}

#[test]
fn a_prefix_of_sources_takes_the_whole_node() -> Result {
    let Some(lab) = lab()? else { return Ok(()) };
    let mut policy = policy("p", &[POD_A], B, dual(EIP_B))?;
    policy.sources = around(POD_A, [24, 64]);
    Fleet::open(&lab)?.apply(&[policy])?;
    check(&[
        expect(&lab.pod_a, SERVER, EIP_B),
        expect(&lab.stranger, SERVER, EIP_B),
        expect(&lab.pod_b, SERVER, POD_B),
    ]);
    Ok(())
}

#[test]
fn a_pod_on_the_gateway_wears_the_egress_ip() -> Result {
    let Some(lab) = lab()? else { return Ok(()) };
    let policies = [policy("p", &[POD_A, POD_B], B, dual(EIP_B))?];
    Fleet::open(&lab)?.apply(&policies)?;
    check(&[
        expect(&lab.pod_b, SERVER, EIP_B),
        expect(&lab.pod_a, SERVER, EIP_B),
        expect(&lab.pod_b, POD_A, POD_B),
    ]);
    Ok(())
}

#[test]
fn a_gateway_is_a_client_of_another_gateway() -> Result {
    let Some(lab) = lab()? else { return Ok(()) };
    let policies = [
        policy("by-b", &[POD_A, POD_C], B, dual(EIP_B))?,
        policy("by-c", &[POD_B], C, dual(EIP_C))?,
    ];
    Fleet::open(&lab)?.apply(&policies)?;
    check(&[
        expect(&lab.pod_a, SERVER, EIP_B),
        expect(&lab.pod_b, SERVER, EIP_C),
        expect(&lab.pod_c, SERVER, EIP_B),
    ]);
    Ok(())
}

#[test]
fn the_more_specific_of_two_policies_wins_where_it_comes_first() -> Result {
    let Some(lab) = lab()? else { return Ok(()) };
    let mut specific = policy("specific", &[POD_A, POD_B], C, dual(EIP_C))?;
    specific.destinations = Destinations::Nets(hosts(&[OTHER_SERVER]));
    let mut rest = policy("rest", &[POD_A, POD_B], B, dual(EIP_B))?;
    rest.priority = 1;
    Fleet::open(&lab)?.apply(&[rest, specific])?;
    check(&[
        expect(&lab.pod_a, OTHER_SERVER, EIP_C),
        expect(&lab.pod_a, SERVER, EIP_B),
        expect(&lab.pod_b, OTHER_SERVER, EIP_C),
        expect(&lab.pod_b, SERVER, EIP_B),
    ]);
    Ok(())
}

#[test]
fn destinations_of_length_zero_leave_the_cluster_alone() -> Result {
    let Some(lab) = lab()? else { return Ok(()) };
    let mut policy = policy("p", &[POD_A], B, dual(EIP_B))?;
    policy.destinations = Destinations::Nets(around(SERVER, [0, 0]));
    Fleet::open(&lab)?.apply(&[policy])?;
    check(&[
        expect(&lab.pod_a, SERVER, EIP_B),
        expect(&lab.pod_a, POD_B, POD_A),
        expect(&lab.pod_a, POD_C, POD_A),
    ]);
    Ok(())
}

#[test]
fn without_an_egress_ip_of_its_own_a_policy_wears_the_gateways() -> Result {
    let Some(lab) = lab()? else { return Ok(()) };
    let policies = [policy("p", &[POD_A, POD_B], B, EgressIp::Node)?];
    Fleet::open(&lab)?.apply(&policies)?;
    check(&[
        expect(&lab.pod_a, SERVER, NODE_B_OUTSIDE),
        expect(&lab.pod_b, SERVER, NODE_B_OUTSIDE),
    ]);
    Ok(())
}

#[test]
fn a_connection_from_outside_to_a_selected_pod_is_not_steered() -> Result {
    let Some(lab) = lab()? else { return Ok(()) };
    let policies = [policy("p", &[POD_A, POD_B], B, dual(EIP_B))?];
    Fleet::open(&lab)?.apply(&policies)?;
    check(&[
        expect(&lab.server, POD_A, SERVER),
        expect(&lab.stranger, POD_A, STRANGER),
        expect(&lab.pod_c, POD_A, POD_C),
    ]);
    Ok(())
}

#[test]
fn marks_of_value_zero_and_one_steer() -> Result {
    let Some(lab) = lab()? else { return Ok(()) };
    let mut fleet = Fleet::with(&lab, |cluster| {
        for (node, mark) in cluster.nodes.iter_mut().skip(1).zip([0x2600_0000, 0x2600_0100]) {
            node.mark = Some(Mark::new(mark));
        }
    })?;
    fleet.apply(&two_gateways()?)?;
    check(&[expect(&lab.pod_a, SERVER, EIP_B), expect(&lab.stranger, SERVER, EIP_C)]);
    Ok(())
}

#[test]
fn layouts_without_prefix_steer() -> Result {
    for layout in [MarkLayout::COMPACT, MarkLayout::COMPACT6] {
        let Some(lab) = lab()? else { return Ok(()) };
        let mut fleet = Fleet::with(&lab, |cluster| cluster.marks = layout)?;
        fleet.apply(&two_gateways()?)?;
        check(&[
            expect(&lab.pod_a, SERVER, EIP_B),
            expect(&lab.stranger, SERVER, EIP_C),
            expect(&lab.pod_b, SERVER, POD_B),
            expect(&lab.pod_a, POD_B, POD_A),
        ]);
    }
    Ok(())
}

#[test]
fn a_foreign_bit_survives_and_one_set_after_ours_does_not_unsteer() -> Result {
    let Some(lab) = lab()? else { return Ok(()) };
    if !have("nft")? {
        return Ok(());
    }
    // On the client and on the gateway: one bit before us, one after us, and who still has both
    // when all is done.
    let foreign = "table inet foreign {
        counter stranger { }
        chain early {
            type filter hook prerouting priority -300;
            meta mark set meta mark | 0x40
        }
        chain late {
            type filter hook prerouting priority -90;
            meta mark set meta mark | 0x4000
        }
        chain last {
            type filter hook postrouting priority 300;
            meta l4proto != { tcp, udp } return
            oifname egress.vxlan iifname pod10 meta mark 0x4040 counter
            oifname { egress.vxlan, eth1 } meta mark != 0x4040 counter name stranger
        }
    }";
    for layout in [MarkLayout::SEED, MarkLayout::COMPACT] {
        let mut fleet = Fleet::with(&lab, |cluster| cluster.marks = layout)?;
        for host in [&lab.node_a, &lab.node_b] {
            nft(&host.netns, &[], foreign)?;
        }
        fleet.apply(&two_gateways()?)?;
        check(&[expect(&lab.pod_a, SERVER, EIP_B), expect(&lab.pod_a, POD_B, POD_A)]);
        let into_tunnel = tool(&lab.node_a.netns, "nft list chain inet foreign last")?;
        let count = into_tunnel.lines().find(|line| line.contains("oifname \"egress.vxlan\""));
        assert!(count.is_some_and(|line| !line.contains("packets 0 ")), "{into_tunnel}");
        for host in [&lab.node_a, &lab.node_b] {
            let counter = tool(&host.netns, "nft list counter inet foreign stranger")?;
            assert!(counter.contains("packets 0 "), "{}: {counter}", host.name);
            tool(&host.netns, "nft delete table inet foreign")?;
        }
    }
    Ok(())
}

#[test]
fn strict_reverse_path_filtering_elsewhere_does_not_matter() -> Result {
    let Some(lab) = lab()? else { return Ok(()) };
    // A filter of `all` goes for every device that has none of its own or a laxer number.
    for host in lab.nodes() {
        let strict = ["all", "default", "eth0"].map(|of| format!("ipv4/conf/{of}/rp_filter"));
        host.netns.sysctl(&strict.each_ref().map(|name| (name.as_str(), "1")))?;
    }
    let policies = [policy("p", &[POD_A, POD_B], B, dual(EIP_B))?];
    Fleet::open(&lab)?.apply(&policies)?;
    check(&[
        expect(&lab.pod_a, SERVER, EIP_B),
        expect(&lab.pod_b, SERVER, EIP_B),
        expect(&lab.pod_a, POD_C, POD_A),
    ]);
    Ok(())
}

#[test]
fn marks_that_the_kernel_looks_back_with_do_not_matter() -> Result {
    let Some(lab) = lab()? else { return Ok(()) };
    lab.node_a.netns.sysctl(&[
        ("ipv4/conf/all/rp_filter", "1"),
        ("ipv4/conf/all/src_valid_mark", "1"),
        ("ipv4/fwmark_reflect", "1"),
    ])?;
    let policies = [policy("p", &[POD_A], B, dual(EIP_B))?];
    Fleet::open(&lab)?.apply(&policies)?;
    check(&[expect(&lab.pod_a, SERVER, EIP_B)]);
    Ok(())
}

#[test]
fn a_policy_without_a_gateway_lets_nothing_out() -> Result {
    let Some(lab) = lab()? else { return Ok(()) };
    let policies = [policy("p", &[POD_A, POD_B], None, dual(EIP_B))?];
    let reports = Fleet::open(&lab)?.apply(&policies)?;
    assert_eq!(reports.iter().map(|report| report.findings.len()).collect::<Vec<_>>(), [2; 3]);
    check(&[
        expect_nothing(&lab.pod_a, SERVER),
        expect_nothing(&lab.pod_b, SERVER),
        expect(&lab.pod_a, POD_B, POD_A),
        expect(&lab.server, POD_A, SERVER),
    ]);
    // What was seen are the answers to the server's own questions.
    let all = POD_A.into_iter().collect::<BTreeSet<_>>();
    assert_eq!(sources(&lab), all);
    check(&[expect_nothing(&lab.pod_a, SERVER)]);
    assert_eq!(sources(&lab), BTreeSet::new());
    Ok(())
}

#[test]
fn a_family_without_an_egress_ip_stays_inside() -> Result {
    let Some(lab) = lab()? else { return Ok(()) };
    let of_one_family = EIP_B.map(|ip| match ip {
        IpAddr::V4(v4) => EgressIp::V4(v4),
        IpAddr::V6(v6) => EgressIp::V6(v6),
    });
    for egress_ip in of_one_family {
        let policies = [policy("p", &[POD_A, POD_B], B, egress_ip)?];
        Fleet::open(&lab)?.apply(&policies)?;
        sources(&lab);
        let source = EIP_B.map(|ip| egress_ip.addresses().find(|address| *address == ip));
        check(&[
            Expect { from: &lab.pod_a, to: SERVER, source },
            Expect { from: &lab.pod_b, to: SERVER, source },
            expect(&lab.pod_a, POD_B, POD_A),
        ]);
        assert_eq!(sources(&lab), egress_ip.addresses().collect::<BTreeSet<_>>());
    }
    Ok(())
}

#[test]
fn a_policy_moves_and_goes() -> Result {
    let Some(lab) = lab()? else { return Ok(()) };
    let mut fleet = Fleet::open(&lab)?;
    fleet.apply(&[policy("p", &[POD_A, POD_B], B, dual(EIP_B))?])?;
    check(&[expect(&lab.pod_a, SERVER, EIP_B), expect(&lab.pod_b, SERVER, EIP_B)]);
    fleet.apply(&[policy("p", &[POD_A, POD_B], C, dual(EIP_C))?])?;
    check(&[expect(&lab.pod_a, SERVER, EIP_C), expect(&lab.pod_b, SERVER, EIP_C)]);
    fleet.apply(&[policy("p", &[POD_B], C, dual(EIP_C))?])?;
    check(&[expect(&lab.pod_a, SERVER, POD_A), expect(&lab.pod_b, SERVER, EIP_C)]);
    fleet.remove()?;
    check(&[expect(&lab.pod_a, SERVER, POD_A), expect(&lab.pod_b, SERVER, POD_B)]);
    Ok(())
}

#[test]
fn a_gateway_that_is_not_ready_lets_nothing_out() -> Result {
    let Some(lab) = lab()? else { return Ok(()) };
    let mut fleet = Fleet::open(&lab)?;
    fleet.apply(&[policy("p", &[POD_A], C, dual(EIP_C))?])?;
    let policies = [policy("p", &[POD_A], B, dual(EIP_B))?];
    // Everybody but the new gateway knows.
    fleet.apply_to("node-c", &policies)?;
    fleet.apply_to("node-a", &policies)?;
    check(&[expect_nothing(&lab.pod_a, SERVER)]);
    assert_eq!(sources(&lab), BTreeSet::new());
    fleet.apply(&policies)?;
    check(&[expect(&lab.pod_a, SERVER, EIP_B)]);
    Ok(())
}

#[test]
fn nothing_gets_out_while_a_piece_is_missing_and_it_is_put_back() -> Result {
    let Some(lab) = lab()? else { return Ok(()) };
    if !have("ip")? {
        return Ok(());
    }
    let policies = [policy("p", &[POD_A], B, dual(EIP_B))?];
    let mut fleet = Fleet::open(&lab)?;
    fleet.apply(&policies)?;
    for damage in [
        &["ip link set egress.vxlan down"][..],
        &["ip link del egress.vxlan"],
        &["ip -4 rule del pref 101", "ip -6 rule del pref 101"],
        &["ip -4 rule del pref 102", "ip -6 rule del pref 102", "ip link set egress.vxlan down"],
        &["ip -4 route flush table all proto 69", "ip -6 route flush table all proto 69"],
        &["ip neigh flush all dev egress.vxlan nud permanent"],
        &["ip addr flush dev egress.vxlan"],
    ] {
        for line in damage {
            tool(&lab.node_a.netns, line)?;
        }
        let wearing: BTreeSet<_> = EIP_B.into_iter().collect();
        let _either_way = probe(&lab.pod_a, Proto::Udp, SERVER[0]);
        let _either_way = probe(&lab.pod_a, Proto::Udp, SERVER[1]);
        let seen = sources(&lab);
        assert!(seen.is_subset(&wearing), "after {damage:?}: {seen:?}");
        fleet.apply(&policies).map_err(|error| format!("after {damage:?}: {error}"))?;
        let again = fleet.apply(&policies)?;
        let changes = again.iter().map(|report| report.changes.to_string()).collect::<String>();
        assert_eq!(changes, "", "after {damage:?}");
        check(&[expect(&lab.pod_a, SERVER, EIP_B)]);
        sources(&lab);
    }
    Ok(())
}

fn two_gateways() -> Result<[EgressPolicy; 2]> {
    Ok([policy("one", &[POD_A], B, dual(EIP_B))?, policy("two", &[STRANGER], C, dual(EIP_C))?])
}

/// The prefixes of these lengths that the addresses are in.
fn around(pair: Pair, lengths: [u8; 2]) -> Vec<IpNet> {
    pair.into_iter().zip(lengths).map(|(ip, length)| net(ip, length).trunc()).collect()
}
