//! The nf_tables half against the real kernel, in network namespaces of their own, with `nft` as
//! the second opinion.

pub(crate) mod netns;
mod round_trip;
mod sample;
mod transaction;
