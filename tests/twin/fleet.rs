//! The lab's nodes and their twins.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::process::Command;
use std::time::{Duration, Instant};
use std::{io, mem, thread};

use common::backend::{backend, replies, steering, underlay};
use egress_datapath::datapath::observe;
use egress_datapath::explain::{Fate, Packet, explain_received};
use egress_datapath::sim::{ClusterTrace, Outcome, SimCluster};
use egress_datapath::state::State;
use egress_datapath::testing::lab::{
    Lab, NODE_B_OUTSIDE, NODE_C_OUTSIDE, POD_A, POD_B, POD_C, PORT, STRANGER,
};
use egress_datapath::{
    Backend, Changes, Cluster, Datapath, EgressPolicy, MarkLayout, Node, Reconciler, Sim, explain,
};

use crate::nodes::{self, datapath, kernel, node, simulated};
use crate::random::Random;
use crate::shrink::patience;
use crate::wire::{PAYLOAD, Seen, Tap, send};
use crate::{Result, connections, difference, world};

type Kernel = Reconciler<Box<dyn Datapath>>;
type Simulated = Reconciler<Sim>;

/// The lab and its twin.
pub(crate) struct Fleet {
    lab: Lab,
    /// Whether the first packet of a connection may decide for all.
    caching: bool,
    /// The server's, then those of the pods.
    taps: Vec<Tap>,
    clusters: Vec<Cluster>,
    kernels: Vec<Kernel>,
    /// Somebody else on each node.
    others: Vec<Box<dyn Datapath>>,
    simulated: Vec<Simulated>,
    pub(crate) sims: SimCluster,
    next: u32,
    port: u16,
    /// Packets of connections, as their opener sent them.
    flows: Vec<Packet>,
    /// Those of them that were sent, by their ports.
    opened: BTreeSet<[u16; 2]>,
    /// What left, as the server saw it.
    left: Vec<Packet>,
    /// Every packet and what became of it, to tell how a difference came about.
    history: Vec<(Packet, Outcome)>,
    /// Numbers whose packets should not have come, and have.
    late: BTreeMap<u32, Vec<Seen>>,
}

impl Fleet {
    pub(crate) fn new(layout: MarkLayout, caching: bool) -> io::Result<Self> {
        let lab = Lab::new()?;
        let nft = |netns, rules| {
            let fed = common::fleet::nft(netns, &[], rules);
            fed.map_err(|error| io::Error::other(error.to_string()))
        };
        nodes::outside(&lab)?;
        let mut clusters = Vec::new();
        for host in lab.nodes() {
            let mut cluster = underlay(lab.cluster(host).map_err(io::Error::other)?);
            cluster.marks = layout;
            cluster.backend = backend();
            cluster.connection_caching = caching;
            cluster.policy_counters = !caching && cluster.backend == Backend::Nftables;
            cluster.steering = steering(&layout);
            cluster.replies = replies(&layout, cluster.backend);
            clusters.push(cluster);
            // So that connections are tracked and translated whether our table is there or not,
            // as on every node of a cluster, and last for the whole test.
            nft(&host.netns, nodes::FOREIGN)?;
            host.netns.sysctl(&[
                ("netfilter/nf_conntrack_udp_timeout", "7200"),
                ("netfilter/nf_conntrack_udp_timeout_stream", "7200"),
            ])?;
        }
        let hosts = [&lab.server, &lab.pod_a, &lab.stranger, &lab.pod_b, &lab.pod_c];
        hosts.iter().try_for_each(|netns| nft(netns, nodes::QUIET))?;
        let taps = hosts.into_iter().map(Tap::open).collect::<io::Result<_>>()?;
        let kernels =
            lab.nodes().into_iter().zip(&clusters).map(|(host, cluster)| kernel(host, cluster));
        Ok(Self {
            taps,
            kernels: kernels.collect::<io::Result<_>>()?,
            others: lab.nodes().into_iter().map(datapath).collect::<io::Result<_>>()?,
            simulated: clusters.iter().map(simulated).collect(),
            sims: SimCluster::new(
                (1..).zip(&clusters).map(|(number, cluster)| node(number, cluster)),
            ),
            caching,
            clusters,
            lab,
            next: 0,
            port: 1024,
            flows: Vec::new(),
            opened: BTreeSet::new(),
            left: Vec::new(),
            history: Vec::new(),
            late: BTreeMap::new(),
        })
    }

