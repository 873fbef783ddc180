//! Plan, observe, diff, apply: one call that makes a node right.

mod adopt;
mod counters;
mod incremental;

use crate::alloc::{MarkAllocator, MarkPool, TableAllocator, TablePool};
use crate::cluster::{Cluster, Steering};
use crate::datapath::{Datapath, Drift};
use crate::diff::changes::{ApplyError, Changes};
use crate::diff::op::Op;
use crate::error::KernelError;
use crate::plan::{Draft, Finding, Index, PlanError};
use crate::policy::Policy;
use crate::state::{Elements, Firewall, State};

use adopt::adopt;
use incremental::Unsettled;

/// Elements from which on it may pay to tell the datapath what is expected.
const MANY: usize = 8192;

/// Keeps one network namespace as the policies want it.
///
/// Every call is given the whole of what is wanted; what is ours in the kernel and not wanted is
/// removed. Nothing is kept in files: after a restart marks and tables are recovered from the
/// kernel, and a call that finds everything right writes nothing.
#[derive(Debug)]
pub struct Reconciler<D, M = MarkPool, T = TablePool> {
    datapath: D,
    marks: M,
    tables: T,
    /// What the plan for that rests on, to follow changes with.
    index: Option<Index>,
    /// What the last call that could plan wanted.
    wanted: Option<State>,
    /// What is to be said of it, once it was asked for.
    findings: Option<Vec<Finding>>,
    /// Whether the datapath was left holding exactly that.
    in_step: bool,
    /// Whether the last call was carried through, connections included.
    settled: bool,
    /// Changes whose connections were left for later.
    unsettled: Option<Unsettled>,
}

/// What a call did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// The changes that were made.
    pub changes: Changes,
    /// What is as asked, but perhaps not as meant; of an [update](Reconciler::update) what is new.
    pub findings: Vec<Finding>,
    /// Whether no connection is left to be ended by [`settle`](Reconciler::settle).
    pub settled: bool,
}

/// Why a call did not do all that it should.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The input contradicts itself; the kernel was not touched.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The kernel could not be read.
    #[error("cannot read the kernel's state: {0}")]
    Observe(KernelError),
    /// The kernel refused a change; those before it were made, in an order in which that is safe.
    #[error(transparent)]
    Apply(#[from] ApplyError),
    /// An update, and nothing that it could be one of; the kernel was not touched.
    #[error("nothing is wanted that could be updated: reconcile first")]
    NothingWanted,
}

impl<D: Datapath> Reconciler<D> {
    /// A reconciler with the default mark layout and table range.
    pub fn new(datapath: D) -> Self {
        Self::with_allocators(datapath, MarkPool::default(), TablePool::default())
    }
}

impl<D: Datapath, M: MarkAllocator, T: TableAllocator> Reconciler<D, M, T> {
    /// A reconciler with allocators of one's own; the marks must be of the cluster's layout.
    pub const fn with_allocators(datapath: D, marks: M, tables: T) -> Self {
        Self {
            datapath,
            marks,
            tables,
            index: None,
            wanted: None,
            findings: None,
            in_step: false,
            settled: false,
            unsettled: None,
        }
    }

    /// Makes the kernel hold what the policies want, and nothing else of ours.
    ///
    /// What has not changed since the last call costs a comparison, and the kernel is read only if
    /// it may have been changed by others.
    ///
    /// # Errors
    ///
    /// After [`Error::Plan`] nothing has changed. After the others the kernel may be between the
    /// two states, in an order in which that is safe; call again.
    pub fn reconcile<P: Policy>(
        &mut self,
        cluster: &Cluster,
        policies: impl IntoIterator<Item = P>,
    ) -> Result<Report, Error> {
        let policies: Vec<P> = policies.into_iter().collect();
        if let Some(changes) = self.follow_snapshot(cluster, &policies)? {
            return Ok(self.report(changes));
        }
        let draft = Draft::new(cluster, policies)?;
        let observed = self.observe_before(&draft)?;
        adopt(cluster, &observed, &mut self.marks, &mut self.tables);
        let (index, state) = draft.number(&mut self.marks, &mut self.tables)?;
        let changes = Changes::between(&observed, &state);
        (self.index, self.findings) = (Some(index), None);
        let made = self.make(changes, &observed, &state);
        self.wanted = Some(state);
        let mut changes = made?;
        changes.extend(self.end_unsettled()?);
        self.release();
        Ok(self.report(changes))
    }

