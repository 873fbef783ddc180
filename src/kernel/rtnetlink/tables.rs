//! Routing tables in use on this host.

use std::collections::BTreeSet;

use super::socket::RouteSocket;
use crate::alloc::TablesInUse;
use crate::error::KernelError;

/// Probe for the routing tables in use in a network namespace, by any program.
///
/// A table is in use if it has a route or if a rule looks it up, in either family. Like
/// [`KernelDatapath`](crate::KernelDatapath), the probe belongs to the network namespace that the
/// opening thread was in.
#[derive(Debug)]
pub struct KernelTables {
    routing: RouteSocket,
}

impl KernelTables {
    /// Opens a socket in the network namespace of the calling thread.
    ///
    /// # Errors
    ///
    /// The kernel feature that is missing.
    pub fn open() -> Result<Self, KernelError> {
        Ok(Self { routing: RouteSocket::open()? })
    }
}

impl TablesInUse for KernelTables {
    fn tables_in_use(&mut self) -> Result<BTreeSet<u32>, KernelError> {
        self.routing.tables_in_use()
    }
}
