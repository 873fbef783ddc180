//! Runs the tests, and ignores those that the machine cannot run.
//!
//! The built-in harness decides at compile time whether a test is ignored; whether there is an
//! `nft` is known only when the test runs. A test binary of this harness is declared with
//! `harness = false`, begins with `#[macro_use] extern crate harness`, and ends in [`main`]; a test
//! is a function with `#[test]`, as everywhere.
//!
//! A test says what it needs in its set-up: [`needs`] for programs, [`needs_kernel`] for what is
//! newer than some kernels, [`given`] for what the kernel may refuse. All end in [`unmet`], the one
//! place that decides what becomes of a test that cannot run: it is ignored with a reason, or, with
//! `EGRESS_STRICT=1`, it fails. A program that only changes a node is started like any other: where
//! it is not installed, there is a stand-in.

pub mod mutate;
#[cfg(target_os = "linux")]
mod stand_in;

use std::any::Any;
use std::collections::BTreeMap;
use std::env;
use std::fmt::{self, Debug, Display};
use std::io::{self, Write};
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::{Mutex, PoisonError};
use std::thread;

pub use libtest_mimic::Trial;
use libtest_mimic::{Arguments, Completion, Failed};

pub use attribute::test;
#[doc(hidden)]
pub use linkme;

/// A test.
#[derive(Debug)]
pub struct Test {
    /// Its path, as `module::function`.
    pub name: &'static str,
    /// What it does; the error is its failure.
    pub run: fn() -> Result<(), String>,
}

/// The tests of this binary.
#[linkme::distributed_slice]
pub static TESTS: [Test];

/// What a test may return.
pub trait Outcome {
    /// The failure, if it is one.
    fn result(self) -> Result<(), String>;
}

impl Outcome for () {
    fn result(self) -> Result<(), String> {
        Ok(())
    }
}

impl<E: Debug> Outcome for Result<(), E> {
    fn result(self) -> Result<(), String> {
        self.map_err(|error| format!("Error: {error:?}"))
    }
}

/// The payload of a panic that ends a test which cannot run.
struct Unmet(String);

/// How many tests were ignored, by reason.
static IGNORED: Mutex<BTreeMap<String, usize>> = Mutex::new(BTreeMap::new());

/// Whether every test must run, except those that [`needs_other_kernel`] leaves to other kernels.
pub fn is_strict() -> bool {
    is_strict_as("1") || is_strict_as("all")
}

fn is_strict_as(wanted: &str) -> bool {
    env::var_os("EGRESS_STRICT").is_some_and(|value| value == wanted)
}

/// Ends the test, which this machine cannot run: it is ignored, or it fails with `EGRESS_STRICT=1`.
///
/// # Panics
///
/// Always; the harness tells the panic of an ignored test from a failure.
pub fn unmet(reason: impl Display) -> ! {
    assert!(!is_strict(), "{reason}, and EGRESS_STRICT=1 demands that every test runs");
    // Without the hook, which would print it as a failure.
    resume_unwind(Box::new(Unmet(reason.to_string())))
}

/// Ends the test, which what is tested cannot pass by a documented limit, as iptables has some.
///
/// # Panics
///
/// Always; the harness tells the panic of an ignored test from a failure.
pub fn limit(reason: impl Display) -> ! {
    resume_unwind(Box::new(Unmet(format!("limit: {reason}"))))
}

/// Declares that the test asks these programs for a second opinion or for rules of their own.
///
/// # Panics
///
/// As [`unmet`], where one of them is missing.
pub fn needs(programs: &[&str]) {
    if let Some(missing) = programs.iter().find(|program| !has(program)) {
        unmet(format!("no program {missing}"));
    }
}

/// Whether a program is installed; its stand-in is not it.
pub fn has(program: &str) -> bool {
    let path = env::var_os("PATH").unwrap_or_default();
    let stand_ins = env::var_os(STAND_INS);
    let installed = |folder: &PathBuf| stand_ins.as_ref().is_none_or(|it| folder != Path::new(it));
    env::split_paths(&path).filter(installed).any(|folder| folder.join(program).is_file())
}

/// Names the folder of stand-ins, in the environment of the tests and of what they start.
const STAND_INS: &str = "EGRESS_STAND_INS";

/// The stand-in for a program, also where the program is installed.
#[cfg(target_os = "linux")]
pub fn stand_in(program: &str) -> io::Result<Command> {
    use std::os::unix::process::CommandExt;
    let mut command = Command::new(env::current_exe()?);
    command.arg0(program);
    Ok(command)
}

/// Declares that the test is about something which not every kernel has: what, and whether this
/// one has it.
///
/// # Panics
///
/// As [`unmet`], where it has not.
pub fn needs_kernel(what: &str, has: bool) {
    if !has {
        unmet(format!("the kernel has no {what}"));
    }
}

/// Declares that the test is about something which kernels in use here lack, and which
/// `tests/kernels/run` tests on kernels that have it.
///
/// # Panics
///
/// Where the kernel has it not: the test is ignored, or it fails with `EGRESS_STRICT=all`.
pub fn needs_other_kernel(what: &str, has: bool) {
    assert!(has || !is_strict_as("all"), "the kernel has no {what}");
    if !has {
        resume_unwind(Box::new(Unmet(format!("the kernel has no {what}"))));
    }
}

