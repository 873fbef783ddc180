//! Changes of objects that are not the datapath's, and receive buffer overflow.

use super::*;

/// Changes of other tables, interfaces and protocols, and of same-named tables of another family.
pub(crate) const NOISE: [&str; 12] = [
    "nft add table inet other; nft delete table inet other",
    "nft add table ip egress_datapath; nft delete table ip egress_datapath",
    "ip rule add pref 9 fwmark 9 lookup 9 protocol 70; ip rule del pref 9",
    "ip route add 9.9.9.9 via 192.0.2.9 dev u0; ip route del 9.9.9.9",
    "ip route add 9.9.9.9 via 192.0.2.9 dev u0 table 9 proto 70; ip route flush table 9",
    "ip route replace 9.9.9.9 dev u0; ip route replace 9.9.9.9 dev foreign; ip route del 9.9.9.9",
    "ip link add v0 type veth peer name v1; ip link set v0 up; ip link set v1 up; ip link del v0",
    "ip addr add 9.9.9.9/32 dev u0; ip addr del 9.9.9.9/32 dev u0",
    "ip -6 addr add fd99::1/64 dev u0 nodad; ip -6 addr del fd99::1/64 dev u0",
    "ip neigh add 192.0.2.99 lladdr 66:00:00:00:00:01 dev u0; ip neigh flush dev u0",
    "mac=66:00:00:00:00:02; bridge fdb add $mac dev foreign dst 192.0.2.2 self
    bridge fdb flush dev foreign || bridge fdb del $mac dev foreign self",
    "sysctl -qw net/ipv4/conf/foreign/rp_filter=1; sysctl -qw net/ipv6/conf/egress.vxlan/hop_limit=9",
];

#[test]
fn foreign_objects_produce_no_events() {
    in_namespace(|| {
        let mut host = Host::new();
        for script in NOISE {
            sh(script);
            let woke = host.is_readable(50);
            let events = host.drain();
            note!("{script}\n    woke: {woke}, {events}");
            assert_eq!(events, ChangeEvents::default(), "{script}");
            assert!(!host.is_readable(0), "{script}");
        }
        assert!(host.egress.repair().unwrap().changes.is_empty());
    });
}

#[test]
fn foreign_rules_ahead_of_ours_are_reported() {
    in_namespace(|| {
        let mut host = Host::new();
        for (rule, reported) in [
            // Without a priority it lands ahead of ours; so do the rules of `wg-quick`.
            ("not fwmark 51820 lookup 51820", true),
            ("lookup 51820", true),
            ("pref 100 from 10.244.0.0/16 lookup 7", true),
            ("pref 100 fwmark 0x26000000/0xff000000 lookup 7", true),
            ("pref 100 prohibit", true),
            ("pref 101 lookup 7", false),
            ("pref 105 lookup 7", false),
            ("pref 100 fwmark 0x80/0x80 iif u0 lookup 7", false),
            ("lookup main suppress_prefixlength 0", false),
            ("pref 100 fwmark 9 lookup 7", false),
            // Cilium's, whose bits no mark in use has.
            ("pref 9 fwmark 0x200/0xf00 lookup 2004", false),
            ("pref 0 lookup local", false),
        ] {
            for command in ["ip", "ip -6"] {
                if command == "ip -6" && rule.contains("10.244") {
                    continue;
                }
                sh(&format!("{command} rule add {rule}"));
                let wanted: &[Component] = if reported { &[Component::Rule] } else { &[] };
                assert_eq!(host.drain().changed, wanted.iter().copied().collect(), "{rule}");
                assert!(host.egress.repair().unwrap().changes.is_empty(), "{rule}");
                sh(&format!("{command} rule del {rule}"));
                assert_eq!(host.drain(), ChangeEvents::default(), "{rule}");
            }
        }
        // After the removal of ours nothing is ahead of it.
        let _report = host.egress.remove().unwrap();
        let _report = host.egress.audit().unwrap();
        let _own = host.drain();
        let _state = host.egress.datapath().read(Known::Nothing).unwrap();
        sh("ip rule add lookup 7");
        assert_eq!(host.drain(), ChangeEvents::default());
    });
}

#[test]
fn foreign_routes_do_not_even_wake() {
    in_namespace(|| {
        let mut host = Host::new();
        // New devices keep sending notifications for a while, longer on a busy machine.
        for _ in 0..10 {
            if !host.is_readable(300) {
                break;
            }
            let _settling = host.drain();
        }
        sh("for i in 1 2 3; do ip route add 9.9.9.$i via 192.0.2.9 dev u0 proto bgp; done
            ip -6 route add 9::/64 via 2001:db8::9 dev u0 proto bgp
            ip route replace 9.9.9.1 via 192.0.2.8 dev u0 proto bgp; ip route flush proto bgp");
        assert!(!host.is_readable(50));
    });
}

#[test]
fn overflow_is_reported_as_lost_and_later_changes_are_reported() {
    in_namespace(|| {
        let mut host = Host::new();
        host.watch.monitor.lock().reserve(0);
        sh(
            "for i in $(seq 40); do echo rule add pref 9$i fwmark 9 lookup 9 protocol 69; done | ip -batch -",
        );
        assert!(host.is_readable(999));
        let events = host.drain();
        assert!(events.lost && !events.is_empty(), "{events}");
        assert!(!host.is_readable(0));
        assert_eq!(host.egress.repair().unwrap().changes.len(), 40);
        assert!(host.drain().is_empty());

        // The same for nf_tables transactions.
        sh("for i in $(seq 40); do echo \"add chain inet egress_datapath c$i\"; done | nft -f -
            for i in $(seq 20); do nft delete chain inet egress_datapath c$i; done");
        assert!(host.drain().lost);
        host.egress.repair().unwrap();
        sh("nft add chain inet egress_datapath last");
        assert_eq!(host.drain().changed, [Component::Firewall].into());
    });
}

#[test]
fn notifications_beyond_the_limit_are_lost_and_read_by_the_next_call() {
    in_namespace(|| {
        let mut host = Host::new();
        let rules = |verb: &str| {
            let rule = format!("echo rule {verb} pref 9$i fwmark 9 lookup 9 protocol 69");
            sh(&format!("for i in $(seq 8); do {rule}; done | ip -batch -"));
        };
        rules("add");
        host.watch.monitor.lock().take_in_at_most(8).unwrap();
        assert!(host.is_readable(0));
        assert!(host.drain().lost);
        rules("del");
        host.watch.monitor.lock().take_in_at_most(3).unwrap();
        // What is left is read now, and no notification is missed after that.
        assert!(host.drain().lost);
        assert!(!host.is_readable(0));
        assert!(host.egress.repair().unwrap().changes.is_empty());
        assert!(host.drain().is_empty());
    });
}

#[test]
fn what_noise_costs() {
    in_namespace(|| {
        let mut host = Host::new();
        sh("for i in $(seq 2000); do
                echo \"neigh add 10.7.$((i / 250)).$((i % 250)) lladdr 66:00:00:00:00:01 dev u0\"
            done | ip -batch -");
        let begin = Instant::now();
        let events = host.drain();
        let neighbours = begin.elapsed();
        sh("for i in $(seq 150); do echo link add d$i type veth peer name e$i; done | ip -batch -");
        let begin = Instant::now();
        let also = host.drain();
        note!(
            "2000 foreign neighbours: {neighbours:?}, {events}; 150 pairs of devices: {:?}, {also}",
            begin.elapsed()
        );
        assert!(events.changed.is_empty() && also.changed.is_empty());
        assert!(begin.elapsed() < Duration::from_secs(9));
    });
}
