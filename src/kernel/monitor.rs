//! News that somebody else may have touched what is ours.

mod classify;
mod filter;
pub(crate) mod freshness;
mod sockets;
#[cfg(test)]
pub(super) mod tests;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use socket2::SockFilter;

use super::netlink::exchange::discard;
use super::netlink::message::Messages;
use super::netlink::socket::Socket;
use crate::error::{KernelError, errno};
use crate::event::News;

pub(super) use sockets::Shared;
use sockets::{NETFILTER, ROUTING, lock};

/// Bytes of news that wait to be read; what does not fit is lost, and that is said.
const UNREAD: usize = 1 << 20;

/// Readable when somebody else may have touched what is ours.
///
/// Made by [`KernelDatapath::watch`](crate::KernelDatapath::watch). It has one descriptor, which
/// becomes readable within microseconds of a change; [`drain`](Self::drain) says what it was, and
/// takes the news out. The order that misses nothing is: watch, then reconcile, then wait.
///
/// ```no_run
/// use std::os::fd::AsFd;
/// # use egress_datapath::{KernelDatapath, KernelError, Reconciler};
/// # fn wait_until_readable(_: std::os::fd::BorrowedFd<'_>) {}
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let mut egress = Reconciler::new(KernelDatapath::open()?);
/// let mut watch = egress.datapath().watch()?;
/// // … egress.reconcile(&cluster, &policies)?;
/// loop {
///     wait_until_readable(watch.as_fd()); // poll(2) for POLLIN, with the slow poll's timeout
///     let news = watch.drain()?;
///     if !news.is_empty() {
///         let report = egress.repair()?;
///         eprintln!("{news}; repaired:\n{}", report.changes);
///     }
/// }
/// # }
/// ```
///
/// Under tokio it goes into an `AsyncFd`: await `readable_mut()`, call `clear_ready()` on the guard,
/// then [`drain`](Self::drain) on its `get_inner_mut()`, and make the repair in `spawn_blocking`.
/// Draining to the end is what an edge-triggered poller needs; [`drain`](Self::drain) does.
///
/// # What wakes it
///
/// Changes of our nf_tables table, routes and rules with our protocol, routes that replace others
/// outside the kernel's own tables, our device and the addresses, neighbours and forwarding entries
/// on it, and its `rp_filter`. Other changes of links, addresses, neighbours, rules and nf_tables
/// tables make it readable, too, and then drain to nothing; foreign routes, of which a router has
/// many, are dropped in the kernel. A route that somebody adds to a table of ours is no news,
/// because it is not ours to repair.
///
/// What the datapath writes into nf_tables, routes, rules and IPv4 addresses does not wake it: a
/// notification carries the port of the socket that asked, and a socket filter drops those of the
/// datapath. So a change of pods or policies alone is never reported. In notifications of the
/// device, its IPv6 addresses, forwarding entries and deleted neighbours the kernel gives no port:
/// a change of these by the datapath, as when a node comes or goes, may be reported once, like one
/// by others. The repair that follows reads the device, the routes and the rules again, and writes
/// nothing.
///
/// # What it costs
///
/// A foreign change that must be looked at costs microseconds and a wake-up; 2000 neighbours of
/// other devices were drained in 15 ms without optimisation. The kernel writes a notification for
/// each nf_tables object that is changed, ours too, before the filter drops it; for the time of a
/// large transaction the watch leaves the multicast group, and the datapath sees to it that what is
/// missed is reported as lost. Up to 1 MiB of notifications waits to be read, less without
/// `CAP_NET_ADMIN` in the first user namespace; what does not fit is [`News::lost`].
///
/// It is no substitute for reconciling now and then: of some changes the kernel sends no
/// notification. IPv4 routes that go with a device are an example, though there the device has one.
#[derive(Debug)]
pub struct Watch {
    /// An epoll instance of both sockets.
    poll: OwnedFd,
    /// Only nothing while it is dropped.
    routing: Option<Socket>,
    shared: Shared,
    /// Part of a foreign transaction was read that touched our table, but not its end.
    unsigned: bool,
    /// Generation of the rules that the last foreign transaction led to.
    generation: Option<u32>,
}

