//! From policies to what this node's kernel should hold; pure, and the same for the same input.

use std::collections::{BTreeMap, BTreeSet};

use crate::alloc::{AllocError, MarkAllocator, TableAllocator};
use crate::cluster::{Backend, Cluster, Node};
use crate::policy::{Policy, Unavailable};
use crate::state::State;
use crate::types::{Family, Mark, NodeName, TableId};

mod chains;
mod check;
mod classes;
mod error;
mod finding;
mod firewall;
mod routing;
mod xtables;

#[cfg(all(feature = "kernel", target_os = "linux"))]
pub(crate) use chains::priority::BEFORE_SNAT;
use check::{Checked, World};
pub use error::{PlanError, PolicyError};
pub use finding::{Closed, Finding};

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
/// the gateways leave one.
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
        _ => closing_table(cluster, &gateways, tables, &mut findings)?,
    };
    routing::routing(&world, &gateways, closing, &mut state);
    match cluster.backend {
        Backend::Nftables => {
            state.firewall = Some(firewall::firewall(&world, &checked, &gateways, &mut findings));
        }
        Backend::Iptables(iptables) => {
            xtables::check(&world)?;
            let (sets, tables) =
                xtables::xtables(&world, &checked, &gateways, iptables, &mut findings);
            state.ipsets = sets;
            state.xtables.insert(iptables.variant, tables);
        }
    }
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

/// The table of the closing rule, if the gateways leave one.
fn closing_table(
    cluster: &Cluster,
    gateways: &BTreeMap<&NodeName, Gateway<'_>>,
    tables: &mut dyn TableAllocator,
    findings: &mut Vec<Finding>,
) -> Result<Option<TableId>, PlanError> {
    let idle = |node: &NodeName| !gateways.contains_key(node);
    match table_for(&cluster.node, cluster, idle, tables) {
        Ok(table) => Ok(Some(table)),
        Err(AllocError::Exhausted { capacity, .. }) => {
            findings.push(Finding::NoClosingTable { capacity });
            Ok(None)
        }
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
    for (&name, &node) in &used {
        let mark = marks.allocate(name).map_err(PlanError::Mark)?;
        let value = world
            .cluster
            .marks
            .value(mark)
            .ok_or_else(|| PlanError::ForeignMark { node: name.clone(), mark })?;
        let idle = |node: &NodeName| !used.contains_key(node);
        let table = table_for(name, world.cluster, idle, tables).map_err(PlanError::Table)?;
        gateways.insert(name, Gateway { node, mark, value, table });
    }
    Ok(gateways)
}
