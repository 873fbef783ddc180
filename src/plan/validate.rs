//! Validation of all input; no other module checks a caller's values again.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::net::{IpAddr, Ipv6Addr};

use ipnet::IpNet;

use super::{NodeError, PlanError, PolicyError};
use crate::cluster::{Backend, Cluster, Node, Replies, RulePriorities};
use crate::state::Field;
use crate::types::{Family, Mark, NodeName};

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

/// The nodes of a cluster as they concern policies, and the excluded destinations.
///
/// A node with an error is left out: it is no gateway and no peer, but its addresses are excluded
/// like those of others.
#[derive(Debug)]
pub(super) struct Nodes {
    /// Destinations that are never steered, disjoint and sorted.
    pub(super) excluded: Vec<IpNet>,
    /// The excluded destinations without the nodes' own addresses.
    pub(super) inside: Vec<IpNet>,
    /// Indices of the nodes without errors in the cluster's list, by name.
    sound: BTreeMap<NodeName, usize>,
    /// Errors of the nodes that are left out.
    pub(super) left_out: BTreeMap<NodeName, Vec<NodeError>>,
    /// Prefixes of pods, disjoint and sorted.
    pods: Vec<IpNet>,
    /// The node of each address, of several the one with the smallest name.
    pub(super) addresses: BTreeMap<IpAddr, NodeName>,
}

impl Nodes {
    /// Judges each node; `here` has the index of this node and the family of its outer packets.
    pub(super) fn new(cluster: &Cluster, here: Option<(usize, Family)>) -> Self {
        let nodes = &cluster.nodes;
        let mut errors: Vec<_> = nodes.iter().map(|node| check_node(node, cluster)).collect();
        check_distinct(nodes, &mut errors);
        if let Some((here, family)) = here {
            for (place, (node, errors)) in nodes.iter().zip(&mut errors).enumerate() {
                let lacks = place != here && !node.underlay.is_empty();
                if lacks && underlay_of(node, family).is_none() {
                    errors.push(NodeError::UnderlayFamily { family });
                }
            }
        }
        let mut all: Vec<_> = nodes.iter().zip(errors).enumerate().collect();
        all.sort_unstable_by_key(|(_, (node, _))| order(node));
        let (mut sound, mut left_out) = (BTreeMap::new(), BTreeMap::<_, Vec<_>>::new());
        let (mut addresses, mut own) = (BTreeMap::new(), Vec::new());
        for (place, (node, errors)) in all {
            for address in own_addresses(node) {
                // What an address that no host can have would exclude is no packet's destination.
                let address = address.to_canonical();
                own.extend(Some(address).filter(|own| is_host(*own)).map(IpNet::from));
                addresses.entry(address).or_insert_with(|| node.name.clone());
            }
            if errors.is_empty() {
                sound.insert(node.name.clone(), place);
                continue;
            }
            let told = left_out.entry(node.name.clone()).or_default();
            for error in errors {
                if !told.contains(&error) {
                    told.push(error);
                }
            }
        }
        let given = cluster.excluded.iter().chain(&cluster.pods).copied();
        let given = given.filter(|net| check_net(net).is_ok());
        let inside = disjoint(given.chain(never_steered()).collect());
        let excluded = disjoint(inside.iter().copied().chain(own).collect());
        let pods = disjoint(cluster.pods.clone());
        Self { excluded, inside, sound, left_out, pods, addresses }
    }

    /// Returns the index of a gateway in the cluster's list.
    pub(super) fn gateway(&self, name: &NodeName) -> Result<usize, PolicyError> {
        self.sound.get(name).copied().ok_or_else(|| {
            let gateway = name.clone();
            if self.left_out.contains_key(name) {
                PolicyError::GatewayLeftOut { gateway }
            } else {
                PolicyError::UnknownGateway { gateway }
            }
        })
    }

