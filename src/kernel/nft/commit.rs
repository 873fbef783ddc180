//! Commits a transaction.

use std::io;
use std::ops::ControlFlow;

use super::batch::{Batch, build};
use super::generation::generation;
use super::terms::Terms;
use crate::diff::op::Op;
use crate::error::{KernelError, errno};
use crate::kernel::netlink::exchange::acknowledgements;
use crate::kernel::netlink::message::Ack;
use crate::kernel::netlink::socket::Socket;

/// Number of attempts at the ruleset generation just read.
///
/// The next attempt is for any generation, because other programs commit faster.
const ATTEMPTS: usize = 5;

/// Send buffer size of a new socket on every kernel (`net.core.wmem_default`), in bytes.
const SMALL: usize = 128 * 1024;

/// Bytes of kernel bookkeeping that count against the send buffer, rounded up.
const SLACK: usize = 4096;

const UNKNOWN: &str = "the kernel's answer was lost: whether the changes were made must be read";
const TOO_LARGE: &str = "raise net.core.wmem_max, or run with CAP_NET_ADMIN in the first user \
                         namespace: a transaction must fit the socket's send buffer";

/// Refused operations by index, with their errors.
pub(crate) type Refused = Vec<(usize, KernelError)>;

/// Commits all nf_tables operations in one transaction: all take effect, or none.
///
/// The errors name the operations that the kernel refused. An error of the whole transaction is
/// reported for the first operation; if it is `ENOBUFS`, it is unknown whether the transaction was
/// committed.
#[cfg(test)]
pub(crate) fn commit(socket: &mut Socket, ops: &[Op]) -> Result<(), Refused> {
    commit_as(socket, ops, &Terms::default()).map(drop)
}

/// Ruleset generations before and after a transaction, with no other transaction between them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Between {
    pub(crate) before: u32,
    pub(crate) after: u32,
}

impl Between {
    /// Joins two consecutive transactions; `None` if another one was committed between them.
    pub(crate) fn and_then(self, next: Self) -> Option<Self> {
        (self.after == next.before).then_some(Self { before: self.before, after: next.after })
    }
}

/// Commits all nf_tables operations in one transaction, with these options.
///
/// Returns the ruleset generations before and after; `None` if they are unknown or nothing was
/// committed.
pub(crate) fn commit_as(
    socket: &mut Socket,
    ops: &[Op],
    terms: &Terms<'_>,
) -> Result<Option<Between>, Refused> {
    let Some(first) = ops.iter().position(Op::is_nft) else {
        return Ok(None);
    };
    let whole = Whole { first, ops };
    let Some(mut batch) = build(ops, terms, &mut || socket.next_sequence()) else {
        return Err(
            whole.of(KernelError::answer(whole.text(), "an operation is too large for a message"))
        );
    };
    reserve(socket, batch.datagram(0).len());
    // Without a change the kernel commits nothing and keeps the generation.
    let is_needed = |op: &Op| op.is_nft() && !matches!(op, Op::WakeTable(_));
    let changes = ops.iter().any(is_needed);
    for number in 0..=ATTEMPTS {
        let before = generation(socket).map_err(|error| whole.of(error))?;
        if terms.only_at.is_some_and(|only| only != before) {
            break;
        }
        // The last attempt is made on any generation, unless the caller names one.
        let demanded = if number < ATTEMPTS || terms.only_at.is_some() { before } else { 0 };
        // The kernel increments the generation that was demanded, and skips 0.
        let between = Between { before, after: before.wrapping_add(1).max(1) };
        let exact = Some(between).filter(|_| demanded != 0 && changes);
        match attempt(socket, whole, &mut batch, demanded)? {
            Outcome::Made => return Ok(exact),
            Outcome::Outdated => {}
            Outcome::Accepted => {
                let after = generation(socket).map_err(|error| whole.of(error))?;
                return if after == before && changes { Err(whole.unknown()) } else { Ok(exact) };
            }
        }
    }
    Err(whole.of(KernelError::refused(whole.text(), errno::ERESTART)))
}

enum Outcome {
    Made,
    /// Every operation was accepted, but the end was not acknowledged.
    ///
    /// Kernels before 6.10 never acknowledge the end; only the generation tells whether they
    /// committed.
    Accepted,
    /// The ruleset generation was another one; nothing was committed.
    Outdated,
}

/// The whole transaction, for errors that belong to no single operation.
#[derive(Clone, Copy)]
struct Whole<'a> {
    first: usize,
    ops: &'a [Op],
}

impl Whole<'_> {
    fn text(self) -> String {
        let count = self.ops.iter().filter(|op| op.is_nft()).count();
        format!("an nft transaction of {count} operations")
    }

    fn of(self, error: KernelError) -> Refused {
        vec![(self.first, error)]
    }

    fn unknown(self) -> Refused {
        self.of(KernelError::answer(self.text(), UNKNOWN))
    }

    fn io(self, error: &io::Error) -> Refused {
        let error = KernelError::io(self.text(), error);
        self.of(match error.errno() {
            Some(errno::EMSGSIZE) => error.with_remedy(TOO_LARGE),
            _ => error,
        })
    }
}

/// Raises the send buffer for a large transaction; if that is impossible, sending fails.
fn reserve(socket: &Socket, length: usize) {
    if length > SMALL {
        let wanted = length.saturating_add(SLACK);
        socket.reserve(wanted);
    }
}

