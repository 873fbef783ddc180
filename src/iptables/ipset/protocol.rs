//! The ipset netlink protocol: message types, attributes and the common part of requests.
//!
//! Source of the numbers: `include/uapi/linux/netfilter/ipset/ip_set.h`.

use super::error::explained;
use crate::error::KernelError;
use crate::kernel::netlink::exchange::{Answer, Answered, exchange};
use crate::kernel::netlink::message::{Attribute, Attributes, HEADER, Malformed, Message, Writer};
use crate::kernel::netlink::nfnetlink;
use crate::kernel::netlink::nfnetlink::Request;
use crate::kernel::netlink::socket::Socket;
use crate::types::Family;

/// Commands: message types of netlink subsystem 6 (`NFNL_SUBSYS_IPSET`).
pub(super) mod kind {
    const SUBSYSTEM: u16 = 6 << 8;
    pub(crate) const PROTOCOL: u16 = SUBSYSTEM + 1;
    pub(crate) const CREATE: u16 = SUBSYSTEM + 2;
    pub(crate) const DESTROY: u16 = SUBSYSTEM + 3;
    pub(crate) const RENAME: u16 = SUBSYSTEM + 5;
    pub(crate) const SWAP: u16 = SUBSYSTEM + 6;
    pub(crate) const LIST: u16 = SUBSYSTEM + 7;
    pub(crate) const ADD: u16 = SUBSYSTEM + 9;
    pub(crate) const DELETE: u16 = SUBSYSTEM + 10;
    pub(crate) const HEADER: u16 = SUBSYSTEM + 12;
    pub(crate) const TYPE: u16 = SUBSYSTEM + 13;
}

/// Attributes of a command.
pub(super) mod attribute {
    pub(crate) const PROTOCOL: u16 = 1;
    pub(crate) const SETNAME: u16 = 2;
    /// Also the second set name of commands with two names (rename, swap).
    pub(crate) const TYPENAME: u16 = 3;
    pub(crate) const REVISION: u16 = 4;
    pub(crate) const FAMILY: u16 = 5;
    pub(crate) const FLAGS: u16 = 6;
    pub(crate) const DATA: u16 = 7;
    pub(crate) const MEMBERS: u16 = 8;
    /// Number of a member, and in the refused request of the refused member.
    pub(crate) const LINE: u16 = 9;
    pub(crate) const PROTOCOL_MIN: u16 = 10;
}

/// Attributes inside `DATA`: of a set that is created or listed, and of a member.
pub(super) mod data {
    pub(crate) const IP: u16 = 1;
    pub(crate) const CIDR: u16 = 3;
    pub(crate) const FLAGS: u16 = 8;
    pub(crate) const HASH_SIZE: u16 = 18;
    pub(crate) const MAX_ELEMENTS: u16 = 19;
    pub(crate) const MARK: u16 = 27;
}

/// Bits of `data::FLAGS`.
pub(super) const NOMATCH: u32 = 4;
pub(super) const WITH_MARKS: u32 = 64;

/// The set type that this crate uses.
pub(super) const HASH_NET: &str = "hash:net";

/// The protocol version of the kernel since 4.20.
pub(super) const PROTOCOL: u8 = 7;
/// The oldest protocol version that the kernel still accepts.
pub(super) const OLDEST: u8 = 6;

/// `NLA_F_NET_BYTEORDER`, without which ipset refuses a number.
pub(super) const NETWORK_ORDER: u16 = 0x4000;

pub(super) const NFPROTO_IPV4: u8 = 2;
pub(super) const NFPROTO_IPV6: u8 = 10;

pub(super) const fn nfproto(family: Family) -> u8 {
    match family {
        Family::V4 => NFPROTO_IPV4,
        Family::V6 => NFPROTO_IPV6,
    }
}

/// Sends a request and reads the answer; ipset error numbers are explained.
pub(super) fn ask(
    socket: &mut Socket,
    request: &Request<'_>,
    protocol: u8,
    write: impl FnOnce(&mut Writer),
    mut take: impl FnMut(&[u8]) -> Result<(), Malformed>,
) -> Result<Answered, KernelError> {
    let payload = |writer: &mut Writer| payload(writer, protocol, write);
    nfnetlink::ask(socket, request, payload, |_, body| take(body)).map_err(explained)
}

fn payload(writer: &mut Writer, protocol: u8, write: impl FnOnce(&mut Writer)) {
    writer.nfgen(NFPROTO_IPV4, 0);
    writer.attribute(attribute::PROTOCOL, &[protocol]);
    write(writer);
}

/// Refusal of a request with several members.
#[derive(Debug)]
pub(super) struct Refused {
    /// Index of the refused member, if the kernel named one: those before it were carried out.
    pub(super) member: Option<usize>,
    pub(super) error: KernelError,
}

/// Sends a request whose members may be numbered from 1 on, each by its `LINE`.
///
/// The kernel ends at the first member that it refuses. It returns the whole request then, with
/// the number of that member as `LINE` of the request (`call_ad` in
/// `net/netfilter/ipset/ip_set_core.c`).
pub(super) fn ask_about_members(
    socket: &mut Socket,
    request: &Request<'_>,
    protocol: u8,
    write: impl FnOnce(&mut Writer),
) -> Result<(), Refused> {
    let payload = |writer: &mut Writer| payload(writer, protocol, write);
    let whole = |error| Refused { member: None, error };
    let (datagram, (sequence, flags)) =
        nfnetlink::encode(socket, request, payload).map_err(whole)?;
    let mut ignore = |_: &Message<'_>| Ok(());
    let mut answer = Answer::new(sequence, flags, &mut ignore);
    let mut line = 0;
    let outcome = exchange(socket, &datagram, &mut |message| {
        let read = answer.read(message);
        if read.is_break() {
            line = line_of(message).unwrap_or(0);
        }
        read
    });
    let finished = outcome
        .map_err(|error| KernelError::io(request.text, &error))
        .and_then(|outcome| answer.finish(request.text, outcome));
    let member = usize::try_from(line).ok().and_then(|line| line.checked_sub(1));
    finished.map(drop).map_err(|error| Refused { member, error: explained(error) })
}

/// The `LINE` of the request that an acknowledgement returns.
fn line_of(message: &Message<'_>) -> Option<u32> {
    // The error number, then the header of the request and its `struct nfgenmsg`.
    let attributes = Attributes::new(message.payload().get(4 + HEADER + 4..)?);
    let line = attributes.map_while(Result::ok).find(|found| found.kind == attribute::LINE)?;
    line.be32().ok()
}

pub(super) fn byte(found: &Attribute<'_>) -> Result<u8, Malformed> {
    match found.bytes() {
        [byte] => Ok(*byte),
        _ => Err(Malformed("a number has a wrong length")),
    }
}
