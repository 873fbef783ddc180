//! Plans the kernel state of one node from its policies; pure and deterministic.

mod classes;
mod egress_hook;
mod error;
mod finding;
mod index;
mod intervals;
mod iptables;
mod pending;
mod policies;
mod replies;
mod reverse_path;
mod routing;
mod skeleton;
mod table;
mod tags;
mod update;
mod validate;

use std::collections::{BTreeMap, BTreeSet};

use crate::alloc::{AllocError, MarkAllocator, TableAllocator};
#[cfg(doc)]
use crate::cluster::Node;
use crate::cluster::{Cluster, Replies, Steering};
use crate::policy::Policy;
use crate::state::State;
use crate::types::{Family, Mark, NodeName, TableId};

pub use error::{NodeError, PlanError, PolicyError};
pub use finding::{DenyReason, Finding};
pub(crate) use index::{Draft, Index};
use policies::NormalizedPolicy;
pub(crate) use reverse_path::reverse_path;
#[cfg(all(feature = "kernel", target_os = "linux"))]
pub(crate) use skeleton::priority::{AFTER_DNAT, BEFORE_SNAT};
#[cfg(test)]
pub(crate) use tags::tests::with_few as with_few_tags;
pub use update::Update;
pub(crate) use update::{Change, Part, Planned};
use validate::{Nodes, ValidatedCluster};

/// The planned kernel state of this node, with information for the caller.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Plan {
    /// The planned kernel state.
    pub state: State,
    /// The gateways that this node steers to, each with its mark and its routing table.
    pub gateways: BTreeMap<NodeName, (Mark, TableId)>,
    /// Errors of nodes and policies, and warnings.
    pub findings: Vec<Finding>,
}

/// Plans the kernel state of this node for these policies.
///
/// The order of the input has no effect. Gateways that this node steers to get their mark and their
/// routing table from the allocators; a mark given with a [`Node`] is reserved first. In a layout
/// with a prefix this node gets a table too, the fallback table for marked packets that match no
/// gateway's rule, as long as the gateways leave one free. With [`Steering::EgressHook`] the
/// fallback table is the only one, and all gateways share it.
///
/// A policy or another node with an error takes no other policy along: it is a [`Finding`], the
/// traffic of the policy is treated as its [`Unavailable`](crate::Unavailable) says, and a node is
/// no gateway. If there are more gateways than marks or tables, those that have them keep them,
/// and others follow by name.
///
/// # Errors
///
/// An error of this node or of a setting, and a failure of an allocator. By then the allocators may
/// have given out ids; nothing else is changed.
pub fn plan<P: Policy>(
    cluster: &Cluster,
    policies: impl IntoIterator<Item = P>,
    marks: &mut dyn MarkAllocator,
    tables: &mut dyn TableAllocator,
) -> Result<Plan, PlanError> {
    let (index, state) = Draft::new(cluster, policies)?.number(marks, tables)?;
    Ok(Plan { state, gateways: index.gateways(), findings: index.findings() })
}

/// Checks a single policy, for example in an admission webhook.
///
/// The policy is compared with the valid nodes and prefixes of the cluster; whether the cluster has
/// errors besides, and which node it is seen from, does not matter.
///
/// ```
/// use egress_datapath::{Cluster, EgressIp, EgressPolicy, Node, NodeName, PolicyId, check_policy};
///
/// let name = NodeName::new("node-a")?;
/// let node =
///     Node::new(name.clone(), vec!["10.10.0.11".parse()?], vec!["172.31.0.11/16".parse()?]);
/// let cluster = Cluster::new(name, vec![node], vec!["10.244.0.0/16".parse()?]);
/// let sources = vec!["10.244.1.10/24".parse()?];
/// let policy = EgressPolicy::new(PolicyId::new("p")?, sources, EgressIp::Node)
///     .with_gateway(NodeName::new("node-z")?);
/// let errors = check_policy(&cluster, &policy).unwrap_err();
/// assert_eq!(errors[0].code(), "host_bits");
/// assert_eq!(errors[1].to_string(), "gateway node-z is not a node of the cluster");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
///
/// All errors of the policy.
pub fn check_policy<P: Policy>(cluster: &Cluster, policy: &P) -> Result<(), Vec<PolicyError>> {
    let errors = NormalizedPolicy::new(policy, &Nodes::new(cluster, None)).all_errors();
    if errors.is_empty() { Ok(()) } else { Err(errors) }
}

