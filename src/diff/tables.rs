//! Differences of the two nf_tables tables, and the mark that one passes to the other.

use super::changes::Phase;
use super::op::Op;
use super::{Steps, firewall};
use crate::state::{ChainId, Firewall, Interface, NftRule, Set, State, Stmt, TableFamily};

/// Adds the operations that turn one observed nf_tables table into the desired one.
pub(super) fn table(family: TableFamily, observed: &State, desired: &State, steps: &mut Steps) {
    match (observed.table(family), desired.table(family)) {
        (None, None) => {}
        (Some(_), None) => {
            let phase = match family {
                TableFamily::Inet => Phase::DeleteTable,
                TableFamily::Netdev => Phase::DeleteHook,
            };
            steps.add(phase, Op::DeleteTable(family));
        }
        (None, Some(desired)) => {
            steps.add(Phase::Skeleton, Op::AddTable(family));
            firewall(family, &Firewall::default(), desired, steps);
        }
        (Some(found), Some(wanted)) if family == TableFamily::Netdev => {
            // On older kernels the chains at a device's hooks are deleted with the device: recreate
            // them.
            let mut found = found.clone();
            if steps.has(Phase::Tunnel, |op| matches!(op, Op::DeleteLink(_))) {
                for (chain, _) in std::mem::take(&mut found.chains) {
                    steps.add(Phase::Skeleton, Op::DeleteChain(chain));
                }
            }
            firewall(family, &found, wanted, steps);
        }
        (Some(found), Some(wanted)) => firewall(family, found, wanted, steps),
    }
}

/// Returns the phases of the first and of the last change of a chain's rules.
pub(super) fn phases(chain: ChainId, found: &[NftRule], wanted: &[NftRule]) -> (Phase, Phase) {
    match (chain, keeps_mark(found), keeps_mark(wanted)) {
        // The hook must exist, and no route may need it yet.
        (ChainId::Marked | ChainId::Tracked, false, true) => (Phase::Hook, Phase::EmptyVerdicts),
        // The routes that need the hook must be deleted.
        (ChainId::Marked | ChainId::Tracked, true, false) => (Phase::Chains, Phase::EmptyGuards),
        _ => (Phase::Chains, Phase::EmptyVerdicts),
    }
}

/// Returns whether a chain accepts packets that enter the tunnel without clearing their mark.
fn keeps_mark(rules: &[NftRule]) -> bool {
    let enters = entrance(rules).and_then(|at| rules.get(at)).map(|NftRule(rule)| rule.as_slice());
    matches!(enters, Some([_, Stmt::Return]))
}

/// Returns the index of the rule that accepts packets that enter the tunnel.
fn entrance(rules: &[NftRule]) -> Option<usize> {
    rules
        .iter()
        .position(|rule| matches!(rule.0.first(), Some(Stmt::Interface(Interface::Output, _))))
}

/// Returns the rules of a chain during the transition: the wanted rules and some of the old ones.
///
/// Old rules that look up a source or a destination stay: as long as sources have the old classes,
/// both are needed. So does the old lookup of a next hop, by other bits of the mark. Packets that
/// enter the tunnel keep their mark as long as a route may need it. Where the guard chain is
/// deleted, packets from the tunnel are translated as long as a policy may need that.
pub(super) fn transitional(
    chain: ChainId,
    found: &[NftRule],
    wanted: &[NftRule],
    retires: bool,
) -> Vec<NftRule> {
    let length = |rule: &NftRule| match rule.0.first() {
        Some(Stmt::Map { map: Set::Destination(_, length), .. }) => Some(*length),
        Some(Stmt::Map { map: Set::Any(_), .. }) => Some(0),
        _ => None,
    };
    let mut rules = wanted.to_vec();
    let enters = matches!(chain, ChainId::Marked | ChainId::Tracked);
    if enters && keeps_mark(found) && !keeps_mark(wanted) {
        let old = entrance(found).and_then(|at| found.get(..=at));
        if let (Some(at), Some(old)) = (entrance(&rules), old) {
            rules.splice(..=at, old.iter().cloned());
        }
    }
    if chain == ChainId::Forward && retires {
        let holds = |rule: &&NftRule| rule.0.last() == Some(&Stmt::Goto(ChainId::Marked));
        rules.retain(|rule| !holds(&rule));
        rules.splice(..0, found.iter().filter(holds).cloned());
    }
    for rule in found.iter().filter(|rule| !wanted.contains(rule)) {
        let at = match rule.0.first() {
            Some(Stmt::Map { map: Set::Destination(..), .. }) => rules
                .iter()
                .position(|other| length(other).is_some_and(|l| Some(l) <= length(rule))),
            Some(Stmt::Map { map: Set::Source(_) | Set::SourceNet(_), .. }) => {
                Some(behind(&rules, found, rule))
            }
            // The lookup uses other bits of the mark: packets that just got such a mark arrive here
            // in a moment.
            Some(Stmt::Map { map: Set::NextHop, .. }) => Some(rules.len().saturating_sub(1)),
            _ => None,
        };
        if let Some(at) = at {
            rules.insert(at, rule.clone());
        }
    }
    rules
}

/// Returns the index for a rule that looks up sources.
///
/// The rule goes behind the rules that it was found behind, and ranges go behind single addresses.
fn behind(rules: &[NftRule], found: &[NftRule], rule: &NftRule) -> usize {
    let single = rule.0.first().and_then(|first| match first {
        Stmt::Map { key, map: Set::SourceNet(of), into } => {
            Some(Stmt::Map { key: key.clone(), map: Set::Source(*of), into: *into })
        }
        _ => None,
    });
    let ahead: Vec<_> = found.iter().take_while(|other| *other != rule).collect();
    let is_ahead = |other: &NftRule| {
        ahead.contains(&other) || single.is_some() && other.0.first() == single.as_ref()
    };
    rules.iter().rposition(is_ahead).map_or(0, |at| at + 1)
}
