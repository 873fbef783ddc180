//! The statements our rules are made of, in the kernel's meaning and in `nft`'s words.

use std::fmt;

use ipnet::IpNet;

use super::chain::ChainId;
use super::set::Set;
use crate::types::{DeviceName, Family};

/// Direction of a packet in its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Direction {
    /// From the side that opened it.
    Original = 0,
    /// Back to it.
    Reply = 1,
}

/// A value in some bits of a mark.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MarkBits {
    /// The bits.
    pub mask: u32,
    /// Their value; none outside the mask.
    pub value: u32,
}

impl MarkBits {
    /// Whether a mark has this value in these bits.
    pub const fn are_in(self, mark: u32) -> bool {
        mark & self.mask == self.value
    }
}

/// One statement of a rule: a test that must hold for the next to run, or something done.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Stmt {
    /// `iif != 0`: the packet came in by a device, from where it is routed on
    HasInput,
    /// `oif 0`: it is not known yet by which device the packet leaves, as before routing
    HasNoOutput,
    /// `iifname "…"`
    InputDevice(DeviceName),
    /// `oifname "…"`
    OutputDevice(DeviceName),
    /// `meta mark & mask == value`
    MarkIs {
        /// Bits compared.
        mask: u32,
        /// What they must be.
        value: u32,
    },
    /// `meta mark & mask != value`
    MarkIsNot {
        /// Bits compared.
        mask: u32,
        /// What they must not be.
        value: u32,
    },
    /// `meta mark & mask @set`
    MarkIn {
        /// Bits compared.
        mask: u32,
        /// Set of marks.
        set: Set,
    },
    /// `ip saddr @set`, of the set's family
    SourceIn(Set),
    /// `ip saddr != @set`, of the set's family
    SourceNotIn(Set),
    /// `ip daddr @set`, of the set's family
    DestinationIn(Set),
    /// `ip daddr != @set`, of the set's family
    DestinationNotIn(Set),
    /// `ip saddr . ip daddr . meta l4proto @set`, with `. th sport . th dport` where the set's
    /// keys have ports, of the set's family
    PacketIn(Set),
    /// `ct direction …`
    CtDirection(Direction),
    /// `ct state …`: one of these bits
    CtState(u32),
    /// `ct status ! snat`: the connection's source is not translated
    NotTranslated,
    /// `ct mark & mask == value`
    CtMarkIs(MarkBits),
    /// `ct mark & mask != value`
    CtMarkIsNot(MarkBits),
    /// `ct mark & mask vmap @set`
    VerdictByCtMark {
        /// Bits compared.
        mask: u32,
        /// Map of marks.
        set: Set,
    },
    /// `ct mark set ct mark & ~mask | value`
    SetCtMark(MarkBits),
    /// `notrack`
    NoTrack,
    /// `th dport …`, of whatever protocol: cheaper to ask first than [`Stmt::UdpPort`]
    Port(u16),
    /// `udp dport …`
    UdpPort(u16),
    /// `tcp flags ! syn`: it does not open a connection
    TcpWithoutSyn,
    /// `icmpv6 type …`
    Icmp6Type(u8),
    /// `meta mark set meta mark & keep | value`
    SetMark {
        /// Bits that stay as they are.
        keep: u32,
        /// Bits that are set; none of them in `keep`.
        value: u32,
    },
    /// `ether daddr set meta mark & mask map @next_hop`
    SetNextHop {
        /// Bits compared.
        mask: u32,
    },
    /// `meta priority set none`
    ClearTag,
    /// `meta priority set ip saddr map @set`
    TagBySource(Set),
    /// `meta priority set ip daddr & length . meta priority map @set`, by [`Set::Destination`]
    TagByDestination(Family, u8),
    /// `meta priority set ip daddr map @set`
    TagByReceiver(Set),
    /// `meta priority set ip saddr & length . meta priority map @set`, by [`Set::Destination`]
    TagBySender(Family, u8),
    /// `meta priority set meta priority map @set`
    TagByTag(Set),
    /// `meta priority @set`; where the set's elements have counters, they count the packet
    TagIn(Set),
    /// `meta priority vmap @set`
    VerdictByTag(Set),
    /// `snat ip to ip saddr`: binds the connection to its own source, so nobody masquerades it
    SnatToSource(Family),
    /// `snat ip to meta priority map @set`
    SnatByTag(Family),
    /// `masquerade`
    Masquerade,
    /// `counter`
    Counter,
    /// `drop`
    Drop,
    /// `return`
    Return,
    /// `jump chain`: the rule goes on behind the last rule of the chain
    Jump(ChainId),
    /// `goto chain`
    Goto(ChainId),
    /// Something found in the kernel that we never write; the number tells two of them apart.
    Unknown(u64),
}

