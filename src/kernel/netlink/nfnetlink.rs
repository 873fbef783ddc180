//! Requests to netfilter subsystems (`include/uapi/linux/netfilter/nfnetlink.h`).

use super::exchange::{self, Answered};
use super::message::{Malformed, Message, Writer, flag};
pub(crate) use super::socket::NETFILTER;
use super::socket::Socket;
use crate::error::KernelError;

/// Request with an acknowledgement.
pub(crate) struct Request<'a> {
    /// Equivalent command of an operator.
    pub(crate) text: &'a str,
    pub(crate) kind: u16,
    pub(crate) flags: u16,
    /// Message type of the replies.
    pub(crate) answer: u16,
}

/// Sends a request and passes each message of the reply to `take`.
///
/// `take` gets the resource id, which in nf_tables is the low half of the ruleset generation, and
/// the attributes. `write` writes the request's payload, which starts with `struct nfgenmsg`.
pub(crate) fn ask(
    socket: &mut Socket,
    request: &Request<'_>,
    write: impl FnOnce(&mut Writer),
    mut take: impl FnMut(u16, &[u8]) -> Result<(), Malformed>,
) -> Result<Answered, KernelError> {
    let (datagram, of) = encode(socket, request, write)?;
    let mut take = |message: &Message<'_>| body(message, request, &mut take);
    exchange::ask(socket, &request.text, &datagram, of, &mut take)
}

/// Encodes a request; returns its datagram, sequence number and flags.
pub(crate) fn encode(
    socket: &mut Socket,
    request: &Request<'_>,
    write: impl FnOnce(&mut Writer),
) -> Result<(Vec<u8>, (u32, u16)), KernelError> {
    let sequence = socket.next_sequence();
    let mut writer = Writer::default();
    let flags = flag::REQUEST | flag::ACK | request.flags;
    let message = writer.message(request.kind, flags, sequence);
    write(&mut writer);
    writer.end(message);
    let datagram = writer.finish();
    let datagram =
        datagram.ok_or_else(|| KernelError::answer(request.text, "a name is too long"))?;
    Ok((datagram, (sequence, flags)))
}

/// Passes the message to `take` if it has the message type of the reply.
pub(crate) fn body(
    message: &Message<'_>,
    request: &Request<'_>,
    take: &mut impl FnMut(u16, &[u8]) -> Result<(), Malformed>,
) -> Result<(), Malformed> {
    if message.kind != request.answer {
        return Ok(());
    }
    let (resource, body) = message.nfgen()?;
    take(resource, body)
}
