//! Every change by another program wakes the watch, is named, and is repaired.

use super::*;
use crate::diff::op::Op;
use crate::kernel::rtnetlink::socket::RouteSocket;
use crate::state::RuleAction;
use crate::types::{Family, Mark};

use Component::{Address, Fdb, Firewall, Link, Neighbour, Route, Rule};

/// Commands of another program, and the parts that must be reported at least.
pub(crate) const EDITS: [(&str, &[Component]); 49] = [
    ("nft delete element inet egress_datapath source4 '{ 10.244.1.2 }'", &[Firewall]),
    ("nft add element inet egress_datapath peer4 '{ 192.0.2.77 }'", &[Firewall]),
    ("nft flush table inet egress_datapath", &[Firewall]),
    ("nft add rule inet egress_datapath prerouting counter", &[Firewall]),
    ("nft delete table inet egress_datapath", &[Firewall]),
    ("nft flush ruleset", &[Firewall]),
    ("nft 'add table inet egress_datapath { flags dormant; }'", &[Firewall]),
    ("ip rule del pref 101", &[Rule]),
    ("ip -6 rule del pref 101", &[Rule]),
    ("ip rule flush protocol 69", &[Rule]),
    ("ip -6 rule flush protocol 69", &[Rule]),
    ("ip rule add pref 9 fwmark 9 lookup 9 protocol 69", &[Rule]),
    (
        "ip rule add pref 9 from 10.0.0.0/8 iif u0 ipproto udp dport 53 lookup 9 protocol 69",
        &[Rule],
    ),
    ("ip -6 rule add pref 9 not from fd00::/8 prohibit protocol 69", &[Rule]),
    ("ip rule add pref 9 fwmark 9 goto 32766 protocol 69", &[Rule]),
    ("ip route flush table all proto 69", &[Route]),
    ("ip route replace default via 192.0.2.9 dev u0 table $TABLE proto 69", &[Route]),
    ("ip route prepend default via 192.0.2.9 dev u0 table $TABLE proto 69", &[Route]),
    ("ip route add 198.51.100.0/24 via 192.0.2.9 dev u0 table $TABLE proto 69", &[Route]),
    ("ip route add blackhole 198.51.100.0/24 tos 8 table 77 proto 69", &[Route]),
    (
        "ip route replace default table $TABLE proto 69 nexthop via 192.0.2.8 dev u0 \
            nexthop via 192.0.2.9 dev u0",
        &[Route],
    ),
    ("ip -6 route add default via 2001:db8::9 dev u0 table $TABLE proto 69 metric 1", &[Route]),
    ("ip -6 route append default via 2001:db8::9 dev u0 table $TABLE proto 69", &[Route]),
    ("ip -6 route flush table all proto 69", &[Route]),
    ("ip route replace default via 192.0.2.9 dev u0 table $TABLE proto static", &[Route]),
    (
        "ip -6 route replace default via 2001:db8::9 dev u0 table $TABLE proto static metric 1024",
        &[Route],
    ),
    ("ip route add throw 9.9.9.9 table $TABLE proto 69", &[Route]),
    ("ip link set egress.vxlan down", &[Link]),
    ("ip link set egress.vxlan down; ip link set egress.vxlan up", &[Link]),
    ("ip link set egress.vxlan mtu 1300", &[Link]),
    ("ip link set egress.vxlan mtu 1200", &[Link, Address]),
    ("ip link set egress.vxlan address 66:00:00:00:00:99", &[Link, Neighbour]),
    ("sysctl -qw net/ipv4/conf/egress.vxlan/rp_filter=1", &[Link]),
    ("sysctl -qw net/ipv4/conf/egress.vxlan/forwarding=0", &[Link]),
    ("sysctl -qw net/ipv6/conf/egress.vxlan/disable_ipv6=1", &[Address]),
    ("ip link set egress.vxlan alias ''", &[Link]),
    ("ip link set egress.vxlan alias 'uplink of rack 7'", &[Link]),
    ("ip link set egress.vxlan group 7", &[Link]),
    ("ip link set egress.vxlan type vxlan learning ttl 3", &[Link]),
    ("ip addr flush dev egress.vxlan", &[Address]),
    ("ip -4 addr del 172.31.0.1/16 dev egress.vxlan", &[Address]),
    ("ip -6 addr del fd31::1/64 dev egress.vxlan", &[Address]),
    ("ip addr add 9.9.9.9/32 dev egress.vxlan", &[Address]),
    // The VXLAN driver supports FDB flush from Linux 6.7 on.
    ("bridge fdb flush dev egress.vxlan || bridge fdb del $MAC dev egress.vxlan self", &[Fdb]),
    ("bridge fdb replace $MAC dev egress.vxlan dst 192.0.2.99 self permanent", &[Fdb]),
    ("bridge fdb replace $MAC dev egress.vxlan dst 192.0.2.2 port 99 self permanent", &[Fdb]),
    ("bridge fdb append 00:00:00:00:00:00 dev egress.vxlan dst 192.0.2.99 self permanent", &[Fdb]),
    ("ip neigh flush dev egress.vxlan nud permanent", &[Neighbour]),
    ("ip link del egress.vxlan", &[Link]),
];

