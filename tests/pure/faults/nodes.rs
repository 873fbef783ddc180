//! Simulated nodes with open connections, and what their pods' packets may show.

use std::net::IpAddr;

use egress_datapath::alloc::{MarkPool, TablePool, TableRange};
use egress_datapath::datapath::{Among, Connection};
use egress_datapath::explain::{HostContext, Packet};
use egress_datapath::sim::{Outcome, SharedSim, SimCluster, SimNode};
use egress_datapath::{Cluster, Datapath, Mark, MarkLayout, Reconciler, Sim};

use super::scenarios::{Scenario, Source, Talk};
use crate::{cluster, name, net};

const NAMES: [&str; 3] = ["a", "b", "c"];
const SERVER: [&str; 2] = ["198.51.100.10", "2001:db8:51::10"];

/// Ports of connections that were open before, and of those that begin now.
const OPEN: u16 = 40_000;
const NEW: u16 = 50_000;

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// How far the node has come whose turn it is; those before it are done, those after it have not
/// begun.
#[derive(Clone, Copy)]
pub(super) enum Progress<'a> {
    /// Stopped somewhere, with this in its kernel.
    Under(&'a SharedSim),
    Done {
        /// Unless somebody took everything away, so that nobody knows any more whose doing an open
        /// connection is.
        remembered: bool,
    },
}

/// The nodes of a scenario.
pub(super) struct Nodes {
    clusters: Vec<Cluster>,
    marks: MarkPool,
    sims: Vec<Sim>,
}

impl Nodes {
    /// As they are before the scenario, with connections of all its pods open.
    pub(super) fn new(scenario: &Scenario, caching: bool) -> Self {
        let clusters = NAMES.map(|of| {
            let mut cluster = cluster(of);
            cluster.connection_caching = caching;
            for (node, mark) in
                cluster.nodes.iter_mut().zip([0x2600_0000, 0x2600_0100, 0x2600_0200])
            {
                // Given, since after a loss of everything nobody can know which it was.
                node.mark = Some(Mark::new(mark));
            }
            cluster
        });
        let sims = clusters.iter().map(|cluster| {
            let underlay = cluster.nodes.iter().find(|node| node.name == cluster.node).unwrap();
            let local = underlay.underlay.clone();
            Sim::new().with_host(HostContext::new(local))
        });
        let marks = MarkPool::new(MarkLayout::SEED);
        let mut nodes = Self { sims: sims.collect(), clusters: clusters.to_vec(), marks };
        for at in 0..NAMES.len() {
            nodes.reconcile(at, scenario, false);
        }
        let mut sims = nodes.sims(None);
        for packet in packets(scenario, OPEN) {
            if let Outcome::Left { node, packet } = sims.send(packet).outcome {
                let _answered = sims.send_to(&node, packet.reply());
            }
        }
        nodes.sims = sims.nodes().iter().map(|node| node.sim.clone()).collect();
        nodes
    }

    /// A reconciler that knows nothing, with the same numbers every time.
    pub(super) fn egress<D: Datapath>(&self, datapath: D) -> Reconciler<D> {
        let tables = TablePool::new(TableRange::default()).with_start(0);
        // To make one takes longer than all the rest.
        Reconciler::with_allocators(datapath, self.marks.clone(), tables)
    }

    pub(super) fn cluster(&self, node: usize) -> &Cluster {
        &self.clusters[node]
    }

    pub(super) fn sim(&self, node: usize) -> &Sim {
        &self.sims[node]
    }

    /// Makes the change of a node.
    pub(super) fn make(&mut self, scenario: &Scenario, turn: usize) {
        self.reconcile(scenario.order[turn], scenario, true);
    }

    fn reconcile(&mut self, node: usize, scenario: &Scenario, after: bool) {
        let wanted = if after { &scenario.after } else { &scenario.before };
        let mut sim = std::mem::take(&mut self.sims[node]);
        let _report = wanted[node].make(&self.clusters[node], &mut self.egress(&mut sim)).unwrap();
        self.sims[node] = sim;
    }

    /// The nodes, perhaps one of them with another kernel, and the packets between them.
    pub(super) fn sims(&self, other: Option<(usize, &SharedSim)>) -> SimCluster {
        SimCluster::new((0..NAMES.len()).map(|at| {
            SimNode {
                name: name(NAMES[at]),
                sim: match other {
                    Some((node, kernel)) if node == at => kernel.lock().clone(),
                    _ => self.sims[at].clone(),
                },
                pods: ["10.244.N.0/24", "fd44:N::/64"]
                    .map(|pods| net(&pods.replace('N', &(at + 1).to_string())))
                    .to_vec(),
            }
        }))
    }

