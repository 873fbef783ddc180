//! The nf_tables half of the kernel backend: our table as one transaction in, one state out.

pub(crate) mod batch;
pub(crate) mod chain;
mod commit;
mod element;
pub(crate) mod expr;
mod observe;
mod probe;
mod range;
mod resize;
mod set;
mod stmt;
mod table;
#[cfg(test)]
pub(crate) mod tests;

use std::io;

use super::netlink::message::{Ack, Malformed, Messages, NLMSG_DONE, NLMSG_ERROR, Writer, flag};
use super::netlink::socket::Socket;
use crate::diff::op::Op;
use crate::error::{KernelError, errno};
use crate::state::TableFamily;

pub(super) use batch::number as family_number;
#[cfg(test)]
pub(super) use commit::commit;
pub(super) use commit::{Between, Refused, Terms, commit_as};
#[cfg(test)]
pub(super) use observe::observe;
pub(super) use observe::{counts, observe_at, observe_hook};
pub(crate) use probe::{is_absent, missing};
pub(crate) use resize::{Sizes, enlarge, full};
pub(super) use table::{LASTING, adopt, flags_and_owner, has_owners, lock, locked_by};

/// `NETLINK_NETFILTER`.
pub(crate) const NETFILTER: isize = 12;

/// Message types (`enum nf_tables_msg_types` in subsystem 10), and those around a transaction.
pub(crate) mod kind {
    pub(super) const BEGIN: u16 = 0x10;
    pub(super) const END: u16 = 0x11;
    pub(super) const NEWTABLE: u16 = 0xa00;
    pub(super) const GETTABLE: u16 = 0xa01;
    pub(super) const DELTABLE: u16 = 0xa02;
    pub(crate) const NEWCHAIN: u16 = 0xa03;
    pub(crate) const GETCHAIN: u16 = 0xa04;
    pub(super) const DELCHAIN: u16 = 0xa05;
    pub(crate) const NEWRULE: u16 = 0xa06;
    pub(crate) const GETRULE: u16 = 0xa07;
    pub(super) const DELRULE: u16 = 0xa08;
    pub(super) const NEWSET: u16 = 0xa09;
    pub(super) const GETSET: u16 = 0xa0a;
    pub(super) const DELSET: u16 = 0xa0b;
    pub(super) const NEWSETELEM: u16 = 0xa0c;
    pub(super) const GETSETELEM: u16 = 0xa0d;
    pub(super) const DELSETELEM: u16 = 0xa0e;
    pub(super) const NEWGEN: u16 = 0xa0f;
    pub(super) const GETGEN: u16 = 0xa10;
}

const NO_NF_TABLES: &str = "load nf_tables or use a kernel with it (CONFIG_NF_TABLES)";

/// Opens a socket for [`observe`] and [`commit`].
pub(crate) fn open() -> Result<Socket, KernelError> {
    Socket::open(NETFILTER).map_err(|error| {
        let error = KernelError::io("open a netfilter socket", &error);
        match error.errno() {
            Some(errno::EPROTONOSUPPORT) => error.with_remedy(NO_NF_TABLES),
            _ => error,
        }
    })
}

/// What is asked of the kernel.
pub(crate) struct Request<'a> {
    /// As an operator would ask.
    pub(crate) text: &'a str,
    pub(crate) kind: u16,
    pub(crate) flags: u16,
    /// Type of the messages that answer.
    pub(crate) answer: u16,
}

/// How a request was answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Answered {
    /// Whether the kernel saw the objects change while it listed them.
    pub(crate) interrupted: bool,
}

/// Asks the kernel for something, and gives every message of the answer to `take`.
///
/// `take` gets the resource id, which is the low half of the rules' generation, and the
/// attributes.
fn ask(
    socket: &mut Socket,
    family: TableFamily,
    request: &Request<'_>,
    write: impl FnOnce(&mut Writer),
    take: impl FnMut(u16, &[u8]) -> Result<(), Malformed>,
) -> Result<Answered, KernelError> {
    let header = |writer: &mut Writer| {
        writer.nfgen(batch::number(family), 0);
        write(writer);
    };
    ask_any(socket, request, header, take)
}

