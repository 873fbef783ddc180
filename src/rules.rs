//! The rule model: chains, statements, sets and their elements.

pub(crate) mod chain;
pub(crate) mod element;
pub(crate) mod elements;
pub(crate) mod ipset;
pub(crate) mod iptables;
pub(crate) mod set;
pub(crate) mod stmt;
pub(crate) mod table;
