//! Parser and builder of datagrams, as far as fault injection needs them.

use std::ops::Range;

use crate::error::errno;
use crate::faults::{Call, Subsystem};
use crate::kernel::netlink::message::{HEADER, NLMSG_DONE, NLMSG_ERROR, Writer, flag};

/// First message of a transaction (`NFNL_MSG_BATCH_BEGIN`).
const BEGIN: u16 = 0x10;

/// Netfilter subsystem of `nf_tables`, in the high byte of the message type.
const NF_TABLES: u16 = 10;
/// Netfilter subsystem of conntrack, in the high byte of the message type.
const CONNECTIONS: u16 = 1;
/// Netfilter subsystem of ipset, in the high byte of the message type.
const SETS: u16 = 6;
/// Read-only ipset commands: protocol, list, save, test, header, type, and two about names.
const ASK_ABOUT_SETS: [u16; 8] = [1, 7, 8, 11, 12, 13, 14, 15];
/// `IPCTNL_MSG_CT_GET`.
const GET_CONNECTIONS: u16 = 0x101;
/// `NFT_MSG_GETGEN`; the other read-only types are every third from `NFT_MSG_GETTABLE` on.
const GET_GENERATION: u16 = 0xa10;

/// Position, type and sequence number of a message in a datagram.
#[derive(Clone, Copy, Debug)]
struct Found {
    start: usize,
    end: usize,
    kind: u16,
    sequence: u32,
}

impl Found {
    fn is_object(&self) -> bool {
        self.kind != NLMSG_DONE && self.kind != NLMSG_ERROR
    }
}

fn messages(datagram: &[u8]) -> Vec<Found> {
    let number = |at: usize| {
        let bytes = datagram.get(at..at.checked_add(4)?)?.try_into().ok()?;
        Some(u32::from_ne_bytes(bytes))
    };
    let kind = |at: usize| {
        let bytes = datagram.get(at..at.checked_add(2)?)?.try_into().ok()?;
        Some(u16::from_ne_bytes(bytes))
    };
    let mut start = 0;
    let mut found = Vec::new();
    while let (Some(length), Some(kind), Some(sequence)) =
        (number(start), kind(start + 4), number(start + 8))
    {
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        let end = start.saturating_add(length.max(HEADER));
        if end > datagram.len() {
            break;
        }
        found.push(Found { start, end, kind, sequence });
        start = end.next_multiple_of(4);
    }
    found
}

/// Range of the whole datagram.
pub(crate) fn whole(datagram: &[u8]) -> Vec<Range<usize>> {
    std::iter::once(0..datagram.len()).collect()
}

/// Ranges of the messages of a datagram.
pub(crate) fn each(datagram: &[u8]) -> Vec<Range<usize>> {
    let aligned = |end: usize| end.next_multiple_of(4).min(datagram.len());
    let messages = messages(datagram).into_iter();
    messages.map(|message| message.start..aligned(message.end)).collect()
}

/// Call that a datagram of a routing socket makes.
///
/// Its message types are also netfilter message types, with other meanings.
pub(crate) fn routing_call(datagram: &[u8]) -> Call {
    let first = messages(datagram).first().map_or(0, |message| message.kind);
    // Every kind of object has four message types: new, delete, get, set.
    Call { subsystem: Subsystem::Routing, writes: first % 4 != 2 }
}

/// Call that a datagram of a netfilter socket makes.
pub(crate) fn netfilter_call(datagram: &[u8]) -> Call {
    let first = messages(datagram).first().map_or(0, |message| message.kind);
    if first >> 8 == CONNECTIONS {
        return Call { subsystem: Subsystem::Connections, writes: first != GET_CONNECTIONS };
    }
    if first >> 8 == SETS {
        let writes = !ASK_ABOUT_SETS.contains(&(first & 0xff));
        return Call { subsystem: Subsystem::Sets, writes };
    }
    let asks = first == GET_GENERATION || first != BEGIN && first % 0x100 % 3 == 1;
    Call { subsystem: Subsystem::Firewall, writes: !asks }
}

/// Transaction without the message that ends it.
pub(crate) fn without_end(transaction: &[u8]) -> &[u8] {
    let end = messages(transaction).last().map_or(0, |end| end.start);
    transaction.get(..end).unwrap_or_default()
}

/// Reply of the kernel that refuses a transaction.
pub(crate) fn aborted(transaction: &[u8], errno: i32, port: u32) -> Vec<u8> {
    // ERESTART, for another generation, refers to the whole transaction; every other error refers
    // to one of its operations.
    let which = usize::from(errno != errno::ERESTART);
    let answered = messages(transaction).get(which).copied();
    answers(answered.as_slice(), errno, port)
}

/// Reply of the kernel that refuses every request of a datagram.
pub(crate) fn refused(datagram: &[u8], errno: i32, port: u32) -> Vec<u8> {
    answers(&messages(datagram), errno, port)
}

