//! Validated, normalised policies, stored for as long as they are wanted.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use super::PolicyError;
use super::tags::Numbers;
use super::validate::{Nodes, ValidatedCluster, around, check_net, disjoint, smallest_reading};
use crate::policy::{Destinations, EgressIp, Policy, Unavailable};
use crate::state::{Comment, Tag};
use crate::types::{Family, PolicyId};

/// Index of a policy in the store.
pub(super) type Handle = u32;

/// A policy in canonical form, independent of the caller's value.
///
/// A policy with errors is closed: what is sound of it is kept.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct NormalizedPolicy {
    pub(super) id: PolicyId,
    pub(super) comment: Comment,
    /// Identifies the policy in the kernel's maps.
    pub(super) tag: Tag,
    pub(super) priority: u32,
    /// Disjoint and sorted; a prefix of length 0 stands for all destinations of its family.
    pub(super) destinations: Option<Vec<IpNet>>,
    /// Index of the gateway in the cluster's list of nodes.
    pub(super) gateway: Option<Result<usize, PolicyError>>,
    pub(super) egress_ip: EgressIp,
    pub(super) unavailable: Unavailable,
    pub(super) sources: Sources,
    /// Errors of the id, the destinations and the egress IP.
    pub(super) errors: Vec<PolicyError>,
}

/// The sources of a policy as the caller gave them, without duplicates.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Sources {
    /// Single addresses, those that invalid prefixes name included.
    pub(super) v4: BTreeSet<u32>,
    pub(super) v6: BTreeSet<u128>,
    /// Prefixes of more than one address, sorted.
    nets: Vec<IpNet>,
    /// Disjoint prefixes that cover the same addresses as `nets`.
    pub(super) cover: Vec<IpNet>,
    /// Invalid prefixes, sorted.
    invalid: Vec<IpNet>,
    /// Single addresses that only invalid prefixes name.
    read: BTreeSet<IpAddr>,
}

impl Sources {
    pub(super) fn of(nets: &[IpNet]) -> Self {
        let (mut v4, mut v6) = (Vec::with_capacity(nets.len()), Vec::new());
        let (mut wide, mut invalid) = (Vec::new(), Vec::new());
        for net in nets {
            match net {
                // A single IPv4 address is always valid.
                IpNet::V4(net) if net.prefix_len() == 32 => v4.push(net.addr().to_bits()),
                net if check_net(net).is_err() => invalid.push(*net),
                IpNet::V6(net) if net.prefix_len() == 128 => v6.push(net.addr().to_bits()),
                net => wide.push(*net),
            }
        }
        for list in [&mut wide, &mut invalid] {
            list.sort_unstable();
            list.dedup();
        }
        let cover = disjoint(wide.clone());
        let (v4, v6) = (v4.into_iter().collect(), v6.into_iter().collect());
        let mut new = Self { v4, v6, nets: wide, cover, invalid, read: BTreeSet::new() };
        for address in new.invalid.iter().filter_map(smallest_reading).collect::<Vec<_>>() {
            if new.insert(address.into()) {
                new.read.insert(address);
            }
        }
        new
    }

    /// Returns the sources as the caller gave them.
    pub(super) fn given(&self) -> Vec<IpNet> {
        let single = self.single().into_iter().filter(|address| !self.read.contains(address));
        let wide = self.nets.iter().chain(&self.invalid).copied();
        single.map(IpNet::from).chain(wide).collect()
    }

    /// Returns whether no source is invalid.
    pub(super) fn are_sound(&self) -> bool {
        self.invalid.is_empty()
    }

    fn errors(&self) -> impl Iterator<Item = PolicyError> {
        let none = self.len() == 0 && self.invalid.is_empty();
        let invalid = self.invalid.iter().filter_map(|net| check_net(net).err());
        none.then_some(PolicyError::NoSources).into_iter().chain(invalid)
    }

    /// Returns whether a list has exactly these sources.
    pub(super) fn are(&self, nets: &[IpNet]) -> bool {
        self.are_sound() && self.are_in_order(nets) || Self::of(nets) == *self
    }

    /// Returns whether a list has exactly these sources in sorted order.
    ///
    /// An unchanged list mostly does, and this check is cheaper.
    fn are_in_order(&self, nets: &[IpNet]) -> bool {
        let (mut v4, mut v6, mut wide) = (self.v4.iter(), self.v6.iter(), self.nets.iter());
        let same = nets.iter().all(|net| match net {
            IpNet::V4(net) if net.prefix_len() == 32 => v4.next() == Some(&net.addr().to_bits()),
            IpNet::V6(net) if net.prefix_len() == 128 => v6.next() == Some(&net.addr().to_bits()),
            net => wide.next() == Some(net),
        });
        same && v4.next().is_none() && v6.next().is_none() && wide.next().is_none()
    }