    pub(super) fn check_egress_ip(&self, address: IpAddr) -> Result<(), PolicyError> {
        if is_mapped(address) || !is_host(address) {
            return Err(PolicyError::EgressIpNotUnicast { address });
        }
        if let Some(node) = self.addresses.get(&address) {
            return Err(PolicyError::EgressIpOfNode { address, node: node.clone() });
        }
        match around(&self.pods, address) {
            Some(net) => Err(PolicyError::EgressIpOfPods { address, net: *net }),
            None => Ok(()),
        }
    }
}

/// A validated cluster.
#[derive(Debug)]
pub(super) struct ValidatedCluster {
    pub(super) cluster: Cluster,
    /// This node, with its usable addresses only.
    pub(super) here: Node,
    /// Family of the outer packets.
    pub(super) underlay: Family,
    pub(super) nodes: Nodes,
    /// Nodes of earlier clusters, which may hold a mark or a table.
    pub(super) former: BTreeSet<NodeName>,
    /// Fields that rules cannot test in the kernel of this node.
    pub(super) missing_fields: BTreeSet<Field>,
}

impl ValidatedCluster {
    pub(super) fn new(cluster: &Cluster) -> Result<Self, PlanError> {
        check_settings(cluster)?;
        let (place, here, underlay) = this_node(cluster)?;
        let overhead = overhead(underlay);
        if cluster.tunnel.underlay_mtu < 1280 + overhead {
            return Err(PlanError::Mtu {
                mtu: cluster.tunnel.underlay_mtu,
                needed: 1280 + overhead,
            });
        }
        for net in cluster.excluded.iter().chain(&cluster.pods) {
            check_net(net).map_err(|source| PlanError::Excluded { source })?;
        }
        for claim in &cluster.claims {
            check_net(&claim.net).map_err(|source| PlanError::Claim { source })?;
            if claim.device == cluster.tunnel.device {
                return Err(PlanError::ClaimDevice { device: claim.device.clone() });
            }
        }
        let nodes = Nodes::new(cluster, Some((place, underlay)));
        let (former, missing_fields) = (BTreeSet::new(), BTreeSet::new());
        Ok(Self { cluster: cluster.clone(), here, underlay, nodes, former, missing_fields })
    }

    /// Returns the node at an index of the cluster's list.
    pub(super) fn node(&self, place: usize) -> Option<&Node> {
        self.cluster.nodes.get(place)
    }

    /// Returns whether the node at an index of the cluster's list is this one.
    pub(super) fn is_here(&self, place: usize) -> bool {
        self.node(place).is_some_and(|node| node.name == self.here.name)
    }

    /// Returns all nodes that are not left out, except this one, by name.
    pub(super) fn peers(&self) -> impl Iterator<Item = &Node> {
        let nodes = self.nodes.sound.values().filter_map(|place| self.node(*place));
        nodes.filter(|node| node.name != self.here.name)
    }

    /// Returns the indices of all nodes that are not left out, except this one.
    pub(super) fn peer_places(&self) -> impl Iterator<Item = usize> + '_ {
        self.nodes.sound.values().copied().filter(|place| !self.is_here(*place))
    }

    /// Returns the marks that the caller gives to nodes that are not left out, and to this node.
    pub(super) fn given_marks(&self) -> impl Iterator<Item = (&NodeName, Mark)> {
        let nodes = self.peers().chain([&self.here]);
        nodes.filter_map(|node| Some((&node.name, self.given_mark(&node.name)?)))
    }

    /// Returns the mark that the caller gives to a node.
    pub(super) fn given_mark(&self, name: &NodeName) -> Option<Mark> {
        let sound = self.nodes.sound.get(name).and_then(|place| self.node(*place));
        let node = if *name == self.here.name { Some(&self.here) } else { sound };
        // A mark of this node that is not of the layout leaves it out as a gateway only.
        node?.mark.filter(|mark| self.cluster.marks.value(*mark).is_some())
    }

    /// Returns the underlay address of a node, to which outer packets are sent.
    pub(super) fn underlay(&self, node: &Node) -> Option<IpAddr> {
        underlay_of(node, self.underlay)
    }

    pub(super) fn mtu(&self) -> u32 {
        self.cluster.tunnel.underlay_mtu - overhead(self.underlay)
    }

    /// Returns the MSS, in bytes, to which that of TCP connections in the tunnel is lowered, if any.
    pub(super) fn mss(&self, family: Family) -> Option<u16> {
        // Headers without options: 20 or 40 bytes of IP, and 20 of TCP.
        let headers = match family {
            Family::V4 => 40,
            Family::V6 => 60,
        };
        let size = u16::try_from(self.mtu() - headers).unwrap_or(u16::MAX);
        self.cluster.tunnel.clamp_mss.then_some(size)
    }
}

