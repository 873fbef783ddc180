//! A packet on its way, with what the kernel knows of it, and what rules load from it.

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
    /// The tunnel device if it came in by it; others are not told apart.
    pub(crate) input: Option<DeviceName>,
    /// The tunnel device if it goes out by it.
    pub(crate) output: Option<DeviceName>,
    /// Whether it is known by which device it goes out.
    pub(crate) routed: bool,
    /// Where the frame goes, once it is one.
    pub(crate) ethernet: Option<MacAddr>,
    pub(crate) tracking: Tracking,
}

/// What conntrack makes of it.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Tracking {
    /// Nothing.
    Invalid,
    /// Nothing, because a rule says so.
    Untracked,
    /// It belongs to a connection.
    Seen(Facts),
}

/// What the rules ask about its connection.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Facts {
    pub(crate) direction: Direction,
    /// A reply has been seen.
    pub(crate) established: bool,
    pub(crate) mark: u32,
    /// Its source is translated.
    pub(crate) translated: bool,
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
            tracking,
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
    /// Of the first packet of a connection.
    pub(crate) const fn fresh() -> Self {
        let direction = Direction::Original;
        Self::Seen(Facts { direction, established: false, mark: 0, translated: false })
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

/// A value that was loaded from a packet.
#[derive(Clone, Copy, Debug)]
pub(super) enum Loaded {
    Number(u32),
    Address(IpAddr),
}

/// What a rule loads; `None` where the packet has no such field, which ends the rule.
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
        // Packets of the host's own processes, which came in by no interface, are not walked.
        Field::Input => 1,
        Field::Output => u32::from(skb.routed),
        Field::Mark => skb.mark,
        Field::Priority => skb.priority,
        Field::Protocol => protocol.into(),
        Field::CtDirection => facts?.direction as u32,
        Field::CtState => skb.tracking.state(),
        Field::CtStatus => u32::from(facts?.translated) * Stmt::SNAT,
        Field::CtMark => facts?.mark,
        // Of a protocol without ports, what comes behind asks for the protocol.
        Field::SourcePort => source_port.into(),
        Field::DestinationPort => destination_port.into(),
        Field::UdpDestinationPort if protocol == Packet::UDP => destination_port.into(),
        // What opens a connection is taken to be where one begins.
        Field::TcpFlags if protocol == Packet::TCP => Stmt::SYN,
        Field::Icmp6Type if protocol == Packet::ICMP6 => (destination_port >> 8).into(),
        Field::UdpDestinationPort | Field::TcpFlags | Field::Icmp6Type => return None,
    };
    Some(Loaded::Number(match mask {
        Mask::Bits(bits) => number & bits,
        Mask::Whole | Mask::Prefix(_) => number,
    }))
}

/// All parts of a key.
pub(super) fn values(key: &[Selector], skb: &Skb) -> Option<Vec<Loaded>> {
    key.iter().map(|part| load(*part, skb)).collect()
}
