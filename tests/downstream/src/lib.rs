//! A node agent of some CNI plugin: it is told of pods and of rules that select them by label, and
//! makes the node carry them out.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use egress_datapath::alloc::{MarkPool, TablePool, TableRange};
use egress_datapath::{
    Cluster, Datapath, Destinations, EgressIp, Error, KernelDatapath, MarkAllocator, MarkLayout,
    NodeName, Policy, PolicyId, Reconciler, Report, TableAllocator,
};
use ipnet::IpNet;

/// Pods with this label leave the cluster by this node, wearing this address.
#[derive(Clone, Debug)]
pub struct Rule {
    /// Namespace and name.
    pub id: PolicyId,
    /// What pods must be labelled with.
    pub label: String,
    /// By this node; by none, they must not leave.
    pub gateway: Option<NodeName>,
    /// Wearing this.
    pub egress_ip: EgressIp,
}

/// A rule and the pods that it selects now: the plugin's own type for a policy.
#[derive(Debug)]
struct Selected<'a> {
    rule: &'a Rule,
    rank: u32,
    pods: Vec<IpNet>,
}

impl Policy for Selected<'_> {
    fn id(&self) -> &PolicyId {
        &self.rule.id
    }

    fn priority(&self) -> u32 {
        self.rank
    }

    fn sources(&self) -> &[IpNet] {
        &self.pods
    }

    fn destinations(&self) -> &Destinations {
        &Destinations::External
    }

    fn gateway(&self) -> Option<&NodeName> {
        self.rule.gateway.as_ref()
    }

    fn egress_ip(&self) -> EgressIp {
        self.rule.egress_ip
    }
}

/// What runs on every node.
#[derive(Debug)]
pub struct Agent<D, M = MarkPool, T = TablePool> {
    egress: Reconciler<D, M, T>,
    labels: BTreeMap<IpAddr, BTreeSet<String>>,
}

impl Agent<KernelDatapath> {
    /// In charge of the kernel of the network namespace that the calling thread is in.
    pub fn open() -> Result<Self, Error> {
        Ok(Self::of(Reconciler::open(MarkLayout::SEED, TableRange::default())?))
    }
}

impl<D: Datapath, M: MarkAllocator, T: TableAllocator> Agent<D, M, T> {
    /// With a reconciler of whatever kind.
    pub fn of(egress: Reconciler<D, M, T>) -> Self {
        Self { egress, labels: BTreeMap::new() }
    }

    /// A pod has come, or has other labels now.
    pub fn label(&mut self, pod: IpAddr, labels: impl IntoIterator<Item = String>) {
        self.labels.insert(pod, labels.into_iter().collect());
    }

    /// A pod has gone.
    pub fn forget(&mut self, pod: IpAddr) {
        self.labels.remove(&pod);
    }

    /// Makes the node carry out the rules for the pods there are; the first that selects a pod
    /// counts.
    pub fn sync(&mut self, cluster: &Cluster, rules: &[Rule]) -> Result<Report, Error> {
        let labels = &self.labels;
        let selected = (0..).zip(rules).filter_map(|(rank, rule)| {
            let has = |(_, labels): &(&IpAddr, &BTreeSet<String>)| labels.contains(&rule.label);
            let pods = labels.iter().filter(has).map(|(pod, _)| IpNet::from(*pod));
            let pods: Vec<IpNet> = pods.collect();
            (!pods.is_empty()).then_some(Selected { rule, rank, pods })
        });
        let selected: Vec<Selected<'_>> = selected.collect();
        self.egress.reconcile(cluster, &selected)
    }

    /// Takes everything back.
    pub fn stop(&mut self) -> Result<Report, Error> {
        self.egress.remove()
    }

    /// What it makes changes to.
    pub fn datapath(&mut self) -> &mut D {
        self.egress.datapath()
    }
}
