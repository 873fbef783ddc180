//! What packets do with other marks, and with other software's.

use common::fleet::{Fleet, Result, check, dual, expect, is_beyond, lab, nft, policy, tool};
use egress_datapath::testing::lab::{EIP_B, EIP_C, POD_A, POD_B, SERVER, STRANGER};
use egress_datapath::{EgressPolicy, Mark, MarkLayout};

const B: Option<&str> = Some("node-b");
const C: Option<&str> = Some("node-c");

#[test]
fn tunnel_packets_not_in_conntrack() -> Result {
    let lab = lab();
    harness::needs(&["conntrack"]);
    let is_tracked = is_beyond("the tunnel's own packets are tracked");
    let mut fleet = Fleet::open(&lab)?;
    fleet.apply(&[policy("p", &[POD_A], B, dual(EIP_B))?])?;
    check(&[expect(&lab.pod_a, SERVER, EIP_B)]);
    let mut own = String::new();
    for family in ["ipv4", "ipv6"] {
        let tracked =
            |more| tool(&lab.node_a.netns, &format!("conntrack -L -f {family} -p udp {more}"));
        own += &tracked("--orig-port-dst 7789")?;
        assert_ne!(tracked("")?, "", "{family}");
    }
    assert_eq!(!own.is_empty(), is_tracked, "{own}");
    Ok(())
}

#[test]
fn mark_values_zero_and_one_steer() -> Result {
    let lab = lab();
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
fn mark_layout_without_prefix_steers() -> Result {
    for layout in [MarkLayout::COMPACT, MarkLayout::COMPACT6] {
        let lab = lab();
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
fn foreign_mark_bits_preserved() -> Result {
    let lab = lab();
    harness::needs(&["nft"]);
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
            oifname egress.vxlan iifname pod10 meta mark & 0x4040 == 0x4040 counter
            oifname eth1 meta mark != 0x4040 counter name stranger
            oifname eth0 udp dport 7789 meta mark != 0x4040 counter name stranger
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

fn two_gateways() -> Result<[EgressPolicy; 2]> {
    Ok([policy("one", &[POD_A], B, dual(EIP_B))?, policy("two", &[STRANGER], C, dual(EIP_C))?])
}
