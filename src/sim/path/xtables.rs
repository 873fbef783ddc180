//! Interpreter of our iptables chains.

use std::collections::BTreeMap;

use super::Walk;
use super::ruleset::{End, Nat, Next, Ruleset};
use super::skb::{Loaded, Skb, load};
use crate::sim::packet::Packet;
use crate::sim::trace::Decision;
use crate::state::{
    Comment, Direction, Field, Ipset, IpsetContents, Is, MarkBits, Mask, Member, Selector, Side,
    State, Stmt, XtChain, XtMatch, XtName, XtRule, XtTable, XtTarget, Xtables,
};
use crate::types::{Family, Mark};

/// The chains of one table, for packets of one family.
pub(super) struct Table<'a> {
    chains: &'a Xtables,
    sets: &'a BTreeMap<Ipset, IpsetContents>,
    family: Family,
    name: XtTable,
}

impl<'a> Table<'a> {
    /// The tables of both variants that have rules in a built-in chain, with the table's name.
    pub(super) fn all(
        state: &'a State,
        family: Family,
        name: XtName,
    ) -> impl Iterator<Item = (XtTable, Self)> {
        state.xtables.values().flat_map(move |tables| {
            XtTable::ALL.into_iter().filter_map(move |table| {
                tables.jumps.get(&XtChain { family, table, name })?;
                let sets = &state.ipsets;
                Some((table, Table { chains: tables, sets, family, name: table }))
            })
        })
    }

    const fn chain(&self, name: XtName) -> XtChain {
        XtChain { family: self.family, table: self.name, name }
    }

    fn matches(&self, one: &XtMatch, skb: &Skb) -> bool {
        let number = |field, mask| match load(Selector { field, mask }, skb) {
            Some(Loaded::Number(number)) => Some(number),
            Some(Loaded::Address(_) | Loaded::Mac(_)) | None => None,
        };
        let has = |field, MarkBits { mask, value }| {
            number(field, Mask::Bits(mask)).map(|found| found == value)
        };
        let any = |field, mask| number(field, Mask::Bits(mask)).map(|found| found != 0);
        let (is, found) = match one {
            XtMatch::InputDevice(is, name) => (*is, Some(skb.input.as_ref() == Some(name))),
            XtMatch::OutputDevice(name) => (Is::So, Some(skb.output.as_ref() == Some(name))),
            XtMatch::UdpPort(port) => {
                let found = number(Field::UdpDestinationPort, Mask::Whole);
                (Is::So, found.map(|found| found == u32::from(*port)))
            }
            XtMatch::Udp => (Is::So, Some(skb.packet.protocol == Packet::UDP)),
            XtMatch::OpensNothing => {
                let mask = Stmt::SYN | Stmt::ACK;
                (Is::Not, has(Field::TcpFlags, MarkBits { mask, value: Stmt::SYN }))
            }
            XtMatch::Syn => {
                (Is::So, has(Field::TcpFlags, MarkBits { mask: Stmt::SYN, value: Stmt::SYN }))
            }
            XtMatch::Socket => (Is::So, Some(skb.wildcard == Some(false))),
            XtMatch::AnySocket => (Is::So, Some(skb.wildcard.is_some())),
            XtMatch::Mark(is, bits) => (*is, has(Field::Mark, *bits)),
            XtMatch::Connmark(is, bits) => (*is, has(Field::CtMark, *bits)),
            XtMatch::Direction(direction) => {
                let found = skb.tracking.facts().map(|facts| facts.direction);
                (Is::So, found.map(|found: Direction| found == *direction))
            }
            XtMatch::State(is, state) => (*is, any(state.field(), state.bits())),
            XtMatch::Confirmed(is) => (*is, any(Field::CtStatus, Stmt::CONFIRMED)),
            XtMatch::Set(is, set, side) => {
                let address = match side {
                    Side::Src => skb.packet.source,
                    Side::Dst => skb.packet.destination,
                };
                (*is, Some(self.sets.get(set).is_some_and(|set| set.has(address))))
            }
        };
        // A packet without such a field, such as one that is not tracked, matches neither way.
        found.is_some_and(|found| found == (is == Is::So))
    }

    /// The comment of the chain that sets a gateway's mark, which has the name of the gateway.
    fn gateway(&self, mark: Mark) -> Option<Comment> {
        let rules = self.chains.chains.get(&self.chain(XtName::To(mark)))?;
        let name = rules.first()?.comment.strip_prefix("egress gateway: ")?;
        Some(Comment::of_name(name))
    }
}

impl Ruleset for Table<'_> {
    type Chain = XtName;
    type Rule = XtRule;

    fn rules(&self, chain: XtName) -> Option<Vec<&XtRule>> {
        let id = self.chain(chain);
        if chain.is_built_in() {
            return Some(self.chains.jumps.get(&id)?.iter().map(|(_, rule)| rule).collect());
        }
        Some(self.chains.chains.get(&id)?.iter().collect())
    }

    fn rule(
        &self,
        walk: &mut Walk<'_>,
        chain: XtName,
        rule: &XtRule,
        skb: &mut Skb,
    ) -> Next<XtName> {
        if !rule.matches.iter().all(|one| self.matches(one, skb)) {
            return Next::Rule;
        }
        let here = || format!("{} {chain} {rule}", self.name.name());
        match &rule.target {
            XtTarget::Accept => Next::End(End::Accepted),
            XtTarget::Return => Next::Return,
            XtTarget::Jump(to) => Next::Jump(*to),
            XtTarget::Goto(to) => {
                match to {
                    XtName::To(mark) => walk.say(here(), Decision::Gateway(self.gateway(*mark))),
                    XtName::Local => walk.say(here(), Decision::Local),
                    _ => {}
                }
                Next::Goto(*to)
            }
            XtTarget::Drop | XtTarget::Sink => {
                walk.say(here(), Decision::Dropped);
                Next::End(End::Dropped)
            }
            XtTarget::SetMark(bits) => {
                skb.mark = bits.set_in(skb.mark);
                walk.say(here(), Decision::Mark(Mark::new(skb.mark)));
                Next::Rule
            }
            XtTarget::SetConnmark(bits) => {
                if let Some(facts) = skb.facts_mut() {
                    facts.mark = bits.set_in(facts.mark);
                    walk.say(here(), Decision::ConnectionMark(*bits));
                }
                Next::Rule
            }
            XtTarget::MapMark(set) => {
                let found = self.sets.get(set).and_then(|found| found.longest(skb.packet.source));
                if let Some((net, Member::Marked(bits))) = found {
                    skb.mark = bits.set_in(skb.mark);
                    let member = format!("ipset {set} {net}");
                    walk.say(member, Decision::Mark(Mark::new(skb.mark)));
                }
                Next::Rule
            }
            XtTarget::Snat(address) => {
                walk.say(here(), Decision::Snat(Some(*address)));
                Next::End(End::Nat(Nat::To(*address)))
            }
            // A simulated segment has no options.
            XtTarget::ClampMss(_) => Next::Rule,
            XtTarget::Masquerade => {
                let own = walk.around.own(skb.packet.destination);
                walk.say(here(), Decision::Snat(own));
                Next::End(End::Nat(Nat::Masquerade))
            }
            XtTarget::Netmap(_) => {
                walk.say(here(), Decision::SourceKept);
                Next::End(End::Nat(Nat::Bound))
            }
            XtTarget::Unknown(_) => {
                walk.say(here(), Decision::Unknown);
                Next::Rule
            }
        }
    }
}
