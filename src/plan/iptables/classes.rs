//! Classes of sources that have the same policies, for the iptables backend.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

use crate::plan::intervals::{Rank, segments};
use crate::plan::policies::NormalizedPolicy;
use crate::range::IpRange;
use crate::types::Family;

/// Index of a class.
pub(crate) type Class = usize;

/// The sources of one family, each with its class.
#[derive(Default)]
pub(crate) struct Classes {
    /// Single addresses.
    pub(crate) hosts: Vec<(IpAddr, Class)>,
    /// Ranges of addresses, disjoint and sorted.
    pub(crate) ranges: Vec<(IpRange, Class)>,
    /// The sorted policies of each class; only the last one may select every destination.
    pub(crate) members: Vec<Vec<Rank>>,
}

impl Classes {
    pub(crate) fn new(policies: &[&NormalizedPolicy], family: Family) -> Self {
        let (mut nets, mut hosts) = (Vec::new(), BTreeMap::<IpAddr, Vec<Rank>>::new());
        for (rank, policy) in (0..).zip(policies) {
            let cover = policy.sources.cover.iter();
            nets.extend(cover.filter(|net| Family::of_net(net) == family).map(|net| (*net, rank)));
            let single = policy.sources.single().into_iter();
            for host in single.filter(|host| Family::of(*host) == family) {
                hosts.entry(host).or_default().push(rank);
            }
        }
        let mut classes = Self::default();
        let mut known = HashMap::new();
        let takes_all = |rank| policy(policies, rank).is_some_and(|one| one.takes_all(family));
        let segments = segments(&nets, family, takes_all).ranges;
        for (range, ranks) in &segments {
            let class = classes.class(ranks.clone(), policies, family, &mut known);
            classes.ranges.push((*range, class));
        }
        for (host, mut ranks) in hosts {
            let at = segments.partition_point(|(range, _)| range.last() < host);
            let around = segments.get(at).filter(|(range, _)| range.contains(host));
            ranks.extend(around.iter().flat_map(|(_, ranks)| ranks));
            let class = classes.class(ranks, policies, family, &mut known);
            classes.hosts.push((host, class));
        }
        classes
    }

    /// Returns the class of these policies, cut after the first one that selects every destination.
    fn class(
        &mut self,
        mut ranks: Vec<Rank>,
        policies: &[&NormalizedPolicy],
        family: Family,
        known: &mut HashMap<Vec<Rank>, Class>,
    ) -> Class {
        ranks.sort_unstable();
        ranks.dedup();
        let takes_all =
            |rank: &Rank| policy(policies, *rank).is_some_and(|policy| policy.takes_all(family));
        if let Some(end) = ranks.iter().position(takes_all) {
            ranks.truncate(end + 1);
        }
        *known.entry(ranks).or_insert_with_key(|ranks| {
            self.members.push(ranks.clone());
            self.members.len() - 1
        })
    }
}

pub(crate) fn policy<'a>(
    policies: &[&'a NormalizedPolicy],
    rank: Rank,
) -> Option<&'a NormalizedPolicy> {
    policies.get(usize::try_from(rank).ok()?).copied()
}
