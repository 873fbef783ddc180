//! Applies ipset and iptables operations with the kernel's error checks.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use crate::diff::op::Op;
use crate::error::errno;
use crate::rules::ipset::{Ipset, IpsetContents};
use crate::rules::iptables::{Variant, XtChain, XtEdit, XtMatch, XtRule, XtTarget, Xtables};
use crate::state::State;

/// Applies an operation on ipsets or iptables; returns the error number of a refusal.
pub(crate) fn make(state: &mut State, op: &Op) -> Result<(), i32> {
    match op {
        Op::AddIpset(set, contents) => match state.ipsets.entry(*set) {
            Entry::Occupied(_) => Err(errno::EEXIST),
            Entry::Vacant(entry) => {
                entry.insert(contents.clone());
                Ok(())
            }
        },
        Op::PutIpset(set, contents) => {
            state.ipsets.get_mut(set).ok_or(errno::ENOENT)?.clone_from(contents);
            Ok(())
        }
        Op::DeleteIpset(set) => {
            if state.xtables.values().any(|tables| looks_into(tables, *set)) {
                return Err(errno::EBUSY);
            }
            state.ipsets.remove(set).map(drop).ok_or(errno::ENOENT)
        }
        Op::PutMember(set, net, member) => {
            let contents = state.ipsets.get_mut(set).ok_or(errno::ENOENT)?;
            let full =
                contents.members.len() >= usize::try_from(contents.capacity).unwrap_or(usize::MAX);
            if full && !contents.members.contains_key(net) {
                return Err(errno::ENOSPC);
            }
            contents.members.insert(*net, *member);
            Ok(())
        }
        Op::DeleteMember(set, net) => {
            let contents = state.ipsets.get_mut(set).ok_or(errno::ENOENT)?;
            contents.members.remove(net).map(drop).ok_or(errno::ENOENT)
        }
        Op::AddXtChain(variant, chain) => {
            match state.xtables.entry(*variant).or_default().chains.entry(*chain) {
                Entry::Occupied(_) => Err(errno::EEXIST),
                Entry::Vacant(entry) => {
                    entry.insert(Vec::new());
                    Ok(())
                }
            }
        }
        Op::DeleteXtChain(variant, chain) => {
            let tables = state.xtables.get_mut(variant).ok_or(errno::ENOENT)?;
            if leads_to(tables, *chain) {
                return Err(errno::EBUSY);
            }
            tables.chains.remove(chain).ok_or(errno::ENOENT)?;
            state.xtables.retain(|_, tables| *tables != Xtables::default());
            Ok(())
        }
        Op::EditXtChain(variant, chain, edits) => {
            let made = edit(&mut state.xtables, &state.ipsets, *variant, *chain, edits);
            state.xtables.retain(|_, tables| *tables != Xtables::default());
            made
        }
        _ => Err(errno::EINVAL),
    }
}

fn edit(
    all: &mut BTreeMap<Variant, Xtables>,
    sets: &BTreeMap<Ipset, IpsetContents>,
    variant: Variant,
    chain: XtChain,
    edits: &[XtEdit],
) -> Result<(), i32> {
    let tables = all.entry(variant).or_default();
    for edit in edits {
        if let XtEdit::Insert(_, rule) | XtEdit::Append(rule) = edit {
            if !refers_well(tables, sets, chain, rule) {
                return Err(errno::ENOENT);
            }
        }
    }
    if chain.name.is_built_in() {
        let jumps = tables.jumps.entry(chain).or_default();
        edits.iter().try_for_each(|edit| edit_jumps(jumps, edit))?;
        if jumps.is_empty() {
            tables.jumps.remove(&chain);
        }
    } else {
        let rules = tables.chains.get_mut(&chain).ok_or(errno::ENOENT)?;
        edits.iter().try_for_each(|edit| edit_rules(rules, edit))?;
    }
    Ok(())
}

fn edit_rules(rules: &mut Vec<XtRule>, edit: &XtEdit) -> Result<(), i32> {
    match edit {
        XtEdit::Append(rule) => rules.push(rule.clone()),
        XtEdit::Insert(place, rule) if (1..=rules.len() + 1).contains(place) => {
            rules.insert(place - 1, rule.clone());
        }
        XtEdit::Delete(place) if (1..=rules.len()).contains(place) => {
            rules.remove(place - 1);
        }
        _ => return Err(errno::EINVAL),
    }
    Ok(())
}

fn edit_jumps(jumps: &mut Vec<(usize, XtRule)>, edit: &XtEdit) -> Result<(), i32> {
    match edit {
        XtEdit::Insert(place, rule) => {
            for (at, _) in jumps.iter_mut().filter(|(at, _)| at >= place) {
                *at += 1;
            }
            let index = jumps.partition_point(|(at, _)| at < place);
            jumps.insert(index, (*place, rule.clone()));
        }
        XtEdit::Remove(rule) => {
            let index = jumps.iter().position(|(_, found)| found == rule).ok_or(errno::ENOENT)?;
            let (place, _) = jumps.remove(index);
            for (at, _) in jumps.iter_mut().filter(|(at, _)| *at > place) {
                *at -= 1;
            }
        }
        XtEdit::Append(_) | XtEdit::Delete(_) => return Err(errno::EINVAL),
    }
    Ok(())
}

fn rules(tables: &Xtables) -> impl Iterator<Item = (&XtChain, &XtRule)> {
    let own = tables.chains.iter().flat_map(|(chain, rules)| rules.iter().map(move |r| (chain, r)));
    let jumps = tables.jumps.iter();
    own.chain(jumps.flat_map(|(chain, rules)| rules.iter().map(move |(_, rule)| (chain, rule))))
}

fn looks_into(tables: &Xtables, set: Ipset) -> bool {
    rules(tables).any(|(_, rule)| sets_of(rule).any(|found| found == set))
}

fn leads_to(tables: &Xtables, chain: XtChain) -> bool {
    rules(tables).any(|(at, rule)| {
        (at.family, at.table) == (chain.family, chain.table)
            && matches!(rule.target, XtTarget::Jump(name) | XtTarget::Goto(name) if name == chain.name)
    })
}

/// The sets that a rule matches or maps by.
fn sets_of(rule: &XtRule) -> impl Iterator<Item = Ipset> {
    let mapped = match rule.target {
        XtTarget::MapMark(set) => Some(set),
        _ => None,
    };
    let matched = rule.matches.iter().filter_map(|one| match one {
        XtMatch::Set(_, set, _) => Some(*set),
        _ => None,
    });
    matched.chain(mapped)
}

fn refers_well(
    tables: &Xtables,
    sets: &BTreeMap<Ipset, IpsetContents>,
    chain: XtChain,
    rule: &XtRule,
) -> bool {
    let target = match rule.target {
        XtTarget::Jump(name) | XtTarget::Goto(name) => {
            tables.chains.contains_key(&XtChain { name, ..chain })
        }
        _ => true,
    };
    target && sets_of(rule).all(|set| sets.contains_key(&set))
}
