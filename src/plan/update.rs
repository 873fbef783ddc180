//! Incremental planning: the cost of an update depends on the update, not on the total.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;

use super::index::{Index, NOTHING};
use super::pending::Delta;
use super::policies::{Handle, NormalizedPolicy, Sources};
use super::replies::own_mark;
use super::reverse_path::reverse_table;
use super::table::{egress_ips, ways_out};
use super::validate::check_net;
use super::{Finding, PlanError, PolicyError, Role, closing_table, numbered, roles};
use crate::alloc::{MarkAllocator, TableAllocator};
use crate::cluster::Backend;
use crate::policy::{EgressPolicy, Policy};
use crate::state::{Key, State, Value};
use crate::types::{NodeName, PolicyId};

/// A change of the wanted policies, for [`Reconciler::update`](crate::Reconciler::update).
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Update<P = EgressPolicy> {
    /// Adds a policy, or replaces the one with the same id.
    Upsert(P),
    /// Removes a policy; it is no error if none has this id.
    Remove(PolicyId),
    /// Adds pods to a policy; it is no error if they are sources already.
    AddSources {
        /// The policy, which must exist.
        policy: PolicyId,
        /// Prefixes of the pods, without host bits: an invalid one closes the policy.
        sources: Vec<IpNet>,
    },
    /// Removes pods from a policy; it is no error if they are no sources.
    RemoveSources {
        /// The policy, which must exist.
        policy: PolicyId,
        /// Prefixes of the pods, as they were added.
        sources: Vec<IpNet>,
    },
    /// Moves a policy to another gateway node; with `None` its traffic is dropped.
    ///
    /// If several policies of a snapshot had the id, they stay closed until one is upserted.
    Move {
        /// The policy, which must exist.
        policy: PolicyId,
        /// The gateway node.
        gateway: Option<NodeName>,
    },
}

/// A change of the wanted policies, as a snapshot can make one.
#[derive(Debug)]
pub(crate) enum Change<P> {
    One(Update<P>),
    /// Replaces the policies of an id by several, which contradict each other.
    Several(Vec<P>),
}

impl<P: Policy> Change<P> {
    /// Returns the id of the one policy that the change adds or replaces.
    pub(super) fn upserts(&self) -> Option<&PolicyId> {
        match self {
            Self::One(Update::Upsert(policy)) => Some(policy.id()),
            _ => None,
        }
    }
}

/// The effect of updates on the planned state.
#[derive(Debug)]
pub(crate) enum Planned {
    /// Only these parts of the state change.
    Part(Part),
    /// All of the state may change, because tags or ranges depend on one another.
    Whole(Box<State>),
}

/// The parts of a state that updates change.
#[derive(Debug, Default)]
pub(crate) struct Part {
    /// Elements after the updates; `None` for deleted ones.
    pub(crate) elements: BTreeMap<Key, Option<Value>>,
    /// True if any policy was changed, which may change nothing but the findings.
    pub(crate) edited: bool,
    /// Everything except elements, if any of it changes.
    pub(crate) rest: Option<Box<State>>,
    /// Single-address sources whose packets may take another path; `None` if any source's may.
    pub(crate) sources: Option<BTreeSet<IpAddr>>,
}

/// A validated update.
#[derive(Debug)]
enum Edit {
    Insert(Box<NormalizedPolicy>),
    Replace(Handle, Box<NormalizedPolicy>),
    Remove(Handle),
    Add(Handle, Vec<IpNet>),
    Drop(Handle, Vec<IpNet>),
    Move(Handle, Option<Result<usize, PolicyError>>),
}

/// Bookkeeping of one `update` call.
#[derive(Debug, Default)]
struct Course {
    delta: Delta,
    /// Policies whose actions were removed, to be added again at the end.
    touched: BTreeSet<Handle>,
    /// True if the path of all sources of some policy changes, whichever they are.
    everybody: bool,
    /// Egress IPs of this node that the touched policies alone had.
    gone: BTreeSet<IpAddr>,
}

