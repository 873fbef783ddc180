//! Plans the iptables backend: chains with the names of its predecessors, and ipsets.

mod classes;
mod rules;
mod sets;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use super::policies::Policies;
use super::validate::ValidatedCluster;
use super::{Gateways, PlanError};
use crate::cluster::{Backend, Iptables};
use crate::state::{Ipset, IpsetContents, Xtables};
use crate::types::Family;

use classes::Classes;
use rules::Rules;
use sets::Sets;

/// Checks the name of the tunnel interface against the limits of iptables.
///
/// In an interface name `+` is a wildcard, and some other characters are allowed by no tool.
pub(super) fn check(world: &ValidatedCluster) -> Result<(), PlanError> {
    let device = &world.cluster.tunnel.device;
    let good = |c: char| c.is_ascii_alphanumeric() || "._-@".contains(c);
    if world.cluster.backend == Backend::Nftables || device.as_str().chars().all(good) {
        return Ok(());
    }
    Err(PlanError::IptablesDevice { device: device.clone() })
}

/// Returns the sets and chains of this node.
pub(super) fn xtables(
    world: &ValidatedCluster,
    policies: &Policies,
    gateways: &Gateways,
    iptables: Iptables,
) -> (BTreeMap<Ipset, IpsetContents>, Xtables) {
    let (mut contents, mut tables) = (BTreeMap::new(), Xtables::default());
    let policies: Vec<_> = policies.ordered().into_iter().map(|(_, kept)| kept).collect();
    let names = sets::names(&policies);
    for family in Family::BOTH {
        let selects = policies.iter().any(|policy| policy.sources.has(family));
        let mut tunnel = world.here.tunnel.iter().map(Family::of_net);
        if !selects && !tunnel.any(|of| of == family) {
            continue;
        }
        let classes = Classes::new(&policies, family);
        let policies = policies.as_slice();
        let sets = Sets { world, policies, gateways, names: &names, family, classes: &classes };
        contents.extend(sets.contents());
        Rules { sets: &sets, iptables }.add_to(&mut tables);
    }
    (contents, tables)
}
