//! FDB entries of the VXLAN device: the node that a frame is sent to, by MAC address.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};

use netlink_packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::neighbour::{
    NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::neighbour::{destination, lladdr};
use super::socket::{Request, RouteSocket};
use crate::error::KernelError;
use crate::types::MacAddr;

/// `NUD_NOARP | NUD_PERMANENT` of `linux/neighbour.h`, as `bridge` sends them.
const KEPT: u16 = 0xc0;

/// Destination of an FDB entry that does not lead to a node.
const NOWHERE: IpAddr = IpAddr::V4(Ipv4Addr::UNSPECIFIED);

pub(crate) fn message(index: u32, mac: MacAddr, node: IpAddr) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Bridge;
    message.header.ifindex = index;
    message.header.flags = NeighbourFlags::Own;
    message.header.state = NeighbourState::from(KEPT);
    message.attributes = vec![
        NeighbourAttribute::LinkLayerAddress(mac.octets().to_vec()),
        NeighbourAttribute::Destination(node.into()),
    ];
    message
}

/// MAC address and node of a permanent FDB entry.
///
/// An entry with any other destination than the tunnel port of a node has `NOWHERE` for its node:
/// the kernel reports port, VNI and interface only if they differ from those of the VXLAN device.
pub(crate) fn parse(message: &NeighbourMessage) -> Option<(MacAddr, IpAddr)> {
    let of_bridge = |attribute: &NeighbourAttribute| {
        // A bridge that the device is attached to keeps entries of its own for it.
        matches!(attribute, NeighbourAttribute::Controller(_))
    };
    let kept = u16::from(message.header.state) & KEPT != 0;
    if !kept || message.attributes.iter().any(of_bridge) {
        return None;
    }
    let mac = lladdr(&message.attributes)?;
    let astray = message.attributes.iter().any(|attribute| {
        matches!(
            attribute,
            NeighbourAttribute::Port(_)
                | NeighbourAttribute::Vni(_)
                | NeighbourAttribute::IfIndex(_)
        )
    });
    let node = destination(&message.attributes).filter(|_| !astray);
    Some((mac, node.unwrap_or(NOWHERE)))
}

/// Whether frames to this MAC address go to every destination of the entry.
///
/// That is so for the default entry (all zeros), which unknown addresses use, and for group
/// addresses.
fn is_for_many(mac: MacAddr) -> bool {
    mac.octets() == [0; 6] || !mac.is_unicast()
}

/// Request that adds an FDB entry or changes its destination.
pub(crate) fn put(index: u32, mac: MacAddr, node: IpAddr) -> Request {
    let message = RouteNetlinkMessage::NewNeighbour(message(index, mac, node));
    Request { message, flags: NLM_F_CREATE | NLM_F_REPLACE }
}

/// Request that deletes an FDB entry.
pub(crate) fn delete(index: u32, mac: MacAddr, node: IpAddr) -> Request {
    let mut message = message(index, mac, node);
    if node == NOWHERE || is_for_many(mac) {
        // A request without a destination deletes all destinations, of which such an entry may have
        // several.
        message.attributes.truncate(1);
    }
    Request { message: RouteNetlinkMessage::DelNeighbour(message), flags: 0 }
}

impl RouteSocket {
    /// FDB entries of the device with this index that do not age.
    pub(crate) fn fdb(&mut self, index: u32) -> Result<BTreeMap<MacAddr, IpAddr>, KernelError> {
        let what = format!("bridge fdb show dev index {index}");
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Bridge;
        message.attributes = vec![NeighbourAttribute::IfIndex(index)];
        let message = RouteNetlinkMessage::GetNeighbour(message);
        let entries = self.dump(&what, &message, |message| match message {
            RouteNetlinkMessage::NewNeighbour(message) if message.header.ifindex == index => {
                parse(&message)
            }
            _ => None,
        })?;
        Ok(entries.into_iter().collect())
    }
}
