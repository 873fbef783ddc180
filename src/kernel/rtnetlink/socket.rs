//! Requests and dumps to the kernel's routing subsystem, with every answer accounted for.

use std::fmt::Display;
use std::io;
use std::io::ErrorKind;
use std::sync::{Arc, Mutex, MutexGuard};

use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage};
use netlink_packet_route::RouteNetlinkMessage;

use super::answer::{End, Exchange};
use crate::error::{KernelError, errno};
use crate::kernel::monitor::{Expected, lock};
use crate::kernel::netlink::socket::Socket;

const NETLINK_ROUTE: isize = 0;

/// How often a dump is read that changes while it is read.
const TRIES: usize = 5;

/// A socket to the routing subsystem of one network namespace.
#[derive(Debug)]
pub(crate) struct RouteSocket {
    socket: Socket,
    expected: Arc<Mutex<Expected>>,
}

impl RouteSocket {
    /// Opens a socket in the network namespace of the calling thread.
    pub(crate) fn open() -> Result<Self, KernelError> {
        let what = "open a routing socket";
        let socket = Socket::open(NETLINK_ROUTE).map_err(|error| KernelError::io(what, &error))?;
        // Without it the kernel ignores the filters of a dump and sends everything.
        socket.set_strict().map_err(|error| KernelError::io(what, &error))?;
        Ok(Self { socket, expected: Arc::default() })
    }

    /// What a watch should take for our doing.
    pub(crate) fn expected(&self) -> MutexGuard<'_, Expected> {
        lock(&self.expected)
    }

    /// The same, to be shared with a watch.
    pub(crate) fn share_expected(&self) -> Arc<Mutex<Expected>> {
        Arc::clone(&self.expected)
    }

    /// The port that what this socket changes is attributed to.
    pub(crate) fn port(&self) -> u32 {
        self.socket.port()
    }

    #[cfg(feature = "testing")]
    pub(crate) fn socket(&mut self) -> &mut Socket {
        &mut self.socket
    }

    /// Makes a change; `flags` are those beside "request" and "acknowledge".
    pub(crate) fn request(
        &mut self,
        what: &dyn Display,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> Result<(), KernelError> {
        let flags = NLM_F_REQUEST | NLM_F_ACK | flags;
        match self.exchange(what, message, flags, &mut |_| {})? {
            End::Whole => Ok(()),
            End::Torn => Err(KernelError::refused(what, errno::ENOBUFS)),
        }
    }

    /// Asks for one object.
    pub(crate) fn get(
        &mut self,
        what: &dyn Display,
        message: RouteNetlinkMessage,
    ) -> Result<RouteNetlinkMessage, KernelError> {
        let mut answer = None;
        let end = self.exchange(what, message, NLM_F_REQUEST | NLM_F_ACK, &mut |message| {
            answer.get_or_insert(message);
        })?;
        match (end, answer) {
            (End::Whole, Some(answer)) => Ok(answer),
            (End::Whole, None) => Err(KernelError::answer(what, "the answer was empty")),
            (End::Torn, _) => Err(KernelError::refused(what, errno::ENOBUFS)),
        }
    }

    /// Asks for all objects of a kind and keeps what `pick` makes of them.
    ///
    /// A table that does not exist has none.
    pub(crate) fn dump<T>(
        &mut self,
        what: &dyn Display,
        message: &RouteNetlinkMessage,
        mut pick: impl FnMut(RouteNetlinkMessage) -> Option<T>,
    ) -> Result<Vec<T>, KernelError> {
        for _ in 0..TRIES {
            let mut found = Vec::new();
            let end =
                self.exchange(what, message.clone(), NLM_F_REQUEST | NLM_F_DUMP, &mut |message| {
                    found.extend(pick(message));
                });
            match end {
                Ok(End::Whole) => return Ok(found),
                Ok(End::Torn) => {}
                Err(error) if error.errno() == Some(errno::ENOENT) => return Ok(Vec::new()),
                Err(error) if error.errno() == Some(errno::EINTR) => {}
                Err(error) => return Err(error),
            }
        }
        Err(KernelError::refused(what, errno::EAGAIN)
            .with_words(Some("the objects changed while they were read".to_owned())))
    }

    fn exchange(
        &mut self,
        what: &dyn Display,
        message: RouteNetlinkMessage,
        flags: u16,
        each: &mut dyn FnMut(RouteNetlinkMessage),
    ) -> Result<End, KernelError> {
        let sequence = self.socket.next_sequence();
        let port = self.socket.port();
        let mut bytes = Vec::new();
        append(&mut bytes, message, flags, sequence);
        self.send(&bytes).map_err(|error| KernelError::io(what, &error))?;
        let mut exchange = Exchange::new(what, sequence, port, each);
        loop {
            let bytes = match self.socket.receive() {
                Ok(bytes) => bytes,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) if error.raw_os_error() == Some(errno::ENOBUFS) => {
                    exchange.end = End::Torn;
                    continue;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    return match exchange.end {
                        End::Torn => Ok(End::Torn),
                        End::Whole => Err(KernelError::answer(what, "the kernel did not answer")),
                    };
                }
                Err(error) => return Err(KernelError::io(what, &error)),
            };
            if let Some(end) = exchange.read(bytes) {
                return end;
            }
        }
    }

    /// The next sequence number.
    pub(crate) fn next_sequence(&mut self) -> u32 {
        self.socket.next_sequence()
    }

    /// Receives one datagram; an error of kind `WouldBlock` says there is none.
    pub(crate) fn receive(&mut self) -> io::Result<&[u8]> {
        self.socket.receive()
    }

    pub(crate) fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        loop {
            match self.socket.send(bytes) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                done => return done,
            }
        }
    }
}

/// Appends a message to a datagram, where the kernel looks for the next.
pub(crate) fn append(
    datagram: &mut Vec<u8>,
    message: RouteNetlinkMessage,
    flags: u16,
    sequence: u32,
) {
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
