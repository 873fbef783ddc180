//! Validated, normalised policies, stored for as long as they are wanted.

use std::cmp::Ordering;
use std::collections::{BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use super::tags::Numbers;
use super::validate::{ValidatedCluster, around, canonical, check_egress_ip, check_net, disjoint};
use super::{PlanError, PolicyError};
use crate::policy::{Destinations, EgressIp, Policy, Unavailable};
use crate::state::{Comment, Tag};
use crate::types::{Family, NodeName, PolicyId};

/// Index of a policy in the store.
pub(super) type Handle = u32;

/// A policy in canonical form, independent of the caller's value.
#[derive(Debug)]
pub(super) struct NormalizedPolicy {
    pub(super) id: PolicyId,
    pub(super) comment: Comment,
    /// Identifies the policy in the kernel's maps.
    pub(super) tag: Tag,
    pub(super) priority: u32,
    /// Disjoint and sorted; a prefix of length 0 stands for all destinations of its family.
    pub(super) destinations: Option<Vec<IpNet>>,
    /// Index of the gateway in the cluster's list of nodes.
    pub(super) gateway: Option<usize>,
    pub(super) egress_ip: EgressIp,
    pub(super) unavailable: Unavailable,
    pub(super) sources: Sources,
}

/// The sources of a policy as the caller gave them, without duplicates.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Sources {
    pub(super) v4: BTreeSet<u32>,
    pub(super) v6: BTreeSet<u128>,
    /// Prefixes of more than one address, sorted.
    nets: Vec<IpNet>,
    /// Disjoint prefixes that cover the same addresses as `nets`.
    pub(super) cover: Vec<IpNet>,
}

impl Sources {
    pub(super) fn of(nets: &[IpNet]) -> Result<Self, PolicyError> {
        if nets.is_empty() {
            return Err(PolicyError::NoSources);
        }
        let (mut v4, mut v6, mut wide) = (Vec::with_capacity(nets.len()), Vec::new(), Vec::new());
        for net in nets {
            match net {
                // A single IPv4 address is always valid.
                IpNet::V4(net) if net.prefix_len() == 32 => v4.push(net.addr().to_bits()),
                net => {
                    check_net(net)?;
                    match net {
                        IpNet::V6(net) if net.prefix_len() == 128 => v6.push(net.addr().to_bits()),
                        net => wide.push(*net),
                    }
                }
            }
        }
        wide.sort_unstable();
        wide.dedup();
        let cover = disjoint(wide.clone());
        let (v4, v6) = (v4.into_iter().collect(), v6.into_iter().collect());
        Ok(Self { v4, v6, nets: wide, cover })
    }

    /// Returns whether a list has exactly these sources.
    pub(super) fn are(&self, nets: &[IpNet]) -> bool {
        self.are_in_order(nets) || Self::of(nets).is_ok_and(|other| *self == other)
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

    /// Returns whether a list includes all of these sources.
    pub(super) fn are_all_among(&self, nets: &[IpNet]) -> bool {
        let named: BTreeSet<_> = nets.iter().filter(|net| self.contains(**net)).collect();
        named.len() == self.len()
    }

    fn contains(&self, net: IpNet) -> bool {
        match net {
            IpNet::V4(net) if net.prefix_len() == 32 => self.v4.contains(&net.addr().to_bits()),
            IpNet::V6(net) if net.prefix_len() == 128 => self.v6.contains(&net.addr().to_bits()),
            net => self.nets.binary_search(&net).is_ok(),
        }
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

impl NormalizedPolicy {
    pub(super) fn new<P: Policy>(policy: &P, world: &ValidatedCluster) -> Result<Self, PlanError> {
        let id = policy.id();
        Self::check(policy, world)
            .map_err(|source| PlanError::Policy { policy: id.clone(), source })
    }

    fn check<P: Policy>(policy: &P, world: &ValidatedCluster) -> Result<Self, PolicyError> {
        if policy.sources().is_empty() {
            return Err(PolicyError::NoSources);
        }
        let destinations = match policy.destinations() {
            Destinations::External => None,
            Destinations::Nets(nets) if nets.is_empty() => return Err(PolicyError::NoDestinations),
            Destinations::Nets(nets) => Some(canonical(nets)?),
        };
        let gateway = place(policy.gateway(), world)?;
        for address in policy.egress_ip().addresses() {
            check_egress_ip(address, world)?;
        }
        Ok(Self {
            id: policy.id().clone(),
            comment: Comment::of_policy(policy.id()),
            tag: Tag::DENY,
            priority: policy.priority(),
            sources: Sources::of(policy.sources())?,
            destinations,
            gateway,
            egress_ip: policy.egress_ip(),
            unavailable: policy.unavailable(),
        })
    }

    /// Returns whether the caller's policy equals this one.
    pub(super) fn is<P: Policy>(&self, policy: &P, world: &ValidatedCluster) -> bool {
        let gateway = self.gateway.and_then(|place| world.node(place)).map(|node| &node.name);
        self.priority == policy.priority()
            && gateway == policy.gateway()
            && self.egress_ip == policy.egress_ip()
            && self.unavailable == policy.unavailable()
            && match (policy.destinations(), &self.destinations) {
                (Destinations::External, None) => true,
                (Destinations::Nets(nets), Some(kept)) => {
                    nets == kept
                        || !nets.is_empty() && canonical(nets).is_ok_and(|nets| nets == *kept)
                }
                _ => false,
            }
            && self.sources.are(policy.sources())
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

    /// Returns the listed destinations of a family; none if the policy selects all.
    pub(super) fn listed(&self, family: Family) -> impl Iterator<Item = IpNet> + '_ {
        let nets = self.destinations.as_deref().unwrap_or_default();
        nets.iter()
            .copied()
            .filter(move |net| Family::of_net(net) == family && net.prefix_len() > 0)
    }
}

/// Returns the index of a gateway in the cluster's list of nodes.
pub(super) fn place(
    gateway: Option<&NodeName>,
    world: &ValidatedCluster,
) -> Result<Option<usize>, PolicyError> {
    let known = |name: &NodeName| {
        world.place(name).ok_or_else(|| PolicyError::UnknownGateway { gateway: name.clone() })
    };
    gateway.map(known).transpose()
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
    pub(super) fn new<P: Policy>(
        policies: impl IntoIterator<Item = P>,
        world: &ValidatedCluster,
    ) -> Result<Self, PlanError> {
        let mut all = Self::default();
        for policy in policies {
            if all.by_id.contains_key(policy.id()) {
                return Err(PlanError::DuplicatePolicy { policy: policy.id().clone() });
            }
            all.insert(NormalizedPolicy::new(&policy, world)?);
        }
        all.number();
        Ok(all)
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
