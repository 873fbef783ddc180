//! Conntrack entries, and whether their translation is the wanted one.

use std::fmt;
use std::net::IpAddr;
use std::time::Duration;

use crate::state::{Action, MarkBits, Set, State, action};
use crate::types::Family;

/// A connection that the kernel tracks (conntrack entry), identified by its original tuple.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Connection {
    /// Protocol number of the IP header.
    pub protocol: u8,
    /// Original source.
    pub source: IpAddr,
    /// Original source port; for ICMP the identifier.
    pub source_port: u16,
    /// Original destination, before destination NAT.
    pub destination: IpAddr,
    /// Original destination port; for ICMP type and code.
    pub destination_port: u16,
    /// Source of replies: the real destination, after destination NAT.
    pub peer: IpAddr,
    /// Source port of replies; for ICMP the identifier.
    pub reply_source_port: u16,
    /// Destination of replies: the address that the connection uses as source after source NAT.
    pub snat_address: IpAddr,
    /// Destination port of replies; for ICMP type and code of a reply.
    pub snat_port: u16,
    /// Connection mark.
    pub mark: u32,
    /// Conntrack zone of packets from the original source.
    pub zone: u16,
    /// Conntrack zone of replies.
    pub reply_zone: u16,
    /// Conntrack id, a hash of the original tuple and of the place in the kernel's memory.
    ///
    /// A later connection with the same original tuple may get the place, and so the id.
    pub id: u32,
}

/// Protocols whose header begins with two ports: TCP, UDP, DCCP, SCTP, UDP-Lite.
///
/// Numbers from IANA "Protocol Numbers".
const WITH_PORTS: [u8; 5] = [6, 17, 33, 132, 136];

/// ICMP and ICMPv6, whose echo replies open no connection.
///
/// Source: `net/netfilter/nf_conntrack_proto_icmp.c`.
const ICMP: [u8; 2] = [1, 58];

impl Connection {
    /// Time for which replies to an ended connection are dropped.
    ///
    /// It covers replies in flight and the time the gateway may need to learn of the change.
    pub const REPLY_BLOCK_TIME: Duration = Duration::from_secs(30);

    /// Returns whether a late reply can reopen the connection in the reverse direction.
    ///
    /// This is so if replies reach the original source untranslated. After the connection was
    /// ended, the kernel would take the next packet of the original source for a reply to that
    /// reply, and would not translate its source.
    pub(crate) fn can_be_reopened_by_reply(&self) -> bool {
        self.snat_address == self.source && !ICMP.contains(&self.protocol)
    }

    /// Returns the set in which replies to the connection are blocked after it was ended.
    pub(crate) fn blocked_replies(&self) -> Set {
        let family = Family::of(self.source);
        if WITH_PORTS.contains(&self.protocol) {
            Set::BlockedReply(family)
        } else {
            Set::PortlessBlockedReply(family)
        }
    }

    /// Returns whether the connection is stale: not translated as the wanted table would do now.
    ///
    /// The kernel decides on a connection's translation once, at its first packet. A connection
    /// that was translated otherwise keeps a wrong address for its lifetime, or is dropped by the
    /// guard rules, so it must be ended.
    pub(crate) fn is_stale(&self, wanted: &State, before: &State) -> bool {
        let ours = self.has(wanted.connection_mark());
        let was_ours = self.is_of(before);
        let translated = self.snat_address != self.source;
        match self.returned(wanted) {
            Some(Action::Gateway(gateway)) => return !wanted.replies_go_to(gateway, self.mark),
            Some(_) => return true,
            None => {}
        }
        let action = |state: &State| action(state, self.source, self.peer);
        match action(wanted) {
            Action::None => self.is_of(wanted) || was_ours,
            // The connection is dropped while its policy is denied, and is checked again once the
            // policy has a gateway. Two cases must end now: a cached gateway mark, and a source
            // address that is no egress IP of this node any more, since nothing would identify it
            // as one later.
            Action::Deny => {
                let forgotten = before.is_local_egress_ip(self.snat_address)
                    && !wanted.is_local_egress_ip(self.snat_address);
                self.is_cached(wanted) || forgotten
            }
            Action::Gateway(gateway) => match wanted.cached() {
                Some(cached) if self.is_cached(wanted) => {
                    translated || self.mark & cached.mask != gateway.get()
                }
                _ => !self.has(wanted.bound_mark()) || translated,
            },
            Action::Local(Some(address)) => !ours || self.snat_address != address,
            Action::Local(None) => {
                // Translated to an egress IP by an earlier policy, or by one that was denied in
                // between.
                let wore = action(before) == Action::Local(Some(self.snat_address))
                    || [wanted, before]
                        .iter()
                        .any(|state| state.is_local_egress_ip(self.snat_address));
                !ours || !translated || wore
            }
        }
    }

    /// Returns the mark to set instead of ending the connection.
    ///
    /// This is for a connection that is steered to a gateway as wanted, but whose mark selects
    /// another gateway. If it were ended, its client would have to open it again, and may have
    /// nothing to send.
    pub(crate) fn due_mark(&self, wanted: &State, before: &State) -> Option<MarkBits> {
        let Action::Gateway(gateway) = action(wanted, self.source, self.peer) else { return None };
        if self.snat_address != self.source || !(self.is_of(wanted) || self.is_of(before)) {
            return None;
        }
        match wanted.cached() {
            Some(cached) => Some(MarkBits { mask: cached.mask, value: gateway.get() }),
            None => wanted.bound_mark(),
        }
    }

    /// Returns the action for the pod's packets, if a gateway's packet opened the connection to it.
    fn returned(&self, wanted: &State) -> Option<Action> {
        let ours = wanted.returns_replies() && self.has(wanted.connection_mark());
        if !ours || self.snat_address != self.source {
            return None;
        }
        match (action(wanted, self.source, self.peer), action(wanted, self.peer, self.source)) {
            (Action::None, Action::None) => None,
            (Action::None, of_pod) => Some(of_pod),
            _ => None,
        }
    }

    const fn has(&self, bits: Option<MarkBits>) -> bool {
        match bits {
            Some(bits) => bits.are_in(self.mark),
            None => false,
        }
    }

    /// Returns whether the rules of a state have translated or marked the connection.
    fn is_of(&self, state: &State) -> bool {
        self.has(state.connection_mark()) || self.is_cached(state) || state.holds_back(self.mark)
    }

    /// Returns whether the connection mark selects a gateway (connection caching).
    fn is_cached(&self, state: &State) -> bool {
        self.has(state.cached().map(|cached| cached.some))
    }
}

impl fmt::Display for Connection {
    /// Writes the connection as arguments of `conntrack -D`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let family = if self.source.is_ipv4() { "ipv4" } else { "ipv6" };
        let Self { protocol, source, destination, .. } = self;
        write!(f, "-f {family} -s {source} -d {destination} -p {protocol}")?;
        match protocol {
            1 | 58 => write!(f, " --icmp-id {}", self.source_port)?,
            _ => write!(f, " --sport {} --dport {}", self.source_port, self.destination_port)?,
        }
        if self.snat_address != self.source {
            write!(f, " -q {}", self.snat_address)?;
        }
        if self.zone == 0 { Ok(()) } else { write!(f, " --zone {}", self.zone) }
    }
}
