//! The contents of an nf_tables table: sets, maps and their elements.

use std::collections::{BTreeMap, BTreeSet};

use super::chain::{Base, ChainId};
use super::elements::Elements;
use super::set::{Key, KeyValue, Set};
use super::stmt::{Field, NftRule, Stmt};
use crate::range::IpRange;

/// One of our nf_tables tables: its chains, and the elements of its sets and maps.
///
/// The chains never change in steady state. Evaluation goes through the maps: the source of a
/// packet gives a class (a distinct ordered combination of policies), class and destination give a
/// policy, the policy gives an action, and the action gives a verdict. Moving a policy to another
/// gateway therefore changes one element, however many pods the policy selects.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Firewall {
    /// Chains and their rules.
    pub chains: BTreeMap<ChainId, (Option<Base>, Vec<NftRule>)>,
    /// Sets and maps that the table has.
    pub sets: BTreeSet<Set>,
    /// Presence of the flowtable [`FLOWTABLE`](super::stmt::FLOWTABLE).
    pub flowtable: bool,
    /// Elements of all sets and maps that are listed.
    pub elements: Elements,
    /// Sets and maps whose elements are not listed, because the table is about to be emptied.
    pub unlisted: BTreeSet<Set>,
    /// Objects found in our table that this crate never makes, by name.
    pub strays: BTreeSet<Stray>,
    /// Whether another program set the table's `dormant` flag: the kernel then skips its chains.
    pub dormant: bool,
}

impl Firewall {
    /// Leaves out the flowtable, and the rules that put connections into it.
    pub fn leave_out_flowtable(&mut self) {
        self.flowtable = false;
        for (_, rules) in self.chains.values_mut() {
            rules.retain(|rule| !rule.0.contains(&Stmt::NoOffload));
        }
    }

    /// Returns true if the table has the flowtable and tests each field that a kernel may lack.
    pub(crate) fn has_all_optional(&self) -> bool {
        let statements = || {
            let rules = self.chains.values().flat_map(|(_, rules)| rules);
            rules.flat_map(|rule| &rule.0)
        };
        let tests = |field| statements().any(|statement| statement.compares(field));
        self.flowtable && Field::OPTIONAL.into_iter().all(tests)
    }

    /// An element of the same set whose range overlaps the range of the key.
    ///
    /// `None` for keys that are not ranges.
    pub fn overlapping(&self, key: &Key) -> Option<&Key> {
        let KeyValue::Range(range) = key.value() else { return None };
        // Ranges of one set are disjoint, so only the last one that begins early enough can
        // overlap.
        let end = KeyValue::Range(IpRange::from_to_end(range.last()));
        let other = self.elements.last_range_up_to(&Key::new(key.set(), end)?)?;
        let KeyValue::Range(found) = other.value() else { return None };
        (other.set() == key.set() && found.last() >= range.first()).then_some(other)
    }
}

/// An object found in our table that this crate never makes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Stray {
    /// A chain with this name.
    Chain(String),
    /// A set or map with this name.
    Set(String),
    /// A flowtable with this name.
    Flowtable(String),
}
