//! Changes by `ip`, `bridge`, `nft` and `sysctl`, in network namespaces.

pub(crate) mod edits;
mod mutated;
pub(crate) mod noise;
mod own;
mod shared;

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::*;
use crate::alloc::TableRange;
use crate::datapath::Known;
use crate::event::Component;
use crate::kernel::KernelDatapath;
use crate::kernel::rtnetlink::kernel_tests::{in_namespace, sh};
use crate::{
    Cluster, EgressIp, EgressPolicy, MarkLayout, Node, NodeName, PolicyId, Reconciler, Report,
};

/// Maximum number of reports of the datapath's own changes of the device and the objects on it.
///
/// The first is at once, others later, as for IPv6 addresses.
const REPORTS: usize = 4;

pub(crate) struct Host {
    pub(crate) egress: Reconciler<KernelDatapath>,
    watch: Watch,
    pub(crate) cluster: Cluster,
    pub(crate) policies: Vec<EgressPolicy>,
}

/// Node with this number; the local node is 1.
pub(crate) fn node(number: u8) -> Node {
    let underlay = vec![[192, 0, 2, number].into(), format!("2001:db8::{number}").parse().unwrap()];
    let tunnel = [format!("172.31.0.{number}/16"), format!("fd31::{number}/64")];
    let tunnel = tunnel.iter().map(|net| net.parse().unwrap()).collect();
    Node::new(NodeName::new(format!("node-{number}")).unwrap(), underlay, tunnel)
}

impl Host {
    /// Starts a watch in the calling thread's namespace, reconciles, and waits until it is silent.
    pub(crate) fn new() -> Self {
        let mut egress = Reconciler::open(MarkLayout::SEED, TableRange::default()).unwrap();
        let watch = egress.datapath().watch().unwrap();
        let excluded = ["10.244.0.0/16", "fd44::/48"].map(|net| net.parse().unwrap());
        let mut cluster = Cluster::new(node(1).name, (1..4).map(node).collect(), excluded.to_vec());
        cluster.tunnel.underlay_device = Some("u0".parse().unwrap());
        let policies = (2..4).map(|number| EgressPolicy {
            gateway: Some(node(number).name),
            ..EgressPolicy::new(
                PolicyId::new(format!("shop/p{number}")).unwrap(),
                vec![
                    format!("10.244.1.{number}/32").parse().unwrap(),
                    format!("fd44::{number}/128").parse().unwrap(),
                ],
                EgressIp::Dual(
                    [198, 51, 100, number].into(),
                    format!("2001:db8:1::{number}").parse().unwrap(),
                ),
            )
        });
        let mut host = Self { egress, watch, cluster, policies: policies.collect() };
        assert!(!host.reconcile().changes.is_empty());
        host.settle("what was written at first");
        host
    }

    /// Routing table of a gateway and MAC address of its tunnel, as shell variables.
    pub(crate) fn variables(&mut self) -> String {
        let state = self.egress.datapath().read(Known::Nothing).unwrap();
        let via = |route: &crate::state::Route| matches!(route, crate::state::Route::Via(_));
        let (key, _) = state.routes.iter().find(|(_, route)| via(route)).unwrap();
        format!("TABLE={}\nMAC={}\n", key.table, node(2).mac())
    }

    fn reconcile(&mut self) -> Report {
        self.egress.reconcile(&self.cluster, &self.policies).unwrap()
    }

    #[track_caller]
    pub(crate) fn drain(&mut self) -> ChangeEvents {
        self.watch.drain().unwrap()
    }

    /// Waits until changes of all these parts, and of no others, are reported.
    #[track_caller]
    fn expect(&mut self, parts: &[Component], what: &str) -> ChangeEvents {
        let mut all = ChangeEvents::default();
        let begin = Instant::now();
        while all.changed != parts.iter().copied().collect() {
            assert!(begin.elapsed() < Duration::from_secs(5), "{what}: {all}");
            self.is_readable(100);
            let events = self.drain();
            all.changed.extend(events.changed);
            all.writers.extend(events.writers);
            all.lost |= events.lost;
        }
        all
    }

