//! The sockets of a watch, which wait in the datapath until it begins.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::epoll::{self, CreateFlags};

use super::{Expected, Watch, filter};
use crate::error::{KernelError, errno};
use crate::kernel::netlink::socket::Socket;
use crate::kernel::nft;

/// Groups of the routing subsystem (`enum rtnetlink_groups`): links, neighbours with forwarding
/// entries, IPv4 addresses, routes, rules, the same of IPv6, and settings of IPv4.
pub(crate) const ROUTING: [u32; 9] = [1, 3, 5, 7, 8, 9, 11, 19, 24];

/// `NFNLGRP_NFTABLES`.
pub(crate) const NETFILTER: u32 = 7;

const BUSY: &str = "drop the other watch of this datapath first";

/// What a datapath and its watch have in common.
#[derive(Clone, Debug)]
pub(crate) struct Shared {
    /// The socket that hears of routing while there is no watch; opened with the datapath, because
    /// a socket belongs to the network namespace that its thread was in then.
    idle: Arc<Mutex<Option<Socket>>>,
    /// The one that hears of the rules.
    pub(crate) rules: Arc<Mutex<Socket>>,
    pub(crate) expected: Arc<Mutex<Expected>>,
}

impl Shared {
    /// Opens the sockets, which hear nothing yet.
    pub(crate) fn open(expected: Arc<Mutex<Expected>>, netfilter: Socket) -> io::Result<Self> {
        let routing = Socket::open(filter::ROUTE)?;
        let (idle, rules) = (Mutex::new(Some(routing)), Mutex::new(netfilter));
        Ok(Self { idle: Arc::new(idle), rules: Arc::new(rules), expected })
    }

    /// Begins to watch; what is asked for from these ports is no news.
    pub(crate) fn watch(&self, routing: u32, netfilter: u32) -> Result<Watch, KernelError> {
        let what = "watch the kernel's state";
        let failed = |error: io::Error| KernelError::io(what, &error);
        let poll = epoll::create(CreateFlags::CLOEXEC).map_err(|error| failed(error.into()))?;
        let ear = lock(&self.idle).take();
        let ear = ear.ok_or_else(|| KernelError::refused(what, errno::EBUSY).with_remedy(BUSY))?;
        let shared = self.clone();
        let mut watch = Watch { poll, routing: Some(ear), shared, unsigned: false, heard: None };
        watch.begin(routing, netfilter).map_err(failed)?;
        Ok(watch)
    }

    /// Takes the socket back, so that the datapath can be watched again.
    pub(crate) fn put_back(&self, routing: Socket) {
        *lock(&self.idle) = Some(routing);
    }

    /// Has the watch hear nothing of the rules until [told to again](Self::hear_again).
    pub(crate) fn deafen(&self) {
        if lock(&self.expected).is_active() {
            let _still_hears = lock(&self.rules).leave(NETFILTER);
        }
    }

    /// Has the watch hear of the rules again.
    ///
    /// # Errors
    ///
    /// It hears no more of them.
    pub(crate) fn hear_again(&self) -> io::Result<()> {
        if lock(&self.expected).is_active() { lock(&self.rules).join(NETFILTER) } else { Ok(()) }
    }

    /// Has the watch become readable, and say that it missed something.
    pub(crate) fn missed(&self) {
        let mut expected = lock(&self.expected);
        if expected.is_active() {
            expected.missed();
            // Whatever is answered, it is something to read.
            let _asked = nft::ask_generation(&mut lock(&self.rules));
        }
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every change under the locks here is a single one.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
