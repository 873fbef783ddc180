//! The `Datapath` trait: reads and writes the kernel state of one network namespace.

use std::collections::BTreeSet;
use std::net::IpAddr;

use crate::connection::Connection;
use crate::count::Counts;
use crate::diff::changes::{ApplyError, Changes};
use crate::error::KernelError;
use crate::state::{Elements, State};

/// The parts of a datapath that may differ from its last known state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drift {
    /// No part differs: this is certain.
    None,
    /// All parts may differ except the nf_tables table of family `inet`, which certainly does not.
    Rest,
    /// All parts may differ.
    Unknown,
}

/// Read and write access to the state of the kernel, or of a substitute such as a simulator.
#[cfg_attr(feature = "mock", mockall::automock)]
pub trait Datapath: Send {
    /// Reads everything that this crate installed, and nothing else.
    ///
    /// # Errors
    ///
    /// The request that the kernel refused, with its extended acknowledgement.
    fn observe(&mut self) -> Result<State, KernelError>;

    /// Reads the same as [`observe`](Self::observe), given elements that are probably installed.
    ///
    /// The result is what is installed, whatever is expected: a datapath that can query single keys
    /// for less than it costs to list a set may do so. The default calls
    /// [`observe`](Self::observe), which is also what callers use where few elements are expected.
    ///
    /// # Errors
    ///
    /// As for [`observe`](Self::observe).
    #[expect(unused_variables, reason = "the name is for those who have a use for it")]
    fn observe_expecting(&mut self, expected: &Elements) -> Result<State, KernelError> {
        self.observe()
    }

    /// Returns the parts that may differ from the last known state.
    ///
    /// The last known state is the last [observed](Self::observe) one plus all changes
    /// [applied](Self::apply) since. A part may be reported as unchanged only if that is proven. A
    /// datapath that cannot tell, for example after a refused operation, returns [`Drift::Unknown`]
    /// and is read again. That is the default.
    fn drift(&mut self) -> Drift {
        Drift::Unknown
    }

    /// Reads everything of this crate except the nf_tables table of family `inet`.
    ///
    /// It is called where [`drift`](Self::drift) returns [`Drift::Rest`].
    ///
    /// # Errors
    ///
    /// As for [`observe`](Self::observe).
    fn observe_rest(&mut self) -> Result<State, KernelError> {
        Ok(State { firewall: None, ..self.observe()? })
    }

    /// Returns stale connections, which are not translated as `wanted` says.
    ///
    /// Only our connections and those of selected sources can be stale. `before` is the state that
    /// was installed when they were opened. The method is called once the changes are made, and
    /// again before the guard rules of a table that is removed are deleted. A datapath that tracks
    /// no connections returns none.
    #[expect(unused_variables, reason = "the names are for those who have some")]
    fn stale_connections(
        &mut self,
        wanted: &State,
        before: &State,
    ) -> Result<BTreeSet<Connection>, KernelError> {
        Ok(BTreeSet::new())
    }

    /// Returns forwarded connections, of one source or of all; `None` if they cannot be listed.
    ///
    /// It is called after an [update](crate::Reconciler::update) if connections may no longer be
    /// translated as wanted. A datapath that returns `None`, which is the default, is asked for its
    /// [stale connections](Self::stale_connections) instead.
    #[expect(unused_variables, reason = "the name is for those who have some")]
    fn connections(
        &mut self,
        source: Option<IpAddr>,
    ) -> Result<Option<Vec<Connection>>, KernelError> {
        Ok(None)
    }

    /// Returns the values of all policy counters that are installed.
    ///
    /// [`Reconciler::counts`](crate::Reconciler::counts) calls it where
    /// [`Cluster::policy_counters`](crate::Cluster::policy_counters) is on. Counter values belong
    /// to no state, so that they are no difference. A datapath without counters returns none, which
    /// is the default.
    ///
    /// # Errors
    ///
    /// As for [`observe`](Self::observe).
    fn counts(&mut self) -> Result<Counts, KernelError> {
        Ok(Counts::new())
    }

    /// Applies the changes, step by step.
    ///
    /// A step in which an operation is refused is finished, and is the last one: the order of the
    /// steps makes every prefix of them safe, but not every subset.
    ///
    /// # Errors
    ///
    /// The refused operations, and how many were applied before and skipped after.
    fn apply(&mut self, changes: &Changes) -> Result<(), ApplyError>;
}

macro_rules! delegate {
    ($($pointer:ty),*) => {$(
        impl<D: Datapath + ?Sized> Datapath for $pointer {
            fn observe(&mut self) -> Result<State, KernelError> {
                (**self).observe()
            }

            fn observe_expecting(&mut self, expected: &Elements) -> Result<State, KernelError> {
                (**self).observe_expecting(expected)
            }

            fn drift(&mut self) -> Drift {
                (**self).drift()
            }

            fn observe_rest(&mut self) -> Result<State, KernelError> {
                (**self).observe_rest()
            }

            fn stale_connections(
                &mut self,
                wanted: &State,
                before: &State,
            ) -> Result<BTreeSet<Connection>, KernelError> {
                (**self).stale_connections(wanted, before)
            }

            fn connections(
                &mut self,
                source: Option<IpAddr>,
            ) -> Result<Option<Vec<Connection>>, KernelError> {
                (**self).connections(source)
            }

            fn counts(&mut self) -> Result<Counts, KernelError> {
                (**self).counts()
            }

            fn apply(&mut self, changes: &Changes) -> Result<(), ApplyError> {
                (**self).apply(changes)
            }
        }
    )*};
}

delegate!(&mut D, Box<D>);
