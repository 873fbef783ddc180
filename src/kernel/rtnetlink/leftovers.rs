//! Routes and rules that have our protocol number and are not of our making.

use std::fmt::Display;

use netlink_packet_core::{NetlinkDeserializable, NetlinkHeader};
use netlink_packet_route::RouteNetlinkMessage;

use super::socket::Request;
use crate::error::{KernelError, errno};
use crate::state::{StrayKind, StrayRouting};

// Of `linux/rtnetlink.h`.
const RTM_DELROUTE: u16 = 25;
const RTM_DELRULE: u16 = 33;

/// Deletes a route or a rule by all that the kernel told of it.
pub(crate) fn delete(what: &dyn Display, stray: &StrayRouting) -> Result<Request, KernelError> {
    let mut header = NetlinkHeader::default();
    header.message_type = match stray.kind {
        StrayKind::Route => RTM_DELROUTE,
        StrayKind::Rule => RTM_DELRULE,
    };
    let message = RouteNetlinkMessage::deserialize(&header, &stray.message)
        .map_err(|_| KernelError::answer(what, "it cannot be told from others"))?;
    Ok(Request { message, flags: 0 })
}

/// Whether it was not there to be deleted: it went with its device.
pub(crate) fn is_gone(error: &KernelError) -> bool {
    matches!(error.errno(), Some(errno::ESRCH | errno::ENOENT))
}
