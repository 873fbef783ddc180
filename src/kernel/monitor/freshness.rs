//! Whether the kernel still holds what was read from it and written to it last.

#[cfg(test)]
mod tests;

use super::{Shared, Watch};
use crate::datapath::Drift;
use crate::event::Part;
use crate::kernel::netlink::socket::Socket;
use crate::kernel::nft;
use crate::kernel::nft::Between;

/// A watch of the datapath's own, and what is certain by it.
///
/// The kernel is asked one thing, which generation its rules have, and notifies of the rest:
/// whatever changes a device, an address, a neighbour, a route or a rule puts a notification into
/// our socket before its system call returns, or an error if there is no room. So nothing to read is
/// proof that nothing changed. A change of our own whose notification carries no port is taken for
/// one by others: it costs a read of the routing part.
#[derive(Debug)]
pub(crate) struct Trust {
    shared: Shared,
    /// Those of the caller's watch.
    others: Shared,
    ports: [u32; 2],
    watch: Option<Watch>,
    /// Generation of the rules at which our table was known.
    generation: Option<u32>,
    /// Whether everything else is known.
    routing: bool,
    /// Whether the watches are out of the group of nf_tables for the time of a transaction.
    is_paused: bool,
}

/// Operations that make a transaction a large one: what it saves is a millisecond then, a hundred
/// times what it costs.
const LARGE: usize = 1_000;

impl Trust {
    /// Trusts nothing until the kernel is read; the ports are those of our own writes.
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

    /// Everything is about to be read: what happened before does not matter.
    ///
    /// Where a watch is not allowed nothing is ever certain.
    pub(crate) fn begin(&mut self) {
        self.end();
        if self.watch.is_none() {
            let [routing, netfilter] = self.ports;
            self.watch = self.shared.watch(routing, netfilter).ok();
        }
        self.take_in();
        (self.generation, self.routing) = (None, false);
    }

    /// Our table was read at this generation.
    pub(crate) const fn table_known(&mut self, generation: u32) {
        self.generation = Some(generation);
    }

    /// The rest was read.
    pub(crate) const fn routing_known(&mut self) {
        self.routing = true;
    }

    /// A transaction of ours of this many operations is about to be made.
    ///
    /// If any socket is in the group (`netlink_has_listeners`), the kernel writes a notification of
    /// every element that changes, and only then asks the filter that drops it: that is half of what
    /// a large change costs it. So for the time of one we leave the group; the generations on either
    /// side of it tell whether something was missed.
    pub(crate) fn will_commit(&mut self, operations: usize) {
        self.is_paused = operations >= LARGE;
        if self.is_paused {
            self.shared.pause();
            self.others.pause();
            // Also the beginning of a transaction whose end is not received.
            self.take_in();
        }
    }

    /// It was made between these generations; nothing if it was not, or they are not known.
    pub(crate) fn committed(&mut self, netfilter: &mut Socket, between: Option<Between>) {
        let known = between.filter(|between| self.generation == Some(between.before));
        self.generation = known.map(|between| between.after);
        if !std::mem::take(&mut self.is_paused) {
            return;
        }
        let (ours, others) = (self.shared.resume(), self.others.resume());
        // There are notifications of what others do from here on, but not of what they did before.
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

    /// Nothing is certain any more.
    pub(crate) const fn end(&mut self) {
        (self.generation, self.routing) = (None, false);
    }

    /// What may have changed.
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

    /// Whether the rules have the generation at which our table was known, or one that only
    /// others' tables have brought about since.
    fn is_current(&mut self, netfilter: &mut Socket) -> bool {
        let Ok(current) = nft::generation(netfilter) else { return false };
        if self.generation == Some(current) {
            return true;
        }
        // Its notifications are in the socket before the transaction is over, but the generation may
        // be read before they are: only one whose end was read is known to be none of ours.
        self.generation = Some(current);
        self.watch.as_ref().and_then(Watch::generation) == Some(current)
    }

    /// Takes in the notifications that have arrived.
    fn take_in(&mut self) {
        let Some(watch) = &mut self.watch else { return self.end() };
        let Ok(news) = watch.drain() else {
            self.watch = None;
            return self.end();
        };
        if news.lost {
            return self.end();
        }
        if watch.is_amid_change() || news.changed.contains(&Part::Firewall) {
            self.generation = None;
        }
        self.routing &= !news.changed.iter().any(|part| *part != Part::Firewall);
    }
}
