//! A node agent that applies a configuration file to its network namespace.

mod backend;
mod config;
mod explain;
mod show;

use std::fmt::Display;
use std::fs;
use std::io::{self, Write};
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use backend::{Choice, Egress, datapath, reconciler};
use config::Config;
use egress_datapath::preflight::{Preflight, Severity};
use egress_datapath::{
    AllocError, Backend, Changes, Connection, Counts, Error, IptablesDatapath, KernelDatapath,
    MarkLayout, MarkPool, NodeName, Op, PlanError, Report, State, TablePool, TableRange, plan,
};

const USAGE: &str = "\
usage: agent apply --node NAME --cluster FILE.json   apply FILE to the kernel
       agent plan --node NAME --cluster FILE.json    print the changes that apply would make
             --as-shell                              as a shell script
             --backend NAME                          with nftables (default), iptables-legacy,
                                                     iptables-nft or auto
       agent doctor --node NAME --cluster FILE.json  check this host for conflicts (preflight)
       agent show [--json]                           print the installed state
       agent explain --node NAME --cluster FILE.json --from ADDRESS --to ADDRESS[:PORT/udp] [--json]
                                                     trace a packet of a pod
       agent takeover --node NAME --cluster FILE.json
             [--backend NAME]                        apply FILE, then remove the state of
                                                     spidernet's egressgateway; stop its agent
                                                     first
       agent remove [--now]                          remove all objects of the datapath, after
                                                     blocking late replies to ended connections";

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
    let arguments: Vec<String> = std::env::args_os()
        .skip(1)
        .map(|argument| argument.to_string_lossy().into_owned())
        .collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let (code, message) = match run(&arguments) {
        Ok(()) => return ExitCode::SUCCESS,
        Err(Failure::Kernel(message)) => (1, message),
        Err(Failure::Input(message)) => (2, message),
    };
    // There is no other channel to report a failure of this write.
    let _unwritten = writeln!(io::stderr(), "agent: {message}");
    ExitCode::from(code)
}

fn run(arguments: &[&str]) -> Result<(), Failure> {
    match *arguments {
        ["apply", ref options @ ..] => reconcile(options, Mode::Apply),
        ["plan", ref options @ ..] => reconcile(options, Mode::Plan),
        ["takeover", ref options @ ..] => reconcile(options, Mode::TakeOver),
        ["doctor", ref options @ ..] => doctor(options),
        ["explain", ref options @ ..] => explain::run(options),
        ["show"] => show(show::people),
        ["show", "--json"] => show(show::json),
        ["remove"] => remove(Connection::REPLY_BLOCK_TIME),
        ["remove", "--now"] => remove(Duration::ZERO),
        ["--help" | "-h"] => Ok(writeln!(io::stdout(), "{USAGE}")?),
        [] => Err(Failure::Input(format!("no command given\n{USAGE}"))),
        [command @ ("show" | "remove"), ref rest @ ..] => {
            Err(Failure::Input(format!("{command} does not take {:?}\n{USAGE}", rest.join(" "))))
        }
        [command, ..] => Err(Failure::Input(format!("unknown command {command:?}\n{USAGE}"))),
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    Apply,
    Plan,
    TakeOver,
}

/// Reads the file, and plans once without the kernel, to tell invalid input from errors of the
/// kernel.
fn read<'a>(options: &[&'a str]) -> Result<(&'a str, Config, bool), Failure> {
    let Options { node, file, backend, as_shell } = options_of(options)?;
    let mut config = config(node, file).map_err(Failure::Input)?;
    config.cluster.backend = backend.resolve().map_err(Failure::kernel)?;
    let Config { cluster, policies, tables } = &config;
    plan(cluster, policies, &mut MarkPool::new(cluster.marks), &mut TablePool::new(*tables))
        .map_err(|error| failure(file, &config, error.into()))?;
    Ok((file, config, as_shell))
}

fn config(node: &str, file: &str) -> Result<Config, String> {
    let node = NodeName::new(node).map_err(|error| format!("--node {node:?}: {error}"))?;
    let text = fs::read_to_string(file).map_err(|error| format!("--cluster {file}: {error}"))?;
    Config::parse(node, file, &text)
}

fn doctor(options: &[&str]) -> Result<(), Failure> {
    let (_, config, _) = read(options)?;
    let preflight = Preflight::new(&config.cluster, &config.policies).with_tables(config.tables);
    let problems = preflight.run().map_err(Failure::kernel)?;
    let mut out = io::stdout().lock();
    for problem in &problems {
        writeln!(out, "{}: {problem}; {}", problem.severity(), problem.remedy())?;
    }
    writeln!(out, "{} problem(s)", problems.len())?;
    let broken = problems.iter().filter(|problem| problem.severity() == Severity::Broken).count();
    match broken {
        0 => Ok(()),
        _ => Err(Failure::Kernel(format!("{broken} problem(s) prevent the datapath from working"))),
    }
}