    /// Adds a source and returns whether it is new.
    ///
    /// Call [`fit_cover`](Self::fit_cover) afterwards.
    pub(super) fn insert(&mut self, net: IpNet) -> bool {
        match net {
            IpNet::V4(net) if net.prefix_len() == 32 => self.v4.insert(net.addr().to_bits()),
            IpNet::V6(net) if net.prefix_len() == 128 => self.v6.insert(net.addr().to_bits()),
            net => {
                let place = self.nets.binary_search(&net);
                place.map_err(|place| self.nets.insert(place, net)).is_err()
            }
        }
    }

    /// Removes a source and returns whether it existed.
    ///
    /// Call [`fit_cover`](Self::fit_cover) afterwards.
    pub(super) fn remove(&mut self, net: IpNet) -> bool {
        match net {
            IpNet::V4(net) if net.prefix_len() == 32 => self.v4.remove(&net.addr().to_bits()),
            IpNet::V6(net) if net.prefix_len() == 128 => self.v6.remove(&net.addr().to_bits()),
            net => {
                let place = self.nets.binary_search(&net);
                place.map(|place| self.nets.remove(place)).is_ok()
            }
        }
    }

    /// Recomputes the disjoint prefixes, and returns whether they changed.
    pub(super) fn fit_cover(&mut self) -> bool {
        if self.nets.is_empty() && self.cover.is_empty() {
            return false;
        }
        let cover = disjoint(self.nets.clone());
        let changed = cover != self.cover;
        self.cover = cover;
        changed
    }

    /// Returns the single-address sources.
    pub(super) fn single(&self) -> Vec<IpAddr> {
        let v4 = self.v4.iter().map(|address| IpAddr::from(Ipv4Addr::from_bits(*address)));
        let v6 = self.v6.iter().map(|address| IpAddr::from(Ipv6Addr::from_bits(*address)));
        v4.chain(v6).collect()
    }

    /// Returns the single-address sources that `other` does not have.
    pub(super) fn without(&self, other: &Self) -> Vec<IpAddr> {
        let v4 = self.v4.difference(&other.v4).map(|a| IpAddr::from(Ipv4Addr::from_bits(*a)));
        let v6 = self.v6.difference(&other.v6).map(|a| IpAddr::from(Ipv6Addr::from_bits(*a)));
        v4.chain(v6).collect()
    }

    /// Returns the sources that contain one of these addresses.
    pub(super) fn around<T>(&self, addresses: &BTreeMap<IpAddr, T>) -> Vec<IpNet> {
        // Whichever there are fewer of: an update must not cost as much as all sources of a policy.
        let found: BTreeSet<IpNet> = if self.len() < addresses.len() {
            let single = self.single().into_iter().map(IpNet::from);
            let has =
                |net: &IpNet| addresses.range(net.network()..=net.broadcast()).next().is_some();
            single.chain(self.cover.iter().copied()).filter(has).collect()
        } else {
            let single = |address: &IpAddr| match address {
                IpAddr::V4(v4) => self.v4.contains(&v4.to_bits()),
                IpAddr::V6(v6) => self.v6.contains(&v6.to_bits()),
            };
            let around = |address: &IpAddr| {
                let alone = single(address).then(|| IpNet::from(*address));
                alone.into_iter().chain(around(&self.cover, *address).copied())
            };
            addresses.keys().flat_map(around).collect()
        };
        found.into_iter().collect()
    }

    pub(super) fn len(&self) -> usize {
        self.v4.len() + self.v6.len() + self.nets.len()
    }

    /// Returns whether any source is of this family.
    pub(super) fn has(&self, family: Family) -> bool {
        let single = match family {
            Family::V4 => !self.v4.is_empty(),
            Family::V6 => !self.v6.is_empty(),
        };
        single || self.cover.iter().any(|net| Family::of_net(net) == family)
    }

    /// Returns whether an address is in one of the prefixes.
    pub(super) fn covers(&self, address: IpAddr) -> bool {
        around(&self.cover, address).is_some()
    }
}

