//! A process killed before and after every write to the kernel: what do packets do meanwhile, and
//! does the next process put everything right?
//!
//! ```text
//! cargo test --features testing --test kill
//! EGRESS_KILL=all cargo test --features testing --test kill
//! EGRESS_KILL=all EGRESS_BACKEND=iptables-legacy cargo test --features testing --test kill
//! ```
//!
//! With `all` every scenario runs also on nodes that masquerade what pods send, as most CNI
//! plugins have them do; otherwise the scenarios take turns, and of all moments to die at one of
//! `OF` is tried, another in each scenario. `EGRESS_BACKEND=iptables-legacy` and `iptables-nft`
//! kill those, before and after every write to a set and every run of a tool, and
//! `EGRESS_STEERING=egress-hook` those that steer by it; without `all` one moment of
//! `OF_IPTABLES` or `OF_HOOK` is tried then, and with a number in `EGRESS_KILL` one of so many. A
//! word after `--` is looked for in the scenarios' names.

#[path = "../lab/mod.rs"]
mod lab;

mod allowed;
mod child;
mod matrix;
mod scenarios;
mod wire;

use std::error::Error;
use std::io::{self, Write};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::Instant;
use std::{env, thread};

use allowed::Cni;
use egress_datapath::{Backend, MarkLayout, Steering};
use lab::inside::{backend, steering};
use lab::{Lab, Netns};
use matrix::{Counts, Matrix};
use scenarios::{Scenario, scenarios};

type Result<T = ()> = std::result::Result<T, Box<dyn Error>>;

/// Of all moments to die at, one of so many; under iptables; and with an egress hook. Who dies
/// after a write leaves what one leaves who dies before the next, so two lose nothing but ends.
const OF: usize = 2;
const OF_IPTABLES: usize = 17;
const OF_HOOK: usize = 5;

const NODES: [&str; 3] = ["node-a", "node-b", "node-c"];

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let result = match arguments.split_first() {
        Some((first, rest)) if first == "child" => child::main(rest),
        Some((first, _)) if first == "--list" => Ok(()),
        _ => parent(&arguments),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "{error}");
            ExitCode::FAILURE
        }
    }
}

fn parent(filters: &[String]) -> Result {
    let required = env::var_os("EGRESS_REQUIRE_NETNS").is_some_and(|value| value == "1");
    if let Err(error) = lab::isolate().and_then(|()| Lab::new()) {
        if required {
            return Err(format!("no network namespaces: {error}").into());
        }
        writeln!(io::stderr(), "SKIPPED, no network namespaces: {error}")?;
        return Ok(());
    }
    let have_nft = Command::new("nft").arg("-V").stdout(Stdio::null()).status().is_ok();
    if !have_nft {
        if required {
            return Err("no program nft".into());
        }
        writeln!(io::stderr(), "SKIPPED, no program nft: nodes that masquerade")?;
    }
    let start = Instant::now();
    let scenarios = scenarios()?;
    let queue = Mutex::new(plan(&scenarios, have_nft, filters).into_iter());
    let total = Mutex::new((Counts::default(), Vec::new()));
    let worker = || {
        loop {
            let next = queue.lock().unwrap_or_else(PoisonError::into_inner).next();
            let Some((number, scenario, cni)) = next else { return };
            let (counts, wrong) = one(scenario, number, cni);
            let mut total = total.lock().unwrap_or_else(PoisonError::into_inner);
            total.0.add(counts);
            total.1.extend(wrong);
        }
    };
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(worker);
        }
    });
    let (counts, wrong) = total.into_inner().unwrap_or_else(PoisonError::into_inner);
    writeln!(io::stdout(), "{:<52} {counts}, {:.0?}", "in all", start.elapsed())?;
    if wrong.is_empty() && counts.leaked + counts.lost == 0 {
        return Ok(());
    }
    Err(wrong.join("\n").into())
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

/// What runs, and where.
fn plan<'a>(
    scenarios: &'a [Scenario],
    have_nft: bool,
    filters: &[String],
) -> Vec<(usize, &'a Scenario, Cni)> {
    let all = is_whole();
    let mut plan = Vec::new();
    for (number, scenario) in scenarios.iter().enumerate() {
        // As libtest does: any of the words, options apart.
        let mut words = filters.iter().filter(|word| !word.starts_with('-')).peekable();
        if words.peek().is_some() && !words.any(|word| scenario.name.contains(word.as_str())) {
            continue;
        }
        for (turn, cni) in [Cni::Routes, Cni::Masquerades].into_iter().enumerate() {
            let possible = cni == Cni::Routes || have_nft;
            if possible && (all || !have_nft || number % 2 == turn) {
                plan.push((number, scenario, cni));
            }
        }
    }
    plan
}

/// Runs a scenario; what was counted, and what went wrong.
fn one(scenario: &Scenario, number: usize, cni: Cni) -> (Counts, Vec<String>) {
    let start = Instant::now();
    let run = || -> Result<_> {
        let mut matrix = Matrix::new(Lab::new()?, scenario, number, every(), cni)?;
        let ran = matrix.run();
        let mut wrong = std::mem::take(&mut matrix.wrong);
        wrong.extend(ran.err().map(|error| format!("{}: {error}", scenario.name)));
        Ok((matrix.counts, wrong))
    };
    let (counts, wrong) = run()
        .unwrap_or_else(|error| (Counts::default(), vec![format!("{}: {error}", scenario.name)]));
    let name = format!("{}, {cni:?}", scenario.name);
    let _ = writeln!(
        io::stdout(),
        "{name:<52} {counts}, {} wrong, {:.1?}",
        wrong.len(),
        start.elapsed()
    );
    (counts, wrong)
}

/// Feeds rules to a tool in a namespace.
fn feed(netns: &Netns, program: &str, arguments: &[&str], rules: &str) -> Result {
    let status = netns.run(|| {
        let mut tool = Command::new(program).args(arguments).stdin(Stdio::piped()).spawn()?;
        if let Some(mut stdin) = tool.stdin.take() {
            stdin.write_all(rules.as_bytes())?;
        }
        tool.wait()
    })??;
    if status.success() { Ok(()) } else { Err(format!("{program} refused its rules").into()) }
}
