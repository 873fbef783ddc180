//! Watch for changes that other programs make to the datapath's objects in the kernel.

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
use crate::event::ChangeEvents;

pub(super) use sockets::Shared;
use sockets::{NETFILTER, ROUTING, lock};

/// Receive buffer for unread notifications, in bytes.
///
/// Notifications that do not fit are dropped by the kernel and reported as lost.
const UNREAD: usize = 1 << 20;

/// Subscription to netlink notifications about changes by other programs.
///
/// Created by [`KernelDatapath::watch`](crate::KernelDatapath::watch). It has one file descriptor,
/// which becomes readable within microseconds of a change; [`drain`](Self::drain) reads the
/// notifications and says which parts changed. The order that misses nothing is: watch, then
/// reconcile, then wait.
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
///     let events = watch.drain()?;
///     if !events.is_empty() {
///         let report = egress.repair()?;
///         eprintln!("{events}; repaired:\n{}", report.changes);
///     }
/// }
/// # }
/// ```
///
/// The guide has a [complete loop](crate::guide::operation#the-loop-with-threads) with `poll(2)`
/// and threads, which works with tokio, too. With tokio's `AsyncFd` instead: await
/// `readable_mut()`, call `clear_ready()` on the guard, then [`drain`](Self::drain) on its
/// `get_inner_mut()`, and run the repair in `spawn_blocking`. tokio 1.54 deprecates `AsyncFd::new`
/// in favour of the unsafe `AsyncFd::register`, whose condition the watch meets: it owns its
/// descriptor and never replaces it. Edge-triggered pollers must read until nothing is left;
/// [`drain`](Self::drain) does.
///
/// # Which changes are reported
///
/// Changes of the datapath's nf_tables table, of routes and rules with its protocol number, of
/// routes that replace others outside the kernel's own tables, of the VXLAN device, of the
/// addresses, neighbours and FDB entries on it, and of its `rp_filter`. Other changes of links,
/// addresses, neighbours, rules and nf_tables tables also make the descriptor readable, but
/// draining them reports nothing. Other routes, of which a router has many, are dropped by a socket
/// filter in the kernel. A route that another program adds to one of the datapath's tables is not
/// reported, because `repair` does not touch it.
///
/// Changes that the datapath makes in nf_tables, routes, rules and IPv4 addresses do not wake it: a
/// notification carries the port of the requesting socket, and the socket filter drops those with
/// the ports of the datapath. So a change of pods or policies alone is never reported. In
/// notifications of the device, its IPv6 addresses, FDB entries and deleted neighbours the kernel
/// sets no port: a change of these by the datapath, as when a node is added or removed, may be
/// reported once, like a change by another program. The repair that follows reads the device, the
/// routes and the rules again, and writes nothing.
///
/// # Cost
///
/// A change by another program that passes the filter costs microseconds and a wake-up; 2000
/// neighbours of other devices were drained in 15 ms without optimisation. The kernel writes a
/// notification for each nf_tables object that changes, also for the datapath's own, before the
/// filter drops it. During a large transaction the watch therefore leaves the multicast group, and
/// the datapath makes sure that changes missed meanwhile are reported as lost. Up to 1 MiB of
/// notifications is buffered, less without `CAP_NET_ADMIN` in the initial user namespace; if more
/// arrive, [`ChangeEvents::lost`] is set.
///
/// The watch does not replace periodic reconciliation: some changes produce no notification. IPv4
/// routes that the kernel removes with a device are an example, though the device itself produces
/// one.
#[derive(Debug)]
pub struct Watch {
    /// Epoll instance of both sockets.
    poll: OwnedFd,
    /// Routing socket; `None` only while the watch is dropped.
    routing: Option<Socket>,
    shared: Shared,
    /// Whether a transaction by another program that changed our table was read without its end.
    unsigned: bool,
    /// Ruleset generation after the last transaction by another program.
    generation: Option<u32>,
}

impl Shared {
    /// Starts a watch that ignores changes requested from these ports.
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

    /// Reads all pending notifications; the descriptor is then not readable until more arrive.
    ///
    /// Never blocks. An error is one of the socket, after which the watch cannot be used; lost
    /// notifications are no error but set [`ChangeEvents::lost`].
    pub fn drain(&mut self) -> Result<ChangeEvents, KernelError> {
        let mut events = ChangeEvents::default();
        let Self { routing: Some(routing), shared, unsigned, generation, .. } = self else {
            return Ok(events);
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
                                    classify::read(&message, device, unsigned, &mut events);
                                }
                                Err(_) => events.lost = true,
                            }
                        }
                    }
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    // The receive buffer overflowed, or a message is larger than any known one.
                    Err(error)
                        if error.raw_os_error() == Some(errno::ENOBUFS)
                            || error.kind() == io::ErrorKind::InvalidData =>
                    {
                        events.lost = true;
                    }
                    Err(error) => return Err(KernelError::io("read the kernel's events", &error)),
                }
            }
        }
        events.lost |= shared.has_missed();
        *unsigned &= !events.lost;
        Ok(events)
    }

    /// Stops waiting for the end of a transaction whose start was read.
    pub(crate) const fn forget_beginning(&mut self) {
        self.unsigned = false;
    }

    /// Ruleset generation after the last drained transaction by another program.
    pub(crate) const fn generation(&self) -> Option<u32> {
        self.generation
    }

    /// Whether a transaction that changed our table was drained without its end.
    pub(crate) const fn is_amid_change(&self) -> bool {
        self.unsigned
    }

    /// Shrinks the receive buffers of the sockets to this many bytes, so that they overflow.
    #[cfg(test)]
    pub(super) fn shrink(&mut self, bytes: usize) {
        self.routing.as_ref().unwrap().reserve_unread(bytes);
        lock(&self.shared.rules).reserve_unread(bytes);
    }
}

/// Joins a socket to multicast groups, with a filter that drops unwanted notifications.
fn listen(
    poll: &OwnedFd,
    socket: &mut Socket,
    program: &[SockFilter],
    groups: &[u32],
) -> io::Result<()> {
    socket.filter(program)?;
    // Left over from an earlier watch.
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
    /// Returns the sockets to the datapath, so that it can be watched again.
    fn drop(&mut self) {
        if let Some(routing) = self.routing.take() {
            self.shared.put_back(routing);
        }
    }
}
