//! What this crate programs.

use std::net::{IpAddr, Ipv4Addr};

use egress_datapath::alloc::TableRange;
use egress_datapath::{
    Cluster, Destinations, EgressIp, EgressPolicy, MarkLayout, Node, NodeName, PolicyId, Reconciler,
};
use ipnet::{IpNet, Ipv4Net};

use crate::Result;
use crate::path::{NODE, PODS, Path};

/// Pods of each policy.
pub(crate) const SOURCES: u32 = 10;

/// A pod; those of all policies come one after the other.
pub(crate) fn pod(number: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(PODS.network().to_bits() + number)
}

/// The destination of a policy, a network of its own.
pub(crate) fn destination(policy: u32) -> Ipv4Net {
    Ipv4Net::new_assert(Ipv4Addr::from_bits(0x1400_0000 + (policy << 8)), 24)
}

/// The underlay address of a gateway, counted from zero.
pub(crate) fn gateway(number: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(NODE.to_bits() + 1 + number)
}

/// The address that a policy's pods wear if the router is their gateway.
pub(crate) fn egress_ip(policy: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(0xc633_0000 + policy % 200)
}

/// The node's number in the tunnel is that of its underlay address.
pub(crate) fn tunnel(underlay: Ipv4Addr) -> Ipv4Addr {
    Ipv4Addr::from_bits(0xac1f_0000 | underlay.to_bits() & 0xffff)
}

fn node(name: &str, underlay: Ipv4Addr) -> Result<Node> {
    let tunnel = IpNet::new(tunnel(underlay).into(), 16)?;
    Ok(Node::new(NodeName::new(name)?, vec![IpAddr::V4(underlay)], vec![tunnel]))
}

/// The gateway that all policies of the router as a client share out among themselves.
pub(crate) fn name_of_gateway(number: u32) -> Result<NodeName> {
    Ok(NodeName::new(format!("gateway-{number}"))?)
}

/// The router as the crate knows it.
pub(crate) fn cluster(gateways: u32) -> Result<Cluster> {
    let mut nodes = vec![node("router", NODE)?];
    for number in 0..gateways {
        nodes.push(node(name_of_gateway(number)?.as_str(), gateway(number))?);
    }
    Ok(Cluster::new(NodeName::new("router")?, nodes, vec!["10.0.0.0/8".parse()?]))
}

/// Programs a router as a client of some gateways, or as the gateway if there are none.
pub(crate) fn program(
    path: &Path,
    policies: u32,
    gateways: u32,
    options: impl FnOnce(&mut Cluster),
) -> Result {
    // A gateway has one peer that tunnels to it.
    let mut cluster = cluster(gateways.max(1))?;
    options(&mut cluster);
    let policy = |number: u32| -> Result<EgressPolicy> {
        let sources = (0..SOURCES).map(|n| IpNet::from(Ipv4Net::from(pod(number * SOURCES + n))));
        let id = PolicyId::new(format!("bench/policy-{number}"))?;
        let mut policy = EgressPolicy::new(id, sources.collect(), EgressIp::V4(egress_ip(number)));
        policy.gateway = Some(match gateways {
            0 => cluster.node.clone(),
            _ => name_of_gateway(number % gateways)?,
        });
        policy.destinations = Destinations::Nets(vec![destination(number).into()]);
        Ok(policy)
    };
    let policies = (0..policies).map(policy).collect::<Result<Vec<_>>>()?;
    let made = path.router.run(|| {
        let mut egress = Reconciler::open(MarkLayout::SEED, TableRange::default())?;
        egress.reconcile(&cluster, &policies)
    })?;
    made.map(drop).map_err(|error| error.to_string().into())
}
