//! Explains the path of a packet through a node.

use super::packet::{Frame, Packet};
use super::path::conntrack::Conntrack;
use super::path::{HostContext, Walk};
use super::trace::Trace;
use crate::count::Counts;
use crate::state::State;

/// Traces the first packet of a connection that a pod on the node opens.
///
/// The trace evaluates the rules, maps, routes and FDB entries of the state, not the policies that
/// they were made from, so it works alike for a planned and for an observed state. Other objects of
/// the host are not known: its routes, its firewall and its translations. The destination is that
/// after destination NAT.
///
/// With the iptables backend the trace has no class, and no policy: policies share sets there, and
/// only rules of policies with destinations have the policy's id as comment.
///
/// ```
/// use egress_datapath::alloc::{MarkPool, TablePool};
/// use egress_datapath::explain::explain_received;
/// use egress_datapath::explain::{Fate, Packet};
/// use egress_datapath::{Cluster, EgressIp, EgressPolicy, Node, NodeName, PolicyId, explain, plan};
///
/// let node = |name: &str, underlay: &str, tunnel: &str| -> Result<_, Box<dyn std::error::Error>> {
///     Ok(Node::new(NodeName::new(name)?, vec![underlay.parse()?], vec![tunnel.parse()?]))
/// };
/// let mut cluster = Cluster::new(
///     NodeName::new("a")?,
///     vec![node("a", "10.10.0.11", "172.31.0.11/16")?, node("b", "10.10.0.12", "172.31.0.12/16")?],
///     vec!["10.244.0.0/16".parse()?],
/// );
/// let policy = EgressPolicy::new(
///     PolicyId::new("shop/checkout")?,
///     vec!["10.244.1.10/32".parse()?],
///     EgressIp::V4("198.51.100.200".parse()?),
/// )
/// .with_gateway(NodeName::new("b")?);
/// let state = |cluster: &Cluster| {
///     let (mut marks, mut tables) = (MarkPool::default(), TablePool::default());
///     plan(cluster, [&policy], &mut marks, &mut tables).map(|plan| plan.state)
/// };
/// let packet = Packet::udp("10.244.1.10".parse()?, 40_000, "192.0.2.1".parse()?, 53);
/// let trace = explain(&state(&cluster)?, &packet);
/// assert_eq!(trace.policy(), Some("shop/checkout"));
/// assert_eq!(trace.gateway(), Some("b"));
///
/// let Fate::Tunnelled(frame) = trace.fate else { panic!("{trace}") };
/// cluster.node = NodeName::new("b")?;
/// let there = explain_received(&state(&cluster)?, &frame);
/// assert_eq!(there.fate, Fate::Routed(Some("198.51.100.200".parse()?)));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn explain(state: &State, packet: &Packet) -> Trace {
    alone(state, *packet, |walk| walk.arrive(*packet).0)
}

/// Traces a frame that another node sent to the node through the tunnel.
pub fn explain_received(state: &State, frame: &Frame) -> Trace {
    alone(state, frame.packet, |walk| walk.receive(frame).0)
}

fn alone(
    state: &State,
    packet: Packet,
    go: impl FnOnce(&mut Walk<'_>) -> super::trace::Fate,
) -> Trace {
    let (mut conntrack, around) = (Conntrack::default(), HostContext::default());
    let mut walk = Walk {
        state,
        conntrack: &mut conntrack,
        counts: &mut Counts::new(),
        around: &around,
        reasons: Vec::new(),
    };
    let fate = go(&mut walk);
    Trace { packet, reasons: walk.reasons, fate }
}
