//! The nf_tables rule language: selector, operation and target.
//!
//! They are modelled as the kernel's packet classifier has them, and as `nft` prints them.

use std::fmt;

use ipnet::IpNet;

use super::chain::ChainId;
use super::set::Set;
use crate::types::{DeviceName, Family};

/// Name of the flowtable of the `inet` table, which has no device.
///
/// The kernel puts a connection into one flowtable at a time, and looks for it there if a packet
/// arrives at a device of that flowtable. A connection in this one stays on the path of the hooks.
pub const FLOWTABLE: &str = "no_offload";

/// Direction of a packet in its connection, as conntrack defines it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Direction {
    /// Packets from the initiator.
    Original = 0,
    /// Packets to the initiator.
    Reply = 1,
}

/// A value and the bits of a mark that hold it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MarkBits {
    /// Mask of the bits.
    pub mask: u32,
    /// Value of the bits; bits outside the mask are 0.
    pub value: u32,
}

impl MarkBits {
    /// Whether a mark has this value in these bits.
    pub const fn are_in(self, mark: u32) -> bool {
        mark & self.mask == self.value
    }

    /// The mark with these bits set to this value, and the other bits unchanged.
    pub const fn set_in(self, mark: u32) -> u32 {
        mark & !self.mask | self.value
    }
}

/// A property of a packet or of its connection that a rule can load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Field {
    /// `iif`: index of the input interface, 0 if there is none.
    Input,
    /// `oif`: index of the output interface, 0 before routing.
    Output,
    /// `meta mark`: the firewall mark.
    Mark,
    /// `meta priority`, in which a packet carries a [`Tag`](super::element::Tag) from map to map.
    Priority,
    /// `meta l4proto`: protocol number of the transport header.
    Protocol,
    /// `ct direction`: a [`Direction`].
    CtDirection,
    /// `ct state`: one bit.
    CtState,
    /// `ct status`: bits.
    CtStatus,
    /// `ct mark`: the mark of the connection.
    CtMark,
    /// `ip saddr` or `ip6 saddr`.
    Source(Family),
    /// `ip daddr` or `ip6 daddr`.
    Destination(Family),
    /// `th sport`, for any transport protocol.
    SourcePort,
    /// `th dport`, for any transport protocol: cheaper than [`Field::UdpDestinationPort`].
    DestinationPort,
    /// `udp dport`.
    UdpDestinationPort,
    /// `tcp flags`.
    TcpFlags,
    /// `socket wildcard`: 1 if the socket that takes the packet is bound to no address, else 0.
    ///
    /// The socket is a connected one, or else a listening one. The rule ends if there is none, and
    /// for every protocol but TCP, UDP and ICMP errors.
    SocketWildcard,
    /// `ether saddr`: the source MAC address of the frame that the packet came in.
    EthernetSource,
    /// `fib daddr type`: the type of the destination address, such as [`Stmt::LOCAL`].
    DestinationType,
}

/// The part of a field that is compared or looked up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Mask {
    /// The whole field.
    Whole,
    /// These bits of a number.
    Bits(u32),
    /// The first bits of an address: fewer than the address has.
    Prefix(u8),
}

/// A field or a part of it, as loaded from a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Selector {
    /// The field.
    pub field: Field,
    /// The part of the field.
    pub mask: Mask,
}

/// Destination of a map's value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Target {
    /// `meta priority set`
    Priority,
    /// `vmap`: a verdict.
    Verdict,
    /// `snat ip to`: the source address of the connection.
    Snat(Family),
    /// `ether daddr set`
    EthernetDestination,
}

/// A mark that a rule can set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum MarkOf {
    /// `meta mark`
    Packet,
    /// `ct mark`
    Connection,
}

/// An interface of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Interface {
    /// `iifname`
    Input,
    /// `oifname`
    Output,
}

