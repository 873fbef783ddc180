//! Fault injection for one socket.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::time::Instant;

use super::datagram::{
    aborted, each, netfilter_call, refused, routing_call, torn, whole, without_end,
};
use crate::error::errno;
use crate::faults::{Call, Fault, Faults, Subsystem};

/// Fault plan applied to the messages of one socket.
#[derive(Debug)]
pub(crate) struct Tap {
    faults: Faults,
    call: fn(&[u8]) -> Call,
    /// Splits a datagram into the parts that count as separate calls.
    parts: fn(&[u8]) -> Vec<Range<usize>>,
    made_up: Vec<u8>,
    /// Fault for the first datagram of the reply to each of the last calls.
    damage: VecDeque<Option<Damage>>,
}

/// Fault of a received datagram.
#[derive(Debug)]
enum Damage {
    Lost,
    Torn,
    Cut,
}

impl Tap {
    pub(crate) const fn of_routing(faults: Faults) -> Self {
        Self::new(faults, routing_call, each)
    }

    pub(crate) const fn of_netfilter(faults: Faults) -> Self {
        Self::new(faults, netfilter_call, whole)
    }

    const fn new(
        faults: Faults,
        call: fn(&[u8]) -> Call,
        parts: fn(&[u8]) -> Vec<Range<usize>>,
    ) -> Self {
        Self { faults, call, parts, made_up: Vec::new(), damage: VecDeque::new() }
    }