#[test]
fn every_edit_wakes_is_named_and_is_repaired() {
    in_namespace(|| {
        let mut host = Host::new();
        let variables = host.variables();
        for (script, parts) in EDITS {
            sh(&format!("{variables}{script}"));
            assert!(host.is_readable(1000), "{script}");
            let events = host.drain();
            for part in parts {
                assert!(events.changed.contains(part), "{script}: {events}");
            }
            assert!(!events.lost, "{script}: {events}");
            assert_eq!(!events.writers.is_empty(), parts == [Firewall], "{script}: {events}");
            let report = host.egress.repair().unwrap();
            assert!(!report.changes.is_empty(), "{script}");
            note!("{script}\n    {events}\n    {} repaired", report.changes.len());
            host.settle(script);
            assert!(host.reconcile().changes.is_empty(), "{script}");
            host.expect_silence(script);
        }
    });
}

#[test]
fn the_writer_of_a_transaction_is_named() {
    in_namespace(|| {
        let mut host = Host::new();
        let pid =
            sh("nft delete element inet egress_datapath source4 '{ 10.244.1.2 }' & echo $!; wait");
        let events = host.drain();
        let writers: Vec<_> = events.writers.iter().map(|writer| writer.name.as_str()).collect();
        assert_eq!(writers, ["nft"]);
        assert_eq!(events.writers.first().unwrap().pid.to_string(), pid.trim());
        assert_eq!(
            events.to_string(),
            format!(
                "changed by other programs: nf_tables table (nf_tables by nft[{}])",
                pid.trim()
            )
        );
    });
}

#[test]
fn second_of_two_edits_reported() {
    in_namespace(|| {
        let mut host = Host::new();
        for _ in 0..2 {
            sh(&format!(
                "for mac in {} {}; do bridge fdb del $mac dev egress.vxlan self; done
                ip -6 addr del fd31::1/64 dev egress.vxlan",
                node(2).mac(),
                node(3).mac()
            ));
            let _told = host.expect(&[Fdb, Address], "peers");
            sh(&format!(
                "bridge fdb add {} dev egress.vxlan dst 192.0.2.2 self permanent
                bridge fdb add {} dev egress.vxlan dst 192.0.2.3 self permanent
                ip -6 addr add fd31::1/64 dev egress.vxlan nodad",
                node(2).mac(),
                node(3).mac()
            ));
            let _told = host.expect(&[Fdb, Address], "peers");
            sh("ip link set egress.vxlan mtu 1300");
            let _told = host.expect(&[Link], "MTU");
            sh("ip link set egress.vxlan mtu 1450");
            let _told = host.expect(&[Link], "MTU");
        }
    });
}

#[test]
fn watch_that_begins_after_a_restart_reports_changes_of_the_device() {
    in_namespace(|| {
        let Host { egress, watch, cluster, policies } = Host::new();
        drop((egress, watch));
        let mut egress = Reconciler::open(MarkLayout::SEED, TableRange::default()).unwrap();
        assert!(egress.reconcile(&cluster, &policies).unwrap().changes.is_empty());
        let mut watch = egress.datapath().watch().unwrap();
        sh(&format!("bridge fdb del {} dev egress.vxlan self", node(2).mac()));
        assert_eq!(watch.drain().unwrap().changed, [Fdb].into());
        sh("ip link del egress.vxlan");
        assert!(watch.drain().unwrap().changed.contains(&Link));
    });
}

pub(super) const RULE: crate::state::Rule = crate::state::Rule {
    family: Family::V4,
    priority: 9,
    mark: Mark::new(9),
    mask: 9,
    inverted: false,
    input: None,
    action: RuleAction::Unreachable,
};

#[test]
fn how_long_it_takes() {
    in_namespace(|| {
        let mut host = Host::new();
        let mut other = RouteSocket::open().unwrap();
        let mut times = Vec::new();
        for _ in 0..10 {
            let (written, woken) = std::thread::scope(|scope| {
                let sleeper = scope.spawn(|| {
                    assert!(is_readable(&host.watch, 5000));
                    Instant::now()
                });
                std::thread::sleep(Duration::from_millis(20));
                let begin = Instant::now();
                other.make_one(&Op::AddRule(RULE)).unwrap();
                let written = begin.elapsed();
                (written, sleeper.join().unwrap() - begin)
            });
            times.push((written, woken));
            other.make_one(&Op::DeleteRule(RULE)).unwrap();
            assert_eq!(host.drain().changed, [Rule].into());
        }
        note!("from a foreign request to its answer, and to a woken thread: {times:?}");
    });
}
