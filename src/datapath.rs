//! The boundary between what is wanted and who holds it.

use crate::changes::Changes;
use crate::error::{ApplyError, KernelError};
use crate::state::State;

/// The kernel, or a stand-in for it: can be read, and can be changed.
#[cfg_attr(feature = "mock", mockall::automock)]
pub trait Datapath: Send {
    /// Reads back everything here that is ours, and nothing else.
    ///
    /// # Errors
    ///
    /// The request that the kernel refused, with its words.
    fn observe(&mut self) -> Result<State, KernelError>;

    /// Makes the changes, step by step.
    ///
    /// A step in which an operation is refused is finished, and is the last: the steps are in
    /// an order in which every beginning is safe, not every selection.
    ///
    /// # Errors
    ///
    /// What was refused, and how much was done before and left undone.
    fn apply(&mut self, changes: &Changes) -> Result<(), ApplyError>;
}

impl<D: Datapath + ?Sized> Datapath for &mut D {
    fn observe(&mut self) -> Result<State, KernelError> {
        (**self).observe()
    }

    fn apply(&mut self, changes: &Changes) -> Result<(), ApplyError> {
        (**self).apply(changes)
    }
}

impl<D: Datapath + ?Sized> Datapath for Box<D> {
    fn observe(&mut self) -> Result<State, KernelError> {
        (**self).observe()
    }

    fn apply(&mut self, changes: &Changes) -> Result<(), ApplyError> {
        (**self).apply(changes)
    }
}
