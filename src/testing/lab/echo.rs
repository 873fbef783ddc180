//! An echo server that replies with the client's source address, and its client.

use std::collections::BTreeSet;
use std::fmt;
use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::net::{AddressFamily, Protocol, RecvFlags, SocketFlags, SocketType, eth, recv};

use super::netns::Netns;

/// The UDP and TCP port of the server.
pub const PORT: u16 = 7000;
/// Timeout of a probe that may get no reply, for all its tries together.
const PATIENCE: Duration = Duration::from_millis(900);
const TRIES: u32 = 3;
/// Timeout of a probe that must get a reply: longer than a busy machine takes.
const LONG: Duration = Duration::from_secs(120);

/// A transport protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Proto {
    /// TCP, protocol number 6.
    Tcp,
    /// UDP, protocol number 17.
    Udp,
}

impl Proto {
    /// Both transport protocols.
    pub const BOTH: [Self; 2] = [Self::Tcp, Self::Udp];
}

impl fmt::Display for Proto {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
        })
    }
}

/// The packet sockets of the server's namespace, and what was received on them.
#[derive(Debug)]
struct Capture {
    taps: [OwnedFd; 2],
    seen: Mutex<BTreeSet<(IpAddr, Proto)>>,
}

impl Capture {
    fn open() -> io::Result<Self> {
        let tap = |protocol: Protocol| {
            rustix::net::socket_with(
                AddressFamily::PACKET,
                SocketType::DGRAM,
                SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
                Some(protocol),
            )
        };
        Ok(Self { taps: [tap(eth::IP)?, tap(eth::IPV6)?], seen: Mutex::default() })
    }

    /// Records the packets that have arrived, and returns the record.
    fn record(&self) -> MutexGuard<'_, BTreeSet<(IpAddr, Proto)>> {
        // Locked while it reads: nobody sees a record without a packet that was read.
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let mut packet = [0; 2048];
        for tap in &self.taps {
            while let Ok((length, _)) = recv(tap, &mut packet[..], RecvFlags::empty()) {
                seen.extend(packet.get(..length).and_then(source));
            }
        }
        seen
    }
}

/// A server that replies to every TCP connection and UDP datagram with the source address it saw.
///
/// It also records the source of every TCP and UDP packet that reached its namespace, with or
/// without a connection.
#[derive(Debug)]
pub struct Echo {
    capture: Arc<Capture>,
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Echo {
    /// Starts a server on these addresses of a namespace.
    pub fn start(netns: &Netns, addresses: &[IpAddr]) -> io::Result<Self> {
        let sockets = netns.run(|| Sockets::open(addresses))??;
        let capture = Arc::new(netns.run(Capture::open)??);
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?);
        let thread = thread::spawn({
            let (capture, stop) = (Arc::clone(&capture), Arc::clone(&stop));
            // A server that fails stops replying, and the probes report that.
            move || drop(sockets.serve(&capture, &stop))
        });
        Ok(Self { capture, stop, thread: Some(thread) })
    }

