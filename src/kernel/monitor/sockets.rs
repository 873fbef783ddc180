//! The sockets of a watch, which wait in the datapath until it begins.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::filter;
use crate::error::{KernelError, errno};
use crate::kernel::netlink::socket::Socket;
use crate::kernel::nft;

/// Groups of the routing subsystem (`enum rtnetlink_groups`): links, neighbours with forwarding
/// entries, IPv4 addresses, routes, rules, the same of IPv6, and settings of IPv4.
pub(super) const ROUTING: [u32; 9] = [1, 3, 5, 7, 8, 9, 11, 19, 24];

/// `NFNLGRP_NFTABLES`.
pub(super) const NETFILTER: u32 = 7;

const BUSY: &str = "drop the other watch of this datapath first";

/// What a datapath and its watch have in common.
#[derive(Clone, Debug)]
pub(crate) struct Shared {
    /// The socket for notifications of routing while there is no watch; opened with the datapath,
    /// because a socket belongs to the network namespace that its thread was in then.
    idle: Arc<Mutex<Option<Socket>>>,
    /// The one for notifications of nf_tables.
    pub(super) rules: Arc<Mutex<Socket>>,
    /// Index of our device, the last one known; 0 for none.
    device: Arc<AtomicU32>,
    /// Whether notifications were lost outside of the sockets.
    missed: Arc<AtomicBool>,
}

impl Shared {
    /// Opens the sockets, which are in no multicast group yet.
    pub(crate) fn open(device: Arc<AtomicU32>, netfilter: Socket) -> io::Result<Self> {
        let routing = Socket::open(filter::ROUTE)?;
        let (idle, rules) = (Mutex::new(Some(routing)), Mutex::new(netfilter));
        let missed = Arc::default();
        Ok(Self { idle: Arc::new(idle), rules: Arc::new(rules), device, missed })
    }

    pub(super) fn device(&self) -> u32 {
        self.device.load(Ordering::Relaxed)
    }

    /// Takes the socket for routing, for a watch that begins.
    pub(super) fn take(&self, what: &str) -> Result<Socket, KernelError> {
        let socket = lock(&self.idle).take();
        self.has_missed();
        socket.ok_or_else(|| KernelError::refused(what, errno::EBUSY).with_remedy(BUSY))
    }

    /// Takes the socket back, so that the datapath can be watched again.
    pub(super) fn put_back(&self, routing: Socket) {
        let mut idle = lock(&self.idle);
        let _not_joined = lock(&self.rules).leave(NETFILTER);
        for group in ROUTING {
            let _not_joined = routing.leave(group);
        }
        *idle = Some(routing);
    }

    /// Takes the watch out of the group of nf_tables until [`resume`](Self::resume).
    pub(super) fn pause(&self) {
        if lock(&self.idle).is_none() {
            let _still_joined = lock(&self.rules).leave(NETFILTER);
        }
    }

    /// Puts the watch into the group of nf_tables again.
    ///
    /// # Errors
    ///
    /// It is not in it.
    pub(super) fn resume(&self) -> io::Result<()> {
        let idle = lock(&self.idle);
        if idle.is_none() { lock(&self.rules).join(NETFILTER) } else { Ok(()) }
    }

    /// Has the watch become readable, and say that it missed something.
    pub(super) fn missed(&self) {
        let idle = lock(&self.idle);
        if idle.is_none() {
            self.missed.store(true, Ordering::Relaxed);
            // Whatever is answered, it is something to read.
            let _asked = nft::ask_generation(&mut lock(&self.rules));
        }
    }

    /// Whether the watch missed something since this was asked last.
    pub(super) fn has_missed(&self) -> bool {
        self.missed.swap(false, Ordering::Relaxed)
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every change under the locks here is a single one.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
