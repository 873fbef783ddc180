//! Reconciliation: plan, observe, diff and apply in one call.

mod adopt;
mod counters;
mod durations;
mod incremental;
mod lent;
mod preview;
#[cfg(feature = "serde")]
mod serialize;
mod suspects;
mod traced;

use std::collections::BTreeSet;
use std::net::IpAddr;

use crate::alloc::{MarkAllocator, MarkPool, TableAllocator, TablePool};
use crate::cluster::{Cluster, Steering};
use crate::connection::Connection;
use crate::datapath::{Among, Datapath, Known, Observed};
use crate::diff::changes::{ApplyError, Changes};
use crate::diff::op::Op;
use crate::error::KernelError;
use crate::plan::{Draft, Finding, Index, PlanError};
use crate::policy::Policy;
use crate::state::{Elements, Firewall, State};
use crate::types::NodeName;

use adopt::adopt;
use durations::Clock;
pub use durations::Durations;
use incremental::{PendingConnections, current, without_elements};
use lent::{Lent, give_back};
use suspects::Suspects;
use traced::{report_findings, report_repair, span};

/// Reconciles the egress state of one network namespace with the wanted policies.
///
/// Each call of [`reconcile`](Self::reconcile) gets the whole set of wanted policies; objects of
/// this crate in the kernel that are not wanted are removed. Nothing is stored in files: after a
/// restart marks and tables are recovered from the kernel, and a call that finds the wanted state
/// writes nothing.
#[derive(Debug)]
pub struct Reconciler<D, M = MarkPool, T = TablePool> {
    datapath: D,
    marks: M,
    tables: T,
    /// The index of the plan for `wanted`, which updates are planned from.
    index: Option<Index>,
    /// The state wanted by the last call whose plan succeeded.
    wanted: Option<State>,
    /// Warnings about `wanted`, once they were requested.
    findings: Option<Vec<Finding>>,
    /// True if the datapath was left in exactly the `wanted` state.
    in_sync: bool,
    /// True if the last call was completed, including the end of stale connections.
    settled: bool,
    /// Changes whose stale connections were left for later.
    pending: Option<PendingConnections>,
    /// The state before a reconciliation whose stale connections were left for later.
    unsettled: Option<State>,
    /// Nodes of earlier plans, which may hold a mark or a table.
    former: BTreeSet<NodeName>,
    /// Times of the call in progress.
    clock: Clock,
}

/// The time at which stale connections are ended.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ending {
    Now,
    /// By the next call that settles.
    Later,
}

/// The observed state, beside the wanted one that the datapath was left in.
#[derive(Debug)]
pub(crate) enum Found {
    /// The wanted state, which is unchanged.
    Unchanged,
    /// All parts were read except the elements of the `inet` table, which are unchanged: this
    /// state has none.
    Rest(Box<State>),
    /// All parts were read.
    Whole(Box<State>),
}

/// The result of a call of the [`Reconciler`]: its changes, and warnings about the plan.
///
/// With the feature `serde` it serializes as a JSON object: `settled`, `findings`, each with `code`
/// and `message`, `changes`, the commands of the operations, and `durations`, in seconds.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Report {
    /// The changes that were made.
    pub changes: Changes,
    /// Warnings about the plan; after an [update](Reconciler::update) only the new ones.
    pub findings: Vec<Finding>,
    /// True if no stale connection is left for [`settle`](Reconciler::settle) to end.
    pub settled: bool,
    /// Time that the call took.
    pub durations: Durations,
}

/// The reason why a call of the [`Reconciler`] was not completed.
///
/// The guide has the [next step](crate::guide::errors) for each error.
///
/// With the feature `serde` it serializes as a JSON object: `code`, `message`, `kernel` (the failed
/// read), `applied`, `skipped` and `refused`, each with `operation` and `error`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The input leaves nothing to carry out; the kernel state was not changed.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The kernel state could not be read.
    #[error("cannot read the kernel's state: {0}")]
    Observe(KernelError),
    /// The kernel refused a change.
    ///
    /// The changes that do not depend on it were made: without a part of the tunnel, a route or a
    /// rule, the packets that need it are dropped, and all others are treated as wanted.
    #[error(transparent)]
    Apply(#[from] ApplyError),
    /// An update was requested before the first reconciliation; the kernel state was not changed.
    #[error("nothing is wanted that could be updated: reconcile first")]
    NothingWanted,
}

