//! Traffic of pods leaves the cluster through a gateway node, with a stable egress IP.
//!
//! The example builds three nodes, their pods and a server outside the cluster from network
//! namespaces, applies the same policies on each node, sends real packets and prints their source
//! addresses at the server. It needs neither root nor any other program; its exit status is 1 if
//! any packet had a wrong source address. In another crate it needs `egress-datapath` with the
//! feature `testing`.
//!
//! ```text
//! cargo run --example gateway
//! ```

use std::collections::BTreeSet;
use std::error::Error;
use std::net::IpAddr;
use std::process::ExitCode;
use std::time::Instant;

use egress_datapath::alloc::TableRange;
use egress_datapath::testing::lab::{
    self, EIP_B, EIP_C, Lab, NODE_B_OUTSIDE, Netns, OTHER_SERVER, POD_A, POD_B, Pair, Proto,
    SERVER, STRANGER, hosts, probe_patiently,
};
use egress_datapath::{
    Cluster, Destinations, EgressIp, EgressPolicy, KernelDatapath, NodeName, PolicyId, Reconciler,
};

fn main() -> ExitCode {
    match run() {
        Ok(0) => {
            println!("\neverything as expected");
            ExitCode::SUCCESS
        }
        Ok(wrong) => {
            println!("\n{wrong} not as expected");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// Runs all steps; returns the number of failed checks.
fn run() -> Result<usize, Box<dyn Error>> {
    // From here on nothing changes the network of the machine.
    lab::isolate()?;
    let start = Instant::now();
    let lab = Lab::new()?;
    println!("three nodes, four pods, a router and a server: built in {:.0?}", start.elapsed());
    let mut nodes = Nodes::open(&lab)?;
    let mut table = Table::default();

    table.step("no policy");
    table.expect("pod-a", &lab.pod_a, SERVER, POD_A);
    table.expect("pod-b", &lab.pod_b, SERVER, POD_B);
    lab.outside.take_seen();

    let mut policy = EgressPolicy::new(PolicyId::new("shop")?, hosts(&[POD_A, POD_B]), dual(EIP_B))
        .with_gateway(NodeName::new("node-b")?);
    nodes.reconcile(&[policy.clone()])?;
    table.step("gateway node-b");
    table.expect("pod-a", &lab.pod_a, SERVER, EIP_B);
    table.expect("pod-a", &lab.pod_a, POD_B, POD_A);
    table.expect("pod-b, on the gateway", &lab.pod_b, SERVER, EIP_B);
    table.expect("another pod", &lab.stranger, SERVER, STRANGER);
    let seen: BTreeSet<_> = lab.outside.take_seen().into_iter().map(|(from, _)| from).collect();
    let known = [EIP_B, STRANGER].concat().into_iter().collect();
    table.verify("no packet reached the server with another source", seen == known);
    table.expect("server, to the pod", &lab.server, POD_A, SERVER);

    policy.destinations = Destinations::Nets(hosts(&[OTHER_SERVER]));
    nodes.reconcile(&[policy.clone()])?;
    table.step("destination list");
    table.expect("pod-a", &lab.pod_a, OTHER_SERVER, EIP_B);
    table.expect("pod-a", &lab.pod_a, SERVER, POD_A);

    policy.destinations = Destinations::External;
    policy.egress_ip = EgressIp::Node;
    nodes.reconcile(&[policy.clone()])?;
    table.step("node address");
    table.expect("pod-a", &lab.pod_a, SERVER, NODE_B_OUTSIDE);

    policy.gateway = Some(NodeName::new("node-c")?);
    policy.egress_ip = dual(EIP_C);
    nodes.reconcile(&[policy.clone()])?;
    table.step("gateway node-c");
    table.expect("pod-a", &lab.pod_a, SERVER, EIP_C);
    table.expect("pod-b", &lab.pod_b, SERVER, EIP_C);

    let changes = nodes.reconcile(&[policy])?;
    table.verify("the same policies again change nothing", changes == 0);

    nodes.remove()?;
    table.step("removed");
    table.expect("pod-a", &lab.pod_a, SERVER, POD_A);
    table.expect("pod-b", &lab.pod_b, SERVER, POD_B);
    Ok(table.wrong)
}

/// The cluster and the reconciler of each node, as in an agent on that node.
struct Nodes(Vec<(Cluster, Reconciler<KernelDatapath>)>);

impl Nodes {
    fn open(lab: &Lab) -> Result<Self, Box<dyn Error>> {
        let mut nodes = Vec::new();
        for host in lab.nodes() {
            let cluster = lab.cluster(host)?;
            let marks = cluster.marks;
            // Opened in the node's network namespace; afterwards it may be used in any thread.
            let open = || Reconciler::open(marks, TableRange::default());
            nodes.push((cluster, host.netns.run(open)??));
        }
        Ok(Self(nodes))
    }

    /// Applies the policies on every node, gateways first; returns the number of changes.
    fn reconcile(&mut self, policies: &[EgressPolicy]) -> Result<usize, Box<dyn Error>> {
        let mut changes = 0;
        println!();
        for (cluster, reconciler) in self.0.iter_mut().rev() {
            let start = Instant::now();
            let report = reconciler.reconcile(cluster, policies)?;
            let (node, made) = (&cluster.node, report.changes.len());
            println!("{node}: {made} changes in {:.1?}", start.elapsed());
            for finding in report.findings {
                println!("{node}: {finding}");
            }
            changes += made;
        }
        Ok(changes)
    }

    fn remove(&mut self) -> Result<(), Box<dyn Error>> {
        println!();
        for (cluster, reconciler) in &mut self.0 {
            let report = reconciler.remove()?;
            println!("{}: removed by {} changes", cluster.node, report.changes.len());
        }
        Ok(())
    }
}

/// Table of expected and observed source addresses.
#[derive(Default)]
struct Table {
    step: &'static str,
    wrong: usize,
}

impl Table {
    fn step(&mut self, step: &'static str) {
        self.step = step;
        println!();
        line(["step", "from", "", "to", "expected", "observed", "ok"]);
    }

    /// Sends TCP and UDP requests over IPv4 and IPv6, and compares the source addresses.
    fn expect(&mut self, from: &str, netns: &Netns, to: Pair, source: Pair) {
        for (to, source) in to.into_iter().zip(source) {
            for proto in Proto::BOTH {
                let seen = probe_patiently(netns, proto, to);
                let right = seen.as_ref().is_ok_and(|seen| *seen == source);
                self.wrong += usize::from(!right);
                let seen = seen.map_or_else(|error| error.to_string(), |seen| seen.to_string());
                line([
                    self.step,
                    from,
                    &proto.to_string(),
                    &to.to_string(),
                    &source.to_string(),
                    &seen,
                    if right { "yes" } else { "NO" },
                ]);
            }
        }
    }

    fn verify(&mut self, what: &str, right: bool) {
        self.wrong += usize::from(!right);
        println!("{what}: {}", if right { "yes" } else { "NO" });
    }
}

fn line([step, from, proto, to, expected, seen, ok]: [&str; 7]) {
    println!("{step:<22}  {from:<21}  {proto:<3}  {to:<17}  {expected:<18}  {seen:<18}  {ok}");
}

fn dual(pair: Pair) -> EgressIp {
    match pair {
        [IpAddr::V4(v4), IpAddr::V6(v6)] => EgressIp::Dual(v4, v6),
        _ => EgressIp::Node,
    }
}
