//! Listening sockets of a datapath, and what was read from them.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::event::{EventfdFlags, eventfd};

use super::classify;
use super::filter;
use crate::error::errno;
use crate::event::{ChangeEvents, Component};
use crate::kernel::netlink::message::Messages;
use crate::kernel::netlink::socket::{NETLINK_ROUTE, Socket};
use crate::kernel::rtnetlink::ahead::OurRules;
use crate::kernel::rtnetlink::socket::RouteSocket;

/// Rtnetlink multicast groups of a datapath (`enum rtnetlink_groups`).
///
/// Links, neighbours with FDB entries, IPv4 addresses, routes and rules, the same of IPv6, and IPv4
/// settings (netconf).
const ROUTING: [u32; 9] = [1, 3, 5, 7, 8, 9, 11, 19, 24];

/// `NFNLGRP_NFTABLES`.
const NETFILTER: u32 = 7;

/// Receive buffer for unread notifications, in bytes.
///
/// Notifications that do not fit are dropped by the kernel and reported as lost.
const UNREAD: usize = 1 << 20;

/// Number of datagrams of a socket that are read at once; its receive buffer never holds as many.
///
/// While they are read, the datapath waits for the listener. Another program may write faster than
/// they are read.
const AT_ONCE: usize = 16_384;

/// The listening sockets of a datapath, which also serve the caller's watch.
///
/// If any socket is in the nf_tables multicast group (`netlink_has_listeners`), the kernel writes a
/// notification of every element that any program changes, and only then runs the socket filter
/// that drops it: that is half of the cost of a large transaction. So the socket is in the group
/// only while there is a watch.
#[derive(Debug)]
pub(crate) struct Listener {
    routing: Socket,
    rules: Socket,
    /// Last known index of the VXLAN device; 0 for none.
    device: Arc<AtomicU32>,
    our_rules: OurRules,
    /// True if the routing socket is in its multicast groups.
    pub(super) routing_joined: bool,
    /// True if the nf_tables socket is in its multicast group.
    pub(super) rules_joined: bool,
    /// True if a transaction by another program that changed our table was read without its end.
    pub(super) unsigned: bool,
    /// Ruleset generation after the last transaction by another program that was read.
    pub(super) last_end: Option<u32>,
    /// Our table, known at this ruleset generation.
    ///
    /// While the socket is in the group, every later transaction is notified.
    pub(super) table: Part<u32>,
    /// The routing part.
    pub(super) rest: Part<()>,
    /// Events for the watch; `None` while there is none.
    pending: Option<Pending>,
}

/// Knowledge about a part of the state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part<T> {
    /// It has to be read.
    Unknown,
    /// It is being read, and no change was notified since that began.
    ///
    /// The watch may be drained in another thread meanwhile.
    Reading,
    /// It is as last read or written.
    Known(T),
}

/// Events that the watch has not drained.
#[derive(Debug)]
struct Pending {
    events: ChangeEvents,
    /// Eventfd, readable while there are events.
    event_fd: OwnedFd,
}

impl Listener {
    /// Opens the sockets, which have joined no multicast group yet.
    ///
    /// They do not receive changes requested from these ports. A socket belongs to the network
    /// namespace that its thread was in when it opened it.
    pub(super) fn open(
        ours: &RouteSocket,
        rules: Socket,
        [routing_port, rules_port]: [u32; 2],
    ) -> io::Result<Self> {
        let routing = Socket::open(NETLINK_ROUTE)?;
        routing.filter(&filter::routing(routing_port))?;
        rules.filter(&filter::netfilter(rules_port))?;
        let listener = Self {
            routing,
            rules,
            device: ours.device_index(),
            our_rules: ours.our_rules().clone(),
            routing_joined: false,
            rules_joined: false,
            unsigned: false,
            last_end: None,
            table: Part::Unknown,
            rest: Part::Unknown,
            pending: None,
        };
        listener.reserve(UNREAD);
        Ok(listener)
    }

    /// Sets the receive buffers of the sockets to this many bytes.
    pub(super) fn reserve(&self, bytes: usize) {
        self.routing.reserve_unread(bytes);
        self.rules.reserve_unread(bytes);
    }

    /// Joins the routing groups.
    pub(super) fn join_routing(&mut self) -> io::Result<()> {
        if !self.routing_joined {
            ROUTING.iter().try_for_each(|group| self.routing.join(*group))?;
            self.routing_joined = true;
        }
        Ok(())
    }

    /// Joins the nf_tables group.
    pub(super) fn join_rules(&mut self) -> io::Result<()> {
        self.rules.join(NETFILTER)?;
        self.rules_joined = true;
        Ok(())
    }

