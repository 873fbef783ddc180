//! Reads the counters of policies and of drop rules.

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::time::Duration;

use super::{LONGEST_PAUSE, Reader, each_element, steady};
use crate::count::{Count, Counts};
use crate::error::{KernelError, errno};
use crate::kernel::netlink::message::{Attributes, Malformed};
use crate::kernel::netlink::socket::Socket;
use crate::kernel::nft::element;
use crate::state::{Firewall, Key, Set, TableFamily, Tag};
use crate::types::Family;

/// Counters of our tables; empty if there is no table.
///
/// All counters are dumped at one ruleset generation, but not at one time: packets are counted
/// meanwhile.
#[expect(clippy::redundant_closure_for_method_calls, reason = "a path has no lifetime of its own")]
pub(crate) fn counts(socket: &mut Socket) -> Result<Counts, KernelError> {
    let mut counts = Counts::new();
    for family in [TableFamily::Inet, TableFamily::Netdev] {
        let (found, _) = steady(socket, family, None, |reader| reader.counts())?;
        counts.policies.extend(found.policies);
        counts.drops.extend(found.drops);
    }
    Ok(counts)
}

/// Counters of policies.
type Policies = BTreeMap<(Family, Tag), Count>;

impl Reader<'_> {
    fn counts(&mut self) -> Result<Counts, KernelError> {
        let sets = match self.sets(&mut Firewall::default()) {
            Err(error) if error.errno() == Some(errno::ENOENT) => return Ok(Counts::new()),
            other => other?,
        };
        let mut counts = Counts::new();
        for (set, least) in sets.into_iter().filter(|(set, _)| set.is_counting()) {
            counts.policies.extend(self.counts_of(set, least)?);
        }
        self.each_rule(|chain, found| {
            if let Some(count) = found.count {
                *counts.drops.entry(chain.to_string()).or_default() += count;
            }
        })?;
        Ok(counts)
    }

    /// Counters of a set that has at least `least` of them.
    fn counts_of(&mut self, set: Set, least: usize) -> Result<Policies, KernelError> {
        let mut pause = Duration::from_millis(1);
        while pause < LONGEST_PAUSE {
            let mut counts = Policies::new();
            self.list_with(set, |attributes| add_counts(attributes, set, &mut counts))?;
            // As with other elements: when the kernel resizes the set meanwhile, some counters are
            // dumped twice and others not at all.
            if counts.len() >= least || self.moved {
                return Ok(counts);
            }
            std::thread::sleep(pause);
            pause *= 2;
        }
        Err(super::torn(TableFamily::Inet, set))
    }
}

/// Adds the counters in one message of a dump.
fn add_counts(
    attributes: Attributes<'_>,
    set: Set,
    counts: &mut Policies,
) -> Result<(), Malformed> {
    each_element(attributes, |found| {
        let counter: Option<(Key, Count)> = element::read_count(found, set)?;
        counts.extend(counter.and_then(|(key, count)| Some((key.counted()?, count))));
        Ok(())
    })
}
