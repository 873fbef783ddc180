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
mod routing;
mod skeleton;
mod table;
mod tags;
mod update;
mod validate;

use std::collections::BTreeMap;

use crate::alloc::{AllocError, MarkAllocator, TableAllocator};
#[cfg(doc)]
use crate::cluster::Node;
use crate::cluster::{Cluster, Steering};
use crate::policy::Policy;
use crate::state::State;
use crate::types::{Family, Mark, NodeName, TableId};

pub use error::{PlanError, PolicyError};
pub use finding::{DenyReason, Finding};
pub(crate) use index::{Draft, Index};
use policies::NormalizedPolicy;
#[cfg(all(feature = "kernel", target_os = "linux"))]
pub(crate) use skeleton::priority::BEFORE_SNAT;
#[cfg(test)]
pub(crate) use tags::tests::with_few as with_few_tags;
pub use update::Update;
pub(crate) use update::{Part, Planned};
use validate::ValidatedCluster;

/// The planned kernel state of this node, with information for the caller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The planned kernel state.
    pub state: State,
    /// The gateways that this node steers to, each with its mark and its routing table.
    pub gateways: BTreeMap<NodeName, (Mark, TableId)>,
    /// Warnings about the plan, which is valid but may not do what was intended.
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
/// # Errors
///
/// The first contradiction found. By then the allocators may have given out ids; nothing else is
/// changed.
pub fn plan<P: Policy>(
    cluster: &Cluster,
    policies: impl IntoIterator<Item = P>,
    marks: &mut dyn MarkAllocator,
    tables: &mut dyn TableAllocator,
) -> Result<Plan, PlanError> {
    let (index, state) = Draft::new(cluster, policies)?.number(marks, tables)?;
    Ok(Plan { state, gateways: index.gateways(), findings: index.findings() })
}

/// Reserves the marks that the caller gives in the allocator.
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
            // A node that has the mark by allocation alone gets another one.
            Err(AllocError::Taken { holder, .. }) if given(&holder).is_none_or(|m| m != mark) => {
                marks.release(&holder).map_err(PlanError::Mark)?;
                marks.reserve(&node.name, mark).map_err(PlanError::Mark)?;
            }
            other => other.map_err(PlanError::Mark)?,
        }
    }
    Ok(())
}

/// Returns the table of the fallback rule; if the gateways leave none, the number of tables.
fn closing_table(
    cluster: &Cluster,
    gateways: &Gateways,
    tables: &mut dyn TableAllocator,
) -> Result<(Option<TableId>, Option<usize>), PlanError> {
    // Without a prefix our marks cannot be told from those of other programs, so that only packets
    // with a gateway's mark can be dropped.
    if !cluster.marks.tells_by_prefix() {
        return Ok((None, None));
    }
    let idle = |node: &NodeName| !gateways.contains_key(node);
    match table_for(&cluster.node, cluster, idle, tables) {
        Ok(table) => Ok((Some(table), None)),
        Err(AllocError::Exhausted { capacity, .. }) => Ok((None, Some(capacity))),
        Err(error) => Err(PlanError::Table(error)),
    }
}

/// Allocates a free table; if there is none, takes the table of an idle node.
///
/// An idle node is no gateway any more, or needs its table less.
fn table_for(
    name: &NodeName,
    cluster: &Cluster,
    idle: impl Fn(&NodeName) -> bool,
    tables: &mut dyn TableAllocator,
) -> Result<TableId, AllocError<TableId>> {
    let exhausted = match tables.allocate(name) {
        Err(error @ AllocError::Exhausted { .. }) => error,
        other => return other,
    };
    // This node comes last, because its table is the fallback rule's.
    let others = cluster.nodes.iter().map(|node| &node.name).filter(|node| **node != cluster.node);
    for node in others.chain([&cluster.node]).filter(|node| idle(node)) {
        if let Some(table) = tables.get(node) {
            tables.release(node)?;
            // Not allocated: the routes that the kernel has in the table are ours, and would count
            // as in use.
            tables.reserve(name, table)?;
            return Ok(table);
        }
    }
    Err(exhausted)
}

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

/// The treatment of a policy's traffic of one family on this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    /// The traffic is sent to the gateway node at this index of the cluster's list.
    Client(usize),
    /// The traffic leaves from this node.
    Gateway,
    /// The policy cannot be carried out: its traffic is dropped, or bypasses the policy.
    Denied(DenyReason),
}

fn role(policy: &NormalizedPolicy, family: Family, world: &ValidatedCluster) -> Role {
    let gateway = policy.gateway.and_then(|place| Some((place, world.node(place)?)));
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

/// Assigns marks and tables to the gateways at these indices of the cluster's list.
fn numbered(
    used: impl IntoIterator<Item = usize>,
    world: &ValidatedCluster,
    marks: &mut dyn MarkAllocator,
    tables: &mut dyn TableAllocator,
) -> Result<Gateways, PlanError> {
    let named = used.into_iter().filter_map(|place| Some((&world.node(place)?.name, place)));
    let used: BTreeMap<_, _> = named.collect();
    let everybodys = match world.cluster.steering {
        Steering::EgressHook if !used.is_empty() => {
            let cluster = &world.cluster;
            let table = table_for(&cluster.node, cluster, |_| true, tables);
            Some(table.map_err(PlanError::Table)?)
        }
        _ => None,
    };
    let mut gateways = Gateways::new();
    for (&name, &place) in &used {
        let mark = marks.allocate(name).map_err(PlanError::Mark)?;
        let value = world
            .cluster
            .marks
            .value(mark)
            .ok_or_else(|| PlanError::ForeignMark { node: name.clone(), mark })?;
        let idle = |node: &NodeName| !used.contains_key(node);
        let own = || table_for(name, &world.cluster, idle, tables).map_err(PlanError::Table);
        let table = everybodys.map_or_else(own, Ok)?;
        gateways.insert(name.clone(), Gateway { place, mark, value, table });
    }
    Ok(gateways)
}
