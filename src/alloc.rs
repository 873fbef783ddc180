//! Allocators of firewall marks and routing tables for gateway nodes.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::hash::{BuildHasher, Hasher, RandomState};

use crate::error::KernelError;
use crate::mark::MarkLayout;
use crate::types::{Mark, NodeName, TableId};

/// An allocator of firewall marks, one for each gateway node.
///
/// A mark is used only on the node that programs it, so nodes need not agree. The marks must be of
/// the layout [`Cluster::marks`](crate::Cluster::marks); another mark is refused as
/// [`PlanError::ForeignMark`](crate::PlanError::ForeignMark).
///
/// The [`Reconciler`](crate::Reconciler) reserves the marks that nodes have by
/// [`Node::mark`](crate::Node::mark), and those that it finds in the kernel after a restart, before
/// it allocates one. A mark from the kernel that the allocator refuses is allocated again. The
/// `Reconciler` releases the mark of a node that is no gateway any more once the kernel does not
/// use the mark. After a refused plan and after a preview it releases new marks, and reserves
/// released ones again. [`MarkPool`] is the implementation of this crate. Marks that a control plane
/// assigns need no allocator of their own: give them as [`Node::mark`](crate::Node::mark). The guide
/// has [an example](crate::guide::embedding#own-implementations-of-the-traits) of an implementation.
#[cfg_attr(feature = "mock", mockall::automock)]
pub trait MarkAllocator: Send {
    /// Returns the node's mark, chosen on the first call and the same on every later call.
    ///
    /// # Errors
    ///
    /// [`AllocError::Exhausted`] if every mark is allocated: the policies of the gateway are closed.
    /// Any other error is one of the whole call.
    fn allocate(&mut self, node: &NodeName) -> Result<Mark, AllocError<Mark>>;

    /// Reserves a mark that the node already has, found in the kernel or given by the caller.
    ///
    /// # Errors
    ///
    /// [`AllocError::Foreign`] for a mark that this allocator would never allocate,
    /// [`AllocError::Taken`] if another node has the mark, [`AllocError::Holds`] if the node has
    /// another mark.
    fn reserve(&mut self, node: &NodeName, mark: Mark) -> Result<(), AllocError<Mark>>;

    /// Frees the node's mark and returns it.
    ///
    /// # Errors
    ///
    /// [`AllocError::Unknown`] if the node has no mark, for example after an earlier release.
    fn release(&mut self, node: &NodeName) -> Result<Mark, AllocError<Mark>>;

    /// Returns the node's mark, if it has one.
    fn get(&self, node: &NodeName) -> Option<Mark>;
}

/// An allocator of routing tables on this host, one for each gateway node.
///
/// With a mark layout that has a prefix, the node itself gets a table as well, for the fallback
/// rule. The [`Reconciler`](crate::Reconciler) calls the methods in the order that
/// [`MarkAllocator`] documents. A table must have no route and no rule of another program:
/// [`TablePool`] is the implementation of this crate, with a probe for tables in use. The guide has
/// [an example](crate::guide::embedding#own-implementations-of-the-traits) of another one.
#[cfg_attr(feature = "mock", mockall::automock)]
pub trait TableAllocator: Send {
    /// Returns the node's table, chosen on the first call and the same on every later call.
    ///
    /// # Errors
    ///
    /// [`AllocError::Exhausted`] if every table is in use: the policies of the gateway are closed.
    /// Any other error is one of the whole call, such as [`AllocError::Kernel`] if the tables in use
    /// could not be read from the kernel.
    fn allocate(&mut self, node: &NodeName) -> Result<TableId, AllocError<TableId>>;

    /// Reserves a table that the node already has, found in the kernel.
    ///
    /// # Errors
    ///
    /// As for [`MarkAllocator::reserve`].
    fn reserve(&mut self, node: &NodeName, table: TableId) -> Result<(), AllocError<TableId>>;

    /// Frees the node's table and returns it.
    ///
    /// # Errors
    ///
    /// [`AllocError::Unknown`] if the node has no table, for example after an earlier release.
    fn release(&mut self, node: &NodeName) -> Result<TableId, AllocError<TableId>>;