impl Error {
    /// Short code of the error, which never changes: for alerts and for programs.
    ///
    /// An error of the input has the code of its [`PlanError`].
    pub fn code(&self) -> &'static str {
        match self {
            Self::Plan(error) => error.code(),
            Self::Observe(_) => "observe_failed",
            Self::Apply(_) => "apply_refused",
            Self::NothingWanted => "nothing_wanted",
        }
    }
}

impl<D: Datapath> Reconciler<D> {
    /// Creates a reconciler with the default mark layout and table range.
    ///
    /// The table pool has no probe for tables of other programs. For a kernel use
    /// `Reconciler::open`, or [`with_allocators`](Self::with_allocators) and a
    /// [pool with a probe](TablePool::with_probe).
    pub fn new(datapath: D) -> Self {
        Self::with_allocators(datapath, MarkPool::default(), TablePool::default())
    }
}

impl<D: Datapath, M: MarkAllocator, T: TableAllocator> Reconciler<D, M, T> {
    /// Creates a reconciler with custom allocators; the marks must be of the cluster's layout.
    pub const fn with_allocators(datapath: D, marks: M, tables: T) -> Self {
        Self {
            datapath,
            marks,
            tables,
            index: None,
            wanted: None,
            findings: None,
            in_sync: false,
            settled: false,
            pending: None,
            unsettled: None,
            former: BTreeSet::new(),
            clock: Clock::new(),
        }
    }

    /// Installs the state that the policies require in the kernel.
    ///
    /// Other objects of this crate are removed. A policy or another node with an error takes no
    /// other policy along: it is a [`Finding`] of the report. Policies that have not changed since
    /// the last call cost a comparison, and the kernel is read only if other programs may have
    /// changed it.
    ///
    /// # Errors
    ///
    /// After [`Error::Plan`] nothing has changed. After other errors the kernel may be between the
    /// two states, in an order in which that is safe; call again.
    pub fn reconcile<P: Policy>(
        &mut self,
        cluster: &Cluster,
        policies: impl IntoIterator<Item = P>,
    ) -> Result<Report, Error> {
        self.reconcile_and(Ending::Now, cluster, policies)
    }

    /// Does the same as [`reconcile`](Self::reconcile), and leaves stale connections to
    /// [`settle`](Self::settle), as [`update`](Self::update) does.
    ///
    /// This is for the first call of a process: to find stale connections the kernel lists its
    /// conntrack entries, which takes 0.4 s for 100 000. Until they are ended, the guard rules drop
    /// their packets. [`reconcile`](Self::reconcile), [`repair`](Self::repair) and a second call of
    /// this method end them as well.
    ///
    /// ```
    /// # use egress_datapath::{Cluster, EgressIp, EgressPolicy, Node, NodeName, PolicyId};
    /// # use egress_datapath::{Reconciler, Sim};
    /// # let name = NodeName::new("a")?;
    /// # let node = Node::new(name.clone(), vec!["10.10.0.11".parse()?], vec!["172.31.0.11/16".parse()?]);
    /// # let cluster = Cluster::new(name.clone(), vec![node], vec!["10.244.0.0/16".parse()?]);
    /// # let eip = EgressIp::V4("198.51.100.200".parse()?);
    /// # let policy = EgressPolicy::new(PolicyId::new("p")?, vec!["10.244.1.10/32".parse()?], eip);
    /// # let policy = policy.with_gateway(name);
    /// # let mut egress = Reconciler::new(Sim::new());
    /// egress.reconcile_unsettled(&cluster, [&policy])?;
    /// // The policies are in force: pods may start.
    /// assert!(egress.settle()?.settled);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As for [`reconcile`](Self::reconcile).
    pub fn reconcile_unsettled<P: Policy>(
        &mut self,
        cluster: &Cluster,
        policies: impl IntoIterator<Item = P>,
    ) -> Result<Report, Error> {
        self.reconcile_and(Ending::Later, cluster, policies)
    }

