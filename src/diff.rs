//! The difference of two states as ordered operations; no other module orders them.

pub(crate) mod changes;
mod elements;
mod guards;
mod iptables;
pub(crate) mod op;
mod tables;

use std::cmp::{Ordering, Reverse};
use std::collections::BTreeMap;

use crate::cluster::Tunnel;
use crate::state::{
    ChainId, Datum, FLOWTABLE, Firewall, Key, Route, Rule, RuleAction, Set, Stage, State, Stmt,
    Stray, StrayKind, TableFamily, Value, Vxlan,
};
use changes::{Changes, Phase, Step};
use op::Op;

impl Changes {
    /// Returns the operations that turn the observed state into the desired one.
    ///
    /// Equal states give no changes; [`State::default`] as `desired` removes everything.
    pub fn between(observed: &State, desired: &State) -> Self {
        let mut steps = Steps::default();
        rtnetlink(observed, desired, &mut steps);
        iptables::xtables(observed, desired, &mut steps);
        for family in TableFamily::BOTH {
            tables::table(family, observed, desired, &mut steps);
        }
        order_nft(&mut steps);
        Self::new(steps.finish())
    }

    /// Returns the operations of a change that is known beforehand.
    ///
    /// `parts` is everything except elements, before and after, where any of it changes; both sides
    /// have a firewall. `elements` are those that may change, with their values before and after;
    /// none of them is a range.
    pub(crate) fn of(
        parts: Option<(&State, &State)>,
        elements: impl IntoIterator<Item = (Key, Option<Value>, Option<Value>)>,
    ) -> Self {
        let mut steps = Steps::default();
        let mut sets = None;
        if let Some((before, after)) = parts {
            rtnetlink(before, after, &mut steps);
            for family in TableFamily::BOTH {
                tables::table(family, before, after, &mut steps);
            }
            sets = after.firewall.as_ref().map(|after| &after.sets);
        }
        let stays = |key: &Key| sets.is_none_or(|sets| sets.contains(&key.set()));
        for (key, was, is) in elements {
            element(Change::of(key, was, is), stays, |_| false, &mut steps);
        }
        order_nft(&mut steps);
        Self::new(steps.finish())
    }
}

/// Number of sources in one transaction, whose messages then take a few megabytes, not hundreds.
const SOURCES_AT_ONCE: usize = 32_768;

#[derive(Default)]
struct Steps {
    phases: BTreeMap<Phase, Vec<Op>>,
    /// Single-address sources that are added, and those that are deleted.
    ///
    /// They are independent of each other, so that they need no common transaction.
    coming: Vec<Vec<Op>>,
    going: Vec<Vec<Op>>,
}

impl Steps {
    fn add(&mut self, phase: Phase, op: Op) {
        let single = |key: &Key| matches!(key.set(), Set::Source(_));
        let parts = match (phase, &op) {
            (Phase::FillSources, Op::AddElement(key, _)) if single(key) => &mut self.coming,
            (Phase::EmptySources, Op::DeleteElement(key, _)) if single(key) => &mut self.going,
            _ => return self.phases.entry(phase).or_default().push(op),
        };
        match parts.last_mut() {
            Some(part) if part.len() < SOURCES_AT_ONCE => part.push(op),
            Some(_) => {
                // If a first part is full, there are mostly some more sources.
                let mut part = Vec::with_capacity(SOURCES_AT_ONCE / 8);
                part.push(op);
                parts.push(part);
            }
            None => parts.push(vec![op]),
        }
    }

    fn has(&self, phase: Phase, is: impl Fn(&Op) -> bool) -> bool {
        self.phases.get(&phase).is_some_and(|ops| ops.iter().any(is))
    }

    fn finish(mut self) -> Vec<Step> {
        // An added source may replace its range, and must exist before the range is deleted. A
        // source that is replaced, or one of few, shares the transaction with the ranges.
        let mut parted = Vec::new();
        for (phase, mut parts) in
            [(Phase::FillSources, self.coming), (Phase::EmptySources, self.going)]
        {
            let Some(mut last) = parts.pop() else { continue };
            parted.extend(parts.into_iter().map(|ops| Step { phase, ops }));
            let with = self.phases.entry(phase).or_default();
            last.append(with);
            last.sort_by_key(rank);
            *with = last;
        }
        let whole = self.phases.into_iter().map(|(phase, ops)| Step { phase, ops });
        let mut steps: Vec<_> = parted.into_iter().chain(whole).collect();
        steps.sort_by_key(|step| step.phase);
        steps
    }
}

