//! Runs the chains of a netfilter hook in their order.

use std::ops::RangeInclusive;

use super::ruleset::{End, Nat, Next, Ruleset};
use super::skb::Skb;
use super::{Walk, xtables};
use crate::state::{Base, ChainId, ChainType, Firewall, Hook, XtName, XtTable};

/// Maximum depth of nested jumps in the kernel (`NFT_JUMP_STACK_SIZE`).
const JUMPS: usize = 16;

/// Maximum number of `goto`s one after the other.
///
/// The kernel refuses loops of chains, but a hand-written state may have one.
const GOTOS: usize = 64;

/// A base chain: of the nf_tables table, or a built-in chain of an iptables table.
enum BaseChain<'a> {
    Nft(&'a Firewall, ChainId),
    Iptables(xtables::Table<'a>, XtName),
}

/// Effective order of a base chain in its hook.
///
/// The kernel runs all NAT chains of a hook together, at one priority (`NF_IP_PRI_NAT_DST`,
/// `NF_IP_PRI_NAT_SRC`), and there in the order of their own priorities.
const fn place(base: &Base) -> (i32, i32) {
    match (base.kind, &base.hook) {
        (ChainType::Filter, _) => (base.priority, base.priority),
        (ChainType::Nat, Hook::Prerouting) => (DESTINATION_NAT, base.priority),
        (ChainType::Nat, _) => (100, base.priority),
    }
}

/// Priority of destination NAT at prerouting (`NF_IP_PRI_NAT_DST`).
pub(super) const DESTINATION_NAT: i32 = -100;

impl<'a> Walk<'a> {
    /// Runs the base chains of a hook; NAT chains only until the source translation is decided.
    pub(super) fn hook(&mut self, hook: &Hook, skb: &mut Skb, open: bool) -> End {
        self.hook_within(hook, skb, open, i32::MIN..=i32::MAX)
    }

    /// Runs the base chains of a hook that have these priorities.
    pub(super) fn hook_within(
        &mut self,
        hook: &Hook,
        skb: &mut Skb,
        mut open: bool,
        priorities: RangeInclusive<i32>,
    ) -> End {
        let mut bases = self.base_chains(hook, skb);
        bases.retain(|((priority, _), ..)| priorities.contains(priority));
        bases.sort_by_key(|(place, ..)| *place);
        let mut done = End::Accepted;
        for (_, kind, base) in bases {
            if kind == ChainType::Nat && !(open && skb.tracking.facts().is_some()) {
                continue;
            }
            let end = match base {
                BaseChain::Nft(table, chain) => self.chain(table, chain, skb, JUMPS),
                BaseChain::Iptables(table, chain) => self.chain(&table, chain, skb, JUMPS),
            };
            match end {
                Some(End::Dropped) => return End::Dropped,
                Some(End::Nat(nat)) => {
                    open = false;
                    done = End::Nat(nat);
                    if let (Some(facts), false) = (skb.facts_mut(), nat == Nat::Bound) {
                        facts.translated = true;
                    }
                }
                Some(End::Accepted) | None => {}
            }
        }
        done
    }

    /// The base chains of a hook, each with its order and type.
    fn base_chains(&self, hook: &Hook, skb: &Skb) -> Vec<((i32, i32), ChainType, BaseChain<'a>)> {
        let state = self.state;
        let table = match hook {
            Hook::Egress(_) => &state.hook,
            _ => &state.firewall,
        };
        let awake = table.iter().filter(|firewall| !firewall.dormant);
        let mut all: Vec<_> = awake
            .flat_map(|firewall| {
                let bases = firewall.chains.iter();
                let bases = bases.filter_map(|(id, (base, _))| Some((*id, base.as_ref()?)));
                let here = bases.filter(|(_, base)| base.hook == *hook);
                here.map(move |(id, base)| (place(base), base.kind, BaseChain::Nft(firewall, id)))
            })
            .collect();
        let built_in = match hook {
            Hook::Prerouting => XtName::Prerouting,
            Hook::Input => XtName::Input,
            Hook::Forward => XtName::Forward,
            Hook::Output => XtName::Output,
            Hook::Postrouting => XtName::Postrouting,
            Hook::Egress(_) => return all,
        };
        let family = Self::family(skb.packet);
        for (table, rules) in xtables::Table::all(state, family, built_in) {
            // `NF_IP_PRI_MANGLE`, `NF_IP_PRI_FILTER`, `NF_IP_PRI_NAT_SRC`; no rule of ours is in
            // the nat table at another hook.
            let (priority, kind) = match table {
                XtTable::Mangle => (-150, ChainType::Filter),
                XtTable::Filter => (0, ChainType::Filter),
                XtTable::Nat => (100, ChainType::Nat),
            };
            all.push(((priority, priority), kind, BaseChain::Iptables(rules, built_in)));
        }
        all
    }

    /// The verdict of a chain, if it gives one.
    fn chain<R: Ruleset>(
        &mut self,
        table: &R,
        start: R::Chain,
        skb: &mut Skb,
        depth: usize,
    ) -> Option<End> {
        let mut chain = start;
        'chain: for _ in 0..GOTOS {
            for rule in table.rules(chain)? {
                match table.rule(self, chain, rule, skb) {
                    Next::Rule => {}
                    Next::Goto(to) => {
                        chain = to;
                        continue 'chain;
                    }
                    Next::Jump(to) => {
                        if let Some(end) = self.chain(table, to, skb, depth.checked_sub(1)?) {
                            return Some(end);
                        }
                    }
                    Next::Return => return None,
                    Next::End(end) => return Some(end),
                }
            }
            return None;
        }
        None
    }
}