    /// Whether new connections are what they should be in the end, and no open one is wrong.
    pub(super) fn check_the_end(&self, scenario: &Scenario) -> Result<(), String> {
        let mut sims = self.sims(None);
        for port in [OPEN, NEW] {
            for (talk, packet) in scenario.talks.iter().flat_map(|talk| of(talk, port)) {
                let journey = sims.send(packet);
                let left = match journey.outcome {
                    Outcome::Left { packet, .. } => Some(packet.source),
                    _ => None,
                };
                let wanted = source(talk.after, talk, &packet);
                if left != wanted && (port == NEW || left.is_some()) {
                    let name = scenario.name;
                    return Err(format!(
                        "{name}, at the end: {packet} left as {left:?}, not as {wanted:?}:\n{}",
                        journey.trace
                    ));
                }
            }
        }
        Ok(())
    }
}

/// Sends a packet of every connection, and what opens new ones; how many, or which left as
/// somebody that it must not be.
pub(super) fn send_all(
    mut sims: SimCluster,
    scenario: &Scenario,
    turn: usize,
    progress: Progress<'_>,
) -> Result<usize, String> {
    let mut sent = 0;
    for port in [OPEN, NEW] {
        for (talk, packet) in scenario.talks.iter().flat_map(|talk| of(talk, port)) {
            let allowed = allowed(scenario, turn, progress, talk, &packet);
            let journey = sims.send(packet);
            if let Outcome::Left { packet: left, .. } = journey.outcome {
                if !allowed.contains(&left.source) {
                    let what = if port == OPEN { "open" } else { "new" };
                    return Err(format!(
                        "{what}: {packet} left as {}, not as one of {allowed:?}:\n{}",
                        left.source, journey.trace
                    ));
                }
            }
            sent += 1;
        }
    }
    Ok(sent)
}

/// A packet of each family.
fn of(talk: &Talk, port: u16) -> impl Iterator<Item = (&Talk, Packet)> {
    let pairs = talk.pod.into_iter().zip(SERVER);
    pairs.map(move |(pod, server)| (talk, Packet::udp(ip(pod), port, ip(server), 53)))
}

fn packets(scenario: &Scenario, port: u16) -> impl Iterator<Item = Packet> {
    scenario.talks.iter().flat_map(move |talk| of(talk, port).map(|(_, packet)| packet))
}

/// As whom a packet leaves.
fn source(source: Source, talk: &Talk, packet: &Packet) -> Option<IpAddr> {
    let pair = match source {
        Source::Eip(pair) => pair,
        Source::Plain => talk.pod,
        Source::Nothing => return None,
    };
    Some(ip(pair[usize::from(packet.source.is_ipv6())]))
}

/// As whom a packet may leave.
///
/// An egress IP may be the old one or the new one until all nodes are done. The pod as it is
/// without a policy may be seen only until its node is done, where a policy comes, and only from
/// when its node has begun, where it goes; of an open connection that was steered only after it
/// was ended.
fn allowed(
    scenario: &Scenario,
    turn: usize,
    progress: Progress<'_>,
    talk: &Talk,
    packet: &Packet,
) -> Vec<IpAddr> {
    let [before, after] = [talk.before, talk.after].map(|one| source(one, talk, packet));
    if before == after {
        return before.into_iter().collect();
    }
    let own_turn = scenario.order.iter().position(|node| *node == talk.node);
    let begun = own_turn.is_some_and(|own| own <= turn);
    let done = own_turn.is_some_and(|own| match progress {
        Progress::Under(_) => own < turn,
        Progress::Done { .. } => own <= turn,
    });
    let last = turn + 1 == scenario.order.len();
    let over = match progress {
        Progress::Under(_) => false,
        Progress::Done { remembered } => last && (remembered || packet.source_port == NEW),
    };
    let was_ended = match progress {
        Progress::Under(kernel) if own_turn == Some(turn) => {
            let mut is_open = false;
            let mut each = |one: Connection| is_open |= one.source_port == packet.source_port;
            kernel.lock().connections(Among::Sources(&[packet.source].into()), &mut each).unwrap();
            !is_open
        }
        _ => done,
    };
    let old = match talk.before {
        Source::Plain => !done,
        _ => !over,
    };
    let new = match talk.after {
        Source::Plain => begun && (done || was_ended),
        _ => true,
    };
    before.filter(|_| old).into_iter().chain(after.filter(|_| new)).collect()
}
