use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use ipnet::IpNet;

use super::*;
use crate::alloc::{MarkPool, TablePool};
use crate::datapath::{Datapath, Known};
use crate::event::Component;
use crate::kernel::KernelDatapath;
use crate::kernel::monitor::tests::Host;
use crate::kernel::monitor::tests::edits::EDITS;
use crate::kernel::monitor::tests::noise::NOISE;
use crate::kernel::nft;
use crate::kernel::rtnetlink::kernel_tests::{in_namespace, sh};
use crate::{ChangeEvents, Changes, Cluster, Reconciler, State, Update, plan};

/// Reads until no more notifications arrive: new devices keep sending them for a while.
fn known(kernel: &mut KernelDatapath) -> State {
    for _ in 0..50 {
        let state = kernel.read(Known::Nothing).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        if kernel.drift() == Drift::None {
            return state;
        }
    }
    panic!("somebody goes on changing what is ours");
}

#[test]
fn what_others_do_elsewhere_leaves_everything_certain() {
    in_namespace(|| {
        let mut host = Host::new();
        let kernel = host.egress.datapath();
        known(kernel);
        for script in NOISE {
            sh(script);
            assert_eq!(kernel.drift(), Drift::None, "{script}");
        }
    });
}

#[test]
fn every_edit_is_noticed_and_undone_whole() {
    in_namespace(|| {
        let mut host = Host::new();
        let variables = host.variables();
        for (script, parts) in EDITS {
            let kernel = host.egress.datapath();
            known(kernel);
            sh(&format!("{variables}{script}"));
            let drift = kernel.drift();
            let expected =
                if parts.contains(&Component::Firewall) { Drift::Unknown } else { Drift::Rest };
            assert_eq!(drift, expected, "{script}");
            assert_eq!(kernel.drift(), drift, "it stays so until it is read: {script}");
            host.egress.repair().unwrap();

            // The same without a call of the datapath in between.
            host.egress.repair().unwrap();
            sh(&format!("{variables}{script}"));
            assert!(!host.egress.repair().unwrap().changes.is_empty(), "{script}");
            let left = host.egress.audit().unwrap().changes;
            assert!(left.is_empty(), "{script} has left:\n{left}");
        }
    });
}

#[test]
fn too_much_at_once_is_not_taken_for_silence() {
    in_namespace(|| {
        let mut host = Host::new();
        let kernel = host.egress.datapath();
        known(kernel);
        kernel.monitor.lock().reserve(0);
        sh("for i in $(seq 200); do echo link set u0 mtu $((1400 + i)); done | ip -batch -");
        assert_eq!(kernel.drift(), Drift::Unknown);
        known(kernel);
    });
}

#[test]
fn a_refusal_ends_all_certainty() {
    in_namespace(|| {
        let mut host = Host::new();
        let kernel = host.egress.datapath();
        let there = known(kernel);
        let nothing = State::default();
        let twice = Changes::between(&nothing, &there);
        kernel.apply(&twice).unwrap_err();
        assert_eq!(kernel.drift(), Drift::Unknown);
    });
}

#[test]
fn what_another_datapath_writes_is_not_ours() {
    in_namespace(|| {
        let mut host = Host::new();
        known(host.egress.datapath());
        let mut other = Reconciler::new(KernelDatapath::open().unwrap());
        other.reconcile(&host.cluster, &host.policies[..1]).unwrap();
        assert_eq!(host.egress.datapath().drift(), Drift::Unknown);
    });
}

fn source(number: u8) -> IpNet {
    IpNet::from(IpAddr::from([10, 244, 7, number]))
}

/// Checks the policies with the added sources: the plan against the state read from the kernel.
fn check(host: &mut Host, cluster: &Cluster) {
    let found = host.egress.datapath().read(Known::Nothing).unwrap();
    // The pools allocate the marks and tables that the kernel has.
    let (mut marks, mut tables) = (MarkPool::default(), TablePool::default());
    let mut other = Reconciler::with_allocators(
        KernelDatapath::open().unwrap(),
        MarkPool::default(),
        TablePool::default(),
    );
    let preview = other.preview(cluster, &host.policies).unwrap();
    assert!(preview.changes.is_empty(), "{}", preview.changes);
    let plan = plan(cluster, &host.policies, &mut marks, &mut tables).unwrap();
    let sources = |state: &State| state.firewall.as_ref().unwrap().elements.len();
    assert_eq!(sources(&found), sources(&plan.state));
}

