//! Netlink requests, written attribute by attribute.

use std::io;
use std::net::IpAddr;

use netlink_sys::{Socket, SocketAddr};

pub(super) const ROUTE: isize = netlink_sys::protocols::NETLINK_ROUTE;
pub(super) const NETFILTER: isize = netlink_sys::protocols::NETLINK_NETFILTER;

/// Flags of a request (`include/uapi/linux/netlink.h`).
pub(super) mod flag {
    pub(crate) const REQUEST: u16 = 1;
    pub(crate) const ACK: u16 = 4;
    pub(crate) const REPLACE: u16 = 0x100;
    pub(crate) const EXCL: u16 = 0x200;
    pub(crate) const DUMP: u16 = 0x300;
    pub(crate) const CREATE: u16 = 0x400;
    pub(crate) const APPEND: u16 = 0x800;
}

const ERROR: u16 = 2;
const DONE: u16 = 3;
const NESTED: u16 = 1 << 15;
const HEADER: usize = 16;

/// The body of a message: a fixed header, then attributes.
#[derive(Clone, Debug, Default)]
pub(super) struct Body(pub(super) Vec<u8>);

impl Body {
    pub(super) fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    pub(super) fn put(mut self, kind: u16, value: &[u8]) -> Self {
        let length = u16::try_from(value.len() + 4).unwrap_or(u16::MAX);
        self.0.extend_from_slice(&length.to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    pub(super) fn put_if(self, kind: u16, value: Option<impl AsRef<[u8]>>) -> Self {
        match value {
            Some(value) => self.put(kind, value.as_ref()),
            None => self,
        }
    }

    pub(super) fn text(self, kind: u16, value: &str) -> Self {
        self.put(kind, &[value.as_bytes(), b"\0"].concat())
    }

    pub(super) fn u32(self, kind: u16, value: u32) -> Self {
        self.put(kind, &value.to_ne_bytes())
    }

    pub(super) fn be32(self, kind: u16, value: u32) -> Self {
        self.put(kind, &value.to_be_bytes())
    }

    pub(super) fn nest(self, kind: u16, inner: Self) -> Self {
        self.put(kind | NESTED, &inner.0)
    }
}

/// The bytes of an address.
pub(super) fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

/// The attributes behind a fixed header.
pub(super) fn attributes(mut bytes: &[u8]) -> Vec<(u16, &[u8])> {
    let mut found = Vec::new();
    while let [a, b, c, d, ..] = *bytes {
        let length = usize::from(u16::from_ne_bytes([a, b]));
        let Some(value) = bytes.get(4..length) else { break };
        found.push((u16::from_ne_bytes([c, d]) & !NESTED, value));
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    found
}

/// A message with its header.
fn message(kind: u16, flags: u16, sequence: u32, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(HEADER + body.len()).unwrap_or(u32::MAX);
    let mut bytes = length.to_ne_bytes().to_vec();
    bytes.extend_from_slice(&kind.to_ne_bytes());
    bytes.extend_from_slice(&(flags | flag::REQUEST).to_ne_bytes());
    bytes.extend_from_slice(&sequence.to_ne_bytes());
    bytes.extend_from_slice(&[0; 4]);
    bytes.extend_from_slice(body);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// A socket in the namespace of the calling thread.
pub(super) struct Netlink {
    socket: Socket,
    sequence: u32,
}

impl Netlink {
    pub(super) fn open(protocol: isize) -> io::Result<Self> {
        let mut socket = Socket::new(protocol)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Makes one request, and waits for its acknowledgement.
    pub(super) fn request(&mut self, kind: u16, flags: u16, body: &Body) -> io::Result<()> {
        self.transaction(&[], &[(kind, flags, body.clone())], &[])
    }

    /// Makes requests in one datagram, each with an acknowledgement, between messages without.
    pub(super) fn transaction(
        &mut self,
        before: &[(u16, Body)],
        requests: &[(u16, u16, Body)],
        after: &[(u16, Body)],
    ) -> io::Result<()> {
        let mut datagram = Vec::new();
        let mut next = || {
            self.sequence += 1;
            self.sequence
        };
        for (kind, body) in before {
            datagram.extend(message(*kind, 0, next(), &body.0));
        }
        for (kind, flags, body) in requests {
            datagram.extend(message(*kind, flags | flag::ACK, next(), &body.0));
        }
        for (kind, body) in after {
            datagram.extend(message(*kind, 0, next(), &body.0));
        }
        self.socket.send(&datagram, 0)?;
        let mut waiting = requests.len();
        while waiting > 0 {
            for (kind, body) in split(&self.socket.recv_from_full()?.0) {
                if kind == ERROR {
                    acknowledged(&body)?;
                    waiting -= 1;
                }
            }
        }
        Ok(())
    }

    /// The bodies of all messages of a listing.
    pub(super) fn dump(&mut self, kind: u16, body: &Body) -> io::Result<Vec<Vec<u8>>> {
        self.sequence += 1;
        self.socket.send(&message(kind, flag::DUMP, self.sequence, &body.0), 0)?;
        let mut found = Vec::new();
        loop {
            for (kind, body) in split(&self.socket.recv_from_full()?.0) {
                match kind {
                    DONE => return Ok(found),
                    ERROR => acknowledged(&body)?,
                    _ => found.push(body),
                }
            }
        }
    }
}

fn acknowledged(body: &[u8]) -> io::Result<()> {
    match body.first_chunk().map(|code| i32::from_ne_bytes(*code)) {
        Some(0) => Ok(()),
        Some(code) => Err(io::Error::from_raw_os_error(-code)),
        None => Err(io::ErrorKind::InvalidData.into()),
    }
}

fn split(mut datagram: &[u8]) -> Vec<(u16, Vec<u8>)> {
    let mut found = Vec::new();
    while let [a, b, c, d, e, f, ..] = *datagram {
        let length = usize::try_from(u32::from_ne_bytes([a, b, c, d])).unwrap_or(usize::MAX);
        let Some(body) = datagram.get(HEADER..length) else { break };
        found.push((u16::from_ne_bytes([e, f]), body.to_vec()));
        datagram = datagram.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    found
}