/// The change of one key between two ordered maps.
enum Change<K, V> {
    Same,
    Added(K, V),
    Removed(K, V),
    Replaced(K, V, V),
}

impl<K, V: PartialEq> Change<K, V> {
    fn of(key: K, was: Option<V>, is: Option<V>) -> Self {
        match (was, is) {
            (None, None) => Self::Same,
            (None, Some(is)) => Self::Added(key, is),
            (Some(was), None) => Self::Removed(key, was),
            (Some(was), Some(is)) if was == is => Self::Same,
            (Some(was), Some(is)) => Self::Replaced(key, was, is),
        }
    }
}

/// Compares two ordered maps and reports the change of every key.
fn changes<K: Ord, V: PartialEq>(
    observed: impl IntoIterator<Item = (K, V)>,
    desired: impl IntoIterator<Item = (K, V)>,
    mut each: impl FnMut(Change<K, V>),
) {
    let (mut old, mut new) = (observed.into_iter().peekable(), desired.into_iter().peekable());
    loop {
        let order = match (old.peek(), new.peek()) {
            (None, None) => return,
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (Some((old, _)), Some((new, _))) => old.cmp(new),
        };
        let was = old.next_if(|_| order.is_le());
        let is = new.next_if(|_| order.is_ge());
        match (was, is) {
            (Some((key, was)), Some((_, is))) => each(Change::of(key, Some(was), Some(is))),
            (Some((key, was)), None) => each(Change::Removed(key, was)),
            (None, Some((key, is))) => each(Change::Added(key, is)),
            (None, None) => return,
        }
    }
}

/// Adds the operations for the change of an element.
///
/// `stays` returns whether its set stays, `overlapped` whether a wanted range shares addresses with
/// it.
fn element(
    change: Change<Key, Value>,
    stays: impl Fn(&Key) -> bool,
    overlapped: impl Fn(&Key) -> bool,
    steps: &mut Steps,
) {
    match change {
        Change::Same => {}
        Change::Added(key, value) => {
            steps.add(phases_of(key.set()).0, Op::AddElement(key, value));
        }
        Change::Replaced(key, was, is) => {
            let (phase, _) = phases_of(key.set());
            let ops = steps.phases.entry(phase).or_default();
            ops.extend([Op::DeleteElement(key, was), Op::AddElement(key, is)]);
        }
        // Sets that are deleted take their elements with them.
        Change::Removed(key, _) if !stays(&key) => {}
        Change::Removed(key, value) => {
            // The kernel refuses overlapping ranges: an old range cannot exist together with one
            // that stays or replaces it.
            let (filled, emptied) = phases_of(key.set());
            let phase = if overlapped(&key) { filled } else { emptied };
            steps.add(phase, Op::DeleteElement(key, value));
        }
    }
}

/// Sorts the operations of each transaction.
fn order_nft(steps: &mut Steps) {
    // A chain that is deleted first makes room for its replacement.
    sort(steps, Phase::Skeleton, |op| match op {
        Op::DeleteChain(_) => 0,
        op => rank(op),
    });
    for phase in [
        Phase::Hook,
        Phase::FillVerdicts,
        Phase::FillPolicies,
        Phase::FillClasses,
        Phase::FillSources,
        Phase::EmptyVerdicts,
        Phase::RetireGuards,
    ] {
        sort(steps, phase, rank);
    }
}

