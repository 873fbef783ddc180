//! Tests of packets and connections on simulated nodes.

mod shared;

use std::net::IpAddr;

use super::*;
use crate::alloc::{MarkPool, TablePool};
use crate::cluster::{Cluster, Node, Steering};
use crate::mark::MarkLayout;
use crate::policy::{EgressIp, EgressPolicy};
use crate::reconcile::Reconciler;
use crate::state::{ChainId, Firewall};
use crate::types::{NodeName, PolicyId};

const OUTSIDE: &str = "192.0.2.1";
const POD: &str = "10.244.1.10";
const EIP: &str = "198.51.100.200";

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn name(text: &str) -> NodeName {
    NodeName::new(text).unwrap()
}

fn cluster(of: &str) -> Cluster {
    let node = |text: &str, number: u8| {
        let tunnel = [format!("172.31.0.{number}/16"), format!("fd11::{number}/112")];
        let tunnel = tunnel.iter().map(|net| net.parse().unwrap()).collect();
        Node::new(name(text), vec![ip(&format!("10.10.0.{number}"))], tunnel)
    };
    let nodes = vec![node("a", 11), node("b", 12), node("c", 13)];
    Cluster::new(name(of), nodes, vec!["10.244.0.0/16".parse().unwrap()])
}

fn policy(gateway: &str) -> EgressPolicy {
    let sources = vec!["10.244.1.10/32".parse().unwrap()];
    EgressPolicy {
        gateway: Some(name(gateway)),
        ..EgressPolicy::new(
            PolicyId::new("p").unwrap(),
            sources,
            EgressIp::V4(EIP.parse().unwrap()),
        )
    }
}

/// Nodes a, b and c, each with pods.
fn sims() -> SimCluster {
    let node = |(of, number): (&str, u8)| SimNode {
        name: name(of),
        sim: Sim::new().with_host(HostContext {
            local: vec![ip(&format!("10.10.0.1{number}"))],
            own: vec![("0.0.0.0/0".parse().unwrap(), ip(&format!("10.10.0.1{number}")))],
            sockets: Vec::new(),
        }),
        pods: vec![format!("10.244.{number}.0/24").parse().unwrap()],
    };
    SimCluster::new([("a", 1), ("b", 2), ("c", 3)].map(node))
}

fn apply(sims: &mut SimCluster, policies: &[EgressPolicy]) {
    for of in ["c", "b", "a"] {
        let sim = &mut sims.node_mut(&name(of)).unwrap().sim;
        let _report = Reconciler::new(sim).reconcile(&cluster(of), policies).unwrap();
    }
}

fn sim<'a>(sims: &'a mut SimCluster, of: &str) -> &'a mut Sim {
    &mut sims.node_mut(&name(of)).unwrap().sim
}

/// Node and source address with which a packet left the cluster.
fn left(journey: &ClusterTrace) -> Option<(&str, IpAddr)> {
    match &journey.outcome {
        Outcome::Left { node, packet } => Some((node.as_str(), packet.source)),
        _ => None,
    }
}

fn asked() -> Packet {
    Packet::udp(ip(POD), 40_000, ip(OUTSIDE), 53)
}

#[test]
fn a_connection_is_translated_there_and_back() {
    let mut sims = sims();
    assert_eq!(left(&sims.send(asked())), Some(("a", ip(POD))), "there is no policy yet");
    sim(&mut sims, "a").forget_connections();
    apply(&mut sims, &[policy("b")]);
    for _ in 0..2 {
        let journey = sims.send(asked());
        let Outcome::Left { node, packet } = &journey.outcome else { panic!("{journey:?}") };
        assert_eq!((node, packet.source), (&name("b"), ip(EIP)), "{}", journey.trace);
        let back = sims.send_to(node, packet.reply());
        let outcome = Outcome::Arrived { node: name("a"), packet: asked().reply() };
        assert_eq!(back.outcome, outcome, "{}", back.trace);
    }
    let trace = sims.send(asked()).trace;
    assert!(
        trace
            .to_string()
            .contains("connection: translated like the first packet of the connection"),
        "{trace}"
    );
}