impl Stmt {
    /// `ct state invalid` (`include/uapi/linux/netfilter/nf_conntrack_common.h`).
    pub const INVALID: u32 = 1;
    /// `ct state new`.
    pub const NEW: u32 = 8;
    /// `ct state untracked`.
    pub const UNTRACKED: u32 = 64;

    /// The set that it looks into.
    pub(crate) const fn set(&self) -> Option<Set> {
        match self {
            Self::MarkIn { set, .. }
            | Self::VerdictByCtMark { set, .. }
            | Self::SourceIn(set)
            | Self::SourceNotIn(set)
            | Self::DestinationIn(set)
            | Self::DestinationNotIn(set)
            | Self::PacketIn(set)
            | Self::TagBySource(set)
            | Self::TagByReceiver(set)
            | Self::TagByTag(set)
            | Self::TagIn(set)
            | Self::VerdictByTag(set) => Some(*set),
            Self::TagByDestination(family, length) | Self::TagBySender(family, length) => {
                Some(Set::Destination(*family, *length))
            }
            Self::SnatByTag(family) => Some(Set::Snat(*family)),
            Self::SetNextHop { .. } => Some(Set::NextHop),
            Self::HasInput
            | Self::HasNoOutput
            | Self::InputDevice(_)
            | Self::OutputDevice(_)
            | Self::MarkIs { .. }
            | Self::MarkIsNot { .. }
            | Self::CtDirection(_)
            | Self::CtState(_)
            | Self::NotTranslated
            | Self::CtMarkIs(_)
            | Self::CtMarkIsNot(_)
            | Self::SetCtMark(_)
            | Self::Port(_)
            | Self::UdpPort(_)
            | Self::TcpWithoutSyn
            | Self::Icmp6Type(_)
            | Self::SetMark { .. }
            | Self::ClearTag
            | Self::SnatToSource(_)
            | Self::Masquerade
            | Self::NoTrack
            | Self::Counter
            | Self::Drop
            | Self::Return
            | Self::Jump(_)
            | Self::Goto(_)
            | Self::Unknown(_) => None,
        }
    }
}

const fn ip(family: Family) -> &'static str {
    match family {
        Family::V4 => "ip",
        Family::V6 => "ip6",
    }
}

/// The header that a set's keys are taken from.
fn set_ip(set: Set) -> &'static str {
    ip(set.family().unwrap_or(Family::V4))
}

fn tag_by_net(
    f: &mut fmt::Formatter<'_>,
    address: &str,
    family: Family,
    length: u8,
) -> fmt::Result {
    write!(f, "meta priority set {} {address}", ip(family))?;
    let net = IpNet::new(family.unspecified(), length).ok();
    if let Some(net) = net.filter(|net| net.prefix_len() < family.bits()) {
        write!(f, " & {}", net.netmask())?;
    }
    write!(f, " . meta priority map @{}", Set::Destination(family, length))
}