/// Returns the destinations that a policy selects, disjoint and sorted, and their errors.
///
/// Of invalid prefixes the single addresses that they name are kept, beside the valid ones. `None`
/// stands for all destinations, also if no prefix is valid.
fn selected(destinations: &Destinations) -> (Option<Vec<IpNet>>, Vec<PolicyError>) {
    let nets = match destinations {
        Destinations::External => return (None, Vec::new()),
        Destinations::Nets(nets) if nets.is_empty() => {
            return (None, vec![PolicyError::NoDestinations]);
        }
        Destinations::Nets(nets) => nets,
    };
    let mut invalid: Vec<_> = nets.iter().filter(|net| check_net(net).is_err()).copied().collect();
    if invalid.is_empty() {
        return (Some(disjoint(nets.clone())), Vec::new());
    }
    let valid = nets.iter().filter(|net| check_net(net).is_ok()).copied();
    let read = invalid.iter().filter_map(smallest_reading).map(IpNet::from);
    let any = invalid.len() < nets.len();
    let kept = any.then(|| disjoint(valid.chain(read).collect()));
    invalid.sort_unstable();
    invalid.dedup();
    (kept, invalid.iter().filter_map(|net| check_net(net).err()).collect())
}

impl NormalizedPolicy {
    pub(super) fn new<P: Policy>(policy: &P, nodes: &Nodes) -> Self {
        let (destinations, mut errors) = selected(policy.destinations());
        let addresses = policy.egress_ip().addresses();
        errors.extend(addresses.filter_map(|address| nodes.check_egress_ip(address).err()));
        Self {
            id: policy.id().clone(),
            comment: Comment::of_policy(policy.id()),
            tag: Tag::DENY,
            priority: policy.priority(),
            sources: Sources::of(policy.sources()),
            destinations,
            gateway: policy.gateway().map(|gateway| nodes.gateway(gateway)),
            egress_ip: policy.egress_ip(),
            unavailable: policy.unavailable(),
            errors,
        }
    }

    /// Merges a policy of the same id: what either of them selects is closed.
    ///
    /// It precedes other policies as the first of the two does.
    fn merge(&mut self, other: &Self) {
        let sources = [self.sources.given(), other.sources.given()].concat();
        self.sources = Sources::of(&sources);
        self.priority = self.priority.min(other.priority);
        self.destinations = match (self.destinations.take(), &other.destinations) {
            (Some(one), Some(other)) => Some(disjoint([one.as_slice(), other].concat())),
            _ => None,
        };
        if other.unavailable == Unavailable::Drop {
            self.unavailable = Unavailable::Drop;
        }
        (self.gateway, self.egress_ip) = (None, EgressIp::Node);
        self.errors = vec![PolicyError::Duplicate];
    }

    /// Returns the closed policy that stands for several of one id; `None` for an empty list.
    pub(super) fn of_all<P: Policy>(policies: &[P], nodes: &Nodes) -> Option<Self> {
        let mut all = policies.iter().map(|policy| Self::new(policy, nodes));
        let mut merged = all.next()?;
        all.for_each(|other| merged.merge(&other));
        Some(merged)
    }

    /// Returns whether several policies have the id.
    pub(super) fn is_duplicate(&self) -> bool {
        self.errors.contains(&PolicyError::Duplicate)
    }

    /// Returns whether the policy has no error, apart from that it may have no source.
    pub(super) fn is_sound(&self) -> bool {
        let gateway = !matches!(self.gateway, Some(Err(_)));
        self.errors.is_empty() && gateway && self.sources.are_sound()
    }

    /// Returns all errors of the policy.
    pub(super) fn all_errors(&self) -> Vec<PolicyError> {
        let gateway = self.gateway.as_ref().and_then(|gateway| gateway.as_ref().err());
        self.sources.errors().chain(self.errors.iter().chain(gateway).cloned()).collect()
    }

    /// Returns whether the caller's policy equals this one.
    pub(super) fn is<P: Policy>(&self, policy: &P, world: &ValidatedCluster) -> bool {
        let gateway = match &self.gateway {
            Some(Ok(place)) => world.node(*place).map(|node| &node.name),
            Some(Err(error)) => error.gateway(),
            None => None,
        };
        let selects = match (policy.destinations(), &self.destinations) {
            (Destinations::External, None) => self.errors.is_empty(),
            (Destinations::Nets(nets), Some(kept)) => self.errors.is_empty() && nets == kept,
            _ => false,
        };
        self.priority == policy.priority()
            && gateway == policy.gateway()
            && self.egress_ip == policy.egress_ip()
            && self.unavailable == policy.unavailable()
            && self.sources.are(policy.sources())
            && (selects || {
                let new = Self::new(policy, &world.nodes);
                (&self.destinations, &self.errors) == (&new.destinations, &new.errors)
            })
    }

