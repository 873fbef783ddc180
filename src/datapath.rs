//! The `Datapath` trait: reads and writes the kernel state of one network namespace.

use std::collections::BTreeSet;
use std::net::IpAddr;

use crate::diff::changes::{ApplyError, Changes};
use crate::error::KernelError;
use crate::state::{Elements, State};

pub use crate::connection::Connection;
pub use crate::count::Counts;
pub use crate::diff::changes::{Phase, Step};
pub use crate::diff::op::Op;
pub use crate::state::MarkBits;

/// The state that the caller of [`Datapath::observe`] knows or expects.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum Known<'a> {
    /// No state is known.
    Nothing,
    /// These elements are probably installed in the `inet` table; nothing else is known.
    ///
    /// The elements are a hint, for example those of the plan after a restart. A datapath that can
    /// query single keys for less than it costs to list a set may use it.
    Expected(&'a Elements),
    /// No state is known, and the elements of the `inet` table do not matter.
    ///
    /// The table will be deleted, or its sets flushed. A datapath may leave the elements out: to
    /// list a million takes a kernel minutes.
    WithoutElements,
    /// This state is the last observed one plus all changes applied since, none of them refused.
    Installed(&'a State),
}

impl<'a> Known<'a> {
    /// Elements of the `inet` table that are probably installed.
    pub fn elements(self) -> Option<&'a Elements> {
        match self {
            Known::Nothing | Known::WithoutElements => None,
            Known::Expected(elements) => Some(elements),
            Known::Installed(state) => state.elements(),
        }
    }
}

/// The result of [`Datapath::observe`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Observed {
    /// The state that was passed as [`Known::Installed`] is still installed: this is certain.
    Unchanged,
    /// This state is installed.
    ///
    /// Elements that were not read again, because they are certainly unchanged, are a clone of the
    /// known ones. The comparison with the wanted state then skips them.
    Installed(Box<State>),
}

impl From<State> for Observed {
    fn from(state: State) -> Self {
        Self::Installed(Box::new(state))
    }
}

impl Observed {
    /// The observed state, where the caller knew none that could be unchanged.
    pub(crate) fn into_state(self) -> Result<State, KernelError> {
        match self {
            Self::Installed(state) => Ok(*state),
            Self::Unchanged => Err(KernelError::answer(
                "observe the datapath",
                "it reports no change, but it was given no state to compare with",
            )),
        }
    }
}

/// Reads everything that this crate installed, and nothing else.
///
/// ```
/// use egress_datapath::Sim;
/// use egress_datapath::datapath::observe;
///
/// assert!(observe(&mut Sim::new())?.is_empty());
/// # Ok::<(), egress_datapath::KernelError>(())
/// ```
///
/// # Errors
///
/// The request that the kernel refused, with its extended acknowledgement.
pub fn observe(datapath: &mut (impl Datapath + ?Sized)) -> Result<State, KernelError> {
    datapath.observe(Known::Nothing)?.into_state()
}

/// The connections that the caller of [`Datapath::connections`] needs.
///
/// More connections do no harm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Among<'a> {
    /// All connections.
    All,
    /// Connections from these original sources.
    Sources(&'a BTreeSet<IpAddr>),
    /// Connections from or to these addresses, as the original source or the source of replies.
    Pods(&'a BTreeSet<IpAddr>),
    /// Connections from these original sources, and those with one of these connection marks.
    SourcesOrMarks(&'a BTreeSet<IpAddr>, &'a BTreeSet<MarkBits>),
}

impl Among<'_> {
    /// Returns whether the caller needs a connection.
    pub fn has(self, connection: &Connection) -> bool {
        match self {
            Self::All => true,
            Self::Sources(sources) => sources.contains(&connection.source),
            Self::Pods(pods) => {
                pods.contains(&connection.source) || pods.contains(&connection.peer)
            }
            Self::SourcesOrMarks(sources, marks) => {
                sources.contains(&connection.source)
                    || marks.iter().any(|bits| bits.are_in(connection.mark))
            }
        }
    }
}

/// A callback for each connection that [`Datapath::connections`] finds.
pub type OnConnection<'a> = dyn FnMut(Connection) + 'a;

