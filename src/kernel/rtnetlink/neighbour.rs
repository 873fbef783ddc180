//! Permanent neighbours of the VXLAN device.

use std::collections::BTreeMap;
use std::net::IpAddr;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::RouteProtocol;

use super::address::{is_link_local, kernel_family};
use super::link::mac;
use super::socket::{Request, RouteSocket};
use crate::error::KernelError;
use crate::state::PROTOCOL;
use crate::types::{Family, MacAddr};

pub(crate) fn message(index: u32, address: IpAddr) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = kernel_family(Family::of(address));
    message.header.ifindex = index;
    message.attributes = vec![NeighbourAttribute::Destination(address.into())];
    message
}

pub(crate) fn permanent(index: u32, address: IpAddr, mac: MacAddr) -> NeighbourMessage {
    let mut message = message(index, address);
    message.header.state = NeighbourState::Permanent;
    message.attributes.extend([
        NeighbourAttribute::LinkLayerAddress(mac.octets().to_vec()),
        NeighbourAttribute::Protocol(RouteProtocol::from(PROTOCOL)),
    ]);
    message
}

/// IP address in a neighbour or FDB entry.
///
/// In FDB entries it is raw bytes, because their address family is that of bridges.
pub(crate) fn destination(attributes: &[NeighbourAttribute]) -> Option<IpAddr> {
    attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) => Some((*address).into()),
        NeighbourAttribute::Destination(NeighbourAddress::Inet6(address)) => {
            Some((*address).into())
        }
        NeighbourAttribute::Destination(NeighbourAddress::Other(bytes)) => {
            <[u8; 4]>::try_from(bytes.as_slice())
                .map(IpAddr::from)
                .or_else(|_| <[u8; 16]>::try_from(bytes.as_slice()).map(IpAddr::from))
                .ok()
        }
        _ => None,
    })
}

/// MAC address in a neighbour or FDB entry.
pub(crate) fn lladdr(attributes: &[NeighbourAttribute]) -> Option<MacAddr> {
    attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::LinkLayerAddress(bytes) => mac(bytes),
        _ => None,
    })
}

pub(crate) fn parse(message: &NeighbourMessage) -> Option<(IpAddr, MacAddr)> {
    if message.header.state != NeighbourState::Permanent {
        return None;
    }
    let address = destination(&message.attributes)?;
    if address.is_multicast() || is_link_local(address) {
        return None;
    }
    Some((address, lladdr(&message.attributes)?))
}

/// Request that adds a permanent neighbour or changes its MAC address.
pub(crate) fn put(index: u32, address: IpAddr, mac: MacAddr) -> Request {
    let message = RouteNetlinkMessage::NewNeighbour(permanent(index, address, mac));
    Request { message, flags: NLM_F_CREATE | NLM_F_REPLACE }
}

/// Request that deletes a neighbour.
pub(crate) fn delete(index: u32, address: IpAddr) -> Request {
    Request { message: RouteNetlinkMessage::DelNeighbour(message(index, address)), flags: 0 }
}

impl RouteSocket {
    /// Permanent neighbours on this interface, without multicast and link-local ones.
    pub(crate) fn neighbours(
        &mut self,
        index: u32,
    ) -> Result<BTreeMap<IpAddr, MacAddr>, KernelError> {
        let what = format!("ip neigh show dev index {index} nud permanent");
        let mut found = BTreeMap::new();
        for family in Family::BOTH {
            let mut message = NeighbourMessage::default();
            message.header.family = kernel_family(family);
            message.attributes = vec![NeighbourAttribute::IfIndex(index)];
            let message = RouteNetlinkMessage::GetNeighbour(message);
            found.extend(self.dump(&what, &message, |message| match message {
                RouteNetlinkMessage::NewNeighbour(message)
                    if message.header.ifindex == index
                        && message.header.family == kernel_family(family) =>
                {
                    parse(&message)
                }
                _ => None,
            })?);
        }
        Ok(found)
    }
}
