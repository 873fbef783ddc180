//! The mocks stand in for each boundary.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test says what it expects")]

#[macro_use]
extern crate harness;

use egress_datapath::alloc::{AllocError, MarkPool, TablePool};
use egress_datapath::mock::{MockDatapath, MockMarkAllocator, MockPolicy, MockTableAllocator};
use egress_datapath::{
    Cluster, Destinations, EgressIp, Error, KernelError, Mark, Node, NodeName, PlanError, Policy,
    PolicyId, Reconciler, Sim, State, TableId, Unavailable,
};

fn name(text: &str) -> NodeName {
    NodeName::new(text).unwrap()
}

fn cluster() -> Cluster {
    let node = |text: &str, number: u8| {
        let underlay = format!("10.10.0.{number}").parse().unwrap();
        let tunnel = format!("172.31.0.{number}/16").parse().unwrap();
        Node::new(name(text), vec![underlay], vec![tunnel])
    };
    let excluded = vec!["10.244.0.0/16".parse().unwrap()];
    Cluster::new(name("a"), vec![node("a", 11), node("b", 12)], excluded)
}

/// A policy that is not [`EgressPolicy`](egress_datapath::EgressPolicy).
fn policy() -> MockPolicy {
    let mut policy = MockPolicy::new();
    policy.expect_id().return_const(PolicyId::new("shop/checkout").unwrap());
    policy.expect_priority().return_const(0_u32);
    policy.expect_sources().return_const(vec!["10.244.1.10/32".parse().unwrap()]);
    policy.expect_destinations().return_const(Destinations::External);
    // What a mock hands out by reference must outlive it.
    let gateway: &'static NodeName = Box::leak(Box::new(name("b")));
    policy.expect_gateway().returning(move || Some(gateway));
    policy.expect_unavailable().return_const(Unavailable::Drop);
    policy.expect_egress_ip().return_const(EgressIp::Node);
    policy
}

#[test]
fn a_policy_of_ones_own_is_reconciled() {
    let mut egress = Reconciler::new(Sim::new());
    assert!(!egress.reconcile(&cluster(), [policy()]).unwrap().changes.is_empty());
    // By reference, in a box, and as a trait object.
    let boxed: Box<dyn Policy> = Box::new(policy());
    assert!(egress.reconcile(&cluster(), [&boxed]).unwrap().changes.is_empty());
}

#[test]
fn marks_and_tables_come_from_the_allocators() {
    let (mut marks, mut tables) = (MockMarkAllocator::new(), MockTableAllocator::new());
    let mark = Mark::new(0x2600_2000);
    let table = TableId::new(7000).unwrap();
    marks.expect_get().return_const(None);
    tables.expect_get().return_const(None);
    marks
        .expect_allocate()
        .withf(|node| node.as_str() == "b")
        .times(1)
        .returning(move |_| Ok(mark));
    // The second table is this node's own: what is marked and found no gateway is refused there.
    let closing = TableId::new(7001).unwrap();
    tables
        .expect_allocate()
        .times(2)
        .returning(move |node| Ok(if node.as_str() == "b" { table } else { closing }));
    let mut egress = Reconciler::with_allocators(Sim::new(), marks, tables);
    egress.reconcile(&cluster(), [policy()]).unwrap();
    let state = egress.datapath().state();
    assert!(state.rules.iter().any(|rule| rule.mark == mark));
    assert!(state.routes.keys().all(|key| key.table == table || key.table == closing));
}

#[test]
fn an_allocator_that_fails_stops_before_the_kernel_is_changed() {
    let mut marks = MockMarkAllocator::new();
    marks.expect_get().return_const(None);
    marks.expect_allocate().returning(|_| Err(AllocError::Foreign { id: Mark::new(7) }));
    let mut kernel = MockDatapath::new();
    kernel.expect_observe().times(1).returning(|_| Ok(State::default().into()));
    kernel.expect_apply().never();
    let mut egress = Reconciler::with_allocators(kernel, marks, TablePool::default());
    let error = egress.reconcile(&cluster(), [policy()]).unwrap_err();
    assert!(matches!(error, Error::Plan(PlanError::Mark(AllocError::Foreign { .. }))));
}

#[test]
fn a_kernel_that_cannot_be_read_is_not_changed() {
    let mut kernel = MockDatapath::new();
    kernel.expect_observe().times(1).returning(|_| Err(KernelError::refused("list the links", 1)));
    kernel.expect_apply().never();
    let mut egress = Reconciler::new(kernel);
    let error = egress.reconcile(&cluster(), [policy()]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "cannot read the kernel's state: list the links: Operation not permitted (os error 1); \
         run with CAP_NET_ADMIN in the network namespace's user namespace"
    );
}

#[test]
fn a_preview_changes_nothing() {
    let mut kernel = MockDatapath::new();
    kernel.expect_observe().times(1).returning(|_| Ok(State::default().into()));
    kernel.expect_apply().never();
    let pools = (MarkPool::default(), TablePool::default());
    let mut egress = Reconciler::with_allocators(kernel, pools.0, pools.1);
    assert!(!egress.preview(&cluster(), [policy()]).unwrap().changes.is_empty());
}

fn main() -> std::process::ExitCode {
    harness::main(|| ())
}
