//! The sets and maps of our nf_tables tables: names, types and flags, and the keys of elements.
//!
//! [`Set::row`] is the table of all sets; what depends on the set follows from its row.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};

use ipnet::IpNet;

use super::chain::TableFamily;
use super::element::Tag;
use crate::range::IpRange;
use crate::types::{Family, MacAddr, Mark};

/// Data type of a key part or of a map's value, as `nft` names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Datum {
    Ipv4,
    Ipv6,
    Ethernet,
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
            Self::Ethernet => "ether_addr",
            Self::Mark => "mark",
            Self::ClassId => "classid",
            Self::Protocol => "inet_proto",
            Self::Service => "inet_service",
            Self::Verdict => "verdict",
        }
    }

    /// Length of the value in bytes.
    ///
    /// A part of a key fills whole registers, and a verdict has no length of its own.
    #[cfg(all(feature = "kernel", target_os = "linux"))]
    pub(crate) const fn len(self) -> usize {
        match self {
            Self::Ipv6 => 16,
            Self::Ethernet => 6,
            Self::Verdict => 0,
            _ => 4,
        }
    }
}

/// A set or map of our tables; its name, types and flags follow from the variant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Set {
    /// Underlay addresses of the other nodes, the permitted senders of tunnel packets.
    Peer(Family),
    /// Underlay addresses of this node, the destinations of tunnel packets.
    Underlay(Family),
    /// Destinations that are never steered.
    Excluded(Family),
    /// Egress IPs that this node uses as source addresses.
    Eip(Family),
    /// Replies to terminated connections: source, destination, protocol and ports.
    ///
    /// [`Op::BlockReplies`](crate::datapath::Op::BlockReplies) adds the elements. They expire after
    /// a timeout and are not part of a state.
    BlockedReply(Family),
    /// Replies to terminated connections of protocols without ports.
    PortlessBlockedReply(Family),
    /// Marks in use, in mark layouts without prefix.
    Gateway,
    /// Connection mark → verdict, where the connection mark names the node to send packets to.
    Connection,
    /// MAC address of another node's tunnel interface → verdict.
    PeerMac,
    /// Action → verdict.
    PolicyAction,
    /// Policy → action.
    Steer(Family),
    /// Policy → egress IP.
    Snat(Family),
    /// Policies that use the node's own address as source.
    Masquerade(Family),
    /// Policies whose packets are counted.
    ///
    /// Each element has a counter, which counts lookups that match. Its value is not part of a
    /// state.
    Count(Family),
    /// Class → policy for every external destination.
    Any(Family),
    /// Destination truncated to this prefix length, and class → policy.
    Destination(Family, u8),
    /// Source address → class.
    Source(Family),
    /// Range of source addresses → class.
    SourceNet(Family),
    /// Mark → MAC address of the gateway.
    NextHop,
}

/// Place of a set among the lookups of a packet.
///
/// Its elements are added before those of sets that are looked up earlier, and deleted after them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Marks that guard rules match; packets with such a mark may be in flight.
    Guard,
    /// Marks that the egress hook looks up, of packets that the routes send there.
    Hook,
    /// Verdicts, and addresses that the rules match.
    Verdict,
    /// The action of a policy.
    Policy,
    /// The policy of a class.
    Class,
    /// The class of a source.
    Source,
}

/// The properties of a set.
#[derive(Clone, Copy, Debug)]
struct Row {
    /// Name ahead of the family's digit, the family, and name behind the digit.
    name: (&'static str, Option<Family>, &'static str),
    stage: Stage,
    key: &'static [Datum],
    data: Option<Datum>,
    interval: bool,
    counter: bool,
    timeout: bool,
}

impl Row {
    /// A plain hash set.
    const fn set(
        name: &'static str,
        family: Option<Family>,
        stage: Stage,
        key: &'static [Datum],
    ) -> Self {
        let name = (name, family, "");
        Self { name, stage, key, data: None, interval: false, counter: false, timeout: false }
    }

    const fn of_addresses(name: &'static str, family: Family, stage: Stage) -> Self {
        let key: &[Datum] = match family {
            Family::V4 => &[Datum::Ipv4],
            Family::V6 => &[Datum::Ipv6],
        };
        Self::set(name, Some(family), stage, key)
    }

    const fn of_tags(name: &'static str, family: Family, stage: Stage) -> Self {
        Self::set(name, Some(family), stage, &[Datum::ClassId])
    }

    const fn map(self, data: Datum) -> Self {
        Self { data: Some(data), ..self }
    }
}