#[test]
fn the_first_packet_of_a_connection_decides_until_the_connection_is_looked_at() {
    let mut sims = sims();
    let caching = |of| Cluster { connection_caching: true, ..cluster(of) };
    let clusters = ["a", "b", "c"].map(caching);
    let reconcile = |sims: &mut SimCluster, at: usize, policies: &[EgressPolicy]| {
        let sim = sim(sims, ["a", "b", "c"][at]);
        Reconciler::new(sim).reconcile(&clusters[at], policies).unwrap()
    };
    let everywhere = |sims: &mut SimCluster, policies: &[EgressPolicy]| {
        for at in 0..3 {
            let _report = reconcile(sims, at, policies);
        }
    };
    everywhere(&mut sims, &[policy("b")]);
    let unasked = |journey: &ClusterTrace| journey.trace.class().is_none();
    assert!(!unasked(&sims.send(asked())));
    assert!(unasked(&sims.send(asked())), "the second packet is asked for nothing");

    // Order of reconciliation: the new gateway, the pod's node, the old gateway.
    let moved = [policy("c")];
    let _report = reconcile(&mut sims, 2, &moved);
    assert_eq!(left(&sims.send(asked())), Some(("b", ip(EIP))));
    let made = reconcile(&mut sims, 0, &moved).changes;
    let marked = made.ops().filter(|op| matches!(op, Op::MarkConnection(..))).count();
    assert_eq!(marked, 1, "{made}");
    assert_eq!(made.ops().filter_map(Op::ended).count(), 0, "who only listens would be cut off");
    let journey = sims.send(asked());
    assert_eq!(left(&journey), Some(("c", ip(EIP))), "{}", journey.trace);
    assert!(unasked(&sims.send(asked())), "the new gateway knows it by now");

    let _report = reconcile(&mut sims, 1, &moved);
    let closed = [EgressPolicy { gateway: None, ..policy("c") }];
    everywhere(&mut sims, &closed);
    assert_eq!(left(&sims.send(asked())), None, "closed");
    everywhere(&mut sims, &[]);
    assert_eq!(left(&sims.send(asked())), Some(("a", ip(POD))), "there is no policy any more");
}

#[test]
fn two_pods_with_the_same_port_are_told_apart() {
    let mut sims = sims();
    let mut both = policy("b");
    both.sources.push("10.244.1.11/32".parse().unwrap());
    apply(&mut sims, &[both]);
    let other = Packet { source: ip("10.244.1.11"), ..asked() };
    for packet in [asked(), other] {
        let Outcome::Left { node, packet: out } = sims.send(packet).outcome else { panic!() };
        let back = sims.send_to(&node, out.reply()).outcome;
        assert_eq!(back, Outcome::Arrived { node: name("a"), packet: packet.reply() });
    }
}

#[test]
fn a_prefix_of_one_bit_is_as_good_as_none() {
    let mut sims = sims();
    for of in ["c", "b", "a"] {
        let marks = MarkLayout::new(1 << 31, 1 << 31, 8, 8).unwrap();
        let (pool, tables) = (MarkPool::new(marks), TablePool::default());
        let mut egress = Reconciler::with_allocators(sim(&mut sims, of), pool, tables);
        let cluster = Cluster { marks, ..cluster(of) };
        let _report = egress.reconcile(&cluster, &[policy("b")]).unwrap();
    }
    assert_eq!(left(&sims.send(asked())), Some(("b", ip(EIP))));
}

#[test]
fn what_was_open_before_ends_with_the_change() {
    let mut sims = sims();
    apply(&mut sims, &[policy("b")]);
    assert_eq!(left(&sims.send(asked())), Some(("b", ip(EIP))));
    apply(&mut sims, &[policy("c")]);
    assert_eq!(sim(&mut sims, "b").forwarded(Among::All), [], "it ended with the old gateway");
    assert_eq!(left(&sims.send(asked())), Some(("c", ip(EIP))));
    apply(&mut sims, &[]);
    assert_eq!(left(&sims.send(asked())), Some(("a", ip(POD))));
    // No node has translated the connection, so it must end before the gateway can.
    apply(&mut sims, &[policy("b")]);
    assert_eq!(left(&sims.send(asked())), Some(("b", ip(EIP))));
}