    fn reconcile_and<P: Policy>(
        &mut self,
        ending: Ending,
        cluster: &Cluster,
        policies: impl IntoIterator<Item = P>,
    ) -> Result<Report, Error> {
        span!("reconcile");
        self.clock.start();
        let policies: Vec<P> = policies.into_iter().collect();
        if let Some(mut changes) = self.follow_snapshot(cluster, &policies)? {
            if ending == Ending::Now {
                changes.extend(self.end_unsettled()?);
            }
            return Ok(self.report(changes));
        }
        self.remember_nodes();
        let draft = Draft::new(cluster, policies)?.with_former(&self.former);
        let observed = self.observe_before(&draft)?;
        let (mut marks, mut tables) = (Lent::new(&mut self.marks), Lent::new(&mut self.tables));
        adopt(cluster, &observed, &mut marks, &mut tables);
        let (index, mut state) =
            match draft.without(&observed.missing.fields).number(&mut marks, &mut tables) {
                Ok(numbered) => numbered,
                Err(error) => {
                    // The allocators stay those of the index, which later updates are planned from.
                    give_back(marks, tables)?;
                    return Err(error.into());
                }
            };
        state.leave_out(&observed.missing);
        let changes = Changes::between(&observed, &state);
        (self.index, self.findings) = (Some(index), None);
        let made = self.make(changes, &observed, &state, ending);
        self.wanted = Some(state);
        let mut changes = made?;
        if ending == Ending::Now {
            changes.extend(self.end_unsettled()?);
            // A stale connection may have the mark of a node.
            self.release();
        }
        Ok(self.report(changes))
    }

    /// Restores the wanted state in the kernel, without planning.
    ///
    /// The wanted state is that of the last [`reconcile`](Self::reconcile) or
    /// [`update`](Self::update). The call undoes changes by other programs, and completes the
    /// changes that a failed [`Error::Apply`] left undone. The report has no findings. If nothing
    /// has changed, nothing is written, and where the datapath [can prove](Datapath::observe)
    /// that, nothing is read. Before the first reconciliation, and after [`remove`](Self::remove),
    /// nothing is wanted, and the call does nothing.
    ///
    /// # Errors
    ///
    /// [`Error::Observe`] and [`Error::Apply`], as for [`reconcile`](Self::reconcile).
    pub fn repair(&mut self) -> Result<Report, Error> {
        span!("repair");
        self.clock.start();
        let changes = match self.wanted.take() {
            Some(mut wanted) => {
                let found = self.find(&wanted);
                let made = found.and_then(|found| {
                    self.follow_missing(&mut wanted, &found);
                    self.restore(&wanted, found)
                });
                self.wanted = Some(wanted);
                let mut changes = made?;
                changes.extend(self.end_unsettled()?);
                changes
            }
            None => Changes::default(),
        };
        report_repair(&changes);
        Ok(self.finished(changes, Vec::new(), true))
    }

    /// Does the same as [`repair`](Self::repair), but always reads everything from the kernel.
    ///
    /// # Errors
    ///
    /// As for [`repair`](Self::repair).
    pub fn audit(&mut self) -> Result<Report, Error> {
        self.in_sync = false;
        self.repair()
    }

    /// Removes all objects of this crate.
    ///
    /// On a node whose pods have open connections, [`drain`](Self::drain) it first: the rules that
    /// block late replies are deleted with the table.
    ///
    /// # Errors
    ///
    /// [`Error::Observe`] and [`Error::Apply`], as for [`reconcile`](Self::reconcile).
    pub fn remove(&mut self) -> Result<Report, Error> {
        self.empty(|_| None)
    }

