//! The contents of the nf_tables table: sets, maps and their elements.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use super::elements::Elements;
use super::ruleset::{Base, ChainId, NftRule};
use crate::range::IpRange;
use crate::types::{Family, Mark, PolicyId, fnv1a};

/// The nf_tables table of ours: chains that never change in steady state, and the elements of
/// the maps they look into.
///
/// A packet walks down the maps: its source gives a class (a distinct ordered combination of
/// policies), class and destination give a policy, the policy gives a way out, the way out a
/// verdict. So moving a policy to another gateway is one element, however many pods it has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Firewall {
    /// Chains and their rules.
    pub chains: BTreeMap<ChainId, (Option<Base>, Vec<NftRule>)>,
    /// Sets and maps that exist.
    pub sets: BTreeSet<Set>,
    /// Elements of all sets and maps.
    pub elements: Elements,
    /// Sets and chains found in our table that we never make, by name.
    pub strays: BTreeSet<Stray>,
}

impl Firewall {
    /// An element of the same set whose range shares addresses with that of the key.
    ///
    /// `None` for keys that are not ranges.
    pub fn overlapping(&self, key: &Key) -> Option<&Key> {
        let (range, make): (_, fn(IpRange) -> Key) = match key {
            Key::Excluded(range) => (range, Key::Excluded),
            Key::SourceNet(range) => (range, Key::SourceNet),
            _ => return None,
        };
        // Ranges of one set are disjoint, so only the last that begins in time can reach it.
        let end = make(IpRange::from_to_end(range.last()));
        let other = self.elements.last_range_up_to(&end)?;
        let (Key::Excluded(found) | Key::SourceNet(found)) = other else { return None };
        (other.set() == key.set() && found.last() >= range.first()).then_some(other)
    }
}

/// Something found in our table that we never make.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Stray {
    /// A chain with this name.
    Chain(String),
    /// A set or map with this name.
    Set(String),
}

/// A value that a packet carries from one map to the next in `meta priority`.
///
/// Both halves are never zero, so that `nft` prints it as `a:b` and reads it back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tag(u32);

impl Tag {
    /// Way out: drop the packet.
    pub const CLOSED: Self = Self(0x0001_0001);
    /// Way out: translate it here.
    pub const HERE: Self = Self(0x0001_0002);
    /// Way out: leave it alone.
    pub const BYPASS: Self = Self(0x0001_0003);

    /// The tag with this number, `None` if one of its halves is zero or it is all ones.
    pub const fn new(number: u32) -> Option<Self> {
        if number >> 16 == 0 || number.trailing_zeros() >= 16 || number == u32::MAX {
            return None;
        }
        Some(Self(number))
    }

    /// The number.
    pub const fn get(self) -> u32 {
        self.0
    }

    /// Way out: the gateway whose mark has this value.
    pub const fn gateway(value: u16) -> Self {
        let value = value as u32;
        Self((0x0002 + (value >> 15)) << 16 | ((value & 0x7fff) + 1))
    }
}

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}:{:x}", self.0 >> 16, self.0 & 0xffff)
    }
}

/// Type of a key part or of a map's value, as `nft` names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Datum {
    Ipv4,
    Ipv6,
    Mark,
    ClassId,
    Protocol,
    Service,
    Verdict,
}

impl Datum {
    pub(crate) const fn of(family: Family) -> Self {
        match family {
            Family::V4 => Self::Ipv4,
            Family::V6 => Self::Ipv6,
        }
    }

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Ipv4 => "ipv4_addr",
            Self::Ipv6 => "ipv6_addr",
            Self::Mark => "mark",
            Self::ClassId => "classid",
            Self::Protocol => "inet_proto",
            Self::Service => "inet_service",
            Self::Verdict => "verdict",
        }
    }

    /// Bytes of the value in a key, whose parts fill whole registers; a verdict has no length
    /// of its own.
    #[cfg(all(feature = "kernel", target_os = "linux"))]
    pub(crate) const fn len(self) -> usize {
        match self {
            Self::Ipv6 => 16,
            Self::Verdict => 0,
            _ => 4,
        }
    }
}

