//! Rtnetlink requests and dumps, with every reply checked.

use std::fmt::Display;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkDeserializable, NetlinkHeader, NetlinkMessage,
};
use netlink_packet_route::RouteNetlinkMessage;

use super::ahead::OurRules;
use super::announce::Announcer;
use super::ipv6::Settings;
use crate::diff::op::Op;
use crate::error::{KernelError, errno};
use crate::kernel::netlink::exchange::{self, AT_ONCE, Answered};
use crate::kernel::netlink::message::{Malformed, Message, Writer};
use crate::kernel::netlink::socket::{NETLINK_ROUTE, Socket};
use crate::types::Family;

/// Request that changes an object; `flags` come in addition to `NLM_F_REQUEST` and `NLM_F_ACK`.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) message: RouteNetlinkMessage,
    pub(crate) flags: u16,
}

/// Operations of one request each, in one datagram.
#[derive(Debug, Default)]
pub(crate) struct Run<'a> {
    datagram: Vec<u8>,
    places: Vec<usize>,
    requests: Vec<(u32, &'a Op)>,
}

impl<'a> Run<'a> {
    /// Appends the request of an operation, with the operation's index and a sequence number.
    pub(crate) fn push(&mut self, place: usize, op: &'a Op, request: Request, sequence: u32) {
        let flags = NLM_F_REQUEST | NLM_F_ACK | request.flags;
        append(&mut self.datagram, request.message, flags, sequence);
        self.places.push(place);
        self.requests.push((sequence, op));
    }

    pub(crate) fn is_full(&self) -> bool {
        self.requests.len() >= AT_ONCE
    }
}

/// Rtnetlink socket of one network namespace.
#[derive(Debug)]
pub(crate) struct RouteSocket {
    socket: Socket,
    settings: Settings,
    device: Arc<AtomicU32>,
    our_rules: OurRules,
    announcer: Announcer,
}

impl RouteSocket {
    /// Opens a socket in the network namespace of the calling thread.
    pub(crate) fn open() -> Result<Self, KernelError> {
        let what = "open a routing socket";
        let socket = Socket::open(NETLINK_ROUTE).map_err(|error| KernelError::io(what, &error))?;
        // Without strict checking the kernel ignores the filters of a dump and sends everything.
        socket.set_strict().map_err(|error| KernelError::io(what, &error))?;
        let (device, our_rules) = (Arc::default(), OurRules::default());
        let settings = Settings::of_thread();
        Ok(Self { socket, settings, device, our_rules, announcer: Announcer::open() })
    }

    /// Whether the calling thread is in the socket's network namespace.
    pub(crate) fn is_of_thread(&self) -> bool {
        self.settings.are_of_thread()
    }

    /// IPv6 settings of the socket's network namespace.
    pub(super) const fn settings(&self) -> Settings {
        self.settings
    }

    /// Last known index of our device; 0 for none.
    ///
    /// The kernel never reuses an index.
    pub(crate) fn device_index(&self) -> Arc<AtomicU32> {
        Arc::clone(&self.device)
    }

    /// Sender of gratuitous ARP and unsolicited neighbour advertisements.
    pub(super) const fn announcer(&self) -> &Announcer {
        &self.announcer
    }

    /// Priority and marks of our rules.
    pub(crate) const fn our_rules(&self) -> &OurRules {
        &self.our_rules
    }

    /// Records the index of our device.
    pub(super) fn found(&self, index: u32) {
        self.device.store(index, Ordering::Relaxed);
    }

    /// Port id of the socket, which notifications of its changes carry.
    pub(crate) fn port(&self) -> u32 {
        self.socket.port()
    }

    #[cfg(feature = "testing")]
    pub(crate) fn socket(&mut self) -> &mut Socket {
        &mut self.socket
    }

    /// Next sequence number.
    pub(crate) fn next_sequence(&mut self) -> u32 {
        self.socket.next_sequence()
    }

