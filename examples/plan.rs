//! Prints the changes of two nodes of a cluster for two policies; needs no privilege.
//!
//! Node `a` is a client of the gateways of both policies, node `b` is the gateway of the first.

use egress_datapath::alloc::{MarkPool, TablePool};
use egress_datapath::{
    Changes, Cluster, Destinations, EgressIp, EgressPolicy, Node, NodeName, PolicyId, State, plan,
};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn main() -> Result<()> {
    for (here, role) in [("a", "client"), ("b", "gateway")] {
        println!("#### node {here}, the {role}\n");
        show(here)?;
    }
    Ok(())
}

fn show(here: &str) -> Result<()> {
    let cluster = cluster(here)?;
    // In an agent both allocators outlive the call: a gateway keeps its mark and its table.
    let mut marks = MarkPool::new(cluster.marks);
    let mut tables = TablePool::default();
    let plan = plan(&cluster, policies()?, &mut marks, &mut tables)?;
    // The changes of a node without state; an agent passes the observed state.
    let changes = Changes::between(&State::default(), &plan.state);
    for step in changes.steps() {
        println!("## {:?}", step.phase);
        for op in &step.ops {
            println!("{op}");
        }
        println!();
    }
    for (gateway, (mark, table)) in &plan.gateways {
        println!("gateway {gateway}: mark {mark}, table {table}");
    }
    for finding in &plan.findings {
        println!("note: {finding}");
    }
    println!("{} operations\n", changes.len());
    Ok(())
}

/// Three dual-stack nodes.
fn cluster(here: &str) -> Result<Cluster> {
    let mut nodes = Vec::new();
    for (name, number) in [("a", 11), ("b", 12), ("c", 13)] {
        nodes.push(Node::new(
            NodeName::new(name)?,
            vec![format!("10.10.0.{number}").parse()?, format!("fd10::{number}").parse()?],
            vec![format!("172.31.0.{number}/16").parse()?, format!("fd11::{number}/112").parse()?],
        ));
    }
    let pods_and_services = ["10.244.0.0/16", "10.96.0.0/12", "fd44::/16"];
    let mut excluded = Vec::new();
    for net in pods_and_services {
        excluded.push(net.parse()?);
    }
    Ok(Cluster::new(NodeName::new(here)?, nodes, excluded))
}

/// Two policies of a shop: its checkout has its own egress IP for one partner network.
fn policies() -> Result<[EgressPolicy; 2]> {
    let checkout = EgressPolicy::new(
        PolicyId::new("shop/checkout")?,
        vec!["10.244.1.10/32".parse()?, "fd44:1::10/128".parse()?],
        EgressIp::Dual("198.51.100.200".parse()?, "2001:db8:51::200".parse()?),
    )
    .with_destinations(Destinations::Nets(vec![
        "203.0.113.0/24".parse()?,
        "2001:db8:9::/48".parse()?,
    ]))
    .with_gateway(NodeName::new("b")?);
    let everything = EgressPolicy::new(
        PolicyId::new("shop/everything")?,
        vec!["10.244.1.0/24".parse()?, "fd44:1::/64".parse()?],
        EgressIp::Node,
    )
    .with_priority(10)
    .with_gateway(NodeName::new("c")?);
    Ok([checkout, everything])
}
