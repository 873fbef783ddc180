//! Pending edits of the planned state.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::IpAddr;

use super::policies::Handle;
use crate::state::{Key, Value};
use crate::types::Family;

/// The effects of a change of some policies on the planned state.
#[derive(Debug, Default)]
pub(super) struct Delta {
    /// Elements after the change; `None` for deleted ones.
    pub(super) elements: BTreeMap<Key, Option<Value>>,
    /// Single-address sources whose packets may take another path.
    pub(super) sources: BTreeSet<IpAddr>,
    /// True if the rules may change, too.
    pub(super) skeleton: bool,
    /// True if everything must be planned again.
    ///
    /// This is so if a tag depends on other policies or classes, that is, after a hash collision,
    /// or if ranges of sources change.
    pub(super) disputed: bool,
    /// Pairs of policies that now share a source and a destination.
    pub(super) overlapping: HashSet<(Family, (Handle, Handle))>,
}

impl Delta {
    pub(super) fn put(&mut self, key: Key, value: Option<Value>) {
        self.elements.insert(key, value);
    }

    pub(super) fn source(&mut self, address: IpAddr, value: Option<Value>) {
        self.sources.insert(address);
        self.put(Key::source(address), value);
    }
}
