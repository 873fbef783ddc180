//! ipset sets through libipset, in a separate process.
//!
//! [`IptablesDatapath`](crate::iptables::IptablesDatapath) writes its sets over netlink. A host
//! that wants them written by libipset, as the `ipset` program does it, enables the feature
//! `ipset-sys` and opens the datapath with a [`Libipset`].
//!
//! libipset ends its process when a command is refused, prints listings to that process's standard
//! output, and applies an option given once (`-exist`) to all later commands. So it never runs in
//! the host's process: for each batch of commands the host's binary, or another one, is started
//! once more and calls [`serve`]. The end of that process is then reported as a [`KernelError`]
//! with libipset's message.
//!
//! ```no_run
//! use egress_datapath::iptables::IptablesDatapath;
//! use egress_datapath::iptables::libipset::{self, Libipset};
//!
//! fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     if std::env::args().nth(1).as_deref() == Some("libipset") {
//!         return Ok(libipset::serve()?);
//!     }
//!     let libipset = Libipset::new(std::env::current_exe()?).with_argument("libipset");
//!     let datapath = IptablesDatapath::open_with_libipset(libipset)?;
//!     // … give it to a Reconciler …
//!     # drop(datapath);
//!     Ok(())
//! }
//! ```
//!
//! # Why it is not the default
//!
//! A set of 100 000 members takes a process and a dozen times as long; a process that dies leaves
//! half-filled sets behind (under a temporary name, which a later read finds); libipset binds the
//! binary to the GPL; and the build needs `libipset-dev` and `libclang-dev`. The crate `ipset-sys`
//! brings an old `bindgen`: it cannot be in one dependency graph with a newer one.

mod saved;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io;
use std::io::{Read, Write};
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use ipset_sys::IpsetSys;

use crate::diff::op::Op;
use crate::error::{KernelError, errno};
use crate::state::{Ipset, IpsetContents};

/// Marker that the process prints before each command, to attribute later messages to it.
const MARKER: &str = "command ";

/// Prefix of commands that succeed if their effect is already there.
const LENIENT: &str = "-exist ";

/// Number of attempts to read all sets without one being deleted meanwhile.
const ATTEMPTS: usize = 5;

/// Runs the commands on the standard input in libipset, until one is refused.
///
/// A binary that [`Libipset`] starts calls this before anything else. libipset may end the process
/// during the call; if it returns, end the process.
///
/// # Errors
///
/// Input that cannot be read, or a refusal for which libipset did not end the process.
pub fn serve() -> io::Result<()> {
    // Read all input first: the parent reads no output before it has written everything.
    let mut input = String::new();
    io::stdin().lock().read_to_string(&mut input)?;
    let open = || IpsetSys::init().map_err(io::Error::other);
    // `-exist`, once given, holds for all commands of a handle.
    let (mut strict, mut lenient) = (open()?, open()?);
    for (number, command) in input.lines().enumerate() {
        writeln!(io::stderr(), "{MARKER}{number}")?;
        let handle = if command.starts_with(LENIENT) { &mut lenient } else { &mut strict };
        handle.run(command).map_err(io::Error::other)?;
    }
    Ok(())
}

/// Program that runs libipset, and its arguments.
///
/// The program runs in the network namespace of the calling thread.
#[derive(Clone, Debug)]
pub struct Libipset {
    program: PathBuf,
    arguments: Vec<OsString>,
}

/// Batch that ended early.
struct Refused {
    /// Index of the refused command, which is also the number of commands that succeeded.
    command: usize,
    words: String,
}

impl Libipset {
    /// Creates a description of a program that calls [`serve`] when started without arguments.
    pub fn new(program: impl Into<PathBuf>) -> Self {
        Self { program: program.into(), arguments: Vec::new() }
    }

    /// Adds an argument.
    #[must_use]
    pub fn with_argument(mut self, argument: impl Into<OsString>) -> Self {
        self.arguments.push(argument.into());
        self
    }

