//! What a change of some policies comes to.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::policies::Handle;
use crate::state::{Key, Value};
use crate::types::Family;

/// What a change of some policies comes to.
#[derive(Debug, Default)]
pub(super) struct Delta {
    /// Elements as they are after it; nothing for those that are gone.
    pub(super) elements: BTreeMap<Key, Option<Value>>,
    /// Single sources whose way may have changed.
    pub(super) sources: BTreeSet<IpAddr>,
    /// The rules may change, too.
    pub(super) skeleton: bool,
    /// A number depends on others: all of them must be given out anew.
    pub(super) disputed: bool,
    /// Policies that now meet at some source.
    pub(super) overlapping: BTreeSet<(Family, (Handle, Handle))>,
}

impl Delta {
    pub(super) fn put(&mut self, key: Key, value: Option<Value>) {
        self.elements.insert(key, value);
    }

    pub(super) fn source(&mut self, address: IpAddr, value: Option<Value>) {
        self.sources.insert(address);
        self.put(Key::Source(address), value);
    }
}
