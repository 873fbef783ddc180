//! What holds packets back that have a mark of ours, and is made and taken away with care.

use crate::state::{ChainId, Firewall, NftRule, Stmt};

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
    if matches!(theirs, Stmt::CtMarkIs(_)) != matches!(asks, Stmt::CtMarkIs(_))
        || includes(theirs, asks)
        || includes(asks, theirs)
    {
        return None;
    }
    asks.clone_from(theirs);
    Some(rule)
}

/// Whether whatever has the one mark has the other: they are of one layout.
const fn includes(one: &Stmt, other: &Stmt) -> bool {
    match (one, other) {
        (Stmt::MarkIs { mask, value }, Stmt::MarkIs { mask: other_mask, value: other_value }) => {
            *mask & *other_mask == *mask && *other_value & *mask == *value
        }
        _ => false,
    }
}

/// Whether it is the test of a mark that only we give.
const fn is_mark_of_ours(statement: &Stmt) -> bool {
    matches!(statement, Stmt::MarkIs { .. } | Stmt::MarkIn { .. } | Stmt::CtMarkIs(_))
}

/// Mask and value of the mark of what this node translates, if it translates anything.
pub(super) fn translated(table: &Firewall) -> Option<(u32, u32)> {
    let (_, rules) = table.chains.get(&ChainId::Guard)?;
    rules.iter().flat_map(|rule| &rule.0).find_map(|statement| match statement {
        Stmt::MarkIsNot { mask, value } => Some((*mask, *value)),
        _ => None,
    })
}

/// Whether it is for packets with this mark, though perhaps not for them alone.
pub(super) fn holds(rule: &NftRule, (mask, value): (u32, u32)) -> bool {
    let asks = |one: &Stmt| match one {
        Stmt::MarkIs { mask: asked, value: due } => (value ^ due) & asked & mask == 0,
        _ => false,
    };
    rule.0.iter().any(asks)
}