impl Shared {
    /// Begins to watch, but for what is asked for from these ports.
    pub(super) fn watch(&self, routing: u32, netfilter: u32) -> Result<Watch, KernelError> {
        let what = "watch the kernel's state";
        let failed = |error: io::Error| KernelError::io(what, &error);
        let poll = epoll::create(CreateFlags::CLOEXEC).map_err(|error| failed(error.into()))?;
        let (socket, shared) = (Some(self.take(what)?), self.clone());
        let mut watch = Watch { poll, routing: socket, shared, unsigned: false, generation: None };
        watch.begin(routing, netfilter).map_err(failed)?;
        Ok(watch)
    }
}

impl Watch {
    fn begin(&mut self, routing: u32, netfilter: u32) -> io::Result<()> {
        if let Some(socket) = &mut self.routing {
            listen(&self.poll, socket, &filter::routing(routing), &ROUTING)?;
        }
        let mut rules = lock(&self.shared.rules);
        listen(&self.poll, &mut rules, &filter::netfilter(netfilter), &[NETFILTER])
    }

    /// Takes all news out; afterwards it is not readable until there is more.
    ///
    /// Never blocks. An error is one of the socket, after which the watch is of no use; that news
    /// was lost is [`News::lost`], not an error.
    pub fn drain(&mut self) -> Result<News, KernelError> {
        let mut news = News::default();
        let Self { routing: Some(routing), shared, unsigned, generation, .. } = self else {
            return Ok(news);
        };
        let device = shared.device();
        let mut rules = lock(&shared.rules);
        for socket in [routing, &mut *rules] {
            loop {
                match socket.receive() {
                    Ok(datagram) => {
                        for message in Messages::new(datagram) {
                            match message {
                                Ok(message) => {
                                    *generation = classify::generation(&message).or(*generation);
                                    classify::read(&message, device, unsigned, &mut news);
                                }
                                Err(_) => news.lost = true,
                            }
                        }
                    }
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    // Too much at once, or a message larger than any that we know.
                    Err(error)
                        if error.raw_os_error() == Some(errno::ENOBUFS)
                            || error.kind() == io::ErrorKind::InvalidData =>
                    {
                        news.lost = true;
                    }
                    Err(error) => return Err(KernelError::io("read the kernel's news", &error)),
                }
            }
        }
        news.lost |= shared.has_missed();
        *unsigned &= !news.lost;
        Ok(news)
    }

    /// The end of a transaction whose beginning was read is not waited for any more.
    pub(crate) const fn forget_beginning(&mut self) {
        self.unsigned = false;
    }

    /// Generation of the rules that the last foreign transaction of those drained led to.
    pub(crate) const fn generation(&self) -> Option<u32> {
        self.generation
    }

    /// Whether part of a transaction was drained that touched our table, but not its end.
    pub(crate) const fn is_amid_change(&self) -> bool {
        self.unsigned
    }

    /// The sockets with a receive buffer of this many bytes, to have them overflow.
    #[cfg(test)]
    pub(super) fn shrink(&mut self, bytes: usize) {
        self.routing.as_ref().unwrap().reserve_unread(bytes);
        lock(&self.shared.rules).reserve_unread(bytes);
    }
}

/// Joins a socket to multicast groups, but for the notifications that a program drops.
fn listen(
    poll: &OwnedFd,
    socket: &mut Socket,
    program: &[SockFilter],
    groups: &[u32],
) -> io::Result<()> {
    socket.filter(program)?;
    // What is left of an earlier watch.
    discard(socket);
    socket.reserve_unread(UNREAD);
    epoll::add(poll, &*socket, EventData::new_u64(0), EventFlags::IN)?;
    groups.iter().try_for_each(|group| socket.join(*group))
}

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.poll.as_fd()
    }
}

impl AsRawFd for Watch {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}

impl Drop for Watch {
    /// Gives the sockets back, so that the datapath can be watched again.
    fn drop(&mut self) {
        if let Some(routing) = self.routing.take() {
            self.shared.put_back(routing);
        }
    }
}
