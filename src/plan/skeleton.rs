//! The rules: a static skeleton, the same for one policy and for ten thousand.
//!
//! A packet carries what was found out about it from one map to the next in `meta priority`. The
//! mark cannot serve for that, because a map's value overwrites all 32 bits of it, and some are
//! other people's. The priority is nobody's at that point: a packet out of a pod's veth has 0
//! (`____dev_forward_skb`), and forwarding sets it anew from the TOS field (`ip_forward`).

use std::collections::{BTreeMap, BTreeSet};

use crate::state::{
    Base, ChainId, ChainType, Direction, Field, Hook, Interface, MarkBits, MarkOf, NftRule, Set,
    Stmt, Target,
};
use crate::types::{DeviceName, Family, Mark};

/// What the rules depend on.
pub(super) struct Skeleton<'a> {
    /// The tunnel device.
    pub(super) device: &'a DeviceName,
    /// UDP port of the tunnel.
    pub(super) port: u16,
    /// The bits of the mark that are written and tested.
    pub(super) mask: u32,
    /// Mark of packets that this node must translate.
    pub(super) tunnel: Mark,
    /// Mark of connections that we translated or bound.
    pub(super) connection: MarkBits,
    /// Whether the first packet of a connection decides for all; not in layouts without prefix.
    pub(super) caching: bool,
    /// What the marks of gateways and of what must be translated share, and no others have; `None`
    /// in layouts without prefix.
    pub(super) shared: Option<MarkBits>,
    /// Prefix of gateways' marks and its bits; `None` in layouts without.
    pub(super) prefix: Option<(u32, u32)>,
    /// Whether what enters the tunnel keeps its mark, because a chain at the device needs it.
    pub(super) keeps_mark: bool,
    /// Marks of the gateways.
    pub(super) gateways: BTreeSet<Mark>,
    /// What is in use of all that policies may ask for.
    pub(super) used: Used,
    /// Family of the tunnel's own packets.
    pub(super) underlay: Family,
    /// Whether the packets of each policy are counted.
    pub(super) counting: bool,
}

/// What policies ask for: the rest would only cost packets time.
pub(super) struct Used {
    /// Destination prefix lengths.
    pub(super) lengths: BTreeSet<(Family, u8)>,
    /// Families in which there are single sources.
    pub(super) singles: BTreeSet<Family>,
    /// Families in which there are ranges of sources: to look for them costs every packet more
    /// than all the rest of what an unselected one is asked.
    pub(super) ranges: BTreeSet<Family>,
    /// Whether this node is the gateway of any policy.
    pub(super) translates: bool,
}

type Chains = BTreeMap<ChainId, (Option<Base>, Vec<NftRule>)>;

/// Priorities of the base chains (`include/uapi/linux/netfilter_ipv4.h`).
pub(super) mod priority {
    /// `raw`: ahead of the tracking of connections (-200).
    pub(super) const RAW: i32 = -300;
    /// Right after destination NAT (-100), so that a service's real destination decides.
    pub(super) const AFTER_DNAT: i32 = -99;
    /// `mangle`: ahead of the filters of other people.
    pub(super) const MANGLE: i32 = -150;
    /// Right ahead of source NAT (100): at 100 the chain created last would run first.
    pub(crate) const BEFORE_SNAT: i32 = 99;
    /// Right after source NAT.
    pub(super) const AFTER_SNAT: i32 = 101;
}

/// From a tag to what a map has for it.
fn by_tag(map: Set) -> Stmt {
    Field::Priority.map(map, Target::Priority)
}

const fn base(kind: ChainType, hook: Hook, priority: i32) -> Base {
    Base { kind, hook, priority }
}