    /// Sends a datagram, with the faults that the plan has for its parts.
    ///
    /// The kernel carries out one part after another, so that a fault can lie between two of them.
    /// If the datagram is not sent, no part of it is.
    pub(crate) fn send(
        &mut self,
        datagram: &[u8],
        port: u32,
        send: impl Fn(&[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        self.made_up.clear();
        self.damage.clear();
        let (of_all, faults) = ((self.call)(datagram), self.faults.clone());
        let send = |requests: &[u8]| {
            let begin = Instant::now();
            let done = if requests.is_empty() { Ok(()) } else { send(requests) };
            faults.sent(of_all, begin.elapsed());
            done
        };
        let bytes = |range: Range<usize>| datagram.get(range).unwrap_or_default();
        // Start of the part of the datagram that was not sent yet.
        let mut rest = 0;
        for Range { start, end } in (self.parts)(datagram) {
            let request = bytes(start..end);
            let call = (self.call)(request);
            let mut damage = None;
            match self.faults.next(call) {
                None => {}
                Some(Fault::Errno(errno)) => return Err(io::Error::from_raw_os_error(errno)),
                Some(Fault::Refuse(errno)) => {
                    send(bytes(rest..start))?;
                    rest = end;
                    let transaction = call.writes && call.subsystem == Subsystem::Firewall;
                    let refused = if transaction { aborted } else { refused };
                    self.made_up.extend(refused(request, errno, port));
                    continue;
                }
                Some(Fault::AckWithoutCommit) => return send(without_end(request)),
                Some(Fault::LoseReply) => damage = Some(Damage::Lost),
                Some(Fault::TornDump) => damage = Some(Damage::Torn),
                Some(Fault::CutReply) => damage = Some(Damage::Cut),
                Some(Fault::ForeignWrite(write)) => {
                    send(bytes(rest..start))?;
                    rest = start;
                    write();
                }
                Some(Fault::KillBefore) => {
                    let _gone_anyway = send(bytes(rest..start));
                    kill();
                }
                Some(Fault::KillAfter) => {
                    let _gone_anyway = send(bytes(rest..end));
                    kill();
                }
            }
            self.damage.push_back(damage);
        }
        send(bytes(rest..datagram.len()))
    }

    /// Injected reply that does not come from the kernel.
    pub(crate) fn made_up(&mut self) -> Option<Vec<u8>> {
        (!self.made_up.is_empty()).then(|| std::mem::take(&mut self.made_up))
    }

    /// Applies the planned fault to a reply of the kernel.
    pub(crate) fn damage(&mut self, datagram: &mut Vec<u8>) -> io::Result<()> {
        match self.damage.pop_front().flatten() {
            None => {}
            Some(Damage::Lost) => return Err(io::Error::from_raw_os_error(errno::ENOBUFS)),
            Some(Damage::Torn) => torn(datagram),
            Some(Damage::Cut) => datagram.truncate(datagram.len() / 2),
        }
        Ok(())
    }
}

pub(crate) fn kill() {
    use rustix::process::{Signal, getpid, kill_process};
    let _never_returns = kill_process(getpid(), Signal::KILL);
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::kernel::netlink::message::{Ack, Messages, Writer, flag};

    /// `RTM_NEWROUTE`.
    const ADD: u16 = 24;

    /// Requests with these sequence numbers.
    fn datagram(sequences: &[u32]) -> Vec<u8> {
        let mut writer = Writer::default();
        for sequence in sequences {
            let message = writer.message(ADD, flag::REQUEST | flag::ACK, *sequence);
            writer.raw(&[0; 12]);
            writer.end(message);
        }
        writer.finish().unwrap()
    }

    fn sequences(datagram: &[u8]) -> Vec<u32> {
        Messages::new(datagram).map(|message| message.unwrap().sequence).collect()
    }

    /// Sends three requests with a fault at the second.
    ///
    /// Returns the datagrams that were sent, the result, and the tap.
    fn send(faults: Faults) -> (Vec<Vec<u32>>, io::Result<()>, Tap) {
        let sent = RefCell::new(Vec::new());
        let mut tap = Tap::of_routing(faults);
        let done = tap.send(&datagram(&[1, 2, 3]), 7, |part| {
            sent.borrow_mut().push(sequences(part));
            Ok(())
        });
        (sent.into_inner(), done, tap)
    }

    #[test]
    fn each_request_of_a_datagram_is_a_call() {
        let faults = Faults::new();
        let (sent, done, _) = send(faults.clone());
        assert_eq!((sent, done.is_ok()), (vec![vec![1, 2, 3]], true));
        assert_eq!(faults.writes(), 3);
    }

    #[test]
    fn one_request_of_many_is_refused_and_does_not_reach_the_kernel() {
        let (sent, done, mut tap) = send(Faults::new().at_write(1, Fault::Refuse(17)));
        assert_eq!((sent, done.is_ok()), (vec![vec![1], vec![3]], true));
        let answer = tap.made_up().unwrap();
        let answers = Messages::new(&answer).map(Result::unwrap);
        let answers: Vec<_> = answers.map(|m| (m.sequence, Ack::read(&m).unwrap().errno)).collect();
        assert_eq!(answers, [(2, 17)]);
        assert!(tap.made_up().is_none());
    }

    #[test]
    fn a_datagram_that_is_not_sent_is_not_sent_in_part() {
        let (sent, done, _) = send(Faults::new().at_write(1, Fault::Errno(105)));
        assert_eq!((sent.len(), done.unwrap_err().raw_os_error()), (0, Some(105)));
    }

    #[test]
    fn the_answer_to_one_request_of_many_is_damaged() {
        for (fault, lengths) in [
            (Fault::LoseReply, [Some(36), None, Some(36)]),
            (Fault::CutReply, [Some(36), Some(18), Some(36)]),
        ] {
            let (sent, _, mut tap) = send(Faults::new().at_write(1, fault));
            assert_eq!(sent, [[1, 2, 3]]);
            let received = lengths.map(|_| {
                let mut answer = vec![0; 36];
                tap.damage(&mut answer).ok().map(|()| answer.len())
            });
            assert_eq!(received, lengths);
        }
    }

    #[test]
    fn somebody_else_writes_between_two_requests() {
        let log = Arc::new(Mutex::new(Vec::new()));
        let theirs = Arc::clone(&log);
        let write = Fault::ForeignWrite(Box::new(move || theirs.lock().unwrap().push(vec![])));
        let mut tap = Tap::of_routing(Faults::new().at_write(1, write));
        let send = |part: &[u8]| {
            log.lock().unwrap().push(sequences(part));
            Ok(())
        };
        tap.send(&datagram(&[1, 2, 3]), 7, send).unwrap();
        assert_eq!(*log.lock().unwrap(), [vec![1], vec![], vec![2, 3]]);
    }
}
