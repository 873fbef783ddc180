//! The same datapath in iptables: chains with the names of its ancestors, and sets.

use std::collections::BTreeMap;

use super::check::{Checked, World};
use super::classes::Classes;
use super::firewall::overlaps;
use super::{Finding, Gateway, PlanError};
use crate::cluster::Iptables;
use crate::state::{Ipset, IpsetContents, Xtables};
use crate::types::{Family, NodeName};

mod rules;
mod sets;

use rules::Rules;
use sets::Sets;

/// What iptables cannot say: in the name of a device `+` is a wildcard, and some other characters
/// are nobody's.
pub(super) fn check(world: &World<'_>) -> Result<(), PlanError> {
    let device = &world.cluster.tunnel.device;
    let good = |c: char| c.is_ascii_alphanumeric() || "._-@".contains(c);
    if device.as_str().chars().all(good) {
        return Ok(());
    }
    Err(PlanError::IptablesDevice { device: device.clone() })
}

/// The sets and chains of this node.
pub(super) fn xtables(
    world: &World<'_>,
    policies: &[Checked<'_>],
    gateways: &BTreeMap<&NodeName, Gateway<'_>>,
    iptables: Iptables,
    findings: &mut Vec<Finding>,
) -> (BTreeMap<Ipset, IpsetContents>, Xtables) {
    let (mut contents, mut tables) = (BTreeMap::new(), Xtables::default());
    let names = sets::names(policies);
    for family in Family::BOTH {
        let of = |net: &ipnet::IpNet| Family::of_net(net) == family;
        let classes = Classes::new(policies, family);
        overlaps(&classes, policies, family, findings);
        let selects = policies.iter().any(|policy| policy.sources.iter().any(of));
        if !selects && !world.here.tunnel.iter().any(of) {
            continue;
        }
        let sets = Sets { world, policies, gateways, names: &names, family, classes: &classes };
        contents.extend(sets.contents());
        Rules { sets: &sets, iptables }.add_to(&mut tables);
    }
    (contents, tables)
}
