//! A hundred gateways of both families, and a policy with a hundred thousand sources that moves
//! from one to another.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use common::world::name;
use egress_datapath::KernelTables;
use egress_datapath::alloc::{MarkPool, TablePool, TableRange};
use egress_datapath::testing::{Faults, Subsystem};
use egress_datapath::{
    Cluster, EgressIp, EgressPolicy, KernelDatapath, Node, PolicyId, Reconciler, Steering,
    TableAllocator, Update,
};
use ipnet::IpNet;

use crate::{line, median, timed};

const GATEWAYS: u32 = 100;
const SOURCES: u32 = 100_000;
const ROUNDS: u32 = 51;

fn v4(base: u32, index: u32) -> IpAddr {
    Ipv4Addr::from_bits(base + index).into()
}

fn v6(base: u128, index: u32) -> IpAddr {
    Ipv6Addr::from_bits(base << 112 | u128::from(index)).into()
}

/// This node and a hundred others, each with an underlay and a tunnel address of both families.
fn cluster() -> Cluster {
    let node = |index: u32| {
        let underlay = vec![v4(0x0a0a_0001, index), v6(0xfd10, index + 1)];
        let tunnel = [(v4(0xac1f_0001, index), 16), (v6(0xfd11, index + 1), 112)];
        let tunnel = tunnel.map(|(ip, length)| IpNet::new(ip, length).unwrap());
        Node::new(name(index), underlay, tunnel.to_vec())
    };
    let pods = ["10.244.0.0/16", "fd44::/16"].map(|net| net.parse().unwrap());
    Cluster::new(name(0), (0..=GATEWAYS).map(node).collect(), pods.to_vec())
}

/// A policy of one pod for each of the gateways.
fn policies() -> Vec<EgressPolicy> {
    let policy = |index: u32| {
        EgressPolicy::new(
            PolicyId::new(format!("bench/gateway-{index}")).unwrap(),
            vec![v4(0x0af4_0001, index).into(), v6(0xfd44, index + 1).into()],
            EgressIp::Dual(
                Ipv4Addr::from_bits(0xc633_6400 + index),
                Ipv6Addr::from_bits(0xfdc6 << 112 | u128::from(index)),
            ),
        )
        .with_gateway(name(index + 1))
    };
    (0..GATEWAYS).map(policy).collect()
}

/// A reconciler that asks the kernel which tables are in use, as `Reconciler::open` does.
fn open(faults: &Faults) -> Reconciler<KernelDatapath> {
    let datapath = KernelDatapath::open().unwrap().with_faults(faults);
    let tables = TablePool::with_probe(TableRange::default(), KernelTables::open().unwrap());
    Reconciler::with_allocators(datapath, MarkPool::default(), tables)
}

/// How long it takes to bring a hundred gateways about, and to look which tables they have.
pub(crate) fn gateways() {
    println!("{GATEWAYS} gateways of both families, a policy with one pod for each");
    let mut cluster = cluster();
    let (cold, writes, scan) = cold(&cluster);
    line(&format!("floor, {writes} requests"), cold[1], None);
    line("cold apply", cold[0], Some(cold[1]));
    line("allocate a table, with a scan", scan, None);
    more(&cluster, ["100 gateways more, a table for each", OF_THAT]);
    cluster.steering = Steering::EgressHook;
    let (cold, writes, _) = self::cold(&cluster);
    line(&format!("egress hook: floor, {writes} requests"), cold[1], None);
    line("egress hook: cold apply", cold[0], Some(cold[1]));
    more(&cluster, ["egress hook: 100 gateways more", OF_THAT]);
    println!();
}

const OF_THAT: &str = "  of that, rules, routes, neighbours, fdb";