fn attempt(
    socket: &mut Socket,
    whole: Whole<'_>,
    batch: &mut Batch,
    generation: u32,
) -> Result<Outcome, Refused> {
    let (demanded, begin) = (batch.acknowledged, batch.begin);
    let (mut acknowledged, mut refused, mut outdated) = ([false; 2], Vec::new(), false);
    let datagram = batch.datagram(generation);
    let outcome = acknowledgements(socket, datagram, &mut |sequence, ack| {
        outdated |= sequence == begin && ack.errno == errno::ERESTART;
        if outdated {
            return ControlFlow::Break(());
        }
        if ack.errno == 0 {
            for (done, demanded) in acknowledged.iter_mut().zip(demanded) {
                *done |= demanded == sequence;
            }
        } else {
            refused.push((sequence, ack));
        }
        ControlFlow::Continue(())
    });
    let outcome = outcome.map_err(|error| whole.io(&error))?;
    if outdated {
        return Ok(Outcome::Outdated);
    }
    let refused = refused.into_iter().map(|(sequence, ack)| refusal(whole, batch, sequence, ack));
    let mut refused: Refused = refused.collect();
    if !refused.is_empty() {
        refused.sort_by_key(|(index, _)| *index);
        refused.dedup_by_key(|(index, _)| *index);
        return Err(refused);
    }
    if outcome.lost {
        let lost = KernelError::refused(whole.text(), errno::ENOBUFS);
        return Err(whole.of(lost.with_remedy(UNKNOWN)));
    }
    if outcome.malformed.is_some() {
        return Err(whole.unknown());
    }
    match acknowledged {
        [_, true] => Ok(Outcome::Made),
        [true, false] => Ok(Outcome::Accepted),
        [false, false] => Err(whole.unknown()),
    }
}

fn refusal(whole: Whole<'_>, batch: &Batch, sequence: u32, ack: Ack) -> (usize, KernelError) {
    let origin = batch.origin(sequence, ack.offset);
    let (index, error) = match origin.and_then(|index| Some((index, whole.ops.get(index)?))) {
        Some((index, op)) => (index, KernelError::refused(op, ack.errno)),
        None => (whole.first, KernelError::refused(whole.text(), ack.errno)),
    };
    (index, error.with_words(ack.words))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::nft::observe;
    use crate::kernel::nft::tests::netns::in_netns;
    use crate::state::{Firewall, TableFamily};

    #[test]
    fn a_transaction_for_another_generation_does_nothing() {
        in_netns(|socket| {
            let ops = [Op::AddTable(TableFamily::Inet)];
            let whole = Whole { first: 0, ops: &ops };
            let mut batch = build(&ops, &Terms::default(), &mut || socket.next_sequence()).unwrap();
            let current = generation(socket).unwrap();
            let outcome = attempt(socket, whole, &mut batch, current + 1);
            assert!(matches!(outcome, Ok(Outcome::Outdated)));
            assert_eq!(observe(socket), Ok(None));
            let outcome = attempt(socket, whole, &mut batch, current);
            assert!(matches!(outcome, Ok(Outcome::Made | Outcome::Accepted)));
            assert_eq!(observe(socket), Ok(Some(Firewall::default())));
            assert_eq!(generation(socket), Ok(current + 1));
        });
    }

    #[test]
    fn a_transaction_for_one_generation_only_is_not_made_for_the_next() {
        in_netns(|socket| {
            let current = generation(socket).unwrap();
            commit(socket, &[Op::AddTable(TableFamily::Inet)]).unwrap();
            let terms = Terms { only_at: Some(current), ..Terms::default() };
            let set = [Op::AddSet(crate::state::Set::Gateway)];
            let refused = commit_as(socket, &set, &terms).unwrap_err();
            assert_eq!((refused.len(), refused[0].1.errno()), (1, Some(errno::ERESTART)));
            assert_eq!(observe(socket), Ok(Some(Firewall::default())));
            let terms = Terms { only_at: Some(current + 1), ..terms };
            let between = commit_as(socket, &set, &terms).unwrap();
            assert_eq!(between, Some(Between { before: current + 1, after: current + 2 }));
        });
    }

    #[cfg(feature = "testing")]
    #[test]
    fn a_transaction_that_lost_its_end_is_not_taken_for_made() {
        use crate::faults::{Fault, Faults};
        use crate::kernel::netlink::fault_injector::Tap;
        in_netns(|socket| {
            let faults = Faults::new().at_write(0, Fault::AckWithoutCommit);
            socket.set_tap(Tap::of_netfilter(faults.clone()));
            let refused = commit(socket, &[Op::AddTable(TableFamily::Inet)]).unwrap_err();
            assert_eq!((refused.len(), refused[0].1.errno()), (1, None), "{refused:?}");
            assert_eq!((observe(socket), faults.pending()), (Ok(None), 0));
            commit(socket, &[Op::AddTable(TableFamily::Inet)]).unwrap();
            assert_eq!(observe(socket), Ok(Some(Firewall::default())));
        });
    }

    #[test]
    fn a_transaction_without_privilege_is_refused_as_a_whole() {
        in_netns(|socket| {
            use rustix::thread::{CapabilitySet, capabilities, set_capabilities};
            let mut ours = capabilities(None).unwrap();
            ours.effective.remove(CapabilitySet::NET_ADMIN);
            set_capabilities(None, ours).unwrap();
            // The kernel also checks the privileges of the process that opened the socket.
            let mut bare = crate::kernel::nft::open().unwrap();
            let refused = commit(&mut bare, &[Op::AddTable(TableFamily::Inet)]).unwrap_err();
            assert_eq!(refused.len(), 1);
            assert!(refused[0].1.is_denied(), "{refused:?}");
            assert!(refused[0].1.remedy().is_some());
            assert!(observe(&mut bare).unwrap_err().is_denied());
            assert_eq!(observe(socket).unwrap_err().errno(), Some(errno::EPERM));
        });
    }
}
