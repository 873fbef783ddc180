//! Routing rules of other programs that the kernel evaluates before ours.
//!
//! A program that adds a rule without a priority gets one behind the rule for local addresses and
//! ahead of all others, ours included (`fib_default_rule_pref` in `net/core/fib_rules.c`).

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleFlags, RuleMessage};

use crate::state::Rule;

/// Number of the kernel's table of local addresses.
const LOCAL: u32 = 255;

/// Our rules as last read or written, by which another rule is found to precede them; shared with the
/// listener for notifications.
#[derive(Clone, Debug, Default)]
pub(crate) struct OurRules(Arc<Mutex<Option<Marks>>>);

/// Priority and marks of our rules.
#[derive(Clone, Copy, Debug)]
struct Marks {
    /// Lowest priority.
    first: u32,
    /// Value and mask that all our marks have in common; of the guard rules.
    prefix: (u32, u32),
    /// Bits that any of our rules tests.
    tested: u32,
}

impl OurRules {
    /// Records our rules as read.
    pub(crate) fn set<'a>(&self, rules: impl IntoIterator<Item = &'a Rule>) {
        let mut known = self.lock();
        *known = None;
        rules.into_iter().for_each(|rule| add(&mut known, rule));
    }

    /// Records a rule as added.
    pub(crate) fn add(&self, rule: &Rule) {
        add(&mut self.lock(), rule);
    }

    /// Returns true for a rule of another program that comes before ours and may decide the route of
    /// a packet with our mark.
    pub(crate) fn are_preceded_by(&self, message: &RuleMessage) -> bool {
        let Some(ours) = *self.lock() else { return false };
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
        // Value bits differ by gateway; the others are the prefix, or of no program and 0.
        let (prefix, prefix_mask) = ours.prefix;
        let matches = (value ^ prefix) & mask & !(ours.tested & !prefix_mask) == 0;
        let inverted = message.header.flags.contains(RuleFlags::Invert);
        priority < ours.first && ends && !selects && (matches || inverted)
    }

    fn lock(&self) -> MutexGuard<'_, Option<Marks>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn add(known: &mut Option<Marks>, rule: &Rule) {
    let unknown = Marks { first: rule.priority, prefix: (0, 0), tested: 0 };
    let ours = known.get_or_insert(unknown);
    ours.first = ours.first.min(rule.priority);
    ours.tested |= rule.mask;
    if rule.inverted {
        ours.prefix = (rule.mark.get(), rule.mask);
    }
}