impl Index {
    /// Plans changes, one after another, and returns their effect and new findings.
    ///
    /// # Errors
    ///
    /// An update of an unknown policy, and the failure of an allocator; the index is then
    /// unchanged.
    pub(crate) fn update<P: Policy>(
        &mut self,
        changes: impl IntoIterator<Item = Change<P>>,
        marks: &mut dyn MarkAllocator,
        tables: &mut dyn TableAllocator,
    ) -> Result<(Planned, Vec<Finding>), PlanError> {
        let (mut course, mut undo) = (Course::default(), Vec::new());
        let translated = self.translates();
        let made = changes.into_iter().try_for_each(|change| {
            let edit = match change {
                Change::One(update) => self.resolve(update)?,
                Change::Several(policies) => self.resolve_several(&policies),
            };
            if let Some(edit) = edit {
                undo.extend(self.edit(edit, &mut course));
            }
            Ok(())
        });
        let come = self.put_back(&course.touched);
        let claims = !self.world.cluster.claims.is_empty() && come != course.gone;
        course.delta.skeleton |= claims || translated != self.translates();
        match made.and_then(|()| self.allocate(marks, tables, &mut course.delta)) {
            Ok(()) => Ok(self.planned(course)),
            Err(error) => {
                let mut back = Course { delta: course.delta, ..Course::default() };
                for edit in undo.into_iter().rev() {
                    self.edit(edit, &mut back);
                }
                self.put_back(&back.touched);
                if back.delta.disputed {
                    self.renew();
                }
                Err(error)
            }
        }
    }

    /// Validates an update; `None` if it changes nothing.
    fn resolve<P: Policy>(&self, update: Update<P>) -> Result<Option<Edit>, PlanError> {
        let known = |id: &PolicyId| {
            let unknown = || PlanError::UnknownPolicy { policy: id.clone() };
            self.policies.find(id).ok_or_else(unknown)
        };
        Ok(match update {
            Update::Upsert(policy) => {
                let found = self.policies.find(policy.id());
                let same = found.and_then(|handle| self.policies.get(handle));
                if same.is_some_and(|kept| kept.is(&policy, &self.world)) {
                    return Ok(None);
                }
                Some(set(found, NormalizedPolicy::new(&policy, &self.world.nodes)))
            }
            Update::Remove(id) => self.policies.find(&id).map(Edit::Remove),
            Update::AddSources { policy, sources } => {
                let handle = known(&policy)?;
                let sound = sources.iter().all(|net| check_net(net).is_ok());
                self.with_other_sources(handle, !sound, |given| given.extend(&sources))
                    .or(Some(Edit::Add(handle, sources)))
            }
            Update::RemoveSources { policy, sources } => {
                let handle = known(&policy)?;
                let rest = |given: &mut Vec<IpNet>| given.retain(|net| !sources.contains(net));
                self.with_other_sources(handle, false, rest).or(Some(Edit::Drop(handle, sources)))
            }
            Update::Move { policy, gateway } => {
                let handle = known(&policy)?;
                let kept = self.policies.get(handle);
                let gateway = gateway.map(|gateway| self.world.nodes.gateway(&gateway));
                kept.is_some_and(|kept| !kept.is_duplicate()).then_some(Edit::Move(handle, gateway))
            }
        })
    }

    /// Returns the edit that closes several policies of one id; `None` if they are closed already.
    fn resolve_several<P: Policy>(&self, policies: &[P]) -> Option<Edit> {
        let new = NormalizedPolicy::of_all(policies, &self.world.nodes)?;
        let found = self.policies.find(&new.id);
        let kept = found.and_then(|handle| self.policies.get(handle));
        let same =
            kept.is_some_and(|kept| *kept == NormalizedPolicy { tag: kept.tag, ..new.clone() });
        (!same).then(|| set(found, new))
    }

    /// Returns the edit that changes the sources of a policy of which some are invalid.
    ///
    /// An address that an invalid source names may be a source of its own as well, so that sources
    /// are not added to or removed from these. `None` if all sources are valid.
    fn with_other_sources(
        &self,
        handle: Handle,
        invalid: bool,
        change: impl FnOnce(&mut Vec<IpNet>),
    ) -> Option<Edit> {
        let kept = self.policies.get(handle)?;
        if kept.sources.are_sound() && !invalid {
            return None;
        }
        let mut given = kept.sources.given();
        change(&mut given);
        let kept = NormalizedPolicy { sources: Sources::of(&given), ..kept.clone() };
        Some(Edit::Replace(handle, Box::new(kept)))
    }

