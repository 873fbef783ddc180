//! The agent without root and without a network: mocks for what it hands over, simulated kernels
//! for what becomes of it.

use std::net::IpAddr;

use downstream::{Agent, Rule};
use egress_datapath::alloc::{AllocError, MarkPool, TablePool};
use egress_datapath::explain::{HostContext, Packet};
use egress_datapath::mock::{MockDatapath, MockMarkAllocator, MockPolicy, MockTableAllocator};
use egress_datapath::sim::{Outcome, SimCluster, SimNode};
use egress_datapath::{
    Cluster, Datapath, EgressIp, Error, KernelError, Mark, Node, NodeName, PlanError, PolicyId,
    Reconciler, Sim, State, TableId, Unavailable, explain,
};

const POD: &str = "10.244.1.10";
const EIP: &str = "198.51.100.200";

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn name(text: &str) -> NodeName {
    NodeName::new(text).unwrap()
}

fn nodes() -> Vec<Node> {
    let node = |(text, number): (&str, u8)| {
        let tunnel = format!("172.31.0.{number}/16").parse().unwrap();
        Node::new(name(text), vec![ip(&format!("10.10.0.{number}"))], vec![tunnel])
    };
    [("a", 11), ("b", 12)].map(node).to_vec()
}

fn cluster(of: &str) -> Cluster {
    Cluster::new(name(of), nodes(), vec!["10.244.0.0/16".parse().unwrap()])
}

fn rule(gateway: Option<&str>) -> Rule {
    Rule {
        id: PolicyId::new("shop/checkout").unwrap(),
        label: "app=checkout".to_owned(),
        gateway: gateway.map(name),
        egress_ip: EgressIp::V4(EIP.parse().unwrap()),
    }
}

fn agent<D: Datapath>(datapath: D) -> Agent<D> {
    let mut agent = Agent::of(Reconciler::new(datapath));
    agent.label(ip(POD), ["app=checkout".to_owned()]);
    agent
}

#[test]
fn a_label_sends_a_pods_packets_by_the_gateway_as_the_egress_ip() {
    let mut sims = SimCluster::new(nodes().into_iter().map(|node| SimNode {
        sim: Sim::new().with_host(HostContext::new(node.underlay)),
        pods: if node.name == name("a") { vec!["10.244.1.0/24".parse().unwrap()] } else { vec![] },
        name: node.name,
    }));
    for of in ["b", "a"] {
        let sim = &mut sims.node_mut(&name(of)).unwrap().sim;
        agent(sim).sync(&cluster(of), &[rule(Some("b"))]).unwrap();
    }
    let asked = Packet::tcp(ip(POD), 40_000, ip("192.0.2.1"), 443);
    let journey = sims.send(asked);
    let Outcome::Left { node, packet } = journey.outcome else { panic!("{}", journey.trace) };
    assert_eq!((node, packet.source), (name("b"), ip(EIP)), "{}", journey.trace);
    assert_eq!(journey.trace.policy(), Some("shop/checkout"));
    let answered = sims.send_to(&name("b"), packet.reply());
    assert_eq!(answered.outcome, Outcome::Arrived { node: name("a"), packet: asked.reply() });
}

#[test]
fn a_pod_that_lost_its_label_is_left_alone() {
    let mut agent = agent(Sim::new());
    agent.sync(&cluster("a"), &[rule(Some("b"))]).unwrap();
    agent.label(ip(POD), []);
    agent.sync(&cluster("a"), &[rule(Some("b"))]).unwrap();
    let packet = Packet::udp(ip(POD), 40_000, ip("192.0.2.1"), 53);
    let trace = explain(agent.datapath().state(), &packet);
    assert_eq!(trace.policy(), None, "{trace}");
    agent.forget(ip(POD));
    assert!(agent.sync(&cluster("a"), &[rule(Some("b"))]).unwrap().changes.is_empty());
    agent.stop().unwrap();
    assert!(agent.datapath().state().is_empty());
}

