//! The sockets of a watch, which wait in the datapath until it begins.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Expected, Watch, filter};
use crate::error::{KernelError, errno};
use crate::kernel::socket::{Epoll, Socket};

/// Groups of the routing subsystem (`enum rtnetlink_groups`): links, neighbours with forwarding
/// entries, IPv4 addresses, routes, rules, the same of IPv6, and settings of IPv4.
const ROUTING: [u32; 9] = [1, 3, 5, 7, 8, 9, 11, 19, 24];

/// `NFNLGRP_NFTABLES`.
const NETFILTER: [u32; 1] = [7];

const BUSY: &str = "drop the other watch of this datapath first";

/// What a datapath and its watch have in common.
#[derive(Clone, Debug)]
pub(in crate::kernel) struct Shared {
    idle: Arc<Mutex<Option<Ears>>>,
    pub(in crate::kernel) expected: Arc<Mutex<Expected>>,
}

/// Sockets that hear what the kernel tells; opened with the datapath, because a socket belongs to
/// the network namespace that its thread was in then.
#[derive(Debug)]
pub(super) struct Ears {
    pub(super) routing: Socket,
    pub(super) netfilter: Socket,
}

impl Shared {
    /// Opens the sockets, which hear nothing yet.
    pub(in crate::kernel) fn open(
        expected: Arc<Mutex<Expected>>,
        netfilter: Socket,
    ) -> io::Result<Self> {
        let routing = Socket::open(filter::ROUTE)?;
        let ears = Ears { routing, netfilter };
        Ok(Self { idle: Arc::new(Mutex::new(Some(ears))), expected })
    }

    /// Begins to watch; what is asked for from these ports is no news.
    pub(in crate::kernel) fn watch(
        &self,
        routing: u32,
        netfilter: u32,
    ) -> Result<Watch, KernelError> {
        let what = "watch the kernel's state";
        let failed = |error: io::Error| KernelError::io(what, &error);
        let poll = Epoll::new().map_err(failed)?;
        let ears = lock(&self.idle).take();
        let ears =
            ears.ok_or_else(|| KernelError::refused(what, errno::EBUSY).with_remedy(BUSY))?;
        let shared = self.clone();
        let mut watch = Watch { poll, ears: Some(ears), shared, unsigned: false, heard: None };
        watch.begin(routing, netfilter).map_err(failed)?;
        Ok(watch)
    }

    /// Takes the sockets back, so that the datapath can be watched again.
    pub(super) fn put_back(&self, ears: Ears) {
        *lock(&self.idle) = Some(ears);
    }
}

impl Ears {
    /// The sockets with the groups that each is to join.
    pub(super) fn each(&mut self) -> [(&mut Socket, &'static [u32]); 2] {
        [(&mut self.routing, &ROUTING), (&mut self.netfilter, &NETFILTER)]
    }

    /// Begins to hear of the rules, or ends it.
    pub(super) fn hear_rules(&self, is_to: bool) -> io::Result<()> {
        let change = if is_to { Socket::join } else { Socket::leave };
        NETFILTER.iter().try_for_each(|group| change(&self.netfilter, *group))
    }
}

pub(in crate::kernel) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every change under the locks here is a single one.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
