//! Blocks late replies to terminated connections for a limited time.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::connection::Connection;
use crate::sim::packet::Packet;
use crate::state::Set;

/// The elements of the sets with timeouts.
#[derive(Clone, Debug, Default)]
pub(crate) struct Held {
    now: Duration,
    /// Expiry time of each element.
    elements: BTreeMap<(Set, Packet), Duration>,
}

impl Held {
    /// Blocks replies to a connection; an existing block is not extended.
    pub(crate) fn hold(&mut self, connection: &Connection) {
        let set = connection.blocked_replies();
        let until = self.now + Connection::REPLY_BLOCK_TIME;
        self.elements.entry((set, key(set, &connection.answer()))).or_insert(until);
    }

    /// Whether a set has an element for a packet.
    pub(crate) fn holds(&self, set: Set, packet: &Packet) -> bool {
        let until = self.elements.get(&(set, key(set, packet)));
        until.is_some_and(|until| self.now < *until)
    }

    /// Advances the time, and removes expired elements.
    pub(crate) fn pass(&mut self, time: Duration) {
        self.now += time;
        let now = self.now;
        self.elements.retain(|_, until| now < *until);
    }

    /// Retains only the elements of these sets.
    pub(crate) fn keep(&mut self, sets: impl Fn(Set) -> bool) {
        self.elements.retain(|(set, _), _| sets(*set));
    }
}

/// The fields of a packet that are part of a set's key.
fn key(set: Set, packet: &Packet) -> Packet {
    match set {
        Set::PortlessBlockedReply(_) => Packet { source_port: 0, destination_port: 0, ..*packet },
        _ => *packet,
    }
}