    /// Forgets what the reconciler of a node knew, which may be configured otherwise then.
    pub(crate) fn restart(&mut self, at: usize, random: &mut Random) -> io::Result<()> {
        let cluster = &mut self.clusters[at];
        let caching = &mut cluster.connection_caching;
        *caching = self.caching && (*caching || random.once_in(2)) && !random.once_in(4);
        let has_counters = cluster.backend == Backend::Nftables;
        cluster.policy_counters = has_counters && !*caching && !random.once_in(4);
        self.kernels[at] = kernel(self.lab.nodes()[at], &self.clusters[at])?;
        self.simulated[at] = simulated(&self.clusters[at]);
        Ok(())
    }

    /// Makes a node right, in both worlds.
    pub(crate) fn reconcile(&mut self, at: usize, policies: &[EgressPolicy]) -> Result {
        let cluster = &self.clusters[at];
        let kernel = self.kernels[at].reconcile(cluster, policies);
        let sim = self.in_sim(at, |egress, cluster| egress.reconcile(cluster, policies));
        let told = |report: std::result::Result<egress_datapath::Report, _>| match report {
            // Connections have other numbers.
            Ok(report) => Ok((without_connections(&report.changes), report.findings)),
            Err(error) => Err(error),
        };
        let (kernel, sim) = (told(kernel), told(sim));
        if kernel != sim {
            return Err(format!("kernel: {kernel:#?}\nsim: {sim:#?}").into());
        }
        self.compare(at)
    }

    fn in_sim<T>(&mut self, at: usize, work: impl FnOnce(&mut Simulated, &Cluster) -> T) -> T {
        let cluster = self.clusters[at].clone();
        let node = self.sims.node_mut(&cluster.node).unwrap();
        mem::swap(&mut node.sim, self.simulated[at].datapath());
        let done = work(&mut self.simulated[at], &cluster);
        mem::swap(&mut node.sim, self.simulated[at].datapath());
        done
    }

    /// Somebody else changes a node, in both worlds.
    pub(crate) fn edit(&mut self, at: usize, edit: impl FnOnce(&State) -> State) -> Result<String> {
        let now = observe(&mut self.others[at])?;
        let changes = Changes::between(&now, &edit(&now));
        let kernel = self.others[at].apply(&changes);
        let sim = self.in_sim(at, |egress, _| egress.datapath().apply(&changes));
        let [kernel, sim] = [kernel, sim].map(crate::outcome);
        if kernel != sim {
            return Err(format!("{changes}kernel: {kernel:#?}\nsim: {sim:#?}").into());
        }
        self.compare(at).map_err(|error| format!("{error}\nafter {changes}"))?;
        Ok(changes.to_string())
    }

