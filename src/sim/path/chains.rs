//! The interpreter of our chains: what the kernel does with each statement.

use std::net::IpAddr;

use super::Walk;
use super::elements::{by_address, by_destination, by_tag, found, has_address, holds, id, shown};
use super::skb::{Skb, Tracking};
use crate::sim::packet::Packet;
use crate::sim::trace::Decision;
use crate::state::{
    Base, ChainId, ChainType, Data, Firewall, Hook, Key, MarkBits, NftRule, Set, Stmt, Tag, Value,
    Verdict,
};
use crate::types::{Family, Mark};

/// How a hook ends for a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    Accepted,
    Dropped,
    /// It goes on, and its connection's source is decided.
    Nat(Nat),
}

/// What becomes of a connection's source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Nat {
    To(IpAddr),
    Masquerade,
    /// Bound to what it is.
    Bound,
}

/// What comes after a statement.
enum Next {
    Statement,
    /// The statement does not hold: the next rule.
    Rule,
    Goto(ChainId),
    Jump(ChainId),
    /// Back behind the jump that led here; out of the base chain if there was none.
    Return,
    End(End),
}

/// Jumps within jumps that the kernel takes (`NFT_JUMP_STACK_SIZE`).
const JUMPS: usize = 16;

/// Where a base chain really runs: the kernel calls all NAT chains of a hook together, at one
/// place (`NF_IP_PRI_NAT_DST`, `NF_IP_PRI_NAT_SRC`), and there in the order of their priorities.
const fn place(base: &Base) -> (i32, i32) {
    match (base.kind, &base.hook) {
        (ChainType::Filter, _) => (base.priority, base.priority),
        (ChainType::Nat, Hook::Prerouting) => (-100, base.priority),
        (ChainType::Nat, _) => (100, base.priority),
    }
}

