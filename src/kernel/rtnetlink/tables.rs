//! Which routing tables are in use on this host.

use std::collections::BTreeSet;

use super::socket::RouteSocket;
use crate::alloc::TablesInUse;
use crate::error::KernelError;

/// Asks the kernel which routing tables are in use, by whomever: a table is, if it has a route or
/// if a rule leads to it, in either family.
///
/// Like [`KernelDatapath`](crate::KernelDatapath) it belongs to the network namespace that the
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
    /// The part of the kernel that is missing.
    pub fn open() -> Result<Self, KernelError> {
        Ok(Self { routing: RouteSocket::open()? })
    }
}

impl TablesInUse for KernelTables {
    fn tables_in_use(&mut self) -> Result<BTreeSet<u32>, KernelError> {
        self.routing.tables_in_use()
    }
}
