//! The sets and maps of our nf_tables tables: names, types and flags.

use std::fmt;

use super::chain::TableFamily;
use crate::types::Family;

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
    /// Connection mark → verdict, where the first packet of a connection decides for all.
    Connection,
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

impl Set {
    /// The table that the set is in.
    pub const fn table(self) -> TableFamily {
        match self {
            Self::NextHop => TableFamily::Netdev,
            _ => TableFamily::Inet,
        }
    }

    /// The sets of a family that every table has.
    pub(crate) const fn of(family: Family) -> [Self; 12] {
        [
            Self::Peer(family),
            Self::Underlay(family),
            Self::Excluded(family),
            Self::Eip(family),
            Self::BlockedReply(family),
            Self::PortlessBlockedReply(family),
            Self::Steer(family),
            Self::Snat(family),
            Self::Masquerade(family),
            Self::Any(family),
            Self::Source(family),
            Self::SourceNet(family),
        ]
    }

    /// The set's name in the table.
    pub fn name(self) -> String {
        match self {
            Self::Peer(family) => format!("peer{}", family.digit()),
            Self::Underlay(family) => format!("underlay{}", family.digit()),
            Self::Excluded(family) => format!("excluded{}", family.digit()),
            Self::Eip(family) => format!("eip{}", family.digit()),
            Self::BlockedReply(family) => format!("blocked_reply{}", family.digit()),
            Self::PortlessBlockedReply(family) => {
                format!("blocked_reply{}_portless", family.digit())
            }
            Self::Gateway => "gateway_mark".into(),
            Self::Connection => "connection_mark".into(),
            Self::PolicyAction => "policy_action".into(),
            Self::Steer(family) => format!("steer{}", family.digit()),
            Self::Snat(family) => format!("snat{}", family.digit()),
            Self::Masquerade(family) => format!("masquerade{}", family.digit()),
            Self::Count(family) => format!("count{}", family.digit()),
            Self::Any(family) => format!("any{}", family.digit()),
            Self::Destination(family, length) => format!("dest{}_{length}", family.digit()),
            Self::Source(family) => format!("source{}", family.digit()),
            Self::SourceNet(family) => format!("source_net{}", family.digit()),
            Self::NextHop => "next_hop".into(),
        }
    }

    /// The set with this name.
    pub fn from_name(name: &str) -> Option<Self> {
        use Family::{V4, V6};
        Some(match name {
            "peer4" => Self::Peer(V4),
            "peer6" => Self::Peer(V6),
            "underlay4" => Self::Underlay(V4),
            "underlay6" => Self::Underlay(V6),
            "excluded4" => Self::Excluded(V4),
            "excluded6" => Self::Excluded(V6),
            "eip4" => Self::Eip(V4),
            "eip6" => Self::Eip(V6),
            "blocked_reply4" => Self::BlockedReply(V4),
            "blocked_reply6" => Self::BlockedReply(V6),
            "blocked_reply4_portless" => Self::PortlessBlockedReply(V4),
            "blocked_reply6_portless" => Self::PortlessBlockedReply(V6),
            "gateway_mark" => Self::Gateway,
            "connection_mark" => Self::Connection,
            "policy_action" => Self::PolicyAction,
            "steer4" => Self::Steer(V4),
            "steer6" => Self::Steer(V6),
            "snat4" => Self::Snat(V4),
            "snat6" => Self::Snat(V6),
            "masquerade4" => Self::Masquerade(V4),
            "masquerade6" => Self::Masquerade(V6),
            "count4" => Self::Count(V4),
            "count6" => Self::Count(V6),
            "any4" => Self::Any(V4),
            "any6" => Self::Any(V6),
            "source4" => Self::Source(V4),
            "source6" => Self::Source(V6),
            "source_net4" => Self::SourceNet(V4),
            "source_net6" => Self::SourceNet(V6),
            "next_hop" => Self::NextHop,
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
            | Self::Underlay(family)
            | Self::Excluded(family)
            | Self::Eip(family)
            | Self::Source(family)
            | Self::SourceNet(family) => pick(IP, family),
            Self::BlockedReply(family) => pick(ANSWER, family),
            Self::PortlessBlockedReply(family) => pick(PORTLESS, family),
            Self::Gateway | Self::Connection | Self::NextHop => &[Datum::Mark],
            Self::Destination(family, _) => pick(IP_CLASS, family),
            Self::PolicyAction
            | Self::Steer(_)
            | Self::Snat(_)
            | Self::Masquerade(_)
            | Self::Count(_)
            | Self::Any(_) => &[Datum::ClassId],
        }
    }

    /// The family that a packet must have to be looked up in the set; `None` for any family.
    pub(crate) fn family(self) -> Option<Family> {
        match self.key().first() {
            Some(Datum::Ipv4) => Some(Family::V4),
            Some(Datum::Ipv6) => Some(Family::V6),
            _ => None,
        }
    }

    /// Type of the value; `None` for a plain set.
    pub(crate) const fn data(self) -> Option<Datum> {
        match self {
            Self::Peer(_)
            | Self::Underlay(_)
            | Self::Excluded(_)
            | Self::Eip(_)
            | Self::BlockedReply(_)
            | Self::PortlessBlockedReply(_)
            | Self::Gateway
            | Self::Masquerade(_)
            | Self::Count(_) => None,
            Self::Connection | Self::PolicyAction => Some(Datum::Verdict),
            Self::NextHop => Some(Datum::Ethernet),
            Self::Snat(family) => Some(Datum::of(family)),
            Self::Steer(_)
            | Self::Any(_)
            | Self::Destination(..)
            | Self::Source(_)
            | Self::SourceNet(_) => Some(Datum::ClassId),
        }
    }

    /// Whether the set holds ranges.
    pub(crate) const fn is_interval(self) -> bool {
        matches!(self, Self::Excluded(_) | Self::SourceNet(_))
    }

    /// Whether each element of the set has a counter.
    pub(crate) const fn is_counting(self) -> bool {
        matches!(self, Self::Count(_))
    }

    /// Whether the set's elements expire after a timeout.
    pub(crate) const fn is_fleeting(self) -> bool {
        matches!(self, Self::BlockedReply(_) | Self::PortlessBlockedReply(_))
    }
}

impl fmt::Display for Set {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn set_names_read_back() {
        let mut sets = vec![Set::Gateway, Set::Connection, Set::PolicyAction, Set::NextHop];
        for family in Family::BOTH {
            sets.extend(Set::of(family));
            sets.push(Set::Count(family));
            sets.extend((1..=family.bits()).map(|length| Set::Destination(family, length)));
        }
        for set in sets {
            assert_eq!(Set::from_name(&set.name()), Some(set));
        }
        for name in ["", "dest4_0", "dest4_33", "dest4_024", "dest6_129", "dest5_1", "source"] {
            assert_eq!(Set::from_name(name), None, "{name}");
        }
    }
}
