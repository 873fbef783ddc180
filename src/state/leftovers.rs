//! Routes and rules that have our protocol number and are not of our making.

use std::fmt;

use crate::types::Family;

/// What a [`StrayRouting`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum StrayKind {
    /// A route.
    Route,
    /// A routing rule.
    Rule,
}

/// A route or a rule with our protocol number that we never make.
///
/// It may have any shape there is, so it is kept as the kernel tells of it, to be deleted by that.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StrayRouting {
    /// What it is.
    pub kind: StrayKind,
    /// Its family.
    pub family: Family,
    /// Enough of it for an operator to find it.
    pub text: String,
    /// The kernel's message that tells of it, without header and without what changes by itself.
    pub message: Vec<u8>,
}

impl fmt::Display for StrayRouting {
    /// As `ip route` or `ip rule` takes it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}
