//! Several simulated nodes, and the path of a packet between them.

use std::net::IpAddr;

use ipnet::IpNet;

use super::Sim;
use super::packet::{Frame, Packet};
use super::trace::{Decision, Fate, Reason, Trace};
use crate::types::NodeName;

/// A simulated cluster: nodes and the packets between them, in memory.
///
/// Whatever the datapath does not decide is kept simple: a packet is delivered to the node that has
/// its destination address, and an address of no node is outside the cluster.
///
/// ```
/// use egress_datapath::explain::HostContext;
/// use egress_datapath::explain::Packet;
/// use egress_datapath::sim::{Outcome, SimCluster, SimNode};
/// use egress_datapath::{Cluster, EgressIp, EgressPolicy, Node, NodeName, PolicyId, Reconciler};
/// use egress_datapath::Sim;
///
/// let (a, b) = (NodeName::new("a")?, NodeName::new("b")?);
/// let nodes = vec![
///     Node::new(a.clone(), vec!["10.10.0.11".parse()?], vec!["172.31.0.11/16".parse()?]),
///     Node::new(b.clone(), vec!["10.10.0.12".parse()?], vec!["172.31.0.12/16".parse()?]),
/// ];
/// let policy = EgressPolicy::new(
///     PolicyId::new("shop/checkout")?,
///     vec!["10.244.1.10/32".parse()?],
///     EgressIp::V4("198.51.100.200".parse()?),
/// )
/// .with_gateway(b.clone());
/// let mut sims = SimCluster::new(nodes.iter().map(|node| SimNode {
///     name: node.name.clone(),
///     sim: Sim::new().with_host(HostContext::new(node.underlay.clone())),
///     pods: Vec::new(),
/// }));
/// sims.node_mut(&a).unwrap().pods.push("10.244.1.0/24".parse()?);
/// for name in [&b, &a] {
///     let cluster = Cluster::new(name.clone(), nodes.clone(), vec!["10.244.0.0/16".parse()?]);
///     Reconciler::new(&mut sims.node_mut(name).unwrap().sim).reconcile(&cluster, [&policy])?;
/// }
/// let asked = Packet::udp("10.244.1.10".parse()?, 40_000, "192.0.2.1".parse()?, 53);
/// let journey = sims.send(asked);
/// let Outcome::Left { node, packet } = journey.outcome else { panic!("{}", journey.trace) };
/// assert_eq!(node, b);
/// assert_eq!(packet.source, "198.51.100.200".parse::<std::net::IpAddr>()?);
///
/// let answered = sims.send_to(&b, packet.reply());
/// assert_eq!(answered.outcome, Outcome::Arrived { node: a, packet: asked.reply() });
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct SimCluster {
    nodes: Vec<SimNode>,
}

/// A simulated node and its pods.
#[derive(Clone, Debug)]
pub struct SimNode {
    /// The node's name.
    pub name: NodeName,
    /// The node's kernel; its `HostContext` must include the node's underlay addresses.
    pub sim: Sim,
    /// The address ranges of the node's pods.
    pub pods: Vec<IpNet>,
}

/// The path of a packet through a cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ClusterTrace {
    /// The decisions of each node; the fate is that on the last node.
    pub trace: Trace,
    /// The outcome.
    pub outcome: Outcome,
}

/// Outcome of a packet in a cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The packet left the cluster.
    Left {
        /// The node that it left from.
        node: NodeName,
        /// The packet as it left; its source is the translated address.
        packet: Packet,
    },
    /// The packet was delivered to a pod or to a node.
    Arrived {
        /// The node that received it.
        node: NodeName,
        /// The packet as it arrived.
        packet: Packet,
    },
    /// The packet was dropped; the trace names the object that dropped it.
    Dropped {
        /// The node that dropped it or sent it to an unknown node; `None` if it reached no node.
        node: Option<NodeName>,
    },
}

/// Maximum number of nodes that a packet passes: its initial time to live.
const HOPS: usize = 64;

