//! Conformance cases of `testing::conformance`, run against the crate itself.
//!
//! A program that embeds the crate can run the same cases. Each case builds three nodes, their pods
//! and a server outside the cluster from network namespaces, starts the program under test on every
//! node, and sends packets. The example needs no root; its exit status is 1 if a case fails. With
//! an argument it runs only the cases whose name contains the argument.
//!
//! ```text
//! cargo run --example conformance
//! ```

use std::env;
use std::process::ExitCode;
use std::time::Instant;

use egress_datapath::alloc::TableRange;
use egress_datapath::testing::conformance::{BoxError, CASES, Case, Integration, Report, Verdict};
use egress_datapath::testing::lab::{self, Host};
use egress_datapath::{Cluster, EgressPolicy, KernelDatapath, MarkLayout, Reconciler};

/// The program under test on a node.
struct Agent(Reconciler<KernelDatapath>);

impl Agent {
    /// Starts the program; called in the network namespace of the node.
    fn start(_node: &Host) -> Result<Self, BoxError> {
        Ok(Self(Reconciler::open(MarkLayout::SEED, TableRange::default())?))
    }
}

impl Integration for Agent {
    fn apply(&mut self, cluster: &Cluster, policies: &[EgressPolicy]) -> Result<(), BoxError> {
        self.0.reconcile(cluster, policies)?;
        Ok(())
    }

    fn remove(&mut self) -> Result<(), BoxError> {
        self.0.remove()?;
        Ok(())
    }
}

fn main() -> ExitCode {
    // Must come first: from here on nothing changes the network of the machine.
    if let Err(error) = lab::isolate() {
        eprintln!("{error}");
        return ExitCode::FAILURE;
    }
    let word = env::args().nth(1).unwrap_or_default();
    let begun = Instant::now();
    let named = |case: &&Case| case.name.contains(&word);
    let verdicts = CASES.iter().filter(named).map(|case| {
        let verdict = Verdict { case: *case, outcome: case.run(Agent::start) };
        println!("{verdict}");
        verdict
    });
    let report = Report { verdicts: verdicts.collect() };
    let (failed, skipped) = (report.failed().count(), report.skipped().count());
    let passed = report.verdicts.len() - failed - skipped;
    println!(
        "\n{passed} passed, {failed} failed, {skipped} skipped in {:.1} s",
        begun.elapsed().as_secs_f32()
    );
    if failed == 0 && passed > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
