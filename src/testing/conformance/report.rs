//! Results of conformance cases.

use std::fmt;
use std::io;

use super::{Case, Failure};

/// The result of a case.
#[derive(Debug)]
pub enum Outcome {
    /// The property holds.
    Passed,
    /// The property does not hold.
    Failed(Failure),
    /// The case could not be run.
    Skipped(Missing),
}

/// A requirement of a case that the machine does not meet.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Missing {
    /// This user cannot create network namespaces; see [`isolate`](super::super::lab::isolate).
    #[error("no lab can be built: {0}")]
    Lab(io::Error),
    /// The program that installs rules of other software on the nodes cannot be run.
    #[error("program {0} cannot be run: {1}")]
    Program(&'static str, io::Error),
}

/// A case and its result.
#[derive(Debug)]
pub struct Verdict {
    /// The case.
    pub case: Case,
    /// The result of the case.
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

/// The results of all cases that were run.
///
/// `Display` prints one line for each case, and one with the counts.
#[derive(Debug)]
pub struct Report {
    /// The cases with their results, in the order of the run.
    pub verdicts: Vec<Verdict>,
}

impl Report {
    /// Returns whether there were cases and all of them passed; a skipped case has not passed.
    pub fn is_passed(&self) -> bool {
        let passed = |verdict: &Verdict| matches!(verdict.outcome, Outcome::Passed);
        !self.verdicts.is_empty() && self.verdicts.iter().all(passed)
    }

    /// Returns the failed cases, each with its failure.
    pub fn failed(&self) -> impl Iterator<Item = (&Case, &Failure)> {
        self.verdicts.iter().filter_map(|verdict| match &verdict.outcome {
            Outcome::Failed(failure) => Some((&verdict.case, failure)),
            Outcome::Passed | Outcome::Skipped(_) => None,
        })
    }

    /// Returns the skipped cases, each with the missing requirement.
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
