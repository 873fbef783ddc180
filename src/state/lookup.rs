//! Evaluates the maps of a [`Firewall`] for a packet, as the kernel does.

use std::net::IpAddr;

use ipnet::IpNet;

use super::{
    ChainId, Data, Direction, Field, Firewall, Key, MarkBits, MarkOf, Mask, Set, State, Stmt, Tag,
    Verdict, Xtables,
};
use crate::range::IpRange;
use crate::types::{Family, Mark};

/// The action for a packet, by its source and its destination after destination NAT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// No policy takes the packet.
    None,
    /// The packet is dropped.
    Deny,
    /// The packet is sent to the gateway with this mark.
    Gateway(Mark),
    /// The packet leaves from this node with this source address; `None` is the node's own address.
    Local(Option<IpAddr>),
}

/// The part of connection marks that caches the gateway of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cached {
    /// Bits that say that a gateway is cached.
    pub(crate) some: MarkBits,
    /// Mask of the bits that identify the gateway.
    pub(crate) mask: u32,
}

/// The action for the first packet of a connection, by its source and its real destination.
///
/// If both nf_tables and iptables have our rules, one backend is about to be removed and they
/// agree.
pub fn action(state: &State, source: IpAddr, destination: IpAddr) -> Action {
    match (&state.firewall, state.xtables.values().next()) {
        (Some(firewall), _) => firewall.action(source, destination),
        (None, Some(tables)) => tables.action(&state.ipsets, source, destination),
        (None, None) => Action::None,
    }
}

impl State {
    /// The bits of a connection mark that say that we translated the connection or exempted it.
    pub(crate) fn connection_mark(&self) -> Option<MarkBits> {
        let tables = || self.xtables.values().find_map(Xtables::connection_mark);
        self.firewall.as_ref().and_then(Firewall::connection_mark).or_else(tables)
    }

    /// The mark of a connection that enters the tunnel on this node.
    pub(crate) fn bound_mark(&self) -> Option<MarkBits> {
        let bound = self.firewall.as_ref().and_then(Firewall::bound_mark);
        bound.or_else(|| self.connection_mark())
    }

    /// Returns true with replies by the tunnel: connection marks have the node of the initiator.
    pub(crate) fn returns_replies(&self) -> bool {
        self.firewall.as_ref().is_some_and(|table| table.sets.contains(&Set::PeerMac))
    }

    /// Returns true if a connection mark has the value of this gateway.
    pub(crate) fn replies_go_to(&self, gateway: Mark, mark: u32) -> bool {
        let Some(bound) = self.bound_mark() else { return false };
        let prefix = self.connection_mark().map_or(0, |bits| bits.mask);
        (mark ^ gateway.get()) & bound.mask & !prefix == 0
    }

    /// Whether a guard drops packets with this connection mark that are not steered or translated.
    ///
    /// A connection with such a mark is ours, even if connections get other marks now.
    pub(crate) fn holds_back(&self, mark: u32) -> bool {
        self.held_back().any(|bits| bits.are_in(mark))
    }

    /// The bits of connection marks whose packets a guard drops if they are not steered or
    /// translated.
    pub(crate) fn held_back(&self) -> impl Iterator<Item = MarkBits> + '_ {
        self.firewall.iter().flat_map(Firewall::held_back)
    }

    /// The connection mark bits that cache the gateway, where the first packet decides for all.
    pub(crate) fn cached(&self) -> Option<Cached> {
        self.firewall.as_ref().and_then(Firewall::cached)
    }

    /// Whether an address is an egress IP that connections use as source on this node.
    pub(crate) fn is_local_egress_ip(&self, address: IpAddr) -> bool {
        let spoken = |table: &Firewall| table.elements.contains_key(&Key::eip(address));
        self.firewall.as_ref().is_some_and(spoken)
    }

    /// Whether the state has no rules that mark or translate.
    pub(crate) fn decides_nothing(&self) -> bool {
        self.firewall.is_none() && self.xtables.is_empty()
    }
}