    /// Applies an edit, and returns the edit that undoes it.
    fn edit(&mut self, edit: Edit, course: &mut Course) -> Option<Edit> {
        match edit {
            Edit::Insert(kept) => Some(Edit::Remove(self.insert(*kept, course))),
            Edit::Replace(handle, kept) => {
                let old = self.replace(handle, *kept, course)?;
                Some(Edit::Replace(handle, Box::new(old)))
            }
            Edit::Remove(handle) => Some(Edit::Insert(Box::new(self.remove(handle, course)?))),
            Edit::Add(handle, nets) => {
                self.touch(handle, course);
                Some(Edit::Drop(handle, self.add(handle, nets, &mut course.delta)))
            }
            Edit::Drop(handle, nets) => {
                self.touch(handle, course);
                Some(Edit::Add(handle, self.drop(handle, nets, &mut course.delta)))
            }
            Edit::Move(handle, gateway) => {
                self.touch(handle, course);
                course.everybody = true;
                let kept = self.policies.get_mut(handle)?;
                Some(Edit::Move(handle, std::mem::replace(&mut kept.gateway, gateway)))
            }
        }
    }

    /// Removes a policy's action elements and their counts, unless this was done before.
    fn touch(&mut self, handle: Handle, course: &mut Course) {
        let Some(kept) = self.policies.get(handle).filter(|_| course.touched.insert(handle)) else {
            return;
        };
        for (key, _) in ways_out(&self.world, kept, &self.gateways) {
            course.delta.put(key, None);
        }
        for (_, role) in roles(kept, &self.world) {
            match role {
                Role::Client(place) => drop(less(&mut self.used, &place)),
                Role::Gateway => self.own = self.own.saturating_sub(1),
                Role::Denied(_) | Role::Invalid => {}
            }
        }
        for (address, gateway) in egress_ips(kept, &self.world) {
            if less(&mut self.egress_ips, &(address, gateway)) && self.world.is_here(gateway) {
                course.delta.put(Key::eip(address), None);
                course.gone.insert(address);
            }
        }
    }

    /// Counts the gateways and egress IPs of these policies again; returns the egress IPs of this
    /// node that no other policy has.
    fn put_back(&mut self, touched: &BTreeSet<Handle>) -> BTreeSet<IpAddr> {
        let mut come = BTreeSet::new();
        for kept in touched.iter().filter_map(|handle| self.policies.get(*handle)) {
            for (_, role) in roles(kept, &self.world) {
                match role {
                    Role::Client(place) => *self.used.entry(place).or_default() += 1,
                    Role::Gateway => self.own += 1,
                    Role::Denied(_) | Role::Invalid => {}
                }
            }
            for (address, gateway) in egress_ips(kept, &self.world) {
                let count = self.egress_ips.entry((address, gateway)).or_default();
                *count += 1;
                if *count == 1 && self.world.is_here(gateway) {
                    come.insert(address);
                }
            }
        }
        come
    }

    fn insert(&mut self, kept: NormalizedPolicy, course: &mut Course) -> Handle {
        let tag = self.policies.numbers.take_alone([&kept.id]);
        course.delta.disputed |= tag.is_none() || !kept.sources.cover.is_empty();
        let handle =
            self.policies.insert(NormalizedPolicy { tag: tag.unwrap_or(kept.tag), ..kept });
        course.touched.insert(handle);
        self.enter(handle, &mut course.delta);
        handle
    }

    fn remove(&mut self, handle: Handle, course: &mut Course) -> Option<NormalizedPolicy> {
        self.touch(handle, course);
        let kept = self.policies.get(handle)?;
        course.delta.disputed |= !kept.sources.cover.is_empty();
        self.leave(handle, &mut course.delta);
        let kept = self.policies.remove(handle)?;
        course.delta.disputed |= !self.policies.numbers.give_back(kept.tag);
        Some(kept)
    }

