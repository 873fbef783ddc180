//! Netlink exchange: sends one datagram of requests and reads the replies.

use std::fmt::Display;
use std::io::{self, ErrorKind};
use std::ops::ControlFlow;

use super::message::{Ack, Malformed, Message, Messages, NLMSG_DONE, NLMSG_ERROR, flag};
use super::socket::Socket;
use crate::error::{KernelError, errno};

/// Number of acknowledged requests in one datagram.
///
/// Their acknowledgements fit the receive buffer of a new socket.
pub(crate) const AT_ONCE: usize = 128;

/// Number of attempts to dump objects while they change.
const ATTEMPTS: usize = 5;

const NO_ANSWER: &str = "the kernel did not answer";
const NO_END: &str = "the kernel's answer has no end";

/// Summary of the messages that [`exchange`] has read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Outcome {
    /// Whether the last message that the caller waits for was read.
    pub(crate) ended: bool,
    /// Whether the receive buffer overflowed (`ENOBUFS`), so that replies were lost.
    pub(crate) lost: bool,
    /// First malformed netlink message.
    pub(crate) malformed: Option<Malformed>,
}

impl Outcome {
    /// Reads the messages of a datagram, up to the last one that the caller waits for.
    pub(crate) fn read(
        &mut self,
        datagram: &[u8],
        each: &mut dyn FnMut(&Message<'_>) -> ControlFlow<()>,
    ) {
        for message in Messages::new(datagram) {
            match message {
                Ok(message) => self.ended = each(&message).is_break(),
                Err(malformed) => self.malformed = self.malformed.or(Some(malformed)),
            }
            if self.ended {
                return;
            }
        }
    }

    /// Checks that all replies arrived and could be read.
    ///
    /// # Errors
    ///
    /// Replies were lost or malformed.
    pub(crate) fn complete(&self, text: impl Display) -> Result<(), KernelError> {
        match (self.lost, self.malformed) {
            (true, _) => Err(KernelError::refused(text, errno::ENOBUFS)),
            (false, Some(Malformed(what))) => Err(KernelError::answer(text, what)),
            (false, None) => Ok(()),
        }
    }
}

/// Sends a datagram and passes each message of the replies to `each`.
///
/// Ends when `each` says that a message was the last, or when nothing is left to read. After a lost
/// reply the remaining ones are still read: they may be what the caller waits for, and the kernel
/// starts no second dump before the first is read.
///
/// # Errors
///
/// Errors of the socket. The messages read before were passed to `each`.
pub(crate) fn exchange(
    socket: &mut Socket,
    datagram: &[u8],
    each: &mut dyn FnMut(&Message<'_>) -> ControlFlow<()>,
) -> io::Result<Outcome> {
    discard(socket);
    while let Err(error) = socket.send(datagram) {
        if error.kind() != ErrorKind::Interrupted {
            return Err(error);
        }
    }
    let mut outcome = Outcome::default();
    while !outcome.ended {
        match socket.receive() {
            Ok(datagram) => outcome.read(datagram, each),
            Err(error) => match (error.kind(), error.raw_os_error()) {
                (ErrorKind::Interrupted, _) => {}
                (ErrorKind::WouldBlock, _) => break,
                (_, Some(errno::ENOBUFS)) => outcome.lost = true,
                (ErrorKind::InvalidData, _) => {
                    outcome.malformed = Some(Malformed("a datagram was cut"));
                }
                _ => return Err(error),
            },
        }
    }
    Ok(outcome)
}

/// Sends a datagram and passes each acknowledgement, with its sequence number, to `each`.
pub(crate) fn acknowledgements(
    socket: &mut Socket,
    datagram: &[u8],
    each: &mut dyn FnMut(u32, Ack) -> ControlFlow<()>,
) -> io::Result<Outcome> {
    let mut malformed = None;
    let outcome = exchange(socket, datagram, &mut |message| {
        match (message.kind == NLMSG_ERROR).then(|| Ack::read(message)) {
            Some(Ok(ack)) => return each(message.sequence, ack),
            Some(Err(found)) => malformed = Some(found),
            None => {}
        }
        ControlFlow::Continue(())
    })?;
    Ok(Outcome { malformed: outcome.malformed.or(malformed), ..outcome })
}

/// Discards unread messages of an earlier exchange.
pub(crate) fn discard(socket: &mut Socket) {
    while match socket.receive() {
        Ok(_) => true,
        Err(error) => {
            matches!(error.raw_os_error(), Some(errno::ENOBUFS | errno::EINTR))
                || error.kind() == ErrorKind::InvalidData
        }
    } {}
}

/// Completeness of the reply to a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Answered {
    /// Whether the objects changed during the dump, or part of the dump was lost.
    pub(crate) interrupted: bool,
}

/// Reply to one request: objects, and an acknowledgement or the end of the dump.
pub(crate) struct Answer<'a> {
    sequence: u32,
    is_dump: bool,
    take: &'a mut dyn FnMut(&Message<'_>) -> Result<(), Malformed>,
    is_begun: bool,
    interrupted: bool,
    malformed: Option<Malformed>,
    end: Option<Ack>,
}

