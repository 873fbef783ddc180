//! Memory-compact storage for the elements of all sets and maps.

use std::collections::{BTreeMap, btree_map};
use std::fmt;
use std::iter::{Chain, Map, Peekable};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::Bound;
use std::sync::Arc;

use super::element::{Data, Tag, Value};
use super::set::{Key, KeyValue, Set};
use crate::types::Family;

/// An ordered map from element key to value.
///
/// It behaves like any other map, except that it returns copies. A pod's address and its class, of
/// which there may be a million, take a dozen bytes instead of a hundred. Clones share them until
/// one of the clones changes.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Elements {
    v4: Arc<BTreeMap<u32, Tag>>,
    v6: Arc<BTreeMap<u128, Tag>>,
    /// All elements except sources with a class and no comment.
    rest: Arc<BTreeMap<Key, Value>>,
}

/// Storage location of an element.
enum Place {
    V4(u32),
    V6(u128),
    Rest,
}

fn place(key: &Key) -> Place {
    match (key.set(), key.value()) {
        (Set::Source(_), KeyValue::Address(IpAddr::V4(v4))) => Place::V4(v4.to_bits()),
        (Set::Source(_), KeyValue::Address(IpAddr::V6(v6))) => Place::V6(v6.to_bits()),
        _ => Place::Rest,
    }
}

const fn small(value: &Value) -> Option<Tag> {
    match value {
        Value { data: Data::Tag(tag), comment: None } => Some(*tag),
        _ => None,
    }
}

const fn large(tag: Tag) -> Value {
    Value::plain(Data::Tag(tag))
}

impl Elements {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.v4.len() + self.v6.len() + self.rest.len()
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The value of an element.
    pub fn get(&self, key: &Key) -> Option<Value> {
        let tag = match place(key) {
            Place::V4(address) => self.v4.get(&address),
            Place::V6(address) => self.v6.get(&address),
            Place::Rest => None,
        };
        tag.map(|tag| large(*tag)).or_else(|| self.rest.get(key).cloned())
    }

    /// Whether there is an element with this key.
    pub fn contains_key(&self, key: &Key) -> bool {
        let small = match place(key) {
            Place::V4(address) => self.v4.contains_key(&address),
            Place::V6(address) => self.v6.contains_key(&address),
            Place::Rest => false,
        };
        small || self.rest.contains_key(key)
    }

    /// Adds an element and returns the previous value of its key.
    pub fn insert(&mut self, key: Key, value: Value) -> Option<Value> {
        let before = match (small(&value), place(&key)) {
            (Some(tag), Place::V4(address)) => Arc::make_mut(&mut self.v4).insert(address, tag),
            (Some(tag), Place::V6(address)) => Arc::make_mut(&mut self.v6).insert(address, tag),
            _ => {
                let before = self.remove_small(&key);
                return Arc::make_mut(&mut self.rest).insert(key, value).or(before.map(large));
            }
        };
        // The other location has the key only if another program commented a source.
        before.map(large).or_else(|| self.remove_large(&key))
    }

    fn remove_small(&mut self, key: &Key) -> Option<Tag> {
        match place(key) {
            Place::V4(address) => Arc::make_mut(&mut self.v4).remove(&address),
            Place::V6(address) => Arc::make_mut(&mut self.v6).remove(&address),
            Place::Rest => None,
        }
    }

    fn remove_large(&mut self, key: &Key) -> Option<Value> {
        // Shared elements are copied only if the key is among them.
        self.rest.contains_key(key).then(|| Arc::make_mut(&mut self.rest).remove(key)).flatten()
    }

    /// Removes an element and returns its value.
    pub fn remove(&mut self, key: &Key) -> Option<Value> {
        self.remove_small(key).map(large).or_else(|| self.remove_large(key))
    }

    /// Keeps the elements for which `keep` holds.
    pub fn retain(&mut self, mut keep: impl FnMut(&Key, &Value) -> bool) {
        let (small4, small6) = (Arc::make_mut(&mut self.v4), Arc::make_mut(&mut self.v6));
        small4.retain(|address, tag| keep(&v4((address, tag)).0, &large(*tag)));
        small6.retain(|address, tag| keep(&v6((address, tag)).0, &large(*tag)));
        Arc::make_mut(&mut self.rest).retain(|key, value| keep(key, value));
    }

