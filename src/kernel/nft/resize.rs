//! Recreates a full hash set with a larger size.
//!
//! A set with a size refuses further elements with `ENFILE`. One transaction then removes the set
//! from the rules, recreates it under the same name with its elements, and restores the rules: a
//! packet finds the old set or the new one.

#[cfg(test)]
mod tests;

use std::collections::BTreeSet;

use super::commit::{Between, Refused, commit_as};
use super::observe::observe_some;
use super::terms::{Sizes, Terms};
use crate::diff::op::Op;
use crate::error::{KernelError, errno};
use crate::kernel::netlink::socket::Socket;
use crate::state::{Firewall, NftRule, Set, Stmt, Stray, TableFamily};

/// Number of attempts to recreate a set while other programs change the ruleset.
const ATTEMPTS: usize = 5;

const REMEDY: &str = "the set is full, and could not be made larger beside changes or rules that \
                      are not ours: try again, or take such rules out of the table";

/// Sets that were too small for the elements to be added.
///
/// Empty if anything was refused for another reason.
pub(crate) fn full(ops: &[Op], refused: &Refused) -> BTreeSet<Set> {
    let set = |(index, error): &(usize, KernelError)| match ops.get(*index) {
        Some(Op::AddElement(key, _)) if error.errno() == Some(errno::ENFILE) => Some(key.set()),
        _ => None,
    };
    refused.iter().map(set).collect::<Option<_>>().unwrap_or_default()
}

/// Recreates sets with room for their elements and for those to be added.
///
/// Returns the ruleset generations before and after.
///
/// # Errors
///
/// The errors of the kernel. The errors of `refused`, if the table contains objects that this crate
/// cannot write, or if other programs keep changing it; nothing was changed then.
pub(crate) fn enlarge(
    socket: &mut Socket,
    sets: &BTreeSet<Set>,
    sizes: &Sizes,
    refused: Refused,
) -> Result<Between, Refused> {
    let first = refused.first().map_or(0, |(index, _)| *index);
    match try_to_enlarge(socket, sets, sizes) {
        Ok(Some(between)) => Ok(between),
        Ok(None) => {
            Err(refused.into_iter().map(|(at, error)| (at, error.with_remedy(REMEDY))).collect())
        }
        Err(error) => Err(vec![(first, error)]),
    }
}

fn try_to_enlarge(
    socket: &mut Socket,
    sets: &BTreeSet<Set>,
    sizes: &Sizes,
) -> Result<Option<Between>, KernelError> {
    for _ in 0..ATTEMPTS {
        let (table, generation) = observe_some(socket, sets)?;
        let Some(ops) = anew(&table, sets) else { break };
        let mut larger = Sizes::of(&ops);
        for set in sets {
            larger.come(Some((*set, sizes.coming(*set))));
        }
        let terms = Terms { sizes: Some(&larger), only_at: Some(generation), ..Terms::default() };
        match commit_as(socket, &ops, &terms) {
            Ok(between) => return Ok(between),
            Err(refused) => match refused.into_iter().next() {
                // Another program committed first, so what was read may be outdated.
                Some((_, error)) if error.errno() == Some(errno::ERESTART) => {}
                Some((_, error)) => return Err(error),
                None => break,
            },
        }
    }
    Ok(None)
}

/// Operations that recreate sets of a table; `None` if part of the table cannot be written back.
fn anew(table: &Firewall, sets: &BTreeSet<Set>) -> Option<Vec<Op>> {
    let looks = |rules: &[NftRule]| {
        let mut statements = rules.iter().flat_map(|rule| &rule.0);
        statements.any(|statement| statement.set().is_some_and(|set| sets.contains(&set)))
    };
    let chains = table.chains.iter().map(|(chain, (_, rules))| (*chain, rules));
    let chains: Vec<_> = chains.filter(|(_, rules)| looks(rules)).collect();
    let is_foreign = |statement: &Stmt| matches!(statement, Stmt::Unknown(_));
    let known = chains.iter().flat_map(|(_, rules)| rules.iter()).flat_map(|rule| &rule.0);
    if !sets.is_subset(&table.sets) || known.into_iter().any(is_foreign) {
        return None;
    }
    let mut ops: Vec<_> = chains.iter().map(|(chain, _)| Op::SetRules(*chain, vec![])).collect();
    // Another program's chain in our table may use the sets; it would be deleted anyway.
    let strays = table.strays.iter().filter(|stray| matches!(stray, Stray::Chain(_)));
    ops.extend(strays.map(|stray| Op::DeleteStray(TableFamily::Inet, stray.clone())));
    ops.extend(sets.iter().copied().map(Op::DeleteSet));
    ops.extend(sets.iter().copied().map(Op::AddSet));
    for set in sets {
        ops.extend(table.elements.of(*set).map(|(key, value)| Op::AddElement(key, value)));
    }
    ops.extend(chains.into_iter().map(|(chain, rules)| Op::SetRules(chain, rules.clone())));
    Some(ops)
}
