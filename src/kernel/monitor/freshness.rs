//! Tracks whether the kernel still holds the last state read or written.
//!
//! A change of an interface, address, neighbour, route or rule puts a notification into the socket
//! before the system call that made it returns, or an error if the receive buffer is full. So an
//! empty socket proves that nothing changed. A change by the datapath whose notification carries no
//! port counts as one by another program: it costs a read of the routing part. The nf_tables table
//! is unchanged while the ruleset generation is; with a watch also if notifications of all later
//! transactions were read, and none was about our table.

#[cfg(test)]
mod tests;

use super::listener::{Listener, Part};
use crate::datapath::Drift;
use crate::kernel::nft::Between;

/// Number of operations from which a transaction is large.
///
/// Leaving the multicast group then saves a millisecond, a hundred times what it costs.
const LARGE: usize = 1_000;

impl Listener {
    /// Prepares for a read of the whole state: earlier notifications do not matter.
    ///
    /// Without the multicast groups the routing part never counts as current.
    pub(crate) fn begin(&mut self) {
        let _unknown = self.join_routing();
        if self.is_watched() && !self.rules_joined {
            // After a large transaction the group could not be joined again.
            let _not_joined = self.join_rules();
        }
        let _lost = self.take_in();
        (self.table, self.rest) = (Part::Reading, Part::Unknown);
    }

    /// Prepares for a read of the routing part.
    pub(crate) const fn begin_routing(&mut self) {
        self.rest = Part::Reading;
    }

    /// Records that our table was read at this generation.
    pub(crate) fn table_known(&mut self, generation: u32) {
        if self.table == Part::Reading {
            self.table = Part::Known(generation);
        }
    }

    /// Records that the routing part was read.
    pub(crate) fn routing_known(&mut self) {
        if self.rest == Part::Reading && self.routing_joined {
            self.rest = Part::Known(());
        }
    }

    /// Prepares for a transaction of this many operations.
    ///
    /// The socket leaves the nf_tables group during a large one; the generations before and after
    /// it show whether a notification was missed.
    pub(crate) fn will_commit(&mut self, operations: usize) {
        if operations >= LARGE && self.rules_joined {
            self.leave_rules();
        }
    }

    /// Records a transaction and the generations before and after it.
    ///
    /// `None` if it was not committed, or if the generations are not known. Returns whether the
    /// socket has joined the group again: then [`resumed`](Self::resumed) must be called.
    pub(crate) fn committed(&mut self, between: Option<Between>) -> bool {
        self.table = match between {
            Some(Between { before, after }) if self.table == Part::Known(before) => {
                Part::Known(after)
            }
            _ => Part::Unknown,
        };
        let resumes = self.is_watched() && !self.rules_joined;
        if resumes {
            let _not_joined = self.join_rules();
        }
        resumes
    }

    /// Checks the ruleset generation after the group was joined again.
    ///
    /// Later transactions by other programs are notified; earlier ones were missed.
    pub(crate) fn resumed(&mut self, current: Option<u32>) {
        let is_known = current.is_some_and(|current| self.table == Part::Known(current));
        if !is_known || !self.rules_joined {
            self.lose();
        }
    }

    /// Parts of the state that may have changed, given the ruleset generation just read.
    pub(crate) fn drift(&mut self, current: Option<u32>) -> Drift {
        let _lost = self.take_in();
        if let Part::Known(known) = self.table {
            // The notifications are in the socket before the transaction is over, but the
            // generation may be read before they are: only a transaction whose end was read is
            // known not to have changed our table.
            let is_heard = |current: &u32| *current == known || self.last_end == Some(*current);
            self.table = current.filter(is_heard).map_or(Part::Unknown, Part::Known);
        }
        match (self.table, self.rest) {
            (Part::Known(_), Part::Known(())) => Drift::None,
            (Part::Known(_), _) => Drift::Rest,
            _ => Drift::Unknown,
        }
    }
}
