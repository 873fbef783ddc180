//! Who hands out marks and routing tables.

mod dice;
mod free_set;
mod mark_pool;
mod name_hash;
mod table_pool;
mod table_range;

pub use dice::Dice;
pub use mark_pool::MarkPool;
pub use table_pool::{TablePool, TablesInUse};
pub use table_range::{TableRange, TableRangeError};

use crate::types::{Mark, NodeName, TableId};

/// Gives every gateway node its firewall mark.
///
/// A mark is used on the node that programs it and nowhere else, so nodes need not agree.
#[cfg_attr(feature = "mock", mockall::automock)]
pub trait MarkAllocator: Send {
    /// The node's mark, chosen on the first call and the same on every later one.
    ///
    /// # Errors
    ///
    /// [`AllocError::Exhausted`] if every mark is given out.
    fn allocate(&mut self, node: &NodeName) -> Result<Mark, AllocError<Mark>>;

    /// Records a mark that the node already has, found in the kernel or given by the caller.
    ///
    /// # Errors
    ///
    /// [`AllocError::Foreign`] for a mark that this allocator would never give out,
    /// [`AllocError::Taken`] if another node has it, [`AllocError::Holds`] if the node has another.
    fn reserve(&mut self, node: &NodeName, mark: Mark) -> Result<(), AllocError<Mark>>;

    /// Frees the node's mark and returns it.
    ///
    /// # Errors
    ///
    /// [`AllocError::Unknown`] if the node has none, as after a second release.
    fn release(&mut self, node: &NodeName) -> Result<Mark, AllocError<Mark>>;

    /// The node's mark, if it has one.
    fn get(&self, node: &NodeName) -> Option<Mark>;
}

/// Gives every gateway node its routing table on this host.
#[cfg_attr(feature = "mock", mockall::automock)]
pub trait TableAllocator: Send {
    /// The node's table, chosen on the first call and the same on every later one.
    ///
    /// # Errors
    ///
    /// [`AllocError::Exhausted`] if every table is in use, [`AllocError::Kernel`] if the kernel
    /// could not be asked.
    fn allocate(&mut self, node: &NodeName) -> Result<TableId, AllocError<TableId>>;

    /// Records a table that the node already has, found in the kernel.
    ///
    /// # Errors
    ///
    /// As for [`MarkAllocator::reserve`].
    fn reserve(&mut self, node: &NodeName, table: TableId) -> Result<(), AllocError<TableId>>;

    /// Frees the node's table and returns it.
    ///
    /// # Errors
    ///
    /// [`AllocError::Unknown`] if the node has none, as after a second release.
    fn release(&mut self, node: &NodeName) -> Result<TableId, AllocError<TableId>>;

    /// The node's table, if it has one.
    fn get(&self, node: &NodeName) -> Option<TableId>;
}

/// Why an allocator did not do as asked; `Id` is [`Mark`] or [`TableId`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AllocError<Id: std::fmt::Display> {
    /// All are given out or in use.
    #[error("none of {capacity} ids is free for node {node}")]
    Exhausted {
        /// The node that asked.
        node: NodeName,
        /// How many were looked at.
        capacity: usize,
    },
    /// Another node has it.
    #[error("{id} belongs to node {holder}, node {node} cannot have it")]
    Taken {
        /// The mark or table.
        id: Id,
        /// The node that asked.
        node: NodeName,
        /// The node that has it.
        holder: NodeName,
    },
    /// The node has another one.
    #[error("node {node} has {held}, it cannot have {id} too")]
    Holds {
        /// The node that asked.
        node: NodeName,
        /// What it has.
        held: Id,
        /// What it asked for.
        id: Id,
    },
    /// Not one that this allocator would ever give out.
    #[error("{id} is outside what can be given out")]
    Foreign {
        /// The mark or table.
        id: Id,
    },
    /// The node has none.
    #[error("node {node} has nothing to release")]
    Unknown {
        /// The node that asked.
        node: NodeName,
    },
    /// The kernel could not be asked what is in use.
    #[error(transparent)]
    Kernel(crate::error::KernelError),
}
