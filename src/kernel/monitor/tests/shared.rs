//! One pair of sockets serves the datapath and its watch.

use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::datapath::{Datapath, Drift, Known};
use crate::diff::op::Op;
use crate::kernel::nft;
use crate::kernel::rtnetlink::socket::RouteSocket;

use Component::{Address, Firewall, Rule};

/// Number of sockets of this namespace in the nf_tables multicast group.
fn subscribers() -> usize {
    let sockets = std::fs::read_to_string("/proc/thread-self/net/netlink").unwrap();
    let is_subscriber = |line: &&str| {
        let fields: Vec<_> = line.split_whitespace().collect();
        let groups = u32::from_str_radix(fields[3], 16).unwrap();
        fields[1] == "12" && groups & 1 << 6 != 0
    };
    sockets.lines().skip(1).filter(is_subscriber).count()
}

#[test]
fn nf_tables_group_joined_only_while_there_is_a_watch() {
    in_namespace(|| {
        let Host { mut egress, watch, cluster, policies } = Host::new();
        assert_eq!(subscribers(), 1);
        egress.audit().unwrap();
        assert_eq!(subscribers(), 1);
        drop(watch);
        assert_eq!(subscribers(), 0);
        egress.audit().unwrap();
        egress.reconcile(&cluster, &policies[..1]).unwrap();
        egress.repair().unwrap();
        assert_eq!(subscribers(), 0);
        let kernel = egress.datapath();
        let watch = kernel.watch().unwrap();
        assert_eq!(subscribers(), 1);
        kernel.monitor.lock().will_commit(usize::MAX);
        assert_eq!(subscribers(), 0);
        kernel.committed(None);
        assert_eq!(subscribers(), 1);
        kernel.monitor.lock().will_commit(usize::MAX);
        drop(watch);
        kernel.committed(None);
        assert_eq!(subscribers(), 0, "the watch was dropped during a large transaction");
        kernel.monitor.lock().will_commit(usize::MAX);
        kernel.committed(None);
        assert_eq!(subscribers(), 0);
    });
}

#[test]
fn events_read_by_the_datapath_wake_the_watch_and_are_reported_once() {
    in_namespace(|| {
        let mut host = Host::new();
        let pid = sh("nft add chain inet egress_datapath other & echo $!; wait");
        assert_eq!(host.egress.datapath().drift(), Drift::Unknown);
        sh("ip rule add pref 9 fwmark 9 protocol 69");
        host.egress.repair().unwrap();
        sh("ip addr add 9.9.9.9/32 dev egress.vxlan");
        host.egress.audit().unwrap();
        assert!(host.is_readable(0));
        let events = host.drain();
        assert_eq!(events.changed, [Address, Firewall, Rule].into());
        let writers: Vec<_> = events.writers.iter().map(|by| by.pid.to_string()).collect();
        assert_eq!((writers, events.lost), (vec![pid.trim().to_owned()], false));
        assert!(!host.is_readable(0));
        assert_eq!(host.drain(), ChangeEvents::default());

        // What the datapath reads before the watch begins is not reported.
        sh("nft flush table inet egress_datapath");
        let Host { mut egress, watch, .. } = host;
        drop(watch);
        sh("ip rule add pref 9 fwmark 9 protocol 69");
        let mut watch = egress.datapath().watch().unwrap();
        assert!(!is_readable(&watch, 0));
        assert_eq!(watch.drain().unwrap(), ChangeEvents::default());
    });
}

const EDIT: &str = "nft add element inet egress_datapath peer4 '{ 192.0.2.77 }'";
const OTHERS: &str = "nft add table ip other; nft delete table ip other";

/// Reads until no more notifications arrive: new devices keep sending them for a while.
fn read(kernel: &mut KernelDatapath) {
    let begin = Instant::now();
    while kernel.drift() != Drift::None {
        assert!(begin.elapsed() < Duration::from_secs(60));
        kernel.read(Known::Nothing).unwrap();
    }
}

#[test]
fn unwatched_table_known_only_at_its_generation() {
    in_namespace(|| {
        let Host { mut egress, watch, .. } = Host::new();
        drop(watch);
        let kernel = egress.datapath();
        for script in [OTHERS, EDIT] {
            read(kernel);
            sh(script);
            assert_eq!(kernel.drift(), Drift::Unknown, "{script}");
        }
    });
}

#[test]
fn change_while_there_was_no_watch_not_hidden_by_a_later_transaction() {
    in_namespace(|| {
        let Host { mut egress, mut watch, .. } = Host::new();
        let kernel = egress.datapath();
        for _ in 0..2 {
            read(kernel);
            drop(watch);
            sh(EDIT);
            watch = kernel.watch().unwrap();
            sh(OTHERS);
            assert_eq!(kernel.drift(), Drift::Unknown, "between two watches");
            read(kernel);
            sh(OTHERS);
            assert_eq!(kernel.drift(), Drift::None, "the watch is told of every transaction");
        }
    });
}

#[test]
fn change_drained_by_the_watch_is_noticed_by_the_datapath() {
    in_namespace(|| {
        let Host { mut egress, mut watch, .. } = Host::new();
        let kernel = egress.datapath();
        for (script, drift) in [
            (EDIT, Drift::Unknown),
            ("ip rule add pref 9 fwmark 9 protocol 69", Drift::Rest),
            (OTHERS, Drift::None),
        ] {
            read(kernel);
            sh(script);
            assert_eq!(watch.drain().unwrap().is_empty(), drift == Drift::None, "{script}");
            sh(OTHERS);
            assert_eq!(kernel.drift(), drift, "{script}");
        }
    });
}