fn rtnetlink(observed: &State, desired: &State, steps: &mut Steps) {
    let mut observed = observed.routing();
    link(&mut observed, desired, steps);
    let new = desired.link.as_ref().map(|link| link.name.clone());
    let old = observed.link.as_ref().map(|link| link.name.clone()).or_else(|| new.clone());
    if let Some(device) = &new {
        for net in desired.addresses.difference(&observed.addresses) {
            steps.add(Phase::Tunnel, Op::AddAddress(device.clone(), *net));
        }
    }
    if let Some(device) = &old {
        for net in observed.addresses.difference(&desired.addresses) {
            steps.add(Phase::DeletePeers, Op::DeleteAddress(device.clone(), *net));
        }
    }
    for (address, device) in desired.claims.difference(&observed.claims) {
        steps.add(Phase::Claim, Op::ClaimAddress(device.clone(), *address));
    }
    for (address, device) in observed.claims.difference(&desired.claims) {
        steps.add(Phase::Release, Op::ReleaseAddress(device.clone(), *address));
    }
    // A deleted device took its entries with it, so that all entries left here have a device.
    let device = new.or(old);
    changes(&observed.fdb, &desired.fdb, |change| match (change, &device) {
        (Change::Added(mac, node) | Change::Replaced(mac, _, node), Some(device)) => {
            steps.add(Phase::Tunnel, Op::PutFdb(device.clone(), *mac, *node));
        }
        (Change::Removed(mac, node), Some(device)) => {
            steps.add(Phase::DeletePeers, Op::DeleteFdb(device.clone(), *mac, *node));
        }
        (Change::Same, _) | (_, None) => {}
    });
    changes(&observed.neighbours, &desired.neighbours, |change| match (change, &device) {
        (Change::Added(address, mac) | Change::Replaced(address, _, mac), Some(device)) => {
            steps.add(Phase::Tunnel, Op::PutNeighbour(device.clone(), *address, *mac));
        }
        (Change::Removed(address, _), Some(device)) => {
            steps.add(Phase::DeletePeers, Op::DeleteNeighbour(device.clone(), *address));
        }
        (Change::Same, _) | (_, None) => {}
    });
    for stray in observed.strays.difference(&desired.strays) {
        let phase = match stray.kind {
            StrayKind::Route => Phase::Routes,
            StrayKind::Rule => Phase::Rules,
        };
        steps.add(phase, Op::DeleteStrayRouting(stray.clone()));
    }
    routes(&observed, desired, steps);
    for rule in desired.rules.difference(&observed.rules) {
        // Packets that pass the old chains have no mark that the rule spares.
        let late = desired.leads_back(rule);
        let phase = if late { Phase::DeleteRules } else { Phase::Rules };
        steps.add(phase, Op::AddRule(rule.clone()));
    }
    let in_the_way =
        |rule: &Rule| observed.rules.iter().find(|found| found.differs_by_target(rule)).cloned();
    let gone = observed.rules.difference(&desired.rules);
    let displaced = |rule: &&Rule| desired.rules.iter().any(|other| other.differs_by_target(rule));
    for rule in gone.filter(|rule| !displaced(rule)) {
        let early = observed.leads_back(rule);
        let phase = if early { Phase::Rules } else { Phase::DeleteRules };
        steps.add(phase, Op::DeleteRule(rule.clone()));
    }
    sort(steps, Phase::Rules, |op| (!is_stray(op), Reverse(rule_order(op))));
    if let Some(ops) = steps.phases.get_mut(&Phase::Rules) {
        let each = std::mem::take(ops).into_iter().flat_map(|op| {
            let before = match &op {
                Op::AddRule(rule) => in_the_way(rule).map(Op::DeleteRule),
                _ => None,
            };
            before.into_iter().chain([op])
        });
        *ops = each.collect();
    }
    sort(steps, Phase::DeleteRules, rule_order);
    // The last address of a family takes the neighbours of its network with it.
    sort(steps, Phase::DeletePeers, |op| matches!(op, Op::DeleteAddress(..)));
}

/// Returns whether the operation deletes a stray route or rule.
///
/// This makes room: an object that this crate did not create may be where one of ours belongs.
const fn is_stray(op: &Op) -> bool {
    matches!(op, Op::DeleteStrayRouting(_))
}

/// Returns the order in which rules are deleted, and in reverse created.
///
/// The fallback rule is created first and deleted last. The guard rules, which skip to it past the
/// gateways' rules, exist before and as long as these: they keep packets that must not enter the
/// tunnel out of it. Of the guard rules the one without an input interface is deleted last: the
/// kernel takes a request for it as a match for the others, too.
fn rule_order(op: &Op) -> (u32, bool, bool) {
    match op {
        Op::AddRule(rule) | Op::DeleteRule(rule) => match rule.action {
            RuleAction::Goto(target) => (target, false, rule.input.is_none()),
            _ => (rule.priority, true, true),
        },
        _ => (0, false, false),
    }
}

fn sort<K: Ord>(steps: &mut Steps, phase: Phase, key: impl Fn(&Op) -> K) {
    if let Some(ops) = steps.phases.get_mut(&phase) {
        ops.sort_by_key(|op| key(op));
    }
}

