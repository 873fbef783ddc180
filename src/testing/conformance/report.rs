//! What became of cases.

use std::fmt;
use std::io;

use super::{Case, Failure};

/// What became of a case.
#[derive(Debug)]
pub enum Outcome {
    /// All that it shows is so.
    Passed,
    /// Something is not.
    Failed(Failure),
    /// It could not be tried.
    Skipped(Missing),
}

/// What a case needs and the machine does not have.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Missing {
    /// Network namespaces, for this user; see [`isolate`](super::super::lab::isolate).
    #[error("no lab can be built: {0}")]
    Lab(io::Error),
    /// A program that plays other software on the nodes.
    #[error("program {0} cannot be run: {1}")]
    Program(&'static str, io::Error),
}

/// A case and what became of it.
#[derive(Debug)]
pub struct Verdict {
    /// The case.
    pub case: Case,
    /// What became of it.
    pub outcome: Outcome,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Case { name, shows, .. } = self.case;
        match &self.outcome {
            Outcome::Passed => write!(f, "passed   {name}: {shows}"),
            Outcome::Failed(failure) => write!(f, "FAILED   {name}: {shows}: {failure}"),
            Outcome::Skipped(missing) => write!(f, "SKIPPED  {name}: {shows}: {missing}"),
        }
    }
}

/// What became of all cases that were run.
///
/// `Display` writes a line for each, and one with the counts.
#[derive(Debug)]
pub struct Report {
    /// In the order in which they were run.
    pub verdicts: Vec<Verdict>,
}

impl Report {
    /// Whether there were cases and all of them passed; one that was skipped has not.
    pub fn is_passed(&self) -> bool {
        let passed = |verdict: &Verdict| matches!(verdict.outcome, Outcome::Passed);
        !self.verdicts.is_empty() && self.verdicts.iter().all(passed)
    }

    /// The cases that failed, each with why.
    pub fn failed(&self) -> impl Iterator<Item = (&Case, &Failure)> {
        self.verdicts.iter().filter_map(|verdict| match &verdict.outcome {
            Outcome::Failed(failure) => Some((&verdict.case, failure)),
            Outcome::Passed | Outcome::Skipped(_) => None,
        })
    }

    /// The cases that could not be tried, each with what is missing.
    pub fn skipped(&self) -> impl Iterator<Item = (&Case, &Missing)> {
        self.verdicts.iter().filter_map(|verdict| match &verdict.outcome {
            Outcome::Skipped(missing) => Some((&verdict.case, missing)),
            Outcome::Passed | Outcome::Failed(_) => None,
        })
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for verdict in &self.verdicts {
            writeln!(f, "{verdict}")?;
        }
        let (failed, skipped) = (self.failed().count(), self.skipped().count());
        let passed = self.verdicts.len() - failed - skipped;
        writeln!(f, "{passed} passed, {failed} failed, {skipped} skipped")
    }
}
