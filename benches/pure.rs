//! What no kernel has a part in: planning, comparing, and handing out marks and tables.
//!
//! `cargo bench --bench pure`; compare figures of one run with each other.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a bench that is set up wrongly should stop"
)]

use std::net::{IpAddr, Ipv4Addr};

use divan::Bencher;
use egress_datapath::{
    Changes, Cluster, EgressIp, EgressPolicy, MarkAllocator, MarkLayout, MarkPool, Node, NodeName,
    Plan, PolicyId, TableAllocator, TablePool, TableRange, plan,
};
use ipnet::IpNet;

fn main() {
    divan::main();
}

fn name(index: u32) -> NodeName {
    NodeName::new(format!("node-{index}")).unwrap()
}

/// A cluster of this node and 100 gateways.
fn cluster() -> Cluster {
    let node = |index: u32| {
        let underlay = IpAddr::V4(Ipv4Addr::from_bits(0x0a0a_0001 + index));
        let tunnel = IpAddr::V4(Ipv4Addr::from_bits(0xac1f_0001 + index));
        Node::new(name(index), vec![underlay], vec![IpNet::new(tunnel, 16).unwrap()])
    };
    Cluster::new(name(0), (0..=100).map(node).collect(), vec!["10.244.0.0/16".parse().unwrap()])
}

/// Policies for everything external, each with as many single addresses as its sources.
fn policies(count: u32, sources: u32) -> Vec<EgressPolicy> {
    let source = |index: u32| IpNet::from(IpAddr::V4(Ipv4Addr::from_bits(0x0b00_0000 + index)));
    let policy = |index: u32| EgressPolicy {
        gateway: Some(name(index % 100 + 1)),
        ..EgressPolicy::new(
            PolicyId::new(format!("bench/policy-{index}")).unwrap(),
            (0..sources).map(|n| source(index * sources + n)).collect(),
            EgressIp::V4(Ipv4Addr::from_bits(0xc633_6400 + index % 200)),
        )
    };
    (0..count).map(policy).collect()
}

fn planned(cluster: &Cluster, policies: &[EgressPolicy]) -> Plan {
    let mut marks = MarkPool::default();
    let mut tables = TablePool::new(TableRange::default()).with_dice(|_: u32| 0);
    plan(cluster, policies, &mut marks, &mut tables).unwrap()
}

const SIZES: [(u32, u32); 4] = [(1, 1), (10, 100), (1_000, 10), (1_000, 100)];

#[divan::bench(args = SIZES)]
fn plan_policies_by_sources(bencher: Bencher<'_, '_>, (count, sources): (u32, u32)) {
    let (cluster, policies) = (cluster(), policies(count, sources));
    bencher.bench(|| planned(&cluster, &policies));
}

#[divan::bench(args = SIZES)]
fn compare_with_itself(bencher: Bencher<'_, '_>, (count, sources): (u32, u32)) {
    let state = planned(&cluster(), &policies(count, sources)).state;
    let same = state.clone();
    bencher.bench(|| Changes::between(&state, &same));
}

#[divan::bench(args = SIZES)]
fn compare_after_one_pod_left(bencher: Bencher<'_, '_>, (count, sources): (u32, u32)) {
    let cluster = cluster();
    let mut policies = policies(count, sources.max(2));
    let before = planned(&cluster, &policies).state;
    policies[0].sources.pop();
    let after = planned(&cluster, &policies).state;
    bencher.bench(|| Changes::between(&before, &after));
}

#[divan::bench(args = [0, 1_000, 65_535])]
fn allocate_a_mark_with_so_many_in_use(bencher: Bencher<'_, '_>, used: u32) {
    let mut pool = MarkPool::new(MarkLayout::SEED);
    for index in 0..used {
        pool.allocate(&name(index)).unwrap();
    }
    let node = name(u32::MAX);
    bencher.bench_local(|| {
        let mark = pool.allocate(&node).unwrap();
        pool.release(&node).unwrap();
        mark
    });
}

#[divan::bench(args = [0, 100])]
fn allocate_a_table_with_so_many_in_use(bencher: Bencher<'_, '_>, used: u32) {
    let mut pool = TablePool::new(TableRange::default());
    for index in 0..used {
        pool.allocate(&name(index)).unwrap();
    }
    let node = name(u32::MAX);
    bencher.bench_local(|| {
        let table = pool.allocate(&node).unwrap();
        pool.release(&node).unwrap();
        table
    });
}
