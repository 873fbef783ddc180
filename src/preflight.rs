//! What on this host may keep the datapath from working, found before it is programmed.
//!
//! A [`Preflight`] reads what is there of other people's: settings, devices, addresses, routing
//! rules and tables, and nf_tables rules including those of `iptables-nft`. It judges that
//! against what the datapath is going to do, and changes nothing. Whatever it finds is a
//! [`Problem`]: a sentence with the facts, how bad it is, and what to do about it.
//!
//! Run it in the network namespace and with the privilege of the datapath, before the first
//! [`reconcile`](crate::Reconciler::reconcile) and whenever traffic does not do what it should.
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
//! # What it cannot see
//!
//! The rules of legacy iptables, programs attached to devices (eBPF), what the network between
//! the nodes drops, and sockets other than VXLAN devices on the tunnel's UDP port.

mod devices;
mod egress_ips;
pub(crate) mod facts;
mod firewall;
pub(crate) mod foreign;
pub(crate) mod probe;
mod problem;
mod remedy;
mod routing;
mod settings;
mod terms;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;

use crate::alloc::TableRange;
use crate::cluster::{Cluster, Node};
use crate::error::KernelError;
use crate::policy::Policy;
use crate::types::{Family, NodeName, PolicyId};

pub use crate::kernel::nft::KernelPart;
use facts::Facts;
pub use problem::Problem;
pub use terms::{DropHook, MarkKind, Severity};

/// A look at this host with the eyes of the datapath that is to run on it.
#[derive(Clone, Debug)]
pub struct Preflight<'a> {
    cluster: &'a Cluster,
    tables: TableRange,
    /// Families of the traffic.
    families: BTreeSet<Family>,
    /// Of policies, whose packets they are.
    sources: Vec<IpNet>,
    egress_ips: BTreeMap<IpAddr, Wearer>,
    /// Other nodes that this one sends packets to.
    gateways: BTreeSet<NodeName>,
}

/// Who wears an egress IP.
#[derive(Clone, Debug)]
struct Wearer {
    policy: PolicyId,
    /// Whether this node is the gateway of one of the policies that wear it.
    here: bool,
    /// Single sources that wear it here, once for each policy.
    pods: usize,
}

impl<'a> Preflight<'a> {
    /// A look for what this cluster and these policies need, with the default table range.
    ///
    /// Without policies it looks for what the families of this node's tunnel addresses need.
    pub fn new<P: Policy>(cluster: &'a Cluster, policies: impl IntoIterator<Item = P>) -> Self {
        let mut preflight = Self {
            cluster,
            tables: TableRange::default(),
            families: BTreeSet::new(),
            sources: Vec::new(),
            egress_ips: BTreeMap::new(),
            gateways: BTreeSet::new(),
        };
        for policy in policies {
            preflight.add(&policy);
        }
        if preflight.sources.is_empty() {
            let nets = preflight.here().into_iter().flat_map(|node| &node.tunnel);
            preflight.families = nets.map(Family::of_net).collect();
        }
        preflight
    }

    /// The same for another range of routing tables.
    #[must_use]
    pub const fn with_tables(mut self, tables: TableRange) -> Self {
        self.tables = tables;
        self
    }

    /// Looks, in the network namespace of the calling thread; the worst problems come first.
    ///
    /// It needs `CAP_NET_ADMIN`; without it, that is a problem like others, and what cannot be
    /// read is not judged.
    ///
    /// # Errors
    ///
    /// The part of the kernel that could not be read.
    pub fn run(&self) -> Result<Vec<Problem>, KernelError> {
        let devices = [self.cluster.tunnel.device.as_str(), "lo"];
        Ok(self.judge(&probe::facts(&devices)?))
    }

    fn add(&mut self, policy: &impl Policy) {
        let egress_ip = policy.egress_ip();
        let families = policy.sources().iter().map(Family::of_net);
        self.families.extend(families.filter(|family| egress_ip.serves(*family)));
        self.sources.extend(policy.sources());
        let Some(gateway) = policy.gateway() else { return };
        let here = *gateway == self.cluster.node;
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
        // A stable sort, so that what belongs together stays together.
        problems.sort_by_key(|problem| std::cmp::Reverse(problem.severity()));
        problems
    }

    fn here(&self) -> Option<&'a Node> {
        self.cluster.nodes.iter().find(|node| node.name == self.cluster.node)
    }

    /// The address that outer packets leave from.
    fn underlay(&self) -> Option<IpAddr> {
        self.here()?.underlay.iter().copied().min_by_key(|address| Family::of(*address))
    }

    /// The bits of the mark that are compared and written.
    fn mark_bits(&self) -> u32 {
        let given = self.cluster.nodes.iter().filter_map(|node| node.mark);
        self.cluster.marks.tested(given)
    }
}
