//! A preview leaves nothing behind: not in the kernel, not in the allocators, not in the reconciler.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use egress_datapath::alloc::{AllocError, MarkPool, TablePool, TableRange, TablesInUse};
use egress_datapath::sim::{SharedSim, SimDatapath};
use egress_datapath::state::RuleAction;
use egress_datapath::{
    Cluster, EgressPolicy, Error, Finding, KernelError, Mark, MarkAllocator, MarkLayout, NodeName,
    Reconciler, Report, State, TableAllocator, TableId,
};
use proptest::prelude::*;
use proptest::sample::Index;

use crate::random::{clusters, policies};
use crate::{cluster_v4, name, policy, v4};

/// An allocator that can be looked into while a reconciler has it.
struct Shared<A>(Arc<Mutex<A>>);

impl<A> Shared<A> {
    fn new(allocator: A) -> Self {
        Self(Arc::new(Mutex::new(allocator)))
    }

    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

macro_rules! shared {
    ($allocator:ident, $pool:ty, $id:ty) => {
        impl $allocator for Shared<$pool> {
            fn allocate(&mut self, node: &NodeName) -> Result<$id, AllocError<$id>> {
                self.0.lock().unwrap().allocate(node)
            }

            fn reserve(&mut self, node: &NodeName, id: $id) -> Result<(), AllocError<$id>> {
                self.0.lock().unwrap().reserve(node, id)
            }

            fn release(&mut self, node: &NodeName) -> Result<$id, AllocError<$id>> {
                self.0.lock().unwrap().release(node)
            }

            fn get(&self, node: &NodeName) -> Option<$id> {
                self.0.lock().unwrap().get(node)
            }
        }

        impl Shared<$pool> {
            fn contents(&self) -> Contents<$id> {
                let pool = self.0.lock().unwrap();
                pool.iter().map(|(node, id)| (node.clone(), id)).collect()
            }
        }
    };
}

shared!(MarkAllocator, MarkPool, Mark);
shared!(TableAllocator, TablePool, TableId);

/// The tables that the simulated kernel has, ours and others'.
struct Tables(SharedSim);

impl TablesInUse for Tables {
    fn tables_in_use(&mut self) -> Result<BTreeSet<u32>, KernelError> {
        let state = self.0.state();
        let rules = state.rules.iter().filter_map(|rule| match rule.action {
            RuleAction::Lookup(table) => Some(table.get()),
            _ => None,
        });
        Ok(state.routes.keys().map(|key| key.table.get()).chain(rules).collect())
    }
}

/// What an allocator has given out.
type Contents<Id> = Vec<(NodeName, Id)>;

type Egress = Reconciler<SimDatapath, Shared<MarkPool>, Shared<TablePool>>;

/// A node: its kernel, and the process that programs it.
struct Host {
    kernel: SharedSim,
    marks: Shared<MarkPool>,
    tables: Shared<TablePool>,
    egress: Egress,
}

impl Host {
    fn start(kernel: SharedSim, marks: MarkPool, range: TableRange) -> Self {
        let tables = TablePool::with_probe(range, Tables(kernel.clone())).with_start(1);
        let (marks, tables) = (Shared::new(marks), Shared::new(tables));
        let egress = Reconciler::with_allocators(kernel.open(), marks.clone(), tables.clone());
        Self { kernel, marks, tables, egress }
    }

    /// What a preview must not change.
    fn all(&self) -> (State, Contents<Mark>, Contents<TableId>) {
        (self.kernel.state(), self.marks.contents(), self.tables.contents())
    }

    fn make(&mut self, act: &Act, clusters: &[Cluster; 2]) -> Option<Result<Report, Error>> {
        match act {
            Act::Reconcile(Wanted(cluster, policies)) => {
                Some(self.egress.reconcile(&clusters[usize::from(*cluster)], policies))
            }
            Act::Repair => Some(self.egress.repair()),
            Act::Remove => Some(self.egress.remove()),
            Act::Restart => {
                let marks = MarkPool::new(*self.marks.0.lock().unwrap().layout());
                let range = self.tables.0.lock().unwrap().range();
                *self = Self::start(self.kernel.clone(), marks, range);
                None
            }
            Act::RuleLost(index) => {
                self.kernel.edit(|state| {
                    let rules = &mut state.rules;
                    let lost = (!rules.is_empty()).then(|| index.index(rules.len()));
                    let lost = lost.and_then(|at| rules.iter().nth(at).cloned());
                    rules.retain(|rule| Some(rule) != lost.as_ref());
                });
                None
            }
            Act::TableLost => {
                self.kernel.edit(|state| state.firewall = None);
                None
            }
        }
    }
}

/// What is wanted: one of two clusters, and policies.
#[derive(Clone, Debug)]
struct Wanted(bool, Vec<EgressPolicy>);

#[derive(Clone, Debug)]
enum Act {
    Reconcile(Wanted),
    Repair,
    Remove,
    Restart,
    RuleLost(Index),
    TableLost,
}

fn wanted() -> impl Strategy<Value = Wanted> {
    (prop::bool::weighted(0.2), policies()).prop_map(|(cluster, all)| Wanted(cluster, all))
}

fn acts() -> impl Strategy<Value = Act> {
    prop_oneof![
        8 => wanted().prop_map(Act::Reconcile),
        2 => Just(Act::Repair),
        1 => Just(Act::Remove),
        1 => Just(Act::Restart),
        1 => any::<Index>().prop_map(Act::RuleLost),
        1 => Just(Act::TableLost),
    ]
}

/// What a call has made and found; the time that it took is its own.
fn parts(made: Result<Report, Error>) -> Result<(String, Vec<Finding>), Error> {
    made.map(|report| (report.changes.to_string(), report.findings))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 192, failure_persistence: None, ..<_>::default() })]

    #[test]
    fn a_run_with_previews_is_the_run_without_them(
        clusters in [clusters(), clusters()],
        tables in 0..4_u32,
        acts in prop::collection::vec((prop::collection::vec(wanted(), 0..3), acts()), 1..8),
    ) {
        let start = || {
            let range = TableRange::new(3000, tables).unwrap();
            Host::start(SharedSim::default(), MarkPool::new(clusters[0].marks), range)
        };
        let (mut plain, mut previewed) = (start(), start());
        for (previews, act) in acts {
            let before = previewed.all();
            for Wanted(cluster, policies) in &previews {
                let cluster = &clusters[usize::from(*cluster)];
                let _report = previewed.egress.preview(cluster, policies);
                prop_assert_eq!(&previewed.all(), &before);
            }
            let [one, other] = [&mut plain, &mut previewed].map(|host| {
                let made = host.make(&act, &clusters);
                let settled = made.as_ref().map(|made| made.as_ref().map(|made| made.settled).ok());
                (settled, made.map(parts))
            });
            prop_assert_eq!(one, other);
            prop_assert_eq!(plain.all(), previewed.all());
        }
    }

    #[test]
    fn a_preview_says_what_a_reconciliation_does(
        clusters in [clusters(), clusters()],
        tables in 0..4_u32,
        all in prop::collection::vec(wanted(), 1..6),
    ) {
        let range = TableRange::new(3000, tables).unwrap();
        let marks = MarkPool::new(clusters[0].marks);
        let mut host = Host::start(SharedSim::default(), marks, range);
        for Wanted(cluster, policies) in &all {
            let cluster = &clusters[usize::from(*cluster)];
            let said = host.egress.preview(cluster, policies);
            let done = host.egress.reconcile(cluster, policies);
            prop_assert_eq!(parts(said), parts(done));
        }
    }
}