    /// Sends one request that changes an object.
    ///
    /// `flags` come in addition to `NLM_F_REQUEST` and `NLM_F_ACK`.
    pub(crate) fn request(
        &mut self,
        what: &dyn Display,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> Result<(), KernelError> {
        let flags = NLM_F_REQUEST | NLM_F_ACK | flags;
        self.ask(what, message, flags, &mut |_| {}).map(drop)
    }

    /// Reads one object.
    pub(crate) fn get(
        &mut self,
        what: &dyn Display,
        message: RouteNetlinkMessage,
    ) -> Result<RouteNetlinkMessage, KernelError> {
        let mut answer = None;
        self.ask(what, message, NLM_F_REQUEST | NLM_F_ACK, &mut |message| {
            answer.get_or_insert(message);
        })?;
        answer.ok_or_else(|| KernelError::answer(what, "the answer was empty"))
    }

    /// Dumps all objects of a kind and returns the results of `select_policy`.
    ///
    /// A routing table that does not exist is empty.
    pub(crate) fn dump<T>(
        &mut self,
        what: &dyn Display,
        message: &RouteNetlinkMessage,
        mut pick: impl FnMut(RouteNetlinkMessage) -> Option<T>,
    ) -> Result<Vec<T>, KernelError> {
        let found = exchange::in_one_piece(|| {
            let mut found = Vec::new();
            let mut each = |message| found.extend(pick(message));
            let flags = NLM_F_REQUEST | NLM_F_DUMP;
            let answered = self.ask(what, message.clone(), flags, &mut each)?;
            Ok((found, answered))
        });
        match found {
            Ok(Some(found)) => Ok(found),
            Ok(None) => Err(KernelError::refused(what, errno::EAGAIN)
                .with_words(Some("the objects changed while they were read".to_owned()))),
            Err(error) if error.errno() == Some(errno::ENOENT) => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }

    fn ask(
        &mut self,
        what: &dyn Display,
        message: RouteNetlinkMessage,
        flags: u16,
        each: &mut dyn FnMut(RouteNetlinkMessage),
    ) -> Result<Answered, KernelError> {
        let sequence = self.socket.next_sequence();
        let mut datagram = Vec::new();
        append(&mut datagram, message, flags, sequence);
        let mut take = |message: &Message<'_>| object(message).map(&mut *each);
        exchange::ask(&mut self.socket, what, &datagram, (sequence, flags), &mut take)
    }

    /// Dumps messages of a type that `RouteNetlinkMessage` may not know.
    pub(crate) fn list(
        &mut self,
        what: &dyn Display,
        kind: u16,
        header: &[u8],
        take: &mut dyn FnMut(&Message<'_>) -> Result<(), Malformed>,
    ) -> Result<Answered, KernelError> {
        let sequence = self.socket.next_sequence();
        let flags = NLM_F_REQUEST | NLM_F_DUMP;
        let mut writer = Writer::default();
        let message = writer.message(kind, flags, sequence);
        writer.raw(header);
        writer.end(message);
        let datagram = writer.finish().unwrap_or_default();
        exchange::ask(&mut self.socket, what, &datagram, (sequence, flags), take)
    }

    /// Sends the collected requests; returns those that were refused or not acknowledged, by index.
    pub(crate) fn request_all<'a>(&mut self, run: &Run<'a>) -> Vec<(usize, &'a Op, KernelError)> {
        let refused = exchange::request_all(&mut self.socket, &run.datagram, &run.requests);
        let of = |index: usize| Some((*run.places.get(index)?, run.requests.get(index)?.1));
        let named = |(index, error)| of(index).map(|(place, op)| (place, op, error));
        refused.into_iter().filter_map(named).collect()
    }
}

/// Parses the object in a message.
pub(crate) fn object(message: &Message<'_>) -> Result<RouteNetlinkMessage, Malformed> {
    let mut header = NetlinkHeader::default();
    header.message_type = message.kind;
    RouteNetlinkMessage::deserialize(&header, message.payload())
        .map_err(|_| Malformed("the kernel's answer has an attribute of an unknown form"))
}

/// Turns the error of a kernel without IPv6 into an empty list.
pub(crate) fn unless_absent<T>(
    family: Family,
    found: Result<Vec<T>, KernelError>,
) -> Result<Vec<T>, KernelError> {
    match found {
        Err(error)
            if family == Family::V6
                && matches!(error.errno(), Some(errno::EAFNOSUPPORT | errno::EOPNOTSUPP)) =>
        {
            Ok(Vec::new())
        }
        found => found,
    }
}

/// Appends a message to a datagram, at the alignment of the next message.
fn append(datagram: &mut Vec<u8>, message: RouteNetlinkMessage, flags: u16, sequence: u32) {
    let mut message = NetlinkMessage::from(message);
    message.header.flags = flags;
    message.header.sequence_number = sequence;
    message.finalize();
    let begin = datagram.len().next_multiple_of(4);
    datagram.resize(begin + message.buffer_len(), 0);
    if let Some(rest) = datagram.get_mut(begin..) {
        message.serialize(rest);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::netlink::message::Messages;

    #[test]
    fn object_with_an_attribute_of_another_form_is_malformed() {
        // A priority attribute of one byte.
        let odd = [&[2, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0][..], &[5, 0, 6, 0, 1, 0, 0, 0]].concat();
        for (body, is_malformed) in [(&odd[..12], false), (&odd[..], true)] {
            let mut writer = Writer::default();
            let message = writer.message(32, 0, 1);
            writer.raw(body);
            writer.end(message);
            let bytes = writer.finish().unwrap();
            let message = Messages::new(&bytes).next().unwrap().unwrap();
            assert_eq!(object(&message).is_err(), is_malformed);
        }
    }
}
