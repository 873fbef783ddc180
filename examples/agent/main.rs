//! A node agent that applies a configuration file to its network namespace.

mod backend;
mod command;
mod config;
mod explain;
mod findings;

use std::fmt::Display;
use std::fs;
use std::io::{self, Write};
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use backend::{Egress, datapath, reconciler};
use clap::Parser;
use command::{Apply, Cli, Command, Doctor, Of, Plan, Remove, Show};
use config::Config;
use egress_datapath::alloc::{AllocError, MarkPool, TablePool, TableRange};
use egress_datapath::datapath::{Connection, Op};
use egress_datapath::iptables::IptablesDatapath;
use egress_datapath::preflight::{Preflight, Severity};
use egress_datapath::{
    Backend, Changes, Error, KernelDatapath, MarkLayout, PlanError, State, plan,
};
use findings::Told;
use serde::Serialize;

/// Error that ends the agent.
enum Failure {
    /// Invalid input; the kernel state was not changed.
    Input(String),
    /// The kernel refused a request.
    Kernel(String),
}

impl Failure {
    fn kernel(error: impl Display) -> Self {
        Self::Kernel(error.to_string())
    }
}

/// Converts errors of writing the output; other I/O errors are converted where they occur.
impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Kernel(format!("cannot write the output: {error}"))
    }
}

fn main() -> ExitCode {
    let (code, message) = match run(Cli::parse().command) {
        Ok(code) => return code,
        Err(Failure::Kernel(message)) => (1, message),
        Err(Failure::Input(message)) => (2, message),
    };
    // There is no other channel to report a failure of this write.
    let _unwritten = writeln!(io::stderr(), "agent: {message}");
    ExitCode::from(code)
}

/// Exit status of `plan --exit-code` if there are changes.
const CHANGES: u8 = 3;

/// Exit status of `apply` and `takeover` if the file has errors that close a policy or node.
const CLOSED: u8 = 3;

