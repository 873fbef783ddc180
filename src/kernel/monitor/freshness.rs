//! Tracks whether the kernel still holds the last state read or written.

#[cfg(test)]
mod tests;

use super::{Shared, Watch};
use crate::datapath::Drift;
use crate::event::Component;
use crate::kernel::netlink::socket::Socket;
use crate::kernel::nft;
use crate::kernel::nft::Between;

/// State of the datapath's own watch: whether the nf_tables table and the routing part are current.
///
/// The kernel is asked for the ruleset generation only, and sends notifications of everything else:
/// a change of an interface, address, neighbour, route or rule puts a notification into the socket
/// before the system call that made it returns, or an error if the receive buffer is full. So an
/// empty socket proves that nothing changed. A change by the datapath whose notification carries no
/// port counts as one by another program: it costs a read of the routing part.
#[derive(Debug)]
pub(crate) struct Freshness {
    shared: Shared,
    /// Sockets of the caller's watch.
    others: Shared,
    ports: [u32; 2],
    watch: Option<Watch>,
    /// Ruleset generation at which our table was known.
    generation: Option<u32>,
    /// Whether the routing part is known.
    routing: bool,
    /// Whether the watches have left the nf_tables multicast group during a transaction.
    is_paused: bool,
}

/// Number of operations from which a transaction is large.
///
/// Leaving the multicast group then saves a millisecond, a hundred times what it costs.
const LARGE: usize = 1_000;

impl Freshness {
    /// Starts with nothing known; the ports are those of the datapath's writing sockets.
    pub(crate) const fn new(shared: Shared, others: Shared, ports: [u32; 2]) -> Self {
        Self {
            shared,
            others,
            ports,
            watch: None,
            generation: None,
            routing: false,
            is_paused: false,
        }
    }

    /// Prepares for a read of the whole state: earlier notifications do not matter.
    ///
    /// Without permission for a watch the state never counts as current.
    pub(crate) fn begin(&mut self) {
        self.end();
        if self.watch.is_none() {
            let [routing, netfilter] = self.ports;
            self.watch = self.shared.watch(routing, netfilter).ok();
        }
        self.take_in();
        (self.generation, self.routing) = (None, false);
    }

    /// Records that our table was read at this generation.
    pub(crate) const fn table_known(&mut self, generation: u32) {
        self.generation = Some(generation);
    }

    /// Records that the routing part was read.
    pub(crate) const fn routing_known(&mut self) {
        self.routing = true;
    }

    /// Prepares for a transaction of this many operations.
    ///
    /// If any socket is in the multicast group (`netlink_has_listeners`), the kernel writes a
    /// notification of every element that changes, and only then runs the socket filter that drops
    /// it: that is half of the cost of a large change. So the watches leave the group during a
    /// large transaction; the generations before and after it show whether a notification was
    /// missed.
    pub(crate) fn will_commit(&mut self, operations: usize) {
        self.is_paused = operations >= LARGE;
        if self.is_paused {
            self.shared.pause();
            self.others.pause();
            // Also reads the start of a transaction whose end is not received.
            self.take_in();
        }
    }

    /// Records a transaction and the generations before and after it.
    ///
    /// `None` if it was not committed, or if the generations are not known.
    pub(crate) fn committed(&mut self, netfilter: &mut Socket, between: Option<Between>) {
        let known = between.filter(|between| self.generation == Some(between.before));
        self.generation = known.map(|between| between.after);
        if !std::mem::take(&mut self.is_paused) {
            return;
        }
        let (ours, others) = (self.shared.resume(), self.others.resume());
        // Transactions by other programs are notified from here on; earlier ones were missed.
        let current = nft::generation(netfilter).ok();
        self.generation = self.generation.filter(|known| current == Some(*known));
        if let Some(watch) = &mut self.watch {
            watch.forget_beginning();
        }
        if self.generation.is_none() || others.is_err() {
            self.others.missed();
        }
        if ours.is_err() {
            self.watch = None;
            self.end();
        }
    }

    /// Forgets everything: the state has to be read again.
    pub(crate) const fn end(&mut self) {
        (self.generation, self.routing) = (None, false);
    }

    /// Parts of the state that may have changed.
    pub(crate) fn drift(&mut self, netfilter: &mut Socket) -> Drift {
        self.take_in();
        let table = self.generation.is_some() && self.is_current(netfilter);
        if !table {
            self.generation = None;
        }
        match (table, self.routing) {
            (true, true) => Drift::None,
            (true, false) => Drift::Rest,
            (false, _) => Drift::Unknown,
        }
    }

    /// Whether the ruleset generation is the one at which our table was known.
    ///
    /// A later generation also counts if only tables of other programs changed since.
    fn is_current(&mut self, netfilter: &mut Socket) -> bool {
        let Ok(current) = nft::generation(netfilter) else { return false };
        if self.generation == Some(current) {
            return true;
        }
        // The notifications are in the socket before the transaction is over, but the generation
        // may be read before they are: only a transaction whose end was read is known not to change
        // our table.
        self.generation = Some(current);
        self.watch.as_ref().and_then(Watch::generation) == Some(current)
    }

    /// Reads the notifications that have arrived.
    fn take_in(&mut self) {
        let Some(watch) = &mut self.watch else { return self.end() };
        let Ok(events) = watch.drain() else {
            self.watch = None;
            return self.end();
        };
        if events.lost {
            return self.end();
        }
        if watch.is_amid_change() || events.changed.contains(&Component::Firewall) {
            self.generation = None;
        }
        self.routing &= !events.changed.iter().any(|part| *part != Component::Firewall);
    }
}
