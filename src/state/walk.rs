//! Evaluates our iptables rules for a packet, as the kernel does.

use std::collections::BTreeMap;
use std::net::IpAddr;

use super::lookup::Action;
use crate::rules::ipset::{Ipset, IpsetContents, Member};
use crate::rules::iptables::{
    Is, Side, XtChain, XtMatch, XtName, XtRule, XtTable, XtTarget, Xtables,
};
use crate::rules::stmt::{Direction, MarkBits};
use crate::types::{Family, Mark};

/// The ipsets that the rules match.
pub(crate) type Ipsets = BTreeMap<Ipset, IpsetContents>;

/// Maximum depth of nested chains that are followed; our chains nest four deep.
const DEEPEST: u8 = 16;

/// The first packet of a connection from a pod.
struct Packet<'a> {
    chains: &'a BTreeMap<XtChain, Vec<XtRule>>,
    sets: &'a Ipsets,
    source: IpAddr,
    destination: IpAddr,
    mark: u32,
}

/// Result of a chain.
enum End {
    /// End of the chain, or `RETURN`.
    Through,
    Dropped,
    Translated(Option<IpAddr>),
}

impl Xtables {
    /// The action for the first packet of a connection, by its destination after destination NAT.
    pub(crate) fn action(&self, sets: &Ipsets, source: IpAddr, destination: IpAddr) -> Action {
        let mut packet = Packet { chains: &self.chains, sets, source, destination, mark: 0 };
        let family = Family::of(source);
        // The jump to the chain has this match.
        if !packet.holds(&XtMatch::Set(Is::So, Ipset::Selected(family), Side::Src)) {
            return Action::None;
        }
        if let End::Dropped = packet.walk(XtTable::Mangle, XtName::MarkRequest, 0) {
            return Action::Deny;
        }
        if packet.mark == 0 {
            return Action::None;
        }
        let chain = |name| self.chains.get(&XtChain { family, table: XtTable::Mangle, name });
        let closed = chain(XtName::Denied).into_iter().flatten();
        if closed
            .map(|rule| &rule.target)
            .any(|target| matches!(target, XtTarget::SetMark(bits) if bits.are_in(packet.mark)))
        {
            return Action::Deny;
        }
        let mark = Mark::new(packet.mark);
        if chain(XtName::To(mark)).is_some() {
            return Action::Gateway(mark);
        }
        match packet.walk(XtTable::Nat, XtName::SnatEip, 0) {
            End::Translated(address) => Action::Local(address),
            End::Through | End::Dropped => Action::Deny,
        }
    }

    /// The bits of a connection mark that say that we translated the connection or exempted it.
    pub(crate) fn connection_mark(&self) -> Option<MarkBits> {
        let chains = self.chains.iter().filter(|(chain, _)| chain.name == XtName::NoSnat);
        chains.flat_map(|(_, rules)| rules).find_map(|rule| match rule.target {
            XtTarget::SetConnmark(bits) => Some(bits),
            _ => None,
        })
    }
}

impl Packet<'_> {
    fn walk(&mut self, table: XtTable, name: XtName, depth: u8) -> End {
        let chain = XtChain { family: Family::of(self.source), table, name };
        let chains = self.chains;
        let rules = chains.get(&chain).map(Vec::as_slice).unwrap_or_default();
        for rule in rules {
            if !rule.matches.iter().all(|one| self.holds(one)) {
                continue;
            }
            match &rule.target {
                XtTarget::Drop | XtTarget::Sink => return End::Dropped,
                XtTarget::Snat(address) => return End::Translated(Some(*address)),
                XtTarget::Masquerade => return End::Translated(None),
                XtTarget::SetMark(bits) => self.mark = self.mark & !bits.mask | bits.value,
                XtTarget::MapMark(set) => {
                    if let Some(Member::Marked(bits)) = self.member(*set, self.source) {
                        self.mark = self.mark & !bits.mask | bits.value;
                    }
                }
                XtTarget::Goto(next) if depth < DEEPEST => {
                    return self.walk(table, *next, depth + 1);
                }
                XtTarget::Jump(next) if depth < DEEPEST => match self.walk(table, *next, depth + 1)
                {
                    End::Through => {}
                    end => return end,
                },
                XtTarget::SetConnmark(_) | XtTarget::ClampMss(_) | XtTarget::Unknown(_) => {}
                _ => return End::Through,
            }
        }
        End::Through
    }

    fn holds(&self, one: &XtMatch) -> bool {
        match one {
            // The packet comes from a pod and has none of the properties that these matches test.
            XtMatch::OutputDevice(_)
            | XtMatch::UdpPort(_)
            | XtMatch::Udp
            | XtMatch::OpensNothing
            | XtMatch::Syn
            | XtMatch::Socket
            | XtMatch::AnySocket => false,
            XtMatch::Mark(is, bits) => bits.are_in(self.mark) == (*is == Is::So),
            XtMatch::Connmark(is, bits) => bits.are_in(0) == (*is == Is::So),
            XtMatch::Direction(direction) => *direction == Direction::Original,
            XtMatch::InputDevice(is, _) | XtMatch::State(is, _) | XtMatch::Confirmed(is) => {
                *is == Is::Not
            }
            XtMatch::Set(is, set, side) => {
                let address = match side {
                    Side::Src => self.source,
                    Side::Dst => self.destination,
                };
                let found = self.member(*set, address).is_some_and(|found| found != Member::Not);
                found == (*is == Is::So)
            }
        }
    }

    fn member(&self, set: Ipset, address: IpAddr) -> Option<Member> {
        self.sets.get(&set)?.longest(address).map(|(_, member)| member)
    }
}
