//! Differences of iptables chains and ipsets.
//!
//! A set takes effect through the rules that look it up, and all of them look up the set of
//! selected sources first: that set is filled last and emptied first. A rule that is replaced stays
//! behind the new one until no source leads to it any more.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashMap};

use ipnet::IpNet;

use super::changes::Phase;
use super::op::Op;
use super::{Change, Steps, changes};
use crate::state::{
    Ipset, IpsetContents, Member, State, Variant, XtChain, XtEdit, XtName, XtRule, XtTable, Xtables,
};
use crate::types::Family;

pub(super) fn xtables(observed: &State, desired: &State, steps: &mut Steps) {
    sets(observed, desired, steps);
    let nothing = Xtables::default();
    for variant in Variant::BOTH {
        match (observed.xtables.get(&variant), desired.xtables.get(&variant)) {
            (None, None) => {}
            (Some(observed), None) => remove(variant, observed, steps),
            (observed, Some(desired)) => {
                let observed = observed.unwrap_or(&nothing);
                chains(variant, observed, desired, steps);
                jumps(variant, observed, desired, steps);
            }
        }
    }
    for phase in [
        Phase::Skeleton,
        Phase::Chains,
        Phase::EmptyPolicies,
        Phase::EmptyVerdicts,
        Phase::EmptyGuards,
    ] {
        super::sort(steps, phase, rank);
    }
    // Packets that are no longer marked need no translation.
    super::sort(steps, Phase::DeleteTable, |op| {
        let (kind, table, within) = rank(op);
        (kind, table.map(std::cmp::Reverse), within)
    });
}

/// Returns the order within a step.
///
/// An object that refers to another is created after it and deleted before it, and translation is
/// set up before the mark that requests it.
fn rank(op: &Op) -> (u8, Option<(Variant, XtTable, Family)>, u8) {
    let group = |chain: &XtChain| (chain.table, chain.family);
    match op {
        Op::DeleteIpset(Ipset::Temporary(_)) => (1, None, 0),
        Op::AddIpset(..) | Op::PutIpset(..) => (2, None, 0),
        Op::DeleteIpset(_) => (4, None, 0),
        Op::AddXtChain(variant, chain)
        | Op::EditXtChain(variant, chain, _)
        | Op::DeleteXtChain(variant, chain) => {
            let (table, family) = group(chain);
            let within = match op {
                Op::AddXtChain(..) => 1,
                Op::EditXtChain(..) if chain.name.is_built_in() => 3,
                Op::EditXtChain(..) => 2,
                _ => 4,
            };
            (3, Some((*variant, table, family)), within)
        }
        _ => (0, None, 0),
    }
}

const fn filled_in(set: Ipset) -> Phase {
    match set {
        Ipset::Ignored(_)
        | Ipset::Peers(_)
        | Ipset::Underlay(_)
        | Ipset::EgressIps(_)
        | Ipset::Temporary(_) => Phase::FillVerdicts,
        Ipset::Destinations(..) => Phase::FillPolicies,
        Ipset::Sources(..) | Ipset::Marks(_) | Ipset::Denied(_) => Phase::FillClasses,
        Ipset::Selected(_) => Phase::FillSources,
    }
}

const fn emptied_in(set: Ipset) -> Phase {
    match filled_in(set) {
        Phase::FillPolicies => Phase::EmptyPolicies,
        Phase::FillClasses => Phase::EmptyClasses,
        Phase::FillSources => Phase::EmptySources,
        _ => Phase::EmptyVerdicts,
    }
}

fn sets(observed: &State, desired: &State, steps: &mut Steps) {
    // Rules that are deleted last of all look up the sets until then.
    let last = observed.xtables.keys().any(|variant| !desired.xtables.contains_key(variant));
    let gone =
        if last || desired.xtables.is_empty() { Phase::DeleteTable } else { Phase::EmptyGuards };
    changes(&observed.ipsets, &desired.ipsets, |change| match change {
        Change::Same => {}
        Change::Added(set, contents) => {
            // The set that every rule looks up first stays empty until the rest is complete.
            let gate = matches!(set, Ipset::Selected(_));
            let members = if gate { BTreeMap::new() } else { contents.members.clone() };
            let contents = IpsetContents { members, ..*contents };
            steps.add(Phase::Skeleton, Op::AddIpset(*set, contents.clone()));
            members_of(*set, &contents, desired.ipsets.get(set), steps);
        }
        Change::Replaced(set, was, is) if was.can_hold(is) && !loses_a_length(was, is) => {
            members_of(*set, was, Some(is), steps);
        }
        Change::Replaced(set, was, is) => {
            let both = both(was, is);
            steps.add(filled_in(*set), Op::PutIpset(*set, both.clone()));
            if loses_a_length(&both, is) {
                steps.add(emptied_in(*set), Op::PutIpset(*set, is.clone()));
            } else {
                members_of(*set, &both, Some(is), steps);
            }
        }
        Change::Removed(set @ Ipset::Temporary(_), _) => {
            steps.add(Phase::Skeleton, Op::DeleteIpset(*set));
        }
        Change::Removed(set, _) => steps.add(gone, Op::DeleteIpset(*set)),
    });
}

