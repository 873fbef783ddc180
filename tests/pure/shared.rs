//! What policies cost that share sources: time and memory of an agent must not be theirs to take.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};

use egress_datapath::{
    Destinations, EgressPolicy, Family, Finding, PolicyId, Reconciler, Sim, Update,
};
use ipnet::IpNet;
use proptest::prelude::*;

use crate::random::policies;
use crate::{cluster, name, nets, planned, policy, v4};

const MANY: u32 = 10_000;

fn block(number: u32, length: u8) -> IpNet {
    IpNet::new(Ipv4Addr::from_bits(number).into(), length).unwrap()
}

/// So many policies, of which each has these sources and, if `listed`, a destination of its own.
fn many(listed: bool, sources: impl Fn(u32) -> Vec<IpNet>) -> Vec<EgressPolicy> {
    let one = |number: u32| {
        let destination = vec![block(0xc000_0000 + number * 16, 28)];
        let eip = v4("198.51.100.200");
        let policy = EgressPolicy::new(id(number), sources(number), eip).with_gateway(name("b"));
        if listed { policy.with_destinations(Destinations::Nets(destination)) } else { policy }
    };
    (0..MANY).map(one).collect()
}

fn id(number: u32) -> PolicyId {
    PolicyId::new(format!("tenant/p{number:05}")).unwrap()
}

/// Allocated at most, in megabytes, by a first call, by the same call again, and by an update.
struct Peaks([f64; 3]);

fn peaks(policies: &[EgressPolicy]) -> (Peaks, Vec<Finding>) {
    let (cluster, mut egress) = (cluster("a"), Reconciler::new(Sim::new()));
    memory::begin();
    let findings = egress.reconcile(&cluster, policies).unwrap().findings;
    let first = memory::peak();
    memory::begin();
    assert!(egress.reconcile(&cluster, policies).unwrap().changes.is_empty());
    let again = memory::peak();
    memory::begin();
    let changed = policies[policies.len() / 2].clone().with_priority(7);
    egress.update([Update::Upsert(changed)]).unwrap();
    (Peaks([first, again, memory::peak()]), findings)
}

#[test]
fn policies_sharing_sources_allocate_no_more_than_others() {
    for listed in [false, true] {
        let (Peaks(apart), none) = peaks(&many(listed, |n| vec![block(0x0b00_0000 + n * 4, 30)]));
        assert_eq!(none, []);
        let shared = vec![block(0x0a00_0000, 8)];
        let of_all = peaks(&many(listed, |_| shared.clone()));
        let mut all = vec![("one prefix", of_all)];
        if !listed {
            // Each inside of what all have, as a range and as an address.
            let half = |number, own| if number % 2 == 0 { shared.clone() } else { vec![own] };
            let ranges = many(false, |n| half(n, block(0x0a00_0000 + n * 4, 30)));
            let hosts = many(false, |n| half(n, block(0x0a00_0000 + n, 32)));
            let host = many(false, |_| vec![block(0x0a00_0001, 32)]);
            all.extend([
                ("ranges in one prefix", peaks(&ranges)),
                ("addresses in one prefix", peaks(&hosts)),
                ("one address", peaks(&host)),
            ]);
        }
        for (what, (Peaks(peaks), findings)) in all {
            note!("{what}, listed: {listed}: {peaks:.1?} MB, others {apart:.1?} MB");
            for (call, apart) in peaks.iter().zip(apart) {
                // The report itself has a thousand findings.
                assert!(*call <= 2.0 * apart + 1.0 && *call < 150.0, "{what}: {peaks:?}");
            }
            let (pairs, more) = if listed { (0, None) } else { (1_000, findings.last()) };
            let overlaps = findings.iter().filter(|one| one.code() == "policies_overlap");
            assert_eq!(overlaps.count(), pairs, "{what}");
            if let Some(more) = more {
                assert!(matches!(more, Finding::MoreOverlaps { count: 8_999 }), "{what}: {more}");
                assert_eq!(more.to_string(), "8999 more overlaps of policies are not listed");
                assert_eq!(more.code(), "more_overlaps");
            }
        }
    }
}

#[test]
fn loser_reported_after_its_first_winner_alone() {
    let eip = || v4("198.51.100.200");
    let to = |id, list: &[&str]| {
        let policy = policy(id, &["10.244.1.10/32"], Some("b"), eip());
        policy.with_destinations(Destinations::Nets(nets(list)))
    };
    let everything = |id| policy(id, &["10.244.1.10/32"], Some("b"), eip());
    let all = [
        to("a", &["192.0.2.0/25"]),
        to("b", &["192.0.2.64/26", "203.0.113.0/26"]),
        to("c", &["192.0.2.0/24", "203.0.113.0/24"]),
        to("d", &["198.51.100.0/24"]),
        to("e", &["203.0.113.7/32"]),
        everything("f"),
        to("g", &["198.51.100.0/24"]),
        everything("h"),
    ];
    let plan = planned(&cluster("a"), &all).unwrap();
    let pairs = plan.findings.iter().filter_map(|finding| match finding {
        Finding::Overlap { winner, loser, .. } => Some(format!("{winner}{loser}")),
        _ => None,
    });
    assert_eq!(pairs.collect::<Vec<_>>(), ["ab", "ac", "af", "be", "fg", "fh"]);
}

/// Pairs of policies that select packets of the same source, the winner first.
fn overlapping(policies: &[EgressPolicy]) -> BTreeSet<(Family, &PolicyId, &PolicyId)> {
    let mut order: Vec<_> = policies.iter().collect();
    order.sort_unstable_by_key(|policy| (policy.priority, &policy.id));
    // Of two prefixes that share an address, one begins inside the other.
    let begins = |nets: &[IpNet]| nets.iter().map(IpNet::network).collect::<Vec<IpAddr>>();
    let any = vec!["0.0.0.0/0".parse().unwrap(), "::/0".parse().unwrap()];
    let listed = |policy: &EgressPolicy| match &policy.destinations {
        Destinations::External => any.clone(),
        Destinations::Nets(nets) => nets.clone(),
    };
    let share = |one: &[IpNet], other: &[IpNet], family| {
        let all = [begins(one), begins(other)].concat();
        let both = |address: &IpAddr| {
            [one, other].iter().all(|nets| nets.iter().any(|net| net.contains(address)))
        };
        all.iter().any(|address| Family::of(*address) == family && both(address))
    };
    let mut pairs = BTreeSet::new();
    for (place, winner) in order.iter().enumerate() {
        for loser in &order[place + 1..] {
            for family in Family::BOTH {
                if share(&winner.sources, &loser.sources, family)
                    && share(&listed(winner), &listed(loser), family)
                {
                    pairs.insert((family, &winner.id, &loser.id));
                }
            }
        }
    }
    pairs
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, failure_persistence: None, ..<_>::default() })]

    #[test]
    fn every_loser_reported_with_a_winner(policies in policies()) {
        let plan = planned(&cluster("a"), &policies).unwrap();
        let reported: BTreeSet<_> = plan.findings.iter().filter_map(|finding| match finding {
            Finding::Overlap { winner, loser, family } => Some((*family, winner, loser)),
            _ => None,
        }).collect();
        let all = overlapping(&policies);
        prop_assert!(reported.is_subset(&all), "{:?}", reported.difference(&all));
        let losers = |pairs: &BTreeSet<(Family, &PolicyId, &PolicyId)>| {
            pairs.iter().map(|(family, _, loser)| (*family, (*loser).clone())).collect::<BTreeSet<_>>()
        };
        prop_assert_eq!(losers(&reported), losers(&all));
    }
}
