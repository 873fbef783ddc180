//! What needs no kernel: plans, differences and what they mean to a packet.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test says what it expects"
)]

#[macro_use]
extern crate harness;

mod codes;
mod convergence;
mod counts;
mod faults;
mod golden;
mod hostile;
mod invalid;
mod layout;
mod preview;
mod random;
mod rules;
mod semantics;
mod shared;
mod tables;
mod validation;
mod xtables;

use std::process::ExitCode;

use egress_datapath::alloc::{MarkPool, TablePool, TableRange};
use egress_datapath::{
    Cluster, EgressIp, EgressPolicy, Node, NodeName, Plan, PlanError, Policy, PolicyId, plan,
};
use ipnet::IpNet;

#[global_allocator]
static MEMORY: memory::Counting = memory::Counting;

fn main() -> ExitCode {
    harness::main(|| ())
}

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

fn nets(texts: &[&str]) -> Vec<IpNet> {
    texts.iter().map(|text| net(text)).collect()
}

fn name(text: &str) -> NodeName {
    NodeName::new(text).unwrap()
}

/// Nodes a, b and c; with both families in the tunnel, and on the underlay.
fn cluster(here: &str) -> Cluster {
    let node = |name_: &str, number: u8| {
        Node::new(
            name(name_),
            vec![
                format!("10.10.0.{number}").parse().unwrap(),
                format!("fd10::{number}").parse().unwrap(),
            ],
            vec![net(&format!("172.31.0.{number}/16")), net(&format!("fd11::{number}/112"))],
        )
    };
    let nodes = vec![node("a", 11), node("b", 12), node("c", 13)];
    Cluster::new(name(here), nodes, nets(&["10.244.0.0/16", "fd44::/16"]))
}

/// The same without IPv6.
fn cluster_v4(here: &str) -> Cluster {
    let mut cluster = cluster(here);
    for node in &mut cluster.nodes {
        node.underlay.retain(std::net::IpAddr::is_ipv4);
        node.tunnel.retain(|net| net.addr().is_ipv4());
    }
    cluster
}

fn policy(id: &str, sources: &[&str], gateway: Option<&str>, egress_ip: EgressIp) -> EgressPolicy {
    EgressPolicy::new(PolicyId::new(id).unwrap(), nets(sources), egress_ip)
        .with_gateway(gateway.map(name))
}

fn v4(text: &str) -> EgressIp {
    EgressIp::V4(text.parse().unwrap())
}

fn dual(v4: &str, v6: &str) -> EgressIp {
    EgressIp::Dual(v4.parse().unwrap(), v6.parse().unwrap())
}

/// Allocators that give the same every time.
fn pools(cluster: &Cluster) -> (MarkPool, TablePool) {
    let tables = TablePool::new(TableRange::default()).with_start(0);
    (MarkPool::new(cluster.marks), tables)
}

fn planned<P: Policy>(
    cluster: &Cluster,
    policies: impl IntoIterator<Item = P>,
) -> Result<Plan, PlanError> {
    let (mut marks, mut tables) = pools(cluster);
    plan(cluster, policies, &mut marks, &mut tables)
}