fn reconcile(options: &[&str], mode: Mode) -> Result<(), Failure> {
    let (file, mut config, as_shell) = read(options)?;
    if as_shell && mode != Mode::Plan {
        return Err(Failure::Input(format!("only plan takes --as-shell\n{USAGE}")));
    }
    let mut kernel = KernelDatapath::open().map_err(Failure::kernel)?;
    find_underlay(file, &mut config, &mut kernel)?;
    let opened = reconciler(config.cluster.backend, config.cluster.marks, config.tables);
    let mut egress = opened.map_err(Failure::kernel)?;
    let predecessors = match mode {
        Mode::TakeOver => Some(open_beside_theirs(file, &config, &mut egress)?),
        _ => None,
    };
    let (report, what) = match mode {
        Mode::Apply | Mode::TakeOver => {
            (egress.reconcile(&config.cluster, &config.policies), "changes")
        }
        Mode::Plan => (egress.preview(&config.cluster, &config.policies), "changes planned"),
    };
    let report = report.map_err(|error| failure(file, &config, error))?;
    if as_shell {
        return script(&report.changes);
    }
    summary(&report, what)?;
    predecessors.map_or(Ok(()), |mut datapath| clear(&mut datapath))
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
    let planned = planned.map_err(|error| failure(file, config, error))?;
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

/// Returns the values of these options, each given once, in any order.
fn values<'a, const N: usize>(
    options: &[&'a str],
    names: [&str; N],
) -> Result<[&'a str; N], Failure> {
    let mut found = [None; N];
    let mut options = options.iter().copied();
    while let Some(option) = options.next() {
        let place = names.iter().position(|name| *name == option);
        let slot = place.and_then(|place| found.get_mut(place));
        let slot = slot.ok_or_else(|| format!("unknown option {option:?}\n{USAGE}"));
        let value = options.next().ok_or_else(|| format!("{option} needs a value\n{USAGE}"));
        if slot.map_err(Failure::Input)?.replace(value.map_err(Failure::Input)?).is_some() {
            return Err(Failure::Input(format!("{option} is given twice\n{USAGE}")));
        }
    }
    let mut given = [""; N];
    for ((slot, value), name) in given.iter_mut().zip(found).zip(names) {
        *slot = value.ok_or_else(|| Failure::Input(format!("{name} is missing\n{USAGE}")))?;
    }
    Ok(given)
}

/// Options of a command.
struct Options<'a> {
    node: &'a str,
    file: &'a str,
    backend: Choice,
    as_shell: bool,
}

/// Parses the options, in any order.
fn options_of<'a>(options: &[&'a str]) -> Result<Options<'a>, Failure> {
    let (mut node, mut file, mut backend, mut shell) = (None, None, None, None);
    let mut options = options.iter().copied();
    while let Some(option) = options.next() {
        let (slot, is_flag) = match option {
            "--node" => (&mut node, false),
            "--cluster" => (&mut file, false),
            "--backend" => (&mut backend, false),
            "--as-shell" => (&mut shell, true),
            other => return Err(Failure::Input(format!("unknown option {other:?}\n{USAGE}"))),
        };
        let value = if is_flag { Some(option) } else { options.next() };
        let value = value.ok_or_else(|| format!("{option} needs a value\n{USAGE}"));
        if slot.replace(value.map_err(Failure::Input)?).is_some() {
            return Err(Failure::Input(format!("{option} is given twice\n{USAGE}")));
        }
    }
    let missing = |option| Failure::Input(format!("{option} is missing\n{USAGE}"));
    let backend = match backend {
        None => Choice::default(),
        Some(name) => Choice::named(name).ok_or_else(|| {
            Failure::Input(format!("--backend {name:?}: unknown backend\n{USAGE}"))
        })?,
    };
    Ok(Options {
        node: node.ok_or_else(|| missing("--node"))?,
        file: file.ok_or_else(|| missing("--cluster"))?,
        backend,
        as_shell: shell.is_some(),
    })
}

/// Sets the MTU of the underlay interface, and if no interface is configured, the interface that
/// has this node's underlay address.
fn find_underlay(
    file: &str,
    config: &mut Config,
    kernel: &mut KernelDatapath,
) -> Result<(), Failure> {
    let Some((address, field)) = config.underlay() else {
        return Ok(());
    };
    let tunnel = &mut config.cluster.tunnel;
    if let Some(device) = &tunnel.underlay_device {
        let mtu = kernel.mtu_of(device).map_err(Failure::kernel)?;
        tunnel.underlay_mtu = mtu.ok_or_else(|| {
            Failure::Input(format!(
                "{file}: tunnel.underlay_device: no interface is named \"{device}\""
            ))
        })?;
        return Ok(());
    }
    let found = kernel.device_of(address).map_err(Failure::kernel)?;
    let (device, mtu) = found.ok_or_else(|| {
        Failure::Input(format!("{file}: {field}: no interface has the address {address}"))
    })?;
    tunnel.underlay_device = Some(device);
    tunnel.underlay_mtu = mtu;
    Ok(())
}

fn failure(file: &str, config: &Config, error: Error) -> Failure {
    match error {
        Error::Plan(
            error @ (PlanError::Table(AllocError::Kernel(_))
            | PlanError::Mark(AllocError::Kernel(_))),
        ) => Failure::kernel(error),
        Error::Plan(error) => {
            Failure::Input(format!("{file}: {}: {error}", config.field_of(&error)))
        }
        error => Failure::kernel(error),
    }
}

fn observe() -> Result<State, Failure> {
    let mut kernel = datapath(Backend::Nftables).map_err(Failure::kernel)?;
    egress_datapath::observe(&mut kernel).map_err(Failure::kernel)
}

fn show(write: impl Fn(&State, &Counts) -> io::Result<()>) -> Result<(), Failure> {
    let mut kernel = datapath(Backend::Nftables).map_err(Failure::kernel)?;
    let state = egress_datapath::observe(&mut kernel).map_err(Failure::kernel)?;
    let counts = kernel.counters().map_err(Failure::kernel)?;
    Ok(write(&state, &counts)?)
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
    summary(&all, "changes")
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

fn summary(Report { changes, findings, .. }: &Report, what: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    write!(out, "{changes}")?;
    for finding in findings {
        writeln!(out, "note: {finding}")?;
    }
    Ok(writeln!(out, "{} {what}", changes.len())?)
}
