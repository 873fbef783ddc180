//! The kernel backend.
mod address;
mod fdb;
mod link;
mod link_change;
mod neighbour;
mod route;
mod route_answer;
mod route_socket;
mod rtnl;
#[cfg(test)]
mod rtnl_kernel_tests;
#[cfg(test)]
mod rtnl_wire_tests;
mod rule;
mod socket;

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
