//! Splits overlapping prefixes into disjoint ranges.

use std::collections::BTreeMap;

use ipnet::IpNet;

use super::policies::{Handle, Policies};
use crate::range::{IpRange, address, number};
use crate::types::Family;

/// Splits overlapping prefixes into disjoint ranges, each with the handles that cover it.
pub(super) fn segments(nets: &[(IpNet, Handle)], family: Family) -> Vec<(IpRange, Vec<Handle>)> {
    // A prefix joins at its first address and leaves one past its last; past the last address of
    // the family there is no such point, and nothing more to split.
    let mut edges: BTreeMap<u128, (Vec<Handle>, Vec<Handle>)> = BTreeMap::new();
    for (net, handle) in nets {
        edges.entry(number(net.network())).or_default().0.push(*handle);
        if let Some(after) = number(net.broadcast()).checked_add(1) {
            edges.entry(after).or_default().1.push(*handle);
        }
    }
    let last_address = u128::MAX >> (128 - u32::from(family.bits()));
    let mut covering: BTreeMap<Handle, usize> = BTreeMap::new();
    let mut segments = Vec::new();
    let mut places = edges.into_iter().peekable();
    while let Some((start, (joining, leaving))) = places.next() {
        for handle in joining {
            *covering.entry(handle).or_default() += 1;
        }
        for handle in leaving {
            if let Some(count) = covering.get_mut(&handle) {
                *count -= 1;
                if *count == 0 {
                    covering.remove(&handle);
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

pub(super) fn adjoins(lower: &IpRange, upper: &IpRange) -> bool {
    number(lower.last()).checked_add(1) == Some(number(upper.first()))
}

/// Returns whether two policies with a common source select a common destination.
pub(super) fn overlap(
    policies: &Policies,
    (first, second): (Handle, Handle),
    family: Family,
) -> bool {
    let (Some(first), Some(second)) = (policies.get(first), policies.get(second)) else {
        return false;
    };
    if first.takes_all(family) || second.takes_all(family) {
        return true;
    }
    // Both lists are sorted by address and disjoint within themselves: walk them together.
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
