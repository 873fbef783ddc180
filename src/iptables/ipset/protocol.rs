//! The ipset netlink protocol: message types, attributes and the common part of requests.
//!
//! Source of the numbers: `include/uapi/linux/netfilter/ipset/ip_set.h`.

use super::error::explained;
use crate::error::KernelError;
use crate::kernel::netlink::exchange::Answered;
use crate::kernel::netlink::message::{Attribute, Malformed, Writer};
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
    let header = |writer: &mut Writer| {
        writer.nfgen(NFPROTO_IPV4, 0);
        writer.attribute(attribute::PROTOCOL, &[protocol]);
        write(writer);
    };
    nfnetlink::ask(socket, request, header, |_, body| take(body)).map_err(explained)
}

pub(super) fn byte(found: &Attribute<'_>) -> Result<u8, Malformed> {
    match found.bytes() {
        [byte] => Ok(*byte),
        _ => Err(Malformed("a number has a wrong length")),
    }
}
