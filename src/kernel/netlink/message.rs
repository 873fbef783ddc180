//! Netlink messages and attributes as bytes.
//!
//! The writer cannot produce a wrong length, and the reader cannot read past the end of its input.

mod read;
mod write;

use std::fmt;

pub(crate) use netlink_packet_core::{NLMSG_DONE, NLMSG_ERROR};
pub(crate) use read::{Ack, Attribute, Attributes, Message, Messages};
pub(crate) use write::{Open, Writer};

/// Flags of a netlink message (`NLM_F_*`).
pub(crate) mod flag {
    pub(crate) use netlink_packet_core::{
        NLM_F_ACK as ACK, NLM_F_ACK_TLVS as ACK_TLVS, NLM_F_APPEND as APPEND,
        NLM_F_CAPPED as CAPPED, NLM_F_CREATE as CREATE, NLM_F_DUMP as DUMP,
        NLM_F_DUMP_INTR as DUMP_INTR, NLM_F_EXCL as EXCL, NLM_F_REQUEST as REQUEST,
    };
}

/// Size of `struct nlmsghdr` in bytes.
pub(crate) const HEADER: usize = 16;

/// Description of malformed bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Malformed(pub(crate) &'static str);

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

/// Length rounded up to a multiple of 4, the alignment of all messages and attributes.
const fn align(length: usize) -> usize {
    length.saturating_add(3) & !3
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Reads all nested attributes, and returns their number.
    fn walk(bytes: &[u8], depth: usize) -> usize {
        let mut count = 0;
        for attribute in Attributes::new(bytes).flatten() {
            count += 1;
            let _ = (attribute.be32(), attribute.u32(), attribute.be64(), attribute.text());
            if depth < 8 {
                count += walk(attribute.bytes(), depth + 1);
            }
        }
        count
    }

    fn walk_messages(bytes: &[u8]) -> usize {
        Messages::new(bytes)
            .flatten()
            .map(|message| {
                let _ = Ack::read(&message);
                let _ = message.nfgen();
                1 + walk(message.payload(), 0)
            })
            .sum()
    }

    fn sample() -> Vec<u8> {
        let mut writer = Writer::default();
        for sequence in 1..4 {
            let message = writer.message(0x0a06, flag::REQUEST, sequence);
            writer.nfgen(1, 0);
            writer.string(1, "table");
            writer.nest(4, |writer| {
                writer.nest(1, |writer| writer.be32(2, 0x0102_0304));
                writer.attribute(3, &[7]);
            });
            writer.end(message);
        }
        writer.finish().unwrap()
    }

    #[test]
    fn what_is_written_reads_back() {
        let bytes = sample();
        let messages: Vec<_> = Messages::new(&bytes).map(Result::unwrap).collect();
        assert_eq!(messages.len(), 3);
        let message = &messages[2];
        assert_eq!((message.kind, message.sequence), (0x0a06, 3));
        let (resource, body) = message.nfgen().unwrap();
        assert_eq!(resource, 0);
        let attributes: Vec<_> = Attributes::new(body).map(Result::unwrap).collect();
        assert_eq!(attributes[0].text(), Ok("table"));
        let nested: Vec<_> = attributes[1].nested().map(Result::unwrap).collect();
        let deep = nested[0].nested().next().unwrap().unwrap();
        assert_eq!((deep.kind, deep.be32()), (2, Ok(0x0102_0304)));
        assert_eq!(nested[1].bytes(), [7]);
    }

    #[test]
    fn a_length_that_does_not_fit_is_refused() {
        let mut writer = Writer::default();
        writer.attribute(1, &vec![0; 0xffff - 4]);
        assert!(writer.finish().is_some());
        let mut writer = Writer::default();
        writer.attribute(1, &vec![0; 0xffff - 3]);
        assert!(writer.finish().is_none());
        let mut writer = Writer::default();
        writer.nest(1, |writer| {
            writer.attribute(1, &vec![0; 40_000]);
            writer.attribute(1, &vec![0; 40_000]);
        });
        assert!(writer.finish().is_none());
    }

    #[test]
    fn an_error_carries_the_kernels_words_and_the_offset() {
        let mut writer = Writer::default();
        let message = writer.message(NLMSG_ERROR, flag::CAPPED | flag::ACK_TLVS, 9);
        writer.raw(&(-17_i32).to_ne_bytes());
        writer.raw(&[0; HEADER]);
        writer.string(1, "no such thing");
        writer.attribute(2, &52_u32.to_ne_bytes());
        writer.end(message);
        let bytes = writer.finish().unwrap();
        let message = Messages::new(&bytes).next().unwrap().unwrap();
        assert_eq!(
            Ack::read(&message),
            Ok(Ack { errno: 17, offset: Some(52), words: Some("no such thing".into()) })
        );
    }

    #[test]
    fn a_cut_datagram_gives_the_messages_before_the_cut() {
        let bytes = sample();
        for length in 0..bytes.len() {
            walk_messages(&bytes[..length]);
            let whole = Messages::new(&bytes[..length]).flatten();
            assert_eq!(whole.count(), length / (bytes.len() / 3));
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_are_read_without_panic(
            bytes in proptest::collection::vec(any::<u8>(), 0..512),
        ) {
            walk_messages(&bytes);
            walk(&bytes, 0);
        }

        #[test]
        fn damaged_messages_are_read_without_panic(
            hits in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        ) {
            let mut bytes = sample();
            for (at, value) in hits {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            walk_messages(&bytes);
        }
    }
}