    /// Returns the node's table, if it has one.
    fn get(&self, node: &NodeName) -> Option<TableId>;
}

/// The error of an allocator; `Id` is [`Mark`] or [`TableId`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AllocError<Id: fmt::Display> {
    /// Every mark or table is allocated or in use.
    #[error("none of {capacity} ids is free for node {node}")]
    Exhausted {
        /// The requesting node.
        node: NodeName,
        /// Number of marks or tables that the allocator has.
        capacity: usize,
    },
    /// Another node has the mark or table.
    #[error("{id} belongs to node {holder}, node {node} cannot have it")]
    Taken {
        /// The mark or table.
        id: Id,
        /// The requesting node.
        node: NodeName,
        /// The node that has the mark or table.
        holder: NodeName,
    },
    /// The node has another mark or table.
    #[error("node {node} has {held}, it cannot have {id} too")]
    Holds {
        /// The requesting node.
        node: NodeName,
        /// The mark or table that the node has.
        held: Id,
        /// The requested mark or table.
        id: Id,
    },
    /// The mark or table is not one that this allocator would ever allocate.
    #[error("{id} is outside what can be given out")]
    Foreign {
        /// The mark or table.
        id: Id,
    },
    /// The node has no mark or table.
    #[error("node {node} has nothing to release")]
    Unknown {
        /// The requesting node.
        node: NodeName,
    },
    /// The tables in use could not be read from the kernel.
    #[error(transparent)]
    Kernel(KernelError),
}

/// A range of routing tables: the closed interval [start, start + count], `count` + 1 tables.
///
/// The default is 3000 to 3100, 101 tables. The kernel's own tables are never part of a range.
///
/// ```
/// use egress_datapath::alloc::{TableRange, TableRangeError};
/// let range = TableRange::default();
/// assert_eq!((range.start(), range.end(), range.len()), (3000, 3100, 101));
/// assert_eq!(TableRange::new(3000, 0)?.len(), 1);
///
/// let refused = TableRange::new(200, 100).unwrap_err();
/// assert_eq!(refused.to_string(), "tables 200 to 300 include 253, which is the kernel's");
/// # Ok::<(), TableRangeError>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(try_from = "Form"))]
pub struct TableRange {
    start: u32,
    count: u32,
}

/// The serialized form of a [`TableRange`].
#[cfg(feature = "serde")]
#[derive(serde::Deserialize)]
#[serde(rename = "TableRange", deny_unknown_fields)]
struct Form {
    start: u32,
    count: u32,
}

#[cfg(feature = "serde")]
impl TryFrom<Form> for TableRange {
    type Error = TableRangeError;

    fn try_from(form: Form) -> Result<Self, TableRangeError> {
        Self::new(form.start, form.count)
    }
}

/// The reason why a range of tables was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TableRangeError {
    /// The last table is beyond the highest possible table number, 4294967295.
    #[error("{count} tables after {start} go beyond table 4294967295, the highest there is")]
    Overflow {
        /// The first table.
        start: u32,
        /// Number of tables after the first.
        count: u32,
    },
    /// The range includes one of the kernel's own tables: 0, 253, 254 or 255.
    #[error("tables {start} to {end} include {table}, which is the kernel's")]
    Kernel {
        /// The first table.
        start: u32,
        /// The last table.
        end: u32,
        /// The lowest table of the range that is the kernel's.
        table: u32,
    },
}

#[expect(clippy::len_without_is_empty, reason = "a range has at least one table")]
impl TableRange {
    /// Creates the range of this table and the `count` tables after it.
    pub fn new(start: u32, count: u32) -> Result<Self, TableRangeError> {
        let end = start.checked_add(count);
        let end = end.ok_or(TableRangeError::Overflow { start, count })?;
        let mut kernels = [0, 253, 254, 255].into_iter();
        match kernels.find(|table| (start..=end).contains(table)) {
            Some(table) => Err(TableRangeError::Kernel { start, end, table }),
            None => Ok(Self { start, count }),
        }
    }

    /// The first table.
    pub const fn start(&self) -> u32 {
        self.start
    }

    /// The last table.
    pub const fn end(&self) -> u32 {
        self.start + self.count
    }

