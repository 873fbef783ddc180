//! Whether the kernel still holds what was read from it and written to it last.

#[cfg(test)]
mod tests;

use super::{Shared, Watch, lock};
use crate::datapath::Drift;
use crate::event::Part;
use crate::kernel::netlink::socket::Socket;
use crate::kernel::nft;
use crate::kernel::nft::Between;

/// Ears of the datapath's own, and what is certain by them.
///
/// The kernel is asked one thing, which generation its rules have, and tells the rest: whatever
/// changes a device, an address, a neighbour, a route or a rule puts a message into our socket
/// before its system call returns, or an error if there is no room. So silence is proof. What one
/// of our own requests brings about and the kernel tells in nobody's name is taken for a change by
/// others: it costs a look at the routing part, not a wrong belief.
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
    /// Whether nothing is heard of the rules for the time of a transaction.
    is_deaf: bool,
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
            is_deaf: false,
        }
    }

    /// Everything is about to be read: what happened before does not matter.
    ///
    /// Where listening is not allowed nothing is ever certain.
    pub(crate) fn begin(&mut self, index: u32) {
        self.end();
        if self.watch.is_none() {
            let [routing, netfilter] = self.ports;
            self.watch = self.shared.watch(routing, netfilter).ok();
        }
        self.listen(index);
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
    /// If anybody on the machine listens (`netlink_has_listeners`), the kernel writes a message
    /// about every element that changes, and only then asks the filter that drops it: that is half
    /// of what a large change costs it. So for the time of one we do not listen; the generations on
    /// either side of it tell whether something was missed.
    pub(crate) fn will_commit(&mut self, operations: usize, index: u32) {
        self.is_deaf = operations >= LARGE;
        if self.is_deaf {
            self.shared.deafen();
            self.others.deafen();
            // Also the beginning of what is being told just now, for its end is not heard.
            self.listen(index);
        }
    }

    /// It was made between these generations; nothing if it was not, or they are not known.
    pub(crate) fn committed(&mut self, netfilter: &mut Socket, between: Option<Between>) {
        let known = between.filter(|between| self.generation == Some(between.before));
        self.generation = known.map(|between| between.after);
        if !std::mem::take(&mut self.is_deaf) {
            return;
        }
        let (ours, others) = (self.shared.hear_again(), self.others.hear_again());
        // What others have done since is heard of from here on, but not what they did before.
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

    /// What may have changed; `index` is that of our device.
    pub(crate) fn drift(&mut self, netfilter: &mut Socket, index: u32) -> Drift {
        self.listen(index);
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
        // Its messages are in the socket before the transaction is over, but the generation may be
        // read before they are: only one whose end was heard is known to be none of ours.
        self.generation = Some(current);
        self.watch.as_ref().and_then(Watch::heard) == Some(current)
    }

    /// Takes in what the kernel has told.
    fn listen(&mut self, index: u32) {
        let Some(watch) = &mut self.watch else { return self.end() };
        lock(&self.shared.expected).found(index);
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