/// Returns whether the last member of a prefix length is deleted while others stay.
///
/// The kernel then moves the remaining lengths in the list that lookups read without a lock
/// (`mtype_del_cidr` in `ip_set_hash_gen.h`), and a lookup may skip one of them: the packet would
/// seem to be in no set. Replacing the set by a swap is safe.
fn loses_a_length(was: &IpsetContents, is: &IpsetContents) -> bool {
    let lengths = |contents: &IpsetContents| {
        contents.members.keys().map(IpNet::prefix_len).collect::<BTreeSet<_>>()
    };
    let (was, is) = (lengths(was), lengths(is));
    !is.is_empty() && !was.is_subset(&is)
}

/// Returns the union of two contents: deletions and new exceptions (`nomatch`) come later.
fn both(was: &IpsetContents, is: &IpsetContents) -> IpsetContents {
    let stays = |net: &IpNet| was.members.get(net) == Some(&Member::Not);
    let new = is.members.iter().filter(|(net, member)| **member != Member::Not || stays(net));
    let mut members: BTreeMap<_, _> = new.map(|(net, member)| (*net, *member)).collect();
    if was.with_marks == is.with_marks {
        for (net, member) in was.members.iter().filter(|(_, member)| **member != Member::Not) {
            members.entry(*net).or_insert(*member);
        }
    }
    let both = IpsetContents::new(is.with_marks, members);
    IpsetContents { capacity: both.capacity.max(is.capacity), ..both }
}

fn members_of(set: Ipset, was: &IpsetContents, is: Option<&IpsetContents>, steps: &mut Steps) {
    let Some(is) = is else { return };
    changes(&was.members, &is.members, |change| match change {
        Change::Same => {}
        Change::Added(net, member) | Change::Replaced(net, _, member) => {
            // An exception (`nomatch`) makes the set match less.
            let smaller = *member == Member::Not;
            let phase = if smaller { emptied_in(set) } else { filled_in(set) };
            steps.add(phase, Op::PutMember(set, *net, *member));
        }
        Change::Removed(net, Member::Not) => {
            steps.add(filled_in(set), Op::DeleteMember(set, *net));
        }
        Change::Removed(net, _) => steps.add(emptied_in(set), Op::DeleteMember(set, *net)),
    });
}

fn chains(variant: Variant, observed: &Xtables, desired: &Xtables, steps: &mut Steps) {
    changes(&observed.chains, &desired.chains, |change| match change {
        Change::Same => {}
        Change::Added(chain, rules) => {
            steps.add(Phase::Skeleton, Op::AddXtChain(variant, *chain));
            let edits: Vec<_> = rules.iter().cloned().map(XtEdit::Append).collect();
            if !edits.is_empty() {
                steps.add(Phase::Skeleton, Op::EditXtChain(variant, *chain, edits));
            }
        }
        Change::Replaced(chain, was, is) => {
            let Edits { add, delete } = edits(was, is);
            // Guard chains and action chains are short, and look up no set that is emptied.
            let gone = match chain.name {
                XtName::MarkRequest => Phase::EmptyPolicies,
                XtName::ResetMark => Phase::EmptyGuards,
                _ => Phase::EmptyVerdicts,
            };
            if !add.is_empty() {
                steps.add(Phase::Chains, Op::EditXtChain(variant, *chain, add));
            }
            if !delete.is_empty() {
                steps.add(gone, Op::EditXtChain(variant, *chain, delete));
            }
        }
        Change::Removed(chain, _) => {
            steps.add(Phase::EmptyVerdicts, Op::DeleteXtChain(variant, *chain));
        }
    });
}

