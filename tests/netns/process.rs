//! This test program once more, as another process in a namespace of the lab.

use std::env;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use common::fleet::Result;
use egress_datapath::testing::lab::Netns;

/// Says which part a process plays; without it there is nothing to play.
const PART: &str = "EGRESS_TEST_PART";

/// Stands in front of what a process says, between the lines of the test harness.
const SAYS: &str = "says: ";

/// Another process of this program.
pub(crate) struct Process {
    child: Child,
    /// Closed, it ends the process.
    _stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Process {
    /// Starts the test of this name in the namespace; it learns its part from [`part`].
    pub(crate) fn start(netns: &Netns, test: &str, part: &str) -> Result<Self> {
        let mut child = netns.run(|| {
            Command::new(env::current_exe()?)
                .args(["--exact", test, "--nocapture", "--test-threads=1"])
                .env(PART, part)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
        })??;
        let stdin = child.stdin.take().ok_or("no standard input")?;
        let stdout = BufReader::new(child.stdout.take().ok_or("no standard output")?);
        Ok(Self { child, _stdin: stdin, stdout })
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits until it says something.
    pub(crate) fn listen(&mut self) -> Result<String> {
        let mut line = String::new();
        while self.stdout.read_line(&mut line)? > 0 {
            if let Some((_, said)) = line.split_once(SAYS) {
                return Ok(said.trim_end().to_owned());
            }
            line.clear();
        }
        Err(format!("the process {} ended: {}", self.id(), self.child.wait()?).into())
    }

    /// Kills it without warning and waits until it is gone.
    pub(crate) fn kill(&mut self) -> Result {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _gone = self.kill();
    }
}

/// The part of this process, if it was started for one.
pub(crate) fn part() -> Option<String> {
    env::var(PART).ok()
}

/// Says something to the process that started this one.
pub(crate) fn say(what: &str) -> Result {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{SAYS}{what}")?;
    Ok(out.flush()?)
}

/// Waits until the process that started this one has no more use for it.
pub(crate) fn wait() -> Result {
    std::io::stdin().read_line(&mut String::new())?;
    Ok(())
}
