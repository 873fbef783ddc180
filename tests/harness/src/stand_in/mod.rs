//! Stand-ins for other programs, where these are not installed.
//!
//! Tests have other programs change a node: `ip`, `bridge`, `sysctl`, `nft`, `conntrack`. Where one
//! is not installed, this test binary is run under its name instead and makes the same request of
//! the kernel: another process, another socket, the same effect. A stand-in writes, and lists what
//! the kernel says without interpreting it; a test that reads what such a program prints, or has it
//! judge ours, [`needs`](crate::needs) the program itself.

mod bridge;
mod conntrack;
mod ip;
mod netlink;
mod nft;
mod words;

use std::convert::Infallible;
use std::io::{self, Write};
use std::os::unix::fs::symlink;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{self, Command, ExitCode};
use std::{env, fs};

use words::{Words, unknown};

use crate::{STAND_INS, has};

type Main = fn(Words) -> io::Result<String>;

const PROGRAMS: [(&str, Main); 5] = [
    ("bridge", bridge::main),
    ("conntrack", conntrack::main),
    ("ip", ip::main),
    ("nft", nft::main),
    ("sysctl", sysctl),
];

/// Does what this process was started for, if it was started under the name of a program.
pub(crate) fn played() -> Option<ExitCode> {
    let mut arguments = env::args();
    let name = arguments.next()?;
    let name = Path::new(&name).file_name()?;
    let (name, main) = PROGRAMS.iter().find(|(program, _)| name == *program)?;
    match main(Words::new(arguments.collect())) {
        Ok(said) => {
            let written = io::stdout().write_all(said.as_bytes());
            Some(written.map_or(ExitCode::FAILURE, |()| ExitCode::SUCCESS))
        }
        Err(error) => {
            let _closed = writeln!(io::stderr(), "{name}: {error}");
            Some(ExitCode::from(2))
        }
    }
}

/// Starts this process once more, with stand-ins in its search path, behind all that is installed.
///
/// What the tests start, and what those start, then finds them by their names. Nothing happens
/// where everything is installed.
pub(crate) fn provide() {
    if env::var_os(STAND_INS).is_some() || PROGRAMS.iter().all(|(program, _)| has(program)) {
        return;
    }
    // A failure is that of the first test that needs one.
    let _failed = again();
}

fn again() -> io::Result<Infallible> {
    let (this, folder) = (env::current_exe()?, folder());
    fs::create_dir(&folder)?;
    for (program, _) in PROGRAMS {
        symlink(&this, folder.join(program))?;
    }
    let path = env::var_os("PATH").unwrap_or_default();
    let path = env::join_paths(env::split_paths(&path).chain([folder.clone()]));
    let mut command = Command::new(this);
    command.args(env::args_os().skip(1)).env(STAND_INS, folder);
    Err(command.env("PATH", path.map_err(io::Error::other)?).exec())
}

/// A folder of this process: a process that starts itself once more keeps its number.
fn folder() -> PathBuf {
    env::temp_dir().join(format!("egress-datapath-stand-ins-{}", process::id()))
}

/// Removes the folder, when all tests of the process that has made it are over.
pub(crate) fn end() {
    if env::var_os(STAND_INS).is_some_and(|made| Path::new(&made) == folder()) {
        let _left = fs::remove_dir_all(folder());
    }
}

/// `sysctl -w NAME=VALUE`, as a path or not, quiet or not.
fn sysctl(mut words: Words) -> io::Result<String> {
    if !words.take("-qw") && !words.take("-w") {
        return Err(unknown("sysctl but with -w"));
    }
    let word = words.word()?;
    let (name, value) = word.split_once('=').ok_or_else(|| unknown(&word))?;
    fs::write(Path::new("/proc/sys").join(name), value)?;
    Ok(String::new())
}