/// The fallback table is taken from an idle node, and each plan has to choose the same node.
#[test]
fn preview_takes_the_table_of_the_same_idle_node_as_a_reconciliation() {
    let range = TableRange::new(3000, 1).unwrap();
    let mut host = Host::start(SharedSim::default(), MarkPool::default(), range);
    let to = |gateway, source| policy(gateway, &[source], Some(gateway), v4("198.51.100.200"));
    let first = cluster_v4("a");
    host.egress.reconcile(&first, [to("c", "10.244.1.1/32")]).unwrap();
    let mut second = first;
    second.excluded.push("192.0.2.0/24".parse().unwrap());
    let both = [to("b", "10.244.1.1/32"), to("c", "10.244.1.2/32")];
    host.egress.reconcile(&second, both).unwrap();

    let none: [EgressPolicy; 0] = [];
    let said = host.egress.preview(&second, &none);
    assert_eq!(parts(said), parts(host.egress.reconcile(&second, &none)));
}

#[test]
fn preview_allocates_nothing() {
    let kernel = SharedSim::default();
    let mut host = Host::start(kernel, MarkPool::default(), TableRange::default());
    let to = |gateway| [policy("p", &["10.244.1.1/32"], Some(gateway), v4("198.51.100.200"))];
    let mut cluster = cluster_v4("a");
    assert!(!host.egress.preview(&cluster, to("b")).unwrap().changes.is_empty());
    assert_eq!(host.all(), (State::default(), vec![], vec![]));

    host.egress.reconcile(&cluster, to("b")).unwrap();
    let (_, marks, tables) = host.all();
    // The mark that b got by allocation is given to c.
    cluster.nodes[2].mark = Some(marks[0].1);
    host.egress.preview(&cluster, to("c")).unwrap();
    assert_eq!((host.marks.contents(), host.tables.contents()), (marks, tables));
}

#[test]
fn a_preview_that_fails_allocates_nothing() {
    let range = TableRange::new(3000, 0).unwrap();
    let mut host = Host::start(SharedSim::default(), MarkPool::default(), range);
    let to = |gateway: &str, source: &str| {
        policy(gateway, &[source], Some(gateway), v4("198.51.100.200"))
    };
    let both = [to("b", "10.244.1.1/32"), to("c", "10.244.1.2/32")];
    let mut cluster = cluster_v4("a");
    let findings = host.egress.preview(&cluster, &both).unwrap().findings;
    assert!(findings.iter().any(|finding| finding.code() == "policy_denied"), "{findings:?}");
    assert_eq!(host.all(), (State::default(), vec![], vec![]));
    cluster.marks = MarkLayout::COMPACT;
    let error = host.egress.preview(&cluster, &both).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the allocator gave node c mark 0x26001000: the layout has no such gateway mark"
    );
    assert_eq!(host.all(), (State::default(), vec![], vec![]));
}

#[test]
fn a_repair_after_a_preview_reads_what_was_lost_before_it() {
    let kernel = SharedSim::default();
    let mut host = Host::start(kernel, MarkPool::default(), TableRange::default());
    let all = [policy("p", &["10.244.1.1/32"], Some("b"), v4("198.51.100.200"))];
    host.egress.reconcile(&cluster_v4("a"), &all).unwrap();
    let whole = host.kernel.state();
    host.kernel.edit(|state| drop(state.rules.pop_last()));
    host.egress.preview(&cluster_v4("a"), &all).unwrap();
    assert_eq!(host.egress.repair().unwrap().changes.len(), 1);
    assert_eq!(host.kernel.state(), whole);
    assert!(host.marks.get(&name("b")).is_some());
}
