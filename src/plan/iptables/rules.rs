//! Plans the iptables chains and their rules.

use super::sets::{Sets, Way};
use crate::cluster::Iptables;
use crate::plan::policies::NormalizedPolicy;
use crate::state::{
    Comment, CtState, Direction, Field, Ipset, Is, MarkBits, Side, XtChain, XtMatch, XtName,
    XtRule, XtTable, XtTarget, Xtables,
};
use crate::types::{Family, Mark};

/// The rules of one family.
pub(crate) struct Rules<'a> {
    pub(crate) sets: &'a Sets<'a>,
    pub(crate) iptables: Iptables,
}

fn rule<const N: usize>(matches: [XtMatch; N], target: XtTarget, comment: &str) -> XtRule {
    XtRule { matches: matches.into(), target, comment: comment.into() }
}

/// Creates a jump to one of our chains.
fn to<const N: usize>(matches: [XtMatch; N], chain: XtName, what: &str) -> XtRule {
    rule(matches, XtTarget::Jump(chain), &format!("egress gateway: {what}"))
}

impl Rules<'_> {
    /// Adds the chains, and the jumps to them at the head of the built-in chains.
    pub(crate) fn add_to(&self, tables: &mut Xtables) {
        use XtName as N;
        use XtTable::{Filter, Mangle, Nat};
        let family = self.sets.family;
        let mut chain = |table, name, rules| {
            tables.chains.insert(XtChain { family, table, name }, rules);
        };
        chain(Mangle, N::MarkRequest, self.mark_request());
        chain(Mangle, N::ResetMark, self.reset_mark());
        if let Some(size) = self.mss() {
            let rule = rule([XtMatch::Syn], XtTarget::ClampMss(size), "egress gateway: clamp mss");
            chain(Mangle, N::ClampMss, vec![rule]);
        }
        chain(Mangle, N::Guard, self.guard());
        chain(Mangle, N::EgressIp, self.egress_ip());
        chain(Mangle, N::CheckSnat, self.check_snat());
        chain(Mangle, N::Clear, vec![self.set_mark(0, "egress gateway: not steered")]);
        let here = self.set_mark(self.tunnel().get(), "egress gateway: local gateway");
        chain(Mangle, N::Local, vec![here]);
        let closed = self.set_mark(self.closed().get(), "egress gateway: denied");
        chain(Mangle, N::Denied, vec![closed]);
        for (node, gateway) in self.sets.gateways {
            let comment = format!("egress gateway: {}", Comment::of_name(node.as_str()).as_str());
            let mark = self.set_mark(gateway.mark.get(), &comment);
            chain(Mangle, N::To(gateway.mark), vec![mark]);
        }
        chain(Nat, N::NoSnat, self.no_snat());
        chain(Nat, N::SnatEip, self.snat_eip());
        if self.iptables.accept {
            chain(Filter, N::KeepMark, self.keep_mark());
            chain(Filter, N::Tunnel, self.tunnel_packets());
        }
        let mut jump = |table, name, jumps: Vec<XtRule>| {
            tables.jumps.insert(XtChain { family, table, name }, (1..).zip(jumps).collect());
        };
        jump(Mangle, N::Prerouting, self.to_mark_request());
        jump(Mangle, N::Forward, self.to_reset_mark());
        jump(Mangle, N::Input, vec![to([], N::Guard, "guard tunnel and EIP")]);
        let translated = [self.is_tunnel(Is::So)];
        jump(Mangle, N::Postrouting, vec![to(translated, N::CheckSnat, "check snat")]);
        let translate = vec![to([], N::SnatEip, "snat EIP"), to([], N::NoSnat, "no snat")];
        jump(Nat, N::Postrouting, translate);
        if self.iptables.accept {
            jump(Filter, N::Forward, vec![to([], N::KeepMark, "keep mark")]);
            jump(Filter, N::Input, vec![to([], N::Tunnel, "tunnel")]);
            jump(Filter, N::Output, vec![to([], N::Tunnel, "tunnel")]);
        }
    }

    /// Returns the jumps for forwarded packets, whose conditions let other packets skip our chains.
    ///
    /// Each chain would cost a packet a jump, its counter and comment, and the return.
    fn to_mark_request(&self) -> Vec<XtRule> {
        let selected = [self.input(Is::Not), self.source(Is::So, Ipset::Selected)];
        vec![
            // Never sent into the tunnel again: two nodes that disagree about the gateway would
            // send it back and forth. Later chains cannot match the input interface, so that the
            // mark is set here.
            to([self.input(Is::So)], XtName::Local, "out of the tunnel"),
            to(selected, XtName::MarkRequest, "mark egress packet"),
        ]
    }

    /// Returns the jumps to a chain that resets marks, covering all packets that the chain acts on.
    ///
    /// Their order keeps a packet from passing the chain first as a marked one and then again as
    /// one that has lost its mark.
    fn to_reset_mark(&self) -> Vec<XtRule> {
        let ours = XtMatch::Connmark(Is::So, self.connection());
        let unmarked = [self.marked(Is::Not), ours, XtMatch::Direction(Direction::Original)];
        let mut jumps = vec![
            to(unmarked, XtName::ResetMark, "without the mark of its connection"),
            to([self.tunnel_port()], XtName::ResetMark, "to the tunnel"),
            to([self.marked(Is::So)], XtName::ResetMark, "reset mark"),
        ];
        if self.mss().is_some() {
            // A reply to a connection that another node translates: the pod's segments use the tunnel.
            let plain = XtMatch::State(Is::Not, CtState::Snat);
            let ours = XtMatch::Connmark(Is::So, self.connection());
            let reply = XtMatch::Direction(Direction::Reply);
            jumps.push(to([XtMatch::Syn, ours, reply, plain], XtName::ClampMss, "clamp mss"));
        }
        jumps
    }

    fn mss(&self) -> Option<u16> {
        self.sets.world.mss(self.sets.family)
    }

    fn tunnel(&self) -> Mark {
        self.sets.world.cluster.marks.tunnel()
    }

    /// Returns the mark of packets to drop once it is known that they do not stay inside.
    ///
    /// It is no gateway's mark.
    fn closed(&self) -> Mark {
        self.sets.world.cluster.marks.closed()
    }

    fn connection(&self) -> MarkBits {
        self.sets.world.cluster.marks.connection()
    }

    /// Matches packets that come from the tunnel.
    fn input(&self, is: Is) -> XtMatch {
        XtMatch::InputDevice(is, self.sets.world.cluster.tunnel.device.clone())
    }

    fn to_tunnel(&self) -> XtMatch {
        XtMatch::OutputDevice(self.sets.world.cluster.tunnel.device.clone())
    }

    fn tunnel_port(&self) -> XtMatch {
        XtMatch::UdpPort(self.sets.world.cluster.tunnel.port)
    }

    fn set_mark(&self, value: u32, comment: &str) -> XtRule {
        let mask = self.sets.mask();
        rule([], XtTarget::SetMark(MarkBits { mask, value: value & mask }), comment)
    }

    /// Matches the mark to translate by the bits that tell it from any gateway's mark.
    fn is_tunnel(&self, is: Is) -> XtMatch {
        let mask = self.connection().mask & self.sets.mask();
        XtMatch::Mark(is, MarkBits { mask, value: self.tunnel().get() & mask })
    }

    /// Matches packets with any bit set that tells our marks from others, for any set of gateways.
    fn marked(&self, is: Is) -> XtMatch {
        let none = if is == Is::So { Is::Not } else { Is::So };
        XtMatch::Mark(none, MarkBits { mask: self.connection().mask, value: 0 })
    }

    fn source(&self, is: Is, set: fn(Family) -> Ipset) -> XtMatch {
        XtMatch::Set(is, set(self.sets.family), Side::Src)
    }

    fn destination(&self, is: Is, set: fn(Family) -> Ipset) -> XtMatch {
        XtMatch::Set(is, set(self.sets.family), Side::Dst)
    }

    /// Creates a rule for the packets of a policy.
    fn of_policy(
        &self,
        policy: &NormalizedPolicy,
        name: u64,
        target: XtTarget,
        what: &str,
    ) -> XtRule {
        let family = self.sets.family;
        let comment = format!("rule {}: {what}", policy.comment.as_str());
        let source = XtMatch::Set(Is::So, Ipset::Sources(family, name), Side::Src);
        let mut rule = rule([source], target, &comment);
        if !policy.takes_all(family) {
            let listed = Ipset::Destinations(family, name);
            rule.matches.insert(XtMatch::Set(Is::So, listed, Side::Dst));
        }
        rule
    }

    fn mark_request(&self) -> Vec<XtRule> {
        let family = self.sets.family;
        let reply = XtMatch::Direction(Direction::Reply);
        let invalid = XtMatch::State(Is::So, CtState::Invalid);
        let mut rules = vec![
            rule(
                [self.destination(Is::So, Ipset::Ignored)],
                XtTarget::Return,
                "egress gateway: excluded destination",
            ),
            rule([reply], XtTarget::Return, "egress gateway: reply"),
            // NAT ignores it, so it would leave with the pod's address.
            rule([invalid], XtTarget::Drop, "egress gateway: invalid or untracked"),
            rule(
                [self.source(Is::So, Ipset::Denied)],
                XtTarget::Goto(XtName::Denied),
                "egress gateway: denied",
            ),
        ];
        for (policy, name) in self.sets.ruled() {
            let target = match self.sets.way(policy) {
                Way::To(mark) => XtTarget::Goto(XtName::To(mark)),
                Way::Here => XtTarget::Goto(XtName::Local),
                Way::Deny => XtTarget::Goto(XtName::Denied),
                Way::Bypass => XtTarget::Return,
            };
            rules.push(self.of_policy(policy, name, target, "mark request packet"));
        }
        let by_source = XtTarget::MapMark(Ipset::Marks(family));
        rules.push(rule([], by_source, "egress gateway: mark by source"));
        rules
    }

    fn reset_mark(&self) -> Vec<XtRule> {
        let original = XtMatch::Direction(Direction::Original);
        let injected = [
            self.tunnel_port(),
            self.destination(Is::So, Ipset::Peers),
            self.source(Is::Not, Ipset::Peers),
        ];
        let mut rules = vec![
            // If this node masqueraded it, a frame forged by a pod would come from a known node.
            rule(injected, XtTarget::Drop, "egress gateway: frame forged by a pod"),
            // The outer packet inherits the mark; routed by it, it would enter the tunnel again.
            XtRule {
                matches: [self.to_tunnel()].into(),
                ..self.set_mark(0, "egress gateway: change mark")
            },
            rule([self.to_tunnel()], XtTarget::Return, "egress gateway: into the tunnel"),
            // The connection was ours, but none of our rules steers the packet any more: its policy
            // was removed.
            rule(
                [XtMatch::Connmark(Is::So, self.connection()), original, self.is_tunnel(Is::Not)],
                XtTarget::Drop,
                "egress gateway: policy removed",
            ),
            // Marked before destination NAT showed that it stays inside.
            rule(
                [self.marked(Is::So), self.destination(Is::So, Ipset::Ignored)],
                XtTarget::Goto(XtName::Clear),
                "egress gateway: excluded destination",
            ),
        ];
        let mask = self.connection().mask & self.sets.mask();
        let closed = MarkBits { mask, value: self.closed().get() & mask };
        rules.push(rule([XtMatch::Mark(Is::So, closed)], XtTarget::Drop, "egress gateway: denied"));
        // Marked, but not entering the tunnel: the link, a route or a rule is missing.
        let stray = |bits| {
            rule([XtMatch::Mark(Is::So, bits)], XtTarget::Drop, "egress gateway: route is missing")
        };
        let layout = self.sets.world.cluster.marks;
        if layout.tells_by_prefix() {
            rules.push(stray(MarkBits { mask: layout.prefix_mask(), value: layout.prefix() }));
        } else {
            let mask = self.sets.mask();
            let gateways = self.sets.gateways.values();
            rules.extend(
                gateways.map(|gateway| stray(MarkBits { mask, value: gateway.mark.get() })),
            );
        }
        rules
    }

    fn guard(&self) -> Vec<XtRule> {
        let stranger = [self.tunnel_port(), self.source(Is::Not, Ipset::Peers)];
        // VXLAN is not authenticated: any host could send packets with an egress IP as source.
        // Nodes send to no other address of this node: such a packet is a pod's frame that was
        // masqueraded on the way.
        let elsewhere = [self.tunnel_port(), self.destination(Is::Not, Ipset::Underlay)];
        let eip = [self.destination(Is::So, Ipset::EgressIps)];
        vec![
            rule(stranger, XtTarget::Drop, "egress gateway: unknown node"),
            rule(elsewhere, XtTarget::Drop, "egress gateway: not for a node"),
            rule(eip, XtTarget::Goto(XtName::EgressIp), "egress gateway: to an EIP"),
        ]
    }

    /// Drops packets to an egress IP to which this node's stack would reply with an error.
    ///
    /// The chain of nf_tables with the same name has the reasons.
    fn egress_ip(&self) -> Vec<XtRule> {
        let known = XtMatch::State(Is::So, CtState::KnownOrUntracked);
        let of_host = |one| rule([one], XtTarget::Return, "egress gateway: of this node");
        let strays = |one| rule([one], XtTarget::Drop, "egress gateway: nobody expects it");
        if self.sets.world.missing_fields.contains(&Field::SocketWildcard) {
            return vec![of_host(known), strays(XtMatch::OpensNothing)];
        }
        vec![
            of_host(known),
            of_host(XtMatch::Socket),
            strays(XtMatch::OpensNothing),
            of_host(XtMatch::AnySocket),
            strays(XtMatch::Udp),
        ]
    }

    /// Returns the guard rules for open connections.
    ///
    /// iptables has no hook behind source NAT to check the first packet.
    fn check_snat(&self) -> Vec<XtRule> {
        let original = || XtMatch::Direction(Direction::Original);
        let open = || XtMatch::Confirmed(Is::So);
        let untracked = XtMatch::State(Is::So, CtState::InvalidOrUntracked);
        let foreign = XtMatch::Connmark(Is::Not, self.connection());
        let plain = XtMatch::State(Is::Not, CtState::Snat);
        vec![
            // The jump has the same condition, but an older jump that is about to be replaced may
            // not.
            rule([self.is_tunnel(Is::Not)], XtTarget::Return, "egress gateway: not ours"),
            rule([untracked], XtTarget::Drop, "egress gateway: invalid or untracked"),
            rule(
                [original(), open(), foreign],
                XtTarget::Drop,
                "egress gateway: connection older than its policy",
            ),
            rule([original(), open(), plain], XtTarget::Drop, "egress gateway: not translated"),
            XtRule { matches: [open()].into(), ..self.set_mark(0, "egress gateway: translated") },
        ]
    }

    fn no_snat(&self) -> Vec<XtRule> {
        let bound = XtTarget::SetConnmark(self.connection());
        let mut rules = vec![
            // The tunnel address of another node is an excluded destination: that connection enters
            // the tunnel without a policy.
            rule(
                [self.to_tunnel(), self.destination(Is::Not, Ipset::Ignored)],
                bound,
                "egress gateway: no snat",
            ),
            // ACCEPT would not keep a masquerade in another table from binding.
            rule([self.to_tunnel()], XtTarget::Netmap(self.sets.family), "egress gateway: no snat"),
        ];
        if self.iptables.weave {
            for (policy, name) in self.sets.ruled() {
                if let Way::To(_) = self.sets.way(policy) {
                    let what = "weave does not do SNAT";
                    rules.push(self.of_policy(policy, name, XtTarget::Accept, what));
                }
            }
        }
        rules
    }

    fn snat_eip(&self) -> Vec<XtRule> {
        let family = self.sets.family;
        let bound = XtTarget::SetConnmark(self.connection());
        let mut rules = vec![
            rule([self.is_tunnel(Is::Not)], XtTarget::Return, "egress gateway: not ours"),
            rule([], bound, "egress gateway: snat EIP"),
            // Later packets of the connection lose the mark before they get here.
            self.set_mark(0, "egress gateway: snat EIP"),
        ];
        for (policy, name) in self.sets.local_or_preceding() {
            let (target, what) = if !self.sets.is_local(policy) {
                // A node that knows another gateway sent the packet. A later policy of this node
                // must not translate it.
                (XtTarget::Sink, "gateway is another node, drop")
            } else if let Some(address) = policy.egress_ip.address(family) {
                (XtTarget::Snat(address), "snat EIP")
            } else {
                (XtTarget::Masquerade, "snat EIP")
            };
            rules.push(self.of_policy(policy, name, target, what));
        }
        // A packet from the tunnel whose source is in no policy of this node.
        rules.push(rule([], XtTarget::Sink, "egress gateway: no policy, drop"));
        rules
    }

    fn keep_mark(&self) -> Vec<XtRule> {
        let ours =
            [XtMatch::Connmark(Is::So, self.connection()), XtMatch::Direction(Direction::Reply)];
        let accept = |matches| XtRule {
            matches,
            target: XtTarget::Accept,
            comment: "egress gateway: keep mark".into(),
        };
        vec![
            accept([self.to_tunnel()].into()),
            accept([self.is_tunnel(Is::So)].into()),
            accept(ours.into()),
        ]
    }

    fn tunnel_packets(&self) -> Vec<XtRule> {
        let accept =
            |matches: [XtMatch; 2]| rule(matches, XtTarget::Accept, "egress gateway: tunnel");
        vec![
            accept([self.tunnel_port(), self.source(Is::So, Ipset::Peers)]),
            accept([self.tunnel_port(), self.destination(Is::So, Ipset::Peers)]),
        ]
    }
}