fn answers(to: &[Found], errno: i32, port: u32) -> Vec<u8> {
    let mut writer = Writer::default();
    for message in to {
        let answer = writer.message(NLMSG_ERROR, flag::CAPPED, message.sequence);
        writer.raw(&errno.saturating_neg().to_ne_bytes());
        let request = writer.message(message.kind, 0, message.sequence);
        writer.end(request);
        writer.end(answer);
    }
    let mut bytes = writer.finish().unwrap_or_default();
    for answer in messages(&bytes) {
        if let Some(to) = bytes.get_mut(answer.start + 12..answer.start + HEADER) {
            to.copy_from_slice(&port.to_ne_bytes());
        }
    }
    bytes
}

/// Turns a dump into one that the kernel marks as changed during the dump.
///
/// Its first object is removed, if another object is left to carry the mark.
pub(crate) fn torn(datagram: &mut Vec<u8>) {
    let objects = |datagram: &[u8]| -> Vec<_> {
        messages(datagram).into_iter().filter(Found::is_object).collect()
    };
    if let [first, _, ..] = objects(datagram).as_slice() {
        let end = first.end.next_multiple_of(4).min(datagram.len());
        datagram.drain(first.start..end);
    }
    let mut said = false;
    for object in objects(datagram) {
        // A dump of nf_tables has the low half of the generation in every message.
        if object.kind >> 8 == NF_TABLES {
            if let Some(low) = datagram.get_mut(object.start + HEADER + 3) {
                *low = low.wrapping_add(1);
                said = true;
            }
        }
    }
    for message in messages(datagram).iter().filter(|message| message.kind != NLMSG_ERROR) {
        if let (false, Some(flags)) = (said, datagram.get_mut(message.start + 6..message.start + 8))
        {
            let set = flags.first().zip(flags.get(1)).map(|(a, b)| u16::from_ne_bytes([*a, *b]));
            let interrupted = set.unwrap_or_default() | flag::DUMP_INTR;
            flags.copy_from_slice(&interrupted.to_ne_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::netlink::message::{Ack, Messages};

    fn datagram(kinds: &[u16]) -> Vec<u8> {
        let mut writer = Writer::default();
        for (sequence, kind) in (1..).zip(kinds) {
            let message = writer.message(*kind, flag::REQUEST, sequence);
            writer.nfgen(1, 0);
            writer.string(1, "four");
            writer.end(message);
        }
        writer.finish().unwrap()
    }

    #[test]
    fn reads_and_writes_are_told_apart() {
        use Subsystem::{Connections, Firewall, Routing};
        for (kinds, subsystem, writes) in [
            (&[0x10][..], Firewall, true),
            (&[0xa01, 0xa04, 0xa07, 0xa0a, 0xa0d, 0xa10], Firewall, false),
            (&[0x101], Connections, false),
            (&[0x100, 0x102], Connections, true),
            // Link, address, route, neighbour, rule: new and delete, then get.
            (&[16, 17, 19, 20, 21, 24, 25, 28, 29, 32, 33], Routing, true),
            (&[18, 22, 26, 30, 34], Routing, false),
        ] {
            for kind in kinds {
                let call = if subsystem == Routing { routing_call } else { netfilter_call };
                assert_eq!(call(&datagram(&[*kind])), Call { subsystem, writes }, "{kind:#x}");
            }
        }
    }

    #[test]
    fn answers_are_those_of_the_kernel() {
        let transaction = datagram(&[BEGIN, 0xa00, 0xa03, 0x11]);
        let answered = |bytes: &[u8]| -> Vec<_> {
            let messages = Messages::new(bytes).map(Result::unwrap);
            messages.map(|m| (m.sequence, Ack::read(&m).unwrap().errno)).collect()
        };
        assert_eq!(answered(&aborted(&transaction, 1, 7)), [(2, 1)]);
        assert_eq!(answered(&aborted(&transaction, 85, 7)), [(1, 85)]);
        assert_eq!(answered(&refused(&datagram(&[0x102, 0x102]), 2, 7)), [(1, 2), (2, 2)]);
        assert_eq!(without_end(&transaction), datagram(&[BEGIN, 0xa00, 0xa03]));
    }

    #[test]
    fn a_torn_list_lacks_an_object_and_says_so() {
        let mut list = datagram(&[0xa0c, 0xa0c, NLMSG_DONE]);
        torn(&mut list);
        let left: Vec<_> = Messages::new(&list).map(Result::unwrap).collect();
        assert_eq!(left.len(), 2);
        assert_eq!(left[0].nfgen().unwrap().0, 1);
        let mut list = datagram(&[28, 28, NLMSG_DONE]);
        torn(&mut list);
        let flags: Vec<_> = Messages::new(&list).map(|m| m.unwrap().flags).collect();
        assert_eq!(flags, [flag::REQUEST | flag::DUMP_INTR; 2]);
    }
}