#[test]
fn updates_among_others_transactions_are_made_without_reading() {
    in_namespace(|| {
        let mut host = Host::new();
        let id = host.policies[0].id.clone();
        known(host.egress.datapath());
        host.egress.repair().unwrap();
        for number in 1..10 {
            // Transactions in tables of other programs.
            sh("nft add table ip other; nft add chain ip other c; nft delete table ip other");
            let update: Update =
                Update::AddSources { policy: id.clone(), sources: vec![source(number)] };
            let report = host.egress.update([update]).unwrap();
            assert_eq!(report.changes.len(), 1, "{}", report.changes);
            host.policies[0].sources.push(source(number));
        }
        // No update has read the state: a read would show, because it makes everything known anew.
        let gone = host.policies[0].sources.pop().unwrap();
        let update: Update = Update::RemoveSources { policy: id, sources: vec![gone] };
        assert_eq!(host.egress.update([update]).unwrap().changes.len(), 1);
        assert!(host.egress.settle().unwrap().settled);
        let cluster = host.cluster.clone();
        check(&mut host, &cluster);
    });
}

#[test]
fn what_happens_while_nobody_listens_is_not_taken_for_ours() {
    const EDIT: &str = "nft add element inet egress_datapath peer4 '{ 192.0.2.77 }'";
    const OTHERS: &str = "nft add table ip other";
    const NO_MORE: &str = "nft delete table ip other";
    const BOTH: &str = "nft add table ip other
        nft add element inet egress_datapath peer4 '{ 192.0.2.77 }'";
    // Commands before, instead of, and after our own transaction.
    let cases: [([&str; 3], Drift); 6] = [
        (["", OTHERS, ""], Drift::None),
        (["", OTHERS, NO_MORE], Drift::None),
        (["", OTHERS, EDIT], Drift::Unknown),
        ([EDIT, OTHERS, ""], Drift::Unknown),
        ([EDIT, OTHERS, NO_MORE], Drift::Unknown),
        (["", BOTH, NO_MORE], Drift::Unknown),
    ];
    in_namespace(move || {
        let mut host = Host::new();
        for ([before, ours, after], expected) in cases {
            let kernel = host.egress.datapath();
            known(kernel);
            kernel.monitor.lock().will_commit(LARGE);
            sh(before);
            let before = nft::generation(&mut kernel.netfilter).unwrap();
            sh(ours);
            let between = Between { before, after: before + 1 };
            kernel.committed(Some(between));
            sh(after);
            assert_eq!(kernel.drift(), expected, "{ours}, {after}");
            // The caller's watch reports the same.
            let is_told = host.is_readable(0) && !host.drain().is_empty();
            assert_eq!(is_told, expected == Drift::Unknown, "{ours}, {after}");
            sh("nft delete table ip other 2>&1 || true");
            host.egress.repair().unwrap();
        }
    });
}

#[test]
fn a_large_change_of_ours_leaves_everything_certain() {
    in_namespace(|| {
        let mut host = Host::new();
        known(host.egress.datapath());
        host.egress.repair().unwrap();
        let address = |number: u32| IpAddr::V4(Ipv4Addr::from_bits(0x0af5_0000 + number));
        let many =
            (0..2 * u32::try_from(LARGE).unwrap()).map(|number| IpNet::from(address(number)));
        host.policies[0].sources.extend(many);
        let cluster = host.cluster.clone();
        let made = host.egress.reconcile(&cluster, &host.policies).unwrap().changes;
        assert!(made.len() > LARGE, "{}", made.len());
        assert_eq!(host.egress.datapath().drift(), Drift::None);
        assert_eq!(host.drain(), ChangeEvents::default());
        sh("nft delete element inet egress_datapath source4 '{ 10.245.0.7 }'");
        assert_eq!(host.drain().changed, [Component::Firewall].into());
        assert_eq!(host.egress.repair().unwrap().changes.len(), 1);
    });
}
