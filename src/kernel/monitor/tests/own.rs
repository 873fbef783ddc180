//! Changes that the datapath makes itself.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};

use super::*;
use crate::datapath::{Datapath, Drift, Known};
use crate::diff::op::Op;
use crate::state::State;
use crate::{EgressPolicy, Update};

#[test]
fn own_change_of_the_device_is_reported_a_few_times_and_repair_writes_nothing() {
    in_namespace(|| {
        let mut host = Host::new();
        let all = host.egress.datapath().read(Known::Nothing).unwrap();
        for _ in 0..2 {
            host.egress.remove().unwrap();
            host.settle("removing everything");
            let changes = host.reconcile().changes;
            host.settle(&changes.to_string());
        }
        let third = host.cluster.nodes.pop().unwrap();
        let policies = host.policies.split_off(1);
        host.reconcile();
        host.settle("a node that goes");
        host.cluster.nodes.push(third);
        host.policies.extend(policies);
        host.reconcile();
        host.settle("a node that comes");
        assert_eq!(host.egress.datapath().read(Known::Nothing).unwrap(), all);
    });
}

#[test]
fn watch_silent_after_own_policy_change() {
    in_namespace(|| {
        let mut host = Host::new();
        let policy = host.policies[0].clone();
        let source = "10.244.1.77/32".parse::<IpNet>().unwrap();
        let (id, sources) = (policy.id.clone(), vec![source]);
        host.egress.update([Update::<EgressPolicy>::AddSources { policy: id, sources }]).unwrap();
        assert!(!host.is_readable(50), "a pod that comes");
        let (id, sources) = (policy.id.clone(), vec![source]);
        host.egress
            .update([Update::<EgressPolicy>::RemoveSources { policy: id, sources }])
            .unwrap();
        assert!(!host.is_readable(50), "a pod that goes");
        let mut more = policy;
        (more.id, more.sources) = (PolicyId::new("shop/more").unwrap(), vec![source]);
        host.policies.push(more);
        assert!(!host.reconcile().changes.is_empty());
        assert!(!host.is_readable(50), "a policy that comes");
        host.policies.pop();
        assert!(!host.reconcile().changes.is_empty());
        assert!(!host.is_readable(50), "a policy that goes");
    });
}

/// Whether the notifications of an operation carry the port of the requesting socket.
fn has_port(op: &Op) -> bool {
    !matches!(
        op,
        Op::AddLink(_)
            | Op::SetLink(_)
            | Op::DeleteLink(_)
            | Op::PutFdb(..)
            | Op::DeleteFdb(..)
            | Op::DeleteNeighbour(..)
            | Op::AddAddress(_, IpNet::V6(_))
            | Op::DeleteAddress(_, IpNet::V6(_))
    )
}

#[test]
fn watch_silent_after_own_change_of_rules_routes_and_tables() {
    in_namespace(|| {
        let mut host = Host::new();
        let all = host.egress.datapath().read(Known::Nothing).unwrap();
        let mut more = all.clone();
        more.addresses
            .extend(["9.9.9.9/32", "fd99::9/128"].map(|net| net.parse::<IpNet>().unwrap()));
        let bare = State { firewall: None, ..more.clone() };
        let bare = State { routes: BTreeMap::new(), rules: BTreeSet::new(), ..bare };
        let bare = State { fdb: BTreeMap::new(), neighbours: BTreeMap::new(), ..bare };
        let mut seen = 0;
        for wanted in [&more, &bare, &all, &bare, &all] {
            let datapath = host.egress.datapath();
            let observed = datapath.read(Known::Nothing).unwrap();
            for step in crate::Changes::between(&observed, wanted).steps() {
                let step = step.clone();
                let silent = step.ops.iter().all(has_port);
                let changes = crate::Changes::new(vec![step]);
                let text = changes.to_string();
                host.egress.datapath().apply(&changes).unwrap();
                assert!(!silent || !host.is_readable(0), "{text}");
                host.reported(&text);
                seen += 1;
            }
        }
        assert!(seen > 20, "{seen}");
    });
}

#[test]
fn edge_triggered_poller_is_woken_by_every_change() {
    in_namespace(|| {
        let mut datapath = KernelDatapath::open().unwrap();
        let mut watch = datapath.watch().unwrap();
        let outer = epoll::create(CreateFlags::CLOEXEC).unwrap();
        let flags = EventFlags::IN | EventFlags::ET;
        epoll::add(&outer, watch.as_fd(), EventData::new_u64(1), flags).unwrap();
        let wakes = || {
            let mut events = Vec::with_capacity(4);
            let timeout = Timespec { tv_sec: 0, tv_nsec: 500_000_000 };
            epoll::wait(&outer, rustix::buffer::spare_capacity(&mut events), Some(&timeout))
                .unwrap()
        };
        for _ in 0..3 {
            sh("nft add table inet egress_datapath; ip rule add pref 9 fwmark 9 protocol 69");
            assert_eq!(wakes(), 1);
            assert_eq!(
                watch.drain().unwrap().changed,
                [Component::Firewall, Component::Rule].into()
            );
            sh("nft delete table inet egress_datapath; ip rule del pref 9");
            assert_eq!(wakes(), 1);
            // The datapath reads them, and keeps them for the watch.
            assert_eq!(datapath.drift(), Drift::Unknown);
            assert_eq!(wakes(), 1);
            assert_eq!(
                watch.drain().unwrap().changed,
                [Component::Firewall, Component::Rule].into()
            );
        }
    });
}
