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

use std::env;
use std::ffi::OsString;
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::OnceLock;

use words::{Words, unknown};

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

/// The folder of links to this binary, under the names of programs that are not installed.
struct Folder(Option<PathBuf>);

static FOLDER: OnceLock<Folder> = OnceLock::new();

/// The search path with the stand-ins behind all that is installed.
pub(crate) fn path() -> OsString {
    let path = env::var_os("PATH").unwrap_or_default();
    let Folder(folder) = FOLDER.get_or_init(|| Folder(make().ok()));
    let folders = env::split_paths(&path).chain(folder.clone());
    env::join_paths(folders).unwrap_or(path)
}

fn make() -> io::Result<PathBuf> {
    let folder = env::temp_dir().join(format!("egress-datapath-tests-{}", std::process::id()));
    fs::create_dir(&folder)?;
    let this = env::current_exe()?;
    for (program, _) in PROGRAMS {
        symlink(&this, folder.join(program))?;
    }
    Ok(folder)
}

/// Removes the folder, when all tests are over.
pub(crate) fn end() {
    if let Some(Folder(Some(folder))) = FOLDER.get() {
        let _left = fs::remove_dir_all(folder);
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
