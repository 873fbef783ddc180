//! The nf_tables half against the real kernel, in network namespaces of their own, with `nft` as
//! the second opinion.

mod mutated;
pub(crate) mod netns;
mod others;
mod round_trip;
mod sample;
mod transaction;

use super::{batch, terms};
use crate::state::ChainId;

/// The transaction that makes the table with everything in it.
pub(crate) fn sample_datagram() -> Vec<u8> {
    let mut sequence = 0;
    let mut next = || {
        sequence += 1;
        sequence
    };
    batch::build(&sample::ops(), &terms::Terms::default(), &mut next).unwrap().datagram(0).to_vec()
}

/// The chains of that table.
pub(super) fn sample_chains() -> Vec<ChainId> {
    sample::chains().into_iter().map(|(id, _, _)| id).collect()
}
