//! Requests and dumps to the kernel's routing subsystem, with every answer accounted for.

use std::fmt::Display;
use std::io::{self, ErrorKind};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CAPPED, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkBuffer,
    NetlinkMessage, NetlinkPayload, NlaBuffer, NlasIterator,
};
use netlink_packet_route::RouteNetlinkMessage;

use super::socket::Socket;
use crate::error::{KernelError, errno};

const NETLINK_ROUTE: isize = 0;

/// Length of `struct nlmsghdr`.
const HEADER: usize = 16;

/// `NLMSGERR_ATTR_MSG`: the kernel's own words.
const WORDS: u16 = 1;

/// How often a dump is read that changes while it is read.
const TRIES: usize = 5;

/// A socket to the routing subsystem of one network namespace.
#[derive(Debug)]
pub(crate) struct RouteSocket {
    socket: Socket,
}

/// How an exchange ended that was not refused.
enum End {
    Whole,
    /// Objects came or went meanwhile, or answers were lost.
    Torn,
}

impl RouteSocket {
    /// Opens a socket in the network namespace of the calling thread.
    pub(crate) fn open() -> Result<Self, KernelError> {
        let what = "open a routing socket";
        let socket = Socket::open(NETLINK_ROUTE).map_err(|error| KernelError::io(what, &error))?;
        // Without it the kernel ignores the filters of a dump and sends everything.
        socket.set_strict().map_err(|error| KernelError::io(what, &error))?;
        Ok(Self { socket })
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
                    found.extend(pick(message))
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
        let mut message = NetlinkMessage::from(message);
        message.header.flags = flags;
        message.header.sequence_number = sequence;
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.send(&bytes).map_err(|error| KernelError::io(what, &error))?;
        let mut end = End::Whole;
        let mut unread = None;
        loop {
            let bytes = match self.socket.receive() {
                Ok(bytes) => bytes,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) if error.raw_os_error() == Some(errno::ENOBUFS) => {
                    end = End::Torn;
                    continue;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    return match end {
                        End::Torn => Ok(end),
                        End::Whole => Err(KernelError::answer(what, "the kernel did not answer")),
                    };
                }
                Err(error) => return Err(KernelError::io(what, &error)),
            };
            for message in messages(bytes) {
                let header = NetlinkBuffer::new(message);
                // Left over from an exchange that failed half-way.
                if header.sequence_number() != sequence || header.port_number() != port {
                    continue;
                }
                if header.flags() & NLM_F_DUMP_INTR != 0 {
                    end = End::Torn;
                }
                let capped = header.flags() & NLM_F_CAPPED != 0;
                match NetlinkMessage::<RouteNetlinkMessage>::deserialize(message)
                    .map(|message| message.payload)
                {
                    Ok(NetlinkPayload::InnerMessage(inner)) => each(inner),
                    Ok(NetlinkPayload::Error(error)) => {
                        let attributes = after_request(&error.header, capped);
                        return finish(what, error.raw_code(), attributes, end, unread);
                    }
                    Ok(NetlinkPayload::Done(done)) => {
                        return finish(what, done.code, &done.extended_ack, end, unread);
                    }
                    Ok(NetlinkPayload::Overrun(_)) => end = End::Torn,
                    Ok(_) => {}
                    // Read on to the end: a dump that is left half-way makes the next one fail
                    // with EBUSY.
                    Err(_) => {
                        unread = Some(KernelError::answer(
                            what,
                            "the kernel's answer has an attribute of an unknown form",
                        ));
                    }
                }
            }
        }
    }

    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        loop {
            match self.socket.send(bytes) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                done => return done,
            }
        }
    }
}

/// The messages of a datagram; stops at the first whose length is impossible.
fn messages(mut rest: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        let length = NetlinkBuffer::new_checked(rest).ok()?.length() as usize;
        let message = rest.get(..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(message)
    })
}

/// The attributes of an acknowledgement, which stand behind the copy of the request.
fn after_request(copy: &[u8], capped: bool) -> &[u8] {
    let length = match NetlinkBuffer::new_checked(copy) {
        Ok(request) if !capped => request.length() as usize,
        _ => HEADER,
    };
    copy.get(length.next_multiple_of(4)..).unwrap_or_default()
}

fn finish(
    what: &dyn Display,
    code: i32,
    attributes: &[u8],
    end: End,
    unread: Option<KernelError>,
) -> Result<End, KernelError> {
    if code < 0 {
        return Err(KernelError::refused(what, code.saturating_neg()).with_words(words(attributes)));
    }
    match (end, unread) {
        (End::Whole, Some(unread)) => Err(unread),
        (end, _) => Ok(end),
    }
}

/// The kernel's own words among the attributes of an extended acknowledgement.
fn words(attributes: &[u8]) -> Option<String> {
    NlasIterator::new(attributes)
        .map_while(Result::ok)
        .find(|attribute: &NlaBuffer<&[u8]>| attribute.kind() == WORDS)
        .map(|attribute| {
            String::from_utf8_lossy(attribute.value()).trim_end_matches('\0').to_owned()
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_stand_behind_the_header_or_the_whole_request() {
        let text = b"\x0a\x00\x01\x00oh no\x00\x00\x00";
        let mut request = vec![0; 24];
        request[0] = 24;
        let capped = [&request[..16], text].concat();
        let whole = [&request[..], text].concat();
        let expected = Some("oh no".to_owned());
        assert_eq!(words(after_request(&capped, true)), expected);
        assert_eq!(words(after_request(&whole, false)), expected);
    }

    #[test]
    fn garbage_is_no_message_and_has_no_words() {
        for length in 0..40 {
            for byte in [0, 1, 15, 16, 17, 0x7f, 0xff] {
                let bytes = vec![byte; length];
                for capped in [true, false] {
                    let _ = words(after_request(&bytes, capped));
                }
                assert!(messages(&bytes).count() <= 2);
            }
        }
    }
}