    /// Makes the kernel hold again what the last [`reconcile`](Self::reconcile) or
    /// [`update`](Self::update) wanted, whatever others have done to it since; the report has no
    /// findings.
    ///
    /// Nothing is planned, where nothing has changed nothing is written, and where the datapath
    /// [can tell](Datapath::drift) that nothing has, nothing is read. It also goes on with what a
    /// failed [`Error::Apply`] left undone. Before the first reconciliation, and after
    /// [`remove`](Self::remove), nothing is wanted, and nothing is done.
    ///
    /// # Errors
    ///
    /// [`Error::Observe`] and [`Error::Apply`], as of [`reconcile`](Self::reconcile).
    pub fn repair(&mut self) -> Result<Report, Error> {
        let changes = match self.wanted.take() {
            Some(wanted) => {
                let made = self.restore(&wanted);
                self.wanted = Some(wanted);
                let mut changes = made?;
                changes.extend(self.end_unsettled()?);
                changes
            }
            None => Changes::default(),
        };
        Ok(Report { changes, findings: Vec::new(), settled: true })
    }

    /// The same as [`repair`](Self::repair), and reads everything, whatever the kernel told.
    ///
    /// # Errors
    ///
    /// As for [`repair`](Self::repair).
    pub fn audit(&mut self) -> Result<Report, Error> {
        self.in_step = false;
        self.repair()
    }

    /// What [`reconcile`](Self::reconcile) would change and report, without changing it.
    pub fn preview<P: Policy>(
        &mut self,
        cluster: &Cluster,
        policies: impl IntoIterator<Item = P>,
    ) -> Result<Report, Error> {
        let draft = Draft::new(cluster, policies)?;
        let observed = self.observe_before(&draft)?;
        adopt(cluster, &observed, &mut self.marks, &mut self.tables);
        let (index, state) = draft.number(&mut self.marks, &mut self.tables)?;
        let changes = Changes::between(&observed, &state);
        let settled = self.settled && self.unsettled.is_none();
        Ok(Report { changes, findings: index.findings(), settled })
    }

    /// Removes everything of ours.
    ///
    /// On a node whose pods have connections open, [`drain`](Self::drain) it first: what holds
    /// late answers back goes with the table.
    ///
    /// # Errors
    ///
    /// [`Error::Observe`] and [`Error::Apply`], as of [`reconcile`](Self::reconcile).
    pub fn remove(&mut self) -> Result<Report, Error> {
        self.empty(|_| None)
    }

    /// Removes everything of ours but the rules, with nothing in their maps.
    ///
    /// The connections that were steered or translated end, and the rules hold back what their
    /// other ends still say: it would make a pod's next packet an answer to that, which leaves
    /// with the pod's address. If the report has an [`Op::HoldAnswers`], let
    /// [`Connection::ANSWERS_HELD`](crate::Connection::ANSWERS_HELD) pass, then
    /// [`remove`](Self::remove) the rest.
    ///
    /// # Errors
    ///
    /// [`Error::Observe`] and [`Error::Apply`], as of [`reconcile`](Self::reconcile).
    pub fn drain(&mut self) -> Result<Report, Error> {
        self.empty(|found| {
            let (chains, sets) = (found.chains.clone(), found.sets.clone());
            Some(Firewall { chains, sets, ..Firewall::default() })
        })
    }

    /// Leaves nothing there but this much of the table that is found.
    fn empty(&mut self, keep: impl Fn(&Firewall) -> Option<Firewall>) -> Result<Report, Error> {
        let wanted = self.wanted.take();
        (self.index, self.findings, self.unsettled) = (None, None, None);
        let drift = self.drift();
        let observed = match wanted {
            Some(wanted) => self.current(wanted, drift)?,
            None => self.observe(None)?,
        };
        let firewall = observed.firewall.as_ref().and_then(keep);
        let nothing = State { firewall, ..State::default() };
        let changes = Changes::between(&observed, &nothing);
        let changes = self.make(changes, &observed, &nothing)?;
        Ok(Report { changes, findings: Vec::new(), settled: true })
    }

    /// The datapath.
    ///
    /// Whatever is done with it may change what it holds, so the next call reads it again.
    pub const fn datapath(&mut self) -> &mut D {
        self.in_step = false;
        &mut self.datapath
    }

    /// Reads everything, which probably has these elements; whether it is what is wanted is another
    /// matter.
    fn observe(&mut self, expected: Option<&Elements>) -> Result<State, Error> {
        self.in_step = false;
        let observed = match expected.filter(|elements| elements.len() >= MANY) {
            Some(expected) => self.datapath.observe_expecting(expected),
            None => self.datapath.observe(),
        };
        observed.map_err(Error::Observe)
    }

    /// Reads everything, to carry out a plan: what was wanted before is there, or after a restart
    /// about what is wanted now.
    fn observe_before(&mut self, draft: &Draft) -> Result<State, Error> {
        let wanted = self.wanted.take();
        let expected = wanted.as_ref().and_then(State::elements);
        let observed = self.observe(expected.or(Some(draft.elements())));
        self.wanted = wanted;
        observed
    }

    /// What may have changed since everything was as it is wanted.
    fn drift(&mut self) -> Drift {
        if self.in_step { self.datapath.drift() } else { Drift::Unknown }
    }

