//! Spans and events of the feature `tracing`.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test says what it expects")]

#[macro_use]
extern crate harness;

use std::fmt::Debug;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};

use egress_datapath::{Cluster, EgressIp, EgressPolicy, Node, NodeName, PolicyId, Reconciler, Sim};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

/// The names of all spans and the messages of all events, in order.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<String>>>);

impl Log {
    /// Adds a line, unless it is the last one again: the kernel refuses all of a transaction.
    fn push(&self, line: impl Into<String>) {
        let (mut lines, line) = (self.0.lock().unwrap(), line.into());
        if lines.last() != Some(&line) {
            lines.push(line);
        }
    }

    fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

impl Visit for &Log {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        if field.name() == "message" {
            self.push(format!("{value:?}"));
        }
    }
}

impl Subscriber for Log {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target().starts_with("egress_datapath")
    }

    fn new_span(&self, span: &Attributes<'_>) -> Id {
        self.push(span.metadata().name());
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        event.record(&mut &*self);
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

fn cluster() -> Cluster {
    let name = |text: &str| NodeName::new(text).unwrap();
    let node = |text: &str, number: u8| {
        let tunnel = IpAddr::from([172, 31, 0, number]).into();
        Node::new(name(text), vec![[192, 0, 2, number].into()], vec![tunnel])
    };
    let nodes = vec![node("a", 1), node("b", 2)];
    Cluster::new(name("a"), nodes, vec!["10.0.0.0/8".parse().unwrap()])
}

#[test]
fn tracing_reports_calls_refusals_repairs_and_findings() {
    let log = Log::default();
    tracing::subscriber::with_default(log.clone(), || {
        let source = vec!["10.0.0.1/32".parse().unwrap()];
        let eip = EgressIp::V4([198, 51, 100, 1].into());
        // Without a gateway, which is a finding.
        let policy = EgressPolicy::new(PolicyId::new("p").unwrap(), source, eip);
        let mut egress = Reconciler::new(Sim::new());
        egress.datapath().refuse(0, 12);
        egress.reconcile(&cluster(), [&policy]).unwrap_err();
        assert_eq!(log.take(), ["reconcile", "observe", "apply", "operation refused"]);
        let _report = egress.reconcile(&cluster(), [&policy]).unwrap();
        let made = ["reconcile", "observe", "apply", "connections", "apply", "finding"];
        assert_eq!(log.take(), made);
        egress.datapath().edit(|state| state.firewall = None);
        let _report = egress.repair().unwrap();
        let message = "changes of other programs undone";
        assert_eq!(log.take(), ["repair", "observe", "apply", "connections", "apply", message]);
        let _report = egress.repair().unwrap();
        assert_eq!(log.take(), ["repair", "observe"]);
    });
}

fn main() -> std::process::ExitCode {
    harness::main(|| ())
}
