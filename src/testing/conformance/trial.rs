//! A running conformance case: a lab, and the program under test on each of its nodes.

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::net::IpAddr;
use std::process::{Command, Stdio};

use crate::{Cluster, EgressPolicy};

use super::super::lab::{Host, Lab, Netns, Pair};
pub(super) use super::super::lab::{dual, policy};
use super::{BoxError, Failure, Integration};

pub(super) type Result<T = ()> = std::result::Result<T, Failure>;
pub(super) type Start<'a> =
    dyn FnMut(&Host) -> std::result::Result<Box<dyn Integration>, BoxError> + Send + 'a;

/// A running conformance case.
pub(super) struct Trial<'a> {
    /// The nodes in order; a field before `lab`, so that the programs are dropped before the lab.
    nodes: Vec<Node>,
    start: &'a mut Start<'a>,
    pub(super) lab: Lab,
}

struct Node {
    cluster: Cluster,
    integration: Box<dyn Integration>,
}

impl<'a> Trial<'a> {
    pub(super) fn new(lab: Lab, start: &'a mut Start<'a>) -> Result<Self> {
        let mut trial = Self { nodes: Vec::new(), start, lab };
        trial.restart()?;
        Ok(trial)
    }

    /// Restarts the program under test on every node.
    pub(super) fn restart(&mut self) -> Result {
        self.nodes.clear();
        for host in self.lab.nodes() {
            let cluster = self.lab.cluster(host)?;
            let started = host.netns.run(|| (self.start)(host))?;
            let integration = started.map_err(|error| failed(&cluster, "start", error))?;
            self.nodes.push(Node { cluster, integration });
        }
        Ok(())
    }

    /// Changes the cluster that every node is given.
    pub(super) fn change(&mut self, change: impl Fn(&mut Cluster)) {
        self.nodes.iter_mut().for_each(|node| change(&mut node.cluster));
    }

    /// Applies the policies on every node, from the last to the first: gateways before their
    /// clients.
    pub(super) fn apply(&mut self, policies: &[EgressPolicy]) -> Result {
        let mut nodes = self.lab.nodes().into_iter().zip(&mut self.nodes).rev();
        nodes.try_for_each(|(host, node)| node.apply(host, policies))
    }

    /// Applies the policies on one node.
    pub(super) fn apply_to(&mut self, name: &str, policies: &[EgressPolicy]) -> Result {
        let mut nodes = self.lab.nodes().into_iter().zip(&mut self.nodes);
        let found = nodes.find(|(host, _)| host.name == name);
        found.map_or(Ok(()), |(host, node)| node.apply(host, policies))
    }

    /// Removes everything on every node, clients before their gateways.
    pub(super) fn remove(&mut self) -> Result {
        for (host, node) in self.lab.nodes().into_iter().zip(&mut self.nodes) {
            let removed = host.netns.run(|| node.integration.remove())?;
            removed.map_err(|error| failed(&node.cluster, "remove", error))?;
        }
        Ok(())
    }

    /// Returns all sources of packets that the server received since the last call.
    pub(super) fn seen(&self) -> BTreeSet<IpAddr> {
        self.lab.outside.take_seen().into_iter().map(|(source, _)| source).collect()
    }

    /// Checks that the server received packets of exactly these sources since the last call.
    pub(super) fn saw(&self, sources: &[Pair]) -> Result {
        let (seen, expected) = (self.seen(), set(sources));
        if seen == expected { Ok(()) } else { Err(Failure::Seen { seen, expected }) }
    }

    /// Checks that the server received packets of no other sources since the last call.
    pub(super) fn saw_no_others(&self, sources: &[Pair]) -> Result {
        let (seen, expected) = (self.seen(), set(sources));
        if seen.is_subset(&expected) { Ok(()) } else { Err(Failure::Seen { seen, expected }) }
    }

    /// Installs a masquerade of the pods on every node, as most CNI plugins do.
    pub(super) fn masquerade(&self, table: &str) -> Result {
        let rules = format!(
            "table inet {table} {{
                chain postrouting {{
                    type nat hook postrouting priority srcnat;
                    ip daddr != 10.244.0.0/16 ip saddr 10.244.0.0/16 masquerade
                    ip6 daddr != fd44::/16 ip6 saddr fd44::/16 masquerade
                }}
            }}"
        );
        self.lab.nodes().into_iter().try_for_each(|host| nft(&host.netns, &rules))
    }

    /// Returns the name and the network namespace of a probe's sender.
    pub(super) fn pod_a(&self) -> (&'static str, &Netns) {
        ("pod-a", &self.lab.pod_a)
    }

    pub(super) fn pod_b(&self) -> (&'static str, &Netns) {
        ("pod-b", &self.lab.pod_b)
    }

    pub(super) fn pod_c(&self) -> (&'static str, &Netns) {
        ("pod-c", &self.lab.pod_c)
    }

    pub(super) fn stranger(&self) -> (&'static str, &Netns) {
        ("the stranger", &self.lab.stranger)
    }

    pub(super) fn server(&self) -> (&'static str, &Netns) {
        ("the server", &self.lab.server)
    }

    pub(super) fn node_a(&self) -> (&'static str, &Netns) {
        ("node-a", &self.lab.node_a.netns)
    }

    pub(super) fn node_b(&self) -> (&'static str, &Netns) {
        ("node-b", &self.lab.node_b.netns)
    }
}

impl Node {
    fn apply(&mut self, host: &Host, policies: &[EgressPolicy]) -> Result {
        let Self { cluster, integration } = self;
        let applied = host.netns.run(|| integration.apply(cluster, policies))?;
        applied.map_err(|error| failed(&self.cluster, "apply", error))
    }
}

fn failed(cluster: &Cluster, doing: &'static str, error: BoxError) -> Failure {
    Failure::Integration { node: cluster.node.clone(), doing, error }
}

pub(super) fn set(pairs: &[Pair]) -> BTreeSet<IpAddr> {
    pairs.as_flattened().iter().copied().collect()
}

/// Checks that the program `nft` can be run.
pub(super) fn have_nft() -> io::Result<()> {
    Command::new("nft").arg("-v").stdout(Stdio::null()).stderr(Stdio::null()).status().map(drop)
}

/// Loads rules with `nft -f` in a namespace.
pub(super) fn nft(netns: &Netns, rules: &str) -> Result {
    let output = netns.run(|| {
        let mut nft = Command::new("nft")
            .args(["-f", "-"])
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        if let Some(mut stdin) = nft.stdin.take() {
            stdin.write_all(rules.as_bytes())?;
        }
        nft.wait_with_output()
    })??;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(io::Error::other(format!("nft: {said}")).into())
}
