//! The simulator is the kernel's twin: the same changes, the same refusals, the same states, and
//! the same fate for every packet.
//!
//! Everything random comes from a seed that is printed: `EGRESS_TWIN_SEED=7 cargo test --test
//! twin` runs the same again, `EGRESS_TWIN=full` runs ten times as much and `quick` a tenth. A
//! difference is shrunk to the steps that it needs, as far as they are found in a minute or two.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test says what it expects"
)]

#[macro_use]
extern crate harness;

mod changes;
mod checks;
mod connections;
mod contract;
mod drift;
mod fleet;
mod foreign;
mod mutants;
mod nodes;
mod packets;
mod random;
mod shrink;
mod wire;
mod world;

use std::env;
use std::error::Error;
use std::io::{self, Write};
use std::process::ExitCode;

use egress_datapath::datapath::observe;
use egress_datapath::testing::lab::{self, Device, Netns};
use egress_datapath::{ApplyError, Datapath, KernelDatapath, Sim, State};

/// In a network namespace of its own where there can be one.
fn main() -> ExitCode {
    harness::main(|| drop(lab::isolate()))
}

type Result<T = ()> = std::result::Result<T, Box<dyn Error>>;

/// Says something on the terminal, whatever libtest captures.
fn say(line: &str) {
    let _unheard = writeln!(io::stderr(), "{line}");
}

/// The seed of what is random here.
fn seed() -> Result<u64> {
    match env::var("EGRESS_TWIN_SEED") {
        Ok(seed) => Ok(seed.parse()?),
        Err(_) => Ok(1),
    }
}

/// So many times, ten times that, or a tenth.
fn times(usual: usize) -> usize {
    match env::var("EGRESS_TWIN").as_deref() {
        Ok("full") => usual * 10,
        Ok("quick") => usual / 10,
        _ => usual,
    }
}

/// A simulated kernel and a real one that should never differ.
struct Twins {
    sim: Sim,
    /// What is wrong with the simulator, given what it held before a change: nothing.
    spoil: fn(&State, &mut Sim),
    kernel: KernelDatapath,
    /// The kernel's network, and one that its devices lead to.
    _netns: [Netns; 2],
}

/// What became of changes: made, refused with an error number, and not tried.
#[derive(Debug, PartialEq, Eq)]
struct Outcome {
    applied: usize,
    refused: Vec<(String, Option<i32>)>,
    skipped: usize,
}

impl Twins {
    /// In a namespace with devices that can carry a tunnel.
    fn new() -> io::Result<Self> {
        let netns = Netns::new()?;
        let other = Netns::new()?;
        for (index, name) in [(10, "eth0"), (11, "eth1")] {
            use std::os::fd::AsFd;
            let here = Device { name, index };
            netns.link(|link| link.veth(here, None, here, other.as_fd()))?;
            other.link(|link| link.up(index))?;
        }
        let kernel = netns.run(KernelDatapath::open)?.map_err(io::Error::other)?;
        Ok(Self { sim: world::sim(), spoil: |_, _| {}, kernel, _netns: [netns, other] })
    }

    /// Makes the same changes on both; what became of them, if both say the same.
    fn apply(&mut self, changes: &egress_datapath::Changes) -> Result<Option<Outcome>> {
        let before = self.sim.state().clone();
        let [sim, kernel] = [outcome(self.sim.apply(changes)), outcome(self.kernel.apply(changes))];
        (self.spoil)(&before, &mut self.sim);
        if sim != kernel {
            return Err(format!("{changes}\nsim: {sim:#?}\nkernel: {kernel:#?}").into());
        }
        Ok(kernel)
    }

    /// What both hold, if it is the same.
    fn observe(&mut self) -> Result<State> {
        let (sim, kernel) = (observe(&mut self.sim)?, observe(&mut self.kernel)?);
        difference(&sim, &kernel)?;
        Ok(kernel)
    }
}

/// What only one of the two has.
fn difference(sim: &State, kernel: &State) -> Result {
    if sim == kernel {
        return Ok(());
    }
    let [sim, kernel] = [sim, kernel].map(|state| format!("{state:#?}"));
    let only = |one: &str, other: &str| -> String {
        let known: std::collections::HashSet<_> = other.lines().collect();
        one.lines().filter(|line| !known.contains(line)).collect::<Vec<_>>().join("\n")
    };
    let (one, other) = (only(&sim, &kernel), only(&kernel, &sim));
    Err(format!("only the simulator has:\n{one}\nonly the kernel has:\n{other}").into())
}

fn outcome(result: std::result::Result<(), ApplyError>) -> Option<Outcome> {
    let ApplyError { applied, refused, skipped, .. } = result.err()?;
    let refused = refused.into_iter().map(|(op, error)| (op.to_string(), error.errno())).collect();
    Some(Outcome { applied, refused, skipped })
}
