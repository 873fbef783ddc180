//! How the tables of a range are shared out.

use std::collections::BTreeSet;
use std::net::IpAddr;

use egress_datapath::alloc::{MarkPool, TablePool, TableRange};
use egress_datapath::explain::{Fate, Packet};
use egress_datapath::{
    Cluster, DenyReason, EgressPolicy, Family, Finding, MarkLayout, Node, Reconciler, Replies, Sim,
    Steering, Update, explain, plan,
};

use crate::{cluster_v4, name, policy, v4};

/// Gateways that are replaced by nodes of other names, as in a cluster that scales.
#[test]
fn marks_and_tables_of_nodes_that_left_the_cluster_are_free_again() {
    let layout = MarkLayout::COMPACT6;
    let marks = MarkPool::new(layout);
    let tables = TablePool::new(TableRange::new(3000, 40).unwrap()).with_start(0);
    let mut egress = Reconciler::with_allocators(Sim::new(), marks, tables);
    for round in 0..9_u8 {
        let mut cluster = cluster_v4("a").with_marks(layout);
        cluster.nodes.truncate(1);
        let mut policies = Vec::new();
        for number in 0..30_u8 {
            let gateway = format!("gateway-{round}-{number}");
            cluster.nodes.push(Node::new(
                name(&gateway),
                vec![IpAddr::from([10, 10, 1 + round, number])],
                vec![IpAddr::from([172, 31, 1 + round, number]).into()],
            ));
            let source = format!("10.244.1.{number}/32");
            policies.push(policy(
                &format!("p{number}"),
                &[&source],
                Some(&gateway),
                v4("192.0.2.1"),
            ));
        }
        // All of one round, and between them a plan that is only looked at.
        assert!(!egress.preview(&cluster, &policies).unwrap().changes.is_empty());
        let report = egress.reconcile(&cluster, &policies).unwrap();
        let several = |finding: &&Finding| !matches!(finding, Finding::EgressIpOnGateways { .. });
        assert_eq!(report.findings.iter().find(several), None, "round {round}");
        if round == 4 {
            egress.remove().unwrap();
        }
    }
}

#[test]
fn every_table_of_range_usable() {
    let mut cluster = cluster_v4("a");
    let address = |text: &str| text.parse::<IpAddr>().unwrap();
    let d =
        Node::new(name("d"), vec![address("10.10.0.14")], vec!["172.31.0.14/16".parse().unwrap()]);
    cluster.nodes.push(d);
    let to = |gateway: &str, last: u8| {
        let eip = v4(&format!("198.51.100.{last}"));
        policy(gateway, &[&format!("10.244.1.{last}/32")], Some(gateway), eip)
    };
    let all = [to("b", 1), to("c", 2), to("d", 3)];
    let range = TableRange::new(3000, 1).unwrap();
    let mut egress = Reconciler::with_allocators(
        Sim::new(),
        MarkPool::default(),
        TablePool::new(range).with_start(0),
    );
    let first = egress.reconcile(&cluster, &all[..1]).unwrap();
    assert_eq!(first.findings, []);
    let second = egress.reconcile(&cluster, &all[..2]).unwrap();
    assert_eq!(second.findings, [Finding::NoClosingTable { capacity: 2 }]);
    let tables: BTreeSet<_> =
        egress.datapath().state().routes.keys().map(|key| key.table.get()).collect();
    assert_eq!(tables, [3000, 3001].into());
    assert_eq!(egress.datapath().state().rules.len(), 2);
    assert!(egress.reconcile(&cluster, &all[..2]).unwrap().changes.is_empty());
    let third = egress.reconcile(&cluster, &all).unwrap();
    let reason = DenyReason::TooManyGateways;
    let denied = |policy: &EgressPolicy| Finding::Denied {
        policy: policy.id.clone(),
        family: Family::V4,
        reason,
    };
    let none = Finding::NoClosingTable { capacity: 2 };
    assert_eq!(third.findings, [denied(&all[2]), none.clone()]);
    assert!(egress.reconcile(&cluster, &all).unwrap().changes.is_empty());
    // A gateway that has a table keeps it, whatever the name of one that comes.
    egress.reconcile(&cluster, &all[1..]).unwrap();
    let back = egress.reconcile(&cluster, &all).unwrap();
    assert_eq!(back.findings, [denied(&all[0]), none]);
    // The table of a gateway that goes is found by the one that has waited.
    let gone = [Update::Remove::<EgressPolicy>(all[2].id.clone())];
    assert_eq!(egress.update(gone).unwrap().findings, [Finding::NoClosingTable { capacity: 2 }]);
    let packet = Packet::udp(address("10.244.1.1"), 40_000, address("192.0.2.9"), 53);
    let fate = explain(egress.datapath().state(), &packet).fate;
    assert!(matches!(fate, Fate::Tunnelled(_)), "{fate:?}");
    let report = egress.reconcile(&cluster, &all[..2]).unwrap();
    assert_eq!(report.findings, [Finding::NoClosingTable { capacity: 2 }]);
    // One leaves and another comes, then one only: nothing is short of tables for a while.
    let moved = egress.reconcile(&cluster, [&all[0], &all[2]]).unwrap();
    assert_eq!(moved.findings, [Finding::NoClosingTable { capacity: 2 }]);
    assert_eq!(egress.reconcile(&cluster, &all[..1]).unwrap().findings, []);
    assert!(egress.reconcile(&cluster, &all[..1]).unwrap().changes.is_empty());
}