    /// Leaves the nf_tables group, and reads what is left of it.
    pub(super) fn leave_rules(&mut self) {
        let _still_joined = self.rules.leave(NETFILTER);
        self.rules_joined = false;
        let _lost = self.take_in();
        // The end of a transaction whose start was read is not received.
        self.unsigned = false;
    }

    /// Starts to keep events for a watch; returns the epoll instance that is readable for them.
    pub(super) fn begin_watch(&mut self) -> io::Result<OwnedFd> {
        let poll = epoll::create(CreateFlags::CLOEXEC)?;
        let event_fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        for source in [self.routing.as_fd(), self.rules.as_fd(), event_fd.as_fd()] {
            epoll::add(&poll, source, EventData::new_u64(0), EventFlags::IN)?;
        }
        self.join_routing()?;
        self.join_rules()?;
        // Transactions since the table was known were not notified.
        self.table = Part::Unknown;
        // Left over from before the watch.
        let _lost = self.take_in();
        self.pending = Some(Pending { events: ChangeEvents::default(), event_fd });
        Ok(poll)
    }

    pub(super) const fn is_watched(&self) -> bool {
        self.pending.is_some()
    }

    pub(super) fn end_watch(&mut self) {
        self.pending = None;
        self.leave_rules();
    }

    /// Reads all pending notifications, and keeps their events for the watch.
    ///
    /// # Errors
    ///
    /// An error of a socket; it also counts as lost notifications.
    pub(super) fn take_in(&mut self) -> io::Result<()> {
        self.take_in_at_most(AT_ONCE)
    }

    /// Reads so many datagrams of each socket; more count as lost, and the next call reads them.
    pub(super) fn take_in_at_most(&mut self, most: usize) -> io::Result<()> {
        let (mut events, mut failed) = (ChangeEvents::default(), Ok(()));
        let device = self.device.load(Ordering::Relaxed);
        for socket in [&mut self.routing, &mut self.rules] {
            let mut left = most;
            loop {
                if left == 0 {
                    events.lost = true;
                    break;
                }
                left -= 1;
                match socket.receive() {
                    Ok(datagram) => {
                        for message in Messages::new(datagram) {
                            let Ok(message) = message else {
                                events.lost = true;
                                continue;
                            };
                            self.last_end = classify::generation(&message).or(self.last_end);
                            let ours = (device, &self.our_rules);
                            classify::read(&message, ours, &mut self.unsigned, &mut events);
                        }
                    }
                    Err(error) => match (error.kind(), error.raw_os_error()) {
                        (io::ErrorKind::Interrupted, _) => {}
                        (io::ErrorKind::WouldBlock, _) => break,
                        // The receive buffer overflowed, or a message is larger than any known one.
                        (io::ErrorKind::InvalidData, _) | (_, Some(errno::ENOBUFS)) => {
                            events.lost = true;
                        }
                        _ => {
                            (events.lost, failed) = (true, Err(error));
                            break;
                        }
                    },
                }
            }
        }
        if events.lost {
            self.unsigned = false;
            self.end();
        }
        if self.unsigned || events.changed.contains(&Component::Firewall) {
            self.table = Part::Unknown;
        }
        if events.changed.iter().any(|part| *part != Component::Firewall) {
            self.rest = Part::Unknown;
        }
        self.report(events);
        failed
    }

    /// Forgets everything: the state has to be read again.
    pub(crate) const fn end(&mut self) {
        (self.table, self.rest) = (Part::Unknown, Part::Unknown);
    }

    /// Treats everything as changed, as after lost notifications.
    pub(super) fn lose(&mut self) {
        self.unsigned = false;
        self.end();
        self.report(ChangeEvents { lost: true, ..ChangeEvents::default() });
    }

    /// Keeps events for the watch, which becomes readable.
    fn report(&mut self, events: ChangeEvents) {
        let Some(pending) = self.pending.as_mut().filter(|_| !events.is_empty()) else { return };
        if pending.events.is_empty() {
            // The eventfd was cleared with the last event.
            let _written = rustix::io::write(&pending.event_fd, &1_u64.to_ne_bytes());
        }
        pending.events.changed.extend(events.changed);
        pending.events.writers.extend(events.writers);
        pending.events.lost |= events.lost;
    }

    /// Takes the events for the watch, which is not readable until there are more.
    pub(super) fn drain(&mut self) -> io::Result<ChangeEvents> {
        self.take_in()?;
        let Some(pending) = &mut self.pending else { return Ok(ChangeEvents::default()) };
        let _empty = rustix::io::read(&pending.event_fd, &mut [0; 8]);
        Ok(std::mem::take(&mut pending.events))
    }
}
