//! From policies to what this node's kernel should hold; pure, and the same for the same input.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;

use crate::alloc::{AllocError, MarkAllocator, TableAllocator};
use crate::cluster::{Cluster, Node};
use crate::policy::{Policy, Unavailable};
use crate::state::State;
use crate::types::{Family, MacAddr, Mark, NodeName, PolicyId, TableId};

mod chains;
mod check;
mod classes;
mod firewall;
mod routing;

#[cfg(all(feature = "kernel", target_os = "linux"))]
pub(crate) use chains::priority::BEFORE_SNAT;
use check::{Checked, World};

/// What this node's kernel should hold, and what the caller should know about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// What the kernel should hold.
    pub state: State,
    /// The gateways this node steers to, each with its mark and its table.
    pub gateways: BTreeMap<NodeName, (Mark, TableId)>,
    /// What is as asked, but perhaps not as meant.
    pub findings: Vec<Finding>,
}

/// Something that is as asked, but perhaps not as meant.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Finding {
    /// Two policies take the same packets of some source.
    #[error("policies {winner} and {loser} overlap in {family}: {winner} comes first and wins")]
    Overlap {
        /// The policy that takes them: lower priority number, or the smaller id.
        winner: PolicyId,
        /// The policy that does not.
        loser: PolicyId,
        /// The family.
        family: Family,
    },
    /// The policy's traffic of a family leaves as if there were no policy, as it asks for.
    #[error("policy {policy} leaves its {family} traffic alone: {why}")]
    Bypassed {
        /// The policy.
        policy: PolicyId,
        /// The family.
        family: Family,
        /// The reason.
        why: Closed,
    },
    /// The policy's traffic of a family is dropped.
    #[error("policy {policy} drops its {family} traffic: {why}")]
    Closed {
        /// The policy.
        policy: PolicyId,
        /// The family.
        family: Family,
        /// The reason.
        why: Closed,
    },
}

/// Why a policy's traffic cannot be sent out as it asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Closed {
    /// No gateway is named.
    #[error("it has no gateway")]
    NoGateway,
    /// There is nothing to wear.
    #[error("it has no egress IP of that family")]
    NoEgressIp,
    /// The tunnel does not carry the family between the two nodes.
    #[error("this node or the gateway has no tunnel address of that family")]
    NoTunnelAddress,
}

/// Input that contradicts itself or the kernel's limits; nothing was touched.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// The node planned for is not in the list.
    #[error("node {node} is not in the cluster's list of nodes")]
    UnknownNode {
        /// Its name.
        node: NodeName,
    },
    /// A name occurs twice.
    #[error("node {node} is listed twice")]
    DuplicateNode {
        /// The name.
        node: NodeName,
    },
    /// An underlay or tunnel address that no host can have.
    #[error("node {node} cannot have address {address}: it is not a unicast address")]
    NodeAddress {
        /// The node.
        node: NodeName,
        /// The address.
        address: IpAddr,
    },
    /// An IPv4 address written as IPv6.
    #[error("node {node} has address {address}: write IPv4 addresses as IPv4")]
    NodeMapped {
        /// The node.
        node: NodeName,
        /// The address.
        address: IpAddr,
    },
    /// More than one underlay or tunnel address of a family.
    #[error("node {node} has more than one {family} underlay or tunnel address")]
    NodeFamily {
        /// The node.
        node: NodeName,
        /// The family.
        family: Family,
    },
    /// This node has no underlay address.
    #[error("node {node} has no underlay address")]
    NoUnderlay {
        /// The node.
        node: NodeName,
    },
    /// A node cannot be reached by outer packets of the family that this node uses.
    #[error("node {node} has no {family} underlay address, which the tunnel of this node uses")]
    UnderlayFamily {
        /// The node.
        node: NodeName,
        /// The family of this node's outer packets.
        family: Family,
    },
    /// A node has no tunnel address.
    #[error("node {node} has no tunnel address")]
    NoTunnel {
        /// The node.
        node: NodeName,
    },
    /// An Ethernet address that no device can have.
    #[error("node {node} cannot have Ethernet address {mac}: it is zero or a group address")]
    Mac {
        /// The node.
        node: NodeName,
        /// The address.
        mac: MacAddr,
    },
    /// A mark outside the layout, or set aside in it.
    #[error("node {node} cannot have mark {mark}: the layout has no such gateway mark")]
    ForeignMark {
        /// The node.
        node: NodeName,
        /// The mark.
        mark: Mark,
    },
    /// Two nodes have the same address, Ethernet address or mark.
    #[error("nodes {one} and {other} both have {what}")]
    Shared {
        /// What they share.
        what: String,
        /// The first of them.
        one: NodeName,
        /// The other.
        other: NodeName,
    },
    /// A VXLAN network identifier that is zero or longer than 24 bits.
    #[error("VXLAN network identifier {vni} is not between 1 and 16777215")]
    Vni {
        /// The identifier.
        vni: u32,
    },
    /// UDP port 0.
    #[error("the tunnel needs a UDP port other than 0")]
    Port,
    /// The underlay cannot carry IPv6 packets of minimum size in the tunnel.
    #[error("underlay MTU {mtu} is too small: the tunnel needs {needed} to carry 1280 bytes")]
    Mtu {
        /// The underlay's MTU in bytes.
        mtu: u32,
        /// What is needed.
        needed: u32,
    },
    /// A priority that is not between the kernel's own rules.
    #[error("rule priority {priority} is not between 1 and 32764")]
    RulePriority {
        /// The priority.
        priority: u32,
    },
    /// No excluded prefix: everything would be external, also other pods.
    #[error("no excluded prefix is given: name at least the prefix of the pods")]
    NothingExcluded,
    /// An excluded prefix that is none.
    #[error("excluded prefixes: {source}")]
    Excluded {
        /// What is wrong with it.
        source: PolicyError,
    },
    /// Two policies have one id.
    #[error("policy {policy} is given twice")]
    DuplicatePolicy {
        /// The id.
        policy: PolicyId,
    },
    /// A policy that contradicts itself or the cluster.
    #[error("policy {policy}: {source}")]
    Policy {
        /// Its id.
        policy: PolicyId,
        /// What is wrong with it.
        source: PolicyError,
    },
    /// A gateway could not be given a mark.
    #[error("marks: {0}")]
    Mark(AllocError<Mark>),
    /// A gateway could not be given a routing table.
    #[error("routing tables: {0}")]
    Table(AllocError<TableId>),
}

