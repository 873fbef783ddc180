//! The ipsets that iptables rules match, as `ipset` prints them.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;

use super::stmt::MarkBits;
use crate::range::number;
use crate::types::Family;

/// An ipset of our own, of type `hash:net`; its name follows from the variant.
///
/// Names begin with `egress4-` or `egress6-`; no other program is known to use these prefixes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Ipset {
    /// Sources of a policy, named by a hash of the policy id.
    Sources(Family, u64),
    /// Destinations of a policy, named by a hash of the policy id.
    Destinations(Family, u64),
    /// Sources of all policies that steer, translate or drop.
    ///
    /// A packet from any other source costs one lookup.
    Selected(Family),
    /// Destinations that are never steered.
    Ignored(Family),
    /// Sources with a single policy that takes every destination, each with the mark it sets.
    Marks(Family),
    /// Sources with a single policy that takes every destination and drops.
    Denied(Family),
    /// Addresses of the other nodes on the underlay, the network that carries the tunnel.
    Peers(Family),
    /// Underlay addresses of this node, the destinations of tunnel packets.
    Underlay(Family),
    /// Egress IPs of this node.
    EgressIps(Family),
    /// Temporary set for the new contents of another set.
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
                "denied" => Self::Denied(family),
                "peers" => Self::Peers(family),
                "underlay" => Self::Underlay(family),
                "eips" => Self::EgressIps(family),
                "temporary" => Self::Temporary(family),
                _ => (rest == "ignore").then_some(Self::Ignored(family))?,
            },
        };
        (set.to_string() == name).then_some(set)
    }

    /// The address family of the set's members.
    pub const fn family(self) -> Family {
        match self {
            Self::Sources(family, _)
            | Self::Destinations(family, _)
            | Self::Selected(family)
            | Self::Ignored(family)
            | Self::Marks(family)
            | Self::Denied(family)
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
            Self::Denied(_) => f.write_str("denied"),
            Self::Peers(_) => f.write_str("peers"),
            Self::Underlay(_) => f.write_str("underlay"),
            Self::EgressIps(_) => f.write_str("eips"),
            Self::Temporary(_) => f.write_str("temporary"),
        }
    }
}

/// Parameters and members of an ipset.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IpsetContents {
    /// Maximum number of members (`maxelem`); the kernel cannot change it later.
    pub capacity: u32,
    /// Whether members can carry a mark (`skbinfo`); the kernel cannot change it later.
    pub with_marks: bool,
    /// Members of the set; the longest prefix that contains an address decides.
    pub members: BTreeMap<IpNet, Member>,
}

impl IpsetContents {
    /// The kernel's default of `maxelem`.
    pub const CAPACITY: u32 = 65_536;

    /// A set with capacity for its members, rounded up to a power of two.
    ///
    /// The kernel accepts no prefix of length 0 in such a set; its two halves replace it.
    pub fn new(with_marks: bool, members: impl IntoIterator<Item = (IpNet, Member)>) -> Self {
        let members: BTreeMap<_, _> = members
            .into_iter()
            .flat_map(|(net, member)| halves(net).map(move |net| (net, member)))
            .collect();
        let length = u32::try_from(members.len()).unwrap_or(u32::MAX);
        let capacity = length.checked_next_power_of_two().unwrap_or(u32::MAX).max(Self::CAPACITY);
        Self { capacity, with_marks, members }
    }

    /// A set without marks, whose lookup answers only yes or no.
    pub fn of(nets: impl IntoIterator<Item = IpNet>) -> Self {
        Self::new(false, nets.into_iter().map(|net| (net, Member::In)))
    }

    /// The member with the longest prefix that contains an address.
    pub(crate) fn longest(&self, address: IpAddr) -> Option<(IpNet, Member)> {
        let family = Family::of(address);
        let mut end = IpNet::from(address);
        loop {
            let below = self.members.range(..=end).next_back();
            let (net, member) = below.filter(|(net, _)| Family::of_net(net) == family)?;
            if net.contains(&address) {
                return Some((*net, *member));
            }
            // A lesser prefix that contains the address contains this one, too.
            let apart = number(net.addr()) ^ number(address);
            let common = apart.leading_zeros().checked_sub(128 - u32::from(family.bits()))?;
            end = IpNet::new(address, u8::try_from(common).ok()?).ok()?.trunc();
        }
    }

    /// Whether the set matches an address.
    pub(crate) fn has(&self, address: IpAddr) -> bool {
        self.longest(address).is_some_and(|(_, member)| member != Member::Not)
    }

    /// Whether a set with these parameters can hold the members of `other`.
    pub(crate) fn can_hold(&self, other: &Self) -> bool {
        self.with_marks == other.with_marks && self.capacity >= other.capacity
    }
}

/// A prefix, or the two halves of a prefix of length 0.
fn halves(net: IpNet) -> impl Iterator<Item = IpNet> {
    let parts = if net.prefix_len() == 0 { net.subnets(1).ok() } else { None };
    let whole = parts.is_none().then_some(net);
    parts.into_iter().flatten().chain(whole)
}

/// Result of a lookup that matches a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Member {
    /// The addresses are in the set.
    In,
    /// The addresses are in the set, and a packet gets this mark.
    Marked(MarkBits),
    /// The addresses are not in the set, although a shorter prefix is (`nomatch`).
    Not,
}

impl fmt::Display for Member {
    /// The part of `ipset add` after the prefix.
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
    use proptest::prelude::*;

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
                Ipset::Denied(family),
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
            // Names as spidernet's egressgateway forms them.
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

    proptest! {
        #[test]
        fn the_longest_prefix_that_contains_an_address_decides(
            nets in prop::collection::vec((0..=8_u32, 24..=32_u8, any::<bool>()), 0..12),
            address in 0..8_u32,
        ) {
            let ip = |n: u32, wide: bool| {
                let v6 = wide.then(|| IpAddr::from(u128::from(n).to_be_bytes()));
                v6.unwrap_or_else(|| IpAddr::from(n.to_be_bytes()))
            };
            let net = |(n, length, wide): (u32, u8, bool)| {
                let length = if wide { length + 96 } else { length };
                IpNet::new(ip(n << 3 | 0x0a00_0000, wide), length).unwrap().trunc()
            };
            let nets: Vec<_> = nets.into_iter().map(net).collect();
            let set = IpsetContents::of(nets.iter().copied());
            for address in [false, true].map(|wide| ip(address << 3 | 0x0a00_0001, wide)) {
                let around = nets.iter().filter(|net| net.contains(&address));
                let longest = around.max_by_key(|net| net.prefix_len());
                prop_assert_eq!(set.longest(address).map(|(net, _)| net), longest.copied());
            }
        }
    }

    #[test]
    fn a_set_has_room_for_its_members() {
        let nets = |count: u32| (0..count).map(|n| IpNet::from(IpAddr::from(n.to_be_bytes())));
        assert_eq!(IpsetContents::of(nets(1)).capacity, 65_536);
        assert_eq!(IpsetContents::of(nets(65_537)).capacity, 131_072);
    }
}