/// Edits that turn one list of rules into another: additions first, then deletions.
struct Edits {
    add: Vec<XtEdit>,
    delete: Vec<XtEdit>,
}

/// Returns the fewest edits.
///
/// Rules that are in both lists in the same order are not touched, and keep their counters.
fn edits(was: &[XtRule], is: &[XtRule]) -> Edits {
    let kept = kept(was, is);
    let (mut add, mut delete) = (Vec::new(), Vec::new());
    // In the intermediate list each gap between kept rules has the new rules before the old ones.
    let (mut old, mut new, mut place) = (0, 0, 1);
    for (was_at, is_at) in kept.into_iter().chain([(was.len(), is.len())]) {
        for rule in is.get(new..is_at).unwrap_or_default() {
            add.push(XtEdit::Insert(place, rule.clone()));
            place += 1;
        }
        for _ in old..was_at {
            delete.push(XtEdit::Delete(place));
            place += 1;
        }
        (old, new) = (was_at + 1, is_at + 1);
        place += 1;
    }
    // From the end on, so that no index moves before it is used.
    delete.reverse();
    Edits { add, delete }
}

/// Returns the longest sequence of rules that both lists have in the same order, by their indices.
fn kept(was: &[XtRule], is: &[XtRule]) -> Vec<(usize, usize)> {
    let mut places: HashMap<&XtRule, Vec<usize>> = HashMap::new();
    for (index, rule) in is.iter().enumerate().rev() {
        places.entry(rule).or_default().push(index);
    }
    let pairs: Vec<(usize, usize)> = was
        .iter()
        .enumerate()
        .filter_map(|(index, rule)| Some((index, places.get_mut(rule)?.pop()?)))
        .collect();
    // Longest increasing subsequence by patience sorting: the last pair of each length, and its
    // predecessor.
    let mut tails: Vec<usize> = Vec::new();
    let mut before: Vec<Option<usize>> = Vec::with_capacity(pairs.len());
    let at = |index: &usize| pairs.get(*index).map(|(_, is)| *is);
    for (number, (_, is)) in pairs.iter().enumerate() {
        let length = tails.partition_point(|tail| at(tail) < Some(*is));
        before.push(length.checked_sub(1).and_then(|last| tails.get(last)).copied());
        match tails.get_mut(length) {
            Some(tail) => *tail = number,
            None => tails.push(number),
        }
    }
    let mut kept = Vec::with_capacity(tails.len());
    let mut next = tails.last().copied();
    while let Some(number) = next {
        kept.extend(pairs.get(number));
        next = before.get(number).copied().flatten();
    }
    kept.reverse();
    kept
}

/// Edits our rules in built-in chains at their indices: other programs may insert rules above ours.
fn jumps(variant: Variant, observed: &Xtables, desired: &Xtables, steps: &mut Steps) {
    changes(&observed.jumps, &desired.jumps, |change| {
        let (chain, was, is): (_, &[_], &[_]) = match change {
            Change::Same => return,
            Change::Added(chain, is) => (chain, &[], is),
            Change::Removed(chain, was) => (chain, was, &[]),
            Change::Replaced(chain, was, is) => (chain, was, is),
        };
        let gone = was.iter().map(|(_, rule)| XtEdit::Remove(rule.clone()));
        let made = is.iter().map(|(place, rule)| XtEdit::Insert(*place, rule.clone()));
        let edits = gone.chain(made).collect();
        let phase = if is.is_empty() { Phase::EmptyVerdicts } else { Phase::Skeleton };
        steps.add(phase, Op::EditXtChain(variant, *chain, edits));
    });
}

/// Removes everything of a variant, last of all.
fn remove(variant: Variant, observed: &Xtables, steps: &mut Steps) {
    for (chain, rules) in &observed.jumps {
        let edits = rules.iter().map(|(_, rule)| XtEdit::Remove(rule.clone())).collect();
        steps.add(Phase::DeleteTable, Op::EditXtChain(variant, *chain, edits));
    }
    for (chain, rules) in &observed.chains {
        let edits: Vec<_> = (1..=rules.len()).rev().map(XtEdit::Delete).collect();
        if !edits.is_empty() {
            steps.add(Phase::DeleteTable, Op::EditXtChain(variant, *chain, edits));
        }
        steps.add(Phase::DeleteTable, Op::DeleteXtChain(variant, *chain));
    }
}
