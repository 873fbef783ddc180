//! Routing rules of other programs that the kernel evaluates before ours.
//!
//! A program that adds a rule without a priority gets one behind the rule for local addresses and
//! ahead of all others, ours included (`fib_default_rule_pref` in `net/core/fib_rules.c`).

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleFlags, RuleMessage};

use crate::state::Rule;

/// Number of the kernel's table of local addresses.
const LOCAL: u32 = 255;

/// The first of our rules, as last read or written; shared with the listener for notifications.
#[derive(Clone, Debug, Default)]
pub(crate) struct FirstRule(Arc<Mutex<Option<Rule>>>);

impl FirstRule {
    /// Records our rules as read.
    pub(crate) fn set<'a>(&self, rules: impl IntoIterator<Item = &'a Rule>) {
        *self.lock() = rules.into_iter().min_by_key(|rule| order(rule)).cloned();
    }

    /// Records a rule as added.
    pub(crate) fn add(&self, rule: &Rule) {
        let mut first = self.lock();
        if first.as_ref().is_none_or(|first| order(rule) < order(first)) {
            *first = Some(rule.clone());
        }
    }

    /// Whether a rule of another program comes before ours and may decide the route of a packet
    /// with our mark.
    pub(crate) fn is_preceded_by(&self, message: &RuleMessage) -> bool {
        let first = self.lock();
        let Some(first) = first.as_ref() else { return false };
        let (mut priority, mut value, mut mask, mut selects) = (0, 0, 0, false);
        let (mut table, mut without_default) = (u32::from(message.header.table), false);
        for attribute in &message.attributes {
            match attribute {
                RuleAttribute::Priority(number) => priority = *number,
                RuleAttribute::FwMark(number) => value = *number,
                RuleAttribute::FwMask(number) => mask = *number,
                RuleAttribute::Table(number) => table = *number,
                RuleAttribute::SuppressPrefixLen(length) => without_default = *length != u32::MAX,
                RuleAttribute::Iifname(_) | RuleAttribute::Oifname(_) => selects = true,
                _ => {}
            }
        }
        let ends = match message.header.action {
            RuleAction::ToTable => !without_default && table != LOCAL,
            RuleAction::Blackhole | RuleAction::Unreachable | RuleAction::Prohibit => true,
            _ => false,
        };
        // The guard rule has our mark prefix; other rules have bits that differ by gateway.
        let prefix = if first.inverted { first.mask } else { 0 };
        let matches = (value ^ first.mark.get()) & mask & prefix == 0;
        let inverted = message.header.flags.contains(RuleFlags::Invert);
        priority < first.priority && ends && !selects && (matches || inverted)
    }

    fn lock(&self) -> MutexGuard<'_, Option<Rule>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Order of our rules, with the guard rule first among those of its priority.
const fn order(rule: &Rule) -> (u32, bool) {
    (rule.priority, !rule.inverted)
}