    /// Returns the number of tables.
    pub const fn len(&self) -> u32 {
        // No overflow: table 0 is in no range.
        self.count + 1
    }

    /// Returns whether the table is in the range.
    pub fn contains(&self, table: TableId) -> bool {
        (self.start..=self.end()).contains(&table.get())
    }

    /// Returns all tables, ascending.
    pub fn iter(&self) -> impl Iterator<Item = TableId> + use<> {
        (self.start..=self.end()).filter_map(TableId::new)
    }

    /// Returns all tables in ring order: from the one at `offset` to the last, then from the first.
    fn ring(self, offset: u32) -> impl Iterator<Item = TableId> + use<> {
        let from = self.start + offset % self.len();
        (from..=self.end()).chain(self.start..from).filter_map(TableId::new)
    }
}

impl Default for TableRange {
    fn default() -> Self {
        Self { start: 3000, count: 100 }
    }
}

/// The allocated ids, by node and by id.
#[derive(Clone, Debug)]
struct Given<Id> {
    ids: HashMap<NodeName, Id>,
    holders: BTreeMap<Id, NodeName>,
}

impl<Id: Copy + Ord + fmt::Display> Given<Id> {
    fn new() -> Self {
        Self { ids: HashMap::new(), holders: BTreeMap::new() }
    }

    fn get(&self, node: &NodeName) -> Option<Id> {
        self.ids.get(node).copied()
    }

    fn iter(&self) -> impl Iterator<Item = (&NodeName, Id)> {
        self.holders.iter().map(|(id, node)| (node, *id))
    }

    fn record(&mut self, node: &NodeName, id: Id) {
        self.ids.insert(node.clone(), id);
        self.holders.insert(id, node.clone());
    }

    fn reserve(&mut self, node: &NodeName, id: Id) -> Result<(), AllocError<Id>> {
        match (self.holders.get(&id), self.get(node)) {
            (Some(holder), _) if holder == node => Ok(()),
            (Some(holder), _) => {
                Err(AllocError::Taken { id, node: node.clone(), holder: holder.clone() })
            }
            (None, Some(held)) => Err(AllocError::Holds { node: node.clone(), held, id }),
            (None, None) => {
                self.record(node, id);
                Ok(())
            }
        }
    }

    fn release(&mut self, node: &NodeName) -> Result<Id, AllocError<Id>> {
        let id = self.ids.remove(node);
        let id = id.ok_or_else(|| AllocError::Unknown { node: node.clone() })?;
        self.holders.remove(&id);
        Ok(id)
    }
}

/// A pool of all marks of one [`MarkLayout`], each allocated to at most one node.
///
/// A new node gets the lowest free mark that needs no bit of [`MarkLayout::avoid`]. If no such mark
/// is free, it gets the lowest free mark. The pool has no memory across a restart: marks in use
/// must be [reserved](MarkAllocator::reserve) before the first new mark is allocated.
///
/// ```
/// use egress_datapath::{Mark, MarkAllocator, NodeName};
/// use egress_datapath::alloc::{AllocError, MarkPool};
///
/// let (a, b) = (NodeName::new("node-a")?, NodeName::new("node-b")?);
/// let mut pool = MarkPool::default();
/// pool.reserve(&a, Mark::new(0x2600_0000))?;
/// assert_eq!(pool.allocate(&b)?, Mark::new(0x2600_1000), "0x26000100 needs a bit of Cilium's");
/// assert_eq!(pool.allocate(&b)?, Mark::new(0x2600_1000), "the same on every later call");
///
/// pool.release(&a)?;
/// assert_eq!(pool.release(&a), Err(AllocError::Unknown { node: a }));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct MarkPool {
    layout: MarkLayout,
    given: Given<Mark>,
    /// Ranks below `next` whose marks were released.
    freed: BTreeSet<u32>,
    /// The first rank that no allocation has examined.
    next: u32,
}

impl MarkPool {
    /// Creates a pool with every mark of the layout free.
    pub fn new(layout: MarkLayout) -> Self {
        Self { layout, given: Given::new(), freed: BTreeSet::new(), next: 0 }
    }

