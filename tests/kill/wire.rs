//! Packets of pods, and what of them the server sees.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use egress_datapath::testing::lab::{Lab, Netns, OTHER_SERVER, Pair, Proto, SERVER};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt::socket_error;
use rustix::net::{
    AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType, bind, connect, eth,
    getpeername, recv, send, socket_with,
};

use crate::Result;

/// The server of the lab answers UDP there.
const UDP_PORT: u16 = 7000;
/// Ours takes TCP connections there and keeps them.
const TCP_PORT: u16 = 7001;

/// How long a packet may take that need not arrive, one that must, and an answer.
const SOON: Duration = Duration::from_millis(15);
const LATE: Duration = Duration::from_secs(20);
/// How long all answers together are waited for: some are held back.
const ANSWERED: Duration = Duration::from_millis(50);

/// A flow of a pod: known on the wire by its port, which translation keeps if it can.
pub(crate) struct Flow {
    pub(crate) talk: usize,
    pub(crate) established: bool,
    pub(crate) to: IpAddr,
    pub(crate) proto: Proto,
    pub(crate) port: u16,
    socket: OwnedFd,
}

/// A packet that came to the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) source: IpAddr,
    pub(crate) port: u16,
}

pub(crate) struct Wire {
    taps: Vec<OwnedFd>,
    // Connections are made by the kernel and wait here for somebody to accept them.
    listeners: Vec<TcpListener>,
    next_port: u16,
}

impl Wire {
    pub(crate) fn open(lab: &Lab) -> Result<Self> {
        let opened = lab.server.run(|| -> io::Result<_> {
            let tap = |protocol: Protocol| {
                let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
                socket_with(AddressFamily::PACKET, SocketType::DGRAM, flags, Some(protocol))
            };
            let listen = |address| {
                let listener = TcpListener::bind((address, TCP_PORT))?;
                listener.set_nonblocking(true)?;
                Ok(listener)
            };
            let listeners = [SERVER, OTHER_SERVER].concat().into_iter().map(listen);
            Ok((vec![tap(eth::IP)?, tap(eth::IPV6)?], listeners.collect::<io::Result<_>>()?))
        })?;
        let (taps, listeners) = opened?;
        Ok(Self { taps, listeners, next_port: 10_000 })
    }

    /// Sockets for flows of a pod to a server, one for each protocol and family; nothing is sent.
    pub(crate) fn flows(
        &mut self,
        pod: &Netns,
        talk: usize,
        to: Pair,
        established: &[bool],
    ) -> Result<Vec<Flow>> {
        let mut planned = Vec::new();
        for established in established {
            for to in to {
                for proto in Proto::BOTH {
                    planned.push((*established, to, proto, self.next_port));
                    self.next_port = self.next_port.checked_add(1).ok_or("no port is left")?;
                }
            }
        }
        let open = |(established, to, proto, port)| {
            Ok(Flow { talk, established, to, proto, port, socket: open(to, proto, port)? })
        };
        Ok(pod.run(|| planned.into_iter().map(open).collect::<io::Result<_>>())??)
    }

    /// Lets flows come about, until both sides know.
    pub(crate) fn establish<'a>(&self, flows: impl Iterator<Item = &'a Flow> + Clone) -> Result {
        for flow in flows.clone() {
            flow.speak();
        }
        for flow in flows {
            let (event, what) = match flow.proto {
                Proto::Udp => (PollFlags::IN, "an answer"),
                Proto::Tcp => (PollFlags::OUT, "a connection"),
            };
            wait(&flow.socket, event, LATE)?;
            let got = match flow.proto {
                Proto::Udp => recv(&flow.socket, &mut [0; 64][..], RecvFlags::empty()).is_ok(),
                Proto::Tcp => matches!(socket_error(&flow.socket), Ok(Ok(()))),
            };
            if !got {
                return Err(format!("flow {} to {} got not {what}", flow.port, flow.to).into());
            }
        }
        drop(self.read());
        Ok(())
    }

    /// Sends a packet of each flow, and says what came to the server until then; waits longer for
    /// those that must arrive.
    pub(crate) fn probe(&self, flows: &[&Flow], must: impl Fn(&Flow) -> bool) -> Result<Vec<Seen>> {
        let mut seen = self.read();
        let before = seen.len();
        for flow in flows {
            flow.speak();
        }
        let start = Instant::now();
        loop {
            seen.extend(self.read());
            let arrived = seen.get(before..).unwrap_or_default();
            let missing = |flow: &&&Flow| !arrived.iter().any(|seen| seen.port == flow.port);
            let mut left = flows.iter().filter(missing).peekable();
            if left.peek().is_none() {
                return Ok(seen);
            }
            let patience = if left.any(|flow| must(flow)) { LATE } else { SOON };
            let Some(rest) = patience.checked_sub(start.elapsed()) else { return Ok(seen) };
            for tap in &self.taps {
                wait(tap, PollFlags::IN, rest.min(Duration::from_millis(2)))?;
            }
        }
    }

    /// Lets go of the connections that pods have closed.
    pub(crate) fn forget(&self) {
        for listener in &self.listeners {
            while listener.accept().is_ok() {}
        }
    }

    fn read(&self) -> Vec<Seen> {
        let mut packet = [0; 2048];
        let mut seen = Vec::new();
        for tap in &self.taps {
            while let Ok((length, _)) = recv(tap, &mut packet[..], RecvFlags::empty()) {
                seen.extend(packet.get(..length).and_then(to_server));
            }
        }
        seen
    }
}

