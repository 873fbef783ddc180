//! What a program that embeds the crate must do, as cases with real packets.
//!
//! Each [`Case`] builds a [lab](super::lab) of its own, starts what is tested on every node, gives
//! it policies and sends packets; a packet that arrives with another source than it should is a
//! failure, and so is one that arrives and should not. What is tested is an [`Integration`], one
//! for each node: a [`Reconciler`] is one, a client of an operator or the call of a CNI plugin's
//! binary can be made one.
//!
//! ```no_run
//! use egress_datapath::testing::conformance::{CASES, run};
//! use egress_datapath::testing::lab;
//! use egress_datapath::{MarkLayout, Reconciler, TableRange};
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
//! Nothing here prints or ends the process. The lab runs threads, and what is done on a node is
//! done on a thread in its network namespace, for as long as the call takes. Some cases put
//! another program's rules beside ours and take the program `nft` for that; without it they are
//! skipped, and the report says so. Run under `cargo test`, whose processes have many threads from
//! the start, the cases take root, or `unshare -rn cargo test`.

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

/// An error in the words of what is tested.
pub type BoxError = Box<dyn Error + Send + Sync>;

/// What is tested, on one node: a program that embeds the crate, or the way to one.
///
/// Every call is made on a thread that is in the node's network namespace: sockets that it opens
/// and programs that it starts are there.
pub trait Integration: Send {
    /// Makes the node carry out these policies and no others; returns when it does.
    ///
    /// It is also called with what it was given before, after somebody else has damaged what is in
    /// the kernel, and must then put that right.
    ///
    /// # Errors
    ///
    /// Whatever went wrong: the case has failed.
    fn apply(&mut self, cluster: &Cluster, policies: &[EgressPolicy]) -> Result<(), BoxError>;

    /// Takes everything back that it made on the node; returns when it has.
    ///
    /// # Errors
    ///
    /// Whatever went wrong: the case has failed.
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

/// Runs cases one after another; `start` starts what is tested on a node.
///
/// It is called for each node at the beginning of each case, and again where a case has the
/// program restarted: what it has in memory is lost then, what is in the kernel is not.
pub fn run<'a, I: Integration + 'static>(
    cases: impl IntoIterator<Item = &'a Case>,
    mut start: impl FnMut(&Host) -> Result<I, BoxError> + Send,
) -> Report {
    let verdict = |case: &'a Case| Verdict { case: *case, outcome: case.run(&mut start) };
    Report { verdicts: cases.into_iter().map(verdict).collect() }
}