/// A gateway with replies by the tunnel, and policies of its own and of another gateway.
fn gateway_of_all(layout: MarkLayout) -> (Cluster, [EgressPolicy; 2]) {
    let cluster = cluster_v4("b").with_marks(layout).with_replies(Replies::Tunnel);
    let here = policy("p", &["10.244.1.10/32"], Some("b"), v4("192.0.2.1"));
    let there = policy("q", &["10.244.2.10/32"], Some("c"), v4("192.0.2.2"));
    (cluster, [here, there])
}

#[test]
fn gateways_come_before_nodes_that_get_replies_only() {
    let (cluster, policies) = gateway_of_all(MarkLayout::SEED);
    let planned = |count| {
        let mut tables = TablePool::new(TableRange::new(3000, count).unwrap()).with_start(0);
        plan(&cluster, &policies, &mut MarkPool::new(cluster.marks), &mut tables).unwrap()
    };
    let nodes = vec![name("a")];
    let left_out = Finding::TooManyNodes { nodes };
    let [whole, three, one] = [3, 2, 0].map(planned);
    assert_eq!(whole.findings, []);
    assert_eq!(whole.gateways.keys().collect::<Vec<_>>(), [&name("a"), &name("c")]);
    assert_eq!(three.findings, [Finding::NoReversePathTable]);
    assert!(one.findings.contains(&left_out), "{:?}", one.findings);
    assert_eq!(one.gateways.keys().collect::<Vec<_>>(), [&name("c")]);
    // A node that is no gateway knows the nodes to which it steers, and no others.
    let mut client = cluster.clone();
    client.node = name("a");
    let mut tables = TablePool::new(TableRange::default()).with_start(0);
    let plan = plan(&client, &policies, &mut MarkPool::new(client.marks), &mut tables).unwrap();
    assert_eq!(plan.gateways.len(), 2);
    let plan = crate::planned(&client, &policies[..1]).unwrap();
    assert_eq!(plan.gateways.keys().collect::<Vec<_>>(), [&name("b")]);
}

#[test]
fn reverse_path_gets_a_table_of_gateways_that_share_one_from_now_on() {
    let (cluster, policies) = gateway_of_all(MarkLayout::default());
    let mut egress = Reconciler::with_allocators(
        Sim::new(),
        MarkPool::default(),
        TablePool::new(TableRange::new(3000, 1).unwrap()).with_start(0),
    );
    let direct = cluster.clone().with_replies(Replies::Direct);
    assert_eq!(egress.reconcile(&direct, &policies).unwrap().findings, []);
    let cluster = cluster.with_steering(Steering::EgressHook);
    assert_eq!(egress.reconcile(&cluster, &policies).unwrap().findings, []);
    assert!(egress.preview(&cluster, &policies).unwrap().changes.is_empty());
}

#[test]
fn node_has_a_mark_of_its_own_even_if_marks_are_few() {
    // Two marks: of the three nodes one gets no replies by the tunnel, and it is not the gateway.
    let layout = MarkLayout::new(0x2600_0000, 0xff00_0000, 8, 1).unwrap();
    let (cluster, policies) = gateway_of_all(layout);
    let mut egress = Reconciler::with_allocators(
        Sim::new(),
        MarkPool::new(layout),
        TablePool::new(TableRange::default()).with_start(0),
    );
    for _ in 0..2 {
        let report = egress.reconcile(&cluster, &policies).unwrap();
        let left_out = Finding::TooManyNodes { nodes: vec![name("a")] };
        assert_eq!(report.findings, [left_out]);
    }
    let report = egress.reconcile(&cluster, &policies).unwrap();
    assert!(report.changes.is_empty(), "{}", report.changes);
}