    /// Removes all objects of this crate except the nf_tables rules, whose maps are emptied.
    ///
    /// Connections that were steered or translated are ended, and the rules drop late replies to
    /// them. Such a reply would make the pod's next packet a reply to it, which leaves with the
    /// pod's own address. If the report has an [`Op::BlockReplies`], wait for
    /// [`Connection::REPLY_BLOCK_TIME`](crate::datapath::Connection::REPLY_BLOCK_TIME), then
    /// [`remove`](Self::remove) the rest.
    ///
    /// # Errors
    ///
    /// [`Error::Observe`] and [`Error::Apply`], as for [`reconcile`](Self::reconcile).
    pub fn drain(&mut self) -> Result<Report, Error> {
        self.empty(|found| {
            let (chains, sets) = (found.chains.clone(), found.sets.clone());
            Some(Firewall { chains, sets, flowtable: found.flowtable, ..Firewall::default() })
        })
    }

    /// Removes everything except the part of the nf_tables table that `keep` returns.
    fn empty(&mut self, keep: impl Fn(&Firewall) -> Option<Firewall>) -> Result<Report, Error> {
        span!("remove");
        self.clock.start();
        let wanted = self.wanted.take();
        self.remember_nodes();
        (self.index, self.findings, self.pending) = (None, None, None);
        let observed = match wanted {
            Some(wanted) if self.in_sync => {
                let found = self.find(&wanted)?;
                current(wanted, found)
            }
            // What the table has and the wanted state has not goes as well.
            _ => self.observe(Known::WithoutElements)?.without_elements(),
        };
        let firewall = observed.firewall.as_ref().and_then(keep);
        let nothing = State { firewall, ..State::default() };
        let changes = Changes::between(&observed, &nothing);
        let changes = self.make(changes, &observed, &nothing, Ending::Now)?;
        Ok(self.finished(changes, Vec::new(), true))
    }

    /// Announces again the egress IPs that this node has added ([`Claim`](crate::Claim)).
    ///
    /// Each is announced once when it is added. A neighbour that missed that, or a process that died
    /// before it, is the reason to repeat: call this at the start, and 1 and 3 seconds after
    /// egress IPs were added, as RFC 5227 and RFC 4861 suggest.
    ///
    /// # Errors
    ///
    /// [`Error::Observe`].
    pub fn announce(&mut self) -> Result<(), Error> {
        self.datapath.announce().map_err(Error::Observe)
    }

    /// Returns the datapath.
    ///
    /// The caller may change the state of the datapath, so the next call reads it again.
    pub const fn datapath(&mut self) -> &mut D {
        self.in_sync = false;
        &mut self.datapath
    }

    /// Reads everything.
    fn observe(&mut self, known: Known<'_>) -> Result<State, Error> {
        self.in_sync = false;
        self.observe_datapath(known)?.into_state().map_err(Error::Observe)
    }

    /// Reads everything before a plan is applied.
    ///
    /// The expected elements are those wanted before, or after a restart those of the draft.
    fn observe_before(&mut self, draft: &Draft) -> Result<State, Error> {
        let wanted = self.wanted.take();
        let expected = wanted.as_ref().and_then(State::elements).unwrap_or(draft.elements());
        let observed = self.observe(Known::Expected(expected));
        self.wanted = wanted;
        observed
    }

    /// Reads the parts that may have changed since the datapath was left in the wanted state.
    fn find(&mut self, wanted: &State) -> Result<Found, Error> {
        if !self.in_sync {
            let known = wanted.elements().map_or(Known::Nothing, Known::Expected);
            return Ok(Found::Whole(Box::new(self.observe(known)?)));
        }
        self.in_sync = false;
        match self.observe_datapath(Known::Installed(wanted))? {
            Observed::Unchanged => {
                self.in_sync = true;
                Ok(Found::Unchanged)
            }
            Observed::Installed(mut state) => match (&mut state.firewall, wanted.elements()) {
                (Some(found), Some(elements)) if found.elements.is_shared_with(elements) => {
                    found.elements = Elements::default();
                    Ok(Found::Rest(state))
                }
                _ => Ok(Found::Whole(state)),
            },
        }
    }

