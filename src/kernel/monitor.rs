//! News that somebody else may have touched what is ours.

mod classify;
mod echo;
mod filter;
pub(crate) mod freshness;
mod sockets;
#[cfg(test)]
pub(super) mod tests;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use rustix::event::epoll::{self, EventData, EventFlags};
use socket2::SockFilter;

use super::netlink::message::Messages;
use super::netlink::socket::Socket;
use crate::error::{KernelError, errno};
use crate::event::News;

pub(super) use echo::Expected;
use sockets::{NETFILTER, ROUTING};
pub(super) use sockets::{Shared, lock};

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
/// What the datapath writes itself does not wake it: the kernel says who asked, and a socket
/// filter drops those messages. Of devices, forwarding entries, IPv6 addresses and deleted
/// neighbours the kernel does not say it; those writes make it readable and drain to nothing.
/// A write of ours may still be taken for news where it has side effects, such as a new Ethernet
/// address, which makes the kernel forget neighbours; the repair then finds nothing to do.
///
/// # What it costs
///
/// A foreign change that must be looked at costs microseconds and a wake-up; 2000 neighbours of
/// other devices were drained in 15 ms without optimisation. The kernel writes a message for each
/// nf_tables object that is changed, ours too, before the filter drops it; for
/// the time of a large one the watch does not listen, and the datapath sees to it that nothing is
/// missed unsaid. Up to 1 MiB of news waits to be read, less without `CAP_NET_ADMIN` in the first user namespace; what does not fit
/// is [`News::lost`].
///
/// It is no substitute for reconciling now and then: what the kernel tells nobody, nobody hears.
/// IPv4 routes that go with a device are an example, though there the device is told.
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
    heard: Option<u32>,
}

impl Watch {
    fn begin(&mut self, routing: u32, netfilter: u32) -> io::Result<()> {
        lock(&self.shared.expected).begin();
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
        let Self { routing: Some(routing), shared, unsigned, heard, .. } = self else {
            return Ok(news);
        };
        let mut expected = lock(&shared.expected);
        let mut rules = lock(&shared.rules);
        for socket in [routing, &mut *rules] {
            loop {
                match socket.receive() {
                    Ok(datagram) => {
                        for message in Messages::new(datagram) {
                            match message {
                                Ok(message) => {
                                    *heard = classify::generation(&message).or(*heard);
                                    classify::read(&message, &mut expected, unsigned, &mut news);
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
        news.lost |= expected.has_missed();
        if news.lost {
            *unsigned = false;
            expected.begin();
        }
        Ok(news)
    }

    /// Nothing that was being told is waited for any more.
    pub(crate) const fn forget_beginning(&mut self) {
        self.unsigned = false;
    }

    /// Generation of the rules that the last foreign transaction of those drained led to.
    pub(crate) const fn heard(&self) -> Option<u32> {
        self.heard
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

/// Has a socket hear what the kernel tells these groups, but for what a program drops.
fn listen(
    poll: &OwnedFd,
    socket: &mut Socket,
    program: &[SockFilter],
    groups: &[u32],
) -> io::Result<()> {
    socket.filter(program)?;
    // Left from an earlier watch.
    while may_have_more(&socket.receive().map(drop)) {}
    socket.reserve_unread(UNREAD);
    epoll::add(poll, &*socket, EventData::new_u64(0), EventFlags::IN)?;
    groups.iter().try_for_each(|group| socket.join(*group))
}

/// Whether to read on: something was there, or was lost, or is too large.
fn may_have_more(received: &io::Result<()>) -> bool {
    match received {
        Ok(()) => true,
        Err(error) => {
            matches!(error.raw_os_error(), Some(errno::ENOBUFS | errno::EINTR))
                || error.kind() == io::ErrorKind::InvalidData
        }
    }
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
        lock(&self.shared.expected).end();
        let _not_joined = lock(&self.shared.rules).leave(NETFILTER);
        if let Some(routing) = self.routing.take() {
            for group in ROUTING {
                let _not_joined = routing.leave(group);
            }
            self.shared.put_back(routing);
        }
    }
}
