//! The packet model: the headers that the datapath evaluates.

use std::fmt;
use std::net::IpAddr;

use crate::connection::Connection;
use crate::types::MacAddr;

/// A packet: protocol, addresses and ports.
///
/// ```
/// use egress_datapath::explain::Packet;
///
/// let asked = Packet::udp("10.244.1.10".parse()?, 40_000, "198.51.100.10".parse()?, 53);
/// assert_eq!(asked.to_string(), "UDP 10.244.1.10 port 40000 to 198.51.100.10 port 53");
/// assert_eq!(asked.reply().destination_port, 40_000);
/// # Ok::<(), std::net::AddrParseError>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Packet {
    /// Protocol number of the IP header.
    pub protocol: u8,
    /// Source address.
    pub source: IpAddr,
    /// Source port; for ICMP the identifier.
    pub source_port: u16,
    /// Destination address.
    pub destination: IpAddr,
    /// Destination port; for ICMP type and code, the type in the upper byte.
    pub destination_port: u16,
}

impl Packet {
    /// Protocol number of ICMP (RFC 792).
    pub const ICMP: u8 = 1;
    /// Protocol number of TCP (RFC 9293).
    pub const TCP: u8 = 6;
    /// Protocol number of UDP (RFC 768).
    pub const UDP: u8 = 17;
    /// Protocol number of `ICMPv6` (RFC 4443).
    pub const ICMP6: u8 = 58;

    /// A UDP datagram.
    pub const fn udp(
        source: IpAddr,
        source_port: u16,
        destination: IpAddr,
        destination_port: u16,
    ) -> Self {
        Self { protocol: Self::UDP, source, source_port, destination, destination_port }
    }

    /// A TCP segment.
    pub const fn tcp(
        source: IpAddr,
        source_port: u16,
        destination: IpAddr,
        destination_port: u16,
    ) -> Self {
        Self { protocol: Self::TCP, source, source_port, destination, destination_port }
    }

    /// An ICMP or `ICMPv6` echo request.
    pub const fn echo(source: IpAddr, destination: IpAddr, identifier: u16) -> Self {
        let (protocol, kind) = match destination {
            IpAddr::V4(_) => (Self::ICMP, 8),
            IpAddr::V6(_) => (Self::ICMP6, 128),
        };
        let destination_port = kind << 8;
        Self { protocol, source, source_port: identifier, destination, destination_port }
    }

    /// Size of the headers in bytes: IP without options, and the transport header.
    pub(crate) const fn headers(&self) -> u64 {
        let ip = match self.source {
            IpAddr::V4(_) => 20,
            IpAddr::V6(_) => 40,
        };
        ip + match self.protocol {
            Self::TCP => 20,
            Self::UDP | Self::ICMP | Self::ICMP6 => 8,
            _ => 0,
        }
    }

    /// The reply to the packet.
    #[must_use]
    pub const fn reply(self) -> Self {
        let Self { protocol, source, source_port, destination, destination_port } = self;
        let (source_port, destination_port) = match protocol {
            Self::ICMP | Self::ICMP6 => (source_port, echo(protocol, destination_port)),
            _ => (destination_port, source_port),
        };
        Self { protocol, source: destination, source_port, destination: source, destination_port }
    }
}

/// Type and code of the ICMP reply to an echo request, and the reverse.
const fn echo(protocol: u8, kind: u16) -> u16 {
    match (protocol, kind >> 8) {
        (Packet::ICMP, 8) => 0,
        (Packet::ICMP, 0) => 8 << 8,
        (Packet::ICMP6, 128) => 129 << 8,
        (Packet::ICMP6, 129) => 128 << 8,
        _ => kind,
    }
}

impl fmt::Display for Packet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { protocol, source, source_port, destination, destination_port } = self;
        match *protocol {
            Self::ICMP | Self::ICMP6 => {
                let name = if *protocol == Self::ICMP { "ICMP" } else { "ICMPv6" };
                let kind = destination_port >> 8;
                return write!(f, "{name} type {kind} {source} to {destination}");
            }
            Self::TCP => f.write_str("TCP")?,
            Self::UDP => f.write_str("UDP")?,
            other => return write!(f, "protocol {other} {source} to {destination}"),
        }
        write!(f, " {source} port {source_port} to {destination} port {destination_port}")
    }
}

/// A VXLAN frame between two nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Source address of the outer packet: the sending node.
    pub from: IpAddr,
    /// Destination address of the outer packet: the receiving node.
    pub to: IpAddr,
    /// UDP destination port of the outer packet.
    pub port: u16,
    /// VXLAN network identifier.
    pub vni: u32,
    /// Source MAC address of the inner frame: that of the sending node's tunnel interface.
    pub source_mac: MacAddr,
    /// Destination MAC address of the inner frame.
    pub mac: MacAddr,
    /// The inner packet.
    pub packet: Packet,
}

impl Connection {
    /// Returns the reply to the connection's first packet.
    pub(crate) const fn answer(&self) -> Packet {
        Packet {
            protocol: self.protocol,
            source: self.peer,
            source_port: self.reply_source_port,
            destination: self.snat_address,
            destination_port: self.snat_port,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_answer_to_an_answer_is_the_question() {
        let (one, two) = ("10.0.0.1".parse().unwrap(), "10.0.0.2".parse().unwrap());
        let (three, four) = ("fd00::1".parse().unwrap(), "fd00::2".parse().unwrap());
        for packet in [
            Packet::udp(one, 1, two, 2),
            Packet::tcp(three, 1, four, 2),
            Packet::echo(one, two, 7),
            Packet::echo(three, four, 7),
        ] {
            assert_ne!(packet.reply(), packet);
            assert_eq!(packet.reply().reply(), packet);
        }
    }
}
