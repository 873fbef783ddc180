//! Assigns every source to a class, from policies whose sources and destinations may overlap.
//!
//! A class is a distinct ordered combination of policies that share a source. Sources are made
//! disjoint, each with one class. Within a class every destination prefix gets the one policy that
//! comes first in (priority, id) among those whose prefixes contain it. The longest-prefix match
//! then gives the same policy as the order.
//!
//! Classes are built from all policies at once, or updated one source at a time.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ipnet::IpNet;

use super::intervals::{Segments, adjoins, destinations, overlaps, segments};
use super::pending::Delta;
use super::policies::{Handle, Policies, Sources};
use super::tags::Numbers;
use crate::range::IpRange;
use crate::state::{Data, Elements, Key, Set, Tag, Value};
use crate::types::Family;

/// An address of one family, as a number.
pub(super) trait Address: Copy + Ord + std::fmt::Debug {
    const FAMILY: Family;

    fn ip(self) -> IpAddr;

    /// Returns the single-address sources of a policy.
    fn of(sources: &Sources) -> &std::collections::BTreeSet<Self>;
}

impl Address for u32 {
    const FAMILY: Family = Family::V4;

    fn ip(self) -> IpAddr {
        IpAddr::V4(Ipv4Addr::from_bits(self))
    }

    fn of(sources: &Sources) -> &std::collections::BTreeSet<Self> {
        &sources.v4
    }
}

impl Address for u128 {
    const FAMILY: Family = Family::V6;

    fn ip(self) -> IpAddr {
        IpAddr::V6(Ipv6Addr::from_bits(self))
    }

    fn of(sources: &Sources) -> &std::collections::BTreeSet<Self> {
        &sources.v6
    }
}

/// Index of a combination.
type Place = u32;

/// Policies in their total order.
type Members = Arc<[Handle]>;

/// A combination of policies that have the same sources in common.
#[derive(Debug)]
struct Combination {
    /// For a range, those up to the first policy that selects every destination; for a single
    /// address, all that name it alone.
    members: Members,
    /// Combination of the range around a single address, whose members it has as well.
    around: Option<Place>,
    /// Its class: all of them up to the first one that selects every destination.
    class: Members,
    /// Members that come after it.
    behind: Box<[Handle]>,
    tag: Tag,
    /// Number of sources with this combination.
    users: usize,
}

#[derive(Debug)]
struct Class {
    tag: Tag,
    /// Number of combinations with this class.
    users: usize,
    /// Members that do not take all the packets they select, each after the first that takes some.
    overlaps: Vec<(Handle, Handle)>,
}

/// The sources of one family, each with its class.
#[derive(Debug)]
pub(super) struct Classes<A> {
    /// Single addresses, including those whose range has the same class.
    hosts: BTreeMap<A, Place>,
    /// Ranges of addresses, disjoint and sorted.
    ranges: Vec<(IpRange, Place)>,
    combinations: Vec<Option<Combination>>,
    free: Vec<Place>,
    /// By the combination around and the members.
    places: HashMap<Option<Place>, HashMap<Members, Place>>,
    numbered: HashMap<Members, Class>,
    numbers: Numbers,
    /// Policies that follow one for every destination in a range, each after such a one.
    behind: Vec<(Handle, Handle)>,
    /// Lengths of destination prefixes, with the number of elements of each.
    lengths: BTreeMap<u8, usize>,
}

impl<A: Address> Classes<A> {
    fn empty() -> Self {
        Self {
            hosts: BTreeMap::new(),
            ranges: Vec::new(),
            combinations: Vec::new(),
            free: Vec::new(),
            places: HashMap::new(),
            numbered: HashMap::new(),
            numbers: Numbers::default(),
            behind: Vec::new(),
            lengths: BTreeMap::new(),
        }
    }

