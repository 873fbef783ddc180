//! Routes and rules with our protocol number that this crate did not write.

use std::fmt::Display;

use netlink_packet_core::{NetlinkDeserializable, NetlinkHeader};
use netlink_packet_route::RouteNetlinkMessage;

use super::socket::Request;
use crate::error::{KernelError, errno};
use crate::state::{StrayKind, StrayRouting};

// From `linux/rtnetlink.h`.
const RTM_DELROUTE: u16 = 25;
const RTM_DELRULE: u16 = 33;

/// Request that deletes a route or a rule by all attributes that the kernel reported.
pub(crate) fn delete(what: &dyn Display, stray: &StrayRouting) -> Result<Request, KernelError> {
    let mut header = NetlinkHeader::default();
    header.message_type = match stray.kind {
        StrayKind::Route => RTM_DELROUTE,
        StrayKind::Rule => RTM_DELRULE,
    };
    let message = RouteNetlinkMessage::deserialize(&header, &stray.message)
        .map_err(|_| KernelError::answer(what, "it cannot be distinguished from other objects"))?;
    Ok(Request { message, flags: 0 })
}

/// Whether the object was already gone, as after the removal of its interface.
pub(crate) fn is_gone(error: &KernelError) -> bool {
    matches!(error.errno(), Some(errno::ESRCH | errno::ENOENT))
}
