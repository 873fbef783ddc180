//! Builds a transaction from operations, and maps errors of the kernel to operations.

use std::collections::BTreeMap;

use super::kind;
use super::terms::Terms;
use super::{chain, element, flowtable, set};
use crate::diff::op::Op;
use crate::kernel::netlink::message::{Open, Writer, flag};
use crate::state::{Key, NFT_TABLE, Set, Stray, TableFamily, Value};

/// `NFNL_SUBSYS_NFTABLES`, the resource id of an nf_tables transaction.
pub(super) const NF_TABLES: u16 = 10;

/// `NFPROTO_INET`.
pub(crate) const INET: u8 = 1;

/// Address family of a table as the kernel numbers it (`NFPROTO_*`).
pub(crate) const fn number(family: TableFamily) -> u8 {
    match family {
        TableFamily::Inet => INET,
        TableFamily::Netdev => 5,
    }
}

/// Number of element bytes after which a message is full.
///
/// An attribute has at most 65 535 bytes, and one element far fewer than the rest.
const ELEMENTS: usize = 64_000;

/// Size in bytes of one IPv4 source element, the most frequent kind of operation.
const SOURCE: usize = 44;

/// Transaction that is ready to be sent.
#[derive(Debug)]
pub(super) struct Batch {
    datagram: Vec<u8>,
    generation_at: usize,
    /// Sequence number of the first message; errors of the whole transaction carry it.
    pub(super) begin: u32,
    /// Sequence numbers of the acknowledged messages: the last operation, and the end.
    pub(super) acknowledged: [u32; 2],
    origins: Vec<Origin>,
}

/// Position of an operation in the transaction.
#[derive(Clone, Copy, Debug)]
struct Origin {
    /// Sequence number of the message with the operation.
    sequence: u32,
    /// Offset of the operation in the message.
    start: usize,
    /// Index of the operation.
    op: usize,
}

impl Batch {
    /// Datagram, to be committed only at this ruleset generation; 0 for any.
    pub(super) fn datagram(&mut self, generation: u32) -> &[u8] {
        let at = self.generation_at;
        if let Some(slot) = self.datagram.get_mut(at..at + 4) {
            slot.copy_from_slice(&generation.to_be_bytes());
        }
        &self.datagram
    }

    /// Index of the operation at this offset of a message.
    pub(super) fn origin(&self, sequence: u32, offset: Option<usize>) -> Option<usize> {
        let at = offset.unwrap_or(0);
        let mut parts = self.origins.iter().filter(|part| part.sequence == sequence);
        let first = parts.next()?;
        let found = parts.take_while(|part| part.start <= at).last();
        Some(found.unwrap_or(first).op)
    }
}

/// Kind of change of the elements in a message.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Verb {
    /// Adds elements that must not exist.
    Create,
    /// Adds elements that may exist.
    Add,
    /// Deletes elements that must exist.
    Delete,
}

impl Verb {
    const fn kind_and_flags(self) -> (u16, u16) {
        match self {
            Self::Create => (kind::NEWSETELEM, flag::CREATE | flag::EXCL),
            Self::Add => (kind::NEWSETELEM, flag::CREATE),
            Self::Delete => (kind::DELSETELEM, 0),
        }
    }
}

/// Unfinished message that adds or deletes elements of one set.
#[derive(Clone, Copy)]
struct Elements {
    message: Open,
    list: Open,
    sequence: u32,
    set: Set,
    verb: Verb,
}

struct Builder<'a> {
    writer: Writer,
    origins: Vec<Origin>,
    next_sequence: &'a mut dyn FnMut() -> u32,
    last: Option<(Open, u32)>,
    elements: Option<Elements>,
    sets: u32,
    terms: &'a Terms<'a>,
}

/// Builds a transaction from the nf_tables operations among `ops`.
///
/// `None` if there are none, or if a length does not fit its field.
pub(super) fn build(
    ops: &[Op],
    terms: &Terms<'_>,
    next_sequence: &mut dyn FnMut() -> u32,
) -> Option<Batch> {
    let mut builder = Builder {
        writer: Writer::with_capacity(ops.len().saturating_mul(SOURCE)),
        origins: Vec::with_capacity(ops.len()),
        last: None,
        next_sequence,
        elements: None,
        sets: 0,
        terms,
    };
    let begin = builder.sequence();
    let message = builder.writer.message(kind::BEGIN, flag::REQUEST, begin);
    builder.writer.nfgen(0, NF_TABLES);
    builder.writer.be32(1, 0);
    let generation_at = builder.writer.since(message).checked_sub(4)?;
    builder.writer.end(message);

    for (index, op) in ops.iter().enumerate() {
        builder.op(index, op);
    }
    builder.hold_answers(ops);
    builder.flush();
    // Kernels before 6.10 do not acknowledge the end of a transaction, so the last operation is
    // acknowledged, too.
    let (last, sequence) = builder.last?;
    builder.writer.demand_ack(last);

    let end = builder.sequence();
    let flags = flag::REQUEST | flag::ACK;
    let message = builder.writer.message(kind::END, flags, end);
    builder.writer.nfgen(0, NF_TABLES);
    builder.writer.end(message);
    Some(Batch {
        datagram: builder.writer.finish()?,
        generation_at,
        begin,
        acknowledged: [sequence, end],
        origins: builder.origins,
    })
}

