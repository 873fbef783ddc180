//! The boundary between what is wanted and who holds it.

use std::collections::BTreeSet;
use std::net::IpAddr;

use crate::connection::Connection;
use crate::count::Counts;
use crate::diff::changes::{ApplyError, Changes};
use crate::error::KernelError;
use crate::state::{Elements, State};

/// What may differ from what was last known of a datapath.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drift {
    /// Nothing: that is certain.
    None,
    /// Everything but the nf_tables table of family `inet`, which certainly is as it was.
    Rest,
    /// Everything.
    Unknown,
}

/// The kernel, or a stand-in for it: can be read, and can be changed.
#[cfg_attr(feature = "mock", mockall::automock)]
pub trait Datapath: Send {
    /// Reads back everything here that is ours, and nothing else.
    ///
    /// # Errors
    ///
    /// The request that the kernel refused, with its words.
    fn observe(&mut self) -> Result<State, KernelError>;

    /// The same, asked by someone who knows many elements that are probably there.
    ///
    /// What is said is what is there, whatever is expected: a datapath that can ask whether
    /// something is there for less than it takes to list all of it may do so. The default, and
    /// what is asked where few elements are expected, is to [`observe`](Self::observe).
    ///
    /// # Errors
    ///
    /// As for [`observe`](Self::observe).
    #[expect(unused_variables, reason = "the name is for those who have a use for it")]
    fn observe_expecting(&mut self, expected: &Elements) -> Result<State, KernelError> {
        self.observe()
    }

    /// What may differ from what it held when it was last [observed](Self::observe), with all that
    /// was [applied](Self::apply) since.
    ///
    /// It must be proven that something is as it was: a datapath that cannot tell, as one cannot
    /// after a refusal, says [`Drift::Unknown`] and is read again. That is the default.
    fn drift(&mut self) -> Drift {
        Drift::Unknown
    }

    /// Reads back everything of ours but the nf_tables table of family `inet`.
    ///
    /// Asked for where [`drift`](Self::drift) says [`Drift::Rest`].
    ///
    /// # Errors
    ///
    /// As for [`observe`](Self::observe).
    fn observe_rest(&mut self) -> Result<State, KernelError> {
        Ok(State { firewall: None, ..self.observe()? })
    }

    /// Connections of ours, or of selected sources, that are not translated as `wanted` says.
    ///
    /// `before` is what was there when they began. Asked once the changes are made, and once more
    /// before the guards of a table that goes are taken away. A datapath that tracks no
    /// connections has none.
    #[expect(unused_variables, reason = "the names are for those who have some")]
    fn stale_connections(
        &mut self,
        wanted: &State,
        before: &State,
    ) -> Result<BTreeSet<Connection>, KernelError> {
        Ok(BTreeSet::new())
    }

    /// Connections that are forwarded, of one source or of all; `None` if it cannot list them.
    ///
    /// Asked for after an [update](crate::Reconciler::update), if they may not be translated as
    /// wanted any more; a datapath that says `None`, as is the default, is asked for its
    /// [stale connections](Self::stale_connections).
    #[expect(unused_variables, reason = "the name is for those who have some")]
    fn connections(
        &mut self,
        source: Option<IpAddr>,
    ) -> Result<Option<Vec<Connection>>, KernelError> {
        Ok(None)
    }

    /// What the counters of policies stand at, of all that are there.
    ///
    /// Asked for by [`Reconciler::counts`](crate::Reconciler::counts) where
    /// [`Cluster::policy_counters`](crate::Cluster::policy_counters) is on. They are part of no
    /// state: what was counted is no difference. A datapath that counts nothing has none, which is
    /// the default.
    ///
    /// # Errors
    ///
    /// As for [`observe`](Self::observe).
    fn counts(&mut self) -> Result<Counts, KernelError> {
        Ok(Counts::new())
    }

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
