//! From policies that overlap to classes that do not.
//!
//! A class is a distinct ordered combination of policies that share a source. Sources become
//! disjoint, each with one class; within a class every destination prefix gets the one policy
//! that comes first in (priority, id) among those that contain it. The longest prefix then
//! decides as the order would.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use ipnet::IpNet;

use super::check::Checked;
use crate::range::{IpRange, address, number};
use crate::state::Tag;
use crate::types::{Family, PolicyId, fnv1a};

/// Rank of a policy in the total order (priority, id).
pub(super) type Rank = u32;

/// The sources of one family, each with its class, and what each class does.
#[derive(Default)]
pub(super) struct Classes {
    /// Single addresses.
    pub(super) hosts: Vec<(IpAddr, Tag)>,
    /// Ranges of addresses, disjoint.
    pub(super) ranges: Vec<(IpRange, Tag)>,
    /// The policies of each class in order; the last may take every destination.
    pub(super) members: BTreeMap<Tag, Vec<Rank>>,
    /// Pairs of policies that take the same packets of some source: who gets them, who does not.
    pub(super) overlaps: BTreeSet<(Rank, Rank)>,
}

/// Numbers that the kernel's maps know policies by; they depend on the ids alone, not on order.
pub(super) fn policy_tags(policies: &[Checked<'_>]) -> Vec<Tag> {
    let mut numbers = Numbers::default();
    let mut by_id: Vec<_> = policies.iter().map(|policy| policy.id).enumerate().collect();
    by_id.sort_unstable_by_key(|&(_, id)| id);
    let mut tags: Vec<_> = by_id.into_iter().map(|(rank, id)| (rank, numbers.take([id]))).collect();
    tags.sort_unstable_by_key(|&(rank, _)| rank);
    tags.into_iter().map(|(_, tag)| tag).collect()
}

/// Tags by hash: equal input gives an equal tag after a restart with no memory.
#[derive(Default)]
struct Numbers {
    taken: BTreeSet<Tag>,
}

impl Numbers {
    fn take<'a>(&mut self, ids: impl IntoIterator<Item = &'a PolicyId>) -> Tag {
        let mut text = Vec::new();
        for id in ids {
            text.extend_from_slice(id.as_str().as_bytes());
            text.push(0);
        }
        loop {
            if let Some(tag) = hashed(fnv1a(&text)) {
                if self.taken.insert(tag) {
                    return tag;
                }
            }
            text.push(1);
        }
    }
}

/// A tag from a hash; high halves below 16 are left to ways out.
fn hashed(hash: u64) -> Option<Tag> {
    let folded = u32::try_from((hash >> 32) ^ (hash & 0xffff_ffff)).ok()?;
    Tag::new(folded).filter(|tag| tag.get() >> 16 >= 16)
}

/// Combinations that were cut, and what is left of them: many sources have the same one, and each
/// costs the square of its length.
type Cuts = HashMap<Vec<Rank>, Vec<Rank>>;

