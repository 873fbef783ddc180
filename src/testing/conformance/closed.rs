//! Conformance cases of failing closed: packets that must be dropped when objects are missing.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};
use std::thread;

use crate::datapath::observe;
use crate::{Changes, Cluster, Datapath, EgressIp, KernelDatapath, KernelError, MacAddr, State};

use super::super::lab::{
    EIP_B, EIP_C, Echo, Host, NODE_A, NODE_B, NODE_B_OUTSIDE, Netns, OTHER_SERVER, POD_A, POD_B,
    Proto, SERVER, STRANGER, probe,
};
use super::Failure;
use super::expect::{Expect, check};
use super::frame::vxlan;
use super::trial::{Result, Trial, dual, policy};

const B: Option<&str> = Some("node-b");
const C: Option<&str> = Some("node-c");

pub(super) fn no_gateway(trial: &mut Trial<'_>) -> Result {
    trial.apply(&[policy("p", &[POD_A, POD_B], None, dual(EIP_B))?])?;
    check(&[
        Expect::nothing(trial.pod_a(), SERVER),
        Expect::nothing(trial.pod_b(), SERVER),
        Expect::source(trial.pod_a(), POD_B, POD_A),
    ])?;
    trial.saw(&[])?;
    check(&[Expect::source(trial.server(), POD_A, SERVER)])?;
    // The pod's replies to connections that the server opens.
    trial.saw(&[POD_A])
}

pub(super) fn single_family(trial: &mut Trial<'_>) -> Result {
    for of_one in EIP_B {
        let egress_ip = match of_one {
            IpAddr::V4(v4) => EgressIp::V4(v4),
            IpAddr::V6(v6) => EgressIp::V6(v6),
        };
        trial.apply(&[policy("p", &[POD_A, POD_B], B, egress_ip)?])?;
        trial.seen();
        let source = EIP_B.map(|ip| (ip == of_one).then_some(ip));
        let [who, other] = [trial.pod_a(), trial.pod_b()];
        check(&[
            Expect { source, ..Expect::nothing(who, SERVER) },
            Expect { source, ..Expect::nothing(other, SERVER) },
            Expect::source(who, POD_B, POD_A),
        ])?;
        trial.saw(&[[of_one; 2]])?;
    }
    Ok(())
}

pub(super) fn gateway_not_ready(trial: &mut Trial<'_>) -> Result {
    trial.apply(&[policy("p", &[POD_A], C, dual(EIP_C))?])?;
    let policies = [policy("p", &[POD_A], B, dual(EIP_B))?];
    // All nodes but the new gateway have the new policy.
    trial.apply_to("node-c", &policies)?;
    trial.apply_to("node-a", &policies)?;
    check(&[Expect::nothing(trial.pod_a(), SERVER)])?;
    trial.saw(&[])?;
    trial.apply(&policies)?;
    check(&[Expect::source(trial.pod_a(), SERVER, EIP_B)])
}

pub(super) fn nodes_disagree(trial: &mut Trial<'_>) -> Result {
    let by_b = [policy("p", &[POD_A], B, dual(EIP_B))?];
    let by_c = [policy("p", &[POD_A], C, dual(EIP_C))?];
    for (node, policies) in [("node-c", &by_b), ("node-b", &by_c), ("node-a", &by_b)] {
        trial.apply_to(node, policies)?;
    }
    check(&[
        Expect::nothing(trial.pod_a(), SERVER),
        Expect::source(trial.stranger(), SERVER, STRANGER),
    ])?;
    trial.saw(&[STRANGER])?;
    trial.apply(&by_c)?;
    check(&[Expect::source(trial.pod_a(), SERVER, EIP_C)])
}

/// An edit of a node's kernel state by another program.
type Damage = fn(&mut State);

const DAMAGES: [Damage; 8] = [
    |state| {
        if let Some(link) = &mut state.link {
            link.up = false;
        }
    },
    |state| {
        let (rules, firewall) = (state.rules.clone(), state.firewall.clone());
        *state = State { rules, firewall, ..State::default() };
    },
    |state| state.rules.clear(),
    |state| {
        state.rules.pop_first();
    },
    |state| state.routes.clear(),
    |state| state.neighbours.clear(),
    |state| state.fdb.clear(),
    |state| state.addresses.clear(),
];

pub(super) fn lost_piece(trial: &mut Trial<'_>) -> Result {
    let policies = [policy("p", &[POD_A], B, dual(EIP_B))?];
    trial.apply(&policies)?;
    for damage in DAMAGES {
        spoil(&trial.lab.node_a, damage)?;
        let (_, pod) = trial.pod_a();
        thread::scope(|scope| {
            for to in SERVER {
                // The reply does not matter, only the sources that the server records.
                scope.spawn(move || probe(pod, Proto::Udp, to));
            }
        });
        trial.saw_no_others(&[EIP_B])?;
        trial.apply(&policies)?;
        check(&[Expect::source(trial.pod_a(), SERVER, EIP_B)])?;
        trial.seen();
    }
    Ok(())
}

