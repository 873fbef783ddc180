//! Gratuitous ARP (RFC 5227 section 3) and unsolicited neighbour advertisements (RFC 4861 section
//! 7.2.6), by which neighbours learn that an address has moved.

use std::fmt::Display;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddrV6};
use std::os::fd::OwnedFd;

use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, sendto, socket_with};

use crate::error::KernelError;
use crate::types::MacAddr;

// `linux/if_ether.h`.
const ETH_P_ARP: u16 = 0x0806;
const ETH_P_IPV6: u16 = 0x86dd;

const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const ICMPV6: u8 = 58;

const RAW: &str = "announcements need CAP_NET_RAW in the network namespace's user namespace";

/// A packet socket that receives nothing.
///
/// It is opened beforehand, because a socket belongs to the network namespace that its thread was
/// in when it opened it.
#[derive(Debug)]
pub(crate) struct Announcer(io::Result<OwnedFd>);

impl Announcer {
    pub(super) fn open() -> Self {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        // Without a protocol the kernel queues no packet.
        let socket = socket_with(AddressFamily::PACKET, SocketType::RAW, flags, None);
        Self(socket.map_err(io::Error::from))
    }

    /// Returns the error with which the socket was not opened.
    pub(super) fn check(&self, what: &dyn Display) -> Result<(), KernelError> {
        self.socket(what).map(drop)
    }

    fn socket(&self, what: &dyn Display) -> Result<&OwnedFd, KernelError> {
        let refused = |error| KernelError::io(what, error).with_remedy(RAW);
        self.0.as_ref().map_err(refused)
    }

    /// Tells the neighbours on an interface that an address is here.
    pub(super) fn announce(
        &self,
        what: &dyn Display,
        index: u32,
        mac: MacAddr,
        address: IpAddr,
    ) -> Result<(), KernelError> {
        let (protocol, frame) = match address {
            IpAddr::V4(address) => (ETH_P_ARP, gratuitous_arp(mac, address)),
            IpAddr::V6(address) => (ETH_P_IPV6, advertisement(mac, address)),
        };
        let socket = self.socket(what)?;
        // No safe interface has `struct sockaddr_ll`. Of the address of a raw packet the kernel
        // reads the protocol, the index of the interface and a length of 0 (`packet_snd` of
        // `net/packet/af_packet.c`), where an IPv6 address has the port, the flow information and
        // zeros; it does not read the family.
        let interface = u32::from_be(index);
        let to = SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, protocol, interface, 0);
        let sent = sendto(socket, &frame, SendFlags::empty(), &to);
        sent.map(drop).map_err(|error| KernelError::io(what, &error.into()))
    }
}

/// ARP announcement: a request whose sender and target are the address.
fn gratuitous_arp(mac: MacAddr, address: Ipv4Addr) -> Vec<u8> {
    let (mac, address) = (mac.octets(), address.octets());
    [
        &[0xff; 6][..],
        &mac,
        &ETH_P_ARP.to_be_bytes(),
        // Ethernet, IPv4, the lengths of their addresses, request.
        &[0, 1, 8, 0, 6, 4, 0, 1],
        &mac,
        &address,
        &[0; 6],
        &address,
    ]
    .concat()
}

/// Length of an advertisement from the ICMPv6 header on: 24 bytes and an option of 8.
const ADVERTISEMENT: u8 = 32;

/// Neighbour advertisement to all nodes, with the flag Override and the link-layer address.
fn advertisement(mac: MacAddr, address: Ipv6Addr) -> Vec<u8> {
    let mac = mac.octets();
    let body = |checksum: u16| {
        let checksum = checksum.to_be_bytes();
        [
            &[136, 0][..],
            &checksum,
            &[0x20, 0, 0, 0],
            &address.octets(),
            // Option "target link-layer address", one unit of 8 bytes.
            &[2, 1],
            &mac,
        ]
        .concat()
    };
    let (from, to) = (address.octets(), ALL_NODES.octets());
    // RFC 8200 section 8.1.
    let pseudo = [&from[..], &to, &[0, 0, 0, ADVERTISEMENT, 0, 0, 0, ICMPV6]].concat();
    let sum = checksum(&[pseudo, body(0)].concat());
    [
        // RFC 2464 section 7.
        &[0x33, 0x33, 0, 0, 0, 1][..],
        &mac,
        &ETH_P_IPV6.to_be_bytes(),
        // RFC 4861 section 7.1.2: receivers check the hop limit, 255.
        &[0x60, 0, 0, 0, 0, ADVERTISEMENT, ICMPV6, 255],
        &from,
        &to,
        &body(sum),
    ]
    .concat()
}

/// Internet checksum of an even number of bytes (RFC 1071).
fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks_exact(2).filter_map(|word| word.try_into().ok());
    let sum = words.map(u16::from_be_bytes).fold(0_u16, |sum, word| {
        let (sum, carry) = sum.overflowing_add(word);
        // No overflow: with a carry the sum is less than its maximum.
        sum + u16::from(carry)
    });
    !sum
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: &str = "02:00:5e:10:00:01";

    #[test]
    fn announcement_has_the_form_of_rfc_5227() {
        let frame = gratuitous_arp(MAC.parse().unwrap(), Ipv4Addr::new(198, 51, 100, 200));
        assert_eq!(frame.len(), 42);
        assert_eq!(frame[20..22], [0, 1]);
        assert_eq!(frame[22..28], [2, 0, 0x5e, 0x10, 0, 1]);
        assert_eq!((&frame[28..32], &frame[38..]), (&frame[38..], &[198, 51, 100, 200][..]));
    }

    #[test]
    fn advertisement_has_a_right_checksum() {
        let address: Ipv6Addr = "2001:db8:51::200".parse().unwrap();
        let frame = advertisement(MAC.parse().unwrap(), address);
        assert_eq!(frame.len(), 86);
        let pseudo = [&frame[22..54], &[0, 0, 0, 32, 0, 0, 0, 58]].concat();
        // The sum over a right checksum is all ones, its complement zero.
        assert_eq!(checksum(&[&pseudo, &frame[54..]].concat()), 0);
        let mut other = frame.clone();
        other[70] ^= 1;
        assert_ne!(checksum(&[&pseudo, &other[54..]].concat()), 0);
    }
}
