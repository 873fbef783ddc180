//! Links, addresses, neighbours, FDB entries, routes and rules over rtnetlink.

pub(crate) mod address;
pub(crate) mod ahead;
pub(crate) mod announce;
pub(crate) mod claim;
pub(crate) mod fdb;
pub(crate) mod ipv6;
#[cfg(test)]
pub(crate) mod kernel_tests;
pub(crate) mod leftovers;
pub(crate) mod link;
pub(crate) mod neighbour;
pub(crate) mod ops;
pub(crate) mod route;
pub(crate) mod rule;
pub(crate) mod socket;
pub(crate) mod tables;
#[cfg(test)]
pub(crate) mod wire_tests;