    /// Leaves out what the node has lost the features for, and takes in what it has got them for.
    fn follow_missing(&mut self, wanted: &mut State, found: &Found) {
        let (Found::Rest(found) | Found::Whole(found)) = found else { return };
        let missing = &found.missing;
        if wanted.missing == *missing {
            return;
        }
        if let Some(index) = &self.index {
            let elements = wanted.firewall.take().map(|firewall| firewall.elements);
            *wanted = index.rest();
            if let (Some(firewall), Some(elements)) = (&mut wanted.firewall, elements) {
                firewall.elements = elements;
            }
        }
        wanted.leave_out(missing);
        self.findings = None;
    }

    fn restore(&mut self, wanted: &State, found: Found) -> Result<Changes, Error> {
        match found {
            Found::Unchanged => Ok(Changes::default()),
            Found::Rest(state) => {
                let changes = Changes::of(Some((&state, &without_elements(wanted))), []);
                self.apply_only(changes)
            }
            Found::Whole(observed) => {
                let changes = Changes::between(&observed, wanted);
                self.make(changes, &observed, wanted, Ending::Now)
            }
        }
    }

    /// Applies changes, and ends the connections that they make stale, or leaves them.
    ///
    /// The guard rules of the table drop packets of stale connections until then. The first call
    /// looks for stale connections even if nothing changes: a previous process may have been killed
    /// between the two.
    fn make(
        &mut self,
        changes: Changes,
        before: &State,
        wanted: &State,
        ending: Ending,
    ) -> Result<Changes, Error> {
        if self.settled && !changes.ops().any(Op::concerns_packets) {
            return self.apply_only(changes);
        }
        (self.settled, self.in_sync) = (false, false);
        let (mut made, last) = changes.before_guards_go();
        // Connections of the policies in force must not wait until the refused parts are made.
        let refused = match self.apply_changes(&made) {
            Err(Error::Apply(mut error)) if error.is_about_routing_alone() => {
                error.skipped = last.len();
                Some(error)
            }
            applied => applied.map(|()| None)?,
        };
        if ending == Ending::Later && self.unsettled.is_none() {
            self.unsettled = Some(before.clone());
            self.in_sync = last.is_empty() && refused.is_none();
            let Some(mut error) = refused else { return Ok(made) };
            error.skipped = last.len();
            return Err(error.into());
        }
        let mut stale = self.stale_connections(None, wanted, before)?;
        let earlier = self.unsettled.clone();
        if let Some(earlier) = &earlier {
            stale.extend(self.stale_connections(None, wanted, earlier)?);
        }
        // If everything is removed, the old table exists until its guard rules are no longer
        // needed.
        let table = wanted.firewall.as_ref().or(before.firewall.as_ref());
        let due_mark = |one: &Connection| {
            let earlier = || earlier.as_ref().and_then(|earlier| one.due_mark(wanted, earlier));
            one.due_mark(wanted, before).or_else(earlier)
        };
        let mut rest = Changes::end(&stale, table, due_mark);
        if refused.is_none() {
            rest.extend(last);
        }
        self.apply_changes(&rest)?;
        self.settled = true;
        if self.unsettled.take().is_some() {
            self.release();
        }
        if let Some(mut error) = refused {
            error.applied += rest.len();
            return Err(error.into());
        }
        made.extend(rest);
        self.in_sync = true;
        Ok(made)
    }