fn run(command: Command) -> Result<ExitCode, Failure> {
    match command {
        Command::Apply(Apply { of, json }) => return apply(&of, json),
        Command::Plan(options) => {
            let changes = plan_only(&options)?;
            if options.exit_code && changes > 0 {
                return Ok(ExitCode::from(CHANGES));
            }
        }
        Command::Doctor(Doctor { of, json }) => doctor(&of, json)?,
        Command::Show(Show { json }) => show(json)?,
        Command::Explain(options) => explain::run(&options)?,
        Command::Takeover(of) => return take_over(&of),
        Command::Remove(Remove { now: false }) => remove(Connection::REPLY_BLOCK_TIME)?,
        Command::Remove(Remove { now: true }) => remove(Duration::ZERO)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Reads the file, and plans once without the kernel, to tell invalid input from errors of the
/// kernel.
fn read(of: &Of) -> Result<(String, Config), Failure> {
    let file = of.cluster.display().to_string();
    let text = fs::read_to_string(&of.cluster)
        .map_err(|error| Failure::Input(format!("--cluster {file}: {error}")))?;
    let mut config = Config::parse(of.node.clone(), &file, &text).map_err(Failure::Input)?;
    config.cluster.backend = of.backend.resolve().map_err(Failure::kernel)?;
    let Config { cluster, policies, tables, .. } = &config;
    plan(cluster, policies, &mut MarkPool::new(cluster.marks), &mut TablePool::new(*tables))
        .map_err(|error| failure(&file, error.into()))?;
    Ok((file, config))
}

fn preflight(config: &Config) -> Preflight<'_> {
    Preflight::new(&config.cluster, &config.policies).with_tables(config.tables)
}

fn doctor(of: &Of, as_json: bool) -> Result<(), Failure> {
    let (file, mut config) = read(of)?;
    if let Ok(mut kernel) = KernelDatapath::open() {
        // A missing interface or privilege is one of the problems.
        let _missing = find_underlay(&file, &mut config, &mut kernel);
    }
    if let Some(mtu) = config.underlay_mtu {
        config.cluster.tunnel.underlay_mtu = mtu;
    }
    let preflight = preflight(&config);
    let problems = preflight.run().map_err(Failure::kernel)?;
    if as_json {
        json(&problems)?;
    } else {
        let mut out = io::stdout().lock();
        for problem in &problems {
            writeln!(out, "{}", findings::line(problem))?;
        }
        writeln!(out, "{} problem(s)", problems.len())?;
    }
    let broken = problems.iter().filter(|problem| problem.severity() == Severity::Broken).count();
    if broken == 0 {
        return Ok(());
    }
    let ready = preflight.ready(&problems).into_iter();
    let ready: Vec<_> = ready.map(|family| format!("; {family} is ready")).collect();
    let ready = ready.concat();
    Err(Failure::Kernel(format!("{broken} problem(s) prevent the datapath from working{ready}")))
}

/// Reads the file and opens a reconciler.
fn open(of: &Of) -> Result<(String, Config, Egress), Failure> {
    let (file, mut config) = read(of)?;
    let mut kernel = KernelDatapath::open().map_err(Failure::kernel)?;
    find_underlay(&file, &mut config, &mut kernel)?;
    let opened = reconciler(config.cluster.backend, config.cluster.marks, config.tables);
    Ok((file, config, opened.map_err(Failure::kernel)?))
}

fn apply(of: &Of, as_json: bool) -> Result<ExitCode, Failure> {
    let (file, config, mut egress) = open(of)?;
    let report = egress.reconcile(&config.cluster, &config.policies);
    let report = report.map_err(|error| failure(&file, error))?;
    // An agent that died before it announced an address is followed by this one.
    egress.announce().map_err(|error| failure(&file, error))?;
    let mut told = Told::of(&report, Some(&config));
    told.problems = preflight(&config).run_routing().map_err(Failure::kernel)?;
    told.problems.retain(|problem| problem.severity() == Severity::Broken);
    if as_json {
        json(&told)?;
    } else {
        summary(&told, "changes")?;
    }
    Ok(status(&told))
}

fn status(told: &Told<'_>) -> ExitCode {
    if told.closes() { ExitCode::from(CLOSED) } else { ExitCode::SUCCESS }
}

/// Prints the changes that apply would make, and returns their number.
fn plan_only(options: &Plan) -> Result<usize, Failure> {
    let (file, config, mut egress) = open(&options.of)?;
    let report = egress.preview(&config.cluster, &config.policies);
    let report = report.map_err(|error| failure(&file, error))?;
    let told = Told::of(&report, Some(&config));
    match options {
        Plan { as_shell: true, .. } => script(&report.changes)?,
        Plan { json: true, .. } => json(&told)?,
        _ => summary(&told, "changes planned")?,
    }
    Ok(report.changes.len())
}

fn take_over(of: &Of) -> Result<ExitCode, Failure> {
    let (file, config, mut egress) = open(of)?;
    let mut predecessors = open_beside_theirs(&file, &config, &mut egress)?;
    let report = egress.reconcile(&config.cluster, &config.policies);
    let report = report.map_err(|error| failure(&file, error))?;
    let told = Told::of(&report, Some(&config));
    summary(&told, "changes")?;
    clear(&mut predecessors)?;
    Ok(status(&told))
}

/// Writes a value as JSON.
fn json(value: &impl Serialize) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    serde_json::to_writer_pretty(&mut out, value).map_err(io::Error::from)?;
    Ok(writeln!(out)?)
}

/// Opens a datapath for the removal of spidernet's state, if that state does not conflict.
fn open_beside_theirs(
    file: &str,
    config: &Config,
    egress: &mut Egress,
) -> Result<IptablesDatapath, Failure> {
    let mut datapath = IptablesDatapath::open().map_err(Failure::kernel)?;
    let theirs = datapath.predecessor().map_err(Failure::kernel)?;
    if let Some(problem) = theirs.in_the_way(&config.cluster.tunnel) {
        return Err(Failure::Input(format!(
            "{file}: tunnel: {problem}; set another device name and another VNI or UDP port"
        )));
    }
    let planned = egress.preview(&config.cluster, &config.policies);
    let planned = planned.map_err(|error| failure(file, error))?;
    let mut added = planned.changes.ops().filter_map(|op| match op {
        // The fallback rule, for the prefix alone, steers no packet.
        Op::AddRule(rule) if rule.mask != config.cluster.marks.prefix_mask() => Some(rule),
        _ => None,
    });
    match added.find(|rule| theirs.takes(rule)) {
        None => {
            let _aside = datapath.set_predecessor_aside(&theirs).map_err(Failure::kernel)?;
            Ok(datapath)
        }
        Some(rule) => Err(Failure::Input(format!(
            "{file}: nodes: a routing rule of spidernet's agent matches packets of ip rule {rule}; \
             set another mark for that gateway"
        ))),
    }
}

