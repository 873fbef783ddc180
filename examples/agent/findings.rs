//! Findings about the file: policies that cannot be read, and the findings of the plan.

use std::fmt;

use egress_datapath::preflight::Problem;
use egress_datapath::{Changes, DenyReason, Durations, Finding, PolicyError, PolicyId, Report};
use serde::Serialize;

use super::config::{Config, Unreadable};

/// A report, with the policies of the file that cannot be read among its findings.
#[derive(Serialize)]
pub(crate) struct Told<'a> {
    settled: bool,
    findings: Vec<About<'a>>,
    pub(crate) changes: &'a Changes,
    durations: &'a Durations,
    /// Problems with routing rules of other programs, which take effect after the changes.
    pub(crate) problems: Vec<Problem>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum About<'a> {
    Unreadable { code: &'static str, message: String, policy: &'a PolicyId },
    Finding(&'a Finding),
}

impl<'a> Told<'a> {
    pub(crate) fn of(report: &'a Report, config: Option<&'a Config>) -> Self {
        let unreadable = config.map_or(&[][..], |config| &config.unreadable);
        let known = |id: &PolicyId| unreadable.iter().any(|one| one.policy == *id);
        // The policy in place of one that cannot be read has no gateway.
        let repeats = |finding: &&Finding| match finding {
            Finding::Denied { policy, reason: DenyReason::NoGateway, .. }
            | Finding::Bypassed { policy, reason: DenyReason::NoGateway, .. } => known(policy),
            _ => false,
        };
        let own = unreadable.iter().map(|one: &Unreadable| About::Unreadable {
            code: "unreadable_policy",
            message: one.to_string(),
            policy: &one.policy,
        });
        let findings = report.findings.iter().filter(|finding| !repeats(finding));
        Self {
            settled: report.settled,
            findings: own.chain(findings.map(About::Finding)).collect(),
            changes: &report.changes,
            durations: &report.durations,
            problems: Vec::new(),
        }
    }

    /// Returns whether a policy or node is closed or left out by an error in the file.
    pub(crate) fn closes(&self) -> bool {
        self.findings.iter().any(|about| match about {
            About::Unreadable { .. } | About::Finding(Finding::InvalidNode { .. }) => true,
            // Without sources there is nothing to close.
            About::Finding(Finding::InvalidPolicy { errors, .. }) => {
                *errors != [PolicyError::NoSources]
            }
            About::Finding(Finding::Denied { reason, .. } | Finding::Bypassed { reason, .. }) => {
                *reason == DenyReason::TooManyGateways
            }
            About::Finding(_) => false,
        })
    }
}

/// The line of a problem, with the family that it is about.
pub(crate) fn line(problem: &Problem) -> String {
    let (severity, remedy) = (problem.severity(), problem.remedy());
    match problem.family() {
        Some(family) => format!("{severity} ({family}): {problem}; {remedy}"),
        None => format!("{severity}: {problem}; {remedy}"),
    }
}

/// The changes, and a line for each finding and each problem.
impl fmt::Display for Told<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.changes)?;
        self.findings.iter().try_for_each(|about| match about {
            About::Unreadable { message, .. } => writeln!(f, "note: {message}"),
            About::Finding(finding) => writeln!(f, "note: {finding}"),
        })?;
        self.problems.iter().try_for_each(|problem| writeln!(f, "{}", line(problem)))
    }
}