    /// Asserts that nothing is reported, also not late notifications as of IPv6 addresses.
    #[track_caller]
    fn expect_silence(&mut self, what: &str) {
        let mut events = self.drain();
        while events.is_empty() && self.is_readable(20) {
            events = self.drain();
        }
        assert_eq!(events, ChangeEvents::default(), "{what}: {events}");
    }

    /// Number of reports of own changes of the device and the objects on it, until it is silent.
    #[track_caller]
    fn reported(&mut self, what: &str) -> usize {
        let mut reports = 0;
        while self.is_readable(50) {
            let events = self.drain();
            assert!(
                !events.lost && !events.changed.contains(&Component::Firewall),
                "{what}: {events}"
            );
            assert!(!events.changed.contains(&Component::Rule), "{what}: {events}");
            reports += usize::from(!events.is_empty());
            assert!(reports <= REPORTS, "{what}: {events}");
        }
        reports
    }

    /// Waits in the same way, then asserts that a repair writes nothing and causes no report.
    #[track_caller]
    fn settle(&mut self, what: &str) {
        let reports = self.reported(what);
        let begin = Instant::now();
        let changes = self.egress.repair().unwrap().changes;
        note!("reported {reports} times, repair in {:?}, after {what}", begin.elapsed());
        assert!(changes.is_empty(), "{what}:\n{changes}");
        self.expect_silence(what);
    }

    pub(crate) fn is_readable(&self, milliseconds: u32) -> bool {
        is_readable(&self.watch, milliseconds)
    }
}

fn is_readable(watch: &Watch, milliseconds: u32) -> bool {
    let mut list = [PollFd::new(watch, PollFlags::IN)];
    let timeout = Duration::from_millis(milliseconds.into()).try_into().unwrap();
    poll(&mut list, Some(&timeout)).unwrap() == 1
}

#[test]
fn a_datapath_has_one_watch_at_a_time() {
    in_namespace(|| {
        let datapath = KernelDatapath::open().unwrap();
        let first = datapath.watch().unwrap();
        let error = datapath.watch().unwrap_err();
        assert_eq!(error.errno(), Some(errno::EBUSY));
        assert!(error.remedy().unwrap().contains("drop"), "{error}");
        drop(first);
        sh("nft add table inet egress_datapath");
        let mut second = datapath.watch().unwrap();
        assert!(!is_readable(&second, 0), "a change between two watches is not reported");
        sh("nft delete table inet egress_datapath");
        assert_eq!(second.drain().unwrap().changed, [Component::Firewall].into());
    });
}

#[test]
fn watch_is_of_the_namespace_that_the_datapath_was_opened_in() {
    in_namespace(|| {
        let datapath = KernelDatapath::open().unwrap();
        let mut watch = std::thread::scope(|scope| {
            scope.spawn(|| in_namespace_of_its_own(&datapath)).join().unwrap()
        });
        sh("ip rule add pref 9 fwmark 9 lookup 9 protocol 69");
        assert_eq!(watch.drain().unwrap().changed, [Component::Rule].into());
    });
}

#[allow(deprecated, reason = "the descriptor table stays shared, so that it is sound")]
fn in_namespace_of_its_own(datapath: &KernelDatapath) -> Watch {
    rustix::thread::unshare(rustix::thread::UnshareFlags::NEWNET).unwrap();
    datapath.watch().unwrap()
}

#[test]
fn without_the_privilege_the_error_names_it() {
    in_namespace(|| {
        let mut sets = rustix::thread::capabilities(None).unwrap();
        sets.effective.remove(rustix::thread::CapabilitySet::NET_ADMIN);
        rustix::thread::set_capabilities(None, sets).unwrap();
        let datapath = KernelDatapath::open().unwrap();
        for _ in 0..2 {
            let error = datapath.watch().unwrap_err();
            assert!(error.is_denied(), "{error}");
            assert!(error.to_string().contains("CAP_NET_ADMIN"), "{error}");
        }
    });
}