#[test]
fn no_connection_keeps_an_egress_ip_over_a_policy_that_was_closed() {
    for shared in [true, false] {
        let mut sims = sims();
        let other = EgressPolicy {
            id: PolicyId::new("q").unwrap(),
            sources: vec!["10.244.1.11/32".parse().unwrap()],
            ..policy("b")
        };
        let others = if shared { &[other][..] } else { &[] };
        let with = |policy: EgressPolicy| [&[policy], others].concat();
        apply(&mut sims, &with(policy("b")));
        assert_eq!(left(&sims.send(asked())), Some(("b", ip(EIP))));
        apply(&mut sims, &with(EgressPolicy { gateway: None, ..policy("b") }));
        assert_eq!(left(&sims.send(asked())), None);
        apply(&mut sims, &with(EgressPolicy { egress_ip: EgressIp::Node, ..policy("b") }));
        assert_eq!(left(&sims.send(asked())), Some(("b", ip("10.10.0.12"))), "shared: {shared}");
    }
}

#[test]
fn the_guards_hold_what_was_ours_and_is_not_steered_any_more() {
    let mut sims = sims();
    apply(&mut sims, &[policy("b")]);
    let _left = sims.send(asked());
    let firewall = sim(&mut sims, "a").state_mut().firewall.as_mut().unwrap();
    for (_, rules) in firewall.chains.iter_mut().filter(|(id, _)| **id == ChainId::Prerouting) {
        rules.1.clear();
    }
    let journey = sims.send(asked());
    assert_eq!(journey.outcome, Outcome::Dropped { node: Some(name("a")) });
    let by = journey.trace.dropped_by().unwrap().object.clone();
    assert!(by.starts_with("chain tracked ct direction original "), "{by}");
}

#[test]
fn what_is_invalid_goes_nowhere() {
    let mut sims = sims();
    apply(&mut sims, &[policy("b")]);
    let trace = sim(&mut sims, "a").send_invalid(asked());
    assert_eq!(trace.fate, Fate::Dropped);
    assert!(trace.dropped_by().unwrap().object.contains("ct state invalid"), "{trace}");
    // Invalid packets of a source that no policy selects are not dropped.
    let stranger = Packet { source: ip("10.244.1.11"), ..asked() };
    let trace = sim(&mut sims, "a").send_invalid(stranger);
    assert_eq!(trace.fate, Fate::Routed(Some(ip("10.244.1.11"))));
}

#[test]
fn a_packet_stays_closed_whatever_is_lost() {
    type Lose = fn(&mut State);
    let losses: [(&str, Lose); 6] = [
        ("rule", |state| state.rules.retain(|rule| rule.priority != Cluster::RULE_PRIORITY + 1)),
        ("all rules", |state| state.rules.clear()),
        ("route", |state| {
            state.routes.retain(|_, route| !matches!(route, crate::state::Route::Via(_)));
        }),
        ("neighbour", |state| state.neighbours.clear()),
        ("forwarding entry", |state| state.fdb.clear()),
        ("device", |state| state.link = None),
    ];
    for (lost, lose) in losses {
        let mut sims = sims();
        apply(&mut sims, &[policy("b")]);
        lose(sim(&mut sims, "a").state_mut());
        let journey = sims.send(asked());
        let outcome = Outcome::Dropped { node: Some(name("a")) };
        assert_eq!(journey.outcome, outcome, "{lost}: {}", journey.trace);
    }
}

