//! A hand-made VXLAN frame of the tunnel.

use std::net::IpAddr;

use crate::{Cluster, MacAddr};

use super::super::lab::{POD_A, PORT, SERVER};

/// Returns the VXLAN payload of a UDP datagram from the selected pod to the server.
///
/// It is the content of the outer UDP datagram: VXLAN header, Ethernet frame, IPv4 and UDP.
pub(super) fn vxlan(cluster: &Cluster, to: MacAddr, from: MacAddr) -> Vec<u8> {
    const IPV4: [u8; 2] = [0x08, 0x00];
    let header = [[0x08, 0, 0, 0], (cluster.tunnel.vni << 8).to_be_bytes()].concat();
    let [to, from] = [to, from].map(MacAddr::octets);
    [&header[..], &to, &from, &IPV4, &datagram()].concat()
}

fn datagram() -> Vec<u8> {
    // Source port 5000, nine bytes, no checksum.
    let udp = [&5000_u16.to_be_bytes()[..], &PORT.to_be_bytes(), &[0, 9, 0, 0], b"?"].concat();
    // Length 29, don't fragment, TTL 64, UDP.
    let mut ip = vec![0x45, 0, 0, 29, 0, 0, 0x40, 0, 64, 17, 0, 0];
    for address in [POD_A, SERVER] {
        if let [IpAddr::V4(address), _] = address {
            ip.extend(address.octets());
        }
    }
    let sum = checksum(&ip).to_be_bytes();
    ip.splice(10..12, sum);
    [ip, udp].concat()
}

/// Returns the internet checksum (RFC 1071) of a header whose checksum field is zero.
fn checksum(bytes: &[u8]) -> u16 {
    let mut sum = 0_u32;
    for pair in bytes.chunks(2) {
        if let [high, low] = pair {
            sum += u32::from(u16::from_be_bytes([*high, *low]));
        }
    }
    sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    !u16::try_from(sum).unwrap_or(u16::MAX)
}