/// Reserves the marks that the caller gives in the allocator.
fn reserve_given(world: &ValidatedCluster, marks: &mut dyn MarkAllocator) -> Result<(), PlanError> {
    for (name, mark) in world.given_marks() {
        if marks.get(name).is_some_and(|held| held != mark) {
            marks.release(name).map_err(PlanError::Mark)?;
        }
        match marks.reserve(name, mark) {
            // A node that has the mark by allocation alone gets another one.
            Err(AllocError::Taken { holder, .. }) if world.given_mark(&holder) != Some(mark) => {
                marks.release(&holder).map_err(PlanError::Mark)?;
                marks.reserve(name, mark).map_err(PlanError::Mark)?;
            }
            other => other.map_err(PlanError::Mark)?,
        }
    }
    Ok(())
}

/// Returns the table of the fallback rule; if the gateways leave none, the number of tables.
fn closing_table(
    world: &ValidatedCluster,
    gateways: &Gateways,
    tables: &mut dyn TableAllocator,
) -> Result<(Option<TableId>, Option<usize>), PlanError> {
    let cluster = &world.cluster;
    // Without a prefix our marks cannot be told from those of other programs, so that only packets
    // with a gateway's mark can be dropped.
    if !cluster.marks.tells_by_prefix() {
        return Ok((None, None));
    }
    let idle = |node: &NodeName| !gateways.contains_key(node);
    match table_for(&cluster.node, world, idle, tables) {
        Ok(table) => Ok((Some(table), None)),
        Err(AllocError::Exhausted { capacity, .. }) => Ok((None, Some(capacity))),
        Err(error) => Err(PlanError::Table(error)),
    }
}

/// Defines a function that allocates a free id; if there is none, it takes the id of an idle node.
///
/// An idle node is no gateway any more, or needs its id less.
macro_rules! allocate_or_take {
    ($name:ident, $allocator:ident, $id:ty) => {
        fn $name(
            name: &NodeName,
            world: &ValidatedCluster,
            idle: impl Fn(&NodeName) -> bool,
            ids: &mut dyn $allocator,
        ) -> Result<$id, AllocError<$id>> {
            let exhausted = match ids.allocate(name) {
                Err(error @ AllocError::Exhausted { .. }) => error,
                other => return other,
            };
            // This node comes last, because its table is the fallback rule's.
            let here = &world.cluster.node;
            let nodes = world.cluster.nodes.iter().map(|node| &node.name);
            let others = world.former.iter().chain(nodes).filter(|node| *node != here);
            for node in others.chain([here]).filter(|node| idle(node)) {
                let Some(id) = ids.get(node) else { continue };
                ids.release(node)?;
                // Not allocated: what the kernel has in a table is ours, and would count as in use.
                match ids.reserve(name, id) {
                    Ok(()) => return Ok(id),
                    // An allocator that assigns ids by node does not move them.
                    Err(_) => ids.reserve(node, id)?,
                }
            }
            Err(exhausted)
        }
    };
}

allocate_or_take!(mark_for, MarkAllocator, Mark);
allocate_or_take!(table_for, TableAllocator, TableId);

/// A gateway that this node steers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Gateway {
    /// Index of the node in the cluster's list.
    place: usize,
    mark: Mark,
    /// The gateway number in the mark.
    value: u16,
    table: TableId,
}

/// The gateways that this node steers to.
type Gateways = BTreeMap<NodeName, Gateway>;

/// Returns the bits of a mark that distinguish these gateways, this node and the reserved marks.
fn tested_bits(world: &ValidatedCluster, gateways: &Gateways, own_mark: Option<Mark>) -> u32 {
    let marks = gateways.values().map(|gateway| gateway.mark);
    world.cluster.marks.tested(marks.chain(own_mark))
}

/// The treatment of a policy's traffic of one family on this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    /// The traffic is sent to the gateway node at this index of the cluster's list.
    Client(usize),
    /// The traffic leaves from this node.
    Gateway,
    /// The policy cannot be carried out: its traffic is dropped, or bypasses the policy.
    Denied(DenyReason),
    /// The policy has errors, and is treated in the same way.
    Invalid,
}