    /// Returns true if a set matches an address, as a rule that looks up the set would find.
    ///
    /// # Errors
    ///
    /// The set does not exist, or libipset reports another error.
    pub fn contains(&self, set: Ipset, address: IpAddr) -> Result<bool, KernelError> {
        let command = format!("test {set} {address}");
        match self.run(std::slice::from_ref(&command))? {
            Ok(_) => Ok(true),
            Err(refused) if refused.words.contains("is NOT in set") => Ok(false),
            Err(refused) => Err(explained(format!("ipset {command}"), &refused.words)),
        }
    }

    /// Reads all sets of the datapath with their members, and only the names of other sets.
    ///
    /// # Errors
    ///
    /// libipset reports an error, or its output cannot be parsed.
    pub fn observe(&self) -> Result<BTreeMap<Ipset, IpsetContents>, KernelError> {
        let mut gone = None;
        for _ in 0..ATTEMPTS {
            let sets = self.names()?;
            let commands: Vec<_> = sets.iter().map(|set| format!("save {set}")).collect();
            match self.run(&commands)? {
                Ok(text) => return saved::read(&text),
                Err(refused) => {
                    let set = sets.get(refused.command).map(ToString::to_string);
                    let request = format!("ipset save {}", set.unwrap_or_default());
                    let error = explained(request, &refused.words);
                    if !error.is_not_found() {
                        return Err(error);
                    }
                    gone = Some(error);
                }
            }
        }
        Err(gone.unwrap_or_else(|| KernelError::answer("ipset save", "sets come and go")))
    }

    /// Lists the set names in a separate process, because the option `-n` stays in force.
    fn names(&self) -> Result<Vec<Ipset>, KernelError> {
        let command = "list -n".to_owned();
        match self.run(&[command])? {
            Ok(text) => Ok(text.lines().filter_map(Ipset::from_name).collect()),
            Err(refused) => Err(explained("ipset list -n", &refused.words)),
        }
    }

    /// Applies operations one after another; returns the number of those made, and the refused ones
    /// by index.
    pub(crate) fn make_all(&self, ops: &[&Op]) -> (usize, Vec<(usize, KernelError)>) {
        let of_op = |(index, op): (usize, &&Op)| {
            commands(op).into_iter().map(move |command| (index, command))
        };
        let (owners, commands): (Vec<usize>, Vec<String>) =
            ops.iter().enumerate().flat_map(of_op).unzip();
        let (mut refused, mut from, mut tried) = (Vec::new(), 0, ops.len());
        // Every round advances by at least one operation.
        while from < commands.len() {
            let ended = match self.run(commands.get(from..).unwrap_or_default()) {
                Ok(Ok(_)) => break,
                Ok(Err(ended)) => ended,
                Err(error) => {
                    if let Some(op) = owners.get(from) {
                        refused.push((*op, error));
                        tried = op + 1;
                    }
                    break;
                }
            };
            let at = from + ended.command;
            let Some((op, command)) = owners.get(at).zip(commands.get(at)) else { break };
            refused.push((*op, explained(format!("ipset {command}"), &ended.words)));
            if let Some(Op::AddIpset(set, _) | Op::PutIpset(set, _)) = ops.get(*op) {
                // The temporary set may or may not exist, and the result does not matter.
                let _gone = self.run(&[format!("destroy {}", Ipset::Temporary(set.family()))]);
            }
            from = owners.partition_point(|owner| owner <= op);
        }
        (tried - refused.len(), refused)
    }

