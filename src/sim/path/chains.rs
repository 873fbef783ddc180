//! Interpreter of our nf_tables chains: executes each statement as the kernel does.

use std::net::IpAddr;

use ipnet::IpNet;

use super::Walk;
use super::elements::{element, found, holds, id, shown};
use super::ruleset::{End, Nat, Next, Ruleset};
use super::skb::{Loaded, Skb, Tracking, load, values};
use crate::count::Count;
use crate::sim::trace::Decision;
use crate::state::{
    ChainId, Data, Direction, Firewall, Interface, Key, KeyValue, MarkOf, NftRule, Set, Stmt, Tag,
    Target, Value, Verdict,
};
use crate::types::{Family, Mark};

impl Walk<'_> {
    /// Evaluates a statement; `None` continues with the next one of the rule.
    fn statement(
        &mut self,
        firewall: &Firewall,
        chain: ChainId,
        rule: &NftRule,
        statement: &Stmt,
        skb: &mut Skb,
    ) -> Option<Next<ChainId>> {
        let here = || format!("chain {chain} {rule}");
        let holds = match statement {
            Stmt::Match { of, negated, value } => match load(*of, skb) {
                Some(Loaded::Number(found)) => (found == *value) != *negated,
                Some(Loaded::Address(_) | Loaded::Mac(_)) | None => false,
            },
            Stmt::Interface(interface, name) | Stmt::OtherInterface(interface, name) => {
                let found = match interface {
                    Interface::Input => &skb.input,
                    Interface::Output => &skb.output,
                };
                (found.as_ref() == Some(name)) == matches!(statement, Stmt::Interface(..))
            }
            Stmt::Lookup { set, negated, .. } if set.is_fleeting() => {
                self.conntrack.held.holds(*set, &skb.packet) != *negated
            }
            Stmt::Lookup { key, set, negated } => match values(key, skb) {
                Some(values) => self.is_in(firewall, *set, &values, skb) != *negated,
                None => false,
            },
            Stmt::Map { key, map, into } => {
                let key = values(key, skb).and_then(|values| element(firewall, *map, &values));
                let found = key.and_then(|key| Some((key, found(firewall, &key)?)));
                let Some((key, value)) = found else { return Some(Next::Rule) };
                return self.store(firewall, (key, value), *into, skb, here);
            }
            Stmt::SetMark(MarkOf::Packet, bits) => {
                skb.mark = bits.set_in(skb.mark);
                self.say(here(), Decision::Mark(Mark::new(skb.mark)));
                true
            }
            Stmt::SetMark(MarkOf::Connection, bits) => {
                if let Some(facts) = skb.facts_mut() {
                    facts.mark = bits.set_in(facts.mark);
                    self.say(here(), Decision::ConnectionMark(*bits));
                }
                true
            }
            Stmt::ClearPriority => {
                skb.priority = 0;
                true
            }
            Stmt::KeepSource(of) => {
                if *of != Self::family(skb.packet) {
                    return Some(Next::Rule);
                }
                self.say(here(), Decision::SourceKept);
                return Some(Next::End(End::Nat(Nat::Bound)));
            }
            Stmt::Masquerade => {
                let own = self.around.own(skb.packet.destination);
                self.say(here(), Decision::Snat(own));
                return Some(Next::End(End::Nat(Nat::Masquerade)));
            }
            // A simulated segment has no options.
            Stmt::ClampMss(of, _) => *of == Self::family(skb.packet),
            Stmt::NoTrack => {
                skb.tracking = Tracking::Untracked;
                true
            }
            // The simulated kernel offloads nothing.
            Stmt::NoOffload => false,
            // Only rules that drop have counters.
            Stmt::Counter => {
                let bytes = skb.packet.headers();
                *self.counts.drops.entry(chain.to_string()).or_default() +=
                    Count { packets: 1, bytes };
                true
            }
            Stmt::Drop => {
                self.say(here(), Decision::Dropped);
                return Some(Next::End(End::Dropped));
            }
            Stmt::Return => return Some(Next::Return),
            Stmt::Jump(to) => return Some(Next::Jump(*to)),
            Stmt::Goto(to) => {
                if *to == ChainId::Bypass {
                    self.say(here(), Decision::Bypass);
                }
                return Some(Next::Goto(*to));
            }
            Stmt::Unknown(_) => {
                self.say(here(), Decision::Unknown);
                false
            }
        };
        if holds { None } else { Some(Next::Rule) }
    }

    /// Whether a set has an element for these values; a counter of the element counts the packet.
    fn is_in(&mut self, firewall: &Firewall, set: Set, values: &[Loaded], skb: &Skb) -> bool {
        let key = element(firewall, set, values).filter(|key| holds(firewall, key));
        if let Some(counted) = key.and_then(|key| key.counted()) {
            let bytes = skb.packet.headers();
            *self.counts.policies.entry(counted).or_default() += Count { packets: 1, bytes };
        }
        key.is_some()
    }

    /// Stores the value of a map in the target of the rule.
    fn store(
        &mut self,
        firewall: &Firewall,
        (key, Value { data, comment }): (Key, Value),
        into: Target,
        skb: &mut Skb,
        here: impl Fn() -> String,
    ) -> Option<Next<ChainId>> {
        match (into, data) {
            (Target::Priority, Data::Tag(tag)) => {
                let class = Tag::new(skb.priority);
                skb.priority = tag.get();
                self.say_tag(firewall, &key, tag, class);
                None
            }
            (Target::Verdict, Data::Verdict(Verdict::Drop)) => {
                // For a policy, the rule says more than the element that all dropping policies
                // share.
                let object = match key.set() {
                    Set::Connection => shown(firewall, &key),
                    _ => here(),
                };
                self.say(object, Decision::Dropped);
                Some(Next::End(End::Dropped))
            }
            (Target::Verdict, Data::Verdict(Verdict::Goto(chain))) => {
                let direction = skb.tracking.facts().map(|facts| facts.direction);
                match (key.set(), direction) {
                    (Set::Connection, Some(Direction::Reply)) | (Set::PeerMac, _) => {
                        self.say(shown(firewall, &key), Decision::Initiator(comment));
                    }
                    (Set::Connection, _) => {
                        self.say(shown(firewall, &key), Decision::Gateway(comment));
                    }
                    _ => {}
                }
                Some(Next::Goto(chain))
            }
            (Target::Snat(of), Data::Address(address)) if of == Self::family(skb.packet) => {
                self.say(shown(firewall, &key), Decision::Snat(Some(address)));
                Some(Next::End(End::Nat(Nat::To(address))))
            }
            (Target::EthernetDestination, Data::Ethernet(mac)) => {
                skb.ethernet = Some(mac);
                self.say(shown(firewall, &key), Decision::Ethernet(mac));
                None
            }
            _ => Some(Next::Rule),
        }
    }

    /// Reports the meaning of a tag from an element; `class` is the packet's previous tag.
    fn say_tag(&mut self, firewall: &Firewall, key: &Key, tag: Tag, class: Option<Tag>) {
        let policy = |family| Decision::Policy(tag, id(firewall, family, tag));
        let decision = match key.set() {
            Set::Source(_) | Set::SourceNet(_) => Some(Decision::Class(tag)),
            Set::Destination(family, _) | Set::Any(family) => Some(policy(family)),
            _ => policy_action(firewall, tag),
        };
        if let Some(decision) = decision {
            self.say(shown(firewall, key), decision);
        }
        let parts = (key.set(), key.value(), class);
        if let (Set::Destination(_, length), KeyValue::AddressAndTag(address, _), Some(class)) =
            parts
        {
            self.overlapped(firewall, class, tag, (address, length));
        }
    }

    /// Reports the policies of the class that take the destination by a shorter prefix.
    fn overlapped(
        &mut self,
        firewall: &Firewall,
        class: Tag,
        policy: Tag,
        (address, length): (IpAddr, u8),
    ) {
        let family = Family::of(address);
        let shorter = (1..length)
            .rev()
            .filter(|length| firewall.sets.contains(&Set::Destination(family, *length)));
        let nets = shorter.filter_map(|length| IpNet::new(address, length).ok());
        let mut keys: Vec<_> = nets.map(|net| Key::destination(net.trunc(), class)).collect();
        keys.push(Key::any(family, class));
        let mut known = vec![policy];
        for key in keys {
            let Some(other) = tag(firewall, &key).filter(|other| !known.contains(other)) else {
                continue;
            };
            known.push(other);
            let id = id(firewall, family, other);
            self.say(shown(firewall, &key), Decision::Shadowed(other, id));
        }
    }
}

