//! What packets do.

use std::collections::BTreeSet;

use egress_datapath::{Destinations, EgressIp, EgressPolicy, Mark, MarkLayout};
use ipnet::IpNet;

use crate::fleet::{
    Fleet, Result, check, dual, expect, expect_nothing, have, is_beyond, lab, nft, policy, sources,
    tool,
};
use crate::lab::{
    EIP_B, EIP_C, NODE_A, NODE_B_OUTSIDE, OTHER_SERVER, POD_A, POD_B, POD_C, Pair, SERVER,
    STRANGER, hosts, net,
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
fn the_tunnels_own_packets_are_not_tracked_by_who_sends_them() -> Result {
    let Some(lab) = lab()? else { return Ok(()) };
    if !have("conntrack")? {
        return Ok(());
    }
    if is_beyond("the tunnel's own packets are tracked")? {
        return Ok(());
    }
    let mut fleet = Fleet::open(&lab)?;
    fleet.apply(&[policy("p", &[POD_A], B, dual(EIP_B))?])?;
    check(&[expect(&lab.pod_a, SERVER, EIP_B)]);
    for family in ["ipv4", "ipv6"] {
        let tracked =
            |more| tool(&lab.node_a.netns, &format!("conntrack -L -f {family} -p udp {more}"));
        assert_eq!(tracked("--orig-port-dst 7789")?, "", "{family}");
        assert_ne!(tracked("")?, "", "{family}");
    }
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
fn a_masquerade_of_somebody_else_does_not_bind() -> Result {
    if is_beyond("a masquerade ahead of ours binds")? {
        return Ok(());
    }
    let Some(lab) = lab()? else { return Ok(()) };
    if !have("nft")? {
        return Ok(());
    }
    // As a CNI plugin has it, on every node, before ours and after ours was made.
    let masquerade = "chain postrouting {
            type nat hook postrouting priority srcnat;
            ip daddr != 10.244.0.0/16 ip saddr 10.244.0.0/16 masquerade
            ip6 daddr != fd44::/16 ip6 saddr fd44::/16 masquerade
        }";
    for host in lab.nodes() {
        nft(&host.netns, &[], &format!("table inet early {{\n{masquerade}\n}}"))?;
    }
    Fleet::open(&lab)?.apply(&[policy("p", &[POD_A, POD_B], B, dual(EIP_B))?])?;
    for host in lab.nodes() {
        nft(&host.netns, &[], &format!("table inet late {{\n{masquerade}\n}}"))?;
    }
    check(&[
        expect(&lab.pod_a, SERVER, EIP_B),
        expect(&lab.pod_b, SERVER, EIP_B),
        expect(&lab.stranger, SERVER, NODE_A),
    ]);
    Ok(())
}

#[test]
fn a_drop_of_somebody_else_still_drops() -> Result {
    let Some(lab) = lab()? else { return Ok(()) };
    if !have("nft")? {
        return Ok(());
    }
    let rules = "table inet network_policy {
        chain forward {
            type filter hook forward priority filter;
            ip saddr 10.244.1.10 ip daddr 198.51.100.20 drop
            ip6 saddr fd44:1::10 ip6 daddr 2001:db8:51::20 drop
        }
    }";
    nft(&lab.node_a.netns, &[], rules)?;
    Fleet::open(&lab)?.apply(&[policy("p", &[POD_A], B, dual(EIP_B))?])?;
    check(&[expect_nothing(&lab.pod_a, OTHER_SERVER), expect(&lab.pod_a, SERVER, EIP_B)]);
    Ok(())
}

#[test]
fn a_service_address_is_classified_by_where_it_leads() -> Result {
    if is_beyond("packets are classified before destination NAT")? {
        return Ok(());
    }
    let Some(lab) = lab()? else { return Ok(()) };
    if !have("nft")? {
        return Ok(());
    }
    let rules = "table inet services {
        chain prerouting {
            type nat hook prerouting priority dstnat;
            ip daddr 10.96.0.50 dnat ip to 198.51.100.10
            ip6 daddr fd96::50 dnat ip6 to 2001:db8:51::10
            ip daddr 203.0.113.7 dnat ip to 10.244.2.10
            ip6 daddr 2001:db8:7::7 dnat ip6 to fd44:2::10
        }
    }";
    nft(&lab.node_a.netns, &[], rules)?;
    let services: [IpNet; 2] = ["10.96.0.0/16".parse()?, "fd96::/16".parse()?];
    let mut fleet = Fleet::with(&lab, |cluster| cluster.excluded.extend(services))?;
    fleet.apply(&[policy("p", &[POD_A], B, dual(EIP_B))?])?;
    let inside: Pair = ["10.96.0.50".parse()?, "fd96::50".parse()?];
    let outside: Pair = ["203.0.113.7".parse()?, "2001:db8:7::7".parse()?];
    check(&[expect(&lab.pod_a, inside, EIP_B), expect(&lab.pod_a, outside, POD_A)]);
    Ok(())
}

fn two_gateways() -> Result<[EgressPolicy; 2]> {
    Ok([policy("one", &[POD_A], B, dual(EIP_B))?, policy("two", &[STRANGER], C, dual(EIP_C))?])
}

/// The prefixes of these lengths that the addresses are in.
fn around(pair: Pair, lengths: [u8; 2]) -> Vec<IpNet> {
    pair.into_iter().zip(lengths).map(|(ip, length)| net(ip, length).trunc()).collect()
}