/// One statement of a rule.
///
/// A match must hold for the next statement to run; the other statements act on the packet.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Stmt {
    /// `selector == value`, or `!=`.
    Match {
        /// The selector that is compared.
        of: Selector,
        /// Whether the comparison is `!=`.
        negated: bool,
        /// The value to compare with; bits outside the selector's mask are 0.
        value: u32,
    },
    /// `iifname "…"` or `oifname "…"`
    Interface(Interface, DeviceName),
    /// `iifname != "…"` or `oifname != "…"`
    OtherInterface(Interface, DeviceName),
    /// `key @set`, or `!=`; where the set's elements have counters, they count the packet.
    Lookup {
        /// The key to look up, in the order of the set's key parts.
        key: Vec<Selector>,
        /// The set.
        set: Set,
        /// Whether the key must not be in the set.
        negated: bool,
    },
    /// `target key map @map`; the rule ends if the map lacks the key.
    Map {
        /// The key to look up, in the order of the map's key parts.
        key: Vec<Selector>,
        /// The map.
        map: Set,
        /// Destination of the map's value.
        into: Target,
    },
    /// `meta mark set meta mark & ~mask | value`, or the same for the connection mark.
    SetMark(MarkOf, MarkBits),
    /// `meta priority set none`
    ClearPriority,
    /// `snat ip to ip saddr`: translates the connection to its own source.
    ///
    /// No masquerade in any table applies to the connection after that.
    KeepSource(Family),
    /// `masquerade`
    Masquerade,
    /// `meta nfproto … tcp option maxseg size set …`: lowers the MSS, in bytes, of a segment.
    ///
    /// The kernel leaves a smaller MSS as it is, and adds none to a segment without one
    /// (`nft_exthdr_tcp_set_eval`).
    ClampMss(Family, u16),
    /// `notrack`
    NoTrack,
    /// `flow add @no_offload`: no other flowtable takes the connection.
    ///
    /// The rule ends if the connection is in a flowtable already, or may be in none.
    NoOffload,
    /// `counter`
    Counter,
    /// `drop`
    Drop,
    /// `return`
    Return,
    /// `jump chain`: after the chain's last rule, evaluation continues with the next statement.
    Jump(ChainId),
    /// `goto chain`
    Goto(ChainId),
    /// A statement in the kernel that this crate never writes.
    ///
    /// The number distinguishes two such statements.
    Unknown(u64),
}

impl Field {
    /// The fields that a kernel may be unable to load.
    ///
    /// The rules that test one are left out there.
    pub(crate) const OPTIONAL: [Self; 2] = [Self::SocketWildcard, Self::DestinationType];

    /// A selector of the whole field.
    pub const fn whole(self) -> Selector {
        Selector { field: self, mask: Mask::Whole }
    }

    /// A selector of these bits of a number.
    pub const fn bits(self, mask: u32) -> Selector {
        Selector { field: self, mask: Mask::Bits(mask) }
    }

    /// A selector of the first bits of an address.
    pub fn prefix(self, length: u8) -> Selector {
        let mask = if self.family().is_some_and(|family| length < family.bits()) {
            Mask::Prefix(length)
        } else {
            Mask::Whole
        };
        Selector { field: self, mask }
    }

    /// The family of an address field.
    pub const fn family(self) -> Option<Family> {
        match self {
            Self::Source(family) | Self::Destination(family) => Some(family),
            _ => None,
        }
    }

    /// A match for this value.
    pub const fn is(self, value: u32) -> Stmt {
        Stmt::Match { of: self.whole(), negated: false, value }
    }

    /// A match for any other value.
    pub const fn is_not(self, value: u32) -> Stmt {
        Stmt::Match { of: self.whole(), negated: true, value }
    }

    /// A match for a value in some bits.
    pub const fn has(self, MarkBits { mask, value }: MarkBits) -> Stmt {
        Stmt::Match { of: self.bits(mask), negated: false, value }
    }

    /// A match for any other value in some bits.
    pub const fn has_not(self, MarkBits { mask, value }: MarkBits) -> Stmt {
        Stmt::Match { of: self.bits(mask), negated: true, value }
    }

    /// A match for membership in a set.
    pub fn is_in(self, set: Set) -> Stmt {
        Stmt::Lookup { key: vec![self.whole()], set, negated: false }
    }

    /// A match for absence from a set.
    pub fn is_not_in(self, set: Set) -> Stmt {
        Stmt::Lookup { key: vec![self.whole()], set, negated: true }
    }