    fn replace(
        &mut self,
        handle: Handle,
        new: NormalizedPolicy,
        course: &mut Course,
    ) -> Option<NormalizedPolicy> {
        self.touch(handle, course);
        let old = self.policies.get(handle)?;
        let new = NormalizedPolicy { tag: old.tag, ..new };
        let shape = old.priority != new.priority || old.destinations != new.destinations;
        course.everybody |= old.gateway != new.gateway
            || old.egress_ip != new.egress_ip
            || old.unavailable != new.unavailable
            || old.is_sound() != new.is_sound();
        let ranges = old.sources.cover != new.sources.cover;
        course.delta.disputed |= ranges || shape && !old.sources.cover.is_empty();
        if shape {
            self.leave(handle, &mut course.delta);
            let old = std::mem::replace(self.policies.get_mut(handle)?, new);
            self.enter(handle, &mut course.delta);
            return Some(old);
        }
        let gone = old.sources.without(&new.sources);
        let come = new.sources.without(&old.sources);
        self.follow(&gone, handle, false, &mut course.delta);
        let old = std::mem::replace(self.policies.get_mut(handle)?, new);
        self.follow(&come, handle, true, &mut course.delta);
        Some(old)
    }

    /// Adds all single-address sources of a policy to the classes.
    fn enter(&mut self, handle: Handle, delta: &mut Delta) {
        let all = self.policies.get(handle).map(|kept| kept.sources.single()).unwrap_or_default();
        self.follow(&all, handle, true, delta);
    }

    /// Removes all single-address sources of a policy from the classes.
    fn leave(&mut self, handle: Handle, delta: &mut Delta) {
        let all = self.policies.get(handle).map(|kept| kept.sources.single()).unwrap_or_default();
        self.follow(&all, handle, false, delta);
    }

    /// Updates the classes for single-address sources that are added to or removed from a policy.
    fn follow(&mut self, sources: &[IpAddr], handle: Handle, join: bool, delta: &mut Delta) {
        for address in sources {
            // Everything is planned again in the end, and the classes no longer match the policies.
            if delta.disputed {
                return;
            }
            let policies = &self.policies;
            match (address, join) {
                (IpAddr::V4(v4), true) => self.v4.add(v4.to_bits(), handle, policies, delta),
                (IpAddr::V4(v4), false) => self.v4.remove(v4.to_bits(), handle, policies, delta),
                (IpAddr::V6(v6), true) => self.v6.add(v6.to_bits(), handle, policies, delta),
                (IpAddr::V6(v6), false) => self.v6.remove(v6.to_bits(), handle, policies, delta),
            }
        }
    }

    /// Adds sources to a policy, and returns those that are new.
    fn add(&mut self, handle: Handle, mut nets: Vec<IpNet>, delta: &mut Delta) -> Vec<IpNet> {
        if let Some(kept) = self.policies.get_mut(handle) {
            nets.retain(|net| kept.sources.insert(*net));
            delta.disputed |= kept.sources.fit_cover();
        }
        self.follow(&single(&nets), handle, true, delta);
        nets
    }

    /// Removes sources from a policy, and returns those that it had.
    fn drop(&mut self, handle: Handle, mut nets: Vec<IpNet>, delta: &mut Delta) -> Vec<IpNet> {
        if let Some(kept) = self.policies.get_mut(handle) {
            nets.retain(|net| kept.sources.remove(*net));
            delta.disputed |= kept.sources.fit_cover();
        }
        self.follow(&single(&nets), handle, false, delta);
        nets
    }

