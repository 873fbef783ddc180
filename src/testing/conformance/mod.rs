//! Conformance cases for programs that embed the crate, tested with real packets.
//!
//! Each [`Case`] builds its own [lab](super::lab), starts the program under test on every node,
//! applies policies and sends packets. A packet that arrives with a wrong source address is a
//! failure, and so is a packet that arrives and should not. The program under test is an
//! [`Integration`], one for each node. [`Reconciler`] implements the trait; implement it for a
//! client of an operator, or for calls of a CNI plugin's binary.
//!
//! ```no_run
//! use egress_datapath::testing::conformance::{CASES, run};
//! use egress_datapath::testing::lab;
//! use egress_datapath::{MarkLayout, Reconciler};
//! use egress_datapath::alloc::TableRange;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! lab::isolate()?; // without root, and while there is one thread
//! let report = run(CASES, |_| Ok(Reconciler::open(MarkLayout::SEED, TableRange::default())?));
//! print!("{report}");
//! assert!(report.is_passed());
//! # Ok(())
//! # }
//! ```
//!
//! The module neither prints nor ends the process. The lab runs threads. Each call for a node runs
//! on a thread in the node's network namespace, for as long as the call takes. Some cases install
//! rules of another program with `nft`; without that program they are skipped, and the report says
//! so. Under `cargo test`, whose processes have many threads from the start, the cases need root or
//! `unshare -rn cargo test`.

mod basics;
mod case;
mod closed;
mod expect;
mod failure;
mod flows;
mod frame;
mod neighbours;
mod report;
mod trial;

use std::error::Error;

use crate::{Cluster, Datapath, EgressPolicy, MarkAllocator, Reconciler, TableAllocator};

use super::lab::Host;

pub use case::{CASES, Case};
pub use failure::{Astray, Failure};
pub use report::{Missing, Outcome, Report, Verdict};

/// An error of the program under test.
pub type BoxError = Box<dyn Error + Send + Sync>;

/// The program under test on one node: a program that embeds the crate, or a client of it.
///
/// Every call is made on a thread in the node's network namespace: sockets that it opens and
/// programs that it starts are in that namespace.
pub trait Integration: Send {
    /// Applies these policies and no others on the node; returns when they are in effect.
    ///
    /// The method is also called again with the same policies after another program has damaged the
    /// kernel state, and must then restore that state.
    ///
    /// # Errors
    ///
    /// Any error; the case has failed.
    fn apply(&mut self, cluster: &Cluster, policies: &[EgressPolicy]) -> Result<(), BoxError>;

    /// Removes everything that the program installed on the node; returns when that is done.
    ///
    /// # Errors
    ///
    /// Any error; the case has failed.
    fn remove(&mut self) -> Result<(), BoxError>;
}

impl<I: Integration + ?Sized> Integration for Box<I> {
    fn apply(&mut self, cluster: &Cluster, policies: &[EgressPolicy]) -> Result<(), BoxError> {
        (**self).apply(cluster, policies)
    }

    fn remove(&mut self) -> Result<(), BoxError> {
        (**self).remove()
    }
}

impl<D, M, T> Integration for Reconciler<D, M, T>
where
    D: Datapath + Send,
    M: MarkAllocator + Send,
    T: TableAllocator + Send,
{
    fn apply(&mut self, cluster: &Cluster, policies: &[EgressPolicy]) -> Result<(), BoxError> {
        self.reconcile(cluster, policies)?;
        Ok(())
    }

    fn remove(&mut self) -> Result<(), BoxError> {
        self.drain()?;
        Reconciler::remove(self)?;
        Ok(())
    }
}

/// Runs cases one after another; `start` starts the program under test on a node.
///
/// `start` is called for each node at the beginning of each case, and again where a case restarts
/// the program. The program's memory is then lost, and the kernel state is kept.
pub fn run<'a, I: Integration + 'static>(
    cases: impl IntoIterator<Item = &'a Case>,
    mut start: impl FnMut(&Host) -> Result<I, BoxError> + Send,
) -> Report {
    let verdict = |case: &'a Case| Verdict { case: *case, outcome: case.run(&mut start) };
    Report { verdicts: cases.into_iter().map(verdict).collect() }
}
