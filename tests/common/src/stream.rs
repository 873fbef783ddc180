//! UDP packets as fast as they arrive, each the first of a flow of its own or of few flows that go
//! on, and where they came from.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::OwnedFd;
use std::panic::{self, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering::Relaxed};
use std::thread::{self, sleep};
use std::time::{Duration, Instant};
use std::{fs, io};

use egress_datapath::datapath::Among;
use egress_datapath::testing::lab::{Lab, Netns, Pair};
use egress_datapath::{Datapath, KernelDatapath};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt::set_socket_recv_buffer_size_force;
use rustix::net::{
    AddressFamily, SendFlags, SocketFlags, SocketType, ipproto, sendto, socket_with,
};

use crate::fleet::Result;

const PORT: u16 = 7001;
/// First port of the flows.
const FIRST: u16 = 2000;
/// So many flows that a port comes again when its last flow has long been forgotten.
pub const MANY: u64 = 60_000;
/// Packets that may be under way; any receiver's buffer holds them.
const WINDOW: u64 = 128;
/// How long a packet may be under way before it makes room for another.
const SLOWEST: Duration = Duration::from_millis(50);
/// Bytes of a receiver's buffer, should packets that were late come all at once.
const BUFFER: usize = 8 << 20;
/// The part of a payload that numbers packets; what is above it numbers runs.
const NUMBER: u64 = (1 << 48) - 1;
static RUNS: AtomicU16 = AtomicU16::new(1);
/// Nothing for so long after the end, and nothing comes any more: where all has come, and where it
/// has not.
const SILENCE: Duration = Duration::from_millis(60);
const LATE: Duration = Duration::from_secs(1);

/// A pod that sends, and the sources that are right for its packets.
pub struct Pod<'a> {
    pub netns: &'a Netns,
    pub address: Pair,
    pub allowed: &'a [Pair],
}

/// What became of all packets.
#[derive(Debug)]
pub struct Tally {
    /// How many the pods have sent.
    pub sent: u64,
    /// The numbers of those that the server has not seen.
    pub lost: Vec<u64>,
    /// How many of those were lost by the server's own sockets.
    pub overflowed: usize,
    /// Those that arrived with a wrong source: which and when.
    pub leaked: Vec<(IpAddr, Instant)>,
}

/// Has the kernel forget a UDP flow so many seconds after its last packet, on every node.
pub fn forget_after(lab: &Lab, seconds: &str) -> Result {
    for host in lab.nodes() {
        // The setting comes with the tracking of connections, which is loaded when it is asked for.
        let mut datapath = host.netns.run(KernelDatapath::open)??;
        datapath.connections(Among::All, &mut |_| {})?;
        host.netns.sysctl(&[("netfilter/nf_conntrack_udp_timeout", seconds)])?;
    }
    Ok(())
}

/// How far it has come.
#[derive(Debug, Default)]
pub struct Progress {
    stop: AtomicBool,
    sent: AtomicU64,
    received: AtomicU64,
}

impl Progress {
    /// How many packets have been sent.
    pub fn sent(&self) -> u64 {
        self.sent.load(Relaxed)
    }
}