#[test]
fn a_refused_change_is_made_up_for_by_the_next_call() {
    let mut agent = agent(Sim::new());
    agent.datapath().refuse(20, 12);
    let error = agent.sync(&cluster("a"), &[rule(Some("b"))]).unwrap_err();
    assert!(matches!(error, Error::Apply(_)), "{error}");
    agent.sync(&cluster("a"), &[rule(Some("b"))]).unwrap();
    assert!(agent.sync(&cluster("a"), &[rule(Some("b"))]).unwrap().changes.is_empty());
}

#[test]
fn a_kernel_that_cannot_be_read_is_not_changed() {
    let mut kernel = MockDatapath::new();
    kernel.expect_observe().times(1).returning(|_| Err(KernelError::refused("list the links", 1)));
    kernel.expect_apply().never();
    let error = agent(kernel).sync(&cluster("a"), &[rule(Some("b"))]).unwrap_err();
    assert!(matches!(error, Error::Observe(error) if error.is_denied()));
}

#[test]
fn marks_and_tables_are_those_of_the_plugins_own_allocators() {
    let (mut marks, mut tables) = (MockMarkAllocator::new(), MockTableAllocator::new());
    let mark = Mark::new(0x2600_2000);
    marks.expect_get().return_const(None);
    marks.expect_allocate().times(1).returning(move |_| Ok(mark));
    tables.expect_get().return_const(None);
    let table = |node: &NodeName| TableId::new(if *node == name("b") { 7000 } else { 7001 });
    tables.expect_allocate().times(2).returning(move |node| Ok(table(node).unwrap()));
    let mut agent = Agent::of(Reconciler::with_allocators(Sim::new(), marks, tables));
    agent.label(ip(POD), ["app=checkout".to_owned()]);
    agent.sync(&cluster("a"), &[rule(Some("b"))]).unwrap();
    let state = agent.datapath().state();
    assert!(state.rules.iter().any(|rule| rule.mark == mark), "{:?}", state.rules);
}

#[test]
fn with_marks_that_fail_nothing_is_changed() {
    let mut marks = MockMarkAllocator::new();
    marks.expect_get().return_const(None);
    marks.expect_allocate().returning(|_| Err(AllocError::Foreign { id: Mark::new(7) }));
    let mut kernel = MockDatapath::new();
    kernel.expect_observe().times(1).returning(|_| Ok(State::default().into()));
    kernel.expect_apply().never();
    let egress = Reconciler::with_allocators(kernel, marks, TablePool::default());
    let mut agent = Agent::of(egress);
    agent.label(ip(POD), ["app=checkout".to_owned()]);
    let error = agent.sync(&cluster("a"), &[rule(Some("b"))]).unwrap_err();
    assert!(matches!(error, Error::Plan(PlanError::Mark(_))), "{error}");
}

#[test]
fn a_policy_of_a_mock_is_as_good_as_any() {
    let mut policy = MockPolicy::new();
    policy.expect_id().return_const(PolicyId::new("shop/checkout").unwrap());
    policy.expect_priority().return_const(0_u32);
    policy.expect_sources().return_const(vec![ip(POD).into()]);
    policy.expect_destinations().return_const(egress_datapath::Destinations::External);
    policy.expect_gateway().returning(|| None);
    policy.expect_unavailable().return_const(Unavailable::Drop);
    policy.expect_egress_ip().return_const(EgressIp::Node);
    let mut egress =
        Reconciler::with_allocators(Sim::new(), MarkPool::default(), TablePool::default());
    egress.reconcile(&cluster("a"), [policy]).unwrap();
    let packet = Packet::udp(ip(POD), 40_000, ip("192.0.2.1"), 53);
    let trace = explain(egress.datapath().state(), &packet);
    assert!(trace.dropped_by().is_some(), "{trace}");
}
