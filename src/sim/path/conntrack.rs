//! Simulated connection tracking, without expiry of connections.

use std::collections::BTreeMap;
use std::net::IpAddr;

use super::reply_block::Held;
use super::skb::Facts;
use crate::connection::Connection;
use crate::sim::packet::Packet;
use crate::state::{Direction, MarkBits};

/// The conntrack table of one network namespace.
#[derive(Clone, Debug, Default)]
pub(crate) struct Conntrack {
    entries: BTreeMap<u32, Entry>,
    /// Entry and direction of each tuple.
    tuples: BTreeMap<Packet, (u32, Direction)>,
    last: u32,
    /// Elements of the sets with timeouts.
    pub(crate) held: Held,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    /// The packet that opened the connection, as received.
    original: Packet,
    /// The reply to that packet, as received.
    reply: Packet,
    mark: u32,
    established: bool,
}

/// The connection of a packet that is being evaluated.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Seen {
    id: Option<u32>,
    entry: Entry,
    direction: Direction,
}

impl Conntrack {
    /// The connection of a received packet; a new one if it has no entry.
    pub(crate) fn see(&mut self, packet: Packet) -> Seen {
        let known = self.tuples.get(&packet).copied();
        let known = known.and_then(|(id, direction)| {
            let entry = self.entries.get_mut(&id)?;
            entry.established |= direction == Direction::Reply;
            Some(Seen { id: Some(id), entry: *entry, direction })
        });
        known.unwrap_or_else(|| {
            let reply = packet.reply();
            let entry = Entry { original: packet, reply, mark: 0, established: false };
            Seen { id: None, entry, direction: Direction::Original }
        })
    }

    /// Confirms a connection whose packet passed; a new connection gets its source translated.
    pub(crate) fn confirm(&mut self, seen: &mut Seen, source: Option<IpAddr>) {
        if seen.id.is_some() {
            return;
        }
        if let Some(source) = source {
            seen.entry.reply.destination = source;
        }
        // Two connections cannot have the same reply tuple: the later one gets another port.
        for _ in 0..=u16::MAX {
            if !self.tuples.contains_key(&seen.entry.reply) {
                break;
            }
            let reply = &mut seen.entry.reply;
            match reply.protocol {
                Packet::ICMP | Packet::ICMP6 => {
                    reply.source_port = reply.source_port.wrapping_add(1);
                }
                _ => reply.destination_port = reply.destination_port.wrapping_add(1).max(1024),
            }
        }
        self.last += 1;
        let id = self.last;
        seen.id = Some(id);
        self.entries.insert(id, seen.entry);
        self.tuples.insert(seen.entry.original, (id, Direction::Original));
        self.tuples.insert(seen.entry.reply, (id, Direction::Reply));
    }

    /// Stores the mark that rules set on a connection with an entry.
    pub(crate) fn note(&mut self, seen: &Seen, mark: u32) {
        if let Some(entry) = seen.id.and_then(|id| self.entries.get_mut(&id)) {
            entry.mark = mark;
        }
    }

    /// All connections.
    pub(crate) fn connections(&self) -> impl Iterator<Item = Connection> {
        self.entries.iter().map(|(id, Entry { original, reply, mark, .. })| Connection {
            protocol: original.protocol,
            source: original.source,
            source_port: original.source_port,
            destination: original.destination,
            destination_port: original.destination_port,
            peer: reply.source,
            reply_source_port: reply.source_port,
            snat_address: reply.destination,
            snat_port: reply.destination_port,
            mark: *mark,
            zone: 0,
            reply_zone: 0,
            id: *id,
        })
    }

    /// Sets bits of a connection's mark; an entry that is already gone is no error.
    pub(crate) fn mark(&mut self, connection: &Connection, bits: MarkBits) {
        if let Some(entry) = self.entries.get_mut(&connection.id) {
            entry.mark = entry.mark & !bits.mask | bits.value;
        }
    }

    /// Deletes a connection; an entry that is already gone is no error.
    pub(crate) fn end(&mut self, connection: &Connection) {
        if let Some(entry) = self.entries.remove(&connection.id) {
            self.tuples.remove(&entry.original);
            self.tuples.remove(&entry.reply);
        }
    }

    /// Deletes all connections.
    pub(crate) fn clear(&mut self) {
        self.entries.clear();
        self.tuples.clear();
    }
}

impl Seen {
    pub(crate) fn facts(&self) -> Facts {
        Facts {
            direction: self.direction,
            established: self.entry.established,
            mark: self.entry.mark,
            translated: self.translated(),
            confirmed: self.id.is_some(),
        }
    }

    fn translated(&self) -> bool {
        self.entry.reply.destination != self.entry.original.source
            || self.entry.reply.reply().source_port != self.entry.original.source_port
    }

    /// Whether the source can still be translated.
    pub(crate) const fn is_untranslated(&self) -> bool {
        self.id.is_none()
    }

    pub(crate) const fn set_mark(&mut self, mark: u32) {
        self.entry.mark = mark;
    }

    /// Reverses the source translation of a reply.
    pub(crate) const fn translate_back(&self, packet: &mut Packet) {
        if let Direction::Reply = self.direction {
            let answer = self.entry.original.reply();
            packet.destination = answer.destination;
            packet.destination_port = answer.destination_port;
            packet.source_port = answer.source_port;
        }
    }

    /// Translates the source of a packet in the original direction.
    pub(crate) const fn translate(&self, packet: &mut Packet) {
        if let Direction::Original = self.direction {
            let asked = self.entry.reply.reply();
            packet.source = asked.source;
            packet.source_port = asked.source_port;
        }
    }
}