/// Returns the bytes of the outer Ethernet, IP, UDP and VXLAN headers (RFC 7348, section 5).
const fn overhead(underlay: Family) -> u32 {
    match underlay {
        Family::V4 => 50,
        Family::V6 => 70,
    }
}

/// Returns the index of this node, its entry without unusable addresses, and its outer family.
fn this_node(cluster: &Cluster) -> Result<(usize, Node, Family), PlanError> {
    let name = &cluster.node;
    let mut entries: Vec<_> =
        cluster.nodes.iter().enumerate().filter(|(_, node)| node.name == *name).collect();
    // Of several entries the same one, whatever the order of the list.
    entries.sort_unstable_by_key(|(_, node)| order(node));
    let usable = entries.iter().find_map(|(place, node)| {
        let node = usable(node, &cluster.pods)?;
        let underlay = node.underlay.iter().map(|address| Family::of(*address)).min()?;
        Some((*place, node, underlay))
    });
    usable.ok_or_else(|| match entries.first() {
        Some((_, node)) => {
            PlanError::ThisNode { node: name.clone(), errors: check_node(node, cluster) }
        }
        None => PlanError::UnknownNode { node: name.clone() },
    })
}

/// Returns this node without the addresses that it cannot use; `None` if too few are left.
fn usable(node: &Node, pods: &[IpNet]) -> Option<Node> {
    let sound = |address: IpAddr| is_host(address) && !is_mapped(address);
    let alone = |address: IpAddr, all: &mut dyn Iterator<Item = IpAddr>| {
        all.filter(|other| Family::of(*other) == Family::of(address)).count() == 1
    };
    let mut usable = node.clone();
    usable
        .underlay
        .retain(|address| sound(*address) && alone(*address, &mut node.underlay.iter().copied()));
    usable.tunnel.retain(|net| {
        sound(net.addr())
            && alone(net.addr(), &mut node.tunnel.iter().map(IpNet::addr))
            && !node.underlay.contains(&net.addr())
            && !pods.iter().any(|pods| pods.contains(&net.addr()))
    });
    let whole = !usable.underlay.is_empty() && !usable.tunnel.is_empty();
    (whole && usable.mac().is_unicast()).then_some(usable)
}

fn underlay_of(node: &Node, family: Family) -> Option<IpAddr> {
    node.underlay.iter().copied().find(|address| Family::of(*address) == family)
}

/// An order of nodes that distinguishes all that differ.
fn order(node: &Node) -> impl Ord + '_ {
    (&node.name, &node.underlay, &node.tunnel, node.mac, node.mark)
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
    if tunnel.underlay_only {
        if tunnel.underlay_device.is_none() {
            return Err(PlanError::UnderlayOnlyDevice);
        }
        if cluster.backend != Backend::Nftables {
            return Err(PlanError::UnderlayOnlyBackend);
        }
    }
    if cluster.policy_counters && cluster.connection_caching {
        return Err(PlanError::CachedCounters);
    }
    if cluster.replies == Replies::Tunnel {
        if cluster.backend != Backend::Nftables {
            return Err(PlanError::TunnelRepliesBackend);
        }
        if !cluster.marks.tells_by_prefix() {
            return Err(PlanError::TunnelRepliesPrefix);
        }
    }
    if cluster.policy_counters && cluster.backend != Backend::Nftables {
        return Err(PlanError::IptablesCounters);
    }
    // 0 is the priority of the kernel's rule for local addresses.
    if cluster.rule_priority == 0 || cluster.rule_priority > RulePriorities::LAST {
        return Err(PlanError::RulePriority { priority: cluster.rule_priority });
    }
    if cluster.excluded.is_empty() && cluster.pods.is_empty() {
        return Err(PlanError::NothingExcluded);
    }
    Ok(())
}

