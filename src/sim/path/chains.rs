//! Interpreter of our chains: executes each statement as the kernel does.

use std::net::IpAddr;

use ipnet::IpNet;

use super::Walk;
use super::elements::{by_destination, element, found, holds, id, shown};
use super::skb::{Loaded, Skb, Tracking, load, values};
use crate::sim::trace::Decision;
use crate::state::{
    Base, ChainId, ChainType, Data, Firewall, Hook, Interface, Key, MarkOf, NftRule, Set, Stmt,
    Tag, Target, Value, Verdict,
};
use crate::types::{Family, Mark};

/// Result of a hook for a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    Accepted,
    Dropped,
    /// The packet continues, and the source translation of its connection is decided.
    Nat(Nat),
}

/// Source translation of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Nat {
    To(IpAddr),
    Masquerade,
    /// The source is kept.
    Bound,
}

/// Next step after a statement.
enum Next {
    Statement,
    /// The statement does not match; evaluation continues with the next rule.
    Rule,
    Goto(ChainId),
    Jump(ChainId),
    /// Continues after the jump that led to the chain; without a jump, ends the base chain.
    Return,
    End(End),
}

/// Maximum depth of nested jumps in the kernel (`NFT_JUMP_STACK_SIZE`).
const JUMPS: usize = 16;

/// Effective order of a base chain in its hook.
///
/// The kernel runs all NAT chains of a hook together, at one priority (`NF_IP_PRI_NAT_DST`,
/// `NF_IP_PRI_NAT_SRC`), and there in the order of their own priorities.
const fn place(base: &Base) -> (i32, i32) {
    match (base.kind, &base.hook) {
        (ChainType::Filter, _) => (base.priority, base.priority),
        (ChainType::Nat, Hook::Prerouting) => (-100, base.priority),
        (ChainType::Nat, _) => (100, base.priority),
    }
}

