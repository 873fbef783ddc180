//! The agent passes the crate's own cases, with real packets between network namespaces.
//!
//! It has a `main` of its own, because an unprivileged process can make namespaces only while it
//! has one thread.

use std::error::Error;

use downstream::{Agent, Rule};
use egress_datapath::testing::conformance::{BoxError, CASES, Case, Integration, run};
use egress_datapath::testing::lab;
use egress_datapath::{Cluster, EgressPolicy, KernelDatapath};

/// The agent, told of pods and rules such that the policies are what it makes of them.
struct Tested(Agent<KernelDatapath>);

impl Integration for Tested {
    fn apply(&mut self, cluster: &Cluster, policies: &[EgressPolicy]) -> Result<(), BoxError> {
        let mut rules = Vec::new();
        let mut ranked: Vec<&EgressPolicy> = policies.iter().collect();
        ranked.sort_by_key(|policy| (policy.priority, &policy.id));
        for pod in [lab::POD_A, lab::STRANGER, lab::POD_B, lab::POD_C].concat() {
            let selects =
                |policy: &&&EgressPolicy| policy.sources.iter().any(|source| source.contains(&pod));
            let labels = ranked.iter().filter(selects).map(|policy| policy.id.to_string());
            self.0.label(pod, labels);
        }
        for policy in ranked {
            rules.push(Rule {
                id: policy.id.clone(),
                label: policy.id.to_string(),
                gateway: policy.gateway.clone(),
                egress_ip: policy.egress_ip,
            });
        }
        self.0.sync(cluster, &rules)?;
        Ok(())
    }

    fn remove(&mut self) -> Result<(), BoxError> {
        self.0.stop()?;
        Ok(())
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    lab::isolate()?;
    // Its rules have no destinations, and select pods only.
    let beyond = ["destination-list", "narrow-in-wide", "specific-first", "default-route"];
    let beyond = |case: &&Case| beyond.contains(&case.name);
    let report = run(CASES.iter().filter(|case| !beyond(case)), |_| Ok(Tested(Agent::open()?)));
    print!("{report}");
    if report.is_passed() { Ok(()) } else { Err("not every case was passed".into()) }
}
