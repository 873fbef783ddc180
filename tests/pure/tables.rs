//! How the tables of a range are shared out.

use std::collections::BTreeSet;
use std::net::IpAddr;

use egress_datapath::alloc::{MarkPool, TablePool, TableRange};
use egress_datapath::explain::{Fate, Packet};
use egress_datapath::{
    DenyReason, EgressPolicy, Family, Finding, MarkLayout, Node, Reconciler, Sim, Update, explain,
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