fn role(policy: &NormalizedPolicy, family: Family, world: &ValidatedCluster) -> Role {
    if !policy.is_sound() {
        return Role::Invalid;
    }
    let place = policy.gateway.as_ref().and_then(|gateway| gateway.as_ref().ok());
    let gateway = place.and_then(|place| Some((*place, world.node(*place)?)));
    let Some((place, gateway)) = gateway else {
        return Role::Denied(DenyReason::NoGateway);
    };
    if !policy.egress_ip.serves(family) {
        return Role::Denied(DenyReason::NoEgressIp);
    }
    if gateway.name == world.here.name {
        return Role::Gateway;
    }
    if routing::carries(world, gateway, family) {
        Role::Client(place)
    } else {
        Role::Denied(DenyReason::NoTunnelAddress)
    }
}

/// Returns the roles of a policy for the families of its sources.
fn roles(
    policy: &NormalizedPolicy,
    world: &ValidatedCluster,
) -> impl Iterator<Item = (Family, Role)> {
    let families = Family::BOTH.into_iter().filter(|family| policy.sources.has(*family));
    families.map(|family| (family, role(policy, family, world)))
}

/// Returns the gateway of a role; `None` if no mark or no table was left for it, too.
fn gateway_of<'a>(
    role: Role,
    world: &ValidatedCluster,
    gateways: &'a Gateways,
) -> Option<&'a Gateway> {
    let Role::Client(place) = role else { return None };
    world.node(place).and_then(|node| gateways.get(&node.name))
}

/// Assigns marks and tables to the nodes at these indices of the cluster's list.
///
/// Nodes for which none is left are missing in the result, and hold neither afterwards. Of those
/// that have none yet, gateways of policies come first.
fn numbered(
    receivers: &BTreeSet<usize>,
    gateways_of_policies: &BTreeMap<usize, usize>,
    world: &ValidatedCluster,
    marks: &mut dyn MarkAllocator,
    tables: &mut dyn TableAllocator,
) -> Result<Gateways, PlanError> {
    let cluster = &world.cluster;
    let named = receivers.iter().filter_map(|place| Some((&world.node(*place)?.name, *place)));
    let used: BTreeMap<_, _> = named.collect();
    let replies = cluster.replies == Replies::Tunnel;
    let replies_only = |place: usize| !gateways_of_policies.contains_key(&place);
    // Gateways that have a mark keep it; a new one must not displace them.
    let mut waiting: Vec<_> = used.iter().map(|(name, place)| (*name, *place)).collect();
    waiting.sort_by_key(|(name, place)| {
        let none = marks.get(name).is_none();
        (none, none && replies_only(*place), *name)
    });
    let mut marked = BTreeMap::new();
    for (name, place) in waiting {
        let here = |node: &NodeName| replies && *node == cluster.node;
        let idle = |node: &NodeName| {
            !used.contains_key(node) && !here(node) && world.given_mark(node).is_none()
        };
        match mark_for(name, world, idle, marks) {
            Ok(mark) => {
                marked.insert(name, (place, mark));
            }
            Err(AllocError::Exhausted { .. }) => {}
            Err(error) => return Err(PlanError::Mark(error)),
        }
    }
    let mut gateways = Gateways::new();
    let mut waiting: Vec<_> = marked.iter().collect();
    waiting.sort_by_key(|(name, (place, _))| {
        let none = tables.get(name).is_none();
        (none, none && replies_only(*place), **name)
    });
    for (&name, &(place, mark)) in waiting {
        let value = cluster
            .marks
            .value(mark)
            .ok_or_else(|| PlanError::ForeignMark { node: name.clone(), mark })?;
        // With the egress hook all gateways share this node's table.
        let found = match cluster.steering {
            Steering::Tables => table_for(name, world, |node| !marked.contains_key(node), tables),
            Steering::EgressHook => table_for(&cluster.node, world, |_| true, tables),
        };
        match found {
            Ok(table) => {
                gateways.insert(name.clone(), Gateway { place, mark, value, table });
            }
            Err(AllocError::Exhausted { .. }) => {}
            Err(error) => return Err(PlanError::Table(error)),
        }
    }
    for name in used.into_keys().filter(|name| !gateways.contains_key(*name)) {
        if marks.get(name).is_some() && world.given_mark(name).is_none() {
            marks.release(name).map_err(PlanError::Mark)?;
        }
        if tables.get(name).is_some() && *name != cluster.node {
            tables.release(name).map_err(PlanError::Table)?;
        }
    }
    Ok(gateways)
}