impl Ruleset for Firewall {
    type Chain = ChainId;
    type Rule = NftRule;

    fn rules(&self, chain: ChainId) -> Option<Vec<&NftRule>> {
        let (_, rules) = self.chains.get(&chain)?;
        Some(rules.iter().collect())
    }

    fn rule(
        &self,
        walk: &mut Walk<'_>,
        chain: ChainId,
        rule: &NftRule,
        skb: &mut Skb,
    ) -> Next<ChainId> {
        let statements = rule.0.iter();
        let next = statements.map(|statement| walk.statement(self, chain, rule, statement, skb));
        next.flatten().next().unwrap_or(Next::Rule)
    }
}

/// The decision for an action; a drop is reported by the rule that drops the packet.
fn policy_action(firewall: &Firewall, policy_action: Tag) -> Option<Decision> {
    let Value { data, comment } = found(firewall, &Key::policy_action(policy_action))?;
    match data {
        Data::Verdict(Verdict::Goto(ChainId::LocalGateway)) => Some(Decision::Local),
        Data::Verdict(Verdict::Goto(ChainId::Bypass)) => Some(Decision::Bypass),
        Data::Verdict(Verdict::Goto(_)) => Some(Decision::Gateway(comment)),
        Data::Verdict(Verdict::Drop)
        | Data::None
        | Data::Tag(_)
        | Data::Address(_)
        | Data::Ethernet(_) => None,
    }
}

fn tag(firewall: &Firewall, key: &Key) -> Option<Tag> {
    match found(firewall, key)?.data {
        Data::Tag(tag) => Some(tag),
        Data::None | Data::Address(_) | Data::Ethernet(_) | Data::Verdict(_) => None,
    }
}
