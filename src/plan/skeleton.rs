//! The chains and rules of the nf_tables table: static, and independent of the number of policies.
//!
//! A packet carries the result of one map lookup to the next in `meta priority`. The mark cannot
//! serve for that, because a map's value overwrites all 32 bits of it, and some bits belong to
//! other programs. The priority is unused at that point: a packet from a pod's veth has 0
//! (`____dev_forward_skb`), and forwarding sets it again from the TOS field (`ip_forward`).

use std::collections::{BTreeMap, BTreeSet};

use crate::state::{
    Base, ChainId, ChainType, Direction, Field, Hook, Interface, MarkBits, MarkOf, NftRule, Set,
    Stmt, TableFamily, Target,
};
use crate::types::{DeviceName, Family, Mark};

/// Parameters of the chains and rules.
pub(super) struct Skeleton<'a> {
    /// The tunnel interface.
    pub(super) device: &'a DeviceName,
    /// UDP port of the tunnel.
    pub(super) port: u16,
    /// Interface by which all tunnel packets leave and arrive, if there is but one.
    pub(super) only: Option<&'a DeviceName>,
    /// MSS of TCP connections in the tunnel, in bytes; empty if it is not lowered.
    pub(super) mss: Vec<(Family, u16)>,
    /// Mask of the mark bits that are written and tested.
    pub(super) mask: u32,
    /// Bits of the mask that hold the value of a node.
    pub(super) values: u32,
    /// Mark of packets that this node must translate.
    pub(super) tunnel: Mark,
    /// Mark of connections that this crate's rules translated or marked.
    pub(super) connection: MarkBits,
    /// Enables connection caching; never set in layouts without prefix.
    pub(super) caching: bool,
    /// Bits that identify connection marks of this crate while connections are cached.
    ///
    /// The marks of gateways and the mark of packets to translate share these bits, and no other
    /// marks have them. `None` in layouts without prefix.
    pub(super) shared: Option<MarkBits>,
    /// This node's own mark, if replies use the tunnel.
    ///
    /// The mark of a connection of ours then has the value of the node of the initiator: where
    /// replies go. It is this node's own value where they stay on this node.
    pub(super) replies: Option<Mark>,
    /// Prefix of the gateways' marks as (value, mask); `None` in layouts without prefix.
    pub(super) prefix: Option<(u32, u32)>,
    /// True if packets that enter the tunnel keep their mark, because the egress hook needs it.
    pub(super) keeps_mark: bool,
    /// Marks of the gateways.
    pub(super) gateways: BTreeSet<Mark>,
    /// The optional features that the policies use.
    pub(super) used: Used,
    /// Family of the tunnel's outer packets.
    pub(super) underlay: Family,
    /// Enables a packet and byte counter for each policy.
    pub(super) counting: bool,
    /// Fields that rules cannot test in the kernel of this node.
    pub(super) missing: &'a BTreeSet<Field>,
}

/// Features that the policies use; rules for any other feature would only cost packets time.
pub(super) struct Used {
    /// Destination prefix lengths.
    pub(super) lengths: BTreeSet<(Family, u8)>,
    /// Families that have single-address sources.
    pub(super) singles: BTreeSet<Family>,
    /// Families that have ranges of sources.
    ///
    /// A lookup in a set of ranges costs every packet more than all other lookups for a packet that
    /// no policy selects.
    pub(super) ranges: BTreeSet<Family>,
    /// True if this node is the gateway of any policy.
    pub(super) translates: bool,
}

type Chains = BTreeMap<ChainId, (Option<Base>, Vec<NftRule>)>;

/// Priorities of the base chains (`include/uapi/linux/netfilter_ipv4.h`).
pub(super) mod priority {
    /// `raw`: ahead of connection tracking (-200).
    pub(super) const RAW: i32 = -300;
    /// Right after destination NAT (-100), so that the real destination of a service is matched.
    pub(crate) const AFTER_DNAT: i32 = -99;
    /// `mangle`: ahead of the filter chains of other programs.
    pub(super) const MANGLE: i32 = -150;
    /// Right ahead of source NAT (100): at 100 the chain created last would run first.
    pub(crate) const BEFORE_SNAT: i32 = 99;
    /// Right after source NAT.
    pub(super) const AFTER_SNAT: i32 = 101;
}