pub(super) fn lost_table(trial: &mut Trial<'_>) -> Result {
    let policies = [policy("p", &[POD_A, POD_B], B, dual(EIP_B))?];
    trial.apply(&policies)?;
    let damages: [Damage; 2] = [|state| state.firewall = None, |state| *state = State::default()];
    for damage in damages {
        for host in [&trial.lab.node_a, &trial.lab.node_b] {
            spoil(host, damage)?;
        }
        trial.apply(&policies)?;
        trial.seen();
        check(&[
            Expect::source(trial.pod_a(), SERVER, EIP_B),
            Expect::source(trial.pod_b(), SERVER, EIP_B),
        ])?;
        trial.saw(&[EIP_B])?;
    }
    Ok(())
}

/// Edits the kernel state of a node, as any privileged program can.
fn spoil(host: &Host, damage: Damage) -> Result {
    let mut kernel = host.netns.run(KernelDatapath::open)??;
    let holds = observe(&mut kernel)?;
    let mut spoilt = holds.clone();
    damage(&mut spoilt);
    let refused = |error| KernelError::answer(error, "it is not damaged as the case wants it");
    Ok(kernel.apply(&Changes::between(&holds, &spoilt)).map_err(refused)?)
}

pub(super) fn nothing_left(trial: &mut Trial<'_>) -> Result {
    trial.apply(&[
        policy("p", &[POD_A, POD_B], B, dual(EIP_B))?,
        policy("q", &[STRANGER], C, EgressIp::Node)?,
        policy("r", &[POD_B], None, EgressIp::Node)?,
    ])?;
    trial.remove()?;
    for host in trial.lab.nodes() {
        let state = observe(&mut host.netns.run(KernelDatapath::open)??)?;
        if !state.is_empty() {
            let node = trial.lab.cluster(host)?.node;
            return Err(Failure::Remains { node, state: Box::new(state) });
        }
    }
    check(&[Expect::source(trial.pod_a(), SERVER, POD_A)])
}

pub(super) fn injected_frame(trial: &mut Trial<'_>) -> Result {
    trial.apply(&[policy("p", &[POD_A], B, dual(EIP_B))?])?;
    let (cluster, frame) = frame(trial)?;
    for (netns, arrives) in [(&trial.lab.node_a.netns, true), (&trial.lab.router, false)] {
        send_frame(netns, &frame, &NODE_B, cluster.tunnel.port)?;
        // Once a later probe has a reply, the frames have arrived or never will.
        check(&[Expect::source(trial.stranger(), OTHER_SERVER, STRANGER)])?;
        let [v4, _] = EIP_B;
        // The frame from node-a arrives, which shows that the frame is valid.
        if arrives { trial.saw(&[STRANGER, [v4; 2]])? } else { trial.saw(&[STRANGER])? }
    }
    Ok(())
}

pub(super) fn frame_of_a_pod(trial: &mut Trial<'_>) -> Result {
    // With the masquerade, a pod's packet to another node has its own node's address.
    trial.masquerade("cni")?;
    trial.apply(&[policy("p", &[POD_A], B, dual(EIP_B))?])?;
    let (cluster, frame) = frame(trial)?;
    for (_, pod) in [trial.pod_a(), trial.stranger(), trial.pod_c()] {
        send_frame(pod, &frame, [NODE_B, NODE_B_OUTSIDE].as_flattened(), cluster.tunnel.port)?;
    }
    // Once a later probe has a reply, the frames have arrived or never will.
    check(&[Expect::source(trial.stranger(), OTHER_SERVER, NODE_A)])?;
    trial.saw(&[NODE_A])?;
    // The same frame from the node arrives: it was dropped because a pod sent it.
    let (_, node) = trial.node_a();
    send_frame(node, &frame, &NODE_B, cluster.tunnel.port)?;
    check(&[Expect::source(trial.stranger(), OTHER_SERVER, NODE_A)])?;
    let [v4, _] = EIP_B;
    trial.saw(&[NODE_A, [v4; 2]])
}

/// Sends a frame of the tunnel to each address: the integration chooses the family of the underlay.
fn send_frame(netns: &Netns, frame: &[u8], addresses: &[IpAddr], port: u16) -> Result {
    for &to in addresses {
        let any: IpAddr = match to {
            IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        netns.run(|| {
            let socket = UdpSocket::bind((any, 0))?;
            (0..3).try_for_each(|_| socket.send_to(frame, (to, port)).map(drop))
        })??;
    }
    Ok(())
}

/// Returns the cluster, and a valid VXLAN packet from node-a to node-b in its tunnel.
fn frame(trial: &Trial<'_>) -> Result<(Cluster, Vec<u8>)> {
    let cluster = trial.lab.cluster(&trial.lab.node_a)?;
    let mac = |name: &str| {
        let node = cluster.nodes.iter().find(|node| node.name.as_str() == name);
        node.map_or(MacAddr::new([0; 6]), crate::Node::mac)
    };
    let frame = vxlan(&cluster, mac("node-b"), mac("node-a"));
    Ok((cluster, frame))
}

pub(super) fn egress_ip_service(trial: &mut Trial<'_>) -> Result {
    let _service = Echo::start(&trial.lab.node_b.netns, &[EIP_B, NODE_B_OUTSIDE].concat())?;
    check(&[Expect::source(trial.server(), EIP_B, SERVER)])?;
    trial.apply(&[policy("p", &[POD_A], B, dual(EIP_B))?])?;
    check(&[
        Expect::source(trial.server(), EIP_B, SERVER),
        Expect::source(trial.server(), NODE_B_OUTSIDE, SERVER),
        Expect::source(trial.pod_a(), SERVER, EIP_B),
    ])
}