    /// Empties a node's table of connections, in both worlds.
    pub(crate) fn forget(&mut self, at: usize) -> Result {
        let netns = &self.lab.nodes()[at].netns;
        let output = netns.run(|| Command::new("conntrack").arg("-F").output())??;
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).into());
        }
        self.sims.node_mut(&self.clusters[at].node).unwrap().sim.forget_connections();
        self.compare(at)
    }

    fn compare(&mut self, at: usize) -> Result {
        let kernel = observe(&mut self.others[at])?;
        let sim = self.in_sim(at, |egress, _| observe(egress.datapath()))?;
        difference(&sim, &kernel)?;
        self.compare_connections(at)
    }

    fn compare_connections(&mut self, at: usize) -> Result {
        let node = self.sims.node_mut(&self.clusters[at].node).unwrap();
        // A packet that nobody waits for, because it is dropped in the end, may be under way.
        let deadline = Instant::now() + patience();
        loop {
            match connections::difference(&mut node.sim, &mut self.others[at]) {
                Ok(()) => return Ok(()),
                Err(error) if Instant::now() > deadline => {
                    return Err(format!("node {at}: {error}").into());
                }
                Err(_) => thread::sleep(Duration::from_millis(10)),
            }
        }
    }

    /// Random packets, each with the number of the tap of who sends it.
    pub(crate) fn packets(&mut self, random: &mut Random, count: usize) -> Vec<(usize, Packet)> {
        let mut ports = BTreeSet::new();
        let packets = (0..count).filter_map(|_| self.packet(random));
        // Those of one connection could overtake each other.
        packets.filter(|(_, packet)| ports.insert(connection(packet))).collect()
    }

    /// Sends packets through both worlds, and returns how many there were, and how many of them
    /// should get through.
    pub(crate) fn send(&mut self, packets: &[(usize, Packet)]) -> Result<Sent> {
        let mut batches: [Vec<(u32, Packet)>; 5] = Default::default();
        let mut expected = BTreeMap::new();
        let mut told = BTreeMap::new();
        let states = self.others.iter_mut().map(observe);
        let states: Vec<State> = states.collect::<std::result::Result<_, _>>()?;
        for &(from, packet) in packets {
            self.next += 1;
            // An answer to a packet from outside opens no connection.
            let opens = self.opened.insert(connection(&packet));
            if from > 0 && opens {
                told.insert(self.next, self.explained(&states, packet));
            }
            batches[from].push((self.next, packet));
            expected.insert(self.next, (packet, self.sims.send(packet)));
        }
        let seen = self.exchange(&batches, &expected)?;
        let mut sent = Sent { packets: expected.len(), ..Sent::default() };
        let mut wrong = Vec::new();
        for (number, (packet, journey)) in expected {
            let wanted = Self::wanted(&journey);
            let seen = seen.get(&number).map_or(&[][..], Vec::as_slice);
            sent.through += usize::from(wanted.is_some());
            // Where a port is taken, which one comes in its place is the kernel's secret.
            let kept = wanted.is_none_or(|wanted| wanted.packet.source_port == packet.source_port);
            let port = |seen: &Seen| if kept { seen.packet.source_port } else { 0 };
            let facts = |seen: &Seen| {
                let Packet { source, destination, destination_port, .. } = seen.packet;
                (seen.at, source, port(seen), destination, destination_port)
            };
            if let Some(Seen { at: 0, packet: out }) = wanted.filter(|_| kept) {
                self.left.push(out);
                sent.translated += usize::from(out.source != packet.source);
            }
            if let Some(told) = told.remove(&number) {
                sent.explained += 1;
                let found = seen.first().map(|seen| seen.packet.source);
                if !told.fits(found) {
                    wrong.push(format!("{packet} was explained as {told:?}, came as {found:?}"));
                }
            }
            if !seen.iter().map(facts).eq(wanted.iter().map(facts)) {
                let (trace, before) = (&journey.trace, self.before(packet));
                wrong.push(format!("{seen:?} instead of {wanted:?}\n{trace}{before}"));
            }
            self.history.push((packet, journey.outcome));
        }
        for (number, seen) in mem::take(&mut self.late) {
            wrong.push(format!("packet {number} came late: {seen:?}"));
        }
        wrong.extend(self.miscounted()?);
        for at in 0..self.clusters.len() {
            wrong.extend(self.compare_connections(at).err().map(|error| error.to_string()));
        }
        let count = wrong.len();
        let first = wrong.into_iter().next();
        first.map_or(Ok(sent), |first| Err(format!("{count} packets, one of them: {first}").into()))
    }

    /// The source of a new connection's packet by what the kernels hold, if it gets through all the
    /// nodes on its way.
    fn explained(&self, states: &[State], mut packet: Packet) -> Explained {
        let home = |address: IpAddr| {
            let nodes = self.sims.nodes();
            nodes.iter().position(|node| node.pods.iter().any(|net| net.contains(&address)))
        };
        let Some(mut at) = home(packet.source) else { return Explained::Dropped };
        let mut trace = explain(&states[at], &packet);
        for _ in 0..=states.len() {
            match trace.fate {
                Fate::Tunnelled(frame) => {
                    let has = |node: &&Node| node.underlay.contains(&frame.to);
                    let peer = self.clusters.iter().position(|cluster| {
                        cluster.nodes.iter().find(has).is_some_and(|node| node.name == cluster.node)
                    });
                    let Some(peer) = peer else { return Explained::Dropped };
                    at = peer;
                    trace = explain_received(&states[at], &frame);
                }
                Fate::Routed(Some(source)) => {
                    match home(packet.destination).filter(|there| *there != at) {
                        Some(there) => at = there,
                        None => return Explained::As(source),
                    }
                    packet.source = source;
                    trace = explain(&states[at], &packet);
                }
                Fate::Routed(None) => return Explained::AsNode,
                _ => return Explained::Dropped,
            }
        }
        Explained::Dropped
    }

    /// The real packets: sent, and waited for.
    fn exchange(
        &mut self,
        batches: &[Vec<(u32, Packet)>; 5],
        expected: &BTreeMap<u32, (Packet, ClusterTrace)>,
    ) -> Result<BTreeMap<u32, Vec<Seen>>> {
        let lab = &self.lab;
        let hosts = [&lab.server, &lab.pod_a, &lab.stranger, &lab.pod_b, &lab.pod_c];
        for (netns, batch) in hosts.into_iter().zip(batches) {
            send(netns, batch)?;
        }
        let mut seen = BTreeMap::new();
        let deadline = Instant::now() + patience();
        loop {
            for (at, tap) in self.taps.iter().enumerate() {
                tap.take(at, &mut seen);
            }
            let arrives = |(number, (_, journey)): (&u32, &(Packet, ClusterTrace))| {
                Self::wanted(journey).is_none() || seen.contains_key(number)
            };
            if expected.iter().all(arrives) || Instant::now() > deadline {
                break;
            }
            thread::sleep(Duration::from_millis(1));
        }
        // What should not come has come by now, or is seen to be late.
        thread::sleep(Duration::from_millis(2));
        for (at, tap) in self.taps.iter().enumerate() {
            tap.take(at, &mut seen);
        }
        self.late = seen.split_off(&(self.next + 1));
        let first = expected.keys().next().copied().unwrap_or(0);
        let known = seen.split_off(&first);
        self.late.append(&mut seen);
        Ok(known)
    }

    /// Counters of policies that do not stand where those of the other world do.
    fn miscounted(&mut self) -> Result<Vec<String>> {
        let mut wrong = Vec::new();
        for (other, cluster) in self.others.iter_mut().zip(&self.clusters) {
            let node = self.sims.node_mut(&cluster.node).ok_or("no such node")?;
            let mut sim = node.sim.counters()?.policies;
            for count in sim.values_mut() {
                // What the kernel's packets have behind their headers.
                count.bytes += count.packets * PAYLOAD;
            }
            let kernel = other.counters()?.policies;
            if kernel != sim {
                wrong.push(format!("{} counted {kernel:?} instead of {sim:?}", cluster.node));
            }
        }
        Ok(wrong)
    }

    /// What became of earlier packets with the same ports.
    fn before(&self, packet: Packet) -> String {
        let of = connection(&packet);
        let same = self.history.iter().filter(|(other, _)| connection(other) == of);
        let lines = same.map(|(packet, outcome)| format!("before: {packet}: {outcome:?}"));
        lines.collect::<Vec<_>>().join("\n")
    }

    /// What the taps should see of a packet.
    fn wanted(journey: &ClusterTrace) -> Option<Seen> {
        match &journey.outcome {
            Outcome::Left { packet, .. } => Some(Seen { at: 0, packet: *packet }),
            Outcome::Arrived { packet, .. } => {
                let pods = [POD_A, STRANGER, POD_B, POD_C];
                let pod = pods.iter().position(|pod| pod.contains(&packet.destination))?;
                Some(Seen { at: pod + 1, packet: *packet })
            }
            Outcome::Dropped { .. } => None,
        }
    }

    /// A packet and who sends it: of a new connection, of an old one, or an answer.
    fn packet(&mut self, random: &mut Random) -> Option<(usize, Packet)> {
        match random.below(10) {
            0 | 1 if !self.left.is_empty() => {
                let last = self.left.len().saturating_sub(200);
                let answer = random.of(&self.left[last..]).reply();
                // Nobody sends what is for an address that nobody has.
                (!world::EIPS[0].contains(&answer.destination)).then_some((0, answer))
            }
            2..=4 if !self.flows.is_empty() => {
                let last = self.flows.len().saturating_sub(200);
                let packet = random.of(&self.flows[last..]);
                Some((sender(packet)?, packet))
            }
            _ => {
                let pods = [POD_A, STRANGER, POD_B, POD_C];
                let pod = random.of(&pods);
                let source = random.of(&pod);
                let of_family = |to: &IpAddr| to.is_ipv4() == source.is_ipv4() && *to != source;
                let outside = nodes::OUTSIDE.iter().map(|to| to.parse().unwrap());
                let inside = pods.concat().into_iter();
                let all: Vec<IpAddr> = outside.clone().chain(outside).chain(inside).collect();
                let all: Vec<IpAddr> = all.into_iter().filter(of_family).collect();
                // At one of them the pods' own service listens.
                self.port = match self.port {
                    u16::MAX => 1025,
                    port if port + 1 == PORT => port + 2,
                    port => port + 1,
                };
                let port = random.of(&[53, 443, 7789]);
                let packet = Packet::udp(source, self.port, random.of(&all), port);
                self.flows.push(packet);
                Some((sender(packet)?, packet))
            }
        }
    }
}