/// What is wrong with a policy or a prefix.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PolicyError {
    /// A prefix with bits set behind its length.
    #[error("{net} has host bits set; {meant} may be meant")]
    HostBits {
        /// The prefix.
        net: IpNet,
        /// The same without them.
        meant: IpNet,
    },
    /// An IPv4 prefix written as IPv6: it would never match a packet.
    #[error("{net} is an IPv4-mapped IPv6 prefix; write IPv4 prefixes as IPv4")]
    Mapped {
        /// The prefix.
        net: IpNet,
    },
    /// No source: the policy would do nothing.
    #[error("sources are empty; a policy needs at least one")]
    NoSources,
    /// An empty list of destinations, which must not be mistaken for all of them.
    #[error("destinations are an empty list; say external, or name a prefix")]
    NoDestinations,
    /// A gateway that is not a node of the cluster.
    #[error("gateway {gateway} is not a node of the cluster")]
    UnknownGateway {
        /// The name.
        gateway: NodeName,
    },
    /// An egress IP that one host cannot have or speak with.
    #[error("egress IP {address} is not a unicast address that can leave the link")]
    EgressIpNotUnicast {
        /// The address.
        address: IpAddr,
    },
    /// An egress IP that stays inside.
    #[error("egress IP {address} lies in the excluded prefix {net}")]
    EgressIpExcluded {
        /// The address.
        address: IpAddr,
        /// The prefix.
        net: IpNet,
    },
    /// An egress IP that is a node's own address, which would be cut off from its services.
    #[error("egress IP {address} is an address of node {node}; ask for the node's own instead")]
    EgressIpOfNode {
        /// The address.
        address: IpAddr,
        /// The node.
        node: NodeName,
    },
}

/// What this node's kernel should hold for these policies.
///
/// The order of the input never matters. Gateways that this node steers to get their mark and
/// their table from the allocators; a mark given with a [`Node`] is reserved first. In a layout
/// with a prefix this node gets a table too, for marked packets that find no gateway's.
///
/// # Errors
///
/// The first contradiction found. Allocators may have given out ids by then, nothing else is
/// touched.
pub fn plan<P: Policy>(
    cluster: &Cluster,
    policies: impl IntoIterator<Item = P>,
    marks: &mut dyn MarkAllocator,
    tables: &mut dyn TableAllocator,
) -> Result<Plan, PlanError> {
    let world = World::new(cluster)?;
    let policies: Vec<P> = policies.into_iter().collect();
    let checked = checked(&policies, &world)?;
    reserve_given(cluster, marks)?;
    let mut findings = Vec::new();
    let gateways = gateways(&checked, &world, marks, tables, &mut findings)?;
    let mut state = State::default();
    // Without a prefix our marks cannot be told from other people's, so nothing can be closed
    // but what a gateway's mark is on.
    let closing = match cluster.marks.prefix_mask() {
        0 => None,
        _ => Some(tables.allocate(&cluster.node).map_err(PlanError::Table)?),
    };
    routing::routing(&world, &gateways, closing, &mut state);
    state.firewall = Some(firewall::firewall(&world, &checked, &gateways, &mut findings));
    let gateways = gateways
        .into_values()
        .map(|gateway| (gateway.node.name.clone(), (gateway.mark, gateway.table)))
        .collect();
    Ok(Plan { state, gateways, findings })
}

