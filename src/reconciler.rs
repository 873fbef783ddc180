//! Plan, observe, diff, apply: one call that makes a node right.

use std::net::IpAddr;

use crate::alloc::{MarkAllocator, MarkPool, TableAllocator, TablePool};
use crate::changes::Changes;
use crate::cluster::{Cluster, Node};
use crate::datapath::Datapath;
use crate::error::{ApplyError, KernelError};
use crate::op::Op;
use crate::plan::{Finding, Plan, PlanError, plan};
use crate::policy::Policy;
use crate::state::{ChainId, Comment, Data, Firewall, Route, Rule, RuleAction, State, Verdict};
use crate::types::{Mark, NodeName, TableId};

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
    /// What the last call that could plan wanted.
    wanted: Option<State>,
    /// Whether the last call was carried through, connections included.
    settled: bool,
}

/// What a call did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// The changes that were made.
    pub changes: Changes,
    /// What is as asked, but perhaps not as meant.
    pub findings: Vec<Finding>,
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
}

#[cfg(all(feature = "kernel", target_os = "linux"))]
impl Reconciler<crate::KernelDatapath> {
    /// A reconciler of the kernel of the calling thread's network namespace.
    ///
    /// Others may change the nf_tables table, too; [`open_as`](Self::open_as) can keep them out.
    /// Tables are given out from the range, those left out that any rule or route here uses.
    ///
    /// # Errors
    ///
    /// What is missing: a privilege, or a part of the kernel.
    pub fn open(marks: crate::MarkLayout, tables: crate::TableRange) -> Result<Self, Error> {
        Self::open_as(crate::Ownership::Shared, marks, tables)
    }

    /// The same, alone in charge or one of several.
    ///
    /// # Errors
    ///
    /// What is missing, or who is in charge already.
    pub fn open_as(
        ownership: crate::Ownership,
        marks: crate::MarkLayout,
        tables: crate::TableRange,
    ) -> Result<Self, Error> {
        let datapath = crate::KernelDatapath::open_as(ownership).map_err(Error::Observe)?;
        let in_use = crate::KernelTables::open().map_err(Error::Observe)?;
        let tables = TablePool::with_probe(tables, in_use);
        Ok(Self::with_allocators(datapath, MarkPool::new(marks), tables))
    }
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
        Self { datapath, marks, tables, wanted: None, settled: false }
    }

    /// Makes the kernel hold what the policies want, and nothing else of ours.
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
        let (mut plan, observed, changes) = self.compare(cluster, policies)?;
        let made = self.make(changes, &observed, &plan.state);
        self.wanted = Some(std::mem::take(&mut plan.state));
        let changes = made?;
        self.release(cluster, &plan);
        Ok(Report { changes, findings: plan.findings })
    }

    /// Makes the kernel hold again what the last [`reconcile`](Self::reconcile) wanted, whatever
    /// others have done to it since; the report has no findings.
    ///
    /// It is the cheap half of a reconciliation: nothing is planned, and where nothing has changed
    /// nothing is written. It also goes on with what a failed [`Error::Apply`] left undone. Before
    /// the first reconciliation, and after [`remove`](Self::remove), nothing is wanted, and nothing
    /// is done.
    ///
    /// # Errors
    ///
    /// [`Error::Observe`] and [`Error::Apply`], as of [`reconcile`](Self::reconcile).
    pub fn repair(&mut self) -> Result<Report, Error> {
        let changes = match self.wanted.take() {
            Some(wanted) => {
                let made = self.restore(&wanted);
                self.wanted = Some(wanted);
                made?
            }
            None => Changes::default(),
        };
        Ok(Report { changes, findings: Vec::new() })
    }

    /// What [`reconcile`](Self::reconcile) would change and report, without changing it.
    pub fn preview<P: Policy>(
        &mut self,
        cluster: &Cluster,
        policies: impl IntoIterator<Item = P>,
    ) -> Result<Report, Error> {
        let (plan, _, changes) = self.compare(cluster, policies)?;
        Ok(Report { changes, findings: plan.findings })
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
        self.wanted = None;
        let observed = self.datapath.observe().map_err(Error::Observe)?;
        let firewall = observed.firewall.as_ref().and_then(keep);
        let nothing = State { firewall, ..State::default() };
        let changes = Changes::between(&observed, &nothing);
        let changes = self.make(changes, &observed, &nothing)?;
        Ok(Report { changes, findings: Vec::new() })
    }

    /// The datapath.
    pub const fn datapath(&mut self) -> &mut D {
        &mut self.datapath
    }

    fn compare<P: Policy>(
        &mut self,
        cluster: &Cluster,
        policies: impl IntoIterator<Item = P>,
    ) -> Result<(Plan, State, Changes), Error> {
        let observed = self.datapath.observe().map_err(Error::Observe)?;
        adopt(cluster, &observed, &mut self.marks, &mut self.tables);
        let plan = plan(cluster, policies, &mut self.marks, &mut self.tables)?;
        let changes = Changes::between(&observed, &plan.state);
        Ok((plan, observed, changes))
    }

    fn restore(&mut self, wanted: &State) -> Result<Changes, Error> {
        let observed = self.datapath.observe().map_err(Error::Observe)?;
        let changes = Changes::between(&observed, wanted);
        self.make(changes, &observed, wanted)
    }

    /// Makes the changes, and ends the connections that they leave behind with a translation
    /// that is not wanted; the table's guards hold those back until then.
    ///
    /// The first call looks for them even if nothing changes: who ran before may have been stopped
    /// between the two.
    fn make(&mut self, changes: Changes, before: &State, wanted: &State) -> Result<Changes, Error> {
        if self.settled && !changes.ops().any(Op::concerns_packets) {
            self.datapath.apply(&changes)?;
            return Ok(changes);
        }
        self.settled = false;
        let (mut made, last) = changes.before_table_goes();
        self.datapath.apply(&made)?;
        let stale = self.datapath.stale_connections(wanted, before).map_err(Error::Observe)?;
        // Where all goes, the table that was there is there until its guards are not needed.
        let table = wanted.firewall.as_ref().or(before.firewall.as_ref());
        let mut rest = Changes::end(&stale, table);
        rest.extend(last);
        self.datapath.apply(&rest)?;
        made.extend(rest);
        self.settled = true;
        Ok(made)
    }

    /// Gives back what no gateway uses any more, now that the kernel does not either.
    fn release(&mut self, cluster: &Cluster, plan: &Plan) {
        let idle = |name: &NodeName| *name != cluster.node && !plan.gateways.contains_key(name);
        for node in cluster.nodes.iter().filter(|node| idle(&node.name)) {
            if node.mark.is_none() && self.marks.get(&node.name).is_some() {
                let _freed = self.marks.release(&node.name);
            }
            if self.tables.get(&node.name).is_some() {
                let _freed = self.tables.release(&node.name);
            }
        }
    }
}

