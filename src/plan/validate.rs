//! Validation of all input; no other module checks a caller's values again.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};

use ipnet::IpNet;

use super::{PlanError, PolicyError};
use crate::cluster::{Backend, Cluster, Node, RulePriorities};
use crate::types::{Family, MacAddr, Mark, NodeName};

/// Destinations that are never steered: link-local (cloud metadata, node-local DNS) and multicast.
pub(super) fn never_steered() -> [IpNet; 4] {
    use std::net::Ipv4Addr;
    [
        IpNet::new_assert(IpAddr::V4(Ipv4Addr::new(169, 254, 0, 0)), 16),
        IpNet::new_assert(IpAddr::V4(Ipv4Addr::new(224, 0, 0, 0)), 4),
        IpNet::new_assert(IpAddr::V6(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0)), 10),
        IpNet::new_assert(IpAddr::V6(Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0)), 8),
    ]
}

/// A validated cluster.
#[derive(Debug)]
pub(super) struct ValidatedCluster {
    pub(super) cluster: Cluster,
    /// This node.
    pub(super) here: Node,
    /// Family of the outer packets.
    pub(super) underlay: Family,
    /// Destinations that are never steered, disjoint and sorted.
    pub(super) excluded: Vec<IpNet>,
    /// The excluded destinations without the nodes' own addresses.
    pub(super) inside: Vec<IpNet>,
    /// Indices in the cluster's list, by node name.
    nodes: BTreeMap<NodeName, usize>,
    /// Indices in the cluster's list, by node address.
    addresses: BTreeMap<IpAddr, usize>,
}

impl ValidatedCluster {
    pub(super) fn new(cluster: &Cluster) -> Result<Self, PlanError> {
        check_settings(cluster)?;
        let mut nodes = BTreeMap::new();
        for (place, node) in cluster.nodes.iter().enumerate() {
            check_node(node, cluster)?;
            if nodes.insert(node.name.clone(), place).is_some() {
                return Err(PlanError::DuplicateNode { node: node.name.clone() });
            }
        }
        let addresses = check_distinct(&cluster.nodes)?;
        let here = nodes
            .get(&cluster.node)
            .and_then(|place| cluster.nodes.get(*place))
            .cloned()
            .ok_or_else(|| PlanError::UnknownNode { node: cluster.node.clone() })?;
        let underlay = here
            .underlay
            .iter()
            .map(|address| Family::of(*address))
            .min()
            .ok_or_else(|| PlanError::NoUnderlay { node: here.name.clone() })?;
        for node in &cluster.nodes {
            if underlay_of(node, underlay).is_none() {
                return Err(PlanError::UnderlayFamily {
                    node: node.name.clone(),
                    family: underlay,
                });
            }
        }
        let overhead = match underlay {
            // Outer Ethernet, IP, UDP and VXLAN headers (RFC 7348, section 5).
            Family::V4 => 50,
            Family::V6 => 70,
        };
        if cluster.tunnel.underlay_mtu < 1280 + overhead {
            return Err(PlanError::Mtu {
                mtu: cluster.tunnel.underlay_mtu,
                needed: 1280 + overhead,
            });
        }
        for net in &cluster.excluded {
            check_net(net).map_err(|source| PlanError::Excluded { source })?;
        }
        let inside = disjoint(cluster.excluded.iter().copied().chain(never_steered()).collect());
        let own = cluster.nodes.iter().flat_map(own_addresses).map(IpNet::from);
        let excluded = disjoint(inside.iter().copied().chain(own).collect());
        Ok(Self { cluster: cluster.clone(), here, underlay, excluded, inside, nodes, addresses })
    }

    /// Returns the index of a node in the cluster's list.
    pub(super) fn place(&self, name: &NodeName) -> Option<usize> {
        self.nodes.get(name).copied()
    }

    /// Returns the node at an index of the cluster's list.
    pub(super) fn node(&self, place: usize) -> Option<&Node> {
        self.cluster.nodes.get(place)
    }

    /// Returns all nodes except this one, by name.
    pub(super) fn peers(&self) -> impl Iterator<Item = &Node> {
        let nodes = self.nodes.values().filter_map(|place| self.node(*place));
        nodes.filter(|node| node.name != self.here.name)
    }

    /// Returns the underlay address of a node, to which outer packets are sent.
    pub(super) fn underlay(&self, node: &Node) -> Option<IpAddr> {
        underlay_of(node, self.underlay)
    }

    pub(super) fn mtu(&self) -> u32 {
        self.cluster.tunnel.underlay_mtu
            - match self.underlay {
                Family::V4 => 50,
                Family::V6 => 70,
            }
    }
}

fn underlay_of(node: &Node, family: Family) -> Option<IpAddr> {
    node.underlay.iter().copied().find(|address| Family::of(*address) == family)
}

/// Returns the tunnel address of a node, without its prefix length.
pub(super) fn tunnel_of(node: &Node, family: Family) -> Option<IpAddr> {
    node.tunnel.iter().find(|net| Family::of_net(net) == family).map(IpNet::addr)
}

fn check_settings(cluster: &Cluster) -> Result<(), PlanError> {
    let tunnel = &cluster.tunnel;
    if tunnel.vni == 0 || tunnel.vni >= 1 << 24 {
        return Err(PlanError::Vni { vni: tunnel.vni });
    }
    if tunnel.port == 0 {
        return Err(PlanError::Port);
    }
    if cluster.policy_counters && cluster.connection_caching {
        return Err(PlanError::CachedCounters);
    }
    if cluster.policy_counters && cluster.backend != Backend::Nftables {
        return Err(PlanError::IptablesCounters);
    }
    // 0 is the priority of the kernel's rule for local addresses.
    if cluster.rule_priority == 0 || cluster.rule_priority > RulePriorities::LAST {
        return Err(PlanError::RulePriority { priority: cluster.rule_priority });
    }
    if cluster.excluded.is_empty() {
        return Err(PlanError::NothingExcluded);
    }
    Ok(())
}