    fn restore(&mut self, wanted: &State) -> Result<Changes, Error> {
        match self.drift() {
            Drift::None => Ok(Changes::default()),
            Drift::Rest => {
                let changes = self.rest_changes(wanted)?;
                self.make_quietly(changes)
            }
            Drift::Unknown => {
                let observed = self.observe(wanted.elements())?;
                let changes = Changes::between(&observed, wanted);
                self.make(changes, &observed, wanted)
            }
        }
    }

    /// Makes the changes, and ends the connections that they leave behind with a translation
    /// that is not wanted; the table's guards hold those back until then.
    ///
    /// The first call looks for them even if nothing changes: who ran before may have been stopped
    /// between the two.
    fn make(&mut self, changes: Changes, before: &State, wanted: &State) -> Result<Changes, Error> {
        if self.settled && !changes.ops().any(Op::concerns_packets) {
            return self.make_quietly(changes);
        }
        (self.settled, self.in_step) = (false, false);
        let (mut made, last) = changes.before_guards_go();
        self.datapath.apply(&made)?;
        let stale = self.datapath.stale_connections(wanted, before).map_err(Error::Observe)?;
        // Where all goes, the table that was there is there until its guards are not needed.
        let table = wanted.firewall.as_ref().or(before.firewall.as_ref());
        let mut rest = Changes::end(&stale, table, |one| one.due_mark(wanted, before));
        rest.extend(last);
        self.datapath.apply(&rest)?;
        made.extend(rest);
        (self.settled, self.in_step) = (true, true);
        Ok(made)
    }

    /// Makes changes that no connection's translation depends on.
    fn make_quietly(&mut self, changes: Changes) -> Result<Changes, Error> {
        self.in_step = false;
        if !changes.is_empty() {
            self.datapath.apply(&changes)?;
        }
        self.in_step = true;
        Ok(changes)
    }

    /// What a call reports that knows all of what is wanted.
    fn report(&mut self, changes: Changes) -> Report {
        let index = self.index.as_ref();
        let findings =
            self.findings.get_or_insert_with(|| index.map(Index::findings).unwrap_or_default());
        let settled = self.settled && self.unsettled.is_none();
        Report { changes, findings: findings.clone(), settled }
    }

    /// Gives back what no gateway uses any more, now that the kernel does not either.
    fn release(&mut self) {
        let Some(index) = &self.index else { return };
        let cluster = index.cluster();
        let one_table = cluster.steering == Steering::EgressHook;
        for node in cluster.nodes.iter().filter(|node| node.name != cluster.node) {
            let idle = !index.steers_to(&node.name);
            if idle && node.mark.is_none() && self.marks.get(&node.name).is_some() {
                let _freed = self.marks.release(&node.name);
            }
            if (idle || one_table) && self.tables.get(&node.name).is_some() {
                let _freed = self.tables.release(&node.name);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;
    use crate::cluster::Node;
    use crate::{EgressIp, EgressPolicy, NodeName, PolicyId, Sim};

    #[test]
    fn a_repair_restores_what_was_wanted_last_with_the_smallest_write() {
        let name = |text: &str| NodeName::new(text).unwrap();
        let node = |text: &str, number: u8| {
            let tunnel = IpAddr::from([172, 31, 0, number]).into();
            Node::new(name(text), vec![[192, 0, 2, number].into()], vec![tunnel])
        };
        let nodes = vec![node("a", 1), node("b", 2)];
        let cluster = Cluster::new(name("a"), nodes, vec!["10.0.0.0/8".parse().unwrap()]);
        let source = vec!["10.0.0.1/32".parse().unwrap()];
        let eip = EgressIp::V4([198, 51, 100, 1].into());
        let policy = EgressPolicy {
            gateway: Some(name("b")),
            ..EgressPolicy::new(PolicyId::new("p").unwrap(), source, eip)
        };
        let mut egress = Reconciler::new(Sim::new());
        assert!(egress.repair().unwrap().changes.is_empty(), "nothing is wanted yet");
        let _report = egress.reconcile(&cluster, [&policy]).unwrap();
        assert!(egress.repair().unwrap().changes.is_empty());

        let whole = egress.datapath().observe().unwrap();
        let mut less = whole.clone();
        let rule = less.rules.pop_last().unwrap();
        egress.datapath().apply(&Changes::between(&whole, &less)).unwrap();
        let _looked = egress.preview(&cluster, [&policy; 0]).unwrap();
        let report = egress.repair().unwrap();
        assert_eq!(report.changes.ops().collect::<Vec<_>>(), [&Op::AddRule(rule)]);
        assert_eq!(egress.datapath().observe().unwrap(), whole);
        assert!(egress.repair().unwrap().changes.is_empty());

        let _report = egress.remove().unwrap();
        assert!(egress.repair().unwrap().changes.is_empty(), "nothing is wanted any more");
        assert!(egress.datapath().observe().unwrap().is_empty());
    }
}
