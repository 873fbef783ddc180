//! What we write ourselves.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;

use super::*;
use crate::datapath::Datapath;
use crate::diff::op::Op;
use crate::state::State;

#[test]
fn what_we_write_is_no_news() {
    in_namespace(|| {
        let mut host = Host::new();
        let all = host.egress.datapath().observe().unwrap();
        for _ in 0..2 {
            host.egress.remove().unwrap();
            let news = host.drain();
            assert!(news.is_empty(), "after removing: {news}");
            let changes = host.reconcile().changes;
            assert_eq!(host.drain(), News::default(), "after:\n{changes}");
        }
        assert_eq!(host.egress.datapath().observe().unwrap(), all);
    });
}

/// Of devices, forwarding entries and IPv6 addresses the kernel does not say whose doing it is.
fn says_who(op: &Op) -> bool {
    !matches!(
        op,
        Op::AddLink(_)
            | Op::SetLink(_)
            | Op::DeleteLink(_)
            | Op::PutFdb(..)
            | Op::DeleteFdb(..)
            | Op::AddAddress(_, IpNet::V6(_))
            | Op::DeleteAddress(_, IpNet::V6(_))
    )
}

#[test]
fn what_we_write_does_not_even_wake() {
    in_namespace(|| {
        let mut host = Host::new();
        let all = host.egress.datapath().observe().unwrap();
        let mut more = all.clone();
        more.addresses
            .extend(["9.9.9.9/32", "fd99::9/128"].map(|net| net.parse::<IpNet>().unwrap()));
        let bare = State { firewall: None, ..more.clone() };
        let bare = State { routes: BTreeMap::new(), rules: BTreeSet::new(), ..bare };
        let bare = State { fdb: BTreeMap::new(), neighbours: BTreeMap::new(), ..bare };
        let mut seen = 0;
        for wanted in [&more, &bare, &all, &bare, &all] {
            let datapath = host.egress.datapath();
            let observed = datapath.observe().unwrap();
            for step in crate::Changes::between(&observed, wanted).steps() {
                let step = step.clone();
                let said = step.ops.iter().all(says_who);
                let changes = crate::Changes::new(vec![step]);
                let text = changes.to_string();
                host.egress.datapath().apply(&changes).unwrap();
                assert!(!said || !host.is_readable(0), "{text}");
                host.expect_silence(&text);
                seen += 1;
            }
        }
        assert!(seen > 20, "{seen}");
    });
}

#[test]
fn an_edge_triggered_poller_hears_of_every_change() {
    in_namespace(|| {
        let datapath = KernelDatapath::open().unwrap();
        let mut watch = datapath.watch().unwrap();
        let outer = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
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
            assert_eq!(watch.drain().unwrap().changed, [Part::Firewall, Part::Rule].into());
            sh("nft delete table inet egress_datapath; ip rule del pref 9");
            assert_eq!(wakes(), 1);
            assert_eq!(watch.drain().unwrap().changed, [Part::Firewall, Part::Rule].into());
        }
    });
}
