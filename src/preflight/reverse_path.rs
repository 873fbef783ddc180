//! Checks of reverse path filters in nf_tables, by the path of a packet through their rules.
//!
//! The packet comes out of the tunnel device of a gateway and is from a pod of another node: the
//! host's own route to that pod is by another interface. With replies by the tunnel, the packet may
//! also be a reply on the node of a pod; the datapath gives such packets a mark by which their way
//! back is the tunnel, for filters that look it up by mark. A rule drops it as a reverse path filter
//! if it would not drop the same packet with a route back through the tunnel device.

use std::collections::BTreeMap;

use super::facts::{Chain, Facts, FilterRule, Filters, Test, Verdict};
use super::{Preflight, Problem};
use crate::cluster::Replies;
use crate::plan::AFTER_DNAT;
use crate::types::Family;

/// Hook numbers `NF_INET_PRE_ROUTING` and `NF_INET_FORWARD`.
const HOOKS: [u32; 2] = [PREROUTING, 2];
const PREROUTING: u32 = 0;

/// Longest chain of jumps that the kernel accepts (`NFT_JUMP_STACK_SIZE`).
const JUMPS: usize = 16;

/// Most rules that are evaluated for one packet.
const RULES: usize = 100_000;

impl Preflight<'_> {
    pub(super) fn judge_reverse_path_filters(&self, facts: &Facts, problems: &mut Vec<Problem>) {
        let replies = self.cluster.replies == Replies::Tunnel && !self.gateways.is_empty();
        if !self.is_gateway && !replies {
            return;
        }
        for filters in &facts.firewall.filters {
            let chains = facts
                .firewall
                .chains
                .iter()
                .filter(|chain| chain.table == filters.table && HOOKS.contains(&chain.hook));
            for chain in chains {
                for family in chain.families.iter().filter(|one| self.families.contains(one)) {
                    problems.extend(self.filtered(filters, chain, *family));
                }
            }
        }
    }

    /// Returns the rules that drop a packet of this family for its missing way back.
    fn filtered(&self, filters: &Filters, chain: &Chain, family: Family) -> Vec<Problem> {
        let device = self.cluster.tunnel.device.as_str();
        let walk = |way_back| {
            let (marked, rules, drops) = (false, 0, BTreeMap::new());
            let replies = self.cluster.replies == Replies::Tunnel;
            let by_mark = replies && chain.hook == PREROUTING && chain.priority > AFTER_DNAT;
            let mut walk =
                Walk { filters, device, family, way_back, by_mark, marked, rules, drops };
            let end = walk.through(&chain.name, JUMPS, true);
            if end == End::Falls && chain.drops {
                walk.drops.insert((&chain.name, None), true);
            }
            walk.drops
        };
        let (mut dropped, others) = (walk(false), walk(true));
        dropped.retain(|rule, _| !others.contains_key(rule));
        let problem =
            |((chain, rule), certain): ((&str, Option<u64>), bool)| Problem::ReversePathFilter {
                table: filters.table.clone(),
                chain: chain.to_owned(),
                rule,
                device: device.to_owned(),
                family,
                certain,
            };
        dropped.into_iter().map(problem).collect()
    }
}

/// Walk of a packet through the chains of one table.
struct Walk<'a> {
    filters: &'a Filters,
    device: &'a str,
    family: Family,
    /// Set if the route to the source is by the input interface.
    way_back: bool,
    /// Set if a lookup by the packet's mark finds one by that interface.
    by_mark: bool,
    /// Set if a rule may have written the mark, which was 0.
    marked: bool,
    rules: usize,
    /// Chain and handle of the rules that drop the packet, without a handle for a policy; true if
    /// all that they match is known of the packet.
    drops: BTreeMap<(&'a str, Option<u64>), bool>,
}

/// End of a chain for a packet.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    /// The packet returns to the rule after the jump, or meets the policy.
    Falls,
    /// A verdict ends the walk through the base chain.
    Verdict,
}

/// Result of the tests of a rule.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Match {
    No,
    Maybe,
    Yes,
}

impl Walk<'_> {
    fn through(&mut self, chain: &str, jumps: usize, certain: bool) -> End {
        let filters = self.filters;
        let Some((name, rules)) = filters.chains.get_key_value(chain) else { return End::Falls };
        let Some(jumps) = jumps.checked_sub(1) else { return End::Falls };
        for rule in rules {
            self.rules += 1;
            let matches = if self.rules > RULES { Match::No } else { self.matches(rule) };
            if matches == Match::No {
                continue;
            }
            self.marked |= rule.marks;
            let (sure, certain) = (matches == Match::Yes, certain && matches == Match::Yes);
            let end = match &rule.verdict {
                None => continue,
                Some(Verdict::Return) => End::Falls,
                Some(Verdict::Accept) => End::Verdict,
                Some(Verdict::Drop) => {
                    *self.drops.entry((name, Some(rule.handle))).or_default() |= certain;
                    End::Verdict
                }
                Some(Verdict::Goto(to)) => self.through(to, jumps, certain),
                Some(Verdict::Jump(to)) => match self.through(to, jumps, certain) {
                    End::Falls => continue,
                    End::Verdict => End::Verdict,
                },
            };
            if sure {
                return end;
            }
        }
        End::Falls
    }

    fn matches(&self, rule: &FilterRule) -> Match {
        let is = |holds| if holds { Match::Yes } else { Match::No };
        let tests = rule.tests.iter().map(|test| match test {
            Test::Input { name, begins: true, equal } => {
                is(self.device.starts_with(name.as_str()) == *equal)
            }
            Test::Input { name, begins: false, equal } => is((self.device == name) == *equal),
            Test::Family { number, equal } => {
                let own = match self.family {
                    Family::V4 => 2,
                    Family::V6 => 10,
                };
                is((own == *number) == *equal)
            }
            Test::Mark { mask: 0, .. } => Match::Yes,
            Test::Mark { .. } if self.marked => Match::Maybe,
            Test::Mark { value, equal, .. } => is((*value == 0) == *equal),
            // The host has some route to its pods.
            Test::WayBack { strict, by_mark, exists } => {
                let found = !strict || self.way_back || *by_mark && self.by_mark;
                is(found == *exists)
            }
            Test::Unknown => Match::Maybe,
        });
        tests.min().unwrap_or(Match::Yes)
    }
}
