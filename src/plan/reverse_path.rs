//! The reverse path of packets, which filters look up: from the tunnel back into it.

use ipnet::IpNet;

use super::egress_hook::next_hop;
use super::validate::ValidatedCluster;
use super::{Gateways, PlanError, table_for};
use crate::alloc::{AllocError, TableAllocator};
use crate::cluster::{Replies, RulePriorities, Steering};
use crate::state::{MarkBits, Route, RouteKey, Rule, RuleAction, State};
use crate::types::{DeviceName, Family, Mark, NodeName, TableId};

/// Returns the name under which a node holds the table of the reverse path.
///
/// No node can have it (RFC 6761 section 6.4).
pub(crate) fn reverse_path() -> NodeName {
    NodeName::known("reverse-path.invalid")
}

/// Returns the table that leads from the tunnel back into it; `None` if none is left.
pub(super) fn reverse_table(
    world: &ValidatedCluster,
    gateways: &Gateways,
    tables: &mut dyn TableAllocator,
) -> Result<Option<TableId>, PlanError> {
    if world.cluster.replies == Replies::Direct {
        return Ok(None);
    }
    let here = &world.cluster.node;
    let shared = world.cluster.steering == Steering::EgressHook;
    // Gateways that share the table of this node need none of those that they had before.
    let idle = |node: &NodeName| node != here && (shared || !gateways.contains_key(node));
    match table_for(&reverse_path(), world, idle, tables) {
        Ok(table) => Ok(Some(table)),
        Err(AllocError::Exhausted { .. }) => Ok(None),
        Err(error) => Err(PlanError::Table(error)),
    }
}

/// Adds the rules and the route by which the reverse path of each packet is the way it came.
///
/// A packet from the tunnel has the mark of packets to translate, with the value of another node:
/// the filter of the kernel (`rp_filter`, with `src_valid_mark`) and those of firewalls (`fib saddr .
/// mark . iif oif`, `rpfilter --validmark`) look up the reverse path by it, and find the tunnel.
/// Otherwise they would need a route to the server on the node of the pod, and one to the pod by the
/// tunnel on the gateway. The reverse path of packets that enter the tunnel, with the mark of a node,
/// is that of the host.
pub(super) fn reverse_rules(
    world: &ValidatedCluster,
    table: Option<TableId>,
    own: MarkBits,
    family: Family,
    state: &mut State,
) {
    let layout = world.cluster.marks;
    let priorities = RulePriorities::of(&world.cluster);
    let rule = |priority, MarkBits { mask, value }, action| Rule {
        family,
        priority,
        mark: Mark::new(value),
        mask,
        inverted: false,
        input: None,
        action,
    };
    let prefix = MarkBits { mask: layout.prefix_mask(), value: layout.prefix() };
    let end = RuleAction::Goto(priorities.end);
    // No packet has that mark, which is set with iptables only, for packets to be dropped.
    let closed = MarkBits { mask: layout.prefix_mask(), value: layout.closed().get() };
    state.rules.insert(rule(priorities.end, closed, RuleAction::Unreachable));
    let device = world.cluster.tunnel.device.clone();
    for half in [0, layout.half()] {
        // Other bits than those of the rules without replies by the tunnel: these must exist when
        // those are deleted, and the kernel would take one for the other.
        let MarkBits { mask, value } = prefix;
        let bits = MarkBits { mask: mask | layout.half(), value: value | half };
        for device in [DeviceName::known(Rule::LOOPBACK), device.clone()] {
            let of_node = rule(priorities.guard, bits, end);
            state.rules.insert(Rule { input: Some(device), ..of_node });
        }
    }
    let Some(table) = table else { return };
    let of_tunnel = layout.connection();
    // The packet itself, which arrives by the tunnel, and packets of this node's own pods.
    let itself = rule(priorities.guard, of_tunnel, end);
    state.rules.insert(Rule { input: Some(device), ..itself });
    let own = MarkBits { mask: of_tunnel.mask | own.mask, value: of_tunnel.value | own.value };
    state.rules.insert(rule(priorities.gateways, own, end));
    state.rules.insert(rule(priorities.half, of_tunnel, RuleAction::Lookup(table)));
    let dst = IpNet::new_assert(family.unspecified(), 0);
    let key = RouteKey { table, dst, metric: RouteKey::default_metric(family) };
    // Only the interface matters.
    state.routes.insert(key, Route::Via(next_hop(family)));
}
