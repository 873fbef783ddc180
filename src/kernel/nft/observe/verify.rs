//! Verifies the elements of a large set key by key, instead of a dump.
//!
//! For every datagram of a dump the kernel starts at the first element and skips the elements that
//! it has already sent, so the cost of a dump grows with the square of the set's size. A lookup of
//! one key costs the same in a set of any size. So if the elements are probably known, each
//! expected key is looked up.
//!
//! The kernel replies to each key separately, with the sequence number of the request, and reading
//! a million replies takes longer than the lookups. So a request has only keys with the same
//! expected value and uses this value as its sequence number, and a socket filter drops the replies
//! whose value equals their sequence number. The differences remain to be read, and one
//! acknowledgement for each datagram of requests: that of its last request, which shows that the
//! kernel has finished.
//!
//! If the number of expected keys found equals the kernel's element count of the set, there are no
//! other keys. Otherwise the set has an unexpected key, and only a dump tells which.

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::ops::ControlFlow;

use socket2::SockFilter;

use super::{Reader, add_elements};
use crate::error::{KernelError, errno};
use crate::kernel::netlink::bpf::{
    ACCEPT, DROP, LENGTH, PUT_ASIDE, SEQUENCE, TYPE, as_loaded, half, is, is_the_same, word,
};
use crate::kernel::netlink::exchange::{Outcome, discard, exchange};
use crate::kernel::netlink::message::{Ack, Attributes, Message, NLMSG_ERROR, Open, Writer, flag};
use crate::kernel::nft::{batch, element, kind};
use crate::state::{Data, Elements, Key, NFT_TABLE, Set, Tag, Value};

/// Size limits in bytes of a datagram, and of the keys in a request.
///
/// No request starts after the first limit, and no key after the second. Together they are less
/// than the send buffer of every socket, and the keys of a request are one attribute.
const DATAGRAM: usize = 60_000;
const REQUEST: usize = 60_000;

/// Number of keys that are sorted by value together, which limits the memory needed.
const AT_ONCE: usize = 65_536;

/// Number of differences up to which verification continues; with more a dump may be as fast.
const MANY: usize = 1024;

/// Receive buffer for the replies of that many differences, with the kernel's overhead, in bytes.
const UNREAD: usize = 2 * 1024 * 1024;

/// Expected key that has another value, or is missing (`None`).
pub(super) type Difference = (Key, Option<Value>);

/// Keys with the same expected value.
type Keys<'k> = &'k [(Tag, Key)];

/// Requests of one datagram.
#[derive(Default)]
struct Asked<'k> {
    datagram: Vec<u8>,
    /// Keys of each request, by sequence number.
    requests: HashMap<u32, Keys<'k>>,
    /// Sequence number of the last request, which is acknowledged.
    last: u32,
    /// Size in bytes of a request before its first key, and of one key.
    head: usize,
    each: usize,
}