/// A set or map of our table; its name, types and flags follow from which one it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Set {
    /// Underlay addresses of the other nodes: who may send tunnel packets.
    Peer(Family),
    /// Destinations that are never steered.
    Excluded(Family),
    /// Egress IPs that this node speaks with.
    Eip(Family),
    /// Answers to connections that were ended: from, to, protocol and ports. Its elements come
    /// with [`Op::HoldAnswers`](crate::Op::HoldAnswers), go by themselves, and are part of no state.
    Answer(Family),
    /// The same of protocols without ports.
    PortlessAnswer(Family),
    /// Marks in use, in layouts without prefix.
    Gateway,
    /// Way out → verdict.
    Verdict,
    /// Policy → way out.
    Steer(Family),
    /// Policy → egress IP.
    Snat(Family),
    /// Policies that wear the node's own address.
    Masquerade(Family),
    /// Class → policy for every external destination.
    Any(Family),
    /// Destination cut to this prefix length, and class → policy.
    Destination(Family, u8),
    /// Source address → class.
    Source(Family),
    /// Range of source addresses → class.
    SourceNet(Family),
}

impl Set {
    /// Its name in the table.
    pub fn name(self) -> String {
        match self {
            Self::Peer(family) => format!("peer{}", family.digit()),
            Self::Excluded(family) => format!("excluded{}", family.digit()),
            Self::Eip(family) => format!("eip{}", family.digit()),
            Self::Answer(family) => format!("answer{}", family.digit()),
            Self::PortlessAnswer(family) => format!("answer{}_portless", family.digit()),
            Self::Gateway => "gateway_mark".into(),
            Self::Verdict => "way_out".into(),
            Self::Steer(family) => format!("steer{}", family.digit()),
            Self::Snat(family) => format!("snat{}", family.digit()),
            Self::Masquerade(family) => format!("masquerade{}", family.digit()),
            Self::Any(family) => format!("any{}", family.digit()),
            Self::Destination(family, length) => format!("dest{}_{length}", family.digit()),
            Self::Source(family) => format!("source{}", family.digit()),
            Self::SourceNet(family) => format!("source_net{}", family.digit()),
        }
    }

    /// The set with this name.
    pub fn from_name(name: &str) -> Option<Self> {
        use Family::{V4, V6};
        Some(match name {
            "peer4" => Self::Peer(V4),
            "peer6" => Self::Peer(V6),
            "excluded4" => Self::Excluded(V4),
            "excluded6" => Self::Excluded(V6),
            "eip4" => Self::Eip(V4),
            "eip6" => Self::Eip(V6),
            "answer4" => Self::Answer(V4),
            "answer6" => Self::Answer(V6),
            "answer4_portless" => Self::PortlessAnswer(V4),
            "answer6_portless" => Self::PortlessAnswer(V6),
            "gateway_mark" => Self::Gateway,
            "way_out" => Self::Verdict,
            "steer4" => Self::Steer(V4),
            "steer6" => Self::Steer(V6),
            "snat4" => Self::Snat(V4),
            "snat6" => Self::Snat(V6),
            "masquerade4" => Self::Masquerade(V4),
            "masquerade6" => Self::Masquerade(V6),
            "any4" => Self::Any(V4),
            "any6" => Self::Any(V6),
            "source4" => Self::Source(V4),
            "source6" => Self::Source(V6),
            "source_net4" => Self::SourceNet(V4),
            "source_net6" => Self::SourceNet(V6),
            _ => {
                let (family, length) = match name.split_once('_')? {
                    ("dest4", length) => (V4, length),
                    ("dest6", length) => (V6, length),
                    _ => return None,
                };
                let set = Self::Destination(family, length.parse().ok()?);
                let Self::Destination(_, length) = set else {
                    return None;
                };
                (1..=family.bits()).contains(&length).then_some(set).filter(|s| s.name() == name)?
            }
        })
    }

