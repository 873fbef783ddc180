//! Preview: a dry run of a reconciliation.

use super::adopt::adopt;
use super::lent::{Lent, give_back};
use super::traced::span;
use super::{Error, Reconciler, Report};
use crate::alloc::{MarkAllocator, TableAllocator};
use crate::cluster::Cluster;
use crate::datapath::Datapath;
use crate::diff::changes::Changes;
use crate::plan::Draft;
use crate::policy::Policy;

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
        span!("preview");
        self.clock.start();
        self.remember_nodes();
        let draft = Draft::new(cluster, policies)?.with_former(&self.former);
        let in_sync = self.in_sync;
        let observed = self.observe_before(&draft)?;
        // The datapath now reports drift from the observed state; the next call needs drift from
        // the wanted state.
        self.in_sync = in_sync && self.wanted.as_ref() == Some(&observed);
        let (mut marks, mut tables) = (Lent::new(&mut self.marks), Lent::new(&mut self.tables));
        adopt(cluster, &observed, &mut marks, &mut tables);
        let draft = draft.without(&observed.missing.fields);
        let numbered = draft.number(&mut marks, &mut tables);
        let back = give_back(marks, tables);
        let (index, mut state) = numbered?;
        back?;
        state.leave_out(&observed.missing);
        let changes = Changes::between(&observed, &state);
        let settled = self.settled && self.pending.is_none();
        let findings = index.findings_at(&observed.missing.families);
        Ok(self.finished(changes, findings, settled))
    }
}
