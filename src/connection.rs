//! Connections that the kernel tracks, and whether they are translated as they should be.

use std::fmt;
use std::net::IpAddr;
use std::time::Duration;

use crate::state::lookup::WayOut;
use crate::state::{MarkBits, Set, State};
use crate::types::Family;

/// A connection that the kernel tracks, by the packet that opened it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Connection {
    /// Protocol number of the IP header.
    pub protocol: u8,
    /// Who opened it.
    pub source: IpAddr,
    /// Source port; of ICMP the identifier.
    pub source_port: u16,
    /// To whom, as the opener wrote it.
    pub destination: IpAddr,
    /// Destination port; of ICMP type and code.
    pub destination_port: u16,
    /// To whom it really goes, after destination NAT.
    pub peer: IpAddr,
    /// The port that answers come from; of ICMP the identifier.
    pub peer_port: u16,
    /// As whom: the address that answers are sent to.
    pub wears: IpAddr,
    /// The port that answers are sent to; of ICMP type and code of an answer.
    pub wears_port: u16,
    /// Its mark.
    pub mark: u32,
    /// Its conntrack zone.
    pub zone: u16,
    /// The kernel's number of it; another connection with the same addresses has another one.
    pub id: u32,
}

/// Protocols whose header begins with two ports: TCP, UDP, DCCP, SCTP, UDP-Lite
/// (IANA "Protocol Numbers").
const WITH_PORTS: [u8; 5] = [6, 17, 33, 132, 136];

/// An answer to an echo request opens nothing (`net/netfilter/nf_conntrack_proto_icmp.c`).
const ICMP: [u8; 2] = [1, 58];

impl Connection {
    /// How long answers to an ended connection are held back: as long as one may reasonably be
    /// under way, and the gateway may take to learn of the change.
    pub const ANSWERS_HELD: Duration = Duration::from_secs(30);

    /// Whether answers to it come to its opener unchanged, so that one of them, after it was
    /// ended, would open it the other way round.
    ///
    /// The kernel would take the opener's next packet for the answer to that, and leave its
    /// source alone.
    pub(crate) fn can_turn_around(&self) -> bool {
        self.wears == self.source && !ICMP.contains(&self.protocol)
    }

    /// The set that holds answers to it back once it was ended.
    pub(crate) fn answers(&self) -> Set {
        let family = Family::of(self.source);
        if WITH_PORTS.contains(&self.protocol) {
            Set::Answer(family)
        } else {
            Set::PortlessAnswer(family)
        }
    }

    /// Whether its translation is not what the wanted table would give it now.
    ///
    /// The kernel decides about a connection's translation once, at its first packet. One that
    /// was decided otherwise keeps a wrong address for as long as it lives, or is dropped by the
    /// guards, so it must end.
    pub(crate) fn is_stale(&self, wanted: &State, before: &State) -> bool {
        let ours = self.has(wanted.connection_mark());
        let was_ours = self.is_of(before);
        let translated = self.wears != self.source;
        let way_out = |state: &State| state.way_out(self.source, self.peer);
        match way_out(wanted) {
            WayOut::None => self.is_of(wanted) || was_ours,
            // Nothing of it gets out, and it is looked at again when the policy opens; unless its
            // mark says where it goes, or nothing would tell then that it wears an egress IP.
            WayOut::Closed => {
                let forgotten = before.speaks_as(self.wears) && !wanted.speaks_as(self.wears);
                self.is_cached(wanted) || forgotten
            }
            WayOut::To(gateway) => match wanted.cached() {
                Some(cached) if self.is_cached(wanted) => {
                    translated || self.mark & cached.mask != gateway.get()
                }
                _ => !ours || translated,
            },
            WayOut::Here(Some(address)) => !ours || self.wears != address,
            WayOut::Here(None) => {
                // By a policy before, or by one that has been closed in between.
                let wore = way_out(before) == WayOut::Here(Some(self.wears))
                    || [wanted, before].iter().any(|state| state.speaks_as(self.wears));
                !ours || !translated || wore
            }
        }
    }

    /// The mark that it should have instead of being ended: it goes to a gateway as it should,
    /// but by its mark to another one.
    ///
    /// Ended, it would have to be opened anew by its opener, who may have nothing to say.
    pub(crate) fn due_mark(&self, wanted: &State, before: &State) -> Option<MarkBits> {
        let WayOut::To(gateway) = wanted.way_out(self.source, self.peer) else { return None };
        if self.wears != self.source || !(self.is_of(wanted) || self.is_of(before)) {
            return None;
        }
        match wanted.cached() {
            Some(cached) => Some(MarkBits { mask: cached.mask, value: gateway.get() }),
            None => wanted.connection_mark(),
        }
    }

    const fn has(&self, bits: Option<MarkBits>) -> bool {
        match bits {
            Some(bits) => bits.are_in(self.mark),
            None => false,
        }
    }

    /// Whether a state's rules have translated or bound it.
    fn is_of(&self, state: &State) -> bool {
        self.has(state.connection_mark()) || self.is_cached(state) || state.holds_back(self.mark)
    }

    /// Whether its mark says which gateway it goes to.
    fn is_cached(&self, state: &State) -> bool {
        self.has(state.cached().map(|cached| cached.some))
    }
}

impl fmt::Display for Connection {
    /// The connection as `conntrack -D` takes it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let family = if self.source.is_ipv4() { "ipv4" } else { "ipv6" };
        let Self { protocol, source, destination, .. } = self;
        write!(f, "-f {family} -s {source} -d {destination} -p {protocol}")?;
        match protocol {
            1 | 58 => write!(f, " --icmp-id {}", self.source_port)?,
            _ => write!(f, " --sport {} --dport {}", self.source_port, self.destination_port)?,
        }
        if self.zone == 0 { Ok(()) } else { write!(f, " --zone {}", self.zone) }
    }
}