/// Adds the operations for the device, and removes from `observed` what is deleted with it.
fn link(observed: &mut State, desired: &State, steps: &mut Steps) {
    let took_along = |observed: &mut State| {
        observed.addresses.clear();
        observed.fdb.clear();
        observed.neighbours.clear();
        observed.routes.retain(|_, route| !matches!(route, Route::Via(_)));
    };
    match (observed.link.take(), &desired.link) {
        (None, None) => {}
        (None, Some(new)) => {
            took_along(observed);
            steps.add(Phase::Tunnel, Op::AddLink(new.clone()));
        }
        (Some(old), None) => {
            took_along(observed);
            steps.add(Phase::DeleteTunnel, Op::DeleteLink(old.name));
        }
        (Some(old), Some(new)) => {
            if must_be_made_anew(&old, new) {
                took_along(observed);
                steps.add(Phase::Tunnel, Op::DeleteLink(old.name));
                steps.add(Phase::Tunnel, Op::AddLink(new.clone()));
                return;
            }
            if old != *new {
                if old.mac != new.mac {
                    // With the MAC address the kernel deletes even permanent neighbours.
                    observed.neighbours.clear();
                }
                steps.add(Phase::Tunnel, Op::SetLink(new.clone()));
            }
            observed.link = Some(old);
        }
    }
}

/// Returns whether the kernel cannot change a device as wanted, so that it must be recreated.
///
/// The kernel reports no error for the last of these conditions.
fn must_be_made_anew(old: &Vxlan, new: &Vxlan) -> bool {
    (&old.name, old.vni, old.port) != (&new.name, new.vni, new.port)
        || old.local.is_ipv4() != new.local.is_ipv4()
        || old.underlay.is_some() && new.underlay.is_none()
}

fn routes(observed: &State, desired: &State, steps: &mut Steps) {
    // Routes without a device are identified by table, destination and metric alone; any device
    // name is valid for those whose device was deleted.
    let link = desired.link.as_ref().or(observed.link.as_ref());
    let device = link.map_or_else(|| Tunnel::default().device, |link| link.name.clone());
    changes(&observed.routes, &desired.routes, |change| match change {
        Change::Added(key, route) | Change::Replaced(key, _, route) => {
            steps.add(Phase::Routes, Op::PutRoute(device.clone(), *key, *route));
        }
        Change::Removed(key, route) => {
            steps.add(Phase::DeleteRoutes, Op::DeleteRoute(device.clone(), *key, *route));
        }
        Change::Same => {}
    });
    let sends = |op: &Op| {
        matches!(op, Op::PutRoute(_, _, Route::Via(_)) | Op::DeleteRoute(_, _, Route::Via(_)))
    };
    sort(steps, Phase::Routes, |op| (!is_stray(op), sends(op)));
    sort(steps, Phase::DeleteRoutes, |op| !sends(op));
}

fn firewall(family: TableFamily, observed: &Firewall, desired: &Firewall, steps: &mut Steps) {
    // An object with one of our names but another type cannot be changed, and our rules refer to
    // it.
    let misshapen = |stray: &Stray| match stray {
        Stray::Set(name) => Set::from_name(name).is_some_and(|set| set.table() == family),
        Stray::Chain(name) => ChainId::from_name(name).is_some_and(|chain| chain.table() == family),
        Stray::Flowtable(name) => name == FLOWTABLE,
    };
    if observed.strays.iter().any(misshapen) {
        steps.add(Phase::Skeleton, Op::DeleteTable(family));
        steps.add(Phase::Skeleton, Op::AddTable(family));
        return firewall(family, &Firewall::default(), desired, steps);
    }
    if observed.dormant && !desired.dormant {
        steps.add(Phase::Wake, Op::WakeTable(family));
    }
    for set in desired.sets.difference(&observed.sets) {
        steps.add(Phase::Skeleton, Op::AddSet(*set));
    }
    if desired.flowtable && !observed.flowtable {
        steps.add(Phase::Skeleton, Op::AddFlowtable);
    }
    chains(observed, desired, steps);
    if observed.flowtable && !desired.flowtable {
        let flowtable = Stray::Flowtable(FLOWTABLE.to_owned());
        steps.add(Phase::RetireGuards, Op::DeleteStray(family, flowtable));
    }
    let stays = |key: &Key| desired.sets.contains(&key.set());
    let overlapped = |key: &Key| desired.overlapping(key).is_some();
    elements::elements(&observed.elements, &desired.elements, |change| {
        element(change, stays, overlapped, steps);
    });
    for set in observed.unlisted.intersection(&desired.sets) {
        steps.add(phases_of(*set).1, Op::FlushSet(*set));
    }
    for stray in &observed.strays {
        steps.add(Phase::EmptyVerdicts, Op::DeleteStray(family, stray.clone()));
    }
    for set in observed.sets.difference(&desired.sets) {
        // Guard rules that are deleted later look up that set.
        let guards = set.stage() == Stage::Guard;
        let phase = if guards { Phase::RetireGuards } else { Phase::EmptyVerdicts };
        steps.add(phase, Op::DeleteSet(*set));
    }
}