    /// Returns the layout of the marks.
    pub const fn layout(&self) -> &MarkLayout {
        &self.layout
    }

    /// Returns the number of allocated marks.
    pub fn len(&self) -> usize {
        self.given.ids.len()
    }

    /// Returns whether no mark is allocated.
    pub fn is_empty(&self) -> bool {
        self.given.ids.is_empty()
    }

    /// Returns the nodes and their marks, by ascending mark.
    pub fn iter(&self) -> impl Iterator<Item = (&NodeName, Mark)> {
        self.given.iter()
    }

    /// Returns the number of values that fit the layout, including the reserved ones.
    const fn values(&self) -> u32 {
        1 << self.layout.bits()
    }

    /// Returns the rank of a mark in the order of allocation; `None` if it is not of the layout.
    ///
    /// The rank is the mark's value, plus the number of values if the mark needs an avoided bit.
    fn rank(&self, mark: Mark) -> Option<u32> {
        let value = u32::from(self.layout.value(mark)?);
        Some(if self.layout.touches_avoided(mark) { self.values() + value } else { value })
    }

    /// Returns the mark of this rank; `None` if its value has another rank or is reserved.
    fn ranked(&self, rank: u32) -> Option<Mark> {
        let mark = self.layout.mark(u16::try_from(rank % self.values()).ok()?)?;
        (self.rank(mark) == Some(rank)).then_some(mark)
    }

    /// Returns the free mark of the lowest rank.
    ///
    /// Each rank is examined once, and again only after its mark was released.
    fn lowest_free(&mut self) -> Option<Mark> {
        if let Some(rank) = self.freed.pop_first() {
            return self.ranked(rank);
        }
        while self.next < 2 * self.values() {
            let mark = self.ranked(self.next);
            self.next += 1;
            if let Some(mark) = mark.filter(|mark| !self.given.holders.contains_key(mark)) {
                return Some(mark);
            }
        }
        None
    }
}

impl Default for MarkPool {
    fn default() -> Self {
        Self::new(MarkLayout::default())
    }
}

impl MarkAllocator for MarkPool {
    fn allocate(&mut self, node: &NodeName) -> Result<Mark, AllocError<Mark>> {
        if let Some(mark) = self.given.get(node) {
            return Ok(mark);
        }
        let mark = self.lowest_free().ok_or_else(|| AllocError::Exhausted {
            node: node.clone(),
            capacity: self.layout.capacity(),
        })?;
        self.given.record(node, mark);
        Ok(mark)
    }

    fn reserve(&mut self, node: &NodeName, mark: Mark) -> Result<(), AllocError<Mark>> {
        let rank = self.rank(mark).ok_or(AllocError::Foreign { id: mark })?;
        self.given.reserve(node, mark)?;
        self.freed.remove(&rank);
        Ok(())
    }

    fn release(&mut self, node: &NodeName) -> Result<Mark, AllocError<Mark>> {
        let mark = self.given.release(node)?;
        self.freed.extend(self.rank(mark).filter(|rank| *rank < self.next));
        Ok(mark)
    }

    fn get(&self, node: &NodeName) -> Option<Mark> {
        self.given.get(node)
    }
}

/// A probe for the routing tables that are in use on this host, by any program.
pub trait TablesInUse: Send {
    /// Returns the ids of all tables that have a route or are the target of a rule, in any family.
    ///
    /// Ids outside the caller's range have no effect.
    fn tables_in_use(&mut self) -> Result<BTreeSet<u32>, KernelError>;
}

/// A constant list of tables.
impl TablesInUse for BTreeSet<u32> {
    fn tables_in_use(&mut self) -> Result<BTreeSet<u32>, KernelError> {
        Ok(self.clone())
    }
}

