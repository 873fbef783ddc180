//! Routing tables from a range, those in use left out.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use super::dice;
use super::dice::Dice;
use super::table_range::TableRange;
use super::{AllocError, TableAllocator};
use crate::error::KernelError;
use crate::types::{NodeName, TableId};

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
/// A new node gets the first free table from a random one upwards; after the last comes the
/// first again, and each is looked at once. It remembers nothing across a restart: tables of
/// an earlier run must be [reserved](TableAllocator::reserve) for their nodes before the first new
/// one is allocated, otherwise they count as in use by others.
///
/// ```
/// use std::collections::BTreeSet;
/// use egress_datapath::{NodeName, TableAllocator, TableId, TablePool, TableRange};
///
/// let in_use = BTreeSet::from([3099, 3100]);
/// let mut pool = TablePool::with_probe(TableRange::default(), in_use).with_dice(|_: u32| 98);
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
    dice: Box<dyn Dice>,
    tables: BTreeMap<NodeName, TableId>,
    holders: BTreeMap<TableId, NodeName>,
}

impl TablePool {
    /// A pool that takes all tables of the range to be unused by others.
    pub fn new(range: TableRange) -> Self {
        Self {
            range,
            probe: None,
            dice: Box::new(dice::system),
            tables: BTreeMap::new(),
            holders: BTreeMap::new(),
        }
    }

    /// A pool that asks which tables are in use, once for every new node.
    pub fn with_probe(range: TableRange, probe: impl TablesInUse + 'static) -> Self {
        Self { probe: Some(Box::new(probe)), ..Self::new(range) }
    }

    /// The same pool with another source of random starts.
    #[must_use]
    pub fn with_dice(mut self, dice: impl Dice + 'static) -> Self {
        self.dice = Box::new(dice);
        self
    }

    /// Where the tables come from.
    pub const fn range(&self) -> TableRange {
        self.range
    }

    /// How many tables are given out.
    pub fn len(&self) -> usize {
        self.tables.len()
    }

    /// Whether no table is given out.
    pub fn is_empty(&self) -> bool {
        self.tables.is_empty()
    }

    /// The nodes and their tables, by ascending table.
    pub fn iter(&self) -> impl Iterator<Item = (&NodeName, TableId)> {
        self.holders.iter().map(|(table, node)| (node, *table))
    }

    fn record(&mut self, node: &NodeName, table: TableId) {
        self.tables.insert(node.clone(), table);
        self.holders.insert(table, node.clone());
    }
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
            .field("tables", &self.tables)
            .finish_non_exhaustive()
    }
}

/// The first free table of the ring that starts at `offset`.
fn first_free(
    range: TableRange,
    offset: u32,
    mut is_free: impl FnMut(TableId) -> bool,
) -> Option<TableId> {
    range.ring(offset).find(|table| is_free(*table))
}

impl TableAllocator for TablePool {
    fn allocate(&mut self, node: &NodeName) -> Result<TableId, AllocError<TableId>> {
        if let Some(table) = self.tables.get(node) {
            return Ok(*table);
        }
        let in_use = match &mut self.probe {
            Some(probe) => probe.tables_in_use().map_err(AllocError::Kernel)?,
            None => BTreeSet::new(),
        };
        let offset = self.dice.roll(self.range.len());
        let table = first_free(self.range, offset, |table| {
            !self.holders.contains_key(&table) && !in_use.contains(&table.get())
        });
        let table = table.ok_or_else(|| AllocError::Exhausted {
            node: node.clone(),
            capacity: self.range.len() as usize,
        })?;
        self.record(node, table);
        Ok(table)
    }

    fn reserve(&mut self, node: &NodeName, table: TableId) -> Result<(), AllocError<TableId>> {
        if !self.range.contains(table) {
            return Err(AllocError::Foreign { id: table });
        }
        match (self.holders.get(&table), self.tables.get(node)) {
            (Some(holder), _) if holder == node => Ok(()),
            (Some(holder), _) => {
                Err(AllocError::Taken { id: table, node: node.clone(), holder: holder.clone() })
            }
            (None, Some(held)) => {
                Err(AllocError::Holds { node: node.clone(), held: *held, id: table })
            }
            (None, None) => {
                self.record(node, table);
                Ok(())
            }
        }
    }

    fn release(&mut self, node: &NodeName) -> Result<TableId, AllocError<TableId>> {
        let table = self.tables.remove(node);
        let table = table.ok_or_else(|| AllocError::Unknown { node: node.clone() })?;
        self.holders.remove(&table);
        Ok(table)
    }

    fn get(&self, node: &NodeName) -> Option<TableId> {
        self.tables.get(node).copied()
    }
}