    /// Returns the sources of all packets since the last call, and clears the record.
    ///
    /// Every packet that arrived before the call is recorded, also while the server's thread waits
    /// for a processor.
    pub fn take_seen(&self) -> BTreeSet<(IpAddr, Proto)> {
        std::mem::take(&mut *self.capture.record())
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        let _ = rustix::io::write(&*self.stop, &1_u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Sockets {
    udp: Vec<UdpSocket>,
    tcp: Vec<TcpListener>,
}

impl Sockets {
    fn open(addresses: &[IpAddr]) -> io::Result<Self> {
        let mut sockets = Self { udp: Vec::new(), tcp: Vec::new() };
        for address in addresses {
            let udp = UdpSocket::bind((*address, PORT))?;
            udp.set_nonblocking(true)?;
            sockets.udp.push(udp);
            let tcp = TcpListener::bind((*address, PORT))?;
            tcp.set_nonblocking(true)?;
            sockets.tcp.push(tcp);
        }
        Ok(sockets)
    }

    fn serve(&self, capture: &Capture, stop: &OwnedFd) -> io::Result<()> {
        loop {
            let readable = |fd| PollFd::from_borrowed_fd(fd, PollFlags::IN);
            let mut fds = vec![readable(stop.as_fd())];
            fds.extend(capture.taps.iter().map(|tap| readable(tap.as_fd())));
            fds.extend(self.udp.iter().map(|udp| readable(udp.as_fd())));
            fds.extend(self.tcp.iter().map(|tcp| readable(tcp.as_fd())));
            poll(&mut fds, None)?;
            if fds.first().is_some_and(|stop| !stop.revents().is_empty()) {
                return Ok(());
            }
            drop(capture.record());
            self.questions().into_iter().for_each(Question::answer);
        }
    }

    fn questions(&self) -> Vec<Question<'_>> {
        let mut questions = Vec::new();
        for udp in &self.udp {
            while let Ok((_, from)) = udp.recv_from(&mut [0; 64]) {
                questions.push(Question::Datagram(udp, from));
            }
        }
        for tcp in &self.tcp {
            while let Ok((stream, from)) = tcp.accept() {
                questions.push(Question::Connection(stream, from));
            }
        }
        questions
    }
}

enum Question<'a> {
    Datagram(&'a UdpSocket, SocketAddr),
    Connection(TcpStream, SocketAddr),
}

impl Question<'_> {
    /// Sends the reply; a failure to send is ignored.
    fn answer(self) {
        let _sent = match self {
            Self::Datagram(udp, from) => udp.send_to(from.ip().to_string().as_bytes(), from),
            Self::Connection(mut stream, from) => stream.write(from.ip().to_string().as_bytes()),
        };
    }
}

/// Returns the source and the protocol of a TCP or UDP packet; `None` for other packets.
fn source(packet: &[u8]) -> Option<(IpAddr, Proto)> {
    let (address, protocol) = match packet.first()? >> 4 {
        4 => {
            let address: [u8; 4] = packet.get(12..16)?.try_into().ok()?;
            (IpAddr::from(address), packet.get(9)?)
        }
        6 => {
            let address: [u8; 16] = packet.get(8..24)?.try_into().ok()?;
            (IpAddr::from(address), packet.get(6)?)
        }
        _ => return None,
    };
    match protocol {
        6 => Some((address, Proto::Tcp)),
        17 => Some((address, Proto::Udp)),
        _ => None,
    }
}

/// Sends a probe from a namespace and returns the source that the server saw.
///
/// The timeout is less than a second.
pub fn probe(netns: &Netns, proto: Proto, server: IpAddr) -> io::Result<IpAddr> {
    ask(netns, proto, server, PATIENCE)
}

/// Sends a probe that must get a reply, like [`probe`], with a timeout of 120 s for busy machines.
pub fn probe_patiently(netns: &Netns, proto: Proto, server: IpAddr) -> io::Result<IpAddr> {
    ask(netns, proto, server, LONG)
}

fn ask(netns: &Netns, proto: Proto, server: IpAddr, patience: Duration) -> io::Result<IpAddr> {
    let server = SocketAddr::new(server, PORT);
    let answer = netns.run(|| match proto {
        Proto::Udp => ask_udp(server, patience),
        Proto::Tcp => ask_tcp(server, patience),
    })??;
    let invalid = |error| io::Error::new(io::ErrorKind::InvalidData, error);
    answer.parse().map_err(invalid)
}

fn ask_udp(server: SocketAddr, patience: Duration) -> io::Result<String> {
    let any: IpAddr = match server {
        SocketAddr::V4(_) => std::net::Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => std::net::Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect(server)?;
    let mut answer = [0; 64];
    let mut last = io::ErrorKind::TimedOut.into();
    for number in 1..=TRIES {
        let rest = patience.saturating_sub(PATIENCE);
        let wait = PATIENCE / TRIES + if number == TRIES { rest } else { Duration::ZERO };
        socket.set_read_timeout(Some(wait))?;
        match socket.send(b"?").and_then(|_| socket.recv(&mut answer)) {
            Ok(length) => {
                let answer = answer.get(..length).unwrap_or_default();
                return Ok(String::from_utf8_lossy(answer).into_owned());
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn ask_tcp(server: SocketAddr, patience: Duration) -> io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&server, patience)?;
    stream.set_read_timeout(Some(patience))?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}