    /// A map lookup of the whole field.
    pub fn map(self, map: Set, into: Target) -> Stmt {
        self.whole().map(map, into)
    }
}

impl Selector {
    /// The selector's bits with this value; `None` if it selects no bits of a number.
    const fn with(self, value: u32) -> Option<MarkBits> {
        match self.mask {
            Mask::Bits(mask) => Some(MarkBits { mask, value }),
            Mask::Whole | Mask::Prefix(_) => None,
        }
    }

    /// A match for membership in a set.
    pub fn is_in(self, set: Set) -> Stmt {
        Stmt::Lookup { key: vec![self], set, negated: false }
    }

    /// A map lookup of the selector.
    pub fn map(self, map: Set, into: Target) -> Stmt {
        Stmt::Map { key: vec![self], map, into }
    }
}

impl Stmt {
    /// `ct state invalid` (`include/uapi/linux/netfilter/nf_conntrack_common.h`).
    pub const INVALID: u32 = 1;
    /// `ct state established`.
    pub const ESTABLISHED: u32 = 2;
    /// `ct state related`.
    pub const RELATED: u32 = 4;
    /// `ct state new`.
    pub const NEW: u32 = 8;
    /// `ct state untracked`.
    pub const UNTRACKED: u32 = 64;
    /// `ct status snat`: `IPS_SRC_NAT` of the same file.
    pub const SNAT: u32 = 1 << 4;
    /// `ct status confirmed`: `IPS_CONFIRMED` of the same file.
    pub const CONFIRMED: u32 = 1 << 3;
    /// `tcp flags syn` (RFC 9293 section 3.1).
    pub const SYN: u32 = 1 << 1;
    /// `tcp flags ack`.
    pub const ACK: u32 = 1 << 4;
    /// `fib daddr type unicast`: `RTN_UNICAST` of `include/uapi/linux/rtnetlink.h`.
    pub const UNICAST: u32 = 1;
    /// `fib daddr type local`: `RTN_LOCAL` of `include/uapi/linux/rtnetlink.h`.
    pub const LOCAL: u32 = 2;
    /// `meta l4proto udp` (RFC 768).
    pub const UDP: u32 = 17;

    /// `ct direction …`
    pub const fn direction(direction: Direction) -> Self {
        Field::CtDirection.is(direction as u32)
    }

    /// `ct state …`: matches any of these bits.
    pub const fn state(bits: u32) -> Self {
        Field::CtState.has_not(MarkBits { mask: bits, value: 0 })
    }

    /// `ct status ! snat`: the source of the connection is not translated.
    pub const fn not_translated() -> Self {
        Field::CtStatus.has(MarkBits { mask: Self::SNAT, value: 0 })
    }

    /// `tcp flags ! syn`: the segment does not open a connection.
    pub const fn without_syn() -> Self {
        Field::TcpFlags.has(MarkBits { mask: Self::SYN, value: 0 })
    }

    /// `tcp flags syn`: only such segments have an MSS option.
    pub const fn with_syn() -> Self {
        Field::TcpFlags.has_not(MarkBits { mask: Self::SYN, value: 0 })
    }

    /// `tcp flags & (syn|ack) != syn`: the segment is not the first one of a connection.
    pub const fn opens_nothing() -> Self {
        Field::TcpFlags.has_not(MarkBits { mask: OPENING, value: Self::SYN })
    }

    /// A lookup of addresses and protocol in a set of [replies](Set::BlockedReply).
    ///
    /// Ports are part of the key where the set's keys have them.
    pub fn answers(set: Set) -> Self {
        let family = set.family().unwrap_or(Family::V4);
        let mut key = vec![Field::Source(family), Field::Destination(family), Field::Protocol];
        if let Set::BlockedReply(_) = set {
            key.extend([Field::SourcePort, Field::DestinationPort]);
        }
        let key = key.into_iter().map(Field::whole).collect();
        Self::Lookup { key, set, negated: false }
    }