    /// Builds the classes of all policies, and adds their elements, except single-address sources.
    pub(super) fn new(policies: &Policies, elements: &mut Elements) -> Self {
        let mut new = Self::empty();
        let singles = policies.iter().map(|(_, kept)| A::of(&kept.sources).len()).sum();
        let (mut hosts, mut nets) = (Vec::with_capacity(singles), Vec::new());
        for (handle, kept) in policies.iter() {
            let own = kept.sources.cover.iter().filter(|net| Family::of_net(net) == A::FAMILY);
            nets.extend(own.map(|net| (*net, handle)));
            let covered =
                |address: &A| !kept.sources.cover.is_empty() && kept.sources.covers(address.ip());
            let single = A::of(&kept.sources).iter().copied();
            hosts.extend(
                single.filter(|address| !covered(address)).map(|address| (address, handle)),
            );
        }
        new.add_ranges(&nets, policies);
        hosts.sort_unstable();
        let mut alone = vec![None; policies.end()];
        let mut grouped = Vec::with_capacity(hosts.len());
        for group in hosts.chunk_by(|(one, _), (other, _)| one == other) {
            let Some((address, first)) = group.first() else { continue };
            let around = new.around(*address);
            let known = usize::try_from(*first).ok().and_then(|first| alone.get_mut(first));
            let place = if let (1, None, Some(known)) = (group.len(), around, known) {
                let place = *known.get_or_insert_with(|| new.combine(vec![*first], None, policies));
                new.used(place);
                place
            } else {
                let mut members: Vec<_> = group.iter().map(|(_, handle)| *handle).collect();
                members.sort_unstable_by(|one, other| policies.order(*one, *other));
                new.combine(members, around, policies)
            };
            grouped.push((*address, place));
        }
        drop(hosts);
        // A combination of one policy was counted once too often, when it was created.
        for place in alone.into_iter().flatten() {
            if let Some(Some(found)) = at(place).and_then(|at| new.combinations.get_mut(at)) {
                found.users -= 1;
            }
        }
        // From sorted input the tree is built at once and without gaps.
        new.hosts = grouped.into_iter().collect();
        new.number(policies);
        new.describe(policies, elements);
        new
    }

    /// Adds ranges from prefixes of policies, before all single addresses.
    fn add_ranges(&mut self, nets: &[(IpNet, Handle)], policies: &Policies) {
        if nets.is_empty() {
            return;
        }
        let ordered = policies.ordered();
        let mut ranks = vec![0; policies.end()];
        for (rank, (handle, _)) in (0..).zip(&ordered) {
            if let Some(place) = at(*handle).and_then(|at| ranks.get_mut(at)) {
                *place = rank;
            }
        }
        let policy = |rank: u32| at(rank).and_then(|at| ordered.get(at)).copied();
        let rank = |handle: Handle| at(handle).and_then(|at| ranks.get(at)).copied();
        let nets = nets.iter().filter_map(|(net, handle)| Some((*net, rank(*handle)?)));
        let takes_all = |rank| policy(rank).is_some_and(|(_, kept)| kept.takes_all(A::FAMILY));
        let Segments { ranges, behind } = segments(&nets.collect::<Vec<_>>(), A::FAMILY, takes_all);
        let handle = |rank| policy(rank).map(|(handle, _)| handle);
        for (range, members) in ranges {
            let members = members.into_iter().filter_map(handle).collect();
            let place = self.combine(members, None, policies);
            self.ranges.push((range, place));
        }
        let behind = behind.into_iter();
        self.behind = behind.filter_map(|(one, other)| handle(one).zip(handle(other))).collect();
    }

    /// Assigns tags to all classes, which depend on nothing but the ids of their policies.
    fn number(&mut self, policies: &Policies) {
        let classes = self.numbered.iter_mut();
        let mut all: Vec<_> = classes.map(|(members, class)| (members, &mut class.tag)).collect();
        self.numbers = Numbers::of_all(&mut all, |members| ids(members, policies));
        for combination in self.combinations.iter_mut().flatten() {
            if let Some(class) = self.numbered.get(&combination.class) {
                combination.tag = class.tag;
            }
        }
    }