impl Set {
    /// The table of all sets: name, place among the lookups, types and flags of each.
    const fn row(self) -> Row {
        use Datum::{ClassId, Ethernet, Ipv4, Ipv6, Mark, Protocol, Service};
        use Stage::{Class, Guard, Hook, Policy, Source, Verdict};
        match self {
            Self::Peer(family) => Row::of_addresses("peer", family, Verdict),
            Self::Underlay(family) => Row::of_addresses("underlay", family, Verdict),
            Self::Excluded(family) => {
                Row { interval: true, ..Row::of_addresses("excluded", family, Verdict) }
            }
            Self::Eip(family) => Row::of_addresses("eip", family, Verdict),
            Self::BlockedReply(family) => {
                let key: &[Datum] = match family {
                    Family::V4 => &[Ipv4, Ipv4, Protocol, Service, Service],
                    Family::V6 => &[Ipv6, Ipv6, Protocol, Service, Service],
                };
                Row { timeout: true, ..Row::set("blocked_reply", Some(family), Verdict, key) }
            }
            Self::PortlessBlockedReply(family) => {
                let with_ports = Self::BlockedReply(family).row();
                let name = ("blocked_reply", Some(family), "_portless");
                Row { name, key: with_ports.key.split_at(3).0, ..with_ports }
            }
            Self::Gateway => Row::set("gateway_mark", None, Guard, &[Mark]),
            Self::Connection => {
                Row::set("connection_mark", None, Verdict, &[Mark]).map(Datum::Verdict)
            }
            Self::PeerMac => Row::set("peer_mac", None, Verdict, &[Ethernet]).map(Datum::Verdict),
            Self::PolicyAction => {
                Row::set("policy_action", None, Verdict, &[ClassId]).map(Datum::Verdict)
            }
            Self::Steer(family) => Row::of_tags("steer", family, Policy).map(ClassId),
            Self::Snat(family) => Row::of_tags("snat", family, Policy).map(Datum::of(family)),
            Self::Masquerade(family) => Row::of_tags("masquerade", family, Policy),
            Self::Count(family) => Row { counter: true, ..Row::of_tags("count", family, Policy) },
            Self::Any(family) => Row::of_tags("any", family, Class).map(ClassId),
            Self::Destination(family, _) => {
                let key: &[Datum] = match family {
                    Family::V4 => &[Ipv4, ClassId],
                    Family::V6 => &[Ipv6, ClassId],
                };
                Row::set("dest", Some(family), Class, key).map(ClassId)
            }
            Self::Source(family) => Row::of_addresses("source", family, Source).map(ClassId),
            Self::SourceNet(family) => {
                let row = Row::of_addresses("source_net", family, Source).map(ClassId);
                Row { interval: true, ..row }
            }
            Self::NextHop => Row::set("next_hop", None, Hook, &[Mark]).map(Ethernet),
        }
    }

    /// The sets of a family and those of none, without those of destinations.
    pub(crate) const fn all(family: Family) -> [Self; 18] {
        [
            Self::Peer(family),
            Self::Underlay(family),
            Self::Excluded(family),
            Self::Eip(family),
            Self::BlockedReply(family),
            Self::PortlessBlockedReply(family),
            Self::Gateway,
            Self::Connection,
            Self::PeerMac,
            Self::PolicyAction,
            Self::Steer(family),
            Self::Snat(family),
            Self::Masquerade(family),
            Self::Count(family),
            Self::Any(family),
            Self::Source(family),
            Self::SourceNet(family),
            Self::NextHop,
        ]
    }

    /// The table that the set is in.
    pub const fn table(self) -> TableFamily {
        match self.row().stage {
            Stage::Hook => TableFamily::Netdev,
            _ => TableFamily::Inet,
        }
    }

    /// The set's name in the table.
    pub fn name(self) -> String {
        let (head, family, tail) = self.row().name;
        match (self, family.map(Family::digit)) {
            (Self::Destination(_, length), Some(digit)) => format!("{head}{digit}_{length}"),
            (_, Some(digit)) => format!("{head}{digit}{tail}"),
            (_, None) => format!("{head}{tail}"),
        }
    }

    /// The set with this name.
    pub fn from_name(name: &str) -> Option<Self> {
        let length = name.rsplit_once('_').and_then(|(_, length)| length.parse().ok());
        let mut all = Family::BOTH.into_iter().flat_map(|family| {
            let length = length.filter(|length| (1..=family.bits()).contains(length));
            let nets = length.map(|length| Self::Destination(family, length));
            Self::all(family).into_iter().chain(nets)
        });
        all.find(|set| name.starts_with(set.row().name.0) && set.name() == name)
    }