/// What should become of a packet, by the states alone.
#[derive(Clone, Copy, Debug)]
enum Explained {
    Dropped,
    As(IpAddr),
    AsNode,
}

impl Explained {
    /// Whether it is what was seen, if anything was.
    fn fits(self, source: Option<IpAddr>) -> bool {
        match self {
            Self::Dropped => source.is_none(),
            Self::As(told) => source == Some(told),
            Self::AsNode => source.is_some_and(|source| {
                let outside = [NODE_B_OUTSIDE, NODE_C_OUTSIDE].concat();
                outside.contains(&source)
                    || (1..=3).any(|number| {
                        nodes::beside_pods(number).contains(&source)
                            || nodes::addresses(number).contains(&source)
                    })
            }),
        }
    }
}

/// What became of a batch.
#[derive(Default)]
pub(crate) struct Sent {
    pub(crate) packets: usize,
    pub(crate) through: usize,
    pub(crate) translated: usize,
    /// Packets of new connections, whose fate the states alone explain.
    pub(crate) explained: usize,
}

impl Sent {
    pub(crate) const fn add(&mut self, other: &Self) {
        self.packets += other.packets;
        self.through += other.through;
        self.translated += other.translated;
        self.explained += other.explained;
    }
}

/// The ports of a connection, whoever sends.
fn connection(packet: &Packet) -> [u16; 2] {
    let mut ports = [packet.source_port, packet.destination_port];
    ports.sort_unstable();
    ports
}

fn sender(packet: Packet) -> Option<usize> {
    let pods = [POD_A, STRANGER, POD_B, POD_C];
    Some(pods.iter().position(|pod| pod.contains(&packet.source))? + 1)
}

fn without_connections(changes: &Changes) -> Vec<String> {
    let ops = changes.ops().map(ToString::to_string);
    ops.filter(|op| !op.starts_with("conntrack ")).collect()
}