/// Takes the answers to what has arrived. Where nobody has tracked the connection yet, one that
/// came behind new rules would open it the other way round.
pub(crate) fn take_answers<'a>(flows: impl Iterator<Item = &'a &'a Flow>) -> Result {
    let start = Instant::now();
    for flow in flows.filter(|flow| flow.proto == Proto::Udp) {
        wait(&flow.socket, PollFlags::IN, ANSWERED.saturating_sub(start.elapsed()))?;
        let _answer = recv(&flow.socket, &mut [0; 64][..], RecvFlags::empty());
    }
    Ok(())
}

impl Flow {
    fn server(&self) -> SocketAddr {
        let port = if self.proto == Proto::Udp { UDP_PORT } else { TCP_PORT };
        SocketAddr::new(self.to, port)
    }

    /// Sends a packet: the first one that there is of this flow, or the next.
    fn speak(&self) {
        if self.proto == Proto::Tcp && !matches!(getpeername(&self.socket), Ok(Some(_))) {
            // It goes on by itself, and whether it gets anywhere is asked later.
            let _in_progress = connect(&self.socket, &self.server());
            return;
        }
        // A refusal that came back is said to the next who sends, and nothing is sent then.
        if send(&self.socket, b"?", SendFlags::NOSIGNAL).is_err() {
            let _either_way = send(&self.socket, b"?", SendFlags::NOSIGNAL);
        }
    }
}

fn open(to: IpAddr, proto: Proto, port: u16) -> io::Result<OwnedFd> {
    let (family, any) = match to {
        IpAddr::V4(_) => (AddressFamily::INET, IpAddr::from(Ipv4Addr::UNSPECIFIED)),
        IpAddr::V6(_) => (AddressFamily::INET6, IpAddr::from(Ipv6Addr::UNSPECIFIED)),
    };
    let kind = if proto == Proto::Udp { SocketType::DGRAM } else { SocketType::STREAM };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(family, kind, flags, None)?;
    bind(&socket, &SocketAddr::new(any, port))?;
    if proto == Proto::Udp {
        connect(&socket, &SocketAddr::new(to, UDP_PORT))?;
    }
    Ok(socket)
}

fn wait(socket: &impl AsFd, event: PollFlags, patience: Duration) -> Result {
    let mut sockets = [PollFd::new(socket, event)];
    poll(&mut sockets, Some(&Timespec::try_from(patience)?))?;
    Ok(())
}

/// Whence a packet comes that goes to one of the server's ports.
fn to_server(packet: &[u8]) -> Option<Seen> {
    let first = packet.first()?;
    let (source, ports): (IpAddr, usize) = if first >> 4 == 4 {
        let source: [u8; 4] = packet.get(12..16)?.try_into().ok()?;
        (source.into(), usize::from(first & 15) * 4)
    } else {
        let source: [u8; 16] = packet.get(8..24)?.try_into().ok()?;
        (source.into(), 40)
    };
    let port = |at: usize| {
        let bytes: [u8; 2] = packet.get(at..at + 2)?.try_into().ok()?;
        Some(u16::from_be_bytes(bytes))
    };
    let to = port(ports + 2)?;
    let ours = to == UDP_PORT || to == TCP_PORT;
    Some(Seen { source, port: port(ports)? }).filter(|_| ours)
}

/// What came, by flow.
pub(crate) fn by_port(seen: &[Seen]) -> BTreeMap<u16, Vec<IpAddr>> {
    let mut ports: BTreeMap<u16, Vec<IpAddr>> = BTreeMap::new();
    for seen in seen {
        ports.entry(seen.port).or_default().push(seen.source);
    }
    ports
}