    pub(crate) const fn stage(self) -> Stage {
        self.row().stage
    }

    /// Types of the key's parts, in order.
    pub(crate) const fn key(self) -> &'static [Datum] {
        self.row().key
    }

    /// The family that a packet must have to be looked up in the set; `None` for any family.
    pub(crate) const fn family(self) -> Option<Family> {
        match self.key().first() {
            Some(Datum::Ipv4) => Some(Family::V4),
            Some(Datum::Ipv6) => Some(Family::V6),
            _ => None,
        }
    }

    /// Type of the value; `None` for a plain set.
    pub(crate) const fn data(self) -> Option<Datum> {
        self.row().data
    }

    /// Whether the set holds ranges.
    pub(crate) const fn is_interval(self) -> bool {
        self.row().interval
    }

    /// Whether each element of the set has a counter.
    pub(crate) const fn is_counting(self) -> bool {
        self.row().counter
    }

    /// Whether the set's elements expire after a timeout.
    pub(crate) const fn is_fleeting(self) -> bool {
        self.row().timeout
    }
}

impl fmt::Display for Set {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name())
    }
}

/// An element key: the set and the key in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    set: Set,
    value: KeyValue,
}

/// A key within its set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum KeyValue {
    /// An address.
    Address(IpAddr),
    /// A range of addresses, in an interval set.
    Range(IpRange),
    /// A mark.
    Mark(Mark),
    /// A MAC address.
    Mac(MacAddr),
    /// A class, a policy or an action.
    Tag(Tag),
    /// An address, truncated to the prefix length of the set, and a class.
    AddressAndTag(IpAddr, Tag),
}

impl Key {
    /// The key of a set with this value; `None` if the set has keys of another type.
    pub fn new(set: Set, value: KeyValue) -> Option<Self> {
        let ip = |address| Datum::of(Family::of(address));
        let fits = match value {
            KeyValue::Address(address) => set.key() == [ip(address)],
            KeyValue::Range(range) => set.key() == [ip(range.first())],
            KeyValue::Mark(_) => set.key() == [Datum::Mark],
            KeyValue::Mac(_) => set.key() == [Datum::Ethernet],
            KeyValue::Tag(_) => set.key() == [Datum::ClassId],
            KeyValue::AddressAndTag(address, _) => set.key() == [ip(address), Datum::ClassId],
        };
        let fits = fits && set.is_interval() == matches!(value, KeyValue::Range(_));
        fits.then_some(Self { set, value })
    }

    /// A key that no key of the set is less than.
    pub(super) const fn least(set: Set) -> Self {
        Self { set, value: KeyValue::Address(IpAddr::V4(Ipv4Addr::UNSPECIFIED)) }
    }

    /// The set that the element is in.
    pub const fn set(&self) -> Set {
        self.set
    }

    /// The key in the set.
    pub const fn value(&self) -> KeyValue {
        self.value
    }

    /// The family and the policy whose packets the element counts.
    pub(crate) const fn counted(&self) -> Option<(Family, Tag)> {
        match (self.set, self.value) {
            (Set::Count(family), KeyValue::Tag(policy)) => Some((family, policy)),
            _ => None,
        }
    }
}

