//! Splits overlapping prefixes into disjoint ranges.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;

use super::policies::{Handle, Policies};
use crate::range::{IpRange, address, number};
use crate::types::Family;

/// Rank of a policy in the total order (priority, id).
pub(super) type Rank = u32;

/// Disjoint ranges of sources.
#[derive(Debug, Default)]
pub(super) struct Segments {
    /// Sorted ranges, each with its policies up to the first one that selects every destination.
    pub(super) ranges: Vec<(IpRange, Vec<Rank>)>,
    /// Policies that follow such a one in some range, each with one that it follows.
    pub(super) behind: Vec<(Rank, Rank)>,
}

/// Splits overlapping prefixes into disjoint ranges.
///
/// The members of a range end with the first one that selects every destination, so that policies
/// which take no packet cost nothing in each range that they share.
pub(super) fn segments(
    nets: &[(IpNet, Rank)],
    family: Family,
    takes_all: impl Fn(Rank) -> bool,
) -> Segments {
    // A prefix joins at its first address and leaves one past its last; past the last address of
    // the family there is no such point, and nothing more to split.
    let mut edges: BTreeMap<u128, (Vec<Rank>, Vec<Rank>)> = BTreeMap::new();
    for (net, rank) in nets {
        edges.entry(number(net.network())).or_default().0.push(*rank);
        if let Some(after) = number(net.broadcast()).checked_add(1) {
            edges.entry(after).or_default().1.push(*rank);
        }
    }
    let last_address = u128::MAX >> (128 - u32::from(family.bits()));
    let mut covering: BTreeMap<Rank, usize> = BTreeMap::new();
    let mut ahead = BTreeSet::new();
    let mut segments = Segments::default();
    let mut places = edges.into_iter().peekable();
    while let Some((start, (joining, leaving))) = places.next() {
        for rank in joining {
            *covering.entry(rank).or_default() += 1;
            ahead.insert(rank);
        }
        for rank in leaving {
            if let Some(count) = covering.get_mut(&rank) {
                *count -= 1;
                if *count == 0 {
                    covering.remove(&rank);
                    ahead.remove(&rank);
                }
            }
        }
        let end = places.peek().map_or(last_address, |(next, _)| next - 1);
        if covering.is_empty() || start > last_address {
            continue;
        }
        let mut members = Vec::new();
        for rank in covering.keys() {
            members.push(*rank);
            if takes_all(*rank) {
                // Each is listed once for a prefix, not once for a range.
                let behind = ahead.split_off(&(rank + 1));
                segments.behind.extend(behind.into_iter().map(|other| (*rank, other)));
                break;
            }
        }
        let ends = address(family, start).zip(address(family, end));
        if let Some(range) = ends.and_then(|(first, last)| IpRange::new(first, last)) {
            segments.ranges.push((range, members));
        }
    }
    segments
}

pub(super) fn adjoins(lower: &IpRange, upper: &IpRange) -> bool {
    number(lower.last()).checked_add(1) == Some(number(upper.first()))
}

/// A prefix that contains the one in turn.
struct Open<'a> {
    net: IpNet,
    /// The members that list the prefix, by their places.
    listing: &'a [(IpNet, usize)],
    /// The first member that lists a larger prefix around it.
    around: usize,
    /// The first member that lists the prefix, or a smaller one inside it.
    inside: usize,
}

/// Returns the members of a class that do not take all the packets they select.
///
/// Each comes after the first member that takes some of them. Only the last member may select
/// every destination.
pub(super) fn overlaps(
    members: &[Handle],
    policies: &Policies,
    family: Family,
) -> Vec<(Handle, Handle)> {
    let [_, .., last] = members else { return Vec::new() };
    let listed = members.iter().enumerate().flat_map(|(place, handle)| {
        let policy = policies.get(*handle).into_iter();
        policy.flat_map(move |policy| policy.listed(family).map(move |net| (net, place)))
    });
    let mut listed: Vec<_> = listed.collect();
    listed.sort_unstable_by_key(|(net, place)| (net.network(), net.prefix_len(), *place));
    let mut firsts = vec![usize::MAX; members.len()];
    let mut close = |open: Open<'_>, outer: Option<&mut Open<'_>>| {
        let first = open.around.min(open.inside);
        for (_, place) in open.listing.iter().filter(|(_, place)| first < *place) {
            if let Some(known) = firsts.get_mut(*place) {
                *known = first.min(*known);
            }
        }
        if let Some(outer) = outer {
            outer.inside = outer.inside.min(open.inside);
        }
    };
    let mut stack: Vec<Open<'_>> = Vec::new();
    for listing in listed.chunk_by(|(one, _), (other, _)| one == other) {
        let Some((net, inside)) = listing.first().copied() else { continue };
        while stack.last().is_some_and(|open| !open.net.contains(&net)) {
            let Some(open) = stack.pop() else { break };
            close(open, stack.last_mut());
        }
        let around = stack.last().map_or(usize::MAX, |outer| {
            let listed = outer.listing.first().map_or(usize::MAX, |(_, place)| *place);
            outer.around.min(listed)
        });
        stack.push(Open { net, listing, around, inside });
    }
    while let Some(open) = stack.pop() {
        close(open, stack.last_mut());
    }
    let all = policies.get(*last).filter(|policy| policy.takes_all(family));
    let first = all.and_then(|_| listed.iter().map(|(_, place)| *place).min());
    let winner = first.and_then(|place| members.get(place));
    let pairs = firsts
        .iter()
        .zip(members)
        .filter_map(|(first, loser)| members.get(*first).map(|winner| (*winner, *loser)));
    pairs.chain(winner.map(|winner| (*winner, *last))).collect()
}

/// Returns the destinations of a class: each prefix with the policy that its packets belong to.
pub(super) fn destinations(
    members: &[Handle],
    policies: &Policies,
    family: Family,
) -> Vec<(IpNet, Handle)> {
    let mut prefixes = BTreeMap::new();
    for handle in members {
        let listed = policies.get(*handle).into_iter().flat_map(|policy| policy.listed(family));
        for net in listed {
            // Members are in order: the first one to name a prefix gets it.
            prefixes.entry((net.network(), net.prefix_len())).or_insert((net, *handle));
        }
    }
    let mut inside: Vec<(IpNet, Handle)> = Vec::new();
    let mut found = Vec::new();
    for (net, handle) in prefixes.into_values() {
        while inside.last().is_some_and(|(outer, _)| !outer.contains(&net)) {
            inside.pop();
        }
        let outer = inside.last().map(|(_, handle)| *handle);
        // Of two members the first in the order takes the packet.
        let winner = match outer {
            Some(outer) if policies.order(outer, handle).is_lt() => outer,
            _ => handle,
        };
        if outer != Some(winner) {
            found.push((net, winner));
        }
        inside.push((net, winner));
    }
    found
}
