//! The kernel of a network namespace, over netlink.
mod nft;
mod socket;
mod wire;

use std::net::IpAddr;

use crate::changes::Changes;
use crate::datapath::Datapath;
use crate::error::{ApplyError, KernelError};
use crate::state::State;
use crate::types::DeviceName;

/// The kernel of the network namespace that the opening thread was in.
///
/// A socket belongs to the namespace of the thread that opened it, for ever: enter the namespace,
/// open, and move the value wherever it is needed.
#[derive(Debug)]
pub struct KernelDatapath {}

impl KernelDatapath {
    /// Opens sockets in the network namespace of the calling thread.
    pub fn open() -> Result<Self, KernelError> {
        Ok(Self {})
    }

    /// The device that has an address, and its MTU in bytes; `None` if none has it.
    pub fn device_of(
        &mut self,
        _address: IpAddr,
    ) -> Result<Option<(DeviceName, u32)>, KernelError> {
        Ok(None)
    }
}

impl Datapath for KernelDatapath {
    fn observe(&mut self) -> Result<State, KernelError> {
        Ok(State::default())
    }

    fn apply(&mut self, _changes: &Changes) -> Result<(), ApplyError> {
        Ok(())
    }
}