/// Replaces the tag in the packet's priority by the value that a map has for it.
fn by_tag(map: Set) -> Stmt {
    Field::Priority.map(map, Target::Priority)
}

const fn base(kind: ChainType, hook: Hook, priority: i32) -> Base {
    Base { kind, hook, priority }
}

impl Skeleton<'_> {
    /// Returns all sets and maps that the rules refer to.
    pub(super) fn sets(&self) -> BTreeSet<Set> {
        let all = Family::BOTH.into_iter().flat_map(Set::all).filter(|set| match set {
            Set::Gateway => self.prefix.is_none(),
            Set::Connection => self.caching || self.replies.is_some(),
            Set::PeerMac => self.replies.is_some(),
            Set::Count(_) => self.counting,
            set => set.table() == TableFamily::Inet,
        });
        let lengths = self.used.lengths.iter();
        all.chain(lengths.map(|(family, length)| Set::Destination(*family, *length))).collect()
    }

    /// Returns all chains and their rules.
    pub(super) fn chains(&self) -> Chains {
        use priority::{AFTER_DNAT, AFTER_SNAT, BEFORE_SNAT, MANGLE, RAW};
        let mut chains = Chains::new();
        let can_be = |rule: &Vec<Stmt>| {
            !rule.iter().any(|one| self.missing.iter().any(|field| one.compares(*field)))
        };
        let mut add = |chain, base, rules: Vec<Vec<Stmt>>| {
            chains.insert(chain, (base, rules.into_iter().filter(can_be).map(NftRule).collect()));
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
        if let Some(device) = self.only {
            // The interface is known for certain after the last hook where a packet can be routed
            // again.
            let base = base(ChainType::Filter, Hook::Postrouting, AFTER_SNAT);
            let other = Stmt::OtherInterface(Interface::Output, device.clone());
            let rule = [self.outer(), vec![other, Stmt::Counter, Stmt::Drop]].concat();
            add(ChainId::Underlay, Some(base), vec![rule]);
        }
        add(ChainId::EgressIp, None, self.egress_ip());
        add(ChainId::Marked, None, self.marked());
        add(ChainId::Tracked, None, self.tracked());
        if !self.mss.is_empty() {
            let clamp = |(family, size): &(Family, u16)| vec![Stmt::ClampMss(*family, *size)];
            add(ChainId::ClampMss, None, self.mss.iter().map(clamp).collect());
        }
        add(ChainId::SpoofedVxlan, None, self.injected());
        add(ChainId::FromTunnel, None, self.arrived());
        add(ChainId::Classify, None, self.by_source(Field::Source, ChainId::Exclude));
        add(ChainId::MidStream, None, self.by_source(Field::Destination, ChainId::ReplyCheck));
        add(ChainId::Bypass, None, vec![vec![Stmt::ClearPriority]]);
        add(ChainId::LocalGateway, None, self.translate_here());
        for mark in &self.gateways {
            add(ChainId::To(*mark), None, self.send_to(*mark));
            if self.caching || self.replies.is_some() {
                add(ChainId::Via(*mark), None, vec![vec![self.set_mark(mark.get())]]);
            }
            if self.replies.is_some() {
                add(ChainId::FromNode(*mark), None, vec![self.mark_initiator(*mark)]);
            }
        }
        if let Some(own) = self.replies {
            add(ChainId::ReturnCheck, None, self.return_check(own));
            add(ChainId::Returned, None, self.returned());
            for family in Family::BOTH {
                add(ChainId::SourceCheck(family), None, self.source_check(family));
            }
        }
        for family in Family::BOTH {
            add(ChainId::ReplyCheck(family), None, self.answering(family));
            add(ChainId::Exclude(family), None, self.exclude(family));
            add(ChainId::SelectPolicy(family), None, self.select_policy(family));
            add(ChainId::Steer(family), None, self.steer(family));
            add(ChainId::Translate(family), None, self.translate(family));
            add(ChainId::Snat(family), None, self.snat(family));
        }
        chains
    }

    fn set_mark(&self, mark: u32) -> Stmt {
        Stmt::SetMark(MarkOf::Packet, MarkBits { mask: self.mask, value: mark })
    }

    /// Returns the bits that identify the mark of packets that this node must translate.
    ///
    /// The bits distinguish it from the gateways' marks, whichever gateways there are. Other mark
    /// bits are not tested: bits that another program sets, or that must be tested because of a new
    /// gateway, must not let a packet pass the guard rules.
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
        let mut rules = vec![vec![self.out_of_tunnel(), Stmt::Goto(ChainId::FromTunnel)]];
        if let Some((value, mask)) = self.prefix {
            // Another program has copied the connection mark to the packet, as `CONNMARK
            // --restore-mark` does. A reply with a gateway's mark would be routed into the tunnel.
            rules.push(vec![
                Field::Mark.has(MarkBits { mask, value }),
                Stmt::direction(Direction::Reply),
                self.set_mark(0),
            ]);
        }
        if self.replies.is_some() {
            rules.push(vec![
                Field::CtMark.has(self.connection),
                Stmt::direction(Direction::Reply),
                Field::CtMark.bits(self.mask).map(Set::Connection, Target::Verdict),
            ]);
        }
        if let (true, Some((value, mask))) = (self.caching, self.prefix) {
            // The first packet of the connection was classified, and its gateway is in the
            // connection mark.
            rules.push(vec![
                Field::CtMark.has(MarkBits { mask, value }),
                Stmt::direction(Direction::Original),
                Field::CtMark.bits(self.mask).map(Set::Connection, Target::Verdict),
            ]);
        }
        rules.extend(self.by_source(Field::Source, ChainId::Exclude));
        rules
    }

    /// Matches connections that this crate's rules translated or marked.
    fn is_ours(&self) -> Stmt {
        let cached = self.shared.filter(|_| self.caching);
        Field::CtMark.has(cached.unwrap_or(self.connection))
    }

    /// Marks packets from the tunnel for translation.
    ///
    /// A packet from the tunnel is never sent into the tunnel again: two nodes that disagree about
    /// the gateway would send it back and forth.
    fn arrived(&self) -> Vec<Vec<Stmt>> {
        let untracked = Stmt::state(Stmt::INVALID | Stmt::UNTRACKED);
        let mut rules = vec![
            // NAT ignores such packets, whatever their mark.
            vec![untracked, Stmt::Counter, Stmt::Drop],
            // A gateway has returned it.
            vec![Stmt::direction(Direction::Reply), self.set_mark(self.reply_mark()), Stmt::Return],
        ];
        if let Some(own) = self.replies {
            // For each packet, because a pod moves to another node with its connections.
            rules.push(vec![Field::EthernetSource.map(Set::PeerMac, Target::Verdict)]);
            // Replies to a node that has no mark take the host's own routes.
            rules.push(self.mark_initiator(own));
        } else {
            rules.push(vec![self.set_mark(self.tunnel.get())]);
        }
        rules
    }

    /// Returns the mark of replies from the tunnel up to the forward chain.
    ///
    /// By it the reverse path to the server is the tunnel. The value is any but this node's own.
    fn reply_mark(&self) -> u32 {
        let lowest = self.values & self.values.wrapping_neg();
        self.replies.map_or(0, |own| self.tunnel.get() | (own.get() & self.values) ^ lowest)
    }

    /// Marks a packet for translation, and its connection with the node to which replies go.
    ///
    /// The packet's mark has the value of the node as well: another program may copy either mark to
    /// the other.
    fn mark_initiator(&self, node: Mark) -> Vec<Stmt> {
        let bits = self.value_of(node);
        let mark = self.tunnel.get() | bits.value;
        vec![self.set_mark(mark), Stmt::SetMark(MarkOf::Connection, bits)]
    }

    /// Returns the mark bits that hold the value of a node.
    fn value_of(&self, node: Mark) -> MarkBits {
        MarkBits { mask: self.values, value: node.get() & self.values }
    }

    /// Drops packets from the tunnel that are for no selected pod, and have not been translated.
    ///
    /// A gateway returns a packet of a connection that this node does not know: the conntrack entry
    /// has expired here before it did there. The pod's answers must go to that gateway.
    fn return_check(&self, own: Mark) -> Vec<Vec<Stmt>> {
        // It comes from a node that is no gateway of ours.
        let mut rules =
            vec![vec![Field::CtMark.has(self.value_of(own)), Stmt::Counter, Stmt::Drop]];
        rules.extend(self.by_source(Field::Destination, ChainId::SourceCheck));
        rules.push(vec![Stmt::Counter, Stmt::Drop]);
        rules
    }

    /// Drops packets from a selected pod: that policy is not of this node, or not any more.
    ///
    /// Excluded destinations are pods, to which no other node steers a pod's packet.
    fn source_check(&self, family: Family) -> Vec<Vec<Stmt>> {
        let mut rules = vec![vec![
            Field::Destination(family).is_in(Set::Excluded(family)),
            Stmt::Goto(ChainId::Bypass),
        ]];
        let found = self.sources(family).map(|set| {
            vec![Field::Source(family).map(set, Target::Priority), Stmt::Counter, Stmt::Drop]
        });
        rules.extend(found);
        rules.push(vec![Stmt::ClearPriority]);
        rules
    }

    /// Keeps the source of a connection that a gateway has returned, and marks it as ours.
    fn returned(&self) -> Vec<Vec<Stmt>> {
        let mut rules = vec![
            vec![Stmt::Jump(ChainId::ReturnCheck)],
            vec![Stmt::SetMark(MarkOf::Connection, self.connection)],
            vec![self.set_mark(0)],
        ];
        rules.extend(Family::BOTH.map(|family| vec![Stmt::KeepSource(family)]));
        rules
    }

    /// Looks up the class of a source, single addresses first.
    fn by_source(
        &self,
        address: fn(Family) -> Field,
        next: fn(Family) -> ChainId,
    ) -> Vec<Vec<Stmt>> {
        let sets = |family| self.sources(family).map(move |set| (family, set));
        let rule = |(family, set)| {
            vec![address(family).map(set, Target::Priority), Stmt::Goto(next(family))]
        };
        Family::BOTH.into_iter().flat_map(sets).map(rule).collect()
    }

    /// Returns the sets of sources of a family, that of single addresses first.
    fn sources(&self, family: Family) -> impl Iterator<Item = Set> {
        let singles = self.used.singles.contains(&family).then_some(Set::Source(family));
        let ranges = self.used.ranges.contains(&family).then_some(Set::SourceNet(family));
        singles.into_iter().chain(ranges)
    }

    /// Looks up the policy of a destination within a class, the longest prefix first.
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

    /// Drops mid-stream segments that would open a connection in the reverse direction.
    ///
    /// Such a segment opens nothing by itself (no SYN), is the first one that conntrack sees, goes
    /// to a selected pod, and comes from a destination that one of the pod's policies selects. If
    /// it created the conntrack entry, the pod's packets would be replies, and NAT would not
    /// translate them. After the drop the pod's next segment opens the connection in the right
    /// direction. This happens after another program has flushed the conntrack table.
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

    fn exclude(&self, family: Family) -> Vec<Vec<Stmt>> {
        let bypass = Stmt::Goto(ChainId::Bypass);
        let pick = Stmt::Goto(ChainId::SelectPolicy(family));
        let mut rules = vec![
            // The first packet of the connection passed the checks below. A destination that was
            // excluded since then needs no check: the connection has no other allowed path, and is
            // about to be ended.
            vec![self.is_ours(), Stmt::direction(Direction::Original), pick.clone()],
            vec![Field::Destination(family).is_in(Set::Excluded(family)), bypass.clone()],
        ];
        if let Some(own) = self.replies {
            // The answer to a packet that a gateway has returned: that gateway is none any more.
            rules.push(vec![
                Stmt::direction(Direction::Reply),
                Field::CtMark.has(self.connection),
                Field::CtMark.has_not(self.value_of(own)),
                Stmt::Counter,
                Stmt::Drop,
            ]);
        }
        rules.extend([
            // Packets of connections that were opened to the pod.
            vec![Stmt::direction(Direction::Reply), bypass.clone()],
            // Delivered on this node, whatever its mark. A node has more addresses than the cluster
            // knows.
            vec![Field::DestinationType.is(Stmt::LOCAL), bypass],
            // NAT ignores it, so it would leave with the pod's address.
            vec![Stmt::state(Stmt::INVALID), Stmt::Counter, Stmt::Drop],
            vec![pick],
        ]);
        rules
    }

    fn select_policy(&self, family: Family) -> Vec<Vec<Stmt>> {
        let mut rules = self.by_destination(family, ChainId::Steer(family));
        rules.push(vec![Stmt::ClearPriority]);
        rules
    }

    fn steer(&self, family: Family) -> Vec<Vec<Stmt>> {
        let mut rules = vec![
            vec![
                by_tag(Set::Steer(family)),
                Field::Priority.map(Set::PolicyAction, Target::Verdict),
            ],
            vec![Stmt::Counter, Stmt::Drop],
        ];
        if self.counting {
            // Does not match packets that are classified again ahead of source NAT.
            rules.insert(0, vec![Field::Output.is(0), Field::Priority.is_in(Set::Count(family))]);
        }
        rules
    }

    fn send_to(&self, mark: Mark) -> Vec<Vec<Stmt>> {
        let mut rules = self.send(mark);
        if self.caching {
            // Also set for a connection that was steered to another gateway.
            let bits = MarkBits { mask: self.mask, value: mark.get() };
            rules.push(vec![Stmt::SetMark(MarkOf::Connection, bits)]);
        }
        rules
    }

    fn translate_here(&self) -> Vec<Vec<Stmt>> {
        match self.replies {
            // Also for a connection whose pod was on another node.
            Some(own) => vec![[self.mark_initiator(own), vec![Stmt::ClearPriority]].concat()],
            None => self.send(self.tunnel),
        }
    }

    fn send(&self, mark: Mark) -> Vec<Vec<Stmt>> {
        vec![vec![self.set_mark(mark.get()), Stmt::ClearPriority]]
    }

    fn is_tunnel(&self) -> Stmt {
        Field::Mark.has(self.tunnel_bits())
    }

    /// Matches packets that have the mark of a gateway.
    fn is_stray(&self) -> Stmt {
        match self.prefix {
            Some((value, mask)) => Field::Mark.has(MarkBits { mask, value }),
            None => Field::Mark.bits(self.mask).is_in(Set::Gateway),
        }
    }

    /// Dispatches marked packets and packets of tracked connections.
    ///
    /// The rules are ordered so that most packets match the fewest. If a packet has one of our
    /// marks here, our rules have set it.
    fn forward(&self) -> Vec<Vec<Stmt>> {
        let marked = |is: Stmt| vec![is, Stmt::Goto(ChainId::Marked)];
        let mut rules = match (self.used.translates, self.shared) {
            (true, _) => vec![marked(self.is_stray())],
            // No chain on this node translates packets from the tunnel.
            (false, Some(bits)) => vec![marked(Field::Mark.has(bits))],
            (false, None) => vec![marked(self.is_stray()), marked(self.is_tunnel())],
        };
        rules.push(vec![
            Field::DestinationPort.is(self.port.into()),
            Stmt::Jump(ChainId::SpoofedVxlan),
        ]);
        rules.push(vec![self.is_ours(), Stmt::Goto(ChainId::Tracked)]);
        rules
    }

    /// Accepts packets that enter the tunnel, which is their intended path.
    fn enter(&self) -> Vec<Stmt> {
        // The outer packet inherits the mark; routed by it, it would enter the tunnel again.
        let take_off = (!self.keeps_mark).then(|| self.set_mark(0));
        [Some(self.to_tunnel()), take_off, Some(Stmt::Return)].into_iter().flatten().collect()
    }

    /// Drops marked packets that do not enter the tunnel: the link, a route or a rule is missing.
    ///
    /// A reply that does not enter the tunnel has its mark from another program, which has copied that
    /// of the connection.
    fn marked(&self) -> Vec<Vec<Stmt>> {
        let mut rules = self.keep_from_offload();
        if self.replies.is_some() && !self.keeps_mark {
            // The other direction of a reply comes out of the tunnel.
            rules.push(vec![Stmt::direction(Direction::Reply), Stmt::NoOffload]);
        }
        if self.replies.is_some() {
            // Both directions use the tunnel, and both pass this chain or that of tracked packets.
            rules.extend(self.clamp_mss(None));
        }
        rules.push(self.enter());
        // It passes the rules of tracked packets as one without the mark does, which with replies by
        // the tunnel are above.
        let then = match self.replies {
            Some(_) => Stmt::Return,
            None => Stmt::Goto(ChainId::Tracked),
        };
        rules.push(vec![Stmt::direction(Direction::Reply), self.set_mark(0), then]);
        if self.replies.is_some() && !self.used.translates {
            rules.extend(self.returned_to_pods());
        }
        rules.push(vec![Stmt::Counter, Stmt::Drop]);
        rules
    }

    /// Passes packets that a gateway has returned, on a node that translates none itself.
    fn returned_to_pods(&self) -> Vec<Vec<Stmt>> {
        let returned =
            |rest: Vec<Stmt>| [vec![self.out_of_tunnel(), self.is_tunnel()], rest].concat();
        let connection = Stmt::SetMark(MarkOf::Connection, self.connection);
        vec![
            returned(vec![Stmt::Jump(ChainId::ReturnCheck)]),
            // The first one is judged again at source NAT, by its mark.
            returned(vec![Stmt::state(Stmt::NEW), connection, Stmt::Return]),
            returned(vec![Field::CtMark.has(self.connection), self.set_mark(0), Stmt::Return]),
        ]
    }

    /// Lowers the MSS of a segment with the SYN flag, under a condition.
    fn clamp_mss(&self, condition: Option<Stmt>) -> Option<Vec<Stmt>> {
        let rule = [Some(Stmt::with_syn()), condition, Some(Stmt::Jump(ChainId::ClampMss))];
        (!self.mss.is_empty()).then(|| rule.into_iter().flatten().collect())
    }

    /// Keeps all connections from being offloaded, if packets need their mark in the tunnel.
    ///
    /// An offloaded packet has no mark, and the egress hook would leave its frame as it is.
    fn keep_from_offload(&self) -> Vec<Vec<Stmt>> {
        if self.keeps_mark { vec![vec![Stmt::NoOffload]] } else { Vec::new() }
    }

    /// Drops packets of our connections that are not marked any more: their policy was removed.
    ///
    /// The kernel would forward such a packet with the source that the connection got at first, the
    /// pod's own. A packet that enters the tunnel without our mark has had it overwritten by
    /// another program since, and may pass.
    ///
    /// No flowtable of another program may take the connection. For the other direction the kernel
    /// takes the interface at which a packet arrives (`nft_flow_route`), but replies do not come by
    /// the tunnel: offloaded for a reply, the pod's packets would leave with the pod's address, past
    /// all hooks; offloaded by the gateway for a packet from the tunnel, the replies would be sent
    /// into the tunnel, to nobody. A packet that enters the tunnel may have its connection
    /// offloaded: both directions are right.
    fn tracked(&self) -> Vec<Vec<Stmt>> {
        let original = Stmt::direction(Direction::Original);
        let mut rules = self.keep_from_offload();
        rules.push(self.enter());
        rules.push(vec![original, self.is_not_tunnel(), Stmt::Counter, Stmt::Drop]);
        // A reply to a connection that another node translates: the pod's segments use the tunnel.
        rules.extend(self.clamp_mss(Some(Stmt::not_translated())));
        if !self.keeps_mark {
            rules.push(vec![Stmt::NoOffload]);
        }
        rules
    }

    /// Drops forwarded packets to a peer's tunnel port whose source is not a node.
    ///
    /// If this node masqueraded such a packet, a frame forged by a pod would reach the peer from
    /// the address of a known node.
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
        // A late reply to an ended connection would open it in the reverse direction, and the pod's
        // packets would leave as replies to it. Only first packets of connections pass a NAT chain.
        for family in Family::BOTH {
            for set in [Set::BlockedReply(family), Set::PortlessBlockedReply(family)] {
                rules.push(vec![Stmt::answers(set), Stmt::Counter, Stmt::Drop]);
            }
        }
        let mut mid_stream = vec![Stmt::without_syn(), Field::Input.is_not(0)];
        // What a gateway has returned opens the connection in the reverse direction, and its
        // connection mark says where the pod's packets go.
        mid_stream.extend(self.replies.map(|_| self.is_not_tunnel()));
        mid_stream.push(Stmt::Jump(ChainId::MidStream));
        rules.push(mid_stream);
        for family in Family::BOTH {
            // The tunnel address of another node is an excluded destination: that connection enters
            // the tunnel without a policy.
            let steered = Field::Destination(family).is_not_in(Set::Excluded(family));
            let mut bind = vec![self.to_tunnel(), steered];
            if let (true, Some((value, mask))) = (self.caching, self.prefix) {
                bind.push(Field::CtMark.has_not(MarkBits { mask, value }));
            }
            bind.push(Stmt::SetMark(MarkOf::Connection, self.bound()));
            rules.push(bind);
        }
        for family in Family::BOTH {
            // `accept` would not keep a masquerade in another table from binding.
            rules.push(vec![self.to_tunnel(), Stmt::KeepSource(family)]);
        }
        // The outer packets have the tunnel interface as input interface, and would seem to come
        // from the tunnel.
        rules.push([self.outer(), vec![Stmt::Return]].concat());
        // Another program may have overwritten the mark since prerouting: packets from the tunnel
        // are recognised by the input interface, and others are classified again. Before Linux 5.7
        // there is no input interface in this hook, and the mark is used.
        let tunnel = Stmt::SetMark(MarkOf::Packet, self.tunnel_bits());
        rules.push(vec![self.out_of_tunnel(), tunnel]);
        rules.push(vec![
            self.is_not_tunnel(),
            Field::Input.is_not(0),
            Stmt::Jump(ChainId::Classify),
        ]);
        rules.push(vec![Field::Input.is_not(0), self.is_stray(), Stmt::Counter, Stmt::Drop]);
        rules.push(vec![self.is_not_tunnel(), Stmt::Return]);
        if self.replies.is_some() {
            // Not translated, even if a policy has all addresses as sources.
            rules.extend(Family::BOTH.map(|family| {
                let inside = Field::Destination(family).is_in(Set::Excluded(family));
                vec![inside, Stmt::Goto(ChainId::Returned)]
            }));
        }
        rules.extend(self.by_source(Field::Source, ChainId::Translate));
        // A packet from the tunnel whose source is in no policy of this node.
        rules.push(match self.replies {
            Some(_) => vec![Stmt::Goto(ChainId::Returned)],
            None => vec![Stmt::Counter, Stmt::Drop],
        });
        rules
    }

    /// Returns the mark of connections that this node steers.
    fn bound(&self) -> MarkBits {
        let own = self.replies.map_or(0, Mark::get) & self.values;
        let mask = if self.replies.is_some() { self.values } else { 0 };
        MarkBits { mask: self.connection.mask | mask, value: self.connection.value | own }
    }

    fn translate(&self, family: Family) -> Vec<Vec<Stmt>> {
        let mut rules = self.by_destination(family, ChainId::Snat(family));
        rules.push(vec![Stmt::Counter, Stmt::Drop]);
        rules
    }

    fn snat(&self, family: Family) -> Vec<Vec<Stmt>> {
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
        let mut rules = vec![
            vec![self.is_not_tunnel(), Stmt::Return],
            vec![untracked, Stmt::Counter, Stmt::Drop],
            // Translated by another program, before there was a policy.
            vec![
                original.clone(),
                Field::CtMark.has_not(self.guarded()),
                Stmt::Counter,
                Stmt::Drop,
            ],
        ];
        if self.replies.is_some() {
            // Before Linux 5.7 there is no input interface in this hook: dropped.
            let returned = [original.clone(), Stmt::not_translated(), self.out_of_tunnel()];
            let then = |last: Vec<Stmt>| [returned.to_vec(), last].concat();
            rules.push(then(vec![Stmt::Jump(ChainId::ReturnCheck)]));
            rules.push(then(vec![self.set_mark(0), Stmt::Return]));
        }
        rules.extend([
            vec![original, Stmt::not_translated(), Stmt::Counter, Stmt::Drop],
            // The tag that translation left in the priority would select a queue of the device.
            vec![Stmt::state(Stmt::NEW), Stmt::ClearPriority],
            vec![self.set_mark(0)],
        ]);
        rules
    }

    /// Returns the mark of connections that pass the guard.
    ///
    /// A reply keeps the mark of its node for the egress hook, behind all hooks at which another
    /// program may copy it to the connection.
    fn guarded(&self) -> MarkBits {
        let replies = self.keeps_mark && self.replies.is_some();
        self.shared.filter(|_| replies).unwrap_or(self.connection)
    }

    fn output(&self) -> Vec<Vec<Stmt>> {
        // No NAT may translate the outer packets, and tracking them would only fill the conntrack
        // table with one entry for each connection of the pods.
        vec![[self.outer(), vec![Stmt::NoTrack]].concat()]
    }

    /// Matches the tunnel's own outer packets.
    fn outer(&self) -> Vec<Stmt> {
        vec![
            Field::UdpDestinationPort.is(self.port.into()),
            Field::Destination(self.underlay).is_in(Set::Peer(self.underlay)),
        ]
    }

    fn input(&self) -> Vec<Vec<Stmt>> {
        let mut rules = Vec::new();
        if let Some(device) = self.only {
            let port = Field::UdpDestinationPort.is(self.port.into());
            let other = Stmt::OtherInterface(Interface::Input, device.clone());
            rules.push(vec![port, other, Stmt::Counter, Stmt::Drop]);
        }
        for family in Family::BOTH {
            // VXLAN is not authenticated: any host could send packets with an egress IP as source.
            // So could a pod whose packets its node masquerades, if it sends to an address of this
            // node that is not the underlay address to which nodes send.
            for stranger in [
                Field::Source(family).is_not_in(Set::Peer(family)),
                Field::Destination(family).is_not_in(Set::Underlay(family)),
            ] {
                let port = Field::UdpDestinationPort.is(self.port.into());
                rules.push(vec![port, stranger, Stmt::Counter, Stmt::Drop]);
            }
        }
        for family in Family::BOTH {
            rules.push(vec![
                Field::Destination(family).is_in(Set::Eip(family)),
                Stmt::Goto(ChainId::EgressIp),
            ]);
        }
        rules
    }

    /// Drops packets to an egress IP to which this node's stack would reply with an error.
    ///
    /// The address may be one that this node uses itself. A late answer to a pod's connection, or
    /// one that moved to this node, is not for this node: a TCP reset or an ICMP error would end
    /// the connection before its first outgoing packet. Conntrack does not know it here, and no
    /// socket takes it. Other protocols are passed, because the kernel itself may take them (ESP,
    /// IPIP), and because an ICMP packet causes no error.
    fn egress_ip(&self) -> Vec<Vec<Stmt>> {
        // A packet that the host exempts from tracking is no pod's.
        let known = Stmt::ESTABLISHED | Stmt::RELATED | Stmt::UNTRACKED;
        let socket = |wildcard| vec![Field::SocketWildcard.is(wildcard), Stmt::Return];
        let mut rules = vec![
            vec![Stmt::state(known), Stmt::Return],
            // Open connections that conntrack has not seen, and sockets bound to the address.
            socket(0),
            // A pod's connection may have the port of a service of this node.
            vec![Stmt::opens_nothing(), Stmt::Counter, Stmt::Drop],
            socket(1),
        ];
        if !self.missing.contains(&Field::SocketWildcard) {
            rules.push(vec![Field::Protocol.is(Stmt::UDP), Stmt::Counter, Stmt::Drop]);
        }
        rules
    }
}
