//! How a hash is made anew when it is full.
//!
//! One that is made for a size refuses what exceeds it with `ENFILE`. One transaction then takes it
//! out of the rules, makes it anew under the same name with what was in it, and puts the rules back:
//! a packet finds the old one or the new one.

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

/// Times that a set is made anew before somebody else's changes are too fast for it.
const ATTEMPTS: usize = 5;

const REMEDY: &str = "the set is full, and could not be made larger beside changes or rules that \
                      are not ours: try again, or take such rules out of the table";

/// The sets that were too small for what was to come into them; none if that is not all that was
/// refused.
pub(crate) fn full(ops: &[Op], refused: &Refused) -> BTreeSet<Set> {
    let set = |(index, error): &(usize, KernelError)| match ops.get(*index) {
        Some(Op::AddElement(key, _)) if error.errno() == Some(errno::ENFILE) => Some(key.set()),
        _ => None,
    };
    refused.iter().map(set).collect::<Option<_>>().unwrap_or_default()
}

/// Makes sets anew, with room for what is in them and what is to come, and says between which
/// generations of the rules.
///
/// # Errors
///
/// What the kernel refused, or what was refused before, if the table holds what is not ours to
/// write or somebody else changes it all the time; nothing was done.
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
                // Somebody else was faster, and what was read may be no longer so.
                Some((_, error)) if error.errno() == Some(errno::ERESTART) => {}
                Some((_, error)) => return Err(error),
                None => break,
            },
        }
    }
    Ok(None)
}

/// The operations that make sets of a table anew; `None` if some of it cannot be written back.
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
    // A chain of somebody else's in our table may look into them; it is to go anyway.
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