#[test]
fn at_the_egress_hook_a_packet_stays_closed_whatever_is_lost() {
    type Lose<'a> = &'a dyn Fn(&mut State);
    let hook =
        |lose: fn(&mut Firewall)| move |state: &mut State| lose(state.hook.as_mut().unwrap());
    let by_hook = |of: &str| Cluster { steering: Steering::EgressHook, ..cluster(of) };
    let losses: [(&str, Lose<'_>); 9] = [
        ("hook", &|state| state.hook = None),
        ("chain", &hook(|table| table.chains.clear())),
        ("rules", &hook(|table| table.chains.values_mut().for_each(|chain| chain.1.clear()))),
        ("address", &hook(|table| table.elements = Elements::default())),
        ("hook that sleeps", &hook(|table| table.dormant = true)),
        ("all rules", &|state| state.rules.clear()),
        ("route", &|state| {
            state.routes.retain(|_, route| !matches!(route, crate::state::Route::Via(_)));
        }),
        ("neighbour", &|state| state.neighbours.clear()),
        ("forwarding entry", &|state| state.fdb.clear()),
    ];
    for (lost, lose) in losses {
        let mut sims = sims();
        for of in ["c", "b", "a"] {
            let sim = &mut sims.node_mut(&name(of)).unwrap().sim;
            let _report = Reconciler::new(sim).reconcile(&by_hook(of), [policy("b")]).unwrap();
        }
        assert_eq!(left(&sims.clone().send(asked())), Some(("b", ip(EIP))), "{lost}");
        let node = sim(&mut sims, "a");
        lose(node.state_mut());
        let journey = sims.send(asked());
        let outcome = Outcome::Dropped { node: Some(name("a")) };
        assert_eq!(journey.outcome, outcome, "{lost}: {}", journey.trace);
        let sim = sim(&mut sims, "a");
        let _report = Reconciler::new(sim).reconcile(&by_hook("a"), [policy("b")]).unwrap();
        assert_eq!(left(&sims.send(asked())), Some(("b", ip(EIP))), "{lost}");
    }
}

#[test]
fn nodes_that_disagree_do_not_send_it_to_and_fro() {
    let mut sims = sims();
    for (of, gateway) in [("a", "b"), ("b", "c"), ("c", "b")] {
        let sim = &mut sims.node_mut(&name(of)).unwrap().sim;
        let _report = Reconciler::new(sim).reconcile(&cluster(of), [policy(gateway)]).unwrap();
    }
    let journey = sims.send(asked());
    assert_eq!(journey.outcome, Outcome::Dropped { node: Some(name("b")) }, "{}", journey.trace);
}

#[test]
fn strangers_have_no_say_in_the_tunnel() {
    let mut sims = sims();
    apply(&mut sims, &[policy("b")]);
    let link = sims.nodes()[1].sim.state().link.clone().unwrap();
    let from = |from: &str| Frame {
        from: ip(from),
        to: link.local,
        port: link.port,
        vni: link.vni,
        source_mac: crate::MacAddr::of_node(&name("a")),
        mac: link.mac,
        packet: asked(),
    };
    let trace = sim(&mut sims, "b").receive(&from("10.10.0.11"));
    assert_eq!(trace.fate, Fate::Routed(Some(ip(EIP))));
    let trace = sim(&mut sims, "b").receive(&from("10.10.0.99"));
    assert_eq!(trace.fate, Fate::Dropped, "{trace}");
    let other = Frame { vni: 7, ..from("10.10.0.11") };
    assert_eq!(sim(&mut sims, "b").receive(&other).fate, Fate::Dropped);
}

#[test]
fn an_answer_that_comes_late_does_not_turn_a_connection_around() {
    let mut sims = sims();
    let Outcome::Left { packet, .. } = sims.send(asked()).outcome else { panic!() };
    apply(&mut sims, &[policy("b")]);
    let late = sims.send(packet.reply());
    assert_eq!(late.outcome, Outcome::Dropped { node: Some(name("a")) }, "{}", late.trace);
    assert_eq!(left(&sims.send(asked())), Some(("b", ip(EIP))));
    // After the timeout and without conntrack entries, the packet opens a new connection.
    sim(&mut sims, "a").forget_connections();
    sim(&mut sims, "a").pass(Connection::REPLY_BLOCK_TIME);
    let new = sims.send(packet.reply());
    assert!(matches!(new.outcome, Outcome::Arrived { .. }), "{}", new.trace);
}
