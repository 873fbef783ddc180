//! Flags and owner of the nf_tables table.

use std::ops::ControlFlow;

use super::generation::ask;
use super::{batch, kind};
use crate::error::{KernelError, errno};
use crate::kernel::netlink::exchange::{acknowledgements, unanswered};
use crate::kernel::netlink::message::{Ack, Attributes, Malformed, Writer, flag};
use crate::kernel::netlink::nfnetlink::Request;
use crate::kernel::netlink::socket::Socket;
use crate::state::{NFT_TABLE, TableFamily};

const NAME: u16 = 1;
const FLAGS: u16 = 2;
const USERDATA: u16 = 6;
const OWNER: u16 = 7;

/// `NFTNL_UDATA_TABLE_COMMENT` (libnftnl): the text that `nft` prints as the table's comment.
const COMMENT: u8 = 0;

/// Comment of the lock table, before the PID of its owner.
const HELD_BY: &str = "process ";

/// `NFT_TABLE_F_DORMANT`: the kernel evaluates no chain of the table.
pub(super) const DORMANT: u32 = 1;

/// `NFT_TABLE_F_OWNER`: only the socket that created the table may change it.
///
/// Without another flag the kernel deletes the table when the socket is closed.
const OWNED: u32 = 2;

/// `NFT_TABLE_F_OWNER | NFT_TABLE_F_PERSIST` (`include/uapi/linux/netfilter/nf_tables.h`).
///
/// Without the second flag the kernel would delete the table, and the guards with it, when its
/// owner dies.
pub(crate) const LASTING: u32 = OWNED | 4;

/// Name of the lock table: its owner has exclusive ownership of our table, which may not exist yet.
const LOCK: &str = "egress_datapath_lock";

/// Name of a table that is never created.
const PROBE: &str = "egress_datapath_probe";

/// Flags of our table, and the port of its owner's socket; `None` if there is no table.
pub(crate) fn flags_and_owner(
    socket: &mut Socket,
    family: TableFamily,
) -> Result<Option<(u32, Option<u32>)>, KernelError> {
    Ok(found(socket, family, NFT_TABLE)?.map(|table| (table.flags, table.owner)))
}

/// Creates the lock table, which the kernel deletes with this socket.
///
/// `false` if the kernel does not support table owners.
pub(crate) fn lock(socket: &mut Socket) -> Result<bool, KernelError> {
    if !takes_flags(socket, OWNED)? {
        return Ok(false);
    }
    let comment = format!("{HELD_BY}{}", std::process::id());
    let text = "lock the nf_tables table";
    table(socket, text, (TableFamily::Inet, LOCK), OWNED, Some(&comment), true)?;
    Ok(true)
}