impl Reader<'_> {
    /// Differences of a set with this many elements from the expected ones.
    ///
    /// `None` if they cannot be determined without a dump.
    pub(super) fn differences(
        &mut self,
        set: Set,
        count: usize,
        expected: &Elements,
    ) -> Result<Option<Vec<Difference>>, KernelError> {
        let number = expected.of(set).count();
        let sample = expected.of(set).next().and_then(|(key, _)| filter(set, &key));
        let hopeless = number < count || number - count > MANY;
        let Some(filter) = sample.filter(|_| !hopeless) else { return Ok(None) };
        discard(self.socket);
        if self.socket.filter(&filter).is_err() {
            return Ok(None);
        }
        self.socket.reserve_unread(UNREAD);
        let found = self.ask_for_all(set, expected);
        // Replies left over from an abandoned attempt must not be read as those of another request.
        discard(self.socket);
        self.socket.unfilter().map_err(|error| KernelError::io("detach a filter", &error))?;
        let missing = |found: &[Difference]| found.iter().filter(|(_, is)| is.is_none()).count();
        Ok(found.filter(|found| number - missing(found) == count))
    }

    fn ask_for_all(&mut self, set: Set, expected: &Elements) -> Option<Vec<Difference>> {
        let (mut all, mut found) = (expected.of(set), Vec::new());
        loop {
            let some = all.by_ref().take(AT_ONCE).map(|(key, value)| Some((plain(&value)?, key)));
            let mut keys = some.collect::<Option<Vec<_>>>()?;
            if keys.is_empty() {
                return Some(found);
            }
            keys.sort_unstable_by_key(|(tag, _)| *tag);
            let mut left: Vec<_> = keys.chunk_by(|(one, _), (other, _)| one == other).collect();
            while !left.is_empty() {
                let asked = Self::requests(set, &mut left)?;
                left.extend(self.ask_keys(set, &asked, &mut found)?);
                if found.len() > MANY {
                    return None;
                }
            }
        }
    }

    /// Requests for as many keys as one datagram takes, with no value twice.
    fn requests<'k>(set: Set, left: &mut Vec<Keys<'k>>) -> Option<Asked<'k>> {
        let mut writer = Writer::default();
        let mut asked = Asked::default();
        let (mut first, mut last) = (None, None);
        while let Some(keys) = left.pop() {
            let value = keys.first()?.0.get();
            let full = first.is_some_and(|first| writer.since(first) > DATAGRAM);
            if full || asked.requests.contains_key(&value) {
                left.push(keys);
                break;
            }
            let message = begin(&mut writer, kind::GETSETELEM, flag::REQUEST, value, set);
            let inside = writer.open(3);
            asked.head = writer.since(message);
            let mut count = 0;
            for (_, key) in keys {
                element::write(&mut writer, key, None);
                count += 1;
                if writer.since(inside) > REQUEST {
                    break;
                }
            }
            asked.each = (writer.since(message) - asked.head) / count;
            writer.close(inside);
            writer.end(message);
            let (now, later) = keys.split_at_checked(count)?;
            asked.requests.insert(value, now);
            if !later.is_empty() {
                left.push(later);
            }
            first = first.or(Some(message));
            (asked.last, last) = (value, Some(message));
        }
        writer.demand_ack(last?);
        asked.datagram = writer.finish()?;
        Some(asked)
    }

    /// Sends the requests and collects the differences.
    ///
    /// Returns the keys behind each missing key: the kernel stops a request at a missing key.
    fn ask_keys<'k>(
        &mut self,
        set: Set,
        asked: &Asked<'k>,
        found: &mut Vec<Difference>,
    ) -> Option<Vec<Keys<'k>>> {
        let (mut left, mut complete, mut moved) = (Vec::new(), false, false);
        let mut take = |message: &Message<'_>, moved: &mut bool| {
            let keys = asked.requests.get(&message.sequence)?;
            if message.kind == NLMSG_ERROR {
                complete |= message.sequence == asked.last;
                let ack = Ack::read(message).ok()?;
                if ack.errno != 0 {
                    let (key, behind) = asked.missing(keys, &ack)?;
                    found.push((key, None));
                    left.extend(Some(behind).filter(|keys| !keys.is_empty()));
                }
                return Some(());
            }
            let (generation, body) = message.nfgen().ok()?;
            *moved |= generation != self.generation;
            let mut elements = Some(Vec::new());
            add_elements(Attributes::new(body), set, &mut elements).ok()?;
            for one in elements? {
                found.push((element::key(set, &one.key)?, Some(one.value?)));
            }
            Some(())
        };
        let outcome = exchange(self.socket, &asked.datagram, &mut |message| match take(
            message, &mut moved,
        ) {
            Some(()) => ControlFlow::Continue(()),
            None => ControlFlow::Break(()),
        });
        self.moved |= moved;
        // Abandoned at an unexpected message, or incomplete.
        let whole = outcome.is_ok_and(|outcome| outcome == Outcome::default());
        (whole && complete).then_some(left)
    }
}

impl Asked<'_> {
    /// Key that the kernel did not find, and the keys behind it, which it did not look up.
    fn missing<'k>(&self, keys: Keys<'k>, ack: &Ack) -> Option<(Key, Keys<'k>)> {
        let offset = ack.offset.filter(|_| ack.errno == errno::ENOENT)?;
        let into = offset.checked_sub(self.head)?;
        let place = into.checked_div(self.each).filter(|place| place * self.each == into)?;
        let ((_, key), behind) = keys.get(place..)?.split_first()?;
        Some((*key, behind))
    }
}

/// Tag of a value that has nothing else, as a set needs for verification.
const fn plain(value: &Value) -> Option<Tag> {
    match value {
        Value { data: Data::Tag(tag), comment: None } => Some(*tag),
        _ => None,
    }
}

fn begin(writer: &mut Writer, kind: u16, flags: u16, sequence: u32, set: Set) -> Open {
    let message = writer.message(kind, flags, sequence);
    writer.nfgen(batch::number(set.table()), 0);
    writer.string(1, NFT_TABLE);
    writer.string(2, &set.name());
    message
}

/// Socket filter that drops replies with a key and a value equal to the sequence number.
///
/// Replies for elements with other attributes pass.
fn filter(set: Set, key: &Key) -> Option<[SockFilter; 10]> {
    let mut writer = Writer::default();
    let answer = begin(&mut writer, kind::NEWSETELEM, 0, 0, set);
    let value = Value::plain(Data::Tag(Tag::LOCAL));
    writer.nest(3, |writer| element::write(writer, key, Some(&value)));
    let length = u32::try_from(writer.since(answer)).ok()?;
    // The value comes last, in native byte order like the sequence number.
    let value = length.checked_sub(4)?;
    Some([
        half(TYPE),
        is(as_loaded(kind::NEWSETELEM), 0, 6),
        word(LENGTH),
        is(u32::from_be_bytes(length.to_ne_bytes()), 0, 4),
        word(SEQUENCE),
        PUT_ASIDE,
        word(value),
        is_the_same(1, 0),
        ACCEPT,
        DROP,
    ])
}