    /// `meta priority set address & length . meta priority map @…`, by a [`Set::Destination`].
    ///
    /// The address is a source or a destination.
    pub fn by_prefix(address: Field, length: u8) -> Self {
        let family = address.family().unwrap_or(Family::V4);
        let key = vec![address.prefix(length), Field::Priority.whole()];
        Self::Map { key, map: Set::Destination(family, length), into: Target::Priority }
    }

    /// Returns true for a comparison of this field.
    pub(crate) fn compares(&self, field: Field) -> bool {
        matches!(self, Self::Match { of, .. } if of.field == field)
    }

    /// The value in bits of a field that the match requires.
    pub(crate) fn tests(&self, field: Field) -> Option<MarkBits> {
        match self {
            Self::Match { of, negated: false, value } if of.field == field => of.with(*value),
            _ => None,
        }
    }

    /// The value in bits of a field that the match excludes.
    pub(crate) fn excludes(&self, field: Field) -> Option<MarkBits> {
        match self {
            Self::Match { of, negated: true, value } if of.field == field => of.with(*value),
            _ => None,
        }
    }

    /// The chain in which the statement continues.
    pub(crate) const fn next(&self) -> Option<ChainId> {
        match self {
            Self::Jump(chain) | Self::Goto(chain) => Some(*chain),
            _ => None,
        }
    }

    /// The set or map that the statement looks up.
    pub(crate) const fn set(&self) -> Option<Set> {
        match self {
            Self::Lookup { set, .. } | Self::Map { map: set, .. } => Some(*set),
            _ => None,
        }
    }
}

const fn ip(family: Family) -> &'static str {
    match family {
        Family::V4 => "ip",
        Family::V6 => "ip6",
    }
}

impl fmt::Display for Field {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Input => "iif",
            Self::Output => "oif",
            Self::Mark => "meta mark",
            Self::Priority => "meta priority",
            Self::Protocol => "meta l4proto",
            Self::CtDirection => "ct direction",
            Self::CtState => "ct state",
            Self::CtStatus => "ct status",
            Self::CtMark => "ct mark",
            Self::Source(family) => return write!(f, "{} saddr", ip(*family)),
            Self::Destination(family) => return write!(f, "{} daddr", ip(*family)),
            Self::SourcePort => "th sport",
            Self::DestinationPort => "th dport",
            Self::UdpDestinationPort => "udp dport",
            Self::TcpFlags => "tcp flags",
            Self::SocketWildcard => "socket wildcard",
            Self::EthernetSource => "ether saddr",
            Self::DestinationType => "fib daddr type",
        })
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.field.fmt(f)?;
        match (self.mask, self.field.family()) {
            (Mask::Bits(bits), _) => write!(f, " & {bits:#010x}"),
            (Mask::Prefix(length), Some(family)) => {
                match IpNet::new(family.unspecified(), length) {
                    Ok(net) => write!(f, " & {}", net.netmask()),
                    Err(_) => Ok(()),
                }
            }
            (Mask::Whole | Mask::Prefix(_), _) => Ok(()),
        }
    }
}

/// The parts of a key, as `nft` concatenates them.
struct Concatenated<'a>(&'a [Selector]);

impl fmt::Display for Concatenated<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, part) in self.0.iter().enumerate() {
            f.write_str(if index > 0 { " . " } else { "" })?;
            part.fmt(f)?;
        }
        Ok(())
    }
}

/// Flags that tell the first segment of a TCP connection from all others.
const OPENING: u32 = Stmt::SYN | Stmt::ACK;

