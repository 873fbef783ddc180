//! Routes and rules that have our protocol number and are not of our making.

use std::fmt::Display;

use netlink_packet_core::{NetlinkDeserializable, NetlinkHeader};
use netlink_packet_route::RouteNetlinkMessage;

use super::route_socket::RouteSocket;
use crate::error::{KernelError, errno};
use crate::state::{StrayKind, StrayRouting};

// Of `linux/rtnetlink.h`.
const RTM_DELROUTE: u16 = 25;
const RTM_DELRULE: u16 = 33;

impl RouteSocket {
    /// Deletes a route or a rule by all that the kernel told of it.
    pub(super) fn delete_stray(
        &mut self,
        what: &dyn Display,
        stray: &StrayRouting,
    ) -> Result<(), KernelError> {
        let mut header = NetlinkHeader::default();
        header.message_type = match stray.kind {
            StrayKind::Route => RTM_DELROUTE,
            StrayKind::Rule => RTM_DELRULE,
        };
        let message = RouteNetlinkMessage::deserialize(&header, &stray.message)
            .map_err(|_| KernelError::answer(what, "it cannot be told from others"))?;
        match self.request(what, message, 0) {
            // It went with its device.
            Err(error) if matches!(error.errno(), Some(errno::ESRCH | errno::ENOENT)) => Ok(()),
            done => done,
        }
    }
}
