//! What the kernel's routing subsystem answers to a request.

use std::fmt::Display;

use netlink_packet_core::{
    NLM_F_CAPPED, NLM_F_DUMP_INTR, NetlinkBuffer, NetlinkMessage, NetlinkPayload, NlaBuffer,
    NlasIterator,
};
use netlink_packet_route::RouteNetlinkMessage;

use crate::error::KernelError;

/// Length of `struct nlmsghdr`.
const HEADER: usize = 16;

/// `NLMSGERR_ATTR_MSG`: the kernel's own words.
const WORDS: u16 = 1;

/// How an exchange ended that was not refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    Whole,
    /// Objects came or went meanwhile, or answers were lost.
    Torn,
}

/// One request and what came back so far.
pub(crate) struct Exchange<'a> {
    what: &'a dyn Display,
    sequence: u32,
    port: u32,
    each: &'a mut dyn FnMut(RouteNetlinkMessage),
    pub(crate) end: End,
    unread: Option<KernelError>,
}

impl<'a> Exchange<'a> {
    /// Of the request with this sequence number from this port; `each` gets the objects.
    pub(crate) fn new(
        what: &'a dyn Display,
        sequence: u32,
        port: u32,
        each: &'a mut dyn FnMut(RouteNetlinkMessage),
    ) -> Self {
        Self { what, sequence, port, each, end: End::Whole, unread: None }
    }

    /// Reads a datagram; `Some` if it holds the end.
    pub(crate) fn read(&mut self, bytes: &[u8]) -> Option<Result<End, KernelError>> {
        for message in messages(bytes) {
            let header = NetlinkBuffer::new(message);
            // Left over from an exchange that failed half-way.
            if (header.sequence_number(), header.port_number()) != (self.sequence, self.port) {
                continue;
            }
            if header.flags() & NLM_F_DUMP_INTR != 0 {
                self.end = End::Torn;
            }
            let capped = header.flags() & NLM_F_CAPPED != 0;
            match NetlinkMessage::deserialize(message).map(|message| message.payload) {
                Ok(NetlinkPayload::InnerMessage(inner)) => (self.each)(inner),
                Ok(NetlinkPayload::Error(error)) => {
                    let attributes = after_request(&error.header, capped);
                    return Some(self.finish(error.raw_code(), attributes));
                }
                Ok(NetlinkPayload::Done(done)) => {
                    return Some(self.finish(done.code, &done.extended_ack));
                }
                Ok(NetlinkPayload::Overrun(_)) => self.end = End::Torn,
                Ok(_) => {}
                // Read on to the end: a dump that is left half-way makes the next one fail
                // with EBUSY.
                Err(_) => {
                    self.unread = Some(KernelError::answer(
                        self.what,
                        "the kernel's answer has an attribute of an unknown form",
                    ));
                }
            }
        }
        None
    }

    fn finish(&mut self, code: i32, attributes: &[u8]) -> Result<End, KernelError> {
        if code < 0 {
            let error = KernelError::refused(self.what, code.saturating_neg());
            return Err(error.with_words(words(attributes)));
        }
        match (self.end, self.unread.take()) {
            (End::Whole, Some(unread)) => Err(unread),
            (end, _) => Ok(end),
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
        let mut request = [0; 24];
        request[0] = 24;
        let capped = [&request[..16], text].concat();
        let whole = [&request[..], text].concat();
        let expected = Some("oh no".to_owned());
        assert_eq!(words(after_request(&capped, true)), expected);
        assert_eq!(words(after_request(&whole, false)), expected);
    }

    const SEQUENCE: u32 = 7;
    const PORT: u32 = 9;
    const DONE: u16 = 3;
    const NEWRULE: u16 = 32;

    fn message(kind: u16, flags: u16, sequence: u32, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(HEADER + payload.len()).unwrap();
        let mut bytes = length.to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend(sequence.to_ne_bytes());
        bytes.extend(PORT.to_ne_bytes());
        bytes.extend(payload);
        bytes
    }

    fn read(datagrams: &[Vec<u8>]) -> (usize, Option<Result<End, KernelError>>) {
        let mut seen = 0;
        let mut each = |_| seen += 1;
        let mut exchange = Exchange::new(&"ip rule show", SEQUENCE, PORT, &mut each);
        let end = datagrams.iter().find_map(|bytes| exchange.read(bytes));
        (seen, end)
    }

    fn rule(flags: u16) -> Vec<u8> {
        message(NEWRULE, flags, SEQUENCE, &[2, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0])
    }

    fn done(code: i32) -> Vec<u8> {
        message(DONE, 0, SEQUENCE, &code.to_ne_bytes())
    }

    #[test]
    fn a_dump_ends_with_its_done_message() {
        assert_eq!(read(&[rule(0), rule(0)]), (2, None));
        let two = [rule(0), rule(0)].concat();
        assert_eq!(read(&[two, done(0)]), (2, Some(Ok(End::Whole))));
    }

    #[test]
    fn a_dump_that_was_interrupted_is_torn() {
        for datagrams in [
            [rule(NLM_F_DUMP_INTR), done(0)],
            [rule(0), message(DONE, NLM_F_DUMP_INTR, SEQUENCE, &[0; 4])],
            [message(4, 0, SEQUENCE, &[0; 4]), done(0)],
        ] {
            assert_eq!(read(&datagrams).1, Some(Ok(End::Torn)));
        }
    }

    #[test]
    fn answers_to_an_earlier_request_are_passed_over() {
        let old = message(DONE, 0, SEQUENCE - 1, &[0; 4]);
        assert_eq!(read(&[old, rule(0), done(0)]), (1, Some(Ok(End::Whole))));
    }

    #[test]
    fn a_dump_can_be_refused_at_its_end() {
        let (_, end) = read(&[rule(0), done(-22)]);
        assert_eq!(end.unwrap().unwrap_err().errno(), Some(22));
    }

    #[test]
    fn an_object_that_cannot_be_read_is_an_error_at_the_end() {
        // An attribute "priority" of one byte.
        let odd = [&[2, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0][..], &[5, 0, 6, 0, 1, 0, 0, 0]].concat();
        let odd = message(NEWRULE, 0, SEQUENCE, &odd);
        let (seen, end) = read(&[odd, rule(0), done(0)]);
        assert_eq!((seen, end.unwrap().unwrap_err().errno()), (1, None));
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
