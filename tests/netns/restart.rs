//! Restarts: whoever comes after finds everything right, and touches nothing.

use std::time::{Duration, Instant};

use common::fleet::{Result, check, dual, expect, lab, open, policy};
use egress_datapath::alloc::TableRange;
use egress_datapath::datapath::observe;
use egress_datapath::state::{Data, Set, State};
use egress_datapath::testing::lab::{EIP_B, EIP_C, Host, POD_A, POD_B, POD_C, SERVER, STRANGER};
use egress_datapath::{
    Cluster, EgressPolicy, Error, KernelDatapath, MarkLayout, PlanError, Reconciler,
};

use crate::process::{Process, part, say};

const RESTARTS: u32 = 100;

/// Of these every 25th is a process of its own.
const PROCESSES: u32 = 25;

/// Where marks come from.
#[derive(Clone, Copy, Debug)]
enum Marks {
    Explicit,
    Allocated,
}

#[test]
fn restart_is_noop_allocated_marks() -> Result {
    restarts("seed", Marks::Allocated)
}

#[test]
fn restart_is_noop_explicit_marks() -> Result {
    restarts("seed", Marks::Explicit)
}

#[test]
fn restart_is_noop_allocated_compact_marks() -> Result {
    restarts("compact", Marks::Allocated)
}

#[test]
fn restart_is_noop_explicit_compact_marks() -> Result {
    restarts("compact", Marks::Explicit)
}

fn layout(name: &str) -> MarkLayout {
    if name == "compact" { MarkLayout::COMPACT } else { MarkLayout::SEED }
}

fn cluster(node: &str, marks: &str, layout: MarkLayout) -> Result<Cluster> {
    let mut cluster = egress_datapath::testing::lab::cluster(node)?;
    cluster.marks = layout;
    if marks == "Explicit" {
        // In another order than they would be allocated in.
        for (node, value) in cluster.nodes.iter_mut().zip([0x77, 5, 0x40]) {
            node.mark = layout.mark(value);
        }
    }
    Ok(cluster)
}

/// Clients of two gateways, which have pods of their own and are clients of each other.
fn policies() -> Result<Vec<EgressPolicy>> {
    Ok(vec![
        policy("by-b", &[POD_A, POD_B], Some("node-b"), dual(EIP_B))?,
        policy("by-c", &[STRANGER], Some("node-c"), dual(EIP_C))?,
        policy("c-by-b", &[POD_C], Some("node-b"), dual(EIP_B))?,
    ])
}

fn restarts(layout_name: &str, marks: Marks) -> Result {
    let lab = lab();
    let (layout, policies) = (layout(layout_name), policies()?);
    let marks_name = format!("{marks:?}");
    for host in lab.nodes().into_iter().rev() {
        let cluster = cluster(host.name, &marks_name, layout)?;
        assert!(!open(host, layout)?.reconcile(&cluster, &policies)?.changes.is_empty());
    }
    // A client, and a gateway that is a client of the other one.
    for host in [&lab.node_a, &lab.node_b] {
        let cluster = cluster(host.name, &marks_name, layout)?;
        let before = observed(host)?;
        let numbers = numbers(&before);
        let mut longest = Duration::ZERO;
        for number in 1..=RESTARTS {
            let begin = Instant::now();
            if number % PROCESSES == 0 {
                let part = format!("{} {marks_name} {layout_name}", host.name);
                let test = "restart::restarted_process";
                let said = Process::start(&host.netns, test, &part)?.listen()?;
                assert_eq!(said, format!("0 changes, {numbers}"), "{} {number}", host.name);
            } else {
                let changes = open(host, layout)?.reconcile(&cluster, &policies)?.changes;
                assert!(changes.is_empty(), "{}, restart {number}: {changes}", host.name);
            }
            longest = longest.max(begin.elapsed());
            assert_eq!(observed(host)?, before, "{}, restart {number}", host.name);
        }
        note!(
            "{} {marks_name} {layout_name}: {RESTARTS} restarts, {} of them processes, 0 changes, \
             longest {longest:?}; {numbers}",
            host.name,
            RESTARTS / PROCESSES
        );
    }
    check(&[
        expect(&lab.pod_a, SERVER, EIP_B),
        expect(&lab.stranger, SERVER, EIP_C),
        expect(&lab.pod_b, SERVER, EIP_B),
        expect(&lab.pod_c, SERVER, EIP_B),
    ]);
    Ok(())
}

/// Started by the tests above in a namespace of the lab.
#[test]
fn restarted_process() -> Result {
    let Some(part) = part() else { return Ok(()) };
    let [node, marks, layout_name] = part.split(' ').collect::<Vec<_>>()[..] else {
        return Err("no such part".into());
    };
    let layout = layout(layout_name);
    let mut egress = Reconciler::open(layout, TableRange::default())?;
    let report = egress.reconcile(&cluster(node, marks, layout)?, policies()?)?;
    let numbers = numbers(&observe(egress.datapath())?);
    say(&format!("{} changes, {numbers}", report.changes.len()))
}

fn observed(host: &Host) -> Result<State> {
    Ok(observe(&mut host.netns.run(KernelDatapath::open)??)?)
}

/// The marks and tables in use, and the elements that say whose they are.
fn numbers(state: &State) -> String {
    let rules =
        state.rules.iter().map(|rule| format!("{}/{:#x} {:?}", rule.mark, rule.mask, rule.action));
    let elements = state.firewall.iter().flat_map(|firewall| &firewall.elements);
    let ways = elements.filter_map(|(key, value)| match (key.set(), value.data) {
        (Set::PolicyAction, Data::Verdict(_)) => Some(format!("{key}{value}")),
        _ => None,
    });
    rules.chain(ways).collect::<Vec<_>>().join(", ")
}

#[test]
fn restart_before_policy_list_removes_nothing() -> Result {
    let lab = lab();
    let policies = policies()?;
    for host in lab.nodes() {
        let cluster = lab.cluster(host)?;
        open(host, cluster.marks)?.reconcile(&cluster, &policies)?;
        let before = observed(host)?;

        let mut next = open(host, cluster.marks)?;
        let _watch = next.datapath().watch()?;
        assert!(next.repair()?.changes.is_empty(), "nothing is wanted yet");
        assert!(!next.preview(&cluster, &policies[..0])?.changes.is_empty());
        assert_eq!(observed(host)?, before);

        // This node is not known yet.
        let mut early = cluster.clone();
        early.nodes.retain(|node| node.name != cluster.node);
        let error = next.reconcile(&early, &policies).map(drop);
        assert!(matches!(error, Err(Error::Plan(PlanError::UnknownNode { .. }))), "{error:?}");
        assert_eq!(observed(host)?, before);
        assert!(next.reconcile(&cluster, &policies)?.changes.is_empty());
    }
    check(&[expect(&lab.pod_a, SERVER, EIP_B), expect(&lab.stranger, SERVER, EIP_C)]);
    Ok(())
}