/// Has the pods send to a server for as long as the work takes; says what both came to.
///
/// The pods take turns, and so do the families; packet `n` is sent by pod `n / 2 % pods.len()`.
pub fn during<T>(
    (server, addresses): (&Netns, Pair),
    pods: &[Pod<'_>],
    flows: u64,
    per_second: u64,
    work: impl FnOnce(&Progress) -> T,
) -> io::Result<(T, Tally)> {
    let mut ways = Vec::new();
    for pod in pods {
        for (from, to) in pod.address.into_iter().zip(addresses) {
            ways.push(Way { socket: pod.netns.run(|| raw(to))??, from, to });
        }
    }
    let bind = |address: IpAddr| {
        let server = UdpSocket::bind((address, PORT))?;
        server.set_nonblocking(true)?;
        // Not everybody may; what then does not fit is counted.
        let _refused = set_socket_recv_buffer_size_force(&server, BUFFER);
        Ok(server)
    };
    let before = server.run(overflows)?;
    let servers = server.run(|| addresses.map(bind))?;
    let servers: Vec<_> = servers.into_iter().collect::<io::Result<_>>()?;
    let progress = Progress::default();
    let run = RUNS.fetch_add(1, Relaxed);
    let (done, sent, arrived) = thread::scope(|scope| {
        let receiver = scope.spawn(|| receive(&servers, run, &progress, pods));
        let sender = scope.spawn(|| send(&ways, run, &progress, (flows, per_second)));
        let done = panic::catch_unwind(AssertUnwindSafe(|| work(&progress)));
        progress.stop.store(true, Relaxed);
        let sent = sender.join().unwrap_or_else(|panicked| panic::resume_unwind(panicked));
        let arrived = receiver.join().unwrap_or_else(|panicked| panic::resume_unwind(panicked));
        let done = done.unwrap_or_else(|panicked| panic::resume_unwind(panicked));
        io::Result::Ok((done, sent?, arrived?))
    })?;
    let overflowed = server.run(overflows)?.saturating_sub(before);
    let Arrived { numbers, leaked } = arrived;
    let seen = |number: &u64| usize::try_from(*number).ok().and_then(|at| numbers.get(at)).copied();
    let lost = (0..sent).filter(|number| seen(number) != Some(true)).collect();
    Ok((done, Tally { sent, lost, overflowed, leaked }))
}

/// Datagrams that found a socket of the calling thread's network full.
fn overflows() -> usize {
    let v4 = fs::read_to_string("/proc/thread-self/net/snmp").unwrap_or_default();
    let v6 = fs::read_to_string("/proc/thread-self/net/snmp6").unwrap_or_default();
    let mut udp = v4.lines().filter_map(|line| line.strip_prefix("Udp: "));
    let (names, values) = (udp.next().unwrap_or_default(), udp.next().unwrap_or_default());
    let mut columns = names.split_whitespace().zip(values.split_whitespace());
    let v4 = columns.find(|(name, _)| *name == "RcvbufErrors").map(|(_, value)| value);
    let v6 = v6.lines().find_map(|line| line.strip_prefix("Udp6RcvbufErrors"));
    [v4, v6].into_iter().flatten().filter_map(|value| value.trim().parse::<usize>().ok()).sum()
}

/// A raw socket of a sender, whose flows cost no socket each.
struct Way {
    socket: OwnedFd,
    from: IpAddr,
    to: IpAddr,
}

/// Opens a raw socket of the calling thread's network for UDP datagrams with headers of our own.
pub fn raw(to: IpAddr) -> io::Result<OwnedFd> {
    let family = if to.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    Ok(socket_with(family, SocketType::RAW, SocketFlags::CLOEXEC, Some(ipproto::UDP))?)
}

/// Sends until it is to stop; returns how many.
fn send(
    ways: &[Way],
    run: u16,
    progress: &Progress,
    (flows, per_second): (u64, u64),
) -> io::Result<u64> {
    let begin = Instant::now();
    let mut written_off = 0;
    let mut number = 0;
    loop {
        let due = Duration::from_nanos(number * (1_000_000_000 / per_second.max(1)));
        while begin.elapsed() < due && !progress.stop.load(Relaxed) {
            sleep(Duration::from_micros(100));
        }
        let full = Instant::now();
        while number.saturating_sub(progress.received.load(Relaxed) + written_off) > WINDOW {
            if full.elapsed() > SLOWEST {
                written_off = number.saturating_sub(progress.received.load(Relaxed));
            } else {
                sleep(Duration::from_micros(50));
            }
        }
        if progress.stop.load(Relaxed) {
            return Ok(number);
        }
        let count = ways.len();
        let at = usize::try_from(number).unwrap_or_default() % count.max(1);
        let Some(way) = ways.get(at) else { return Ok(0) };
        let round = number / u64::try_from(count).unwrap_or(1);
        let port = FIRST + u16::try_from(round % flows.max(1)).unwrap_or_default();
        let packet = udp(way, port, u64::from(run) << 48 | number);
        sendto(&way.socket, &packet, SendFlags::empty(), &SocketAddr::new(way.to, 0))?;
        number += 1;
        progress.sent.store(number, Relaxed);
    }
}

/// A UDP header and the packet's number.
fn udp(way: &Way, port: u16, number: u64) -> [u8; 16] {
    let mut packet = [0; 16];
    let mut put = |at: usize, bytes: &[u8]| {
        packet.iter_mut().skip(at).zip(bytes).for_each(|(to, byte)| *to = *byte);
    };
    put(0, &port.to_be_bytes());
    put(2, &PORT.to_be_bytes());
    put(4, &16_u16.to_be_bytes());
    put(8, &number.to_be_bytes());
    if let (IpAddr::V6(from), IpAddr::V6(to)) = (way.from, way.to) {
        // Over IPv4 a checksum of zero says that there is none.
        let (from, to) = (from.octets(), to.octets());
        let words = [from, to, packet].concat();
        let words = words
            .chunks_exact(2)
            .map(|two| two.iter().fold(0, |sum, byte| sum << 8 | u32::from(*byte)));
        let mut sum = words.sum::<u32>() + 16 + 17;
        while sum >> 16 != 0 {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        let checksum = match !u16::try_from(sum).unwrap_or_default() {
            0 => 0xffff,
            other => other,
        };
        packet[6..8].copy_from_slice(&checksum.to_be_bytes());
    }
    packet
}

#[derive(Default)]
struct Arrived {
    numbers: Vec<bool>,
    leaked: Vec<(IpAddr, Instant)>,
}

fn receive(
    servers: &[UdpSocket],
    run: u16,
    progress: &Progress,
    pods: &[Pod<'_>],
) -> io::Result<Arrived> {
    let mut arrived = Arrived::default();
    let mut last = Instant::now();
    let wait = Timespec { tv_sec: 0, tv_nsec: 5_000_000 };
    let mut packet = [0; 64];
    let patience = || {
        let all = progress.received.load(Relaxed) >= progress.sent.load(Relaxed);
        if all { SILENCE } else { LATE }
    };
    while !progress.stop.load(Relaxed) || last.elapsed() < patience() {
        let readable = |server| PollFd::new(server, PollFlags::IN);
        let mut fds: Vec<_> = servers.iter().map(readable).collect();
        poll(&mut fds, Some(&wait))?;
        for server in servers {
            while let Ok((length, from)) = server.recv_from(&mut packet) {
                let bytes = packet.get(..length).and_then(|bytes| bytes.try_into().ok());
                let number = bytes.map(u64::from_be_bytes);
                // What is left of an earlier run has another number in front.
                let number = number.filter(|number| number >> 48 == u64::from(run));
                let at = number.and_then(|number| usize::try_from(number & NUMBER).ok());
                let Some(at) = at else { continue };
                if arrived.numbers.len() <= at {
                    arrived.numbers.resize(at + 4096, false);
                }
                if let Some(seen) = arrived.numbers.get_mut(at) {
                    *seen = true;
                }
                let allowed =
                    pods.get(at / 2 % pods.len().max(1)).map_or(&[][..], |pod| pod.allowed);
                if !allowed.iter().flatten().any(|right| *right == from.ip()) {
                    arrived.leaked.push((from.ip(), Instant::now()));
                }
                progress.received.fetch_add(1, Relaxed);
                last = Instant::now();
            }
        }
    }
    Ok(arrived)
}
