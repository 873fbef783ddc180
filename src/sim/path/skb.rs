//! A packet in the kernel with its metadata, and the fields that rules load from it.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::sim::packet::Packet;
use crate::state::{Direction, Field, Mask, Selector, Stmt};
use crate::types::{DeviceName, Family, MacAddr};

/// A packet in the kernel (`struct sk_buff`).
#[derive(Clone, Debug)]
pub(crate) struct Skb {
    pub(crate) packet: Packet,
    pub(crate) mark: u32,
    pub(crate) priority: u32,
    /// The VXLAN device if it is the input interface; other interfaces are not distinguished.
    pub(crate) input: Option<DeviceName>,
    /// The VXLAN device if it is the output interface.
    pub(crate) output: Option<DeviceName>,
    /// Whether the output interface is known.
    pub(crate) routed: bool,
    /// Destination MAC address, once the packet is a frame.
    pub(crate) ethernet: Option<MacAddr>,
    /// Source MAC address of the frame from the tunnel that the packet came in.
    pub(crate) ethernet_source: Option<MacAddr>,
    pub(crate) tracking: Tracking,
    /// Wildcard flag of the socket that takes the packet: bound to no address; `None` without one.
    pub(crate) wildcard: Option<bool>,
    /// Whether the destination is an address of the host.
    pub(crate) local: bool,
}

/// Conntrack state of a packet.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Tracking {
    /// Conntrack cannot assign the packet to a connection.
    Invalid,
    /// A `notrack` rule exempts the packet from tracking.
    Untracked,
    /// The packet belongs to a connection.
    Seen(Facts),
}

/// The properties of a connection that rules match.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Facts {
    pub(crate) direction: Direction,
    /// Whether a reply has been seen.
    pub(crate) established: bool,
    pub(crate) mark: u32,
    /// Whether the source is translated.
    pub(crate) translated: bool,
    /// Whether an earlier packet of the connection has passed.
    pub(crate) confirmed: bool,
}

impl Skb {
    pub(crate) const fn new(packet: Packet, tracking: Tracking) -> Self {
        Self {
            packet,
            mark: 0,
            priority: 0,
            input: None,
            output: None,
            routed: false,
            ethernet: None,
            ethernet_source: None,
            tracking,
            wildcard: None,
            local: false,
        }
    }

    pub(crate) const fn facts_mut(&mut self) -> Option<&mut Facts> {
        match &mut self.tracking {
            Tracking::Invalid | Tracking::Untracked => None,
            Tracking::Seen(facts) => Some(facts),
        }
    }
}

impl Tracking {
    /// The state of the first packet of a connection.
    pub(crate) const fn fresh() -> Self {
        let direction = Direction::Original;
        let (established, translated, confirmed) = (false, false, false);
        Self::Seen(Facts { direction, established, mark: 0, translated, confirmed })
    }

    /// The bit of `ct state` that is set.
    pub(crate) const fn state(self) -> u32 {
        match self {
            Self::Invalid => Stmt::INVALID,
            Self::Untracked => Stmt::UNTRACKED,
            Self::Seen(Facts { established: false, .. }) => Stmt::NEW,
            // `ct state established` is the second bit.
            Self::Seen(_) => 2,
        }
    }

    pub(crate) const fn facts(&self) -> Option<&Facts> {
        match self {
            Self::Invalid | Self::Untracked => None,
            Self::Seen(facts) => Some(facts),
        }
    }
}

/// A value loaded from a packet.
#[derive(Clone, Copy, Debug)]
pub(super) enum Loaded {
    Number(u32),
    Address(IpAddr),
    Mac(MacAddr),
}

/// Loads a selector's value; `None` if the packet has no such field, which ends the rule.
pub(super) fn load(Selector { field, mask }: Selector, skb: &Skb) -> Option<Loaded> {
    let Packet { source, destination, protocol, source_port, destination_port, .. } = skb.packet;
    let facts = skb.tracking.facts();
    let number = match field {
        Field::Source(family) | Field::Destination(family) => {
            let of_source = matches!(field, Field::Source(_));
            let address = if of_source { source } else { destination };
            let address = Some(address).filter(|address| Family::of(*address) == family)?;
            return Some(Loaded::Address(match mask {
                Mask::Prefix(length) => IpNet::new(address, length).ok()?.network(),
                Mask::Whole | Mask::Bits(_) => address,
            }));
        }
        Field::EthernetSource => return skb.ethernet_source.map(Loaded::Mac),
        // Packets of the host's own processes, which have no input interface, are not simulated.
        Field::Input => 1,
        Field::Output => u32::from(skb.routed),
        Field::Mark => skb.mark,
        Field::Priority => skb.priority,
        Field::Protocol => protocol.into(),
        Field::CtDirection => facts?.direction as u32,
        Field::CtState => skb.tracking.state(),
        Field::CtStatus => {
            let Facts { translated, confirmed, .. } = facts?;
            (u32::from(*translated) * Stmt::SNAT) | (u32::from(*confirmed) * Stmt::CONFIRMED)
        }
        Field::CtMark => facts?.mark,
        // For a protocol without ports, a later statement of the rule tests the protocol.
        Field::SourcePort => source_port.into(),
        Field::DestinationPort => destination_port.into(),
        Field::UdpDestinationPort if protocol == Packet::UDP => destination_port.into(),
        // A TCP connection is assumed to begin with SYN where its first segment is seen.
        Field::TcpFlags if protocol == Packet::TCP => Stmt::SYN,
        Field::UdpDestinationPort | Field::TcpFlags => return None,
        Field::SocketWildcard => skb.wildcard?.into(),
        Field::DestinationType if skb.local => Stmt::LOCAL,
        Field::DestinationType => Stmt::UNICAST,
    };
    Some(Loaded::Number(match mask {
        Mask::Bits(bits) => number & bits,
        Mask::Whole | Mask::Prefix(_) => number,
    }))
}

/// Loads all parts of a key.
pub(super) fn values(key: &[Selector], skb: &Skb) -> Option<Vec<Loaded>> {
    key.iter().map(|part| load(*part, skb)).collect()
}