/// The policies in their total order: (priority, id).
fn checked<'a, P: Policy>(
    policies: &'a [P],
    world: &World<'a>,
) -> Result<Vec<Checked<'a>>, PlanError> {
    let mut ids = BTreeSet::new();
    let mut checked = Vec::with_capacity(policies.len());
    for policy in policies {
        if !ids.insert(policy.id()) {
            return Err(PlanError::DuplicatePolicy { policy: policy.id().clone() });
        }
        checked.push(Checked::new(policy, world)?);
    }
    checked.sort_unstable_by_key(|policy| (policy.priority, policy.id));
    Ok(checked)
}

/// Makes the allocator agree with the marks that the caller gives.
fn reserve_given(cluster: &Cluster, marks: &mut dyn MarkAllocator) -> Result<(), PlanError> {
    let given = |node: &NodeName| {
        cluster.nodes.iter().find(|other| other.name == *node).and_then(|other| other.mark)
    };
    for node in &cluster.nodes {
        let Some(mark) = node.mark else { continue };
        if marks.get(&node.name).is_some_and(|held| held != mark) {
            marks.release(&node.name).map_err(PlanError::Mark)?;
        }
        match marks.reserve(&node.name, mark) {
            // Whoever has it by allocation alone gets another one.
            Err(AllocError::Taken { holder, .. }) if given(&holder).is_none_or(|m| m != mark) => {
                marks.release(&holder).map_err(PlanError::Mark)?;
                marks.reserve(&node.name, mark).map_err(PlanError::Mark)?;
            }
            other => other.map_err(PlanError::Mark)?,
        }
    }
    Ok(())
}

/// A gateway that this node steers to.
struct Gateway<'a> {
    node: &'a Node,
    mark: Mark,
    /// The number in the mark.
    value: u16,
    table: TableId,
}

/// What becomes of a policy's traffic of one family on this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    /// It is sent to another node.
    Client,
    /// It leaves from here.
    Gateway,
    /// It is dropped.
    Closed(Closed),
}

fn role(policy: &Checked<'_>, family: Family, world: &World<'_>) -> Role {
    let Some(gateway) = policy.gateway else {
        return Role::Closed(Closed::NoGateway);
    };
    if !policy.egress_ip.serves(family) {
        return Role::Closed(Closed::NoEgressIp);
    }
    if gateway.name == world.here.name {
        return Role::Gateway;
    }
    if routing::carries(world, gateway, family) {
        Role::Client
    } else {
        Role::Closed(Closed::NoTunnelAddress)
    }
}

fn gateways<'a>(
    policies: &[Checked<'a>],
    world: &World<'a>,
    marks: &mut dyn MarkAllocator,
    tables: &mut dyn TableAllocator,
    findings: &mut Vec<Finding>,
) -> Result<BTreeMap<&'a NodeName, Gateway<'a>>, PlanError> {
    let mut used = BTreeMap::new();
    for policy in policies {
        for family in Family::BOTH {
            if !policy.sources.iter().any(|net| Family::of_net(net) == family) {
                continue;
            }
            match (role(policy, family, world), policy.gateway) {
                (Role::Client, Some(node)) => {
                    used.insert(&node.name, node);
                }
                (Role::Closed(why), _) => {
                    let id = policy.id.clone();
                    findings.push(match policy.unavailable {
                        Unavailable::Drop => Finding::Closed { policy: id, family, why },
                        Unavailable::Bypass => Finding::Bypassed { policy: id, family, why },
                    });
                }
                _ => {}
            }
        }
    }
    let mut gateways = BTreeMap::new();
    for (name, node) in used {
        let mark = marks.allocate(name).map_err(PlanError::Mark)?;
        let value = world
            .cluster
            .marks
            .value(mark)
            .ok_or_else(|| PlanError::ForeignMark { node: name.clone(), mark })?;
        let table = tables.allocate(name).map_err(PlanError::Table)?;
        gateways.insert(name, Gateway { node, mark, value, table });
    }
    Ok(gateways)
}