impl Skeleton<'_> {
    /// All sets and maps that the rules name.
    pub(super) fn sets(&self) -> BTreeSet<Set> {
        let mut sets = BTreeSet::from([Set::Verdict]);
        if self.prefix.is_none() {
            sets.insert(Set::Gateway);
        }
        if self.caching {
            sets.insert(Set::Connection);
        }
        if self.counting {
            sets.extend(Family::BOTH.map(Set::Count));
        }
        sets.extend(Family::BOTH.into_iter().flat_map(Set::of));
        sets.extend(
            self.used.lengths.iter().map(|(family, length)| Set::Destination(*family, *length)),
        );
        sets
    }

    /// All chains and their rules.
    pub(super) fn chains(&self) -> Chains {
        use priority::{AFTER_DNAT, AFTER_SNAT, BEFORE_SNAT, MANGLE, RAW};
        let mut chains = Chains::new();
        let mut add = |chain, base, rules: Vec<Vec<Stmt>>| {
            chains.insert(chain, (base, rules.into_iter().map(NftRule).collect()));
        };
        add(
            ChainId::Prerouting,
            Some(base(ChainType::Filter, Hook::Prerouting, AFTER_DNAT)),
            self.prerouting(),
        );
        add(ChainId::Input, Some(base(ChainType::Filter, Hook::Input, MANGLE)), self.input());
        add(ChainId::Output, Some(base(ChainType::Filter, Hook::Output, RAW)), self.output());
        add(ChainId::Forward, Some(base(ChainType::Filter, Hook::Forward, MANGLE)), self.forward());
        add(
            ChainId::NatPostrouting,
            Some(base(ChainType::Nat, Hook::Postrouting, BEFORE_SNAT)),
            self.nat_postrouting(),
        );
        if self.used.translates {
            add(
                ChainId::Guard,
                Some(base(ChainType::Filter, Hook::Postrouting, AFTER_SNAT)),
                self.guard(),
            );
        }
        add(ChainId::Marked, None, self.marked());
        add(ChainId::Bound, None, self.bound());
        add(ChainId::Injected, None, self.injected());
        add(ChainId::Arrived, None, self.arrived());
        add(ChainId::Select, None, self.by_source(Field::Source, ChainId::Admit));
        add(ChainId::Midway, None, self.by_source(Field::Destination, ChainId::Answering));
        add(ChainId::Bypass, None, vec![vec![Stmt::ClearPriority]]);
        add(ChainId::Here, None, self.send(self.tunnel));
        for mark in &self.gateways {
            add(ChainId::To(*mark), None, self.send_to(*mark));
            if self.caching {
                add(ChainId::Via(*mark), None, vec![vec![self.set_mark(mark.get())]]);
            }
        }
        for family in Family::BOTH {
            add(ChainId::Answering(family), None, self.answering(family));
            add(ChainId::Admit(family), None, self.admit(family));
            add(ChainId::Pick(family), None, self.pick(family));
            add(ChainId::Steer(family), None, self.steer(family));
            add(ChainId::Translate(family), None, self.translate(family));
            add(ChainId::Wear(family), None, self.wear(family));
        }
        chains
    }

    fn set_mark(&self, mark: u32) -> Stmt {
        Stmt::SetMark(MarkOf::Packet, MarkBits { mask: self.mask, value: mark })
    }

    /// The mark of what this node must translate, by the bits that tell it from gateways' whichever
    /// there are: what others set among the rest, and what a new gateway has tested from now on,
    /// must not let a packet pass.
    fn tunnel_bits(&self) -> MarkBits {
        let mask = self.connection.mask & self.mask;
        MarkBits { mask, value: self.tunnel.get() & mask }
    }

    fn is_not_tunnel(&self) -> Stmt {
        Field::Mark.has_not(self.tunnel_bits())
    }

    fn out_of_tunnel(&self) -> Stmt {
        Stmt::Interface(Interface::Input, self.device.clone())
    }

    fn to_tunnel(&self) -> Stmt {
        Stmt::Interface(Interface::Output, self.device.clone())
    }

    fn prerouting(&self) -> Vec<Vec<Stmt>> {
        let mut rules = vec![vec![self.out_of_tunnel(), Stmt::Goto(ChainId::Arrived)]];
        if let (true, Some((value, mask))) = (self.caching, self.prefix) {
            // Its first packet was decided about, and said so in the connection's mark.
            rules.push(vec![
                Field::CtMark.has(MarkBits { mask, value }),
                Stmt::direction(Direction::Original),
                Field::CtMark.bits(self.mask).map(Set::Connection, Target::Verdict),
            ]);
        }
        rules.extend(self.by_source(Field::Source, ChainId::Admit));
        rules
    }

    /// Any connection that we translated or bound.
    fn is_ours(&self) -> Stmt {
        let cached = self.shared.filter(|_| self.caching);
        Field::CtMark.has(cached.unwrap_or(self.connection))
    }

    /// What came out of the tunnel is never put into it again: two nodes that disagree about the
    /// gateway would send it to and fro.
    fn arrived(&self) -> Vec<Vec<Stmt>> {
        let untracked = Stmt::state(Stmt::INVALID | Stmt::UNTRACKED);
        vec![
            // No NAT will see it, whatever becomes of its mark.
            vec![untracked, Stmt::Counter, Stmt::Drop],
            vec![self.set_mark(self.tunnel.get())],
        ]
    }

    /// From a source to its class; the single addresses first.
    fn by_source(
        &self,
        address: fn(Family) -> Field,
        next: fn(Family) -> ChainId,
    ) -> Vec<Vec<Stmt>> {
        let sets = |family| {
            let singles = self.used.singles.contains(&family).then_some(Set::Source(family));
            let ranges = self.used.ranges.contains(&family).then_some(Set::SourceNet(family));
            [singles, ranges].map(|set| (family, set))
        };
        let found = Family::BOTH.into_iter().flat_map(sets);
        let rule = |family, set| {
            vec![address(family).map(set, Target::Priority), Stmt::Goto(next(family))]
        };
        found.filter_map(|(family, set)| Some(rule(family, set?))).collect()
    }

    /// From a class to a policy, by destination; the longest prefix first.
    fn by_destination(&self, family: Family, next: ChainId) -> Vec<Vec<Stmt>> {
        let found = self.by_net(Field::Destination(family));
        found.map(|find| vec![find, Stmt::Goto(next)]).collect()
    }

    fn by_net(&self, address: Field) -> impl Iterator<Item = Stmt> {
        let lengths = self.used.lengths.iter().rev();
        let lengths = lengths.filter(move |(of, _)| address.family() == Some(*of));
        let any = address.family().map(|family| by_tag(Set::Any(family)));
        lengths.map(move |(_, length)| Stmt::by_prefix(address, *length)).chain(any)
    }

    /// A segment that opens nothing, and yet is the first one seen, to a selected pod from where
    /// a policy would lead: if it opened the connection, the pod's own would be answers, and no
    /// NAT would touch them. Without it the pod's next segment opens the connection the right
    /// way round. That is how it is after somebody has emptied the table of connections.
    fn answering(&self, family: Family) -> Vec<Vec<Stmt>> {
        let mut rules = vec![vec![
            Field::Source(family).is_in(Set::Excluded(family)),
            Stmt::Goto(ChainId::Bypass),
        ]];
        let found = self.by_net(Field::Source(family));
        rules.extend(found.map(|find| vec![find, Stmt::Counter, Stmt::Drop]));
        rules.push(vec![Stmt::ClearPriority]);
        rules
    }

    fn admit(&self, family: Family) -> Vec<Vec<Stmt>> {
        let bypass = Stmt::Goto(ChainId::Bypass);
        let pick = Stmt::Goto(ChainId::Pick(family));
        vec![
            // The first packet of the connection has been asked all of this. A destination that
            // was excluded since makes no difference: no way but ours is open to the connection,
            // and it is about to be ended.
            vec![self.is_ours(), Stmt::direction(Direction::Original), pick.clone()],
            vec![Field::Destination(family).is_in(Set::Excluded(family)), bypass.clone()],
            // Of connections that somebody opened to the pod.
            vec![Stmt::direction(Direction::Reply), bypass],
            // NAT leaves it alone, so it would leave with the pod's address.
            vec![Stmt::state(Stmt::INVALID), Stmt::Counter, Stmt::Drop],
            vec![pick],
        ]
    }

    fn pick(&self, family: Family) -> Vec<Vec<Stmt>> {
        let mut rules = self.by_destination(family, ChainId::Steer(family));
        rules.push(vec![Stmt::ClearPriority]);
        rules
    }

    fn steer(&self, family: Family) -> Vec<Vec<Stmt>> {
        let mut rules = vec![
            vec![by_tag(Set::Steer(family)), Field::Priority.map(Set::Verdict, Target::Verdict)],
            vec![Stmt::Counter, Stmt::Drop],
        ];
        if self.counting {
            // Not those that are decided about once more ahead of source NAT.
            rules.insert(0, vec![Field::Output.is(0), Field::Priority.is_in(Set::Count(family))]);
        }
        rules
    }

    fn send_to(&self, mark: Mark) -> Vec<Vec<Stmt>> {
        let mut rules = self.send(mark);
        if self.caching {
            // Also of a connection that was on its way to another gateway.
            let bits = MarkBits { mask: self.mask, value: mark.get() };
            rules.push(vec![Stmt::SetMark(MarkOf::Connection, bits)]);
        }
        rules
    }

    fn send(&self, mark: Mark) -> Vec<Vec<Stmt>> {
        vec![vec![self.set_mark(mark.get()), Stmt::ClearPriority]]
    }

    fn is_tunnel(&self) -> Stmt {
        Field::Mark.has(self.tunnel_bits())
    }

    /// It has the mark of a gateway.
    fn is_stray(&self) -> Stmt {
        match self.prefix {
            Some((value, mask)) => Field::Mark.has(MarkBits { mask, value }),
            None => Field::Mark.bits(self.mask).is_in(Set::Gateway),
        }
    }

    /// In the order of what most packets are spared. Whatever has a mark of ours has it from here.
    fn forward(&self) -> Vec<Vec<Stmt>> {
        let marked = |is: Stmt| vec![is, Stmt::Goto(ChainId::Marked)];
        let mut rules = match (self.used.translates, self.shared) {
            (true, _) => vec![marked(self.is_stray())],
            // Nobody translates here what comes out of the tunnel.
            (false, Some(bits)) => vec![marked(Field::Mark.has(bits))],
            (false, None) => vec![marked(self.is_stray()), marked(self.is_tunnel())],
        };
        rules
            .push(vec![Field::DestinationPort.is(self.port.into()), Stmt::Jump(ChainId::Injected)]);
        rules.push(vec![self.is_ours(), Stmt::Goto(ChainId::Bound)]);
        rules
    }

    /// What enters the tunnel is where it belongs.
    fn enter(&self) -> Vec<Stmt> {
        // The outer packet inherits the mark; routed by it, it would enter the tunnel again.
        let take_off = (!self.keeps_mark).then(|| self.set_mark(0));
        [Some(self.to_tunnel()), take_off, Some(Stmt::Return)].into_iter().flatten().collect()
    }

    /// Marked, and yet not on its way into the tunnel: link, route or rule is missing.
    fn marked(&self) -> Vec<Vec<Stmt>> {
        vec![self.enter(), vec![Stmt::Counter, Stmt::Drop]]
    }

    /// Of a connection that was ours, and on no way of ours any more: its policy has gone. The
    /// kernel would send it on with the address it once got, the pod's own. What enters the tunnel
    /// without our mark has had it overwritten by others since.
    fn bound(&self) -> Vec<Vec<Stmt>> {
        let original = Stmt::direction(Direction::Original);
        vec![self.enter(), vec![original, self.is_not_tunnel(), Stmt::Counter, Stmt::Drop]]
    }

    /// Masqueraded by this node, a pod's frame would come from a known one.
    fn injected(&self) -> Vec<Vec<Stmt>> {
        let from_stranger = |family| {
            vec![
                Field::UdpDestinationPort.is(self.port.into()),
                Field::Destination(family).is_in(Set::Peer(family)),
                Field::Source(family).is_not_in(Set::Peer(family)),
                Stmt::Counter,
                Stmt::Drop,
            ]
        };
        Family::BOTH.map(from_stranger).into()
    }

    fn nat_postrouting(&self) -> Vec<Vec<Stmt>> {
        let mut rules = Vec::new();
        // An answer to a connection that was ended would open it the other way round, and the
        // pod's packets would leave as answers to that. Only what opens one comes by here.
        for family in Family::BOTH {
            for set in [Set::Answer(family), Set::PortlessAnswer(family)] {
                rules.push(vec![Stmt::answers(set), Stmt::Counter, Stmt::Drop]);
            }
        }
        rules.push(vec![Stmt::without_syn(), Field::Input.is_not(0), Stmt::Jump(ChainId::Midway)]);
        let mut bind = vec![self.to_tunnel(), Stmt::SetMark(MarkOf::Connection, self.connection)];
        if let (true, Some((value, mask))) = (self.caching, self.prefix) {
            bind.insert(1, Field::CtMark.has_not(MarkBits { mask, value }));
        }
        rules.push(bind);
        for family in Family::BOTH {
            // `accept` would not keep a masquerade in another table from binding.
            rules.push(vec![self.to_tunnel(), Stmt::KeepSource(family)]);
        }
        // The tunnel's own packets seem to have come out of it: they keep its device.
        rules.push([self.outer(), vec![Stmt::Return]].concat());
        // Others may have overwritten the mark on the way: what came out of the tunnel is told by
        // the device, and what did not is decided about once more. Before Linux 5.7 there is no
        // device here, and the mark must do.
        rules.push(vec![self.out_of_tunnel(), self.set_mark(self.tunnel.get())]);
        rules.push(vec![self.is_not_tunnel(), Field::Input.is_not(0), Stmt::Jump(ChainId::Select)]);
        rules.push(vec![Field::Input.is_not(0), self.is_stray(), Stmt::Counter, Stmt::Drop]);
        rules.push(vec![self.is_not_tunnel(), Stmt::Return]);
        rules.extend(self.by_source(Field::Source, ChainId::Translate));
        // Tunnelled to us, but nothing here knows the source.
        rules.push(vec![Stmt::Counter, Stmt::Drop]);
        rules
    }

    fn translate(&self, family: Family) -> Vec<Vec<Stmt>> {
        let mut rules = self.by_destination(family, ChainId::Wear(family));
        rules.push(vec![Stmt::Counter, Stmt::Drop]);
        rules
    }

    fn wear(&self, family: Family) -> Vec<Vec<Stmt>> {
        vec![
            vec![Stmt::SetMark(MarkOf::Connection, self.connection)],
            vec![Field::Priority.map(Set::Snat(family), Target::Snat(family))],
            vec![Field::Priority.is_in(Set::Masquerade(family)), Stmt::Masquerade],
            vec![Stmt::Counter, Stmt::Drop],
        ]
    }

    fn guard(&self) -> Vec<Vec<Stmt>> {
        let untracked = Stmt::state(Stmt::INVALID | Stmt::UNTRACKED);
        let original = Stmt::direction(Direction::Original);
        vec![
            vec![self.is_not_tunnel(), Stmt::Return],
            vec![untracked, Stmt::Counter, Stmt::Drop],
            // Translated by somebody else, before there was a policy.
            vec![
                original.clone(),
                Field::CtMark.has_not(self.connection),
                Stmt::Counter,
                Stmt::Drop,
            ],
            vec![original, Stmt::not_translated(), Stmt::Counter, Stmt::Drop],
            // The tag that translation left behind would choose a queue of the device.
            vec![Stmt::state(Stmt::NEW), Stmt::ClearPriority],
            vec![self.set_mark(0)],
        ]
    }

    fn output(&self) -> Vec<Vec<Stmt>> {
        // Nobody's NAT is to touch the outer packets, and their connections, one for each of the
        // pods', would only fill the table.
        vec![[self.outer(), vec![Stmt::NoTrack]].concat()]
    }

    /// The tunnel's own packets.
    fn outer(&self) -> Vec<Stmt> {
        vec![
            Field::UdpDestinationPort.is(self.port.into()),
            Field::Destination(self.underlay).is_in(Set::Peer(self.underlay)),
        ]
    }

    fn input(&self) -> Vec<Vec<Stmt>> {
        let mut rules = Vec::new();
        for family in Family::BOTH {
            // VXLAN is not authenticated: anyone could speak with an egress IP. A pod that its node
            // masquerades could, too, at an address of this node that no node sends to.
            for stranger in [
                Field::Source(family).is_not_in(Set::Peer(family)),
                Field::Destination(family).is_not_in(Set::Underlay(family)),
            ] {
                let port = Field::UdpDestinationPort.is(self.port.into());
                rules.push(vec![port, stranger, Stmt::Counter, Stmt::Drop]);
            }
        }
        // Neighbour solicitations and advertisements (RFC 4861): without an answer to a unicast
        // probe the router forgets who has the address.
        for kind in [135, 136] {
            rules.push(vec![
                Field::Destination(Family::V6).is_in(Set::Eip(Family::V6)),
                Field::Icmp6Type.is(kind),
                Stmt::Return,
            ]);
        }
        for family in Family::BOTH {
            // No service of this node answers on an egress IP, and an open connection that moved
            // here is not reset before its first packet out.
            rules.push(vec![
                Field::Destination(family).is_in(Set::Eip(family)),
                Stmt::Counter,
                Stmt::Drop,
            ]);
        }
        rules
    }
}