    /// The elements in the order of their keys.
    pub fn iter(&self) -> Iter<'_> {
        let small: Small<'_, u32> = self.v4.iter().map(v4);
        let small = small.chain(self.v6.iter().map(v6 as fn(_) -> _)).peekable();
        Iter { small, rest: self.rest.iter().peekable(), left: self.len() }
    }

    /// Whether another program commented a source; all other sources are stored as numbers.
    pub(crate) fn has_noted_sources(&self) -> bool {
        Family::BOTH.into_iter().any(|family| self.rest_of(Set::Source(family)).next().is_some())
    }

    /// Returns true if one is an unchanged clone of the other.
    pub(crate) fn is_shared_with(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.v4, &other.v4)
            && Arc::ptr_eq(&self.v6, &other.v6)
            && Arc::ptr_eq(&self.rest, &other.rest)
    }

    /// The IPv4 sources without comment; none if `other` shares them.
    pub(crate) fn v4_apart_from(&self, other: &Self) -> btree_map::Iter<'_, u32, Tag> {
        static NONE: BTreeMap<u32, Tag> = BTreeMap::new();
        if Arc::ptr_eq(&self.v4, &other.v4) { NONE.iter() } else { self.v4.iter() }
    }

    /// The IPv6 sources without comment; none if `other` shares them.
    pub(crate) fn v6_apart_from(&self, other: &Self) -> btree_map::Iter<'_, u128, Tag> {
        static NONE: BTreeMap<u128, Tag> = BTreeMap::new();
        if Arc::ptr_eq(&self.v6, &other.v6) { NONE.iter() } else { self.v6.iter() }
    }

    /// The elements of one set, in unspecified order.
    #[cfg(any(test, all(feature = "kernel", target_os = "linux")))]
    pub(crate) fn of(&self, set: Set) -> impl Iterator<Item = (Key, Value)> + '_ {
        let small4 = (set == Set::Source(Family::V4)).then(|| self.v4.iter().map(v4));
        let small6 = (set == Set::Source(Family::V6)).then(|| self.v6.iter().map(v6));
        let small = small4.into_iter().flatten().chain(small6.into_iter().flatten());
        small.chain(self.rest_of(set).map(|(key, value)| (*key, value.clone())))
    }

    /// Copies the elements of a set from `other`; `self` must have none of that set.
    #[cfg(any(test, all(feature = "kernel", target_os = "linux")))]
    pub(crate) fn take_over(&mut self, other: &Self, set: Set) {
        match set {
            Set::Source(Family::V4) if self.v4.is_empty() => self.v4 = Arc::clone(&other.v4),
            Set::Source(Family::V6) if self.v6.is_empty() => self.v6 = Arc::clone(&other.v6),
            _ => return self.extend(other.of(set)),
        }
        let rest = other.rest_of(set).map(|(key, value)| (*key, value.clone()));
        Arc::make_mut(&mut self.rest).extend(rest);
    }

    /// The keys in order.
    pub fn keys(&self) -> impl Iterator<Item = Key> + '_ {
        self.iter().map(|(key, _)| key)
    }

    /// The values in the order of their keys.
    pub fn values(&self) -> impl Iterator<Item = Value> + '_ {
        self.iter().map(|(_, value)| value)
    }

    /// The elements other than single sources, in key order and without copying.
    pub(crate) fn rest(&self) -> impl Iterator<Item = (&Key, &Value)> {
        self.rest.iter()
    }

    /// The elements of one set other than single sources.
    fn rest_of(&self, set: Set) -> impl Iterator<Item = (&Key, &Value)> {
        self.rest.range(Key::least(set)..).take_while(move |(key, _)| key.set() == set)
    }

    /// The last element up to a key, among the elements other than single sources.
    pub(crate) fn last_range_up_to(&self, end: &Key) -> Option<&Key> {
        let (key, _) = self.rest.range((Bound::Unbounded, Bound::Included(end))).next_back()?;
        Some(key)
    }

    /// Sets the single sources of each family and their classes, which must come in key order.
    pub(crate) fn fill_sources(
        &mut self,
        v4: impl IntoIterator<Item = (u32, Tag)>,
        v6: impl IntoIterator<Item = (u128, Tag)>,
    ) {
        // A tree that is built at once from sorted input has full nodes.
        self.v4 = Arc::new(v4.into_iter().collect());
        self.v6 = Arc::new(v6.into_iter().collect());
    }
}

/// Iterator over the single sources of one family as elements.
type Small<'a, A> = Map<btree_map::Iter<'a, A, Tag>, fn((&'a A, &'a Tag)) -> (Key, Value)>;

fn v4((address, tag): (&u32, &Tag)) -> (Key, Value) {
    (Key::source(Ipv4Addr::from_bits(*address).into()), large(*tag))
}

fn v6((address, tag): (&u128, &Tag)) -> (Key, Value) {
    (Key::source(Ipv6Addr::from_bits(*address).into()), large(*tag))
}

/// Iterator over elements in key order; made by [`Elements::iter`].
#[derive(Clone)]
pub struct Iter<'a> {
    small: Peekable<Chain<Small<'a, u32>, Small<'a, u128>>>,
    rest: Peekable<btree_map::Iter<'a, Key, Value>>,
    left: usize,
}

impl Iterator for Iter<'_> {
    type Item = (Key, Value);

    fn next(&mut self) -> Option<(Key, Value)> {
        self.left = self.left.saturating_sub(1);
        let rest_first = match (self.small.peek(), self.rest.peek()) {
            (Some((small, _)), Some((rest, _))) => *rest < small,
            (None, _) => true,
            (_, None) => false,
        };
        if rest_first {
            return self.rest.next().map(|(key, value)| (*key, value.clone()));
        }
        self.small.next()
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

impl ExactSizeIterator for Iter<'_> {}

impl fmt::Debug for Iter<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.clone()).finish()
    }
}