/// Recovers which gateway has which mark and table from what a previous run left in the kernel.
///
/// The way out to a gateway has the node's name and leads to the chain that sets its mark, and a
/// rule says which table a mark has. Where the firewall is gone, the table's default route says
/// whose it is. What cannot be adopted, because the range or the layout has changed, is allocated
/// anew and the old removed.
fn adopt(
    cluster: &Cluster,
    observed: &State,
    marks: &mut dyn MarkAllocator,
    tables: &mut dyn TableAllocator,
) {
    let layout = cluster.marks;
    let closing =
        |rule: &&Rule| (rule.mark.get(), rule.mask) == (layout.prefix(), layout.prefix_mask());
    for rule in observed.rules.iter().filter(closing) {
        if let (RuleAction::Lookup(table), None) = (rule.action, tables.get(&cluster.node)) {
            let _refused = tables.reserve(&cluster.node, table);
        }
    }
    let mut found: Vec<(&NodeName, Mark, TableId)> = Vec::new();
    for (node, mark) in marks_of(cluster, observed) {
        found.extend(table_of(observed, mark).map(|table| (node, mark, table)));
    }
    for (node, table) in tables_of(cluster, observed) {
        let rules = observed.rules.iter();
        let to = rules.filter(|rule| rule.action == RuleAction::Lookup(table));
        found.extend(to.map(|rule| (node, rule.mark, table)));
    }
    for (node, mark, table) in found {
        if tables.get(node).is_none() {
            let _refused = tables.reserve(node, table);
        }
        if marks.get(node).is_none() {
            let _refused = marks.reserve(node, mark);
        }
    }
}

fn marks_of<'a>(
    cluster: &'a Cluster,
    observed: &'a State,
) -> impl Iterator<Item = (&'a NodeName, Mark)> {
    let elements = observed.firewall.iter().flat_map(|firewall| &firewall.elements);
    elements.filter_map(|(_, value)| match (value.data, &value.comment) {
        (Data::Verdict(Verdict::Goto(ChainId::To(mark))), Some(comment)) => {
            let named = |node: &&Node| Comment::of_name(node.name.as_str()) == *comment;
            cluster.nodes.iter().find(named).map(|node| (&node.name, mark))
        }
        _ => None,
    })
}

fn table_of(observed: &State, mark: Mark) -> Option<TableId> {
    observed.rules.iter().find(|rule| rule.mark == mark).and_then(|rule| match rule.action {
        RuleAction::Lookup(table) => Some(table),
        RuleAction::Unreachable => None,
    })
}

fn tables_of<'a>(
    cluster: &'a Cluster,
    observed: &'a State,
) -> impl Iterator<Item = (&'a NodeName, TableId)> {
    let owner = |gateway: IpAddr| {
        cluster.nodes.iter().find(|node| node.tunnel.iter().any(|net| net.addr() == gateway))
    };
    observed.routes.iter().filter_map(move |(key, route)| match route {
        Route::Via(gateway) if key.dst.prefix_len() == 0 => {
            owner(*gateway).map(|node| (&node.name, key.table))
        }
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{EgressIp, EgressPolicy, PolicyId, Sim};

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
