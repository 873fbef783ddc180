//! Marks from a layout, in memory.

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::fmt;

use super::free_set::FreeSet;
use super::name_hash::NameHash;
use super::{AllocError, MarkAllocator};
use crate::mark::MarkLayout;
use crate::types::{Mark, NodeName};

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
#[derive(Clone)]
pub struct MarkPool {
    layout: MarkLayout,
    nodes: HashMap<NodeName, Mark, NameHash>,
    /// Free values whose marks stay clear of the bits to avoid.
    clear: FreeSet,
    /// Free values whose marks do not.
    touching: FreeSet,
}

impl MarkPool {
    /// A pool with every mark of the layout free.
    pub fn new(layout: MarkLayout) -> Self {
        let mut pool = Self {
            layout,
            nodes: HashMap::default(),
            clear: FreeSet::new(),
            touching: FreeSet::new(),
        };
        for value in 0..=u16::MAX {
            if let Some(mark) = layout.mark(value) {
                pool.side(mark).insert(value);
            }
        }
        pool
    }

    /// Where the marks come from.
    pub const fn layout(&self) -> &MarkLayout {
        &self.layout
    }

    /// How many marks are given out.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Whether no mark is given out.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// The nodes and their marks, by ascending mark.
    pub fn iter(&self) -> impl Iterator<Item = (&NodeName, Mark)> {
        let mut all: Vec<_> = self.nodes.iter().map(|(node, mark)| (node, *mark)).collect();
        all.sort_unstable_by_key(|(_, mark)| *mark);
        all.into_iter()
    }

    /// The free values of the kind that this mark is of.
    fn side(&mut self, mark: Mark) -> &mut FreeSet {
        if self.layout.touches_avoided(mark) { &mut self.touching } else { &mut self.clear }
    }

    /// The node that has this mark.
    ///
    /// Looks through all nodes, but only for a mark that is refused: a second map would cost every
    /// allocation instead.
    fn holder(&self, value: u16, mark: Mark) -> Option<&NodeName> {
        if self.clear.contains(value) || self.touching.contains(value) {
            return None;
        }
        let (node, _) = self.nodes.iter().find(|(_, held)| **held == mark)?;
        Some(node)
    }
}

impl Default for MarkPool {
    fn default() -> Self {
        Self::new(MarkLayout::default())
    }
}

impl fmt::Debug for MarkPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MarkPool")
            .field("layout", &self.layout)
            .field("nodes", &self.nodes)
            .finish_non_exhaustive()
    }
}

impl MarkAllocator for MarkPool {
    fn allocate(&mut self, node: &NodeName) -> Result<Mark, AllocError<Mark>> {
        if let Some(mark) = self.nodes.get(node) {
            return Ok(*mark);
        }
        let value = self.clear.pop_first().or_else(|| self.touching.pop_first());
        let mark = value.and_then(|value| self.layout.mark(value));
        let mark = mark.ok_or_else(|| AllocError::Exhausted {
            node: node.clone(),
            capacity: self.layout.capacity(),
        })?;
        self.nodes.insert(node.clone(), mark);
        Ok(mark)
    }

    fn reserve(&mut self, node: &NodeName, mark: Mark) -> Result<(), AllocError<Mark>> {
        let value = self.layout.value(mark).ok_or(AllocError::Foreign { id: mark })?;
        let held = self.nodes.get(node).copied();
        if held == Some(mark) {
            return Ok(());
        }
        if let Some(holder) = self.holder(value, mark) {
            return Err(AllocError::Taken { id: mark, node: node.clone(), holder: holder.clone() });
        }
        if let Some(held) = held {
            return Err(AllocError::Holds { node: node.clone(), held, id: mark });
        }
        self.side(mark).remove(value);
        self.nodes.insert(node.clone(), mark);
        Ok(())
    }

    fn release(&mut self, node: &NodeName) -> Result<Mark, AllocError<Mark>> {
        let mark = self.nodes.remove(node);
        let mark = mark.ok_or_else(|| AllocError::Unknown { node: node.clone() })?;
        if let Some(value) = self.layout.value(mark) {
            self.side(mark).insert(value);
        }
        Ok(mark)
    }

    fn get(&self, node: &NodeName) -> Option<Mark> {
        self.nodes.get(node).copied()
    }
}