/// Read and write access to the state of the kernel, or of a substitute such as a simulator.
///
/// A datapath of another program implements all four methods. The simplest
/// [`observe`](Self::observe) ignores what is known and returns the whole state. A wrapper adds
/// metrics, for example:
///
/// ```
/// use egress_datapath::{ApplyError, Changes, Datapath, KernelError};
/// use egress_datapath::datapath::{Among, Counts, Known, Observed, OnConnection};
///
/// /// Counts the operations that are applied.
/// struct Metered<D> {
///     inner: D,
///     operations: usize,
/// }
///
/// impl<D: Datapath> Datapath for Metered<D> {
///     fn observe(&mut self, known: Known<'_>) -> Result<Observed, KernelError> {
///         self.inner.observe(known)
///     }
///
///     fn apply(&mut self, changes: &Changes) -> Result<(), ApplyError> {
///         self.operations += changes.len();
///         self.inner.apply(changes)
///     }
///
///     fn connections(
///         &mut self,
///         among: Among<'_>,
///         each: &mut OnConnection<'_>,
///     ) -> Result<(), KernelError> {
///         self.inner.connections(among, each)
///     }
///
///     fn counters(&mut self) -> Result<Counts, KernelError> {
///         self.inner.counters()
///     }
/// }
/// ```
#[cfg_attr(feature = "mock", mockall::automock)]
#[allow(clippy::elidable_lifetime_names, reason = "the mock needs the names")]
#[cfg_attr(feature = "mock", allow(clippy::ref_option_ref, reason = "in the mock"))]
pub trait Datapath: Send {
    /// Reads everything that this crate installed, and nothing else.
    ///
    /// The result is the installed state, whatever is known. A datapath that can prove that the
    /// [installed](Known::Installed) state is unchanged need not read it:
    /// [`Observed::Unchanged`]. A datapath that cannot tell, for example after a refused operation,
    /// reads the whole state.
    ///
    /// # Errors
    ///
    /// The request that the kernel refused, with its extended acknowledgement.
    fn observe<'a>(&mut self, known: Known<'a>) -> Result<Observed, KernelError>;

    /// Applies the changes, step by step.
    ///
    /// A step in which an operation is refused is finished. The order of the steps makes every
    /// prefix of them safe, so that a datapath may stop there. The datapaths of this crate go on
    /// with the steps that do not depend on the refused operation: without a part of the tunnel, a
    /// route or a rule, all policies are still in force, and the packets that need it are dropped.
    ///
    /// # Errors
    ///
    /// The refused operations, and how many were applied and how many skipped.
    fn apply(&mut self, changes: &Changes) -> Result<(), ApplyError>;

    /// Calls `each` with every tracked connection that this node forwards.
    ///
    /// `among` limits the call; more connections do no harm, and `each` may be called twice for the
    /// same one. The caller decides which connections are stale, and ends them with
    /// [`Op::EndConnection`]. A datapath that tracks no connections returns at once.
    ///
    /// # Errors
    ///
    /// As for [`observe`](Self::observe).
    fn connections<'a>(
        &mut self,
        among: Among<'a>,
        each: &'a mut OnConnection<'a>,
    ) -> Result<(), KernelError>;

    /// Reads the values of all policy counters that are installed.
    ///
    /// [`Reconciler::counters`](crate::Reconciler::counters) calls it where
    /// [`Cluster::policy_counters`](crate::Cluster::policy_counters) is on. Counter values belong
    /// to no state, so that they are no difference. A datapath without counters returns none.
    ///
    /// # Errors
    ///
    /// As for [`observe`](Self::observe).
    fn counters(&mut self) -> Result<Counts, KernelError>;

    /// Announces the installed egress IPs that this crate added to interfaces of the host.
    ///
    /// [`Op::ClaimAddress`] announces an address once. [`Reconciler::announce`] calls this method. A
    /// datapath without neighbours does nothing.
    ///
    /// [`Reconciler::announce`]: crate::Reconciler::announce
    ///
    /// # Errors
    ///
    /// As for [`observe`](Self::observe).
    fn announce(&mut self) -> Result<(), KernelError> {
        Ok(())
    }
}

macro_rules! delegate {
    ($($pointer:ty),*) => {$(
        impl<D: Datapath + ?Sized> Datapath for $pointer {
            fn observe(&mut self, known: Known<'_>) -> Result<Observed, KernelError> {
                (**self).observe(known)
            }

            fn apply(&mut self, changes: &Changes) -> Result<(), ApplyError> {
                (**self).apply(changes)
            }

            fn connections(
                &mut self,
                among: Among<'_>,
                each: &mut OnConnection<'_>,
            ) -> Result<(), KernelError> {
                (**self).connections(among, each)
            }

            fn counters(&mut self) -> Result<Counts, KernelError> {
                (**self).counters()
            }

            fn announce(&mut self) -> Result<(), KernelError> {
                (**self).announce()
            }
        }
    )*};
}

delegate!(&mut D, Box<D>);

/// Parts of a datapath that may differ from the last known state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Drift {
    /// No part.
    None,
    /// All parts except the nf_tables table of family `inet`.
    Rest,
    /// All parts.
    Unknown,
}
