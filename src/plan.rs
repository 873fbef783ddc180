//! From policies to what this node's kernel should hold; pure, and the same for the same input.

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
pub use finding::{Closed, Finding};
pub(crate) use index::{Draft, Index};
use policies::Kept;
#[cfg(all(feature = "kernel", target_os = "linux"))]
pub(crate) use skeleton::priority::BEFORE_SNAT;
#[cfg(test)]
pub(crate) use tags::tests::with_few as with_few_tags;
pub use update::Update;
pub(crate) use update::{Part, Planned};
use validate::World;

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

/// What this node's kernel should hold for these policies.
///
/// The order of the input never matters. Gateways that this node steers to get their mark and
/// their table from the allocators; a mark given with a [`Node`] is reserved first. In a layout
/// with a prefix this node gets a table too, for marked packets that find no gateway's, as long as
/// the gateways leave one; with [`Steering::EgressHook`] it is the only one, and all gateways'.
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
    let (index, state) = Draft::new(cluster, policies)?.number(marks, tables)?;
    Ok(Plan { state, gateways: index.gateways(), findings: index.findings() })
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

/// The table of the closing rule, and how many there are if the gateways leave none.
fn closing_table(
    cluster: &Cluster,
    gateways: &Gateways,
    tables: &mut dyn TableAllocator,
) -> Result<(Option<TableId>, Option<usize>), PlanError> {
    // Without a prefix our marks cannot be told from other people's, so nothing can be closed
    // but what a gateway's mark is on.
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

/// A free table; where there is none, that of an idle node, which is no gateway any more or needs
/// it less.
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
    // This node, whose table is the closing rule's, is asked last.
    let others = cluster.nodes.iter().map(|node| &node.name).filter(|node| **node != cluster.node);
    for node in others.chain([&cluster.node]).filter(|node| idle(node)) {
        if let Some(table) = tables.get(node) {
            tables.release(node)?;
            // Not allocated: what the kernel has in it is ours, and would count as in use.
            tables.reserve(name, table)?;
            return Ok(table);
        }
    }
    Err(exhausted)
}

/// A gateway that this node steers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Gateway {
    /// The node's place in the cluster's list.
    place: usize,
    mark: Mark,
    /// The number in the mark.
    value: u16,
    table: TableId,
}

/// The gateways that this node steers to.
type Gateways = BTreeMap<NodeName, Gateway>;

/// What becomes of a policy's traffic of one family on this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    /// It is sent to the node at this place of the cluster's list.
    Client(usize),
    /// It leaves from here.
    Gateway,
    /// It is dropped.
    Closed(Closed),
}

fn role(policy: &Kept, family: Family, world: &World) -> Role {
    let gateway = policy.gateway.and_then(|place| Some((place, world.node(place)?)));
    let Some((place, gateway)) = gateway else {
        return Role::Closed(Closed::NoGateway);
    };
    if !policy.egress_ip.serves(family) {
        return Role::Closed(Closed::NoEgressIp);
    }
    if gateway.name == world.here.name {
        return Role::Gateway;
    }
    if routing::carries(world, gateway, family) {
        Role::Client(place)
    } else {
        Role::Closed(Closed::NoTunnelAddress)
    }
}

/// What becomes of a policy's traffic of the families that it has sources of.
fn roles(policy: &Kept, world: &World) -> impl Iterator<Item = (Family, Role)> {
    let families = Family::BOTH.into_iter().filter(|family| policy.sources.has(*family));
    families.map(|family| (family, role(policy, family, world)))
}

/// Gives the gateways at these places of the cluster's list their marks and tables.
fn numbered(
    used: impl IntoIterator<Item = usize>,
    world: &World,
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
