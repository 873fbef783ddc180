//! Who hands out marks and routing tables.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::hash::{BuildHasher, Hasher, RandomState};

use crate::error::KernelError;
use crate::mark::MarkLayout;
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
pub enum AllocError<Id: fmt::Display> {
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
    Kernel(KernelError),
}

/// The closed interval [start, start + count] of routing tables: `count` + 1 of them.
///
/// The default is 3000 to 3100, 101 tables. The kernel's own tables are never part of a range.
///
/// ```
/// use egress_datapath::{TableRange, TableRangeError};
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

/// A range as it is written.
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

/// Why a range of tables was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TableRangeError {
    /// The last table is beyond the highest number a table can have.
    #[error("{count} tables after {start} go beyond table 4294967295, the highest there is")]
    Overflow {
        /// First table.
        start: u32,
        /// How many follow it.
        count: u32,
    },
    /// One of the kernel's own tables is among them: 0, 253, 254 or 255.
    #[error("tables {start} to {end} include {table}, which is the kernel's")]
    Kernel {
        /// First table.
        start: u32,
        /// Last table.
        end: u32,
        /// The lowest one that is the kernel's.
        table: u32,
    },
}

#[expect(clippy::len_without_is_empty, reason = "a range has at least one table")]
impl TableRange {
    /// The range that starts with this table and has `count` more.
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

    /// How many tables there are.
    pub const fn len(&self) -> u32 {
        // Table 0 is in no range, so that the number fits.
        self.count + 1
    }

    /// Whether the table is one of these.
    pub fn contains(&self, table: TableId) -> bool {
        (self.start..=self.end()).contains(&table.get())
    }

    /// All tables, ascending.
    pub fn iter(&self) -> impl Iterator<Item = TableId> + use<> {
        (self.start..=self.end()).filter_map(TableId::new)
    }

    /// All tables, ascending from the one at `offset` to the last and on from the first.
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

/// Who has which id, and the other way round.
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

/// Gives out the marks of one [`MarkLayout`], all of them, each to one node.
///
/// A new node gets the lowest free mark that needs no bit of [`MarkLayout::avoid`], and when there
/// is none, the lowest of the others. It remembers nothing across a restart: marks that are in use
/// must be [reserved](MarkAllocator::reserve) before the first new one is allocated.
///
/// ```
/// use egress_datapath::{AllocError, Mark, MarkAllocator, MarkPool, NodeName};
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
    /// Ranks below `next` whose marks are free.
    freed: BTreeSet<u32>,
    /// The first rank that was not looked at for a free mark.
    next: u32,
}

impl MarkPool {
    /// A pool with every mark of the layout free.
    pub fn new(layout: MarkLayout) -> Self {
        Self { layout, given: Given::new(), freed: BTreeSet::new(), next: 0 }
    }

    /// Where the marks come from.
    pub const fn layout(&self) -> &MarkLayout {
        &self.layout
    }

    /// How many marks are given out.
    pub fn len(&self) -> usize {
        self.given.ids.len()
    }

    /// Whether no mark is given out.
    pub fn is_empty(&self) -> bool {
        self.given.ids.is_empty()
    }

    /// The nodes and their marks, by ascending mark.
    pub fn iter(&self) -> impl Iterator<Item = (&NodeName, Mark)> {
        self.given.iter()
    }

    /// Number of values that fit the layout, those that are set aside included.
    const fn values(&self) -> u32 {
        1 << self.layout.bits()
    }

    /// The place of a mark in the order in which marks are given out: its value, and behind all
    /// values if it needs a bit to stay clear of. Nothing if it is no mark of the layout.
    fn rank(&self, mark: Mark) -> Option<u32> {
        let value = u32::from(self.layout.value(mark)?);
        Some(if self.layout.touches_avoided(mark) { self.values() + value } else { value })
    }

    /// The mark of this rank; nothing if its value has another rank, or is set aside.
    fn ranked(&self, rank: u32) -> Option<Mark> {
        let mark = self.layout.mark(u16::try_from(rank % self.values()).ok()?)?;
        (self.rank(mark) == Some(rank)).then_some(mark)
    }

    /// The free mark of the lowest rank; every rank is looked at once, and later only if freed.
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

/// Says which routing tables are in use on this host, by whomever.
pub trait TablesInUse: Send {
    /// The ids of all tables that have a route or that a rule leads to, in either family.
    ///
    /// Ids outside the range of the one who asks do no harm.
    fn tables_in_use(&mut self) -> Result<BTreeSet<u32>, KernelError>;
}

/// A list that never changes.
impl TablesInUse for BTreeSet<u32> {
    fn tables_in_use(&mut self) -> Result<BTreeSet<u32>, KernelError> {
        Ok(self.clone())
    }
}

/// Gives out the tables of one [`TableRange`], each to one node and none that is in use.
///
/// A new node gets the first free table from the pool's start upwards; after the last comes the
/// first again, and each is looked at once. The start is random unless it is given, so that two
/// agents on one host that look for a table at the same time are unlikely to take the same. A pool
/// remembers nothing across a restart: tables of an earlier run must be
/// [reserved](TableAllocator::reserve) for their nodes before the first new one is allocated,
/// otherwise they count as in use by others.
///
/// ```
/// use std::collections::BTreeSet;
/// use egress_datapath::{NodeName, TableAllocator, TableId, TablePool, TableRange};
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
    /// A pool that takes all tables of the range to be unused by others.
    pub fn new(range: TableRange) -> Self {
        Self { range, probe: None, start: random(), given: Given::new() }
    }

    /// A pool that asks which tables are in use, once for every new node.
    pub fn with_probe(range: TableRange, probe: impl TablesInUse + 'static) -> Self {
        Self { probe: Some(Box::new(probe)), ..Self::new(range) }
    }

    /// The same pool with this start: how many tables come before it in the range, modulo the
    /// length of the range.
    #[must_use]
    pub fn with_start(self, start: u32) -> Self {
        Self { start, ..self }
    }

    /// Where the tables come from.
    pub const fn range(&self) -> TableRange {
        self.range
    }

    /// How many tables are given out.
    pub fn len(&self) -> usize {
        self.given.ids.len()
    }

    /// Whether no table is given out.
    pub fn is_empty(&self) -> bool {
        self.given.ids.is_empty()
    }

    /// The nodes and their tables, by ascending table.
    pub fn iter(&self) -> impl Iterator<Item = (&NodeName, TableId)> {
        self.given.iter()
    }
}

/// A number that differs from process to process and from call to call: the keys that the
/// standard library gives to a new hash map.
#[expect(clippy::cast_possible_truncation, reason = "half of the bits are enough")]
fn random() -> u32 {
    RandomState::new().build_hasher().finish() as u32
}

impl Default for TablePool {
    /// A pool of the default range that takes all its tables to be unused by others.
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
