//! The sets that iptables rules look into, as `ipset` shows them.

use std::collections::BTreeMap;
use std::fmt;

use ipnet::IpNet;

use super::stmt::MarkBits;
use crate::types::Family;

/// A set of ours, of type `hash:net`; its name follows from which one it is.
///
/// Names begin with `egress4-` or `egress6-`, and nobody else's are known to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Ipset {
    /// Sources of a policy, by a hash of its id.
    Sources(Family, u64),
    /// Destinations of a policy, by a hash of its id.
    Destinations(Family, u64),
    /// Sources of all policies that steer, translate or close: who is in none of them pays for
    /// one lookup.
    Selected(Family),
    /// Destinations that are never steered.
    Ignored(Family),
    /// Sources whose one policy takes every destination, each with the mark it gets.
    Marks(Family),
    /// Sources whose one policy takes every destination and is closed.
    Closed(Family),
    /// The other nodes' addresses on the network that carries the tunnel.
    Peers(Family),
    /// This node's addresses on that network: where tunnel packets are sent to.
    Underlay(Family),
    /// Egress IPs of this node.
    EgressIps(Family),
    /// What another set is about to hold.
    Temporary(Family),
}

impl Ipset {
    /// The set with this name.
    pub fn from_name(name: &str) -> Option<Self> {
        let (family, rest) = match name.strip_prefix("egress")?.split_once('-')? {
            ("4", rest) => (Family::V4, rest),
            ("6", rest) => (Family::V6, rest),
            _ => return None,
        };
        let set = match rest.split_once('-') {
            Some(("src", hash)) => Self::Sources(family, u64::from_str_radix(hash, 16).ok()?),
            Some(("dest", hash)) => Self::Destinations(family, u64::from_str_radix(hash, 16).ok()?),
            Some(_) => return None,
            None => match rest {
                "selected" => Self::Selected(family),
                "marks" => Self::Marks(family),
                "closed" => Self::Closed(family),
                "peers" => Self::Peers(family),
                "underlay" => Self::Underlay(family),
                "eips" => Self::EgressIps(family),
                "temporary" => Self::Temporary(family),
                _ => (rest == "ignore").then_some(Self::Ignored(family))?,
            },
        };
        (set.to_string() == name).then_some(set)
    }

    /// The family of its members.
    pub const fn family(self) -> Family {
        match self {
            Self::Sources(family, _)
            | Self::Destinations(family, _)
            | Self::Selected(family)
            | Self::Ignored(family)
            | Self::Marks(family)
            | Self::Closed(family)
            | Self::Peers(family)
            | Self::Underlay(family)
            | Self::EgressIps(family)
            | Self::Temporary(family) => family,
        }
    }
}

impl fmt::Display for Ipset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "egress{}-", self.family().digit())?;
        match self {
            Self::Sources(_, hash) => write!(f, "src-{hash:016x}"),
            Self::Destinations(_, hash) => write!(f, "dest-{hash:016x}"),
            Self::Selected(_) => f.write_str("selected"),
            Self::Ignored(_) => f.write_str("ignore"),
            Self::Marks(_) => f.write_str("marks"),
            Self::Closed(_) => f.write_str("closed"),
            Self::Peers(_) => f.write_str("peers"),
            Self::Underlay(_) => f.write_str("underlay"),
            Self::EgressIps(_) => f.write_str("eips"),
            Self::Temporary(_) => f.write_str("temporary"),
        }
    }
}

/// What a set holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IpsetContents {
    /// How many members it can have (`maxelem`); the kernel cannot change it later.
    pub capacity: u32,
    /// Whether members can carry a mark (`skbinfo`); the kernel cannot change it later.
    pub with_marks: bool,
    /// Its members; the longest prefix that an address has decides.
    pub members: BTreeMap<IpNet, Member>,
}

impl IpsetContents {
    /// The kernel's own default of `maxelem`.
    pub const CAPACITY: u32 = 65_536;