enum Next {
    Packet(Packet),
    Frame(Frame),
}

impl SimCluster {
    /// A cluster of these nodes; the first node that has an address receives its packets.
    pub fn new(nodes: impl IntoIterator<Item = SimNode>) -> Self {
        Self { nodes: nodes.into_iter().collect() }
    }

    /// The nodes.
    pub fn nodes(&self) -> &[SimNode] {
        &self.nodes
    }

    /// A node by its name.
    pub fn node_mut(&mut self, name: &NodeName) -> Option<&mut SimNode> {
        self.nodes.iter_mut().find(|node| node.name == *name)
    }

    /// Sends a packet from the pod with its source address, or else from outside the cluster.
    ///
    /// From outside, it goes to the node that has its destination, or to the first node if no node
    /// has it.
    pub fn send(&mut self, packet: Packet) -> ClusterTrace {
        let pod = self.nodes.iter().position(|node| node.has_pod(packet.source));
        let at = pod.or_else(|| self.holder(packet.destination)).unwrap_or_default();
        self.journey(at, packet)
    }

    /// Sends a packet from outside to a node, even if another node has its destination.
    pub fn send_to(&mut self, node: &NodeName, packet: Packet) -> ClusterTrace {
        let at = self.nodes.iter().position(|other| other.name == *node);
        self.journey(at.unwrap_or(usize::MAX), packet)
    }

    fn holder(&self, address: IpAddr) -> Option<usize> {
        self.nodes.iter().position(|node| node.has(address))
    }

    fn journey(&mut self, start: usize, packet: Packet) -> ClusterTrace {
        let mut trace = Trace { packet, reasons: Vec::new(), fate: Fate::Dropped };
        let (mut at, mut next) = (start, Next::Packet(packet));
        for _ in 0..HOPS {
            let Some(node) = self.nodes.get_mut(at) else { break };
            let (here, packet) = match next {
                Next::Packet(packet) => node.sim.walk(packet, |walk| walk.arrive(packet)),
                Next::Frame(frame) => node.sim.walk(frame.packet, |walk| walk.receive(&frame)),
            };
            let name = node.name.clone();
            let named = |reason| Reason { node: Some(name.clone()), ..reason };
            trace.reasons.extend(here.reasons.into_iter().map(named));
            trace.fate = here.fate;
            let end = |outcome| ClusterTrace { trace: trace.clone(), outcome };
            match here.fate {
                Fate::Dropped => return end(Outcome::Dropped { node: Some(name) }),
                Fate::Delivered => return end(Outcome::Arrived { node: name, packet }),
                Fate::Tunnelled(frame) => match self.holder(frame.to) {
                    Some(peer) => (at, next) = (peer, Next::Frame(frame)),
                    None => return lost(trace, Some(name), format!("no node has {}", frame.to)),
                },
                Fate::Routed(_) => match self.holder(packet.destination) {
                    None => return end(Outcome::Left { node: name, packet }),
                    Some(same) if same == at => {
                        return end(Outcome::Arrived { node: name, packet });
                    }
                    Some(other) => (at, next) = (other, Next::Packet(packet)),
                },
            }
        }
        match self.nodes.get(at) {
            Some(node) => lost(trace, Some(node.name.clone()), "time to live".into()),
            None => lost(trace, None, "no such node".into()),
        }
    }
}

fn lost(mut trace: Trace, node: Option<NodeName>, object: String) -> ClusterTrace {
    let decision = Decision::Dropped;
    trace.reasons.push(Reason { node: node.clone(), object, decision });
    trace.fate = Fate::Dropped;
    ClusterTrace { trace, outcome: Outcome::Dropped { node } }
}

impl SimNode {
    fn has_pod(&self, address: IpAddr) -> bool {
        self.pods.iter().any(|net| net.contains(&address))
    }

    fn has(&self, address: IpAddr) -> bool {
        self.has_pod(address) || self.sim.around.local.contains(&address)
    }
}
