//! What policies have counted, in memory.

use std::collections::BTreeMap;

use egress_datapath::datapath::{Counts, observe};
use egress_datapath::explain::Packet;
use egress_datapath::state::State;
use egress_datapath::{
    Changes, Count, Datapath, EgressPolicy, Family, NodeName, PolicyId, Reconciler, Sim, Update,
};

use crate::{cluster, dual, net, nets, policy, v4};

type Egress = Reconciler<Sim>;

const A: &str = "10.244.1.10";
const B: &str = "10.244.1.11";

fn counting(node: &str) -> egress_datapath::Cluster {
    let mut cluster = cluster(node);
    cluster.policy_counters = true;
    cluster
}

fn two() -> Vec<EgressPolicy> {
    let eip = dual("198.51.100.200", "2001:db8:51::200");
    vec![
        policy("shop/one", &["10.244.1.10/32", "fd44:1::10/128"], Some("b"), eip),
        policy("shop/two", &["10.244.1.11/32"], Some("b"), v4("198.51.100.201")),
    ]
}

/// So many datagrams, each of a connection of its own.
fn send(egress: &mut Egress, source: &str, ports: std::ops::Range<u16>) {
    let source: std::net::IpAddr = source.parse().unwrap();
    let server = if source.is_ipv4() { "192.0.2.1" } else { "2001:db8::1" }.parse().unwrap();
    for port in ports {
        egress.datapath().send(Packet::udp(source, port, server, 53));
    }
}

fn counts(egress: &mut Egress) -> BTreeMap<(String, Family), (u64, u64)> {
    let counts = egress.counters().unwrap().into_iter();
    let pair = |Count { packets, bytes }| (packets, bytes);
    counts.map(|one| ((one.policy.to_string(), one.family), pair(one.count))).collect()
}

fn expected(of: &[(&str, Family, u64)]) -> BTreeMap<(String, Family), (u64, u64)> {
    let length = |family| if family == Family::V4 { 28 } else { 48 };
    let one = |&(id, family, count): &(&str, Family, u64)| {
        ((id.to_owned(), family), (count, count * length(family)))
    };
    of.iter().map(one).collect()
}

#[test]
fn counters_survive_all_but_policy_removal() {
    use Family::{V4, V6};
    let cluster = counting("a");
    let mut egress = Reconciler::new(Sim::new());
    assert_eq!(egress.counters().unwrap(), []);
    let mut policies = two();
    egress.reconcile(&cluster, &policies).unwrap();
    send(&mut egress, A, 1..8);
    send(&mut egress, B, 1..4);
    send(&mut egress, "fd44:1::10", 1..3);
    let mut all = [("shop/one", V4, 7), ("shop/one", V6, 2), ("shop/two", V4, 3)];
    assert_eq!(counts(&mut egress), expected(&all));

    // Nothing is different because something was counted.
    assert!(egress.audit().unwrap().changes.is_empty());
    assert!(egress.reconcile(&cluster, &policies).unwrap().changes.is_empty());

    // Moved, with other members and another address; by a plan of everything and by an update.
    policies[0].gateway = Some(NodeName::new("c").unwrap());
    policies[0].egress_ip = v4("198.51.100.9");
    policies[0].sources.push(net("10.244.1.77/32"));
    policies[1].priority = 7;
    policies[1].destinations = egress_datapath::Destinations::Nets(nets(&["192.0.2.0/24"]));
    egress.reconcile(&cluster, &policies).unwrap();
    let closed = Update::Move { policy: policies[1].id.clone(), gateway: None };
    egress.update::<EgressPolicy>([closed]).unwrap();
    policies[1].gateway = None;
    assert_eq!(counts(&mut egress), expected(&all));

    // A policy that is closed counts what it drops; a known connection is counted packet by packet.
    send(&mut egress, A, 1..3);
    send(&mut egress, B, 9..10);
    (all[0].2, all[2].2) = (9, 4);
    assert_eq!(counts(&mut egress), expected(&all));

    // Others come and go.
    let other = policy("other", &["10.244.1.10/32"], Some("b"), v4("198.51.100.202"));
    egress.reconcile(&cluster, policies.iter().chain([&other])).unwrap();
    egress.update([Update::<EgressPolicy>::Remove(other.id)]).unwrap();
    assert_eq!(counts(&mut egress), expected(&all));

    // Who comes after knows nothing, and finds them.
    let kernel = std::mem::take(egress.datapath());
    let mut egress = Reconciler::new(kernel);
    assert_eq!(egress.counters().unwrap(), []);
    assert!(egress.reconcile(&cluster, &policies).unwrap().changes.is_empty());
    assert_eq!(counts(&mut egress), expected(&all));

    // With the policy it ends.
    egress.update([Update::<EgressPolicy>::Remove(PolicyId::new("shop/one").unwrap())]).unwrap();
    assert_eq!(counts(&mut egress), expected(&all[2..]));
    egress.reconcile(&cluster, &policies).unwrap();
    assert_eq!(
        counts(&mut egress),
        expected(&[("shop/one", V4, 0), ("shop/one", V6, 0), ("shop/two", V4, 4)])
    );
    egress.remove().unwrap();
    assert_eq!(egress.counters().unwrap(), []);
}

#[test]
fn counters_switched_on_and_off() {
    let policies = two();
    let mut egress = Reconciler::new(Sim::new());
    egress.reconcile(&cluster("a"), &policies).unwrap();
    for round in 0..2 {
        send(&mut egress, A, 1..4);
        assert_eq!(egress.counters().unwrap(), [], "round {round}");
        assert!(!egress.reconcile(&counting("a"), &policies).unwrap().changes.is_empty());
        assert!(egress.audit().unwrap().changes.is_empty());
        send(&mut egress, A, 1..4);
        let one = counts(&mut egress).remove(&("shop/one".to_owned(), Family::V4));
        assert_eq!(one, Some((3, 84)), "round {round}");
        let off = egress.reconcile(&cluster("a"), &policies).unwrap().changes.to_string();
        assert!(off.contains("nft delete set inet egress_datapath count4\n"), "{off}");
        assert!(egress.audit().unwrap().changes.is_empty());
    }
}

#[test]
fn counters_survive_refused_transaction() {
    let mut egress = Reconciler::new(Sim::new());
    egress.reconcile(&counting("a"), two()).unwrap();
    send(&mut egress, A, 1..4);
    let before = egress.datapath().counters().unwrap();
    assert!(before.policies.values().any(|count| count.packets == 3));
    let whole = observe(egress.datapath()).unwrap();
    let all = Changes::between(&whole, &State::default());
    for after in 0..all.len() {
        let mut kernel = egress.datapath().clone();
        kernel.refuse(after, 12);
        kernel.apply(&all).unwrap_err();
        let counts = kernel.counters().unwrap();
        assert!(counts == before || counts == Counts::new(), "{after}: {counts:?}");
    }
}
