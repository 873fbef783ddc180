//! What holds packets back that have a mark of ours, and is made and taken away with care.

use crate::state::{ChainId, Field, Firewall, MarkBits, NftRule, Stmt};

/// The rules wanted, each guard also for the marks that the one found holds back: for as long as
/// packets and connections have them, nothing else would.
pub(super) fn guarded(found: &[NftRule], wanted: &[NftRule]) -> Vec<NftRule> {
    let mut rules = Vec::with_capacity(wanted.len());
    for rule in wanted {
        let also = found.iter().filter_map(|found| with_marks_of(found, rule));
        rules.extend(also.filter(|rule| !wanted.contains(rule)));
        rules.push(rule.clone());
    }
    rules
}

/// A guard, for the mark that another one of its kind asks for.
fn with_marks_of(other: &NftRule, guard: &NftRule) -> Option<NftRule> {
    let end = guard.0.last().filter(|end| other.0.last() == Some(*end))?;
    let guards = matches!(end, Stmt::Drop | Stmt::Goto(ChainId::Marked | ChainId::Bound));
    if !guards {
        return None;
    }
    let asked = |rule: &NftRule| rule.0.iter().position(is_mark_of_ours);
    let (theirs, ours) = (asked(other)?, asked(guard)?);
    let theirs = other.0.get(theirs)?;
    let mut rule = guard.clone();
    let asks = rule.0.get_mut(ours)?;
    let of_connection = |one: &Stmt| one.tests(Field::CtMark).is_some();
    if of_connection(theirs) != of_connection(asks)
        || includes(theirs, asks)
        || includes(asks, theirs)
    {
        return None;
    }
    asks.clone_from(theirs);
    Some(rule)
}

/// Whether whatever has the one mark has the other: they are of one layout.
fn includes(one: &Stmt, other: &Stmt) -> bool {
    let marks = one.tests(Field::Mark).zip(other.tests(Field::Mark));
    marks.is_some_and(|(one, other)| one.mask & other.mask == one.mask && one.are_in(other.value))
}

/// Whether it is the test of a mark that only we give.
fn is_mark_of_ours(statement: &Stmt) -> bool {
    match statement {
        Stmt::Lookup { key, negated: false, .. } => {
            matches!(key.as_slice(), [one] if one.field == Field::Mark)
        }
        other => [Field::Mark, Field::CtMark].iter().any(|field| other.tests(*field).is_some()),
    }
}

/// The mark of what this node translates, if it translates anything.
pub(super) fn translated(table: &Firewall) -> Option<MarkBits> {
    let (_, rules) = table.chains.get(&ChainId::Guard)?;
    rules.iter().flat_map(|rule| &rule.0).find_map(|statement| statement.excludes(Field::Mark))
}

/// Whether it is for packets with this mark, though perhaps not for them alone.
pub(super) fn holds(rule: &NftRule, mark: MarkBits) -> bool {
    let asks = |asked: MarkBits| (mark.value ^ asked.value) & asked.mask & mark.mask == 0;
    rule.0.iter().filter_map(|one| one.tests(Field::Mark)).any(asks)
}