    /// Allocates marks and tables for the gateways that are used now.
    fn allocate(
        &mut self,
        marks: &mut dyn MarkAllocator,
        tables: &mut dyn TableAllocator,
        delta: &mut Delta,
    ) -> Result<(), PlanError> {
        let places = self.gateways.values().map(|gateway| gateway.place);
        let places: BTreeSet<_> = places.collect();
        // Each update comes here: without replies by the tunnel nothing else is collected.
        let all = self.own_mark.is_some() && self.translates();
        let complete =
            if all { places == self.receivers() } else { places.iter().eq(self.used.keys()) };
        if complete {
            self.short = false;
            return Ok(());
        }
        let receivers = self.receivers();
        // Gateways that found no mark or table before are among those used: they may find one now.
        let mut gateways = numbered(&receivers, &self.used, &self.world, marks, tables)?;
        let own_mark = own_mark(&mut gateways, &self.used, &self.world, marks)?;
        let (closing, no_table) = closing_table(&self.world, &gateways, tables)?;
        let reverse = reverse_table(&self.world, &gateways, tables)?;
        let short = gateways.len() < receivers.len();
        let was_short = std::mem::replace(&mut self.short, short);
        let same = (closing, no_table) == (self.closing, self.no_table)
            && (own_mark, reverse) == (self.own_mark, self.reverse);
        if same && gateways == self.gateways {
            return Ok(());
        }
        let renumbered = gateways
            .iter()
            .any(|(name, new)| self.gateways.get(name).is_some_and(|old| old != new));
        // Policies that no change names may use a gateway that found no mark or table before.
        delta.disputed |= renumbered || short || was_short;
        delta.skeleton = true;
        let (_, gone) = self.parts();
        delta.elements.extend(gone.into_keys().map(|key| (key, None)));
        (self.gateways, self.own_mark) = (gateways, own_mark);
        (self.closing, self.reverse, self.no_table) = (closing, reverse, no_table);
        Ok(())
    }

    fn planned(&mut self, course: Course) -> (Planned, Vec<Finding>) {
        let Course { mut delta, touched, everybody, .. } = course;
        let edited = !touched.is_empty();
        let mut touched: Vec<_> =
            touched.iter().filter_map(|handle| self.policies.get(*handle)).collect();
        touched.sort_unstable_by_key(|kept| (kept.priority, &kept.id));
        let mut findings: Vec<_> = touched.iter().flat_map(|kept| self.findings_of(kept)).collect();
        findings.extend(self.overlaps(&delta.overlapping));
        let addresses = touched.iter().flat_map(|kept| egress_ips(kept, &self.world));
        let addresses: BTreeSet<_> = addresses.map(|(address, _)| address).collect();
        findings.extend(self.shared_egress_ips(addresses));
        let no_table = self.no_table.filter(|_| delta.skeleton);
        findings.extend(no_table.map(|capacity| Finding::NoClosingTable { capacity }));
        findings.extend(self.unreachable_replies().filter(|_| delta.skeleton));
        // With iptables the effect of an update is only known from a plan of everything.
        if delta.disputed || self.world.cluster.backend != Backend::Nftables {
            return (Planned::Whole(Box::new(self.renew())), findings);
        }
        for kept in touched {
            for (key, value) in ways_out(&self.world, kept, &self.gateways) {
                delta.put(key, Some(value));
            }
            let addresses = egress_ips(kept, &self.world);
            for (address, _) in addresses.filter(|(_, gateway)| self.world.is_here(*gateway)) {
                delta.put(Key::eip(address), Some(NOTHING));
            }
        }
        let mut part = Part { edited, ..Part::default() };
        if delta.skeleton {
            let (state, fixed) = self.parts();
            delta.elements.extend(fixed.into_iter().map(|(key, value)| (key, Some(value))));
            part.rest = Some(Box::new(state));
        }
        part.sources = Some(delta.sources).filter(|_| !everybody && part.rest.is_none());
        part.elements = delta.elements;
        (Planned::Part(part), findings)
    }
}

/// Returns the edit that sets a policy, instead of the one with this handle.
fn set(found: Option<Handle>, new: NormalizedPolicy) -> Edit {
    match found {
        Some(handle) => Edit::Replace(handle, Box::new(new)),
        None => Edit::Insert(Box::new(new)),
    }
}

/// Decrements a count, and returns whether it reached zero.
fn less<K: Ord>(counts: &mut BTreeMap<K, usize>, key: &K) -> bool {
    let Some(count) = counts.get_mut(key) else { return false };
    *count = count.saturating_sub(1);
    let last = *count == 0;
    if last {
        counts.remove(key);
    }
    last
}

/// Returns the single addresses among prefixes.
fn single(nets: &[IpNet]) -> Vec<IpAddr> {
    nets.iter().filter(|net| net.prefix_len() == net.max_prefix_len()).map(IpNet::addr).collect()
}
