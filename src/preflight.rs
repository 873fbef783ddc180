//! Checks this host for problems that keep the datapath from working, before programming it.
//!
//! [`Preflight`] reads the objects of other programs on the host: sysctl settings, interfaces,
//! addresses, routing rules and tables, and nf_tables rules, those of `iptables-nft` included. It
//! compares them with the plan of the datapath and changes nothing. Each finding is a [`Problem`]:
//! a sentence with the facts, a severity and a remedy.
//!
//! Run it in the network namespace and with the privilege of the datapath, before the first
//! [`reconcile`](crate::Reconciler::reconcile) and whenever traffic does not flow as it should.
//!
//! ```no_run
//! use egress_datapath::preflight::{Preflight, Severity};
//! # fn check(cluster: egress_datapath::Cluster, policies: Vec<egress_datapath::EgressPolicy>)
//! # -> Result<(), Box<dyn std::error::Error>> {
//! let problems = Preflight::new(&cluster, &policies).run()?;
//! for problem in &problems {
//!     println!("{}: {problem}; {}", problem.severity(), problem.remedy());
//! }
//! if problems.iter().any(|problem| problem.severity() == Severity::Broken) {
//!     return Err("this host cannot carry egress traffic yet".into());
//! }
//! # Ok(())
//! # }
//! ```
//!
//! # Limits
//!
//! The check does not see the rules of legacy iptables, eBPF programs attached by `bpf` links (TCX),
//! packets that the network between the nodes drops, and sockets other than VXLAN devices
//! on the tunnel's UDP port. Of a reverse path filter it does not evaluate lookups in sets.

mod devices;
mod egress_ips;
pub(crate) mod facts;
mod fast_paths;
mod firewall;
pub(crate) mod foreign;
pub(crate) mod probe;
mod problem;
mod remedy;
mod reverse_path;
mod routing;
#[cfg(feature = "serde")]
mod serialize;
mod settings;
mod terms;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;

use crate::alloc::TableRange;
use crate::cluster::{Backend, Cluster, Node};
use crate::error::KernelError;
use crate::policy::Policy;
use crate::types::{Family, NodeName, PolicyId};

pub use crate::kernel::nft::KernelPart;
use facts::Facts;
pub use problem::Problem;
pub use terms::{DropHook, FastPath, MarkKind, Severity};

/// Check of this host for problems with the datapath of one cluster.
#[derive(Clone, Debug)]
pub struct Preflight<'a> {
    cluster: &'a Cluster,
    tables: TableRange,
    /// Address families of the traffic.
    families: BTreeSet<Family>,
    /// Source prefixes of the policies.
    sources: Vec<IpNet>,
    egress_ips: BTreeMap<IpAddr, Wearer>,
    /// Gateway nodes other than this node that the policies name.
    gateways: BTreeSet<NodeName>,
    /// Set if a policy names this node as its gateway, or if there are no policies.
    is_gateway: bool,
}

/// Use of an egress IP by the policies.
#[derive(Clone, Debug)]
struct Wearer {
    policy: PolicyId,
    /// Set if this node is the gateway of one of the policies that use the egress IP.
    here: bool,
    /// Single-address sources that use the egress IP on this node, counted once per policy.
    pods: usize,
}

impl<'a> Preflight<'a> {
    /// Creates a check for this cluster and these policies, with the default routing table range.
    ///
    /// Without policies the check covers the families of this node's tunnel addresses.
    pub fn new<P: Policy>(cluster: &'a Cluster, policies: impl IntoIterator<Item = P>) -> Self {
        let mut preflight = Self {
            cluster,
            tables: TableRange::default(),
            families: BTreeSet::new(),
            sources: Vec::new(),
            egress_ips: BTreeMap::new(),
            gateways: BTreeSet::new(),
            is_gateway: false,
        };
        for policy in policies {
            preflight.add(&policy);
        }
        if preflight.sources.is_empty() {
            let nets = preflight.here().into_iter().flat_map(|node| &node.tunnel);
            preflight.families = nets.map(Family::of_net).collect();
            preflight.is_gateway = true;
        }
        preflight
    }

    /// Sets another range of routing tables.
    #[must_use]
    pub const fn with_tables(mut self, tables: TableRange) -> Self {
        self.tables = tables;
        self
    }