impl<'a> IntoIterator for &'a Elements {
    type Item = (Key, Value);
    type IntoIter = Iter<'a>;

    fn into_iter(self) -> Iter<'a> {
        self.iter()
    }
}

impl Extend<(Key, Value)> for Elements {
    fn extend<I: IntoIterator<Item = (Key, Value)>>(&mut self, elements: I) {
        for (key, value) in elements {
            self.insert(key, value);
        }
    }
}

impl FromIterator<(Key, Value)> for Elements {
    fn from_iter<I: IntoIterator<Item = (Key, Value)>>(elements: I) -> Self {
        let mut all = Self::default();
        all.extend(elements);
        all
    }
}

impl fmt::Debug for Elements {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self).finish()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::range::IpRange;
    use crate::state::Comment;
    use crate::types::Family;

    fn keys() -> impl Strategy<Value = Key> {
        let v4 = (0..4_u32).prop_map(|n| Key::source(Ipv4Addr::from_bits(n).into()));
        let v6 = (0..4_u128).prop_map(|n| Key::source(Ipv6Addr::from_bits(n).into()));
        let net = |n: u32| IpRange::from(ipnet::IpNet::from(IpAddr::from(Ipv4Addr::from_bits(n))));
        let tag = |n: u32| Tag::new(0x0010_0001 + n).unwrap();
        prop_oneof![
            3 => v4,
            3 => v6,
            1 => (0..2_u32).prop_map(move |n| Key::source_net(net(n))),
            1 => (0..2_u32).prop_map(move |n| Key::any(Family::V4, tag(n))),
        ]
    }

    fn values() -> impl Strategy<Value = Value> {
        (1..4_u32, prop::bool::weighted(0.2)).prop_map(|(n, noted)| Value {
            data: Data::Tag(Tag::new(0x0010_0000 + n).unwrap()),
            comment: noted.then(|| Comment::of_name("somebody's")),
        })
    }

    proptest! {
        #[test]
        fn it_is_a_map_like_any_other(
            steps in prop::collection::vec((keys(), prop::option::of(values())), 0..40),
        ) {
            let (mut ours, mut plain) = (Elements::default(), BTreeMap::new());
            for (key, value) in steps {
                prop_assert_eq!(ours.contains_key(&key), plain.contains_key(&key));
                if let Some(value) = value {
                    let before = plain.insert(key, value.clone());
                    prop_assert_eq!(ours.insert(key, value), before);
                } else {
                    prop_assert_eq!(ours.remove(&key), plain.remove(&key));
                }
                prop_assert_eq!(ours.get(&key), plain.get(&key).cloned());
                prop_assert_eq!(ours.len(), plain.len());
                prop_assert_eq!(ours.iter().len(), plain.len());
                let same: Vec<_> = plain.clone().into_iter().collect();
                prop_assert_eq!(ours.iter().collect::<Vec<_>>(), same);
            }
            prop_assert_eq!(&ours.iter().collect::<Elements>(), &ours);
            let (mut parted, sets) = (Elements::default(), ours.keys().map(|key| key.set()));
            for set in sets.collect::<std::collections::BTreeSet<_>>() {
                parted.take_over(&ours, set);
                let of: BTreeMap<_, _> = ours.of(set).collect();
                let plain = plain.clone().into_iter().filter(|(key, _)| key.set() == set);
                prop_assert_eq!(of, plain.collect::<BTreeMap<_, _>>());
            }
            prop_assert_eq!(&parted, &ours);
            let numbers = [parted.v4_apart_from(&ours).len(), parted.v6_apart_from(&ours).len()];
            prop_assert_eq!(numbers, [0, 0]);
            let nothing = Elements::default();
            let (v4s, v6s) = (ours.v4_apart_from(&nothing), ours.v6_apart_from(&nothing));
            let all = v4s.map(v4).chain(v6s.map(v6)).chain(ours.rest().map(|(k, v)| (*k, v.clone())));
            prop_assert!(all.collect::<BTreeMap<_, _>>().into_iter().eq(ours.iter()));
            let noted = ours.rest().any(|(key, _)| matches!(key.set(), Set::Source(_)));
            prop_assert_eq!(ours.has_noted_sources(), noted);
            let copy = ours.clone();
            parted.insert(Key::source(Ipv4Addr::new(1, 2, 3, 4).into()), large(Tag::LOCAL));
            prop_assert_eq!(&copy, &ours);
            let noted = |value: &Value| value.comment.is_some();
            ours.retain(|_, value| noted(value));
            plain.retain(|_, value| noted(value));
            prop_assert_eq!(ours.values().collect::<Vec<_>>(), plain.into_values().collect::<Vec<_>>());
        }
    }
}