/// Removes the state of spidernet's egressgateway, after the new state is installed.
fn clear(datapath: &mut IptablesDatapath) -> Result<(), Failure> {
    let theirs = datapath.predecessor().map_err(Failure::kernel)?;
    write!(io::stdout(), "{theirs}")?;
    datapath.remove_predecessor(&theirs).map_err(Failure::kernel)?;
    let left = datapath.predecessor().map_err(Failure::kernel)?;
    if left.is_empty() {
        return Ok(writeln!(io::stdout(), "{} removed", theirs.to_string().lines().count())?);
    }
    Err(Failure::Kernel(format!("objects were restored; is spidernet's agent running?\n{left}")))
}

/// Sets the underlay interface, if none is configured, to the one that has this node's underlay
/// address, and lowers the MTU of the underlay to that of the interface.
fn find_underlay(
    file: &str,
    config: &mut Config,
    kernel: &mut KernelDatapath,
) -> Result<(), Failure> {
    let Some((address, field)) = config.underlay() else {
        return Ok(());
    };
    let tunnel = &mut config.cluster.tunnel;
    let mtu = if let Some(device) = &tunnel.underlay_device {
        kernel.mtu_of(device).map_err(Failure::kernel)?.ok_or_else(|| {
            Failure::Input(format!(
                "{file}: tunnel.underlay_device: no interface is named \"{device}\""
            ))
        })?
    } else {
        let found = kernel.device_of(address).map_err(Failure::kernel)?;
        let (device, mtu) = found.ok_or_else(|| {
            Failure::Input(format!("{file}: {field}: no interface has the address {address}"))
        })?;
        tunnel.underlay_device = Some(device);
        mtu
    };
    tunnel.underlay_mtu = tunnel.underlay_mtu.min(mtu);
    Ok(())
}

fn failure(file: &str, error: Error) -> Failure {
    match error {
        Error::Plan(
            error @ (PlanError::Table(AllocError::Kernel(_))
            | PlanError::Mark(AllocError::Kernel(_))),
        ) => Failure::kernel(error),
        Error::Plan(error) => {
            Failure::Input(format!("{file}: {}: {error}", Config::field_of(&error)))
        }
        error => Failure::kernel(error),
    }
}

fn observe() -> Result<State, Failure> {
    let mut kernel = datapath(Backend::Nftables).map_err(Failure::kernel)?;
    egress_datapath::datapath::observe(&mut kernel).map_err(Failure::kernel)
}

fn show(json: bool) -> Result<(), Failure> {
    let mut kernel = datapath(Backend::Nftables).map_err(Failure::kernel)?;
    let state = egress_datapath::datapath::observe(&mut kernel).map_err(Failure::kernel)?;
    let summary = state.summary(&kernel.counters().map_err(Failure::kernel)?);
    let mut out = io::stdout().lock();
    if json {
        serde_json::to_writer_pretty(&mut out, &summary).map_err(io::Error::from)?;
        return Ok(writeln!(out)?);
    }
    Ok(write!(out, "{summary}")?)
}

fn remove(patience: Duration) -> Result<(), Failure> {
    // A removal allocates no marks and tables.
    let opened = reconciler(Backend::Nftables, MarkLayout::default(), TableRange::default());
    let mut egress = opened.map_err(Failure::kernel)?;
    let mut all = egress.drain().map_err(Failure::kernel)?;
    if all.changes.ops().any(|op| matches!(op, Op::BlockReplies(_))) && !patience.is_zero() {
        writeln!(io::stderr(), "blocking late replies to ended connections for {patience:?}")?;
        thread::sleep(patience);
    }
    all.changes.extend(egress.remove().map_err(Failure::kernel)?.changes);
    summary(&Told::of(&all, None), "changes")
}

/// Prints the changes as a shell script that stops at the first command that fails.
fn script(changes: &Changes) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    writeln!(out, "set -e")?;
    for step in changes.steps() {
        writeln!(out, "\n# {:?}", step.phase)?;
        step.ops.iter().try_for_each(|op| writeln!(out, "{op}"))?;
    }
    Ok(())
}

fn summary(told: &Told<'_>, what: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    Ok(writeln!(out, "{told}{} {what}", told.changes.len())?)
}