/// Writes a comparison; uses the name of the value where `nft` has one.
fn comparison(f: &mut fmt::Formatter<'_>, of: Selector, negated: bool, value: u32) -> fmt::Result {
    let not = if negated { "!= " } else { "" };
    match (of.field, of.mask, negated, value) {
        (Field::CtDirection, Mask::Whole, _, 0) => write!(f, "ct direction {not}original"),
        (Field::CtDirection, Mask::Whole, _, 1) => write!(f, "ct direction {not}reply"),
        (Field::CtState, Mask::Bits(bits), true, 0) => {
            let names = [
                (Stmt::INVALID, "invalid"),
                (Stmt::ESTABLISHED, "established"),
                (Stmt::RELATED, "related"),
                (Stmt::NEW, "new"),
                (Stmt::UNTRACKED, "untracked"),
            ];
            let set = names.iter().filter(|(bit, _)| bits & bit != 0);
            let names: Vec<_> = set.map(|(_, name)| *name).collect();
            write!(f, "ct state {}", names.join(","))
        }
        (Field::CtStatus, Mask::Bits(Stmt::SNAT), false, 0) => f.write_str("ct status ! snat"),
        (Field::TcpFlags, Mask::Bits(Stmt::SYN), false, 0) => f.write_str("tcp flags ! syn"),
        (Field::TcpFlags, Mask::Bits(Stmt::SYN), true, 0) => f.write_str("tcp flags syn"),
        (Field::TcpFlags, Mask::Bits(OPENING), true, Stmt::SYN) => {
            f.write_str("tcp flags & (syn|ack) != syn")
        }
        (Field::DestinationType, Mask::Whole, _, Stmt::LOCAL) => write!(f, "{of} {not}local"),
        (Field::Protocol, Mask::Whole, _, Stmt::UDP) => write!(f, "{of} {not}udp"),
        (_, Mask::Bits(_), ..) => {
            write!(f, "{of} {} {value:#010x}", if negated { "!=" } else { "==" })
        }
        (Field::Mark | Field::CtMark, ..) => write!(f, "{of} {not}{value:#010x}"),
        _ => write!(f, "{of} {not}{value}"),
    }
}

impl fmt::Display for Interface {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Input => "iifname",
            Self::Output => "oifname",
        })
    }
}

impl fmt::Display for Stmt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Match { of, negated, value } => comparison(f, *of, *negated, *value),
            Self::Interface(interface, name) => write!(f, "{interface} \"{name}\""),
            Self::OtherInterface(interface, name) => write!(f, "{interface} != \"{name}\""),
            Self::Lookup { key, set, negated } => {
                let not = if *negated { "!= " } else { "" };
                write!(f, "{} {not}@{set}", Concatenated(key))
            }
            Self::Map { key, map, into } => {
                let key = Concatenated(key);
                match into {
                    Target::Priority => write!(f, "meta priority set {key} map @{map}"),
                    Target::Verdict => write!(f, "{key} vmap @{map}"),
                    Target::Snat(family) => write!(f, "snat {} to {key} map @{map}", ip(*family)),
                    Target::EthernetDestination => write!(f, "ether daddr set {key} map @{map}"),
                }
            }
            Self::SetMark(MarkOf::Packet, MarkBits { mask, value: 0 }) => {
                write!(f, "meta mark set meta mark & {:#010x}", !mask)
            }
            Self::SetMark(of, MarkBits { mask, value }) => {
                let mark = match of {
                    MarkOf::Packet => Field::Mark,
                    MarkOf::Connection => Field::CtMark,
                };
                write!(f, "{mark} set {mark} & {:#010x} | {value:#010x}", !mask)
            }
            Self::ClearPriority => f.write_str("meta priority set none"),
            Self::KeepSource(family) => {
                let (digit, ip) = (family.digit(), ip(*family));
                write!(f, "meta nfproto ipv{digit} snat {ip} to {ip} saddr")
            }
            Self::Masquerade => f.write_str("masquerade"),
            Self::ClampMss(family, size) => {
                let digit = family.digit();
                write!(f, "meta nfproto ipv{digit} tcp option maxseg size set {size}")
            }
            Self::NoTrack => f.write_str("notrack"),
            Self::NoOffload => write!(f, "flow add @{FLOWTABLE}"),
            Self::Counter => f.write_str("counter"),
            Self::Drop => f.write_str("drop"),
            Self::Return => f.write_str("return"),
            Self::Jump(chain) => write!(f, "jump {chain}"),
            Self::Goto(chain) => write!(f, "goto {chain}"),
            Self::Unknown(_) => f.write_str("<not ours>"),
        }
    }
}

/// An nf_tables rule: its statements in order.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NftRule(pub Vec<Stmt>);

impl fmt::Display for NftRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, statement) in self.0.iter().enumerate() {
            if index > 0 {
                f.write_str(" ")?;
            }
            statement.fmt(f)?;
        }
        Ok(())
    }
}