    /// Types of the key's parts, in order.
    pub(crate) fn key(self) -> &'static [Datum] {
        const IP: [&[Datum]; 2] = [&[Datum::Ipv4], &[Datum::Ipv6]];
        const ANSWER: [&[Datum]; 2] = [
            &[Datum::Ipv4, Datum::Ipv4, Datum::Protocol, Datum::Service, Datum::Service],
            &[Datum::Ipv6, Datum::Ipv6, Datum::Protocol, Datum::Service, Datum::Service],
        ];
        const PORTLESS: [&[Datum]; 2] = [
            &[Datum::Ipv4, Datum::Ipv4, Datum::Protocol],
            &[Datum::Ipv6, Datum::Ipv6, Datum::Protocol],
        ];
        const IP_CLASS: [&[Datum]; 2] =
            [&[Datum::Ipv4, Datum::ClassId], &[Datum::Ipv6, Datum::ClassId]];
        let pick = |types: [&'static [Datum]; 2], family| match family {
            Family::V4 => types[0],
            Family::V6 => types[1],
        };
        match self {
            Self::Peer(family)
            | Self::Excluded(family)
            | Self::Eip(family)
            | Self::Source(family)
            | Self::SourceNet(family) => pick(IP, family),
            Self::Answer(family) => pick(ANSWER, family),
            Self::PortlessAnswer(family) => pick(PORTLESS, family),
            Self::Gateway => &[Datum::Mark],
            Self::Destination(family, _) => pick(IP_CLASS, family),
            Self::Verdict | Self::Steer(_) | Self::Snat(_) | Self::Masquerade(_) | Self::Any(_) => {
                &[Datum::ClassId]
            }
        }
    }

    /// Type of the value; `None` for a plain set.
    pub(crate) const fn data(self) -> Option<Datum> {
        match self {
            Self::Peer(_)
            | Self::Excluded(_)
            | Self::Eip(_)
            | Self::Answer(_)
            | Self::PortlessAnswer(_)
            | Self::Gateway
            | Self::Masquerade(_) => None,
            Self::Verdict => Some(Datum::Verdict),
            Self::Snat(family) => Some(Datum::of(family)),
            Self::Steer(_)
            | Self::Any(_)
            | Self::Destination(..)
            | Self::Source(_)
            | Self::SourceNet(_) => Some(Datum::ClassId),
        }
    }

    /// Whether it holds ranges.
    pub(crate) const fn is_interval(self) -> bool {
        matches!(self, Self::Excluded(_) | Self::SourceNet(_))
    }

    /// Whether its elements go by themselves after a while.
    pub(crate) const fn is_fleeting(self) -> bool {
        matches!(self, Self::Answer(_) | Self::PortlessAnswer(_))
    }
}

impl fmt::Display for Set {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name())
    }
}

/// An element: the set it is in and its key there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Key {
    /// In [`Set::Peer`].
    Peer(IpAddr),
    /// In [`Set::Excluded`].
    Excluded(IpRange),
    /// In [`Set::Eip`].
    Eip(IpAddr),
    /// In [`Set::Gateway`].
    Gateway(Mark),
    /// In [`Set::Verdict`].
    Verdict(Tag),
    /// In [`Set::Steer`].
    Steer(Family, Tag),
    /// In [`Set::Snat`].
    Snat(Family, Tag),
    /// In [`Set::Masquerade`].
    Masquerade(Family, Tag),
    /// In [`Set::Any`].
    Any(Family, Tag),
    /// In [`Set::Destination`]: the destination prefix and the class.
    Destination(IpNet, Tag),
    /// In [`Set::Source`].
    Source(IpAddr),
    /// In [`Set::SourceNet`].
    SourceNet(IpRange),
}

impl Key {
    /// The set the element is in.
    pub fn set(&self) -> Set {
        match *self {
            Self::Peer(address) => Set::Peer(Family::of(address)),
            Self::Excluded(range) => Set::Excluded(range.family()),
            Self::Eip(address) => Set::Eip(Family::of(address)),
            Self::Gateway(_) => Set::Gateway,
            Self::Verdict(_) => Set::Verdict,
            Self::Steer(family, _) => Set::Steer(family),
            Self::Snat(family, _) => Set::Snat(family),
            Self::Masquerade(family, _) => Set::Masquerade(family),
            Self::Any(family, _) => Set::Any(family),
            Self::Destination(net, _) => Set::Destination(Family::of_net(&net), net.prefix_len()),
            Self::Source(address) => Set::Source(Family::of(address)),
            Self::SourceNet(range) => Set::SourceNet(range.family()),
        }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Peer(address) | Self::Eip(address) | Self::Source(address) => address.fmt(f),
            Self::Excluded(range) | Self::SourceNet(range) => range.fmt(f),
            Self::Gateway(mark) => mark.fmt(f),
            Self::Verdict(tag)
            | Self::Steer(_, tag)
            | Self::Snat(_, tag)
            | Self::Masquerade(_, tag)
            | Self::Any(_, tag) => tag.fmt(f),
            Self::Destination(net, class) => write!(f, "{} . {class}", net.addr()),
        }
    }
}