#[test]
fn change_drained_during_a_read_is_noticed_by_the_datapath() {
    in_namespace(|| {
        let Host { mut egress, mut watch, .. } = Host::new();
        let kernel = egress.datapath();
        for (script, drift) in [
            (EDIT, Drift::Unknown),
            ("ip rule add pref 9 fwmark 9 protocol 69", Drift::Rest),
            (OTHERS, Drift::None),
        ] {
            read(kernel);
            // As in a read whose last reply precedes the change.
            kernel.monitor.lock().begin();
            kernel.monitor.lock().begin_routing();
            let generation = nft::generation(&mut kernel.netfilter).unwrap();
            sh(script);
            let _reported = watch.drain().unwrap();
            kernel.monitor.lock().routing_known();
            kernel.monitor.lock().table_known(generation);
            assert_eq!(kernel.drift(), drift, "{script}");
        }
    });
}

#[test]
fn read_during_a_change_and_a_drain_is_not_taken_for_current() {
    in_namespace(|| {
        let Host { mut egress, mut watch, .. } = Host::new();
        let kernel = egress.datapath();
        let mut other = RouteSocket::open().unwrap();
        let is_done = AtomicBool::new(false);
        let (mut current, mut wrong, begin) = (0, Vec::new(), Instant::now());
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !is_done.load(Ordering::Relaxed) && begin.elapsed().as_secs() < 60 {
                    let _reported = watch.drain().unwrap();
                }
            });
            for round in 0..100_u32 {
                let adds = round % 2 == 0;
                let state = std::thread::scope(|scope| {
                    scope.spawn(|| {
                        std::thread::sleep(Duration::from_micros((round * 7 % 900).into()));
                        let op = if adds { Op::AddRule } else { Op::DeleteRule };
                        other.make_one(&op(edits::RULE)).unwrap();
                    });
                    kernel.read(Known::Nothing).unwrap()
                });
                if kernel.drift() == Drift::None {
                    current += 1;
                    wrong.extend((state.rules.contains(&edits::RULE) != adds).then_some(round));
                }
            }
            is_done.store(true, Ordering::Relaxed);
        });
        assert!(wrong.is_empty(), "not current: {wrong:?}");
        note!("{current} of 100 reads were known to be current");
    });
}

#[test]
fn transaction_whose_end_no_watch_is_told_of_is_forgotten() {
    in_namespace(|| {
        let Host { mut egress, watch, .. } = Host::new();
        let kernel = egress.datapath();
        kernel.monitor.lock().unsigned = true;
        drop(watch);
        read(kernel);
    });
}

#[test]
fn change_noticed_by_the_datapath_and_reported_once_if_a_thread_drains() {
    in_namespace(|| {
        let Host { mut egress, mut watch, .. } = Host::new();
        let kernel = egress.datapath();
        let mut other = RouteSocket::open().unwrap();
        let rule = Op::AddRule(edits::RULE);
        let mut by_thread = 0;
        for round in 0..300 {
            read(kernel);
            let reported = std::thread::scope(|scope| {
                let drainer = scope.spawn(|| {
                    let events: Vec<_> = (0..20).map(|_| watch.drain().unwrap()).collect();
                    events.iter().filter(|events| events.changed.contains(&Rule)).count()
                });
                let op = if round % 2 == 0 { &rule } else { &Op::DeleteRule(edits::RULE) };
                other.make_one(op).unwrap();
                assert_eq!(kernel.drift(), Drift::Rest);
                kernel.observe(Known::Nothing).unwrap();
                drainer.join().unwrap()
            });
            by_thread += reported;
            let left = usize::from(watch.drain().unwrap().changed.contains(&Rule));
            assert_eq!(reported + left, 1, "round {round}");
            assert_eq!(watch.drain().unwrap(), ChangeEvents::default());
        }
        note!("{by_thread} of 300 changes were read by the thread or while it drained");
    });
}

#[test]
fn watch_after_a_failed_join_told_of_the_loss_and_joined_by_the_next_read() {
    use rustix::thread::{CapabilitySet, capabilities, set_capabilities};
    in_namespace(|| {
        let mut host = Host::new();
        let kernel = host.egress.datapath();
        kernel.read(Known::Nothing).unwrap();
        let before = nft::generation(&mut kernel.netfilter).unwrap();
        let between = nft::Between { before, after: before };
        kernel.monitor.lock().will_commit(usize::MAX);
        let all = capabilities(None).unwrap();
        let mut less = all;
        less.effective.remove(CapabilitySet::NET_ADMIN);
        set_capabilities(None, less).unwrap();
        assert!(kernel.monitor.lock().committed(Some(between)));
        set_capabilities(None, all).unwrap();
        kernel.monitor.lock().resumed(Some(before));
        assert_eq!((kernel.drift(), subscribers()), (Drift::Unknown, 0));
        kernel.read(Known::Nothing).unwrap();
        assert_eq!(subscribers(), 1);
        assert!(host.is_readable(0) && host.drain().lost);
        sh("nft add chain inet egress_datapath other");
        assert_eq!(host.drain().changed, [Firewall].into());
    });
}

#[test]
fn thread_that_panics_while_it_reads_leaves_nothing_certain() {
    in_namespace(|| {
        let mut host = Host::new();
        let kernel = host.egress.datapath();
        kernel.read(Known::Nothing).unwrap();
        let monitor = kernel.monitor.clone();
        let panics = std::thread::spawn(move || {
            let _listener = monitor.lock();
            std::panic::resume_unwind(Box::new(()));
        });
        assert!(panics.join().is_err());
        assert_eq!(kernel.drift(), Drift::Unknown);
        assert!(host.is_readable(0) && host.drain().lost);
        assert_eq!(host.drain(), ChangeEvents::default());
    });
}