impl Walk<'_> {
    /// Runs the base chains of a hook; NAT chains only while the connection's source is open.
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
        // The kernel refuses loops of chains, a state by hand may have one.
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
        let Packet { source, destination, protocol, .. } = skb.packet;
        let family = Self::family(skb.packet);
        let here = || format!("chain {chain} {rule}");
        let holds = match statement {
            Stmt::InputDevice(name) => skb.input.as_ref() == Some(name),
            Stmt::OutputDevice(name) => skb.output.as_ref() == Some(name),
            Stmt::MarkIs { mask, value } => skb.mark & mask == *value,
            Stmt::MarkIsNot { mask, value } => skb.mark & mask != *value,
            Stmt::MarkIn { mask, set: Set::Gateway } => {
                holds(firewall, &Key::Gateway(Mark::new(skb.mark & mask)))
            }
            // What opens a connection is taken to be where one begins.
            Stmt::MarkIn { .. } | Stmt::TcpWithoutSyn => false,
            Stmt::SourceIn(set) => has_address(firewall, *set, source) == Some(true),
            Stmt::SourceNotIn(set) => has_address(firewall, *set, source) == Some(false),
            Stmt::DestinationIn(set) => has_address(firewall, *set, destination) == Some(true),
            Stmt::DestinationNotIn(set) => has_address(firewall, *set, destination) == Some(false),
            Stmt::PacketIn(set) => self.conntrack.held.holds(*set, &skb.packet),
            Stmt::CtDirection(direction) => {
                skb.tracking.facts().is_some_and(|facts| facts.direction == *direction)
            }
            Stmt::CtState(bits) => skb.tracking.state() & bits != 0,
            Stmt::NotTranslated => skb.tracking.facts().is_some_and(|facts| !facts.translated),
            Stmt::CtMarkIs(bits) => skb.tracking.facts().is_some_and(|f| bits.are_in(f.mark)),
            Stmt::CtMarkIsNot(bits) => skb.tracking.facts().is_some_and(|f| !bits.are_in(f.mark)),
            Stmt::SetCtMark(bits) => {
                let MarkBits { mask, value } = *bits;
                if let Some(facts) = skb.facts_mut() {
                    facts.mark = facts.mark & !mask | value;
                    self.say(here(), Decision::ConnectionMark(*bits));
                }
                true
            }
            Stmt::VerdictByCtMark { mask, set } => {
                return self.verdict_by_connection(firewall, *mask, *set, skb);
            }
            // Of a protocol without ports, what comes behind asks for the protocol.
            Stmt::Port(port) => skb.packet.destination_port == *port,
            Stmt::UdpPort(port) => protocol == Packet::UDP && skb.packet.destination_port == *port,
            Stmt::Icmp6Type(kind) => {
                protocol == Packet::ICMP6 && skb.packet.destination_port >> 8 == u16::from(*kind)
            }
            Stmt::SetMark { keep, value } => {
                skb.mark = skb.mark & keep | value;
                self.say(here(), Decision::Mark(Mark::new(skb.mark)));
                true
            }
            Stmt::SetNextHop { mask } => self.next_hop(firewall, *mask, skb),
            Stmt::ClearTag => {
                skb.priority = 0;
                true
            }
            Stmt::TagBySource(set) => self.tag_by_address(firewall, *set, source, skb),
            Stmt::TagByReceiver(set) => self.tag_by_address(firewall, *set, destination, skb),
            Stmt::TagByDestination(of, length) => {
                *of == family && self.tag_by_net(firewall, destination, *length, skb)
            }
            Stmt::TagBySender(of, length) => {
                *of == family && self.tag_by_net(firewall, source, *length, skb)
            }
            Stmt::TagByTag(set) => self.tag_by_tag(firewall, *set, skb),
            Stmt::TagIn(set) => self.has_tag(firewall, *set, skb),
            Stmt::HasNoOutput => !skb.routed,
            Stmt::VerdictByTag(set) => return self.verdict_by_tag(firewall, *set, skb, here),
            Stmt::SnatToSource(of) => {
                if *of != family {
                    return Next::Rule;
                }
                self.say(here(), Decision::Bound);
                return Next::End(End::Nat(Nat::Bound));
            }
            Stmt::SnatByTag(of) => return self.snat_by_tag(firewall, *of, skb),
            Stmt::Masquerade => {
                self.say(here(), Decision::Wears(self.around.own(destination)));
                return Next::End(End::Nat(Nat::Masquerade));
            }
            Stmt::NoTrack => {
                skb.tracking = Tracking::Untracked;
                true
            }
            // Packets of the host's own processes, which came in by no device, are not walked.
            Stmt::HasInput | Stmt::Counter => true,
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

    /// Whether the packet's tag is in a set, which counts it if it does.
    fn has_tag(&mut self, firewall: &Firewall, set: Set, skb: &Skb) -> bool {
        let key = by_tag(set, skb.priority).filter(|key| holds(firewall, key));
        if let Some(Key::Count(family, policy)) = key {
            let count = self.counts.entry((family, policy)).or_default();
            count.packets += 1;
            count.bytes += skb.packet.headers();
        }
        key.is_some()
    }

    fn next_hop(&mut self, firewall: &Firewall, mask: u32, skb: &mut Skb) -> bool {
        let key = Key::NextHop(Mark::new(skb.mark & mask));
        let Some(Value { data: Data::Ethernet(mac), .. }) = found(firewall, &key) else {
            return false;
        };
        skb.ethernet = Some(mac);
        self.say(shown(firewall, &key), Decision::Ethernet(mac));
        true
    }

    fn verdict_by_tag(
        &mut self,
        firewall: &Firewall,
        set: Set,
        skb: &Skb,
        here: impl Fn() -> String,
    ) -> Next {
        let value = by_tag(set, skb.priority).and_then(|key| found(firewall, &key));
        match value.map(|value| value.data) {
            Some(Data::Verdict(Verdict::Drop)) => {
                self.say(here(), Decision::Dropped);
                Next::End(End::Dropped)
            }
            Some(Data::Verdict(Verdict::Goto(chain))) => Next::Goto(chain),
            Some(Data::None | Data::Tag(_) | Data::Address(_) | Data::Ethernet(_)) | None => {
                Next::Rule
            }
        }
    }

    fn verdict_by_connection(
        &mut self,
        firewall: &Firewall,
        mask: u32,
        set: Set,
        skb: &Skb,
    ) -> Next {
        let (Set::Connection, Some(facts)) = (set, skb.tracking.facts()) else { return Next::Rule };
        let key = Key::Connection(Mark::new(facts.mark & mask));
        let Some(Value { data: Data::Verdict(verdict), comment }) = found(firewall, &key) else {
            return Next::Rule;
        };
        match verdict {
            Verdict::Drop => {
                self.say(shown(firewall, &key), Decision::Dropped);
                Next::End(End::Dropped)
            }
            Verdict::Goto(chain) => {
                self.say(shown(firewall, &key), Decision::Gateway(comment));
                Next::Goto(chain)
            }
        }
    }

    fn snat_by_tag(&mut self, firewall: &Firewall, of: Family, skb: &Skb) -> Next {
        let key = by_tag(Set::Snat(of), skb.priority);
        let Some(key) = key.filter(|_| of == Self::family(skb.packet)) else { return Next::Rule };
        let Some(Value { data: Data::Address(address), .. }) = found(firewall, &key) else {
            return Next::Rule;
        };
        self.say(shown(firewall, &key), Decision::Wears(Some(address)));
        Next::End(End::Nat(Nat::To(address)))
    }

    fn tag_by_address(
        &mut self,
        firewall: &Firewall,
        set: Set,
        address: IpAddr,
        skb: &mut Skb,
    ) -> bool {
        let Some(key) = by_address(firewall, set, address) else { return false };
        let Some(class) = tag(firewall, &key) else { return false };
        skb.priority = class.get();
        self.say(shown(firewall, &key), Decision::Class(class));
        true
    }

    fn tag_by_net(
        &mut self,
        firewall: &Firewall,
        destination: IpAddr,
        length: u8,
        skb: &mut Skb,
    ) -> bool {
        let Some(class) = Tag::new(skb.priority) else { return false };
        let Some(key) = by_destination(destination, length, class) else { return false };
        let Some(policy) = tag(firewall, &key) else { return false };
        skb.priority = policy.get();
        let id = id(firewall, Family::of(destination), policy);
        self.say(shown(firewall, &key), Decision::Policy(policy, id));
        self.overlapped(firewall, class, policy, destination, length);
        true
    }

    /// The policies of the class that take the destination by a shorter prefix.
    fn overlapped(
        &mut self,
        firewall: &Firewall,
        class: Tag,
        policy: Tag,
        destination: IpAddr,
        length: u8,
    ) {
        let family = Family::of(destination);
        let shorter = (1..length)
            .rev()
            .filter(|length| firewall.sets.contains(&Set::Destination(family, *length)));
        let mut keys: Vec<_> =
            shorter.filter_map(|length| by_destination(destination, length, class)).collect();
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

    fn tag_by_tag(&mut self, firewall: &Firewall, set: Set, skb: &mut Skb) -> bool {
        let Some(key) = by_tag(set, skb.priority) else { return false };
        let Some(found_tag) = tag(firewall, &key) else { return false };
        skb.priority = found_tag.get();
        let decision = match set {
            Set::Any(family) => Some(Decision::Policy(found_tag, id(firewall, family, found_tag))),
            _ => way_out(firewall, found_tag),
        };
        if let Some(decision) = decision {
            self.say(shown(firewall, &key), decision);
        }
        true
    }
}

/// What a way out means; one that is closed is told of by who drops the packet.
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
