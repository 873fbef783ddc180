//! Datagrams with a number in them, and who saw which.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, UdpSocket};
use std::os::fd::OwnedFd;

use egress_datapath::explain::Packet;
use egress_datapath::testing::lab::Netns;
use rustix::net::{AddressFamily, Protocol, RecvFlags, SocketFlags, SocketType, eth, recv};

const MAGIC: &[u8] = b"twin";
/// Bytes of a datagram behind its header.
pub(crate) const PAYLOAD: u64 = 8;

/// What was seen of a datagram where it arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    /// The number of the listener that saw it.
    pub(crate) at: usize,
    /// As it was.
    pub(crate) packet: Packet,
}

/// Sees everything that comes to a namespace.
pub(crate) struct Tap([OwnedFd; 2]);

impl Tap {
    pub(crate) fn open(netns: &Netns) -> io::Result<Self> {
        let open = |protocol: Protocol| -> io::Result<OwnedFd> {
            let socket = rustix::net::socket_with(
                AddressFamily::PACKET,
                SocketType::DGRAM,
                SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
                Some(protocol),
            )?;
            rustix::net::sockopt::set_socket_recv_buffer_size(&socket, 1 << 20)?;
            Ok(socket)
        };
        netns.run(|| Ok(Self([open(eth::IP)?, open(eth::IPV6)?])))?
    }

    /// What has come since the last call, by its number.
    pub(crate) fn take(&self, at: usize, seen: &mut BTreeMap<u32, Vec<Seen>>) {
        let mut bytes = [0; 256];
        for socket in &self.0 {
            while let Ok((length, _)) = recv(socket, &mut bytes[..], RecvFlags::empty()) {
                if let Some((number, packet)) = bytes.get(..length).and_then(read) {
                    seen.entry(number).or_default().push(Seen { at, packet });
                }
            }
        }
    }
}

/// A datagram of ours.
fn read(bytes: &[u8]) -> Option<(u32, Packet)> {
    let address = |at: usize, length: usize| -> Option<IpAddr> {
        let bytes = bytes.get(at..at + length)?;
        match length {
            4 => <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from),
            _ => <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from),
        }
    };
    let (source, destination, protocol, udp) = match bytes.first()? >> 4 {
        4 => (address(12, 4)?, address(16, 4)?, bytes.get(9)?, bytes.get(20..)?),
        6 => (address(8, 16)?, address(24, 16)?, bytes.get(6)?, bytes.get(40..)?),
        _ => return None,
    };
    if *protocol != Packet::UDP {
        return None;
    }
    let port = |at: usize| Some(u16::from_be_bytes(udp.get(at..at + 2)?.try_into().ok()?));
    let number = udp.get(8..)?.strip_prefix(MAGIC)?;
    let number = u32::from_be_bytes(number.get(..4)?.try_into().ok()?);
    Some((number, Packet::udp(source, port(0)?, destination, port(2)?)))
}

/// Sends datagrams from a namespace that has their sources, each with its number.
pub(crate) fn send(netns: &Netns, packets: &[(u32, Packet)]) -> io::Result<()> {
    netns.run(|| {
        packets.iter().try_for_each(|(number, packet)| {
            let socket = UdpSocket::bind((packet.source, packet.source_port))?;
            let bytes = [MAGIC, &number.to_be_bytes()].concat();
            let sent = socket.send_to(&bytes, (packet.destination, packet.destination_port));
            sent.map(drop)
        })
    })?
}