    /// Adds the elements of all classes and ranges.
    fn describe(&mut self, policies: &Policies, elements: &mut Elements) {
        for (members, class) in &self.numbered {
            for (key, value) in class_elements::<A>(members, class.tag, policies) {
                if let Set::Destination(_, length) = key.set() {
                    *self.lengths.entry(length).or_default() += 1;
                }
                elements.insert(key, value);
            }
        }
        let mut joined: Vec<(IpRange, Tag)> = Vec::new();
        for (range, place) in &self.ranges {
            let Some(tag) = self.tag(*place) else { continue };
            match joined.last_mut() {
                Some((last, same)) if *same == tag && adjoins(last, range) => {
                    *last = IpRange::new(last.first(), range.last()).unwrap_or(*last);
                }
                _ => joined.push((*range, tag)),
            }
        }
        elements
            .extend(joined.into_iter().map(|(range, tag)| (Key::source_net(range), plain(tag))));
    }

    /// Returns the single-address sources that need an element, with their classes.
    pub(super) fn sources(&self) -> impl Iterator<Item = (A, Tag)> {
        self.hosts.iter().filter_map(|(address, place)| {
            let tag = self.tag(*place)?;
            // An address whose range has the same class needs no element.
            let around = self.around(*address).and_then(|place| self.tag(place));
            (around != Some(tag)).then_some((*address, tag))
        })
    }

    /// Returns whether there are single-address sources.
    pub(super) fn has_singles(&self) -> bool {
        !self.hosts.is_empty()
    }

    /// Returns whether there are sources that are ranges.
    pub(super) fn has_ranges(&self) -> bool {
        !self.ranges.is_empty()
    }