/// Returns the order within a transaction.
///
/// No object is created before one that it refers to, nor deleted after it.
fn rank(op: &Op) -> u8 {
    match op {
        Op::DeleteTable(_) => 0,
        Op::AddTable(_) => 1,
        Op::AddSet(_) | Op::AddFlowtable => 2,
        Op::AddChain(..) => 3,
        Op::SetRules(..) => 4,
        // A range that is split must be deleted before its parts are added.
        Op::DeleteElement(..) | Op::FlushSet(_) => 5,
        Op::AddElement(..) => 6,
        // Its elements refer to chains.
        Op::DeleteSet(set) if set.data() == Some(Datum::Verdict) => 7,
        Op::DeleteChain(_) | Op::DeleteStray(_, Stray::Chain(_)) => 8,
        _ => 9,
    }
}

fn chains(observed: &Firewall, desired: &Firewall, steps: &mut Steps) {
    let translated = guards::translated(desired);
    let retires = guards::translated(observed).is_some() && translated.is_none();
    for (chain, (base, rules)) in &desired.chains {
        let found = observed.chains.get(chain);
        match found.filter(|(found, _)| found == base) {
            Some((_, found)) if found == rules => {}
            Some((_, found)) => {
                let mut guarded = guards::guarded(found, rules);
                if let Some(mark) = translated.filter(|_| *chain == ChainId::Forward) {
                    guarded.retain(|rule| rules.contains(rule) || !guards::holds(rule, mark));
                }
                let between = tables::transitional(*chain, found, &guarded, retires);
                let (first, last) = tables::phases(*chain, found, rules);
                if guarded != *rules {
                    let last = Op::SetRules(*chain, rules.clone());
                    steps.add(Phase::RetireGuards, last);
                }
                if between != guarded {
                    steps.add(last, Op::SetRules(*chain, guarded));
                }
                if between != *found {
                    steps.add(first, Op::SetRules(*chain, between));
                }
            }
            None => {
                if found.is_some() {
                    steps.add(Phase::Skeleton, Op::DeleteChain(*chain));
                }
                let phase = match chain.table() {
                    TableFamily::Inet => Phase::Skeleton,
                    TableFamily::Netdev => Phase::Hook,
                };
                steps.add(phase, Op::AddChain(*chain, base.clone()));
                steps.add(phase, Op::SetRules(*chain, rules.clone()));
            }
        }
    }
    let is_gone = |chain: &ChainId| !desired.chains.contains_key(chain);
    for (chain, (_, rules)) in observed.chains.iter().filter(|(chain, _)| is_gone(chain)) {
        let phase = deletion(*chain);
        let mut next = rules.iter().flat_map(|rule| rule.0.iter().filter_map(Stmt::next));
        // The kernel deletes no chain to which a rule leads.
        if next.any(|other| is_gone(&other) && deletion(other) == phase) {
            steps.add(phase, Op::SetRules(*chain, Vec::new()));
        }
        steps.add(phase, Op::DeleteChain(*chain));
    }
}

/// Returns the phase in which a chain is deleted.
const fn deletion(chain: ChainId) -> Phase {
    match chain {
        // Packets with the mark that the guard chain matches may be in flight until then, and its
        // rules lead to the others. Of packets that keep their mark, the chains of marked and of
        // tracked packets keep the old rules up to the entrance until then: one leads to the last.
        ChainId::Guard
        | ChainId::ReturnCheck
        | ChainId::SourceCheck(_)
        | ChainId::Returned
        | ChainId::ClampMss => Phase::RetireGuards,
        _ => Phase::EmptyVerdicts,
    }
}

/// Returns the phases in which elements of a set are added and deleted.
const fn phases_of(set: Set) -> (Phase, Phase) {
    match set.stage() {
        // A packet that was marked before its rule was deleted must still match when it arrives.
        Stage::Guard => (Phase::FillVerdicts, Phase::EmptyGuards),
        Stage::Hook => (Phase::Hook, Phase::EmptyGuards),
        Stage::Verdict => (Phase::FillVerdicts, Phase::EmptyVerdicts),
        Stage::Policy => (Phase::FillPolicies, Phase::EmptyPolicies),
        Stage::Class => (Phase::FillClasses, Phase::EmptyClasses),
        Stage::Source => (Phase::FillSources, Phase::EmptySources),
    }
}
