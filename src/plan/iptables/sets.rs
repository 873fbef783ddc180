//! Plans the ipsets and their members.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::{IpNet, IpSubnets, Ipv4Subnets, Ipv6Subnets};

use super::classes::{Class, Classes, policy};
use crate::plan::intervals::Rank;
use crate::plan::policies::NormalizedPolicy;
use crate::plan::validate::ValidatedCluster;
use crate::plan::{Gateways, Role, role};
use crate::policy::Unavailable;
use crate::range::IpRange;
use crate::state::{Ipset, IpsetContents, MarkBits, Member};
use crate::types::{Family, Mark, fnv1a};

/// Returns hashes for the names of each policy's sets; they depend on the ids alone, not on order.
pub(crate) fn names(policies: &[&NormalizedPolicy]) -> Vec<u64> {
    let mut by_id: Vec<_> = policies.iter().map(|policy| &policy.id).enumerate().collect();
    by_id.sort_unstable_by_key(|&(_, id)| id);
    let mut taken = BTreeSet::new();
    let mut names: Vec<_> = by_id
        .into_iter()
        .map(|(rank, id)| {
            let mut text = id.as_str().as_bytes().to_vec();
            while !taken.insert(fnv1a(&text)) {
                text.push(0);
            }
            (rank, fnv1a(&text))
        })
        .collect();
    names.sort_unstable_by_key(|(rank, _)| *rank);
    names.into_iter().map(|(_, name)| name).collect()
}

/// The action for a policy's packets on this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// Steered to the gateway with this mark.
    To(Mark),
    /// Translated on this node, the gateway.
    Here,
    /// Dropped.
    Deny,
    /// Forwarded as if there were no policy.
    Bypass,
}

/// The kind of match for the packets of a class.
enum Kind {
    /// An entry in one set, however many policies there are.
    Flat(Way),
    /// A rule for each policy.
    Ruled,
}

/// The sets of one family.
pub(crate) struct Sets<'a> {
    pub(crate) world: &'a ValidatedCluster,
    pub(crate) policies: &'a [&'a NormalizedPolicy],
    pub(crate) gateways: &'a Gateways,
    pub(crate) names: &'a [u64],
    pub(crate) family: Family,
    pub(crate) classes: &'a Classes,
}

type Members = BTreeMap<Ipset, BTreeMap<IpNet, Member>>;