    /// Runs the check in the network namespace of the calling thread; the worst problems first.
    ///
    /// For a cluster with an iptables backend the check runs `iptables-legacy-save`, where the kernel
    /// has tables of legacy iptables.
    ///
    /// The check needs `CAP_NET_ADMIN`. Its absence is reported as a problem ([`Problem::Denied`]),
    /// and facts that cannot be read are not judged.
    ///
    /// # Errors
    ///
    /// Fails if a part of the kernel could not be read; the error names it.
    pub fn run(&self) -> Result<Vec<Problem>, KernelError> {
        let devices = [self.cluster.tunnel.device.as_str(), "lo"];
        let runs_tools = matches!(self.cluster.backend, Backend::Iptables(_));
        Ok(self.judge(&probe::facts(&devices, runs_tools)?))
    }

    /// Returns the address families in use that none of these problems breaks.
    ///
    /// A problem about one family alone leaves the policies of the other one in force.
    pub fn ready(&self, problems: &[Problem]) -> BTreeSet<Family> {
        let breaks = |problem: &&Problem| problem.severity() == Severity::Broken;
        let broken = |family: &Family| {
            let mut broken = problems.iter().filter(breaks);
            broken.any(|problem| problem.family().is_none_or(|about| about == *family))
        };
        self.families.iter().copied().filter(|family| !broken(family)).collect()
    }

    /// Checks the routing rules and tables alone, which takes milliseconds: for every audit.
    ///
    /// A program that adds a rule without a priority, such as `wg-quick`, gets one ahead of the
    /// datapath's rules at any time. [`Watch`](crate::Watch) reports such a rule.
    ///
    /// # Errors
    ///
    /// Fails if the rules or routes could not be read.
    pub fn run_routing(&self) -> Result<Vec<Problem>, KernelError> {
        let mut problems = Vec::new();
        self.judge_routing(&probe::routing()?, &mut problems);
        problems.sort_by_key(|problem| std::cmp::Reverse(problem.severity()));
        Ok(problems)
    }

    fn add(&mut self, policy: &impl Policy) {
        let egress_ip = policy.egress_ip();
        let families = policy.sources().iter().map(Family::of_net);
        self.families.extend(families.filter(|family| egress_ip.serves(*family)));
        self.sources.extend(policy.sources());
        let Some(gateway) = policy.gateway() else { return };
        let here = *gateway == self.cluster.node;
        self.is_gateway |= here;
        if !here {
            self.gateways.insert(gateway.clone());
        }
        for address in egress_ip.addresses() {
            let wearer = Wearer { policy: policy.id().clone(), here, pods: 0 };
            let wearer = self.egress_ips.entry(address).or_insert(wearer);
            wearer.here |= here;
            if here {
                let family = Family::of(address);
                let pod = |net: &&IpNet| {
                    net.prefix_len() == net.max_prefix_len() && Family::of_net(net) == family
                };
                wearer.pods += policy.sources().iter().filter(pod).count();
            }
        }
    }

    fn judge(&self, facts: &Facts) -> Vec<Problem> {
        let mut problems = Vec::new();
        self.judge_settings(facts, &mut problems);
        self.judge_devices(facts, &mut problems);
        self.judge_egress_ips(facts, &mut problems);
        self.judge_routing(facts, &mut problems);
        self.judge_firewall(facts, &mut problems);
        self.judge_reverse_path_filters(facts, &mut problems);
        self.judge_fast_paths(facts, &mut problems);
        // The sort is stable, so that related problems stay adjacent.
        problems.sort_by_key(|problem| std::cmp::Reverse(problem.severity()));
        problems
    }

    fn here(&self) -> Option<&'a Node> {
        self.cluster.nodes.iter().find(|node| node.name == self.cluster.node)
    }

    /// Source address of the outer VXLAN packets.
    fn underlay(&self) -> Option<IpAddr> {
        self.here()?.underlay.iter().copied().min_by_key(|address| Family::of(*address))
    }

    /// Bits of the firewall mark that the datapath tests and writes.
    fn mark_bits(&self) -> u32 {
        let given = self.cluster.nodes.iter().filter_map(|node| node.mark);
        self.cluster.marks.tested(given)
    }
}