/// What the gateways cost a node that is set up already, with one policy and no way to any of them;
/// and how much of that the kernel takes for what is not nf_tables.
fn more(cluster: &Cluster, [all, of_that]: [&str; 2]) {
    let here = EgressPolicy::new(
        PolicyId::new("bench/here").unwrap(),
        vec![v4(0x0af4_ff01, 0).into(), v6(0xfd44, u32::MAX).into()],
        EgressIp::Dual(Ipv4Addr::from_bits(0xc633_65ff), Ipv6Addr::from_bits(0xfdc7 << 112)),
    )
    .with_gateway(name(0));
    let before = vec![here];
    let after: Vec<_> = before.iter().cloned().chain(policies()).collect();
    let (mut reconciled, mut routing) = (Vec::new(), Vec::new());
    let mut requests = 0;
    for _ in 0..15 {
        let faults = Faults::new();
        let mut egress = open(&faults);
        egress.reconcile(cluster, &before).unwrap();
        let (calls, sent) = (faults.calls().len(), faults.sending_to(Subsystem::Routing));
        reconciled.push(timed(|| egress.reconcile(cluster, &after).unwrap()).0);
        routing.push(faults.sending_to(Subsystem::Routing).saturating_sub(sent));
        let made = faults.calls().into_iter().skip(calls);
        requests = made.filter(|c| c.writes && c.subsystem == Subsystem::Routing).count();
        egress.remove().unwrap();
    }
    line(all, median(reconciled), None);
    line(&format!("{of_that} ({requests})"), median(routing), None);
}

/// Medians of a cold apply, its floor, with the number of its requests, and of a scan afterwards.
fn cold(cluster: &Cluster) -> ([Duration; 2], usize, Duration) {
    let policies = policies();
    let (mut colds, mut floors, mut scans) = (Vec::new(), Vec::new(), Vec::new());
    let mut writes = 0;
    for _ in 0..15 {
        let faults = Faults::new();
        let mut egress = open(&faults);
        let (took, _report) = timed(|| egress.reconcile(cluster, &policies).unwrap());
        colds.push(took);
        floors.push(faults.sending());
        writes = faults.writes();
        scans.push(scan());
        egress.remove().unwrap();
    }
    ([median(colds), median(floors)], writes, median(scans))
}

/// One table for one more gateway, by those that are in use.
fn scan() -> Duration {
    let range = TableRange::new(3000, 2 * GATEWAYS).unwrap();
    let mut tables = TablePool::with_probe(range, KernelTables::open().unwrap());
    let node = name(u32::MAX);
    let each = |_| {
        let took = timed(|| tables.allocate(&node).unwrap()).0;
        tables.release(&node).unwrap();
        took
    };
    median((0..9).map(each).collect())
}

/// How long it takes to move a policy with a hundred thousand sources, and in how many commits.
pub(crate) fn moving() {
    println!("a policy with {SOURCES} sources moves, among {GATEWAYS} others and gateways");
    let (cluster, mut policies) = (cluster(), policies());
    let id = PolicyId::new("bench/moves").unwrap();
    let sources = (0..SOURCES).map(|index| v4(0x0b00_0000, index).into()).collect();
    let egress_ip = EgressIp::V4(Ipv4Addr::from_bits(0xc633_6501));
    policies.push(EgressPolicy::new(id.clone(), sources, egress_ip).with_gateway(name(1)));
    let faults = Faults::new();
    let mut egress = open(&faults);
    egress.reconcile(&cluster, &policies).unwrap();
    let (mut moves, mut cold, mut settles) = (Vec::new(), Vec::new(), Vec::new());
    let mut commits = BTreeSet::new();
    for round in 0..2 * ROUNDS {
        let gateway = Some(name(round % (GATEWAYS - 1) + 2));
        let update: Update = Update::Move { policy: id.clone(), gateway };
        let before = faults.calls().len();
        let (took, report) = timed(|| egress.update([update]).unwrap());
        if round < ROUNDS { &mut moves } else { &mut cold }.push(took);
        assert!(!report.changes.is_empty());
        let calls = faults.calls();
        let made = calls.iter().skip(before).filter(|call| call.writes);
        let made = made.inspect(|call| assert_eq!(call.subsystem, Subsystem::Firewall));
        commits.insert(made.count());
        // What that reads leaves nothing of ours in the caches.
        if round + 1 >= ROUNDS {
            settles.push(timed(|| egress.settle().unwrap()).0);
        }
    }
    line("update, the policy moved", median(moves), None);
    line("the same after a settle", median(cold), None);
    println!("  {:<44} {:>9}", "commits of a move", format!("{commits:?}"));
    line("settle after the move", median(settles), None);
    egress.remove().unwrap();
    println!();
}
