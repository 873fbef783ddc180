//! Checks of nf_tables chains and rules of other programs, and of legacy iptables.

use std::collections::BTreeSet;

use super::facts::{Chain, Facts};
use super::{DropHook, MarkKind, Preflight, Problem};
use crate::plan::BEFORE_SNAT;
use crate::types::Family;

/// Hook number `NF_INET_POST_ROUTING`.
const POSTROUTING: u32 = 4;

impl Preflight<'_> {
    pub(super) fn judge_firewall(&self, facts: &Facts, problems: &mut Vec<Problem>) {
        for chain in &facts.firewall.chains {
            problems.extend(self.drops(chain));
            problems.extend(self.translates_first(chain));
        }
        for used in &facts.firewall.marks {
            let shared = used.bits
                & match used.kind {
                    MarkKind::Packet => self.mark_bits(),
                    MarkKind::Connection => self.cluster.marks.connection().mask,
                };
            if shared != 0 {
                problems.push(Problem::MarkUsedByFirewall {
                    table: used.table.clone(),
                    chain: used.chain.clone(),
                    rules: used.rules,
                    kind: used.kind,
                    writes: used.writes,
                    bits: used.bits,
                    shared,
                });
            }
        }
        problems.extend(facts.saved.iter().map(|saved| Problem::SavedRules {
            file: saved.file.clone(),
            for_iptables: saved.for_iptables,
        }));
        if !facts.legacy.is_empty() {
            let both = facts.firewall.chains.iter().any(is_iptables);
            problems.push(Problem::LegacyIptables { tables: facts.legacy.clone(), both });
        }
    }

    fn drops(&self, chain: &Chain) -> Option<Problem> {
        let underlay = || self.underlay().map(Family::of).into_iter().collect();
        let (hook, families) = match chain.hook {
            1 => (DropHook::Input, underlay()),
            2 => (DropHook::Forward, self.families.clone()),
            3 => (DropHook::Output, underlay()),
            _ => return None,
        };
        (chain.drops && sees(chain, &families)).then(|| Problem::DropPolicy {
            table: chain.table.clone(),
            chain: chain.name.clone(),
            hook,
            port: self.cluster.tunnel.port,
        })
    }

    fn translates_first(&self, chain: &Chain) -> Option<Problem> {
        // At equal priority, the chain created later runs first.
        let first = chain.nat && chain.hook == POSTROUTING && chain.priority <= BEFORE_SNAT;
        (first && sees(chain, &self.families)).then(|| Problem::NatFirst {
            table: chain.table.clone(),
            chain: chain.name.clone(),
            priority: chain.priority,
            ours: BEFORE_SNAT,
        })
    }
}

fn sees(chain: &Chain, families: &BTreeSet<Family>) -> bool {
    chain.families.iter().any(|family| families.contains(family))
}

/// Returns true for a chain with the table and the chain name that iptables-nft uses.
fn is_iptables(chain: &Chain) -> bool {
    let names = ["ip filter", "ip nat", "ip mangle", "ip raw", "ip6 filter", "ip6 nat"];
    let upper = chain.name.chars().all(|c| c.is_ascii_uppercase());
    upper && names.contains(&chain.table.as_str())
}
