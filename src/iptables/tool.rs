//! iptables tools of the host: `iptables-save` and `iptables-restore`.

use std::env;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use crate::error::{KernelError, errno};
#[cfg(feature = "testing")]
use crate::faults::Faults;
use crate::state::Variant;
use crate::types::Family;

/// Time to wait for the lock that all users of iptables share, in seconds.
const PATIENCE: &str = "5";

/// Exit code of `iptables-restore` without the lock or with a busy kernel.
///
/// `RESOURCE_PROBLEM` of `xtables.h`.
const BUSY: i32 = 4;

const HELD: &str = "another program holds /run/xtables.lock: try again, and give this process the \
                    host's /run";
const NO_TOOLS: &str = "install iptables from 1.8 on";

/// Paths of the tools.
#[derive(Debug)]
pub(crate) struct Tools {
    found: Vec<(Variant, Family, Pair)>,
    #[cfg(feature = "testing")]
    faults: Option<Faults>,
}

/// Save and restore tool of one variant and family.
#[derive(Clone, Debug)]
struct Pair {
    save: PathBuf,
    restore: PathBuf,
}

impl Tools {
    /// Finds the tools of both variants.
    pub(crate) fn find() -> Result<Self, KernelError> {
        let mut found = Vec::new();
        for variant in Variant::BOTH {
            let pairs = Family::BOTH.map(|family| pair(variant, family));
            if let [Some(v4), Some(v6)] = pairs {
                found.extend([(variant, Family::V4, v4), (variant, Family::V6, v6)]);
            }
        }
        if found.is_empty() {
            let error = KernelError::answer("run iptables-restore", "there is no such program");
            return Err(error.with_remedy(NO_TOOLS));
        }
        Ok(Self {
            found,
            #[cfg(feature = "testing")]
            faults: None,
        })
    }

    /// Sets a fault plan that decides about the tools that are run.
    #[cfg(feature = "testing")]
    pub(crate) fn set_faults(&mut self, faults: Faults) {
        self.faults = Some(faults);
    }

    /// Runs a tool, unless the fault plan of a test refuses it.
    #[cfg(feature = "testing")]
    fn run<T>(
        &self,
        writes: bool,
        text: &str,
        run: impl FnOnce() -> Result<T, KernelError>,
    ) -> Result<T, KernelError> {
        match &self.faults {
            Some(faults) => faults.run(writes, text, run),
            None => run(),
        }
    }

    #[cfg(not(feature = "testing"))]
    #[expect(clippy::unused_self, reason = "a test has its plan there")]
    fn run<T>(
        &self,
        _writes: bool,
        _text: &str,
        run: impl FnOnce() -> Result<T, KernelError>,
    ) -> Result<T, KernelError> {
        run()
    }

    pub(crate) fn has(&self, variant: Variant) -> bool {
        self.found.iter().any(|(of, ..)| *of == variant)
    }

    fn pair(&self, variant: Variant, family: Family) -> Result<&Pair, KernelError> {
        let pair = self.found.iter().find(|(v, f, _)| (*v, *f) == (variant, family));
        pair.map(|(_, _, pair)| pair).ok_or_else(|| {
            let name = variant.command(family);
            KernelError::answer(format!("run {name}"), "there is no such program")
                .with_remedy(NO_TOOLS)
        })
    }

    /// Returns all rules of a variant and family.
    pub(crate) fn save(&self, variant: Variant, family: Family) -> Result<String, KernelError> {
        let text = format!("{}-save", variant.command(family));
        let pair = self.pair(variant, family)?;
        self.run(false, &text, || {
            let output = Command::new(&pair.save).stdin(Stdio::null()).output();
            let output = output.map_err(|error| KernelError::io(&text, &error))?;
            succeeded(&text, &output)?;
            // Comments of other programs may contain any bytes.
            Ok(String::from_utf8_lossy(&output.stdout).into_owned())
        })
    }

    /// Applies changes to one table, all or none; objects not named in the script stay as they are.
    pub(crate) fn restore(
        &self,
        variant: Variant,
        family: Family,
        script: &str,
    ) -> Result<(), KernelError> {
        let table = script.lines().next().unwrap_or_default().trim_start_matches('*');
        let text = format!("{}-restore --noflush (table {table})", variant.command(family));
        let pair = self.pair(variant, family)?;
        self.run(true, &text, || feed(&pair.restore, &text, script))
    }
}

/// Passes the script to the tool and waits for its end.
fn feed(restore: &Path, text: &str, script: &str) -> Result<(), KernelError> {
    let failed = |error: std::io::Error| KernelError::io(text, &error);
    let mut child = Command::new(restore)
        .args(["--noflush", "-w", PATIENCE])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    // The tool prints little before it has read all input, so the pipes cannot deadlock; a broken
    // pipe means that the tool has already reported the reason.
    let written = child.stdin.take().map_or(Ok(()), |mut stdin| stdin.write_all(script.as_bytes()));
    let output = child.wait_with_output().map_err(failed)?;
    succeeded(text, &output)?;
    written.map_err(failed)
}

fn succeeded(text: &str, output: &Output) -> Result<(), KernelError> {
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let said = said.split_whitespace().collect::<Vec<_>>().join(" ");
    let locked = said.contains("xtables lock");
    if output.status.code() == Some(BUSY) && locked {
        let error = KernelError::refused(text, errno::EAGAIN).with_words(Some(said));
        return Err(error.with_remedy(HELD));
    }
    Err(KernelError::answer(text, "the tool refused it").with_words(Some(said)))
}

fn pair(variant: Variant, family: Family) -> Option<Pair> {
    let by_name = |tool: &str| find(&format!("{}-{tool}", variant.command(family)));
    if let (Some(save), Some(restore)) = (by_name("save"), by_name("restore")) {
        return Some(Pair { save, restore });
    }
    // A host with one variant may have it under its plain name alone.
    let plain = match family {
        Family::V4 => "iptables",
        Family::V6 => "ip6tables",
    };
    let version = Command::new(find(plain)?).arg("-V").stdin(Stdio::null()).output().ok()?;
    let version = String::from_utf8_lossy(&version.stdout).into_owned();
    let is = if version.contains("(nf_tables)") { Variant::Nft } else { Variant::Legacy };
    let plain = |tool: &str| find(&format!("{plain}-{tool}")).filter(|_| is == variant);
    Some(Pair { save: plain("save")?, restore: plain("restore")? })
}

/// Finds a program in `PATH` and in `/usr/sbin` and `/sbin`, which a service's `PATH` may lack.
fn find(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let usual = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    let mut places = env::split_paths(&path).chain(usual).map(|place| place.join(name));
    places.find(|file| Path::is_file(file))
}
