//! The cluster and the policies that are measured with.

use std::net::{IpAddr, Ipv4Addr};

use egress_datapath::{Cluster, EgressIp, EgressPolicy, Node, NodeName, PolicyId};
use ipnet::IpNet;

pub fn name(index: u32) -> NodeName {
    NodeName::new(format!("node-{index}")).unwrap()
}

/// A cluster of this node and 100 gateways.
pub fn cluster() -> Cluster {
    let node = |index: u32| {
        let underlay = IpAddr::V4(Ipv4Addr::from_bits(0x0a0a_0001 + index));
        let tunnel = IpAddr::V4(Ipv4Addr::from_bits(0xac1f_0001 + index));
        Node::new(name(index), vec![underlay], vec![IpNet::new(tunnel, 16).unwrap()])
    };
    Cluster::new(name(0), (0..=100).map(node).collect(), vec!["10.244.0.0/16".parse().unwrap()])
}

/// Policies for everything external, each with as many single addresses as its sources.
pub fn policies(count: u32, sources: u32) -> Vec<EgressPolicy> {
    let source = |index: u32| IpNet::from(IpAddr::V4(Ipv4Addr::from_bits(0x0b00_0000 + index)));
    let policy = |index: u32| {
        EgressPolicy::new(
            PolicyId::new(format!("bench/policy-{index}")).unwrap(),
            (0..sources).map(|n| source(index * sources + n)).collect(),
            EgressIp::V4(Ipv4Addr::from_bits(0xc633_6400 + index % 200)),
        )
        .with_gateway(name(index % 100 + 1))
    };
    (0..count).map(policy).collect()
}