fn check_node(node: &Node, cluster: &Cluster) -> Result<(), PlanError> {
    let name = || node.name.clone();
    for address in own_addresses(node) {
        if is_mapped(address) {
            return Err(PlanError::NodeMapped { node: name(), address });
        }
        if !is_host(address) {
            return Err(PlanError::NodeAddress { node: name(), address });
        }
    }
    for family in Family::BOTH {
        let underlay = node.underlay.iter().filter(|address| Family::of(**address) == family);
        let tunnel = node.tunnel.iter().filter(|net| Family::of_net(net) == family);
        if underlay.count() > 1 || tunnel.count() > 1 {
            return Err(PlanError::NodeFamily { node: name(), family });
        }
    }
    if node.tunnel.is_empty() {
        return Err(PlanError::NoTunnel { node: name() });
    }
    if !node.mac().is_unicast() {
        return Err(PlanError::Mac { node: name(), mac: node.mac() });
    }
    match node.mark {
        Some(mark) if cluster.marks.value(mark).is_none() => {
            Err(PlanError::ForeignMark { node: name(), mark })
        }
        _ => Ok(()),
    }
}

/// Checks that no two nodes share an address, a MAC address or a mark.
///
/// Returns the index of the owner of each address.
fn check_distinct(nodes: &[Node]) -> Result<BTreeMap<IpAddr, usize>, PlanError> {
    let mut addresses: BTreeMap<IpAddr, usize> = BTreeMap::new();
    let mut macs: BTreeMap<MacAddr, &NodeName> = BTreeMap::new();
    let mut marks: BTreeMap<Mark, &NodeName> = BTreeMap::new();
    for (place, node) in nodes.iter().enumerate() {
        for address in own_addresses(node) {
            let other = addresses.insert(address, place).and_then(|other| nodes.get(other));
            if let Some(other) = other {
                return Err(shared(&address, &other.name, &node.name));
            }
        }
        if let Some(other) = macs.insert(node.mac(), &node.name) {
            return Err(shared(&node.mac(), other, &node.name));
        }
        if let Some(mark) = node.mark {
            if let Some(other) = marks.insert(mark, &node.name) {
                return Err(shared(&mark, other, &node.name));
            }
        }
    }
    Ok(addresses)
}

fn shared(what: &dyn std::fmt::Display, one: &NodeName, other: &NodeName) -> PlanError {
    PlanError::Shared { what: what.to_string(), one: one.clone(), other: other.clone() }
}

/// Returns the underlay and tunnel addresses of a node.
fn own_addresses(node: &Node) -> impl Iterator<Item = IpAddr> + '_ {
    node.underlay.iter().copied().chain(node.tunnel.iter().map(IpNet::addr))
}

pub(super) fn canonical(nets: &[IpNet]) -> Result<Vec<IpNet>, PolicyError> {
    nets.iter().try_for_each(check_net)?;
    Ok(disjoint(nets.to_vec()))
}

/// Sorts prefixes, and removes duplicates and prefixes inside others.
///
/// Adjacent prefixes are not merged: each address stays an element of its own, which can be added
/// and deleted without a change of another element.
pub(super) fn disjoint(mut nets: Vec<IpNet>) -> Vec<IpNet> {
    // A prefix sorts before the prefixes inside it.
    nets.sort_unstable_by_key(|net| (net.network(), net.prefix_len()));
    nets.dedup_by(|net, kept| kept.contains(&*net));
    nets
}

/// Returns the one of disjoint sorted prefixes that contains an address.
pub(super) fn around(nets: &[IpNet], address: IpAddr) -> Option<&IpNet> {
    let behind = nets.partition_point(|net| net.network() <= address);
    let last = behind.checked_sub(1).and_then(|last| nets.get(last));
    last.filter(|net| net.contains(&address))
}

pub(super) fn check_net(net: &IpNet) -> Result<(), PolicyError> {
    if net.addr() != net.network() {
        return Err(PolicyError::HostBits { net: *net, meant: net.trunc() });
    }
    // A prefix wider than the mapped addresses has a meaning of its own.
    if net.prefix_len() >= 96 && is_mapped(net.addr()) {
        return Err(PolicyError::Mapped { net: *net });
    }
    Ok(())
}

pub(super) fn check_egress_ip(
    address: IpAddr,
    world: &ValidatedCluster,
) -> Result<(), PolicyError> {
    if is_mapped(address) || !is_host(address) {
        return Err(PolicyError::EgressIpNotUnicast { address });
    }
    let owner = world.addresses.get(&address).and_then(|place| world.node(*place));
    if let Some(node) = owner {
        return Err(PolicyError::EgressIpOfNode { address, node: node.name.clone() });
    }
    match around(&world.excluded, address) {
        Some(net) => Err(PolicyError::EgressIpExcluded { address, net: *net }),
        None => Ok(()),
    }
}

fn is_mapped(address: IpAddr) -> bool {
    matches!(address, IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some())
}

/// Returns whether a single host can have the address and use it beyond its link.
fn is_host(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => {
            let [first, ..] = v4.octets();
            // 0/8 is "this network" (RFC 1122, 3.2.1.3), 240/4 is reserved (RFC 1112, 4).
            first != 0 && first < 224 && !v4.is_loopback() && !v4.is_link_local()
        }
        IpAddr::V6(v6) => {
            !(v6.is_unspecified()
                || v6.is_loopback()
                || v6.is_multicast()
                || v6.is_unicast_link_local())
        }
    }
}