    pub(super) fn lengths(&self) -> impl Iterator<Item = u8> + '_ {
        self.lengths.keys().copied()
    }

    /// Returns pairs of policies that select the same packets, the winner first.
    ///
    /// A policy is in at most one pair for each class and in one for each combination: all pairs
    /// would be as many as the square of the policies.
    pub(super) fn overlaps(&self) -> impl Iterator<Item = (Handle, Handle)> + '_ {
        let classes = self.numbered.values().flat_map(|class| class.overlaps.iter().copied());
        let behind = self.combinations.iter().flatten().flat_map(Combination::pairs_behind);
        classes.chain(behind).chain(self.behind.iter().copied())
    }

    /// Returns the policies that have this address as a source of its own, not in a prefix.
    pub(super) fn selecting_alone(&self, address: A) -> &[Handle] {
        self.hosts.get(&address).map_or(&[], |place| self.members(*place))
    }

    fn combination(&self, place: Place) -> Option<&Combination> {
        at(place).and_then(|at| self.combinations.get(at)?.as_ref())
    }

    fn used(&mut self, place: Place) {
        if let Some(Some(found)) = at(place).and_then(|at| self.combinations.get_mut(at)) {
            found.users += 1;
        }
    }

    fn members(&self, place: Place) -> &[Handle] {
        self.combination(place).map_or(&[], |found| &found.members)
    }

    fn place(&self, members: &[Handle], around: Option<Place>) -> Option<Place> {
        self.places.get(&around)?.get(members).copied()
    }

    fn tag(&self, place: Place) -> Option<Tag> {
        self.combination(place).map(|found| found.tag)
    }

    /// Returns the combination of the range that contains an address.
    fn around(&self, address: A) -> Option<Place> {
        if self.ranges.is_empty() {
            return None;
        }
        let address = address.ip();
        let at = self.ranges.partition_point(|(range, _)| range.last() < address);
        let (range, place) = self.ranges.get(at)?;
        range.contains(address).then_some(*place)
    }

    /// Returns the combination of these sorted members, counting one more source.
    ///
    /// A new combination has no tag yet.
    fn combine(
        &mut self,
        members: Vec<Handle>,
        around: Option<Place>,
        policies: &Policies,
    ) -> Place {
        if let Some(place) = self.place(&members, around) {
            self.used(place);
            return place;
        }
        let members: Members = members.into();
        let range = around.map_or(&[][..], |place| self.members(place));
        let (class, behind) = cut(&members, range, policies, A::FAMILY);
        let found = self.numbered.entry(Arc::clone(&class)).or_insert_with_key(|class| {
            let overlaps = overlaps(class, policies, A::FAMILY);
            Class { tag: Tag::DENY, users: 0, overlaps }
        });
        found.users += 1;
        let tag = found.tag;
        let named = Arc::clone(&members);
        let combination = Combination { members, around, class, behind, tag, users: 1 };
        let place = if let Some(place) = self.free.pop() {
            if let Some(free) = at(place).and_then(|at| self.combinations.get_mut(at)) {
                *free = Some(combination);
            }
            place
        } else {
            self.combinations.push(Some(combination));
            Place::try_from(self.combinations.len() - 1).unwrap_or(Place::MAX)
        };
        self.places.entry(around).or_default().insert(named, place);
        place
    }

    /// Adds a source to a policy.
    pub(super) fn add(
        &mut self,
        address: A,
        handle: Handle,
        policies: &Policies,
        delta: &mut Delta,
    ) {
        let covers = |handle| policies.get(handle).is_some_and(|k| k.sources.covers(address.ip()));
        if covers(handle) {
            return;
        }
        let old = self.hosts.get(&address).copied();
        let mut members = old.map_or_else(Vec::new, |place| self.members(place).to_vec());
        let Err(place) = members.binary_search_by(|other| policies.order(*other, handle)) else {
            return;
        };
        members.insert(place, handle);
        self.settle(address, Some(members), policies, delta);
    }

    /// Removes a source from a policy.
    pub(super) fn remove(
        &mut self,
        address: A,
        handle: Handle,
        policies: &Policies,
        delta: &mut Delta,
    ) {
        let Some(old) = self.hosts.get(&address).copied() else { return };
        // A policy that names the address by a range, too, does not name it alone.
        let Ok(place) = self.members(old).binary_search_by(|other| policies.order(*other, handle))
        else {
            return;
        };
        let mut members = self.members(old).to_vec();
        members.remove(place);
        let named = !members.is_empty();
        self.settle(address, named.then_some(members), policies, delta);
    }

    /// Changes the combination of a source.
    fn settle(
        &mut self,
        address: A,
        members: Option<Vec<Handle>>,
        policies: &Policies,
        delta: &mut Delta,
    ) {
        let around = self.around(address);
        let new = members.map(|members| self.combine_numbered(members, around, policies, delta));
        let had = self.has_singles();
        let old = match new {
            Some(new) => self.hosts.insert(address, new),
            None => self.hosts.remove(&address),
        };
        delta.skeleton |= had != self.has_singles();
        let around = around.and_then(|place| self.tag(place));
        let tag = new.and_then(|new| self.tag(new)).filter(|tag| around != Some(*tag));
        delta.source(address.ip(), tag.map(plain));
        if let Some(old) = old {
            self.release(old, policies, delta);
        }
    }

    /// Does the same as [`combine`](Self::combine), and assigns a tag.
    fn combine_numbered(
        &mut self,
        members: Vec<Handle>,
        around: Option<Place>,
        policies: &Policies,
        delta: &mut Delta,
    ) -> Place {
        let known = self.place(&members, around).is_some();
        let place = self.combine(members, around, policies);
        if known {
            return place;
        }
        let Some(found) = self.combination(place) else { return place };
        let class = Arc::clone(&found.class);
        delta.overlapping.extend(found.pairs_behind().map(|pair| (A::FAMILY, pair)));
        let Some(entry) = self.numbered.get_mut(&class) else { return place };
        if entry.users == 1 {
            delta.overlapping.extend(entry.overlaps.iter().map(|pair| (A::FAMILY, *pair)));
            match self.numbers.take_alone(ids(&class, policies)) {
                Some(tag) => entry.tag = tag,
                None => delta.disputed = true,
            }
            for (key, value) in class_elements::<A>(&class, entry.tag, policies) {
                if let Set::Destination(_, length) = key.set() {
                    let count = self.lengths.entry(length).or_default();
                    delta.skeleton |= *count == 0;
                    *count += 1;
                }
                delta.put(key, Some(value));
            }
        }
        let tag = entry.tag;
        if let Some(Some(found)) = at(place).and_then(|at| self.combinations.get_mut(at)) {
            found.tag = tag;
        }
        place
    }

    /// Counts one source less for a combination, and removes the combination with its last source.
    fn release(&mut self, place: Place, policies: &Policies, delta: &mut Delta) {
        let Some(slot) = at(place).and_then(|at| self.combinations.get_mut(at)) else { return };
        let Some(found) = slot else { return };
        found.users -= 1;
        if found.users > 0 {
            return;
        }
        let Some(Combination { members, around, class, .. }) = slot.take() else { return };
        self.free.push(place);
        if let Some(places) = self.places.get_mut(&around) {
            places.remove(&members);
        }
        let Some(entry) = self.numbered.get_mut(&class) else { return };
        entry.users -= 1;
        if entry.users > 0 {
            return;
        }
        let tag = entry.tag;
        self.numbered.remove(&class);
        delta.disputed |= !self.numbers.give_back(tag);
        for (key, _) in class_elements::<A>(&class, tag, policies) {
            if let Set::Destination(_, length) = key.set() {
                if let Some(count) = self.lengths.get_mut(&length) {
                    *count -= 1;
                    if *count == 0 {
                        self.lengths.remove(&length);
                        delta.skeleton = true;
                    }
                }
            }
            delta.put(key, None);
        }
    }
}