impl Sets<'_> {
    pub(crate) fn way(&self, policy: &NormalizedPolicy) -> Way {
        let gateway = |place| self.gateways.values().find(|gateway| gateway.place == place);
        let role = role(policy, self.family, self.world);
        let client = if let Role::Client(place) = role { gateway(place) } else { None };
        match (role, client) {
            (Role::Gateway, _) => Way::Here,
            (_, Some(gateway)) => Way::To(gateway.mark),
            _ if policy.unavailable == Unavailable::Bypass => Way::Bypass,
            _ => Way::Deny,
        }
    }

    /// Returns the mask of all mark bits that are written.
    pub(crate) fn mask(&self) -> u32 {
        self.world.cluster.marks.tested(self.gateways.values().map(|gateway| gateway.mark))
    }

    /// Returns the policies whose packets are matched by a rule of their own, in order.
    ///
    /// Each policy comes with the hash for the names of its sets.
    pub(crate) fn ruled(&self) -> Vec<(&NormalizedPolicy, u64)> {
        let ranks = self.ruled_ranks();
        let ranked = (0..).zip(self.policies.iter().copied().zip(self.names.iter().copied()));
        ranked.filter(|(rank, _)| ranks.contains(rank)).map(|(_, policy)| policy).collect()
    }

    /// Returns the policies whose gateway is this node, in order, each with its name hash.
    pub(crate) fn local(&self) -> Vec<(&NormalizedPolicy, u64)> {
        let named = self.policies.iter().copied().zip(self.names.iter().copied());
        named.filter(|(policy, _)| self.is_local(policy)).collect()
    }

    /// Returns the local policies, and those of other nodes that precede one for some source.
    pub(crate) fn local_or_preceding(&self) -> Vec<(&NormalizedPolicy, u64)> {
        let is_local =
            |rank: &Rank| policy(self.policies, *rank).is_some_and(|policy| self.is_local(policy));
        let mut ranks = BTreeSet::<Rank>::new();
        for members in &self.classes.members {
            let last = members.iter().rposition(is_local);
            ranks.extend(last.and_then(|last| members.get(..=last)).into_iter().flatten());
        }
        let named = (0..).zip(self.policies.iter().copied().zip(self.names.iter().copied()));
        let wanted = |(rank, (policy, _)): &(Rank, (&NormalizedPolicy, u64))| {
            ranks.contains(rank) || self.is_local(policy)
        };
        named.filter(wanted).map(|(_, policy)| policy).collect()
    }

    pub(crate) fn is_local(&self, policy: &NormalizedPolicy) -> bool {
        policy.sources.has(self.family) && self.way(policy) == Way::Here
    }

    fn ruled_ranks(&self) -> BTreeSet<Rank> {
        let ruled = self.classes.members.iter();
        let ruled = ruled.filter(|ranks| matches!(self.kind(ranks), Kind::Ruled));
        ruled.flatten().copied().collect()
    }

    fn kind(&self, ranks: &[Rank]) -> Kind {
        match *ranks {
            [rank] => match policy(self.policies, rank) {
                Some(policy) if policy.takes_all(self.family) => Kind::Flat(self.way(policy)),
                _ => Kind::Ruled,
            },
            _ => Kind::Ruled,
        }
    }

    /// Returns the sets that the sources of a class are members of.
    fn memberships(&self, class: Class, sets_of: &BTreeMap<Rank, Ipset>) -> Vec<(Ipset, Member)> {
        let family = self.family;
        let ranks = self.classes.members.get(class).map(Vec::as_slice).unwrap_or_default();
        let marked = |mark: Mark| {
            let mask = self.mask();
            Member::Marked(MarkBits { mask, value: mark.get() & mask })
        };
        let mut found = match self.kind(ranks) {
            Kind::Flat(Way::To(mark)) => vec![(Ipset::Marks(family), marked(mark))],
            Kind::Flat(Way::Here) => {
                vec![(Ipset::Marks(family), marked(self.world.cluster.marks.tunnel()))]
            }
            Kind::Flat(Way::Deny) => vec![(Ipset::Denied(family), Member::In)],
            Kind::Flat(Way::Bypass) => return Vec::new(),
            Kind::Ruled => Vec::new(),
        };
        found.push((Ipset::Selected(family), Member::In));
        found.extend(ranks.iter().filter_map(|rank| Some((*sets_of.get(rank)?, Member::In))));
        found
    }

    /// Returns all sets.
    pub(crate) fn contents(&self) -> BTreeMap<Ipset, IpsetContents> {
        let (family, mut members) = (self.family, Members::new());
        for set in [
            Ipset::Selected(family),
            Ipset::Ignored(family),
            Ipset::Marks(family),
            Ipset::Denied(family),
            Ipset::Peers(family),
            Ipset::Underlay(family),
            Ipset::EgressIps(family),
        ] {
            members.insert(set, BTreeMap::new());
        }
        let of = |net: &IpNet| Family::of_net(net) == family;
        let mut put = |set, nets: &mut dyn Iterator<Item = IpNet>| {
            let inside = nets.filter(|net| of(net)).map(|net| (net, Member::In));
            members.entry(set).or_default().extend(inside);
        };
        put(Ipset::Ignored(family), &mut self.world.nodes.excluded.iter().copied());
        let peers = self.world.peers().flat_map(|peer| &peer.underlay);
        put(Ipset::Peers(family), &mut peers.map(|address| IpNet::from(*address)));
        let here = self.world.here.underlay.iter();
        put(Ipset::Underlay(family), &mut here.map(|address| IpNet::from(*address)));
        let local = self.local();
        let addresses = local.iter().filter_map(|(policy, _)| policy.egress_ip.address(family));
        put(Ipset::EgressIps(family), &mut addresses.map(IpNet::from));
        let ruled = self.ruled_ranks();
        let mut sets_of = BTreeMap::new();
        for ((rank, policy), name) in (0..).zip(self.policies).zip(self.names) {
            if !ruled.contains(&rank) && !self.is_local(policy) {
                continue;
            }
            let sources = Ipset::Sources(family, *name);
            sets_of.insert(rank, sources);
            put(sources, &mut std::iter::empty());
            if !policy.takes_all(family) {
                put(Ipset::Destinations(family, *name), &mut policy.listed(family));
            }
        }
        self.sources(&sets_of, &mut members);
        let with_marks = |set: Ipset| matches!(set, Ipset::Marks(_));
        let filled = members.into_iter();
        filled.map(|(set, members)| (set, IpsetContents::new(with_marks(set), members))).collect()
    }

    /// Adds every source to the sets of its class.
    ///
    /// A single address is excluded (`nomatch`) from sets of the range that contains it which are
    /// not sets of its own class.
    fn sources(&self, sets_of: &BTreeMap<Rank, Ipset>, members: &mut Members) {
        let known: Vec<Vec<(Ipset, Member)>> =
            (0..self.classes.members.len()).map(|class| self.memberships(class, sets_of)).collect();
        let of = |class: Class| known.get(class).map(Vec::as_slice).unwrap_or_default();
        for (range, class) in &self.classes.ranges {
            for net in prefixes(range) {
                for (set, member) in of(*class) {
                    members.entry(*set).or_default().insert(net, *member);
                }
            }
        }
        let ranges = &self.classes.ranges;
        for (host, class) in &self.classes.hosts {
            let at = ranges.partition_point(|(range, _)| range.last() < *host);
            let around = ranges.get(at).filter(|(range, _)| range.contains(*host));
            let around = around.map(|(_, class)| of(*class)).unwrap_or_default();
            let (own, host) = (of(*class), IpNet::from(*host));
            for (set, member) in own.iter().filter(|one| !around.contains(one)) {
                members.entry(*set).or_default().insert(host, *member);
            }
            for (set, _) in around.iter().filter(|(set, _)| own.iter().all(|(own, _)| own != set)) {
                members.entry(*set).or_default().insert(host, Member::Not);
            }
        }
    }
}

/// Returns the fewest prefixes that make up a range.
fn prefixes(range: &IpRange) -> Vec<IpNet> {
    use std::net::IpAddr::{V4, V6};
    match (range.first(), range.last()) {
        (V4(first), V4(last)) => IpSubnets::from(Ipv4Subnets::new(first, last, 0)).collect(),
        (V6(first), V6(last)) => IpSubnets::from(Ipv6Subnets::new(first, last, 0)).collect(),
        _ => Vec::new(),
    }
}
