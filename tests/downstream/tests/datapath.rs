//! A datapath of the plugin's own: rules in one place, connections in another.

use std::collections::BTreeSet;
use std::net::IpAddr;

use egress_datapath::datapath::{Among, Connection, Counts, Known, Observed, OnConnection, Op};
use egress_datapath::{
    ApplyError, Changes, Cluster, Datapath, EgressIp, EgressPolicy, Error, KernelError, Node,
    NodeName, PolicyId, Reconciler, Sim, State, Update,
};

const POD: &str = "10.244.1.10";

/// Rules in a simulated kernel, and a connection table of its own.
///
/// Everything is read each time, which is all that a datapath must do.
#[derive(Default)]
struct Own {
    rules: Sim,
    connections: BTreeSet<Connection>,
}

impl Datapath for Own {
    fn observe(&mut self, _known: Known<'_>) -> Result<Observed, KernelError> {
        Ok(self.rules.state().clone().into())
    }

    fn apply(&mut self, changes: &Changes) -> Result<(), ApplyError> {
        for op in changes.ops() {
            if let Op::EndConnection(connection) = op {
                self.connections.remove(connection);
            }
        }
        self.rules.apply(changes)
    }

    fn connections(
        &mut self,
        among: Among<'_>,
        each: &mut OnConnection<'_>,
    ) -> Result<(), KernelError> {
        let wanted = |one: &&Connection| among.has(one);
        self.connections.iter().filter(wanted).copied().for_each(each);
        Ok(())
    }

    fn counters(&mut self) -> Result<Counts, KernelError> {
        Ok(Counts::new())
    }
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn name(text: &str) -> NodeName {
    NodeName::new(text).unwrap()
}

fn cluster() -> Cluster {
    let node = |(text, number): (&str, u8)| {
        let tunnel = format!("172.31.0.{number}/16").parse().unwrap();
        Node::new(name(text), vec![ip(&format!("10.10.0.{number}"))], vec![tunnel])
    };
    let nodes = [("a", 11), ("b", 12)].map(node).to_vec();
    Cluster::new(name("a"), nodes, vec!["10.244.0.0/16".parse().unwrap()])
}

fn policy(source: &str) -> EgressPolicy {
    let eip = EgressIp::V4("198.51.100.200".parse().unwrap());
    let id = PolicyId::new("shop/checkout").unwrap();
    let policy = EgressPolicy::new(id, vec![ip(source).into()], eip);
    policy.with_gateway(name("b"))
}

/// A connection of a pod that the CNI plugin masquerades as the node's own address.
fn masqueraded(source: &str) -> Connection {
    Connection {
        protocol: 6,
        source: ip(source),
        source_port: 40_000,
        destination: ip("192.0.2.1"),
        destination_port: 443,
        peer: ip("192.0.2.1"),
        reply_source_port: 443,
        snat_address: ip("10.10.0.11"),
        snat_port: 40_000,
        mark: 0,
        zone: 0,
        reply_zone: 0,
        id: 7,
    }
}

#[test]
fn stale_connection_ended_by_reconcile() {
    let (stale, other) = (masqueraded(POD), masqueraded("10.244.1.99"));
    let mut egress = Reconciler::new(Own::default());
    egress.datapath().connections = [stale, other].into();
    let report = egress.reconcile(&cluster(), [policy(POD)]).unwrap();
    assert!(report.settled);
    assert_eq!(egress.datapath().connections, [other].into());
}

#[test]
fn stale_connection_ended_by_settle_after_update() {
    let stale = masqueraded("10.244.1.11");
    let mut egress = Reconciler::new(Own::default());
    egress.reconcile(&cluster(), [policy(POD)]).unwrap();
    egress.datapath().connections = [stale].into();
    let sources = vec![stale.source.into()];
    let update = Update::AddSources::<EgressPolicy> { policy: policy(POD).id, sources };
    let _report = egress.update([update]).unwrap();
    assert!(egress.settle().unwrap().settled);
    assert_eq!(egress.datapath().connections, [].into());
}

/// A datapath that reports "unchanged" whatever it is asked.
struct Wrong;

impl Datapath for Wrong {
    fn observe(&mut self, _known: Known<'_>) -> Result<Observed, KernelError> {
        Ok(Observed::Unchanged)
    }

    fn apply(&mut self, _changes: &Changes) -> Result<(), ApplyError> {
        panic!("nothing is known that could be changed")
    }

    fn connections(
        &mut self,
        _among: Among<'_>,
        _each: &mut OnConnection<'_>,
    ) -> Result<(), KernelError> {
        Ok(())
    }

    fn counters(&mut self) -> Result<Counts, KernelError> {
        Ok(Counts::new())
    }
}

#[test]
fn unchanged_without_known_state_refused() {
    let error = Reconciler::new(Wrong).reconcile(&cluster(), [policy(POD)]).unwrap_err();
    assert!(matches!(error, Error::Observe(_)), "{error}");
    let state: Option<State> = egress_datapath::datapath::observe(&mut Wrong).ok();
    assert_eq!(state, None);
}