impl<'a> Answer<'a> {
    /// Starts to read the reply to a request with this sequence number and these flags.
    ///
    /// The objects are passed to `take`.
    pub(crate) fn new(
        sequence: u32,
        flags: u16,
        take: &'a mut dyn FnMut(&Message<'_>) -> Result<(), Malformed>,
    ) -> Self {
        let is_dump = flags & flag::DUMP == flag::DUMP;
        let (is_begun, interrupted) = (false, false);
        Self { sequence, is_dump, take, is_begun, interrupted, malformed: None, end: None }
    }

    /// Reads a message of the reply; skips messages of an earlier exchange.
    pub(crate) fn read(&mut self, message: &Message<'_>) -> ControlFlow<()> {
        if message.sequence != self.sequence {
            return ControlFlow::Continue(());
        }
        self.is_begun = true;
        // In an acknowledgement these flag bits have other meanings.
        let is_listed = message.kind != NLMSG_ERROR;
        self.interrupted |= is_listed && message.flags & flag::DUMP_INTR != 0;
        let is_end = matches!(message.kind, NLMSG_ERROR | NLMSG_DONE);
        let read = if is_end {
            Ack::read(message).map(|ack| self.end = Some(ack))
        } else {
            (self.take)(message)
        };
        // The rest of a dump must be read, or the next dump would fail with EBUSY.
        self.malformed = self.malformed.or(read.err());
        if is_end { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    /// Result of the request, after its messages were read.
    pub(crate) fn finish(
        self,
        text: impl Display,
        outcome: Outcome,
    ) -> Result<Answered, KernelError> {
        if let Some(ack) = self.end.as_ref().filter(|ack| ack.errno != 0) {
            return Err(KernelError::refused(text, ack.errno).with_words(ack.words.clone()));
        }
        if self.is_dump && (self.interrupted || outcome.lost) {
            return Ok(Answered { interrupted: true });
        }
        let malformed = self.malformed.or(outcome.malformed);
        Outcome { malformed, ..outcome }.complete(&text)?;
        match (self.end, self.is_begun) {
            (Some(_), _) => Ok(Answered::default()),
            (None, true) => Err(KernelError::answer(text, NO_END)),
            (None, false) => Err(KernelError::answer(text, NO_ANSWER)),
        }
    }
}

/// Sends one request and passes the objects of the reply to `take`.
///
/// The request in the datagram must have this sequence number and these flags.
///
/// # Errors
///
/// The kernel refused the request, its reply was lost or malformed, or there was no reply. A loss
/// during a dump is an interruption instead, see [`in_one_piece`].
pub(crate) fn ask(
    socket: &mut Socket,
    text: &dyn Display,
    datagram: &[u8],
    (sequence, flags): (u32, u16),
    take: &mut dyn FnMut(&Message<'_>) -> Result<(), Malformed>,
) -> Result<Answered, KernelError> {
    let mut answer = Answer::new(sequence, flags, take);
    let outcome = exchange(socket, datagram, &mut |message| answer.read(message));
    answer.finish(text, outcome.map_err(|error| KernelError::io(text, &error))?)
}

/// Repeats a dump until the objects do not change during it; `None` if they always change.
pub(crate) fn in_one_piece<T>(
    mut list: impl FnMut() -> Result<(T, Answered), KernelError>,
) -> Result<Option<T>, KernelError> {
    for _ in 0..ATTEMPTS {
        let (found, answered) = list()?;
        if !answered.interrupted {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

/// Sends requests and waits for the acknowledgement of each of them.
///
/// The requests are given by sequence number and text. Returns the errors of those that were
/// refused or not acknowledged, by index. The kernel carries out one request after another, whether
/// earlier ones failed or not. A request whose acknowledgement was lost may have been carried out.
pub(crate) fn request_all<D: Display>(
    socket: &mut Socket,
    datagram: &[u8],
    requests: &[(u32, D)],
) -> Vec<(usize, KernelError)> {
    let mut open = requests.len();
    if open == 0 {
        return Vec::new();
    }
    let mut acks: Vec<Option<Ack>> = vec![None; open];
    let outcome = acknowledgements(socket, datagram, &mut |sequence, ack| {
        let mut slots = requests.iter().zip(&mut acks);
        if let Some((_, slot)) = slots.find(|((of, _), slot)| *of == sequence && slot.is_none()) {
            *slot = Some(ack);
            open -= 1;
        }
        if open == 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    let refused = requests.iter().zip(acks).enumerate().filter_map(|(index, ((_, text), ack))| {
        let error = match (ack, &outcome) {
            (Some(Ack { errno: 0, .. }), _) => return None,
            (Some(ack), _) => KernelError::refused(text, ack.errno).with_words(ack.words),
            (None, Err(error)) => KernelError::io(text, error),
            (None, Ok(Outcome { lost: true, .. })) => KernelError::refused(text, errno::ENOBUFS),
            (None, Ok(_)) => KernelError::answer(text, NO_ANSWER),
        };
        Some((index, error))
    });
    refused.collect()
}

/// Error of a request that was not acknowledged.
pub(crate) fn unanswered(text: impl Display) -> KernelError {
    KernelError::answer(text, NO_ANSWER)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::netlink::message::Writer;

    const SEQUENCE: u32 = 7;
    const OBJECT: u16 = 32;

    fn message(kind: u16, flags: u16, sequence: u32, payload: &[u8]) -> Vec<u8> {
        let mut writer = Writer::default();
        let message = writer.message(kind, flags, sequence);
        writer.raw(payload);
        writer.end(message);
        writer.finish().unwrap()
    }

    fn object(flags: u16) -> Vec<u8> {
        message(OBJECT, flags, SEQUENCE, &[2, 0, 0, 0])
    }

    fn done(code: i32) -> Vec<u8> {
        message(NLMSG_DONE, 0, SEQUENCE, &code.to_ne_bytes())
    }

    /// Number of objects read, and the result of a dump.
    fn read(lost: bool, datagrams: &[Vec<u8>]) -> (usize, Result<Answered, KernelError>) {
        let mut seen = 0;
        let mut take = |message: &Message<'_>| {
            seen += 1;
            if message.payload().is_empty() { Err(Malformed("nothing in it")) } else { Ok(()) }
        };
        let mut answer = Answer::new(SEQUENCE, flag::DUMP, &mut take);
        let mut outcome = Outcome { lost, ..Outcome::default() };
        for datagram in datagrams {
            outcome.read(datagram, &mut |message| answer.read(message));
        }
        let end = answer.finish("ip rule show", outcome);
        (seen, end)
    }

    const WHOLE: Answered = Answered { interrupted: false };
    const INTERRUPTED: Answered = Answered { interrupted: true };

    #[test]
    fn dump_ends_with_its_done_message() {
        let (seen, end) = read(false, &[object(0), object(0)]);
        assert_eq!((seen, end.unwrap_err().to_string()), (2, format!("ip rule show: {NO_END}")));
        let two = [object(0), object(0)].concat();
        assert_eq!(read(false, &[two, done(0)]), (2, Ok(WHOLE)));
        let (seen, end) = read(false, &[]);
        assert_eq!((seen, end.unwrap_err().to_string()), (0, format!("ip rule show: {NO_ANSWER}")));
    }

    #[test]
    fn dump_with_dump_intr_or_a_lost_datagram_is_interrupted() {
        for datagrams in [
            [object(flag::DUMP_INTR), done(0)],
            [object(0), message(NLMSG_DONE, flag::DUMP_INTR, SEQUENCE, &[0; 4])],
        ] {
            assert_eq!(read(false, &datagrams).1, Ok(INTERRUPTED));
        }
        assert_eq!(read(true, &[object(0), done(0)]).1, Ok(INTERRUPTED));
        assert_eq!(read(true, &[]).1, Ok(INTERRUPTED));
    }

    #[test]
    fn messages_of_an_earlier_request_are_skipped() {
        let old = message(NLMSG_DONE, 0, SEQUENCE - 1, &[0; 4]);
        assert_eq!(read(false, &[old, object(0), done(0)]), (1, Ok(WHOLE)));
    }

    #[test]
    fn dump_can_be_refused_at_its_end() {
        for lost in [false, true] {
            let (_, end) = read(lost, &[object(0), done(-22)]);
            assert_eq!(end.unwrap_err().errno(), Some(22));
        }
    }

    #[test]
    fn malformed_object_is_an_error_at_the_end() {
        let odd = message(OBJECT, 0, SEQUENCE, &[]);
        let (seen, end) = read(false, &[odd, object(0), done(0)]);
        assert_eq!((seen, end.unwrap_err().errno()), (2, None));
        let cut = object(0)[..18].to_vec();
        let (seen, end) = read(false, &[cut, object(0), done(0)]);
        assert_eq!((seen, end.unwrap_err().errno()), (1, None));
    }

    #[test]
    fn acknowledgement_that_is_lost_is_enobufs_of_one_request() {
        let mut take = |_: &Message<'_>| Ok(());
        let mut outcome = Outcome { lost: true, ..Outcome::default() };
        let mut answer = Answer::new(SEQUENCE, flag::ACK, &mut take);
        let other = message(NLMSG_ERROR, 0, SEQUENCE + 1, &[0; 20]);
        outcome.read(&other, &mut |message| answer.read(message));
        let error = answer.finish("ip rule add", outcome).unwrap_err();
        assert_eq!(error.errno(), Some(errno::ENOBUFS));
    }

    #[test]
    fn list_that_always_changes_is_given_up() {
        let mut left = 3;
        let mut list = |ends: bool| {
            in_one_piece(|| {
                left -= 1;
                Ok((left, Answered { interrupted: !ends || left > 0 }))
            })
        };
        assert_eq!(list(true), Ok(Some(0)));
        assert_eq!(list(false), Ok(None));
        assert_eq!(left, -5);
    }
}
