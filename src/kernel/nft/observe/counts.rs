//! Reads the policies' counters.

#[cfg(test)]
mod tests;

use std::time::Duration;

use super::{LONGEST_PAUSE, Reader, each_element, steady};
use crate::count::{Count, Counts};
use crate::error::{KernelError, errno};
use crate::kernel::netlink::message::{Attributes, Malformed};
use crate::kernel::netlink::socket::Socket;
use crate::kernel::nft::element;
use crate::state::{Firewall, Key, Set, TableFamily};

/// Counters of our table; empty if there is no table.
///
/// All counters are dumped at one ruleset generation, but not at one time: packets are counted
/// meanwhile.
#[expect(clippy::redundant_closure_for_method_calls, reason = "a path has no lifetime of its own")]
pub(crate) fn counts(socket: &mut Socket) -> Result<Counts, KernelError> {
    steady(socket, TableFamily::Inet, None, |reader| reader.counts()).map(|(counts, _)| counts)
}

impl Reader<'_> {
    fn counts(&mut self) -> Result<Counts, KernelError> {
        let sets = match self.sets(&mut Firewall::default()) {
            Err(error) if error.errno() == Some(errno::ENOENT) => return Ok(Counts::new()),
            other => other?,
        };
        let mut counts = Counts::new();
        for (set, least) in sets.into_iter().filter(|(set, _)| set.is_counting()) {
            counts.extend(self.counts_of(set, least)?);
        }
        Ok(counts)
    }

    /// Counters of a set that has at least `least` of them.
    fn counts_of(&mut self, set: Set, least: usize) -> Result<Counts, KernelError> {
        let mut pause = Duration::from_millis(1);
        while pause < LONGEST_PAUSE {
            let mut counts = Counts::new();
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
fn add_counts(attributes: Attributes<'_>, set: Set, counts: &mut Counts) -> Result<(), Malformed> {
    each_element(attributes, |found| {
        let counter: Option<(Key, Count)> = element::read_count(found, set)?;
        if let Some((Key::Count(family, policy), count)) = counter {
            counts.insert((family, policy), count);
        }
        Ok(())
    })
}