/// What the test asked the kernel for, such as a network namespace.
///
/// # Panics
///
/// As [`unmet`], where the kernel refused.
pub fn given<T, E: Display>(what: &str, made: Result<T, E>) -> T {
    made.unwrap_or_else(|error| unmet(format!("no {what}: {error}")))
}

/// Runs the registered tests; the arguments are those of the built-in harness.
///
/// `prepare` is done first, while there is one thread, unless this process stands in for another
/// program.
pub fn main(prepare: impl FnOnce()) -> ExitCode {
    main_with(prepare, Vec::new)
}

/// The same with tests that are made while the program runs.
pub fn main_with(prepare: impl FnOnce(), trials: impl FnOnce() -> Vec<Trial>) -> ExitCode {
    start(prepare, trials, None)
}

/// The same, one test at a time: for tests that would take packets' time from each other.
pub fn main_in_turn(prepare: impl FnOnce(), trials: impl FnOnce() -> Vec<Trial>) -> ExitCode {
    start(prepare, trials, Some(1))
}

fn start(
    prepare: impl FnOnce(),
    trials: impl FnOnce() -> Vec<Trial>,
    threads: Option<usize>,
) -> ExitCode {
    #[cfg(target_os = "linux")]
    if let Some(ended) = stand_in::played() {
        return ended;
    }
    #[cfg(target_os = "linux")]
    stand_in::provide();
    prepare();
    let (arguments, filters) = arguments();
    let mut arguments = Arguments::from_iter(arguments);
    arguments.test_threads = threads.or(arguments.test_threads);
    let mut all = registered();
    all.extend(trials());
    let is_chosen = |trial: &Trial| {
        let fits = |filter: &String| match arguments.exact {
            true => trial.name() == filter,
            false => trial.name().contains(filter),
        };
        filters.is_empty() || filters.iter().any(fits)
    };
    all.retain(is_chosen);
    let ended = run(&arguments, all);
    #[cfg(target_os = "linux")]
    stand_in::end();
    ended
}

/// The options of this process, and the words that tests are chosen by: there may be several, as
/// with the built-in harness.
fn arguments() -> (Vec<String>, Vec<String>) {
    let (mut options, mut filters) = (Vec::new(), Vec::new());
    let mut arguments = env::args();
    options.extend(arguments.next());
    while let Some(argument) = arguments.next() {
        if !argument.starts_with('-') {
            filters.push(argument);
            continue;
        }
        let takes_value = ["--test-threads", "--skip", "--logfile", "--format", "--color"];
        let value = takes_value.contains(&argument.as_str()).then(|| arguments.next()).flatten();
        options.push(argument);
        options.extend(value);
    }
    (options, filters)
}

/// A shell for commands that change a node; a failed one ends it.
pub fn shell(script: &str) -> Command {
    let mut shell = Command::new("/bin/sh");
    shell.args(["-ec", script]);
    shell
}

/// Says what a test measured or counted, with `--nocapture`.
#[macro_export]
macro_rules! note {
    ($($words:tt)*) => { $crate::say(::core::format_args!($($words)*)) };
}

/// Does what [`note!`] is for.
#[doc(hidden)]
pub fn say(words: fmt::Arguments<'_>) {
    if env::args().any(|argument| argument == "--nocapture") {
        let _closed = writeln!(io::stdout(), "{words}");
    }
}

/// The registered tests, for a binary that adds others.
fn registered() -> Vec<Trial> {
    // As the built-in harness does, the name of the crate is left out.
    let name = |test: &Test| test.name.split_once("::").map_or(test.name, |(_, name)| name);
    let mut trials: Vec<_> = TESTS.iter().map(|test| trial(name(test), test.run)).collect();
    trials.sort_by(|a, b| a.name().cmp(b.name()));
    trials
}

/// A test that is made while the program runs.
pub fn trial<O: Outcome>(name: &str, run: impl FnOnce() -> O + Send + 'static) -> Trial {
    // A thread of its own: what a test does to its thread, such as another namespace or fewer
    // capabilities, ends with it.
    let thread = thread::Builder::new().name(name.to_owned());
    Trial::ignorable_test(name, || match thread.spawn(|| run().result())?.join() {
        Ok(result) => result.map(|()| Completion::Completed).map_err(Failed::from),
        Err(panic) => ignored(panic),
    })
}

fn ignored(panic: Box<dyn Any + Send>) -> Result<Completion, Failed> {
    let Unmet(reason) = *panic.downcast::<Unmet>().unwrap_or_else(|panic| resume_unwind(panic));
    let mut ignored = IGNORED.lock().unwrap_or_else(PoisonError::into_inner);
    *ignored.entry(reason.clone()).or_default() += 1;
    Ok(Completion::ignored_with(reason))
}

/// Runs tests, and says at the end how many were ignored and why.
fn run(arguments: &Arguments, trials: Vec<Trial>) -> ExitCode {
    let conclusion = libtest_mimic::run(arguments, trials);
    let ignored = IGNORED.lock().unwrap_or_else(PoisonError::into_inner);
    let mut out = io::stdout().lock();
    for (reason, count) in &*ignored {
        let _closed = writeln!(out, "{count} ignored: {reason}");
    }
    if !ignored.is_empty() {
        let binary = env::current_exe().unwrap_or_default();
        let binary = binary.file_stem().unwrap_or_default();
        let _closed = writeln!(
            out,
            "{}: README.md names the packages that turn ignored tests into checks\n",
            Path::new(binary).display()
        );
    }
    conclusion.exit_code()
}
