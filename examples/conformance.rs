//! The conformance kit's cases against the crate as it is: what a program that embeds it can run
//! against itself.
//!
//! Each case builds three nodes, their pods and a server outside out of network namespaces, starts
//! what is tested on every node, and sends packets. Needs no root; ends with status 1 if a case
//! fails. With a word behind it, only cases with that word in their name are run.
//!
//! ```text
//! cargo run --example conformance
//! ```

use std::env;
use std::process::ExitCode;
use std::time::Instant;

use egress_datapath::testing::conformance::{BoxError, CASES, Case, Integration, Report, Verdict};
use egress_datapath::testing::lab::{self, Host};
use egress_datapath::{Cluster, EgressPolicy, KernelDatapath, MarkLayout, Reconciler, TableRange};

/// What runs on a node.
struct Agent(Reconciler<KernelDatapath>);

impl Agent {
    /// Is called in the network namespace of the node.
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
    // First of all: from here on nothing touches the network of the machine.
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