impl Classes {
    pub(super) fn new(policies: &[Checked<'_>], family: Family) -> Self {
        let (hosts, nets) = sources(policies, family);
        let segments = segments(&nets, family);
        let mut classes = Self::default();
        let mut cuts = Cuts::new();
        let mut groups: Vec<(IpAddr, Vec<Rank>)> = Vec::with_capacity(hosts.len());
        for (host, rank) in hosts {
            match groups.last_mut() {
                Some((last, ranks)) if *last == host => ranks.push(rank),
                _ => groups.push((host, vec![rank])),
            }
        }
        let mut interned: HashMap<Vec<Rank>, Option<Tag>> = HashMap::new();
        let mut ranges = Vec::with_capacity(segments.len());
        for (range, ranks) in segments {
            let ranks = classes.cut(ranks, policies, family, &mut cuts);
            interned.insert(ranks.clone(), None);
            ranges.push((range, ranks));
        }
        for (host, ranks) in &mut groups {
            let at = ranges.partition_point(|(range, _)| range.last() < *host);
            let around = ranges.get(at).filter(|(range, _)| range.contains(*host));
            let mut all = std::mem::take(ranks);
            all.extend(around.iter().flat_map(|(_, ranks)| ranks));
            all.sort_unstable();
            all.dedup();
            *ranks = classes.cut(all, policies, family, &mut cuts);
            if !interned.contains_key(ranks) {
                interned.insert(ranks.clone(), None);
            }
        }
        classes.number(&mut interned, policies);
        let tag = |ranks: &Vec<Rank>| interned.get(ranks).copied().flatten();
        for (range, ranks) in &ranges {
            if let Some(tag) = tag(ranks) {
                match classes.ranges.last_mut() {
                    Some((last, same)) if *same == tag && adjoins(last, range) => {
                        *last = IpRange::new(last.first(), range.last()).unwrap_or(*last);
                    }
                    _ => classes.ranges.push((*range, tag)),
                }
            }
        }
        for (host, ranks) in groups {
            let at = classes.ranges.partition_point(|(range, _)| range.last() < host);
            let around = classes.ranges.get(at).filter(|(range, _)| range.contains(host));
            // A host that its range already sends the same way needs no element.
            if let Some(tag) = tag(&ranks).filter(|tag| around.is_none_or(|(_, a)| a != tag)) {
                classes.hosts.push((host, tag));
            }
        }
        classes
    }

    /// Drops what comes after a policy that takes everything, and notes overlaps.
    fn cut(
        &mut self,
        mut ranks: Vec<Rank>,
        policies: &[Checked<'_>],
        family: Family,
        cuts: &mut Cuts,
    ) -> Vec<Rank> {
        if ranks.len() < 2 {
            return ranks;
        }
        if let Some(known) = cuts.get(&ranks) {
            return known.clone();
        }
        let takes_all = |rank: &Rank| policy(policies, *rank).is_some_and(|p| p.takes_all(family));
        let end = ranks.iter().position(takes_all);
        for (place, first) in ranks.iter().enumerate() {
            for second in ranks.iter().skip(place + 1) {
                let pair = (*first, *second);
                if !self.overlaps.contains(&pair) && overlap(policies, pair, family) {
                    self.overlaps.insert(pair);
                }
            }
        }
        let whole = ranks.clone();
        if let Some(end) = end {
            ranks.truncate(end + 1);
        }
        cuts.insert(whole, ranks.clone());
        ranks
    }

    fn number(&mut self, interned: &mut HashMap<Vec<Rank>, Option<Tag>>, all: &[Checked<'_>]) {
        let ids = |ranks: &[Rank]| -> Vec<&PolicyId> {
            ranks.iter().filter_map(|rank| policy(all, *rank)).map(|policy| policy.id).collect()
        };
        let mut lists: Vec<_> =
            interned.iter_mut().map(|(ranks, tag)| (ids(ranks), ranks, tag)).collect();
        lists.sort_unstable_by(|(one, ..), (other, ..)| one.cmp(other));
        let mut numbers = Numbers::default();
        for (ids, ranks, tag) in lists {
            let number = numbers.take(ids);
            *tag = Some(number);
            self.members.insert(number, ranks.clone());
        }
    }
}

pub(super) fn policy<'p, 'a>(policies: &'p [Checked<'a>], rank: Rank) -> Option<&'p Checked<'a>> {
    policies.get(usize::try_from(rank).ok()?)
}

/// Whether two policies of one source want a destination in common.
fn overlap(policies: &[Checked<'_>], (first, second): (Rank, Rank), family: Family) -> bool {
    let (Some(first), Some(second)) = (policy(policies, first), policy(policies, second)) else {
        return false;
    };
    if first.takes_all(family) || second.takes_all(family) {
        return true;
    }
    // Both lists are sorted by address and free of inner overlaps: walk them together.
    let (mut ours, mut theirs) =
        (first.listed(family).peekable(), second.listed(family).peekable());
    while let (Some(one), Some(other)) = (ours.peek(), theirs.peek()) {
        if one.contains(other) || other.contains(one) {
            return true;
        }
        if one.network() < other.network() {
            ours.next();
        } else {
            theirs.next();
        }
    }
    false
}

/// Single addresses and prefixes of all policies, each with the rank of its policy.
type Sources = (Vec<(IpAddr, Rank)>, Vec<(IpNet, Rank)>);

fn sources(policies: &[Checked<'_>], family: Family) -> Sources {
    let (mut hosts, mut nets) = (Vec::new(), Vec::new());
    for (rank, policy) in (0..).zip(policies) {
        for net in policy.sources.iter().filter(|net| Family::of_net(net) == family) {
            if net.prefix_len() == family.bits() {
                hosts.push((net.addr(), rank));
            } else {
                nets.push((*net, rank));
            }
        }
    }
    hosts.sort_unstable();
    (hosts, nets)
}

/// Cuts overlapping prefixes into disjoint ranges, each with the ranks of all that cover it.
fn segments(nets: &[(IpNet, Rank)], family: Family) -> Vec<(IpRange, Vec<Rank>)> {
    // Where a prefix begins it joins, one past its end it leaves; past the last address there is
    // no such place, and nothing more to cut.
    let mut edges: BTreeMap<u128, (Vec<Rank>, Vec<Rank>)> = BTreeMap::new();
    for (net, rank) in nets {
        edges.entry(number(net.network())).or_default().0.push(*rank);
        if let Some(after) = number(net.broadcast()).checked_add(1) {
            edges.entry(after).or_default().1.push(*rank);
        }
    }
    let last_address = u128::MAX >> (128 - u32::from(family.bits()));
    let mut covering: BTreeMap<Rank, usize> = BTreeMap::new();
    let mut segments = Vec::new();
    let mut places = edges.into_iter().peekable();
    while let Some((start, (joining, leaving))) = places.next() {
        for rank in joining {
            *covering.entry(rank).or_default() += 1;
        }
        for rank in leaving {
            if let Some(count) = covering.get_mut(&rank) {
                *count -= 1;
                if *count == 0 {
                    covering.remove(&rank);
                }
            }
        }
        let end = places.peek().map_or(last_address, |(next, _)| next - 1);
        if covering.is_empty() || start > last_address {
            continue;
        }
        let ends = address(family, start).zip(address(family, end));
        if let Some(range) = ends.and_then(|(first, last)| IpRange::new(first, last)) {
            segments.push((range, covering.keys().copied().collect()));
        }
    }
    segments
}

fn adjoins(lower: &IpRange, upper: &IpRange) -> bool {
    number(lower.last()).checked_add(1) == Some(number(upper.first()))
}

/// The destinations of a class: each prefix with the policy that a packet to it belongs to.
pub(super) fn destinations(
    members: &[Rank],
    policies: &[Checked<'_>],
    family: Family,
) -> Vec<(IpNet, Rank)> {
    let mut prefixes = BTreeMap::new();
    for rank in members {
        let listed = policy(policies, *rank).into_iter().flat_map(|policy| policy.listed(family));
        for net in listed {
            // Members come in order: the first to name a prefix keeps it.
            prefixes.entry((net.network(), net.prefix_len())).or_insert((net, *rank));
        }
    }
    let mut inside: Vec<(IpNet, Rank)> = Vec::new();
    let mut found = Vec::new();
    for (net, rank) in prefixes.into_values() {
        while inside.last().is_some_and(|(outer, _)| !outer.contains(&net)) {
            inside.pop();
        }
        let outer = inside.last().map(|(_, rank)| *rank);
        let winner = outer.map_or(rank, |outer| outer.min(rank));
        if outer != Some(winner) {
            found.push((net, winner));
        }
        inside.push((net, winner));
    }
    found
}