    /// Returns whether the policy selects every external destination of a family.
    pub(super) fn takes_all(&self, family: Family) -> bool {
        match &self.destinations {
            None => true,
            Some(nets) => {
                nets.iter().any(|net| Family::of_net(net) == family && net.prefix_len() == 0)
            }
        }
    }

    /// Returns whether the policy selects any destination of a family.
    pub(super) fn selects_any(&self, family: Family) -> bool {
        self.takes_all(family) || self.listed(family).next().is_some()
    }

    /// Returns the listed destinations of a family; none if the policy selects all.
    pub(super) fn listed(&self, family: Family) -> impl Iterator<Item = IpNet> + '_ {
        let nets = self.destinations.as_deref().unwrap_or_default();
        nets.iter()
            .copied()
            .filter(move |net| Family::of_net(net) == family && net.prefix_len() > 0)
    }
}

/// The store of all wanted policies.
#[derive(Debug, Default)]
pub(super) struct Policies {
    slots: Vec<Option<NormalizedPolicy>>,
    free: Vec<Handle>,
    by_id: HashMap<PolicyId, Handle>,
    pub(super) numbers: Numbers,
}

impl Policies {
    /// Validates and stores policies.
    pub(super) fn new<P: Policy>(policies: impl IntoIterator<Item = P>, nodes: &Nodes) -> Self {
        let mut all = Self::default();
        for policy in policies {
            let new = NormalizedPolicy::new(&policy, nodes);
            match all.find(policy.id()).and_then(|handle| all.get_mut(handle)) {
                Some(kept) => kept.merge(&new),
                None => drop(all.insert(new)),
            }
        }
        all.number();
        all
    }

    /// Assigns a tag to every policy; the tags depend on the ids alone.
    pub(super) fn number(&mut self) {
        let kept = self.slots.iter_mut().flatten();
        let mut all: Vec<_> = kept.map(|NormalizedPolicy { id, tag, .. }| (&*id, tag)).collect();
        self.numbers = Numbers::of_all(&mut all, |id| std::iter::once(*id));
    }

    pub(super) fn insert(&mut self, kept: NormalizedPolicy) -> Handle {
        let id = kept.id.clone();
        let handle = if let Some(handle) = self.free.pop() {
            if let Some(free) = slot(handle).and_then(|at| self.slots.get_mut(at)) {
                *free = Some(kept);
            }
            handle
        } else {
            self.slots.push(Some(kept));
            Handle::try_from(self.slots.len() - 1).unwrap_or(Handle::MAX)
        };
        self.by_id.insert(id, handle);
        handle
    }

    pub(super) fn remove(&mut self, handle: Handle) -> Option<NormalizedPolicy> {
        let kept = slot(handle).and_then(|at| self.slots.get_mut(at)?.take())?;
        self.by_id.remove(&kept.id);
        self.free.push(handle);
        Some(kept)
    }

    pub(super) fn find(&self, id: &PolicyId) -> Option<Handle> {
        self.by_id.get(id).copied()
    }

    pub(super) fn get(&self, handle: Handle) -> Option<&NormalizedPolicy> {
        slot(handle).and_then(|at| self.slots.get(at)?.as_ref())
    }

    pub(super) fn get_mut(&mut self, handle: Handle) -> Option<&mut NormalizedPolicy> {
        slot(handle).and_then(|at| self.slots.get_mut(at)?.as_mut())
    }

    pub(super) fn len(&self) -> usize {
        self.by_id.len()
    }

    /// Returns one more than the highest handle.
    pub(super) fn end(&self) -> usize {
        self.slots.len()
    }

    /// Iterates over all policies, in no particular order.
    pub(super) fn iter(&self) -> impl Iterator<Item = (Handle, &NormalizedPolicy)> {
        (0..).zip(&self.slots).filter_map(|(handle, kept)| Some((handle, kept.as_ref()?)))
    }

    /// Returns all policies in their total order: (priority, id).
    pub(super) fn ordered(&self) -> Vec<(Handle, &NormalizedPolicy)> {
        let mut all: Vec<_> = self.iter().collect();
        all.sort_unstable_by_key(|(_, kept)| (kept.priority, &kept.id));
        all
    }

    /// Compares two policies in their total order.
    pub(super) fn order(&self, one: Handle, other: Handle) -> Ordering {
        if one == other {
            return Ordering::Equal;
        }
        let key = |handle| self.get(handle).map(|kept| (kept.priority, &kept.id));
        key(one).cmp(&key(other))
    }
}

fn slot(handle: Handle) -> Option<usize> {
    usize::try_from(handle).ok()
}
