//! Guard rules, which drop packets with one of our marks, and how they change safely.

use crate::state::{ChainId, Field, Firewall, MarkBits, NftRule, Stmt};

/// Returns the wanted rules, with each guard rule also for the marks that the found rules match.
///
/// As long as packets and connections have the old marks, no other rule would drop them.
pub(super) fn guarded(found: &[NftRule], wanted: &[NftRule]) -> Vec<NftRule> {
    let mut rules = Vec::with_capacity(wanted.len());
    for rule in wanted {
        let also = found.iter().filter_map(|found| with_marks_of(found, rule));
        rules.extend(also.filter(|rule| !wanted.contains(rule)));
        rules.push(rule.clone());
    }
    rules
}

/// Returns a copy of a guard rule for the mark that another rule of the same kind matches.
fn with_marks_of(other: &NftRule, guard: &NftRule) -> Option<NftRule> {
    let end = guard.0.last().filter(|end| other.0.last() == Some(*end))?;
    let guards = matches!(end, Stmt::Drop | Stmt::Goto(ChainId::Marked | ChainId::Tracked));
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

/// Returns whether the mark of one test includes that of the other; both are of one layout.
fn includes(one: &Stmt, other: &Stmt) -> bool {
    let marks = one.tests(Field::Mark).zip(other.tests(Field::Mark));
    marks.is_some_and(|(one, other)| one.mask & other.mask == one.mask && one.are_in(other.value))
}

/// Returns whether a statement tests a mark that only this crate sets.
fn is_mark_of_ours(statement: &Stmt) -> bool {
    match statement {
        Stmt::Lookup { key, negated: false, .. } => {
            matches!(key.as_slice(), [one] if one.field == Field::Mark)
        }
        other => [Field::Mark, Field::CtMark].iter().any(|field| other.tests(*field).is_some()),
    }
}

/// Returns the mark of packets that this node translates, if it translates any.
pub(super) fn translated(table: &Firewall) -> Option<MarkBits> {
    let (_, rules) = table.chains.get(&ChainId::Guard)?;
    rules.iter().flat_map(|rule| &rule.0).find_map(|statement| statement.excludes(Field::Mark))
}

/// Returns whether a rule matches packets with this mark, though perhaps others, too.
pub(super) fn holds(rule: &NftRule, mark: MarkBits) -> bool {
    let asks = |asked: MarkBits| (mark.value ^ asked.value) & asked.mask & mark.mask == 0;
    rule.0.iter().filter_map(|one| one.tests(Field::Mark)).any(asks)
}