    /// Lists the connections, of some sources or all, that are not translated as wanted.
    ///
    /// Of connections of others there may be a hundred thousand, which the kernel can leave out.
    ///
    /// `before` is the state that was installed when they were opened.
    fn stale_connections(
        &mut self,
        sources: Option<&BTreeSet<IpAddr>>,
        wanted: &State,
        before: &State,
    ) -> Result<BTreeSet<Connection>, Error> {
        let mut stale = BTreeSet::new();
        if wanted.decides_nothing() && before.decides_nothing() {
            return Ok(stale);
        }
        let mut each = |connection: Connection| {
            if connection.is_stale(wanted, before) {
                stale.insert(connection);
            }
        };
        let suspects = if sources.is_none() { Suspects::new(wanted, before) } else { None };
        let among = match (sources, &suspects) {
            // A gateway may have returned a packet that opened the connection to the pod.
            (Some(pods), _) if wanted.returns_replies() => Among::Pods(pods),
            (Some(sources), _) => Among::Sources(sources),
            (None, Some(Suspects { sources, marks })) => Among::SourcesOrMarks(sources, marks),
            (None, None) => Among::All,
        };
        self.list_connections(among, &mut each)?;
        Ok(stale)
    }

    /// Applies changes that do not affect the translation of any connection.
    fn apply_only(&mut self, changes: Changes) -> Result<Changes, Error> {
        self.in_sync = false;
        if !changes.is_empty() {
            self.apply_changes(&changes)?;
        }
        self.in_sync = true;
        Ok(changes)
    }

    /// Returns the report of a call that planned everything.
    fn report(&mut self, changes: Changes) -> Report {
        let (index, wanted) = (self.index.as_ref(), self.wanted.as_ref());
        let findings = self.findings.get_or_insert_with(|| {
            let both = index.zip(wanted);
            let findings = both.map(|(index, wanted)| index.findings_at(&wanted.missing.families));
            let findings = findings.unwrap_or_default();
            report_findings(&findings);
            findings
        });
        let findings = findings.clone();
        self.finished(changes, findings, self.settled && self.pending.is_none())
    }

    /// Returns the report of the call that ends.
    fn finished(&self, changes: Changes, findings: Vec<Finding>, settled: bool) -> Report {
        Report { changes, findings, settled, durations: self.clock.stop() }
    }

    /// Remembers the nodes of the index, which may be in no later cluster.
    fn remember_nodes(&mut self) {
        let nodes = self.index.iter().flat_map(|index| &index.cluster().nodes);
        let names = nodes
            .map(|node| &node.name)
            .filter(|name| self.marks.get(name).is_some() || self.tables.get(name).is_some());
        self.former.extend(names.cloned());
    }

    /// Releases unused marks and tables of nodes, once the kernel does not use them either.
    fn release(&mut self) {
        let Some(index) = &self.index else { return };
        let cluster = index.cluster();
        let one_table = cluster.steering == Steering::EgressHook;
        let nodes = cluster.nodes.iter().map(|node| &node.name).chain(&self.former);
        for node in nodes.filter(|node| **node != cluster.node) {
            let idle = !index.steers_to(node);
            if idle && !index.gives_mark(node) && self.marks.get(node).is_some() {
                let _freed = self.marks.release(node);
            }
            if (idle || one_table) && self.tables.get(node).is_some() {
                let _freed = self.tables.release(node);
            }
        }
        self.former.clear();
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;
    use crate::cluster::Node;
    use crate::datapath::observe;
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

        let whole = observe(egress.datapath()).unwrap();
        let mut less = whole.clone();
        let rule = less.rules.pop_last().unwrap();
        egress.datapath().apply(&Changes::between(&whole, &less)).unwrap();
        let _looked = egress.preview(&cluster, [&policy; 0]).unwrap();
        let report = egress.repair().unwrap();
        assert_eq!(report.changes.ops().collect::<Vec<_>>(), [&Op::AddRule(rule)]);
        assert_eq!(observe(egress.datapath()).unwrap(), whole);
        assert!(egress.repair().unwrap().changes.is_empty());

        let _report = egress.remove().unwrap();
        assert!(egress.repair().unwrap().changes.is_empty(), "nothing is wanted any more");
        assert!(observe(egress.datapath()).unwrap().is_empty());
    }
}