/// Returns the errors of a node that concern no other node.
fn check_node(node: &Node, cluster: &Cluster) -> Vec<NodeError> {
    let mut errors = Vec::new();
    for address in own_addresses(node) {
        if is_mapped(address) {
            errors.push(NodeError::Mapped { address });
        } else if !is_host(address) {
            errors.push(NodeError::Address { address });
        }
    }
    for family in Family::BOTH {
        let underlay = node.underlay.iter().filter(|address| Family::of(**address) == family);
        let tunnel = node.tunnel.iter().filter(|net| Family::of_net(net) == family);
        if underlay.count() > 1 || tunnel.count() > 1 {
            errors.push(NodeError::Family { family });
        }
    }
    let inside = node.tunnel.iter().map(IpNet::addr);
    let twofold = inside.filter(|address| node.underlay.contains(address));
    errors.extend(twofold.map(|address| NodeError::Twofold { address }));
    for address in node.tunnel.iter().map(IpNet::addr) {
        let pods = cluster.pods.iter().find(|pods| pods.contains(&address));
        errors.extend(pods.map(|net| NodeError::TunnelOfPods { address, net: *net }));
    }
    if node.underlay.is_empty() {
        errors.push(NodeError::NoUnderlay);
    }
    if node.tunnel.is_empty() {
        errors.push(NodeError::NoTunnel);
    }
    if !node.mac().is_unicast() {
        errors.push(NodeError::Mac { mac: node.mac() });
    }
    let foreign = node.mark.filter(|mark| cluster.marks.value(*mark).is_none());
    errors.extend(foreign.map(|mark| NodeError::ForeignMark { mark }));
    errors
}

/// Adds the errors of nodes that share a name, an address, a MAC address or a mark.
fn check_distinct(nodes: &[Node], errors: &mut [Vec<NodeError>]) {
    let mut twice: BTreeMap<&NodeName, usize> = BTreeMap::new();
    for node in nodes {
        *twice.entry(&node.name).or_default() += 1;
    }
    for (node, errors) in nodes.iter().zip(errors.iter_mut()) {
        if twice.get(&node.name).is_some_and(|count| *count > 1) {
            errors.push(NodeError::Duplicate);
        }
    }
    check_shared(nodes, errors, own_addresses);
    check_shared(nodes, errors, |node| [node.mac()]);
    check_shared(nodes, errors, |node| node.mark);
}

/// Adds the errors of nodes of different names that share a value of a kind.
fn check_shared<'a, K: Ord + Copy + Display, I: IntoIterator<Item = K>>(
    nodes: &'a [Node],
    errors: &mut [Vec<NodeError>],
    values: impl Fn(&'a Node) -> I,
) {
    // The first two names in order, so that each holder can be told another one.
    let mut holders: BTreeMap<K, BTreeSet<&NodeName>> = BTreeMap::new();
    for node in nodes {
        for value in values(node) {
            let names = holders.entry(value).or_default();
            names.insert(&node.name);
            if names.len() > 2 {
                names.pop_last();
            }
        }
    }
    for (node, errors) in nodes.iter().zip(errors) {
        for value in values(node) {
            let others = holders.get(&value).into_iter().flatten();
            let other = others.copied().find(|other| **other != node.name);
            errors.extend(
                other.map(|other| NodeError::Shared {
                    what: value.to_string(),
                    other: other.clone(),
                }),
            );
        }
    }
}

/// Returns the underlay and tunnel addresses of a node.
fn own_addresses(node: &Node) -> impl Iterator<Item = IpAddr> + '_ {
    node.underlay.iter().copied().chain(node.tunnel.iter().map(IpNet::addr))
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

/// Returns the single address that a prefix with host bits names, which is its smallest reading.
pub(super) fn smallest_reading(net: &IpNet) -> Option<IpAddr> {
    let named = matches!(check_net(net), Err(PolicyError::HostBits { .. }));
    Some(net.addr()).filter(|address| named && !is_mapped(*address))
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