    /// A set that has room for its members, and for as many again as make a power of two.
    ///
    /// The kernel takes no prefix of length 0 into such a set; its two halves take its place.
    pub fn new(with_marks: bool, members: impl IntoIterator<Item = (IpNet, Member)>) -> Self {
        let members: BTreeMap<_, _> = members
            .into_iter()
            .flat_map(|(net, member)| halves(net).map(move |net| (net, member)))
            .collect();
        let length = u32::try_from(members.len()).unwrap_or(u32::MAX);
        let capacity = length.checked_next_power_of_two().unwrap_or(u32::MAX).max(Self::CAPACITY);
        Self { capacity, with_marks, members }
    }

    /// A set that a lookup only answers yes or no about.
    pub fn of(nets: impl IntoIterator<Item = IpNet>) -> Self {
        Self::new(false, nets.into_iter().map(|net| (net, Member::In)))
    }

    /// Whether it has the shape to hold what the other one holds.
    pub(crate) fn can_hold(&self, other: &Self) -> bool {
        self.with_marks == other.with_marks && self.capacity >= other.capacity
    }
}

/// A prefix, or the two halves of the one that has length 0.
fn halves(net: IpNet) -> impl Iterator<Item = IpNet> {
    let parts = if net.prefix_len() == 0 { net.subnets(1).ok() } else { None };
    let whole = parts.is_none().then_some(net);
    parts.into_iter().flatten().chain(whole)
}

/// What a member says about the addresses in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Member {
    /// They are in the set.
    In,
    /// They are in the set, and a packet gets this mark.
    Marked(MarkBits),
    /// They are not, although a shorter prefix is (`nomatch`).
    Not,
}

impl fmt::Display for Member {
    /// The part of `ipset add` behind the prefix.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::In => Ok(()),
            Self::Marked(MarkBits { mask, value }) => write!(f, " skbmark {value:#x}/{mask:#x}"),
            Self::Not => f.write_str(" nomatch"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_read_back_and_fit() {
        for family in Family::BOTH {
            for set in [
                Ipset::Sources(family, u64::MAX),
                Ipset::Destinations(family, 0),
                Ipset::Selected(family),
                Ipset::Ignored(family),
                Ipset::Marks(family),
                Ipset::Closed(family),
                Ipset::Peers(family),
                Ipset::EgressIps(family),
                Ipset::Temporary(family),
            ] {
                let name = set.to_string();
                assert_eq!(Ipset::from_name(&name), Some(set), "{name}");
                // `IPSET_MAXNAMELEN`, which counts the NUL, is 32.
                assert!(name.len() < 32, "{name}");
            }
        }
    }

    #[test]
    fn names_of_others_are_not_ours() {
        for name in [
            "",
            "egress4",
            "egress4-",
            "egress5-marks",
            "egress4-src-1",
            "egress4-src-000000000000000G",
            "egress4-src-00000000000000AA",
            "egress4-src-+000000000000001",
            // As spidernet's egressgateway names its own.
            "egress-src-v4-6d6b7c1c6a8e5f7a9",
            "egress-cluster-cidr-ipv4",
            "egress-ingore-cidr",
        ] {
            assert_eq!(Ipset::from_name(name), None, "{name}");
        }
    }

    #[test]
    fn a_prefix_of_length_zero_is_split() {
        let contents = IpsetContents::of(["0.0.0.0/0".parse().unwrap(), "::/0".parse().unwrap()]);
        let nets: Vec<_> = contents.members.keys().map(ToString::to_string).collect();
        assert_eq!(nets, ["0.0.0.0/1", "128.0.0.0/1", "::/1", "8000::/1"]);
    }

    #[test]
    fn a_set_has_room_for_its_members() {
        let nets =
            |count: u32| (0..count).map(|n| IpNet::from(std::net::IpAddr::from(n.to_be_bytes())));
        assert_eq!(IpsetContents::of(nets(1)).capacity, 65_536);
        assert_eq!(IpsetContents::of(nets(65_537)).capacity, 131_072);
    }
}
