//! Changes of the routing subsystem that are sent together, each with an answer of its own.

use std::io::ErrorKind;

use netlink_packet_core::{NLM_F_ACK, NLM_F_REQUEST};
use netlink_packet_route::RouteNetlinkMessage;

use super::socket::{RouteSocket, append};
use crate::diff::op::Op;
use crate::error::{KernelError, errno};
use crate::kernel::netlink::message::{Ack, Messages, NLMSG_ERROR};
use crate::kernel::netlink::socket::AT_ONCE;

/// A change; `flags` are those beside "request" and "acknowledge".
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) message: RouteNetlinkMessage,
    pub(crate) flags: u16,
}

/// Operations of one request each, in one datagram.
#[derive(Debug, Default)]
pub(crate) struct Run<'a> {
    datagram: Vec<u8>,
    asked: Vec<Asked<'a>>,
}

#[derive(Debug)]
struct Asked<'a> {
    place: usize,
    op: &'a Op,
    sequence: u32,
    answer: Option<Ack>,
}

impl<'a> Run<'a> {
    /// Appends the operation at this place among all, as the request with this number.
    pub(crate) fn push(&mut self, place: usize, op: &'a Op, request: Request, sequence: u32) {
        let flags = NLM_F_REQUEST | NLM_F_ACK | request.flags;
        append(&mut self.datagram, request.message, flags, sequence);
        self.asked.push(Asked { place, op, sequence, answer: None });
    }

    pub(crate) fn is_full(&self) -> bool {
        self.asked.len() >= AT_ONCE
    }

    /// The operations, in order.
    pub(crate) fn ops(&self) -> impl Iterator<Item = &'a Op> {
        self.asked.iter().map(|asked| asked.op)
    }

    /// Reads a datagram; says how many answers it had.
    ///
    /// What cannot be read answers nothing: its request stays without an answer.
    fn read(&mut self, datagram: &[u8]) -> usize {
        let mut answered = 0;
        for message in Messages::new(datagram).flatten().filter(|m| m.kind == NLMSG_ERROR) {
            let open = |asked: &&mut Asked<'_>| {
                asked.sequence == message.sequence && asked.answer.is_none()
            };
            let asked = self.asked.iter_mut().find(open);
            if let (Some(asked), Ok(answer)) = (asked, Ack::read(&message)) {
                asked.answer = Some(answer);
                answered += 1;
            }
        }
        answered
    }

    /// What was not acknowledged, and why; `lost` says why answers are missing.
    fn refused(self, lost: impl Fn(&Op) -> KernelError) -> Vec<(usize, &'a Op, KernelError)> {
        let refused = self.asked.into_iter().filter_map(|Asked { place, op, answer, .. }| {
            let error = match answer {
                Some(Ack { errno: 0, .. }) => return None,
                Some(ack) => KernelError::refused(op, ack.errno).with_words(ack.words),
                None => lost(op),
            };
            Some((place, op, error))
        });
        refused.collect()
    }
}

impl RouteSocket {
    /// Sends what was collected; says what was not acknowledged, each with its place and why.
    ///
    /// The kernel carries one request out after another, whatever became of those before it, and
    /// says of each how it went. One whose answer is lost may have been carried out.
    pub(crate) fn request_all<'a>(
        &mut self,
        mut run: Run<'a>,
    ) -> Vec<(usize, &'a Op, KernelError)> {
        let mut open = run.asked.len();
        if open == 0 {
            return Vec::new();
        }
        if let Err(error) = self.send(&run.datagram) {
            return run.refused(|op| KernelError::io(op, &error));
        }
        let mut failed = None;
        while open > 0 {
            match self.receive() {
                Ok(datagram) => open -= run.read(datagram),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => {
                    // An answer was lost; others may be there.
                    let more = error.raw_os_error() == Some(errno::ENOBUFS);
                    failed = Some(error);
                    if !more {
                        break;
                    }
                }
            }
        }
        run.refused(|op| match &failed {
            Some(error) => KernelError::io(op, error),
            None => KernelError::answer(op, "the kernel did not answer"),
        })
    }
}
