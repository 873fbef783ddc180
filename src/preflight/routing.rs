//! Checks of routing rules and routing tables of other programs.

use super::facts::{Action, Facts, Rule};
use super::{Preflight, Problem};
use crate::cluster::{Replies, RulePriorities, Steering};
use crate::types::Family;

/// Number of the kernel's table of local addresses (`local`).
const LOCAL: u32 = 255;

impl Preflight<'_> {
    pub(super) fn judge_routing(&self, facts: &Facts, problems: &mut Vec<Problem>) {
        for family in &self.families {
            let rules = || facts.rules.iter().filter(|rule| rule.family == *family);
            self.judge_local(*family, &rules().collect::<Vec<_>>(), problems);
            for rule in rules() {
                self.judge_rule(rule, facts, problems);
            }
        }
        problems.extend(facts.intruders.iter().map(|intruder| Problem::RouteInOurTable {
            family: intruder.family,
            route: intruder.text.clone(),
        }));
        let range = self.tables;
        let taken = range.iter().filter(|table| facts.tables.contains(&table.get())).count();
        let taken = u32::try_from(taken).unwrap_or(u32::MAX);
        let free = range.len().saturating_sub(taken);
        // With replies by the tunnel, a gateway has a table for each other node.
        let all = self.is_gateway && self.cluster.replies == Replies::Tunnel;
        let nodes = if all { self.cluster.nodes.len() } else { self.gateways.len() };
        let gateways = match self.cluster.steering {
            Steering::Tables => u32::try_from(nodes).unwrap_or(u32::MAX),
            Steering::EgressHook => u32::from(!self.gateways.is_empty()),
        };
        if free < gateways {
            let (start, end) = (range.start(), range.end());
            problems.push(Problem::TablesFew { start, end, free, gateways });
        } else if taken > 0 {
            problems.push(Problem::TablesTaken {
                start: range.start(),
                end: range.end(),
                taken,
                free,
            });
        }
    }

    fn judge_local(&self, family: Family, rules: &[&Rule], problems: &mut Vec<Problem>) {
        let priority = self.cluster.rule_priority;
        let first = |rule: &&Rule| {
            let local = matches!(rule.action, Action::Lookup { table: LOCAL, .. });
            local && rule.takes_all() && rule.priority < priority
        };
        // A family without any rule is one that the kernel does not have.
        if !rules.is_empty() && !rules.iter().any(first) {
            problems.push(Problem::LocalRuleLate { family, priority });
        }
    }

    fn judge_rule(&self, rule: &Rule, facts: &Facts, problems: &mut Vec<Problem>) {
        let priority = self.cluster.rule_priority;
        if rule.priority < priority && self.takes(rule, facts) {
            let (family, rule) = (rule.family, rule.to_string());
            problems.push(Problem::RuleTakesFirst { rule, family, priority });
            return;
        }
        let ours = RulePriorities::of(self.cluster);
        let replies = self.cluster.replies == Replies::Tunnel;
        // Without a mark prefix there is neither a guard rule nor a closing rule.
        let ours = if self.cluster.marks.tells_by_prefix() {
            ours.guard..=if replies { ours.end } else { ours.closing }
        } else {
            ours.gateways..=ours.gateways
        };
        if ours.contains(&rule.priority) {
            problems.push(Problem::PriorityShared { rule: rule.to_string() });
        }
        let (bits, ours) = (rule.mark.map_or(0, |(_, mask)| mask), self.mark_bits());
        if bits & ours != 0 {
            let (rule, shared) = (rule.to_string(), bits & ours);
            problems.push(Problem::MarkTestedByRule { rule, bits, shared });
        }
    }

    /// Returns true if a rule decides the route of a packet with a mark of the datapath.
    fn takes(&self, rule: &Rule, facts: &Facts) -> bool {
        let ends = match rule.action {
            Action::Lookup { table: LOCAL, .. } | Action::Other => false,
            Action::Lookup { table, without_default } => {
                !without_default && facts.catch_all.contains(&(rule.family, table))
            }
            Action::Refuse => true,
        };
        ends && !rule.selects && (rule.inverted || self.matches(rule))
    }

    fn matches(&self, rule: &Rule) -> bool {
        let marks = &self.cluster.marks;
        let free = self.mark_bits() & marks.value_mask();
        // The free bits can have any value; the other bits are the mark prefix, or belong to no
        // program and are 0.
        let mark =
            rule.mark.is_none_or(|(value, mask)| (value ^ marks.prefix()) & mask & !free == 0);
        let source = rule.source.is_none_or(|net| {
            let mut sources = self.sources.iter();
            self.sources.is_empty()
                || sources.any(|source| source.contains(&net) || net.contains(source))
        });
        mark && source
    }
}

impl Rule {
    /// Returns true if the rule has no selectors and so matches every packet.
    fn takes_all(&self) -> bool {
        self.mark.is_none() && self.source.is_none() && !self.selects && !self.inverted
    }
}
