//! Sockets of a watch, held by the datapath until a watch starts.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::error::{KernelError, errno};
use crate::kernel::netlink::socket::{NETLINK_ROUTE, Socket};
use crate::kernel::nft;

/// Rtnetlink multicast groups of a watch (`enum rtnetlink_groups`).
///
/// Links, neighbours with FDB entries, IPv4 addresses, routes and rules, the same of IPv6, and IPv4
/// settings (netconf).
pub(super) const ROUTING: [u32; 9] = [1, 3, 5, 7, 8, 9, 11, 19, 24];

/// `NFNLGRP_NFTABLES`.
pub(super) const NETFILTER: u32 = 7;

const BUSY: &str = "drop the other watch of this datapath first";

/// State shared by a datapath and its watch.
#[derive(Clone, Debug)]
pub(crate) struct Shared {
    /// Socket for routing notifications while there is no watch.
    ///
    /// Opened with the datapath, because a socket belongs to the network namespace that its thread
    /// was in when it opened it.
    idle: Arc<Mutex<Option<Socket>>>,
    /// Socket for nf_tables notifications.
    pub(super) rules: Arc<Mutex<Socket>>,
    /// Last known index of the VXLAN device; 0 for none.
    device: Arc<AtomicU32>,
    /// Whether notifications were missed while the watch was out of the multicast group.
    missed: Arc<AtomicBool>,
}

impl Shared {
    /// Opens the sockets, which have joined no multicast group yet.
    pub(crate) fn open(device: Arc<AtomicU32>, netfilter: Socket) -> io::Result<Self> {
        let routing = Socket::open(NETLINK_ROUTE)?;
        let (idle, rules) = (Mutex::new(Some(routing)), Mutex::new(netfilter));
        let missed = Arc::default();
        Ok(Self { idle: Arc::new(idle), rules: Arc::new(rules), device, missed })
    }

    pub(super) fn device(&self) -> u32 {
        self.device.load(Ordering::Relaxed)
    }

    /// Takes the routing socket for a watch that starts.
    pub(super) fn take(&self, what: &str) -> Result<Socket, KernelError> {
        let socket = lock(&self.idle).take();
        self.has_missed();
        socket.ok_or_else(|| KernelError::refused(what, errno::EBUSY).with_remedy(BUSY))
    }

    /// Takes the routing socket back, so that the datapath can be watched again.
    pub(super) fn put_back(&self, routing: Socket) {
        let mut idle = lock(&self.idle);
        let _not_joined = lock(&self.rules).leave(NETFILTER);
        for group in ROUTING {
            let _not_joined = routing.leave(group);
        }
        *idle = Some(routing);
    }

    /// Leaves the nf_tables multicast group until [`resume`](Self::resume).
    pub(super) fn pause(&self) {
        if lock(&self.idle).is_none() {
            let _still_joined = lock(&self.rules).leave(NETFILTER);
        }
    }

    /// Joins the nf_tables multicast group again.
    ///
    /// # Errors
    ///
    /// The socket could not join the group.
    pub(super) fn resume(&self) -> io::Result<()> {
        let idle = lock(&self.idle);
        if idle.is_none() { lock(&self.rules).join(NETFILTER) } else { Ok(()) }
    }

    /// Makes the watch readable and sets its flag for lost notifications.
    pub(super) fn missed(&self) {
        let idle = lock(&self.idle);
        if idle.is_none() {
            self.missed.store(true, Ordering::Relaxed);
            // Any reply makes the socket readable.
            let _asked = nft::ask_generation(&mut lock(&self.rules));
        }
    }

    /// Whether notifications were lost since the last call.
    pub(super) fn has_missed(&self) -> bool {
        self.missed.swap(false, Ordering::Relaxed)
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every change under these locks is a single assignment, so a panic leaves no broken state.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