/// A pool of the unused tables of one [`TableRange`], each allocated to at most one node.
///
/// A new node gets the first free table from the pool's start upwards. The search wraps from the
/// last table to the first and examines each table once. The start is random unless it is given, so
/// that two agents that search on one host at the same time are unlikely to take the same table.
///
/// The pool has no memory across a restart: tables of an earlier run must be
/// [reserved](TableAllocator::reserve) for their nodes before the first new table is allocated,
/// otherwise they count as in use by other programs.
///
/// ```
/// use std::collections::BTreeSet;
/// use egress_datapath::{NodeName, TableAllocator, TableId};
/// use egress_datapath::alloc::{TablePool, TableRange};
///
/// let in_use = BTreeSet::from([3099, 3100]);
/// let mut pool = TablePool::with_probe(TableRange::default(), in_use).with_start(98);
/// pool.reserve(&NodeName::new("node-a")?, TableId::new(3098).unwrap())?;
///
/// let node = NodeName::new("node-b")?;
/// assert_eq!(pool.allocate(&node)?.get(), 3000, "3098 to 3100 are not free");
/// assert_eq!(pool.allocate(&node)?.get(), 3000, "the same on every later call");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct TablePool {
    range: TableRange,
    probe: Option<Box<dyn TablesInUse>>,
    start: u32,
    given: Given<TableId>,
}

impl TablePool {
    /// Creates a pool without probe: it assumes that no other program uses tables of the range.
    pub fn new(range: TableRange) -> Self {
        Self { range, probe: None, start: random(), given: Given::new() }
    }

    /// Creates a pool with a probe for tables in use, which is called once for every new node.
    pub fn with_probe(range: TableRange, probe: impl TablesInUse + 'static) -> Self {
        Self { probe: Some(Box::new(probe)), ..Self::new(range) }
    }

    /// Sets the start of the search: an offset into the range, modulo the length of the range.
    #[must_use]
    pub fn with_start(self, start: u32) -> Self {
        Self { start, ..self }
    }

    /// Returns the range of the tables.
    pub const fn range(&self) -> TableRange {
        self.range
    }

    /// Returns the number of allocated tables.
    pub fn len(&self) -> usize {
        self.given.ids.len()
    }

    /// Returns whether no table is allocated.
    pub fn is_empty(&self) -> bool {
        self.given.ids.is_empty()
    }

    /// Returns the nodes and their tables, by ascending table.
    pub fn iter(&self) -> impl Iterator<Item = (&NodeName, TableId)> {
        self.given.iter()
    }
}

/// Returns a random number from the keys of a new [`RandomState`].
///
/// The number differs from process to process and from call to call.
#[expect(clippy::cast_possible_truncation, reason = "half of the bits are enough")]
fn random() -> u32 {
    RandomState::new().build_hasher().finish() as u32
}

impl Default for TablePool {
    /// Creates a pool of the default range without probe.
    fn default() -> Self {
        Self::new(TableRange::default())
    }
}

impl fmt::Debug for TablePool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TablePool")
            .field("range", &self.range)
            .field("start", &self.start)
            .field("given", &self.given)
            .finish_non_exhaustive()
    }
}

impl TableAllocator for TablePool {
    fn allocate(&mut self, node: &NodeName) -> Result<TableId, AllocError<TableId>> {
        if let Some(table) = self.given.get(node) {
            return Ok(table);
        }
        let in_use = match &mut self.probe {
            // Nothing is free, whatever other programs use: many gateways may ask in vain.
            _ if self.given.ids.len() >= self.range.len() as usize => BTreeSet::new(),
            Some(probe) => probe.tables_in_use().map_err(AllocError::Kernel)?,
            None => BTreeSet::new(),
        };
        let is_free = |table: &TableId| {
            !self.given.holders.contains_key(table) && !in_use.contains(&table.get())
        };
        let table = self.range.ring(self.start).find(is_free);
        let table = table.ok_or_else(|| AllocError::Exhausted {
            node: node.clone(),
            capacity: self.range.len() as usize,
        })?;
        self.given.record(node, table);
        Ok(table)
    }

    fn reserve(&mut self, node: &NodeName, table: TableId) -> Result<(), AllocError<TableId>> {
        if !self.range.contains(table) {
            return Err(AllocError::Foreign { id: table });
        }
        self.given.reserve(node, table)
    }

    fn release(&mut self, node: &NodeName) -> Result<TableId, AllocError<TableId>> {
        self.given.release(node)
    }

    fn get(&self, node: &NodeName) -> Option<TableId> {
        self.given.get(node)
    }
}

#[cfg(test)]
mod tests;