/// The same of any subsystem: `write` begins with `struct nfgenmsg`.
pub(crate) fn ask_any(
    socket: &mut Socket,
    request: &Request<'_>,
    write: impl FnOnce(&mut Writer),
    mut take: impl FnMut(u16, &[u8]) -> Result<(), Malformed>,
) -> Result<Answered, KernelError> {
    let malformed = |malformed: Malformed| KernelError::answer(request.text, malformed.0);
    let failed = |error: io::Error| KernelError::io(request.text, &error);
    drain(socket);
    let sequence = socket.next_sequence();
    let mut writer = Writer::default();
    let flags = flag::REQUEST | flag::ACK | request.flags;
    let message = writer.message(request.kind, flags, sequence);
    write(&mut writer);
    writer.end(message);
    let datagram = writer.finish().ok_or(Malformed("a name is too long"));
    socket.send(&datagram.map_err(malformed)?).map_err(failed)?;

    let mut answered = Answered::default();
    loop {
        let datagram = match socket.receive() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                return Err(KernelError::answer(request.text, "the kernel's answer has no end"));
            }
            other => other.map_err(failed)?,
        };
        if read(datagram, request, sequence, &mut answered, &mut take)? {
            return Ok(answered);
        }
    }
}

/// Reads a datagram of the answer; whether it holds the end.
fn read(
    datagram: &[u8],
    request: &Request<'_>,
    sequence: u32,
    answered: &mut Answered,
    take: &mut impl FnMut(u16, &[u8]) -> Result<(), Malformed>,
) -> Result<bool, KernelError> {
    let malformed = |malformed: Malformed| KernelError::answer(request.text, malformed.0);
    for message in Messages::new(datagram) {
        let message = message.map_err(malformed)?;
        if message.sequence != sequence {
            continue;
        }
        answered.interrupted |= message.flags & flag::DUMP_INTR != 0 && is_listed(&message);
        if message.kind == NLMSG_ERROR || message.kind == NLMSG_DONE {
            let ack = Ack::read(&message).map_err(malformed)?;
            if ack.errno == 0 {
                return Ok(true);
            }
            let refused = KernelError::refused(request.text, ack.errno);
            return Err(refused.with_words(ack.words));
        }
        if message.kind == request.answer {
            let (resource, body) = message.nfgen().map_err(malformed)?;
            take(resource, body).map_err(malformed)?;
        }
    }
    Ok(false)
}

/// Whether the flags of a message are those of a dump; in an acknowledgement they mean other
/// things.
fn is_listed(message: &super::netlink::message::Message<'_>) -> bool {
    message.kind != NLMSG_ERROR
}

/// Takes what an earlier request that was given up left in the socket, also the rest of a list:
/// the kernel makes no second one before the first is read.
pub(super) fn drain(socket: &mut Socket) {
    while match socket.receive() {
        Ok(_) => true,
        Err(error) => matches!(error.raw_os_error(), Some(errno::ENOBUFS | errno::EINTR)),
    } {}
}

/// Asks for the generation of the rules and leaves the answer unread.
pub(super) fn ask_generation(socket: &mut Socket) -> io::Result<()> {
    let mut writer = Writer::default();
    let message = writer.message(kind::GETGEN, flag::REQUEST, socket.next_sequence());
    writer.nfgen(batch::number(TableFamily::Inet), 0);
    writer.end(message);
    writer.finish().map_or(Ok(()), |datagram| socket.send(&datagram))
}

/// The generation of the rules: the kernel counts transactions, of whomever.
pub(crate) fn generation(socket: &mut Socket) -> Result<u32, KernelError> {
    let request = Request {
        text: "read the generation of nf_tables",
        kind: kind::GETGEN,
        flags: 0,
        answer: kind::NEWGEN,
    };
    let mut generation = None;
    let take = |_, body: &[u8]| {
        for attribute in super::netlink::message::Attributes::new(body) {
            let attribute = attribute?;
            if attribute.kind == 1 {
                generation = Some(attribute.be32()?);
            }
        }
        Ok(())
    };
    let answered = ask(socket, TableFamily::Inet, &request, |_| {}, take);
    answered.map_err(|error| match error.errno() {
        Some(errno::EINVAL | errno::EOPNOTSUPP | errno::EPROTONOSUPPORT) => {
            error.with_remedy(NO_NF_TABLES)
        }
        _ => error,
    })?;
    generation.ok_or_else(|| KernelError::answer(request.text, "the answer has no generation"))
}

/// Whether the operation is one of those that [`commit`] makes.
fn position(ops: &[Op]) -> Option<usize> {
    ops.iter().position(Op::is_nft)
}
