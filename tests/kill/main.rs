//! A process killed before and after every write to the kernel: what do packets do meanwhile, and
//! does the next process put everything right?
//!
//! ```text
//! cargo test --test kill
//! EGRESS_KILL=all cargo test --test kill
//! EGRESS_KILL=all EGRESS_BACKEND=iptables-legacy cargo test --test kill
//! ```
//!
//! With `all` every scenario runs also on nodes that masquerade what pods send, as most CNI
//! plugins have them do; otherwise the scenarios take turns, and of all moments to die at one of
//! `OF` is tried, another in each scenario. `EGRESS_BACKEND=iptables-legacy` and `iptables-nft`
//! kill those, before and after every write to a set and every run of a tool, and
//! `EGRESS_STEERING=egress-hook` those that steer by it; without `all` one moment of
//! `OF_IPTABLES` or `OF_HOOK` is tried then, and with a number in `EGRESS_KILL` one of so many. A
//! word after `--` is looked for in the scenarios' names.

mod allowed;
mod child;
mod matrix;
mod scenarios;
mod wire;

use std::env;
use std::error::Error;
use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use common::backend::{backend, steering};
use egress_datapath::testing::lab::{self, Lab};
use egress_datapath::{Backend, Family, MarkLayout, Steering};
use harness::Trial;

use allowed::Cni;
use matrix::{Counts, Matrix};
use scenarios::{Scenario, scenarios};

type Result<T = ()> = std::result::Result<T, Box<dyn Error>>;

/// Of all moments to die at, one of so many; under iptables; and with an egress hook. Who dies
/// after a write leaves what one leaves who dies before the next, so two lose nothing but ends.
const OF: usize = 2;
const OF_IPTABLES: usize = 17;
const OF_HOOK: usize = 5;

const NODES: [&str; 3] = ["node-a", "node-b", "node-c"];

/// What was counted in all scenarios.
static TOTAL: Mutex<Counts> = Mutex::new(Counts::NONE);

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    if let Some((first, rest)) = arguments.split_first()
        && first == "child"
    {
        return match child::main(rest) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                let _ = writeln!(io::stderr(), "{error}");
                ExitCode::FAILURE
            }
        };
    }
    let start = Instant::now();
    let ended = harness::main_with(|| drop(lab::isolate()), trials);
    let total = *TOTAL.lock().unwrap_or_else(PoisonError::into_inner);
    let _ = writeln!(io::stdout(), "{:<52} {total}, {:.0?}\n", "in all", start.elapsed());
    ended
}

/// A test for each scenario, on nodes that masquerade or on others: in turn, or each on both.
fn trials() -> Vec<Trial> {
    let scenarios = match scenarios() {
        Ok(scenarios) => scenarios,
        Err(error) => {
            let error = error.to_string();
            return vec![harness::trial("scenarios", || Err::<(), _>(error))];
        }
    };
    let mut trials = Vec::new();
    for (number, scenario) in scenarios.into_iter().enumerate() {
        let scenario = Arc::new(scenario);
        for (turn, cni) in [Cni::Routes, Cni::Masquerades].into_iter().enumerate() {
            if is_whole() || number % 2 == turn {
                let name = format!("{}, {cni:?}", scenario.name);
                let scenario = Arc::clone(&scenario);
                trials.push(harness::trial(&name, move || one(&scenario, number, cni)));
            }
        }
    }
    trials
}

/// Whether everything is tried.
fn is_whole() -> bool {
    env::var_os("EGRESS_KILL").is_some_and(|value| value == "all")
}

/// Of all moments to die at, one of so many.
fn every() -> usize {
    let wish = env::var("EGRESS_KILL").ok().and_then(|wish| wish.parse().ok());
    if let Some(wish) = wish.filter(|wish| *wish > 0) {
        return wish;
    }
    match (backend(), steering(&MarkLayout::SEED)) {
        _ if is_whole() => 1,
        (Backend::Nftables, Steering::Tables) => OF,
        (Backend::Nftables, _) => OF_HOOK,
        _ => OF_IPTABLES,
    }
}

/// Runs a scenario; no packet leaves with a wrong source or is lost, and nothing else is wrong.
fn one(scenario: &Scenario, number: usize, cni: Cni) -> Result {
    if let Backend::Iptables(iptables) = backend() {
        // The processes that are killed do not say what they lack.
        harness::needs(&[iptables.variant.command(Family::V4), "ipset"]);
    }
    let start = Instant::now();
    let lab = harness::given("network namespaces", Lab::new());
    let mut matrix = Matrix::new(lab, scenario, number, every(), cni)?;
    let ran = matrix.run();
    let mut wrong = std::mem::take(&mut matrix.wrong);
    wrong.extend(ran.err().map(|error| error.to_string()));
    let counts = matrix.counts;
    TOTAL.lock().unwrap_or_else(PoisonError::into_inner).add(counts);
    let name = format!("{}, {cni:?}", scenario.name);
    writeln!(io::stdout(), "{name:<52} {counts}, {} wrong, {:.1?}", wrong.len(), start.elapsed())?;
    if wrong.is_empty() && counts.leaked + counts.lost == 0 {
        return Ok(());
    }
    Err(wrong.join("\n").into())
}