/// What a map gives for a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Data {
    /// Nothing: the element of a set.
    None,
    /// A class, policy or way out.
    Tag(Tag),
    /// An egress IP.
    Address(IpAddr),
    /// What happens to the packet.
    Verdict(Verdict),
}

/// What happens to a packet at the end of the maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Verdict {
    /// It is dropped.
    Drop,
    /// It goes on to this chain.
    Goto(ChainId),
}

/// The right side of an element: what its map gives, and the comment an operator reads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Value {
    /// What the map gives.
    pub data: Data,
    /// Which policy or node the element stands for.
    pub comment: Option<Comment>,
}

impl Value {
    /// A value without comment.
    pub const fn plain(data: Data) -> Self {
        Self { data, comment: None }
    }
}

/// The comment of an element: at most 120 bytes that `nft` prints and reads back.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Comment(Arc<str>);

impl Comment {
    /// Longest comment in bytes; `nft` allows 128 with the closing NUL.
    pub const MAX: usize = 120;

    /// The comment for a policy: its id, or the beginning of a long one and a hash of it all.
    pub fn of_policy(id: &PolicyId) -> Self {
        Self::of_name(id.as_str())
    }

    pub(crate) fn of_name(name: &str) -> Self {
        if name.len() <= Self::MAX {
            return Self(name.into());
        }
        let head: String = name.chars().take(Self::MAX - 17).collect();
        Self(format!("{head}~{:016x}", fnv1a(name.as_bytes())).into())
    }

    /// A comment as it was found in the kernel, whatever it says.
    #[cfg(all(feature = "kernel", target_os = "linux"))]
    pub(crate) fn found(text: &str) -> Self {
        Self(text.into())
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Value {
    /// The part of the element behind its key: ` comment "…" : data`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(comment) = &self.comment {
            write!(f, " comment \"{}\"", comment.as_str().escape_default())?;
        }
        match self.data {
            Data::None => Ok(()),
            Data::Tag(tag) => write!(f, " : {tag}"),
            Data::Address(address) => write!(f, " : {address}"),
            Data::Verdict(Verdict::Drop) => f.write_str(" : drop"),
            Data::Verdict(Verdict::Goto(chain)) => write!(f, " : goto {chain}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn set_names_read_back() {
        let mut sets = vec![Set::Gateway, Set::Verdict];
        for family in Family::BOTH {
            sets.extend([
                Set::Peer(family),
                Set::Excluded(family),
                Set::Eip(family),
                Set::Answer(family),
                Set::PortlessAnswer(family),
                Set::Steer(family),
                Set::Snat(family),
                Set::Masquerade(family),
                Set::Any(family),
                Set::Source(family),
                Set::SourceNet(family),
            ]);
            sets.extend((1..=family.bits()).map(|length| Set::Destination(family, length)));
        }
        for set in sets {
            assert_eq!(Set::from_name(&set.name()), Some(set));
        }
        for name in ["", "dest4_0", "dest4_33", "dest4_024", "dest6_129", "dest5_1", "source"] {
            assert_eq!(Set::from_name(name), None, "{name}");
        }
    }

    #[test]
    fn the_ways_out_of_all_gateways_are_distinct_tags() {
        let tags: BTreeSet<_> = (0..=u16::MAX).map(Tag::gateway).collect();
        assert_eq!(tags.len(), 65_536);
        for tag in tags.into_iter().chain([Tag::CLOSED, Tag::HERE, Tag::BYPASS]) {
            assert_eq!(Tag::new(tag.get()), Some(tag));
        }
    }

    #[test]
    fn long_ids_keep_their_beginning_and_differ() {
        let id = |tail: &str| PolicyId::new(format!("{}{tail}", "n".repeat(200))).unwrap();
        let (a, b) = (Comment::of_policy(&id("a")), Comment::of_policy(&id("b")));
        assert_ne!(a, b);
        assert_eq!(a.as_str().len(), Comment::MAX);
    }
}
