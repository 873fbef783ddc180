//! Replies by the tunnel: the nodes that get them, and the mark of this node's own connections.

use std::collections::{BTreeMap, BTreeSet};

use super::routing::carries;
use super::validate::ValidatedCluster;
use super::{Gateways, PlanError, mark_for};
use crate::alloc::{AllocError, MarkAllocator};
use crate::cluster::Replies;
use crate::types::{Family, Mark, NodeName};

/// Returns the nodes to which this node sends packets through the tunnel, by their index.
///
/// These are the gateways of its pods. A gateway with replies by the tunnel sends to all nodes.
pub(super) fn receivers(
    used: &BTreeMap<usize, usize>,
    translates: bool,
    world: &ValidatedCluster,
) -> BTreeSet<usize> {
    let mut receivers: BTreeSet<_> = used.keys().copied().collect();
    if translates && world.cluster.replies == Replies::Tunnel {
        let reached = world.peer_places().filter(|place| {
            let peer = world.node(*place);
            Family::BOTH.into_iter().any(|of| peer.is_some_and(|peer| carries(world, peer, of)))
        });
        receivers.extend(reached);
    }
    receivers
}

/// Returns the mark of connections whose initiator is on this node; `None` without such replies.
///
/// It is this node's own, so that no other node has it. If no mark is left, a node loses its mark:
/// rather one that gets replies only than the gateway of a policy.
pub(super) fn own_mark(
    gateways: &mut Gateways,
    used: &BTreeMap<usize, usize>,
    world: &ValidatedCluster,
    marks: &mut dyn MarkAllocator,
) -> Result<Option<Mark>, PlanError> {
    if world.cluster.replies == Replies::Direct {
        return Ok(None);
    }
    let here = &world.cluster.node;
    let all: BTreeSet<_> = gateways.keys().cloned().collect();
    let of_policies = gateways.iter().filter(|(_, found)| used.contains_key(&found.place));
    let of_policies = of_policies.map(|(name, _)| name.clone()).collect();
    for kept in [all, of_policies, BTreeSet::new()] {
        let idle = |node: &NodeName| {
            node != here && !kept.contains(node) && world.given_mark(node).is_none()
        };
        match mark_for(here, world, idle, marks) {
            Ok(mark) => {
                gateways.retain(|_, found| found.mark != mark);
                return Ok(Some(mark));
            }
            Err(AllocError::Exhausted { .. }) => {}
            Err(error) => return Err(PlanError::Mark(error)),
        }
    }
    Ok(None)
}
