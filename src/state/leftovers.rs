//! Routes and rules with our protocol number that this crate did not make.

use std::fmt;

use crate::types::Family;

/// Kind of a [`StrayRouting`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum StrayKind {
    /// A route.
    Route,
    /// A routing rule.
    Rule,
}

/// A route or rule with this crate's protocol number that this crate never makes.
///
/// Such an object may have any shape, so the kernel's message is kept and used to delete it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StrayRouting {
    /// Route or rule.
    pub kind: StrayKind,
    /// The address family.
    pub family: Family,
    /// Description that lets an operator find the object.
    pub text: String,
    /// The kernel's message about the object, without header and without volatile attributes.
    pub message: Vec<u8>,
}

impl fmt::Display for StrayRouting {
    /// The object in the syntax of `ip route` or `ip rule`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}