fn at(place: Place) -> Option<usize> {
    usize::try_from(place).ok()
}

fn plain(tag: Tag) -> Value {
    Value::plain(Data::Tag(tag))
}

fn ids<'a>(
    members: &'a [Handle],
    policies: &'a Policies,
) -> impl Iterator<Item = &'a crate::types::PolicyId> {
    members.iter().filter_map(|handle| policies.get(*handle)).map(|kept| &kept.id)
}

impl Combination {
    /// Returns the policies that take no packet, each after one that takes all it selects.
    fn pairs_behind(&self) -> impl Iterator<Item = (Handle, Handle)> + '_ {
        self.behind.iter().filter_map(|loser| Some((*self.class.last()?, *loser)))
    }
}

/// Returns the members up to the first one that selects every destination, and the others.
///
/// The members are those of a source itself and those of the range around it.
fn cut(
    members: &Members,
    around: &[Handle],
    policies: &Policies,
    family: Family,
) -> (Members, Box<[Handle]>) {
    let takes_all = |handle: &Handle| policies.get(*handle).is_some_and(|k| k.takes_all(family));
    let end_of = |all: &[Handle]| all.iter().position(takes_all).map_or(all.len(), |end| end + 1);
    if around.is_empty() && end_of(members) == members.len() {
        return (Arc::clone(members), Box::default());
    }
    let mut all = [members, around].concat();
    all.sort_by(|one, other| policies.order(*one, *other));
    let behind = all.split_off(end_of(&all));
    (all.into(), behind.into())
}

/// Returns the elements of a class.
fn class_elements<A: Address>(
    members: &[Handle],
    class: Tag,
    policies: &Policies,
) -> impl Iterator<Item = (Key, Value)> {
    let family = A::FAMILY;
    let tag_of = |handle| policies.get(handle).map(|kept| kept.tag);
    let found = destinations(members, policies, family).into_iter();
    let listed = found.filter_map(move |(net, handle)| {
        Some((Key::destination(net, class), plain(tag_of(handle)?)))
    });
    let last = members.last().and_then(|handle| policies.get(*handle));
    let any = last.filter(|kept| kept.takes_all(family));
    listed.chain(any.map(|kept| (Key::any(family, class), plain(kept.tag))))
}
