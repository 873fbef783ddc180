//! What a reconciliation would do, without doing any of it.

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
    /// What [`reconcile`](Self::reconcile) would change and report, without changing it.
    ///
    /// Everything is read. The allocators are left with what they had: marks and tables that the
    /// plan needed are released, those that it released are reserved.
    ///
    /// # Errors
    ///
    /// [`Error::Plan`] and [`Error::Observe`], as of [`reconcile`](Self::reconcile).
    pub fn preview<P: Policy>(
        &mut self,
        cluster: &Cluster,
        policies: impl IntoIterator<Item = P>,
    ) -> Result<Report, Error> {
        let draft = Draft::new(cluster, policies)?;
        let in_step = self.in_step;
        let observed = self.observe_before(&draft)?;
        // The datapath reports drift from what it was read as, the next call needs it from what is
        // wanted.
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

/// An allocator that is given back as it was.
struct Lent<'a, A, Id> {
    allocator: &'a mut A,
    /// Nodes that got or lost an id, in that order, with what they had before.
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

            /// Undoes the changes, the last one first: each is possible where it was made.
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
