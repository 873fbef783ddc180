//! The kernel backend.
mod nft;
mod socket;
mod wire;

use crate::changes::Changes;
use crate::datapath::Datapath;
use crate::error::{ApplyError, KernelError};
use crate::state::State;

/// The kernel of the network namespace that the opening thread was in.
#[derive(Debug)]
pub struct KernelDatapath {}

impl Datapath for KernelDatapath {
    fn observe(&mut self) -> Result<State, KernelError> {
        Ok(State::default())
    }

    fn apply(&mut self, _changes: &Changes) -> Result<(), ApplyError> {
        Ok(())
    }
}