impl Builder<'_> {
    fn sequence(&mut self) -> u32 {
        (self.next_sequence)()
    }

    /// Starts a message for an operation.
    fn begin(&mut self, op: usize, table: TableFamily, kind: u16, flags: u16) -> (Open, u32) {
        let sequence = self.sequence();
        let message = self.writer.message(kind, flag::REQUEST | flags, sequence);
        self.writer.nfgen(number(table), 0);
        self.origins.push(Origin { sequence, start: 0, op });
        self.last = Some((message, sequence));
        (message, sequence)
    }

    fn message(
        &mut self,
        op: (usize, TableFamily),
        kind: u16,
        flags: u16,
        write: impl FnOnce(&mut Writer),
    ) {
        self.flush();
        let (index, table) = op;
        let (message, _) = self.begin(index, table, kind, flags);
        write(&mut self.writer);
        self.writer.end(message);
    }

    /// Ends the unfinished message with elements, if there is one.
    fn flush(&mut self) {
        if let Some(elements) = self.elements.take() {
            self.writer.close(elements.list);
            self.writer.end(elements.message);
        }
    }

    fn element(&mut self, index: usize, key: &Key, value: Option<&Value>) {
        let verb = if value.is_some() { Verb::Create } else { Verb::Delete };
        self.open_elements(index, key.set(), verb);
        element::write(&mut self.writer, key, value);
    }

    /// Starts an element of an operation, in a new message if the current one is full.
    fn open_elements(&mut self, index: usize, set: Set, verb: Verb) {
        let fits = self.elements.is_some_and(|open| {
            let room = self.writer.since(open.list) < ELEMENTS;
            open.set == set && open.verb == verb && room
        });
        if !fits {
            self.begin_elements(index, set, verb);
        }
        if let Some(Elements { message, sequence, .. }) = self.elements {
            let start = self.writer.since(message);
            self.origins.push(Origin { sequence, start, op: index });
        }
    }

    fn begin_elements(&mut self, index: usize, set: Set, verb: Verb) {
        self.flush();
        let (kind, flags) = verb.kind_and_flags();
        let (message, sequence) = self.begin(index, set.table(), kind, flags);
        self.writer.string(1, NFT_TABLE);
        self.writer.string(2, &set.name());
        self.elements = Some(Elements { message, list: self.writer.open(3), sequence, set, verb });
    }

    /// Blocks the replies of connections, with the full timeout also for those already blocked.
    ///
    /// If an element exists, adding it again does not renew its timeout, and the kernel does not
    /// count a transaction that adds no other element (seen on 6.1, 6.12 and 6.18). So each element
    /// is added if absent, deleted, and added again.
    fn hold_answers(&mut self, ops: &[Op]) {
        let mut answers = BTreeMap::new();
        for (index, op) in ops.iter().enumerate() {
            if let Op::BlockReplies(connection) = op {
                // Several connections may have the same key; an element can be deleted only once.
                let key = (connection.blocked_replies(), element::answer(connection));
                answers.entry(key).or_insert(index);
            }
        }
        for verb in [Verb::Add, Verb::Delete, Verb::Add] {
            for ((set, key), index) in &answers {
                self.open_elements(*index, *set, verb);
                element::write_answer(&mut self.writer, key, verb == Verb::Add);
            }
        }
    }

    fn op(&mut self, index: usize, op: &Op) {
        const NEW: u16 = flag::CREATE | flag::EXCL;
        let named = |name: String, kind: u16| {
            move |writer: &mut Writer| {
                writer.string(1, NFT_TABLE);
                writer.string(kind, &name);
            }
        };
        let at = (index, op.table());
        match op {
            Op::WakeTable(_) | Op::AddTable(_) => {
                let flags = self.terms.table_flags;
                let new = if let Op::AddTable(_) = op { NEW } else { 0 };
                self.message(at, kind::NEWTABLE, new, |writer| {
                    writer.string(1, NFT_TABLE);
                    writer.be32(2, flags);
                });
            }
            Op::DeleteTable(_) => self.message(at, kind::DELTABLE, 0, |writer| {
                writer.string(1, NFT_TABLE);
            }),
            Op::AddSet(set) => {
                self.sets += 1;
                let id = self.sets;
                let size = self.terms.sizes.and_then(|sizes| sizes.of_set(*set));
                self.message(at, kind::NEWSET, NEW, |writer| {
                    set::write(writer, *set, id, size);
                });
            }
            Op::DeleteSet(set) => self.message(at, kind::DELSET, 0, named(set.name(), 2)),
            Op::AddFlowtable => {
                self.message(at, kind::NEWFLOWTABLE, NEW, flowtable::write);
            }
            Op::AddChain(chain, base) => self.message(at, kind::NEWCHAIN, NEW, |writer| {
                chain::write(writer, *chain, base.as_ref());
            }),
            Op::DeleteChain(chain) => {
                self.message(at, kind::DELCHAIN, 0, named(chain.to_string(), 3));
            }
            Op::SetRules(chain, rules) => {
                self.message(at, kind::DELRULE, 0, named(chain.to_string(), 2));
                for rule in rules {
                    let flags = flag::CREATE | flag::APPEND;
                    self.message(at, kind::NEWRULE, flags, |writer| {
                        chain::write_rule(writer, *chain, rule);
                    });
                }
            }
            Op::AddElement(key, value) => self.element(index, key, Some(value)),
            Op::DeleteElement(key, _) => self.element(index, key, None),
            // Without a list of elements, all are meant.
            Op::FlushSet(set) => {
                self.message(at, kind::DELSETELEM, 0, named(set.name(), 2));
            }
            Op::DeleteStray(_, Stray::Chain(name)) => {
                self.message(at, kind::DELCHAIN, 0, named(name.clone(), 3));
            }
            Op::DeleteStray(_, Stray::Set(name)) => {
                self.message(at, kind::DELSET, 0, named(name.clone(), 2));
            }
            Op::DeleteStray(_, Stray::Flowtable(name)) => {
                self.message(at, kind::DELFLOWTABLE, 0, named(name.clone(), 2));
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::netlink::message::{Attributes, Messages};
    use crate::state::{Comment, Data};

    fn sequences() -> impl FnMut() -> u32 {
        let mut last = 0;
        move || {
            last += 1;
            last
        }
    }

    fn peer(number: u32) -> Op {
        let comment = Comment::of_name(&"n".repeat(200));
        let value = Value { data: Data::None, comment: Some(comment) };
        Op::AddElement(Key::peer(number.to_be_bytes().into()), value)
    }

    #[test]
    fn elements_share_messages_and_each_is_found_by_its_offset() {
        let mut ops: Vec<_> = (0..1000).map(peer).collect();
        ops.insert(7, Op::DeleteSet(Set::Gateway));
        let mut batch = build(&ops, &Terms::default(), &mut sequences()).unwrap();
        let datagram = batch.datagram(0x0102_0304).to_vec();
        let (mut kinds, mut origins) = (Vec::new(), Vec::new());
        for message in Messages::new(&datagram).map(Result::unwrap) {
            kinds.push(message.kind);
            let (_, body) = message.nfgen().unwrap();
            if message.kind != kind::NEWSETELEM {
                continue;
            }
            let list = Attributes::new(body).map(Result::unwrap).last().unwrap();
            let base = message.payload().as_ptr() as usize - 16;
            for found in list.nested().map(Result::unwrap) {
                // The kernel reports the offset of the attribute's header, which precedes the
                // value.
                let offset = found.bytes().as_ptr() as usize - 4 - base;
                origins.push(batch.origin(message.sequence, Some(offset)).unwrap());
            }
        }
        let wanted: Vec<_> = (0..=1000).filter(|index| *index != 7).collect();
        assert_eq!(origins, wanted);
        assert_eq!(kinds[..4], [kind::BEGIN, kind::NEWSETELEM, kind::DELSET, kind::NEWSETELEM]);
        assert_eq!(kinds.iter().filter(|kind| **kind == kind::NEWSETELEM).count(), 4);
        assert_eq!(kinds.last(), Some(&kind::END));
        assert_eq!(datagram[24..28], [1, 2, 3, 4]);
        assert_eq!(batch.origin(batch.begin, None), None);
    }

    #[test]
    fn only_the_last_operation_and_the_end_are_acknowledged() {
        let ops = [Op::AddTable(TableFamily::Inet), Op::AddSet(Set::Gateway), peer(1), peer(2)];
        let mut batch = build(&ops, &Terms::default(), &mut sequences()).unwrap();
        let datagram = batch.datagram(0).to_vec();
        let acknowledged: Vec<_> = Messages::new(&datagram)
            .map(Result::unwrap)
            .filter(|message| message.flags & flag::ACK != 0)
            .map(|message| message.sequence)
            .collect();
        assert_eq!(acknowledged, batch.acknowledged);
        assert_eq!(acknowledged, [4, 5]);
    }
}