/// Process that holds the lock, as it says; `None` if it is not locked.
///
/// If it says nothing, the port of its socket.
pub(crate) fn locked_by(socket: &mut Socket) -> Result<Option<u32>, KernelError> {
    match found(socket, TableFamily::Inet, LOCK) {
        Ok(table) => Ok(table.and_then(|table| table.holder.or(table.owner))),
        // Without nf_tables no process can hold the lock.
        Err(error) if super::generation::is_absent(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// A table as the kernel lists it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Listed {
    pub(super) flags: u32,
    /// Port of the owner's socket.
    owner: Option<u32>,
    /// PID in the comment of the lock table.
    holder: Option<u32>,
}

/// Reads a table; `None` if there is none.
fn found(
    socket: &mut Socket,
    family: TableFamily,
    name: &str,
) -> Result<Option<Listed>, KernelError> {
    let request = Request {
        text: &format!("nft list table {family} {name}"),
        kind: kind::GETTABLE,
        flags: 0,
        answer: kind::NEWTABLE,
    };
    let mut found = Listed::default();
    let take = |_, body: &[u8]| {
        found = read(Attributes::new(body))?;
        Ok(())
    };
    match ask(socket, family, &request, |writer| writer.string(NAME, name), take) {
        Ok(_) => Ok(Some(found)),
        Err(error) if error.errno() == Some(errno::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Decodes a dumped table.
pub(super) fn read(attributes: Attributes<'_>) -> Result<Listed, Malformed> {
    let mut listed = Listed::default();
    for attribute in attributes {
        let attribute = attribute?;
        match attribute.kind {
            FLAGS => listed.flags = attribute.be32()?,
            USERDATA => listed.holder = holder(attribute.bytes()),
            OWNER => listed.owner = Some(attribute.be32()?),
            _ => {}
        }
    }
    Ok(listed)
}

/// PID in the user data of the lock table: type, length, and text with a final NUL.
fn holder(userdata: &[u8]) -> Option<u32> {
    let [COMMENT, _, text @ ..] = userdata else { return None };
    let text = std::str::from_utf8(text).ok()?.strip_suffix('\0')?;
    text.strip_prefix(HELD_BY)?.parse().ok()
}

/// Whether the kernel supports tables that persist without their owner.
pub(crate) fn has_owners(socket: &mut Socket) -> Result<bool, KernelError> {
    takes_flags(socket, LASTING)
}

/// Whether the kernel accepts these table flags.
fn takes_flags(socket: &mut Socket, flags: u32) -> Result<bool, KernelError> {
    // A transaction without an end is checked and acknowledged, but never committed.
    let text = "nft -c add table with an owner";
    match table(socket, text, (TableFamily::Inet, PROBE), flags, None, false) {
        Ok(()) => Ok(true),
        Err(error) if matches!(error.errno(), Some(errno::EOPNOTSUPP | errno::EINVAL)) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Takes ownership of a table that has lost its owner.
pub(crate) fn adopt(
    socket: &mut Socket,
    family: TableFamily,
    flags: u32,
) -> Result<(), KernelError> {
    table(socket, "take over the nf_tables table", (family, NFT_TABLE), flags, None, true)
}

fn table(
    socket: &mut Socket,
    text: &str,
    (family, name): (TableFamily, &str),
    flags: u32,
    comment: Option<&str>,
    end: bool,
) -> Result<(), KernelError> {
    let mut writer = Writer::default();
    edge(&mut writer, kind::BEGIN, socket.next_sequence());
    let message = writer.message(kind::NEWTABLE, flag::REQUEST | flag::ACK, socket.next_sequence());
    writer.nfgen(batch::number(family), 0);
    writer.string(NAME, name);
    writer.be32(FLAGS, flags);
    if let Some(comment) = comment {
        let length = u8::try_from(comment.len() + 1).unwrap_or(u8::MAX);
        writer.attribute(USERDATA, &[&[COMMENT, length], comment.as_bytes(), &[0]].concat());
    }
    writer.end(message);
    if end {
        edge(&mut writer, kind::END, socket.next_sequence());
    }
    let datagram = writer.finish().ok_or_else(|| KernelError::answer(text, "it does not fit"))?;
    let mut answer = None;
    let outcome = acknowledgements(socket, &datagram, &mut |_, ack| {
        answer = answer.take().filter(|first: &Ack| first.errno != 0).or(Some(ack));
        ControlFlow::Continue(())
    });
    let outcome = outcome.map_err(|error| KernelError::io(text, &error))?;
    match answer {
        Some(ack) if ack.errno != 0 => {
            Err(KernelError::refused(text, ack.errno).with_words(ack.words))
        }
        acknowledged => {
            outcome.complete(text)?;
            acknowledged.map(drop).ok_or_else(|| unanswered(text))
        }
    }
}

/// Writes the first or the last message of a transaction.
fn edge(writer: &mut Writer, kind: u16, sequence: u32) {
    let message = writer.message(kind, flag::REQUEST, sequence);
    writer.nfgen(0, batch::NF_TABLES);
    writer.end(message);
}