impl Walk<'_> {
    /// Runs the base chains of a hook; NAT chains only until the source translation is decided.
    pub(crate) fn hook(&mut self, hook: &Hook, skb: &mut Skb, mut open: bool) -> End {
        let state = self.state;
        let table = match hook {
            Hook::Egress(_) => &state.hook,
            _ => &state.firewall,
        };
        let awake = table.as_ref().filter(|firewall| !firewall.dormant);
        let Some(firewall) = awake else { return End::Accepted };
        let bases =
            firewall.chains.iter().filter_map(|(id, (base, _))| Some((*id, base.as_ref()?)));
        let mut bases: Vec<_> = bases.filter(|(_, base)| base.hook == *hook).collect();
        bases.sort_by_key(|(_, base)| place(base));
        let mut done = End::Accepted;
        for (chain, base) in bases {
            if base.kind == ChainType::Nat && !(open && skb.tracking.facts().is_some()) {
                continue;
            }
            match self.chain(firewall, chain, skb, JUMPS) {
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

    /// The verdict of a chain, if it gives one.
    fn chain(
        &mut self,
        firewall: &Firewall,
        start: ChainId,
        skb: &mut Skb,
        depth: usize,
    ) -> Option<End> {
        let mut chain = start;
        // The kernel refuses loops of chains, but a hand-written state may have one.
        'chain: for _ in 0..=firewall.chains.len() {
            let (_, rules) = firewall.chains.get(&chain)?;
            'rule: for rule in rules {
                for statement in &rule.0 {
                    match self.statement(firewall, chain, rule, statement, skb) {
                        Next::Statement => {}
                        Next::Rule => continue 'rule,
                        Next::Goto(to) => {
                            chain = to;
                            continue 'chain;
                        }
                        Next::Jump(to) => {
                            let deeper = depth.checked_sub(1)?;
                            if let Some(end) = self.chain(firewall, to, skb, deeper) {
                                return Some(end);
                            }
                        }
                        Next::Return => return None,
                        Next::End(end) => return Some(end),
                    }
                }
            }
            return None;
        }
        None
    }

    fn statement(
        &mut self,
        firewall: &Firewall,
        chain: ChainId,
        rule: &NftRule,
        statement: &Stmt,
        skb: &mut Skb,
    ) -> Next {
        let here = || format!("chain {chain} {rule}");
        let holds = match statement {
            Stmt::Match { of, negated, value } => match load(*of, skb) {
                Some(Loaded::Number(found)) => (found == *value) != *negated,
                Some(Loaded::Address(_)) | None => false,
            },
            Stmt::Interface(Interface::Input, name) => skb.input.as_ref() == Some(name),
            Stmt::Interface(Interface::Output, name) => skb.output.as_ref() == Some(name),
            Stmt::Lookup {
                set: set @ (Set::Answer(_) | Set::PortlessAnswer(_)), negated, ..
            } => self.conntrack.held.holds(*set, &skb.packet) != *negated,
            Stmt::Lookup { key, set, negated } => match values(key, skb) {
                Some(values) => self.is_in(firewall, *set, &values, skb) != *negated,
                None => false,
            },
            Stmt::Map { key, map, into } => {
                let key = values(key, skb).and_then(|values| element(firewall, *map, &values));
                let found = key.and_then(|key| Some((key, found(firewall, &key)?)));
                let Some((key, value)) = found else { return Next::Rule };
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
                    return Next::Rule;
                }
                self.say(here(), Decision::Bound);
                return Next::End(End::Nat(Nat::Bound));
            }
            Stmt::Masquerade => {
                let own = self.around.own(skb.packet.destination);
                self.say(here(), Decision::Wears(own));
                return Next::End(End::Nat(Nat::Masquerade));
            }
            Stmt::NoTrack => {
                skb.tracking = Tracking::Untracked;
                true
            }
            Stmt::Counter => true,
            Stmt::Drop => {
                self.say(here(), Decision::Dropped);
                return Next::End(End::Dropped);
            }
            Stmt::Return => return Next::Return,
            Stmt::Jump(to) => return Next::Jump(*to),
            Stmt::Goto(to) => {
                if *to == ChainId::Bypass {
                    self.say(here(), Decision::LeftAlone);
                }
                return Next::Goto(*to);
            }
            Stmt::Unknown(_) => {
                self.say(here(), Decision::Unknown);
                false
            }
        };
        if holds { Next::Statement } else { Next::Rule }
    }

    /// Whether a set has an element for these values; a counter of the element counts the packet.
    fn is_in(&mut self, firewall: &Firewall, set: Set, values: &[Loaded], skb: &Skb) -> bool {
        let key = element(firewall, set, values).filter(|key| holds(firewall, key));
        if let Some(Key::Count(family, policy)) = key {
            let count = self.counts.entry((family, policy)).or_default();
            count.packets += 1;
            count.bytes += skb.packet.headers();
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
    ) -> Next {
        match (into, data) {
            (Target::Priority, Data::Tag(tag)) => {
                let class = Tag::new(skb.priority);
                skb.priority = tag.get();
                self.say_tag(firewall, &key, tag, class);
                Next::Statement
            }
            (Target::Verdict, Data::Verdict(Verdict::Drop)) => {
                // For a policy, the rule says more than the element that all dropping policies
                // share.
                let object = match key {
                    Key::Connection(_) => shown(firewall, &key),
                    _ => here(),
                };
                self.say(object, Decision::Dropped);
                Next::End(End::Dropped)
            }
            (Target::Verdict, Data::Verdict(Verdict::Goto(chain))) => {
                if let Key::Connection(_) = key {
                    self.say(shown(firewall, &key), Decision::Gateway(comment));
                }
                Next::Goto(chain)
            }
            (Target::Snat(of), Data::Address(address)) if of == Self::family(skb.packet) => {
                self.say(shown(firewall, &key), Decision::Wears(Some(address)));
                Next::End(End::Nat(Nat::To(address)))
            }
            (Target::EthernetDestination, Data::Ethernet(mac)) => {
                skb.ethernet = Some(mac);
                self.say(shown(firewall, &key), Decision::Ethernet(mac));
                Next::Statement
            }
            _ => Next::Rule,
        }
    }

    /// Reports the meaning of a tag from an element; `class` is the packet's previous tag.
    fn say_tag(&mut self, firewall: &Firewall, key: &Key, tag: Tag, class: Option<Tag>) {
        let policy = |family| Decision::Policy(tag, id(firewall, family, tag));
        let decision = match key {
            Key::Source(_) | Key::SourceNet(_) => Some(Decision::Class(tag)),
            Key::Destination(net, _) => Some(policy(Family::of(net.addr()))),
            Key::Any(family, _) => Some(policy(*family)),
            _ => way_out(firewall, tag),
        };
        if let Some(decision) = decision {
            self.say(shown(firewall, key), decision);
        }
        if let (Key::Destination(net, _), Some(class)) = (key, class) {
            self.overlapped(firewall, class, tag, *net);
        }
    }

    /// Reports the policies of the class that take the destination by a shorter prefix.
    fn overlapped(&mut self, firewall: &Firewall, class: Tag, policy: Tag, net: IpNet) {
        let family = Family::of(net.addr());
        let shorter = (1..net.prefix_len())
            .rev()
            .filter(|length| firewall.sets.contains(&Set::Destination(family, *length)));
        let mut keys: Vec<_> =
            shorter.filter_map(|length| by_destination(net.addr(), length, class)).collect();
        keys.push(Key::Any(family, class));
        let mut known = vec![policy];
        for key in keys {
            let Some(other) = tag(firewall, &key).filter(|other| !known.contains(other)) else {
                continue;
            };
            known.push(other);
            let id = id(firewall, family, other);
            self.say(shown(firewall, &key), Decision::Overlapped(other, id));
        }
    }
}

/// The decision for an action; a drop is reported by the rule that drops the packet.
fn way_out(firewall: &Firewall, way_out: Tag) -> Option<Decision> {
    let Value { data, comment } = found(firewall, &Key::Verdict(way_out))?;
    match data {
        Data::Verdict(Verdict::Goto(ChainId::Here)) => Some(Decision::Here),
        Data::Verdict(Verdict::Goto(ChainId::Bypass)) => Some(Decision::LeftAlone),
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
