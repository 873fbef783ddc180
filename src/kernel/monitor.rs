//! Watch for changes that other programs make to the datapath's objects in the kernel.

mod classify;
mod filter;
mod freshness;
mod listener;
#[cfg(test)]
pub(super) mod tests;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard};

use super::netlink::socket::Socket;
use super::rtnetlink::socket::RouteSocket;
use crate::error::{KernelError, errno};
use crate::event::ChangeEvents;
use listener::Listener;

const BUSY: &str = "drop the other watch of this datapath first";

/// Subscription to netlink notifications about changes by other programs.
///
/// Created by [`KernelDatapath::watch`](crate::KernelDatapath::watch). It has one file descriptor,
/// which becomes readable within microseconds of a change; [`drain`](Self::drain) reads the
/// notifications and says which parts changed. The order that misses nothing is: watch, then
/// reconcile, then wait. Events that the datapath reads itself, to see whether the state is current,
/// are kept until they are drained, and the descriptor is readable for them.
///
/// ```no_run
/// use std::os::fd::AsFd;
/// # use egress_datapath::{KernelDatapath, Ownership, Reconciler};
/// # fn wait_until_readable(_: std::os::fd::BorrowedFd<'_>) {}
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let mut egress = Reconciler::new(KernelDatapath::open_as(Ownership::Exclusive)?);
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
/// addresses, neighbours and FDB entries on it, and of its `rp_filter`, and the deletion of an egress
/// IP that this crate has added to another interface. A new rule of another
/// program that precedes the datapath's rules and may take its packets is reported as
/// [`Component::Rule`](crate::event::Component::Rule), too: `repair` changes nothing about it, and
/// [`Preflight::run_routing`](crate::preflight::Preflight::run_routing) names it with a remedy. Other changes of links,
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
/// neighbours of other devices were drained in 15 ms without optimisation. While there is a watch,
/// the kernel writes a notification for each nf_tables object that any program on the machine
/// changes, before the filter drops it: a transaction of 100 000 elements took 2.2 to 2.7 times as
/// long. During a large transaction of its own the datapath leaves the multicast group, and reports
/// changes missed meanwhile as lost. Dropping the watch ends the cost. Without a watch a transaction
/// of any other program makes the datapath read its nf_tables table again, because only a watch
/// shows that it changed another table. Up to 1 MiB of notifications is buffered, less without
/// `CAP_NET_ADMIN` in the initial user namespace; if more arrive, [`ChangeEvents::lost`] is set.
///
/// The watch does not replace periodic reconciliation: some changes produce no notification. IPv4
/// routes that the kernel removes with a device are an example, though the device itself produces
/// one.
#[derive(Debug)]
pub struct Watch {
    /// Epoll instance of the sockets, and of the events that the datapath has read.
    poll: OwnedFd,
    monitor: Monitor,
}

/// The listener of a datapath, shared with its watch.
///
/// It is not locked during a request of the datapath, so that [`Watch::drain`] never waits for one.
#[derive(Clone, Debug)]
pub(super) struct Monitor(Arc<Mutex<Listener>>);

impl Monitor {
    /// Opens the sockets; they ignore changes requested from these ports.
    pub(super) fn open(routing: &RouteSocket, rules: Socket, ports: [u32; 2]) -> io::Result<Self> {
        Ok(Self(Arc::new(Mutex::new(Listener::open(routing, rules, ports)?))))
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Listener> {
        self.0.lock().unwrap_or_else(|poisoned| {
            // The thread that panicked may have read a notification and not recorded its change.
            self.0.clear_poison();
            let mut listener = poisoned.into_inner();
            listener.lose();
            listener
        })
    }

    /// Starts a watch.
    pub(super) fn watch(&self) -> Result<Watch, KernelError> {
        let what = "watch the kernel's state";
        let mut listener = self.lock();
        if listener.is_watched() {
            return Err(KernelError::refused(what, errno::EBUSY).with_remedy(BUSY));
        }
        let poll = listener.begin_watch().map_err(|error| KernelError::io(what, &error))?;
        Ok(Watch { poll, monitor: self.clone() })
    }
}

impl Watch {
    /// Reads all pending notifications; the descriptor is then not readable until more arrive.
    ///
    /// Never blocks. An error is one of the socket, after which the watch [cannot be
    /// used](crate::guide::operation#calls); lost notifications are no error but set
    /// [`ChangeEvents::lost`].
    pub fn drain(&mut self) -> Result<ChangeEvents, KernelError> {
        let events = self.monitor.lock().drain();
        events.map_err(|error| KernelError::io("read the kernel's events", &error))
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
    /// Leaves the nf_tables multicast group; the datapath can be watched again.
    fn drop(&mut self) {
        self.monitor.lock().end_watch();
    }
}
