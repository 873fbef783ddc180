//! Differences of the elements of sets.

use std::net::{Ipv4Addr, Ipv6Addr};

use super::{Change, changes};
use crate::state::{Data, Elements, Key, Tag, Value};

/// Reports the change of every element, single-address sources first, and each kind in order.
///
/// There may be a million sources: they are compared in the numeric form in which they are stored,
/// and only those that change become elements.
pub(super) fn elements(
    observed: &Elements,
    desired: &Elements,
    mut each: impl FnMut(Change<Key, Value>),
) {
    if observed.has_noted_sources() || desired.has_noted_sources() {
        // The same source may be stored as a number on one side and with its comment on the other.
        return changes(observed, desired, each);
    }
    changes(observed.v4_apart_from(desired), desired.v4_apart_from(observed), |change| {
        each(change.map(|v4| Key::source(Ipv4Addr::from_bits(*v4).into()), |tag| class(*tag)));
    });
    changes(observed.v6_apart_from(desired), desired.v6_apart_from(observed), |change| {
        each(change.map(|v6| Key::source(Ipv6Addr::from_bits(*v6).into()), |tag| class(*tag)));
    });
    changes(observed.rest(), desired.rest(), |change| each(change.map(|key| *key, Value::clone)));
}

const fn class(tag: Tag) -> Value {
    Value::plain(Data::Tag(tag))
}

impl<K, V> Change<K, V> {
    fn map<L, W>(self, key: impl Fn(K) -> L, value: impl Fn(V) -> W) -> Change<L, W> {
        match self {
            Self::Same => Change::Same,
            Self::Added(k, is) => Change::Added(key(k), value(is)),
            Self::Removed(k, was) => Change::Removed(key(k), value(was)),
            Self::Replaced(k, was, is) => Change::Replaced(key(k), value(was), value(is)),
        }
    }
}
