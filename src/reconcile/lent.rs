//! Undoes what a plan that is not carried out did to the allocators.

use crate::alloc::{AllocError, MarkAllocator, TableAllocator};
use crate::plan::PlanError;
use crate::types::{Mark, NodeName, TableId};

/// Undoes all changes of both allocators.
pub(super) fn give_back<M: MarkAllocator, T: TableAllocator>(
    marks: Lent<'_, M, Mark>,
    tables: Lent<'_, T, TableId>,
) -> Result<(), PlanError> {
    let marks = marks.give_back().map_err(PlanError::Mark);
    marks.and(tables.give_back().map_err(PlanError::Table))
}

/// A wrapper of an allocator that can undo all changes made through it.
pub(super) struct Lent<'a, A, Id> {
    allocator: &'a mut A,
    /// Nodes that got or lost an id, in order, each with the id that it had before.
    before: Vec<(NodeName, Option<Id>)>,
}

impl<'a, A, Id> Lent<'a, A, Id> {
    pub(super) const fn new(allocator: &'a mut A) -> Self {
        Self { allocator, before: Vec::new() }
    }
}

macro_rules! lent {
    ($allocator:ident, $id:ty) => {
        impl<A: $allocator> Lent<'_, A, $id> {
            fn noting<R>(&mut self, node: &NodeName, change: impl FnOnce(&mut A) -> R) -> R {
                let before = self.allocator.get(node);
                let made = change(self.allocator);
                if self.allocator.get(node) != before {
                    self.before.push((node.clone(), before));
                }
                made
            }

            /// Undoes the changes in reverse order, so that each of them can be undone.
            fn give_back(self) -> Result<(), AllocError<$id>> {
                for (node, before) in self.before.into_iter().rev() {
                    if self.allocator.get(&node).is_some() {
                        self.allocator.release(&node)?;
                    }
                    if let Some(id) = before {
                        self.allocator.reserve(&node, id)?;
                    }
                }
                Ok(())
            }
        }

        impl<A: $allocator> $allocator for Lent<'_, A, $id> {
            fn allocate(&mut self, node: &NodeName) -> Result<$id, AllocError<$id>> {
                self.noting(node, |allocator| allocator.allocate(node))
            }

            fn reserve(&mut self, node: &NodeName, id: $id) -> Result<(), AllocError<$id>> {
                self.noting(node, |allocator| allocator.reserve(node, id))
            }

            fn release(&mut self, node: &NodeName) -> Result<$id, AllocError<$id>> {
                self.noting(node, |allocator| allocator.release(node))
            }

            fn get(&self, node: &NodeName) -> Option<$id> {
                self.allocator.get(node)
            }
        }
    };
}

lent!(MarkAllocator, Mark);
lent!(TableAllocator, TableId);
