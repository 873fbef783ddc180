//! Checks of flowtables, tc filters and XDP programs, which forward packets ahead of all hooks.

use super::facts::Facts;
use super::{Preflight, Problem};
use crate::cluster::Backend;

impl Preflight<'_> {
    pub(super) fn judge_fast_paths(&self, facts: &Facts, problems: &mut Vec<Problem>) {
        problems.extend(facts.firewall.flowtables.iter().map(|found| Problem::Flowtable {
            table: found.table.clone(),
            name: found.name.clone(),
            devices: found.devices.clone(),
            hardware: found.hardware,
            kept_out: self.cluster.backend == Backend::Nftables,
        }));
        problems.extend(facts.fast_paths.iter().map(|(path, devices)| Problem::FastPath {
            path: *path,
            devices: devices.iter().cloned().collect(),
        }));
    }
}