    /// Runs commands in a new process; returns its output, or why it ended early.
    fn run(&self, commands: &[String]) -> Result<Result<String, Refused>, KernelError> {
        let request = format!("run libipset in {}", self.program.display());
        let failed = |error: io::Error| KernelError::io(&request, &error);
        let mut child = Command::new(&self.program)
            .args(&self.arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(failed)?;
        let input: String = commands.iter().flat_map(|command| [command, "\n"]).collect();
        // A broken pipe means that the process has ended, and its output says why.
        let written = child.stdin.take().map_or(Ok(()), |mut to| to.write_all(input.as_bytes()));
        let Output { status, stdout, stderr } = child.wait_with_output().map_err(failed)?;
        let said = String::from_utf8_lossy(&stderr);
        let (command, words) = last_words(&said);
        match command {
            _ if status.success() => {
                let complete = command.map_or(0, |command| command + 1) == commands.len();
                if !complete {
                    return Err(KernelError::answer(request, "it does not call libipset::serve"));
                }
                written.map_err(failed)?;
                Ok(Ok(String::from_utf8_lossy(&stdout).into_owned()))
            }
            Some(command) => {
                let words = if words.is_empty() { status.to_string() } else { words };
                Ok(Err(Refused { command, words }))
            }
            None => {
                let error = KernelError::answer(request, "it ended before the first command");
                Err(error.with_words(Some(words)))
            }
        }
    }
}

/// Commands of an operation, without the program's name.
fn commands(op: &Op) -> Vec<String> {
    let lines = |op: &Op| -> Vec<String> {
        let text = op.to_string();
        let parts = text.lines().flat_map(|line| line.split(" && "));
        parts.filter_map(|part| part.strip_prefix("ipset ")).map(str::to_owned).collect()
    };
    match op {
        Op::AddIpset(set, contents) => {
            // Filled under a temporary name, so that the set is complete or absent under its own.
            let new = Ipset::Temporary(set.family());
            let mut commands = lines(&Op::AddIpset(new, contents.clone()));
            commands.push(format!("rename {new} {set}"));
            commands
        }
        Op::PutMember(..) => lines(op).into_iter().map(|line| format!("{LENIENT}{line}")).collect(),
        op => lines(op),
    }
}

/// Returns the index of the last command begun and the messages about it.
fn last_words(said: &str) -> (Option<usize>, String) {
    let (mut command, mut words) = (None, Vec::new());
    for line in said.lines() {
        match line.strip_prefix(MARKER).and_then(|number| number.parse().ok()) {
            Some(number) => {
                command = Some(number);
                words.clear();
            }
            None => words.push(line.trim()),
        }
    }
    (command, words.join(" "))
}

/// Messages of libipset for errors that have a number in the kernel.
const NUMBERS: [(&str, i32); 8] = [
    ("name does not exist", errno::ENOENT),
    ("same name already exists", errno::EEXIST),
    ("it's already added", errno::EEXIST),
    ("it's not added", errno::ENOENT),
    ("a set with the new name already exists", errno::EEXIST),
    ("in use by a kernel component", errno::EBUSY),
    ("is full", errno::ENOSPC),
    ("Operation not permitted", errno::EPERM),
];

fn explained(request: impl std::fmt::Display, words: &str) -> KernelError {
    let number = NUMBERS.iter().find(|(part, _)| words.contains(part));
    let error = match number {
        Some((_, number)) => KernelError::refused(request, *number),
        None => KernelError::answer(request, "libipset ended its process"),
    };
    error.with_words(Some(words.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::Member;
    use crate::types::Family;

    #[test]
    fn the_last_words_are_those_after_the_last_command() {
        let said = "command 0\nWarning: x\ncommand 1\nipset v7.17: no\nand why\n";
        assert_eq!(last_words(said), (Some(1), "ipset v7.17: no and why".to_owned()));
        assert_eq!(last_words("cannot start\n"), (None, "cannot start".to_owned()));
    }

    #[test]
    fn an_operation_is_the_commands_that_it_prints_as() {
        let contents = IpsetContents::of(["10.0.0.0/8".parse().unwrap()]);
        let set = Ipset::Selected(Family::V4);
        assert_eq!(
            commands(&Op::AddIpset(set, contents.clone())),
            [
                "create egress4-temporary hash:net family inet maxelem 65536",
                "add egress4-temporary 10.0.0.0/8",
                "rename egress4-temporary egress4-selected",
            ]
        );
        assert_eq!(
            commands(&Op::PutIpset(set, contents))[2..],
            ["swap egress4-temporary egress4-selected", "destroy egress4-temporary"]
        );
        assert_eq!(
            commands(&Op::PutMember(set, "10.0.0.0/8".parse().unwrap(), Member::Not)),
            ["-exist add egress4-selected 10.0.0.0/8 nomatch"]
        );
    }

    #[test]
    fn words_become_numbers() {
        let error = explained("ipset save x", "The set with the given name does not exist");
        assert!(error.is_not_found(), "{error}");
        let error = explained("ipset add x y", "Syntax error: cannot parse y");
        assert_eq!(error.errno(), None);
        assert!(error.to_string().contains("cannot parse y"), "{error}");
    }
}