impl fmt::Display for Stmt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::HasInput => f.write_str("iif != 0"),
            Self::HasNoOutput => f.write_str("oif 0"),
            Self::InputDevice(name) => write!(f, "iifname \"{name}\""),
            Self::OutputDevice(name) => write!(f, "oifname \"{name}\""),
            Self::MarkIs { mask, value } => write!(f, "meta mark & {mask:#010x} == {value:#010x}"),
            Self::MarkIsNot { mask, value } => {
                write!(f, "meta mark & {mask:#010x} != {value:#010x}")
            }
            Self::MarkIn { mask, set } => write!(f, "meta mark & {mask:#010x} @{set}"),
            Self::SourceIn(set) => write!(f, "{} saddr @{set}", set_ip(*set)),
            Self::SourceNotIn(set) => write!(f, "{} saddr != @{set}", set_ip(*set)),
            Self::DestinationIn(set) => write!(f, "{} daddr @{set}", set_ip(*set)),
            Self::DestinationNotIn(set) => write!(f, "{} daddr != @{set}", set_ip(*set)),
            Self::PacketIn(set) => {
                let ip = set_ip(*set);
                write!(f, "{ip} saddr . {ip} daddr . meta l4proto ")?;
                if let Set::Answer(_) = set {
                    f.write_str(". th sport . th dport ")?;
                }
                write!(f, "@{set}")
            }
            Self::CtDirection(Direction::Original) => f.write_str("ct direction original"),
            Self::CtDirection(Direction::Reply) => f.write_str("ct direction reply"),
            Self::CtState(bits) => {
                let names = [
                    (1, "invalid"),
                    (2, "established"),
                    (4, "related"),
                    (8, "new"),
                    (64, "untracked"),
                ];
                let names: Vec<_> = names
                    .iter()
                    .filter(|(bit, _)| bits & bit != 0)
                    .map(|(_, name)| *name)
                    .collect();
                write!(f, "ct state {}", names.join(","))
            }
            Self::NotTranslated => f.write_str("ct status ! snat"),
            Self::CtMarkIs(MarkBits { mask, value }) => {
                write!(f, "ct mark & {mask:#010x} == {value:#010x}")
            }
            Self::CtMarkIsNot(MarkBits { mask, value }) => {
                write!(f, "ct mark & {mask:#010x} != {value:#010x}")
            }
            Self::VerdictByCtMark { mask, set } => {
                write!(f, "ct mark & {mask:#010x} vmap @{set}")
            }
            Self::SetCtMark(MarkBits { mask, value }) => {
                write!(f, "ct mark set ct mark & {:#010x} | {value:#010x}", !mask)
            }
            Self::NoTrack => f.write_str("notrack"),
            Self::Port(port) => write!(f, "th dport {port}"),
            Self::UdpPort(port) => write!(f, "udp dport {port}"),
            Self::TcpWithoutSyn => f.write_str("tcp flags ! syn"),
            Self::Icmp6Type(kind) => write!(f, "icmpv6 type {kind}"),
            Self::SetMark { keep, value: 0 } => {
                write!(f, "meta mark set meta mark & {keep:#010x}")
            }
            Self::SetMark { keep, value } => {
                write!(f, "meta mark set meta mark & {keep:#010x} | {value:#010x}")
            }
            Self::SetNextHop { mask } => {
                write!(f, "ether daddr set meta mark & {mask:#010x} map @{}", Set::NextHop)
            }
            Self::ClearTag => f.write_str("meta priority set none"),
            Self::TagBySource(set) => {
                write!(f, "meta priority set {} saddr map @{set}", set_ip(*set))
            }
            Self::TagByReceiver(set) => {
                write!(f, "meta priority set {} daddr map @{set}", set_ip(*set))
            }
            Self::TagByDestination(family, length) => tag_by_net(f, "daddr", *family, *length),
            Self::TagBySender(family, length) => tag_by_net(f, "saddr", *family, *length),
            Self::TagByTag(set) => write!(f, "meta priority set meta priority map @{set}"),
            Self::TagIn(set) => write!(f, "meta priority @{set}"),
            Self::VerdictByTag(set) => write!(f, "meta priority vmap @{set}"),
            Self::SnatToSource(family) => {
                write!(
                    f,
                    "meta nfproto ipv{} snat {ip} to {ip} saddr",
                    family.digit(),
                    ip = ip(*family)
                )
            }
            Self::SnatByTag(family) => {
                write!(f, "snat {} to meta priority map @{}", ip(*family), Set::Snat(*family))
            }
            Self::Masquerade => f.write_str("masquerade"),
            Self::Counter => f.write_str("counter"),
            Self::Drop => f.write_str("drop"),
            Self::Return => f.write_str("return"),
            Self::Jump(chain) => write!(f, "jump {chain}"),
            Self::Goto(chain) => write!(f, "goto {chain}"),
            Self::Unknown(_) => f.write_str("<not ours>"),
        }
    }
}

/// One rule: its statements in order.
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