/// Defines the constructors of keys, one for each set.
macro_rules! keys {
    ($($(#[$doc:meta])* $name:ident($($part:ident: $type:ty),+) = $set:expr, $value:expr;)+) => {
        impl Key {
            $($(#[$doc])* pub fn $name($($part: $type),+) -> Self {
                Self { set: $set, value: $value }
            })+
        }
    };
}

keys! {
    /// In [`Set::Peer`].
    peer(address: IpAddr) = Set::Peer(Family::of(address)), KeyValue::Address(address);
    /// In [`Set::Underlay`].
    underlay(address: IpAddr) = Set::Underlay(Family::of(address)), KeyValue::Address(address);
    /// In [`Set::Excluded`].
    excluded(range: IpRange) = Set::Excluded(range.family()), KeyValue::Range(range);
    /// In [`Set::Eip`].
    eip(address: IpAddr) = Set::Eip(Family::of(address)), KeyValue::Address(address);
    /// In [`Set::Gateway`].
    gateway(mark: Mark) = Set::Gateway, KeyValue::Mark(mark);
    /// In [`Set::Connection`].
    connection(mark: Mark) = Set::Connection, KeyValue::Mark(mark);
    /// In [`Set::PeerMac`].
    peer_mac(mac: MacAddr) = Set::PeerMac, KeyValue::Mac(mac);
    /// In [`Set::PolicyAction`].
    policy_action(action: Tag) = Set::PolicyAction, KeyValue::Tag(action);
    /// In [`Set::Steer`].
    steer(family: Family, policy: Tag) = Set::Steer(family), KeyValue::Tag(policy);
    /// In [`Set::Snat`].
    snat(family: Family, policy: Tag) = Set::Snat(family), KeyValue::Tag(policy);
    /// In [`Set::Masquerade`].
    masquerade(family: Family, policy: Tag) = Set::Masquerade(family), KeyValue::Tag(policy);
    /// In [`Set::Count`].
    count(family: Family, policy: Tag) = Set::Count(family), KeyValue::Tag(policy);
    /// In [`Set::Any`].
    any(family: Family, class: Tag) = Set::Any(family), KeyValue::Tag(class);
    /// In [`Set::Destination`] of the prefix length.
    destination(net: IpNet, class: Tag) =
        Set::Destination(Family::of_net(&net), net.prefix_len()),
        KeyValue::AddressAndTag(net.addr(), class);
    /// In [`Set::Source`].
    source(address: IpAddr) = Set::Source(Family::of(address)), KeyValue::Address(address);
    /// In [`Set::SourceNet`].
    source_net(range: IpRange) = Set::SourceNet(range.family()), KeyValue::Range(range);
    /// In [`Set::NextHop`].
    next_hop(mark: Mark) = Set::NextHop, KeyValue::Mark(mark);
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.value {
            KeyValue::Address(address) => address.fmt(f),
            KeyValue::Range(range) => range.fmt(f),
            KeyValue::Mark(mark) => mark.fmt(f),
            KeyValue::Mac(mac) => mac.fmt(f),
            KeyValue::Tag(tag) => tag.fmt(f),
            KeyValue::AddressAndTag(address, tag) => write!(f, "{address} . {tag}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn set_names_read_back() {
        for family in Family::BOTH {
            let nets = (1..=family.bits()).map(|length| Set::Destination(family, length));
            for set in Set::all(family).into_iter().chain(nets) {
                assert_eq!(Set::from_name(&set.name()), Some(set));
            }
        }
        for name in ["", "dest4_0", "dest4_33", "dest4_024", "dest6_129", "dest5_1", "source"] {
            assert_eq!(Set::from_name(name), None, "{name}");
        }
    }

    #[test]
    fn keys_of_the_type_of_their_set_alone() {
        let (v4, v6): (IpAddr, IpAddr) = (Ipv4Addr::LOCALHOST.into(), [0; 16].into());
        let range = |address: IpAddr| IpRange::from(IpNet::from(address));
        let (mark, tag) = (Mark::new(1), Tag::LOCAL);
        let mac = MacAddr::new([2, 0, 0, 0, 0, 1]);
        let family = |value: &KeyValue| match value {
            KeyValue::Address(address) | KeyValue::AddressAndTag(address, _) => {
                Some(Family::of(*address))
            }
            KeyValue::Range(range) => Some(range.family()),
            KeyValue::Mark(_) | KeyValue::Mac(_) | KeyValue::Tag(_) => None,
        };
        for key in [v4, v6].into_iter().flat_map(|address| {
            let (family, range, net) = (Family::of(address), range(address), IpNet::from(address));
            [
                Key::peer(address),
                Key::underlay(address),
                Key::excluded(range),
                Key::eip(address),
                Key::gateway(mark),
                Key::connection(mark),
                Key::peer_mac(mac),
                Key::policy_action(tag),
                Key::steer(family, tag),
                Key::snat(family, tag),
                Key::masquerade(family, tag),
                Key::count(family, tag),
                Key::any(family, tag),
                Key::destination(net, tag),
                Key::source(address),
                Key::source_net(range),
                Key::next_hop(mark),
            ]
        }) {
            let (set, value) = (key.set(), key.value());
            assert_eq!(Key::new(set, value), Some(key));
            assert!(Key::least(set) <= key);
            for other in [
                KeyValue::Address(v4),
                KeyValue::Address(v6),
                KeyValue::Range(range(v4)),
                KeyValue::Range(range(v6)),
                KeyValue::Mark(mark),
                KeyValue::Mac(mac),
                KeyValue::Tag(tag),
                KeyValue::AddressAndTag(v4, tag),
                KeyValue::AddressAndTag(v6, tag),
            ] {
                let kind = |value: &KeyValue| std::mem::discriminant(value);
                let same = kind(&value) == kind(&other) && family(&value) == family(&other);
                assert_eq!(Key::new(set, other).is_some(), same, "{set} {other:?}");
            }
        }
    }
}
