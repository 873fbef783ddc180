//! Preview: a dry run of a reconciliation.

use super::adopt::adopt;
use super::{Error, Reconciler, Report};
use crate::alloc::{AllocError, MarkAllocator, TableAllocator};
use crate::cluster::Cluster;
use crate::datapath::Datapath;
use crate::diff::changes::Changes;
use crate::plan::{Draft, PlanError};
use crate::policy::Policy;
use crate::types::{Mark, NodeName, TableId};

impl<D: Datapath, M: MarkAllocator, T: TableAllocator> Reconciler<D, M, T> {
    /// Returns the report that [`reconcile`](Self::reconcile) would return, and changes nothing.
    ///
    /// The whole kernel state is read. The allocators are restored: marks and tables that the plan
    /// allocated are released, and those that it released are reserved.
    ///
    /// # Errors
    ///
    /// [`Error::Plan`] and [`Error::Observe`], as for [`reconcile`](Self::reconcile).
    pub fn preview<P: Policy>(
        &mut self,
        cluster: &Cluster,
        policies: impl IntoIterator<Item = P>,
    ) -> Result<Report, Error> {
        let draft = Draft::new(cluster, policies)?;
        let in_step = self.in_step;
        let observed = self.observe_before(&draft)?;
        // The datapath now reports drift from the observed state; the next call needs drift from
        // the wanted state.
        self.in_step = in_step && self.wanted.as_ref() == Some(&observed);
        let (mut marks, mut tables) = (Lent::new(&mut self.marks), Lent::new(&mut self.tables));
        adopt(cluster, &observed, &mut marks, &mut tables);
        let numbered = draft.number(&mut marks, &mut tables);
        let back = (marks.give_back().map_err(PlanError::Mark))
            .and(tables.give_back().map_err(PlanError::Table));
        let (index, state) = numbered?;
        back?;
        let changes = Changes::between(&observed, &state);
        let settled = self.settled && self.unsettled.is_none();
        Ok(Report { changes, findings: index.findings(), settled })
    }
}

/// A wrapper of an allocator that can undo all changes made through it.
struct Lent<'a, A, Id> {
    allocator: &'a mut A,
    /// Nodes that got or lost an id, in order, each with the id that it had before.
    before: Vec<(NodeName, Option<Id>)>,
}

impl<'a, A, Id> Lent<'a, A, Id> {
    const fn new(allocator: &'a mut A) -> Self {
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
