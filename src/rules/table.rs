//! The contents of an nf_tables table: sets, maps and their elements.

use std::collections::{BTreeMap, BTreeSet};

use super::chain::{Base, ChainId};
use super::element::Key;
use super::elements::Elements;
use super::set::Set;
use super::stmt::NftRule;
use crate::range::IpRange;

/// An nf_tables table of ours: chains that never change in steady state, and the elements of the
/// maps they look into.
///
/// A packet walks down the maps: its source gives a class (a distinct ordered combination of
/// policies), class and destination give a policy, the policy gives a way out, the way out a
/// verdict. So moving a policy to another gateway is one element, however many pods it has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Firewall {
    /// Chains and their rules.
    pub chains: BTreeMap<ChainId, (Option<Base>, Vec<NftRule>)>,
    /// Sets and maps that exist.
    pub sets: BTreeSet<Set>,
    /// Elements of all sets and maps.
    pub elements: Elements,
    /// Sets and chains found in our table that we never make, by name.
    pub strays: BTreeSet<Stray>,
    /// Whether somebody has put the table to sleep: the kernel then asks no chain of it.
    pub dormant: bool,
}

impl Firewall {
    /// An element of the same set whose range shares addresses with that of the key.
    ///
    /// `None` for keys that are not ranges.
    pub fn overlapping(&self, key: &Key) -> Option<&Key> {
        let (range, make): (_, fn(IpRange) -> Key) = match key {
            Key::Excluded(range) => (range, Key::Excluded),
            Key::SourceNet(range) => (range, Key::SourceNet),
            _ => return None,
        };
        // Ranges of one set are disjoint, so only the last that begins in time can reach it.
        let end = make(IpRange::from_to_end(range.last()));
        let other = self.elements.last_range_up_to(&end)?;
        let (Key::Excluded(found) | Key::SourceNet(found)) = other else { return None };
        (other.set() == key.set() && found.last() >= range.first()).then_some(other)
    }
}

/// Something found in our table that we never make.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Stray {
    /// A chain with this name.
    Chain(String),
    /// A set or map with this name.
    Set(String),
}
