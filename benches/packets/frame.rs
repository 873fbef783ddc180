//! Ethernet frames with UDP over IPv4 in them.

use std::net::Ipv4Addr;

/// Where in a frame the source and the destination port are, and how long both are.
pub(crate) const PORTS: usize = 34;
/// Length of the headers that VXLAN puts in front of a frame.
pub(crate) const OUTER: usize = 50;
/// The UDP port and the network identifier of the datapath's VXLAN.
pub(crate) const VXLAN: (u16, u32) = (7789, 100);

/// From where to where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Flow {
    pub(crate) source: Ipv4Addr,
    pub(crate) destination: Ipv4Addr,
    pub(crate) ports: (u16, u16),
}

impl Flow {
    /// The way back.
    pub(crate) const fn back(self) -> Self {
        Self {
            source: self.destination,
            destination: self.source,
            ports: (self.ports.1, self.ports.0),
        }
    }
}

/// The MAC address of nobody in particular, from which frames come.
const SOMEBODY: [u8; 6] = [2, 0, 0, 0, 0, 1];

/// A frame of the least length that Ethernet has.
pub(crate) fn udp(to: [u8; 6], flow: Flow) -> Vec<u8> {
    around([to, SOMEBODY], flow, &[0; 18])
}

/// The same from a MAC address.
pub(crate) fn udp_from(from: [u8; 6], to: [u8; 6], flow: Flow) -> Vec<u8> {
    around([to, from], flow, &[0; 18])
}

/// The frame as it leaves a node by VXLAN.
pub(crate) fn vxlan(to: [u8; 6], nodes: Flow, inner: &[u8]) -> Vec<u8> {
    let mut payload = vec![0x08, 0, 0, 0];
    payload.extend((VXLAN.1 << 8).to_be_bytes());
    payload.extend(inner);
    around([to, SOMEBODY], Flow { ports: (nodes.ports.0, VXLAN.0), ..nodes }, &payload)
}

fn around(macs: [[u8; 6]; 2], flow: Flow, payload: &[u8]) -> Vec<u8> {
    let length =
        |headers: usize| u16::try_from(headers + payload.len()).unwrap_or_default().to_be_bytes();
    let mut ip = vec![0x45, 0];
    ip.extend(length(28));
    // Not to be fragmented; 64 hops; UDP; the checksum is filled in below.
    ip.extend([0, 0, 0x40, 0, 64, 17, 0, 0]);
    ip.extend(flow.source.octets());
    ip.extend(flow.destination.octets());
    let sum: u32 =
        ip.chunks_exact(2).map(|two| two.iter().fold(0, |n, b| n << 8 | u32::from(*b))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let checksum = !u16::try_from((folded & 0xffff) + (folded >> 16)).unwrap_or_default();
    ip.splice(10..12, checksum.to_be_bytes());

    let mut frame = macs.concat();
    frame.extend([8, 0]);
    frame.extend(ip);
    frame.extend(flow.ports.0.to_be_bytes());
    frame.extend(flow.ports.1.to_be_bytes());
    frame.extend(length(8));
    // No checksum.
    frame.extend([0, 0]);
    frame.extend(payload);
    frame
}

/// The flow of a frame; `None` if it is none of UDP over IPv4 without options.
pub(crate) fn flow(frame: &[u8]) -> Option<Flow> {
    let (kind, version, protocol) = (frame.get(12..14)?, frame.get(14)?, frame.get(23)?);
    if (kind, *version, *protocol) != (&[8, 0], 0x45, 17) {
        return None;
    }
    let address =
        |at: usize| Some(Ipv4Addr::from(<[u8; 4]>::try_from(frame.get(at..at + 4)?).ok()?));
    let port = |at: usize| Some(u16::from_be_bytes(frame.get(at..at + 2)?.try_into().ok()?));
    Some(Flow {
        source: address(26)?,
        destination: address(30)?,
        ports: (port(PORTS)?, port(PORTS + 2)?),
    })
}

/// What is in a VXLAN packet of the datapath's network.
pub(crate) fn inner(frame: &[u8]) -> Option<&[u8]> {
    let vni = frame.get(46..49)?;
    let ours = flow(frame)?.ports.1 == VXLAN.0 && VXLAN.1.to_be_bytes().get(1..) == Some(vni);
    if ours { frame.get(OUTER..) } else { None }
}