impl Firewall {
    fn action(&self, source: IpAddr, destination: IpAddr) -> Action {
        let family = Family::of(source);
        let Some(policy) = self.class_of(source).and_then(|class| {
            let excluded =
                self.overlapping(&Key::excluded(IpRange::from(IpNet::from(destination))));
            if excluded.is_some() { None } else { self.policy_of(class, destination) }
        }) else {
            return Action::None;
        };
        let action = self.tag(&Key::steer(family, policy));
        match action
            .and_then(|tag| self.elements.get(&Key::policy_action(tag)))
            .map(|value| value.data)
        {
            Some(Data::Verdict(Verdict::Goto(ChainId::To(mark)))) => Action::Gateway(mark),
            Some(Data::Verdict(Verdict::Goto(ChainId::LocalGateway))) => {
                self.translation(family, policy)
            }
            Some(Data::Verdict(Verdict::Goto(ChainId::Bypass))) => Action::None,
            _ => Action::Deny,
        }
    }

    fn class_of(&self, source: IpAddr) -> Option<Tag> {
        self.tag(&Key::source(source)).or_else(|| {
            let here = Key::source_net(IpRange::from(IpNet::from(source)));
            self.tag(self.overlapping(&here)?)
        })
    }

    fn policy_of(&self, class: Tag, destination: IpAddr) -> Option<Tag> {
        let family = Family::of(destination);
        let lengths = self.sets.range(Set::Destination(family, 0)..=Set::Destination(family, 128));
        lengths
            .rev()
            .find_map(|set| {
                let Set::Destination(_, length) = set else { return None };
                let net = IpNet::new(destination, *length).ok()?.trunc();
                self.tag(&Key::destination(net, class))
            })
            .or_else(|| self.tag(&Key::any(family, class)))
    }

    fn translation(&self, family: Family, policy: Tag) -> Action {
        match self.elements.get(&Key::snat(family, policy)).map(|value| value.data) {
            Some(Data::Address(address)) => Action::Local(Some(address)),
            _ if self.elements.contains_key(&Key::masquerade(family, policy)) => {
                Action::Local(None)
            }
            _ => Action::Deny,
        }
    }

    fn tag(&self, key: &Key) -> Option<Tag> {
        match self.elements.get(key)?.data {
            Data::Tag(tag) => Some(tag),
            _ => None,
        }
    }

    /// The connection mark bits that cache the gateway, where the first packet decides for all.
    fn cached(&self) -> Option<Cached> {
        let (_, rules) = self.chains.get(&ChainId::Prerouting)?;
        rules.iter().find_map(|rule| match rule.0.as_slice() {
            [some, direction, Stmt::Map { key, map: Set::Connection, .. }]
                if *direction == Stmt::direction(Direction::Original) =>
            {
                match key.first()?.mask {
                    Mask::Bits(mask) => Some(Cached { some: some.tests(Field::CtMark)?, mask }),
                    Mask::Whole | Mask::Prefix(_) => None,
                }
            }
            _ => None,
        })
    }

    /// The bits of a connection mark that say that we translated the connection or exempted it.
    pub(crate) fn connection_mark(&self) -> Option<MarkBits> {
        self.sets_connection_mark(ChainId::Snat(Family::V4))
    }

    /// The mark of a connection that enters the tunnel on this node.
    fn bound_mark(&self) -> Option<MarkBits> {
        self.sets_connection_mark(ChainId::NatPostrouting)
    }

    /// Returns true for the mark of a connection that a packet of a gateway opened.
    pub(crate) fn is_returned_mark(&self, mark: u32) -> bool {
        let ours = self.connection_mark().is_some_and(|bits| bits.are_in(mark));
        let bound = self.bound_mark().is_some_and(|bits| bits.are_in(mark));
        self.sets.contains(&Set::PeerMac) && ours && !bound
    }

    fn sets_connection_mark(&self, chain: ChainId) -> Option<MarkBits> {
        let (_, rules) = self.chains.get(&chain)?;
        rules.iter().flat_map(|rule| &rule.0).find_map(|statement| match statement {
            Stmt::SetMark(MarkOf::Connection, bits) => Some(*bits),
            _ => None,
        })
    }

    fn held_back(&self) -> impl Iterator<Item = MarkBits> + '_ {
        let rules = self.chains.get(&ChainId::Forward).map_or(&[][..], |(_, rules)| rules);
        let guards =
            rules.iter().filter(|rule| rule.0.last() == Some(&Stmt::Goto(ChainId::Tracked)));
        guards.flat_map(|rule| rule.0.iter().filter_map(|one| one.tests(Field::CtMark)))
    }
}
