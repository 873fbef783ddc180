//! Unit tests of a program that embeds the crate: mocks of the traits, and a simulated kernel.

use egress_datapath::mock::{MockDatapath, MockMarkAllocator, MockPolicy, MockTableAllocator};
use egress_datapath::{
    Cluster, Destinations, EgressIp, Error, KernelError, Mark, Node, NodeName, PolicyId,
    Reconciler, Sim, TableId, Unavailable,
};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn main() -> Result<()> {
    own_policies()?;
    own_allocators()?;
    refusals()
}

/// Tests a custom policy type against a simulated kernel.
fn own_policies() -> Result<()> {
    let mut egress = Reconciler::new(Sim::new());
    let report = egress.reconcile(&cluster()?, [policy()?])?;
    println!("{} changes for a mock policy", report.changes.len());
    let again = egress.reconcile(&cluster()?, [policy()?])?;
    assert!(again.changes.is_empty(), "the second call changes nothing");

    // Another program deletes a routing rule.
    let rules = &mut egress.datapath().state_mut().rules;
    let gone = rules.pop_first().ok_or("no rule to delete")?;
    let repaired = egress.reconcile(&cluster()?, [policy()?])?;
    assert_eq!(repaired.changes.len(), 1);
    println!("repaired: {gone}");

    // One operation is refused, and the next call completes the changes.
    egress.remove()?;
    egress.datapath().refuse(30, 12);
    let error =
        egress.reconcile(&cluster()?, [policy()?]).err().ok_or("no operation was refused")?;
    println!("refused: {error}");
    egress.reconcile(&cluster()?, [policy()?])?;
    assert!(egress.reconcile(&cluster()?, [policy()?])?.changes.is_empty());
    Ok(())
}

/// Tests custom allocators of marks and tables, such as a database.
fn own_allocators() -> Result<()> {
    let (mut marks, mut tables) = (MockMarkAllocator::new(), MockTableAllocator::new());
    let mark = Mark::new(0x2600_2000);
    let table = |id| TableId::new(id).ok_or("a table of the kernel");
    // One table for the gateway, and the fallback table for marked packets that match no rule.
    let (table, closing) = (table(7000)?, table(7001)?);
    marks.expect_get().return_const(None);
    marks.expect_allocate().times(1).returning(move |_| Ok(mark));
    tables.expect_get().return_const(None);
    let give = move |node: &NodeName| Ok(if node.as_str() == "b" { table } else { closing });
    tables.expect_allocate().times(2).returning(give);
    let mut egress = Reconciler::with_allocators(Sim::new(), marks, tables);
    egress.reconcile(&cluster()?, [policy()?])?;
    let state = egress.datapath().state();
    assert!(state.rules.iter().any(|rule| rule.mark == mark));
    assert!(state.routes.keys().all(|key| [table, closing].contains(&key.table)));
    println!("gateway b has mark {mark} and table {table} from the allocators");
    Ok(())
}

/// Tests the error of a kernel that refuses a request.
fn refusals() -> Result<()> {
    let mut kernel = MockDatapath::new();
    kernel.expect_observe().returning(|_| Err(KernelError::refused("list the links", 1)));
    kernel.expect_apply().never();
    match Reconciler::new(kernel).reconcile(&cluster()?, [policy()?]) {
        Err(Error::Observe(error)) if error.is_denied() => println!("denied: {error}"),
        other => return Err(format!("{other:?}").into()),
    }
    Ok(())
}

fn policy() -> Result<MockPolicy> {
    let mut policy = MockPolicy::new();
    policy.expect_id().return_const(PolicyId::new("shop/checkout")?);
    policy.expect_priority().return_const(0_u32);
    policy.expect_sources().return_const(vec!["10.244.1.10/32".parse()?]);
    policy.expect_destinations().return_const(Destinations::External);
    // A value that a mock returns by reference must outlive the mock.
    let gateway: &'static NodeName = Box::leak(Box::new(NodeName::new("b")?));
    policy.expect_gateway().returning(move || Some(gateway));
    policy.expect_unavailable().return_const(Unavailable::Drop);
    policy.expect_egress_ip().return_const(EgressIp::V4("198.51.100.200".parse()?));
    Ok(policy)
}

fn cluster() -> Result<Cluster> {
    let mut nodes = Vec::new();
    for (name, number) in [("a", 11), ("b", 12)] {
        let underlay = format!("10.10.0.{number}").parse()?;
        let tunnel = format!("172.31.0.{number}/16").parse()?;
        nodes.push(Node::new(NodeName::new(name)?, vec![underlay], vec![tunnel]));
    }
    Ok(Cluster::new(NodeName::new("a")?, nodes, vec!["10.244.0.0/16".parse()?]))
}
