//! Scenarios whose packets are not simply a pod's questions.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::OwnedFd;

use egress_datapath::explain;
use egress_datapath::explain::{Fate, Frame, HostContext, Packet, explain_received};
use egress_datapath::sim::{Outcome, SimCluster, SimNode};
use egress_datapath::testing::lab::{
    EIP_B, Echo, NODE_B, NODE_B_OUTSIDE, OTHER_SERVER, POD_A, PORT, Proto, SERVER, STRANGER, probe,
};
use rustix::net::{self, AddressFamily, SendFlags, SocketType, ipproto};

use super::scenarios::by_b;
use super::{End, FROM_PORT, Result, World, packet};

/// The answers of a pod that is called, walked through what its node's kernel holds.
pub(super) fn inbound(world: &mut World<'_>) -> Result {
    world.apply(&[by_b()?])?;
    let mut sim = world.simulated(0)?;
    for (server, to) in SERVER.into_iter().zip(POD_A) {
        for proto in Proto::BOTH {
            // Answered is what comes back as from whom it was asked.
            let real = probe(&world.lab.server, proto, to).map_or(End::Lost, |_| End::As(to));
            let question = packet(proto, server, to);
            let asked = sim.send(question);
            let answered = sim.send(question.reply());
            let told = match answered.fate {
                Fate::Routed(Some(source)) => End::As(source),
                _ => End::Lost,
            };
            world.compare(real, told, &[asked, answered]);
        }
    }
    Ok(())
}

/// A segment with flags that no TCP sends together, so that it belongs to no connection.
pub(super) fn invalid(world: &mut World<'_>) -> Result {
    const SYN_RST: u8 = 0x06;
    world.apply(&[by_b()?])?;
    let mut segment = [0; 20];
    segment[..2].copy_from_slice(&FROM_PORT.to_be_bytes());
    segment[2..4].copy_from_slice(&PORT.to_be_bytes());
    (segment[12], segment[13]) = (5 << 4, SYN_RST);
    let states = world.states()?;
    let mut sim = world.simulated(0)?;
    for selected in [false, true] {
        let from = if selected { POD_A } else { STRANGER };
        let (netns, _) = world.at(from[0])?;
        for (source, to) in from.into_iter().zip(SERVER) {
            drop(world.lab.outside.take_seen());
            let family = if to.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
            let open = || net::socket(family, SocketType::RAW, Some(ipproto::TCP));
            let socket: OwnedFd = netns.run(open)??;
            net::sendto(&socket, &segment, SendFlags::empty(), &SocketAddr::new(to, 0))?;
            // An answered question later it has arrived, or never will.
            probe(&world.lab.pod_c, Proto::Udp, to)?;
            let seen = world.lab.outside.take_seen();
            let real =
                if seen.contains(&(source, Proto::Tcp)) { End::As(source) } else { End::Lost };
            let trace = if selected {
                sim.send_invalid(packet(Proto::Tcp, source, to))
            } else {
                explain(&states[0], &packet(Proto::Tcp, source, to))
            };
            let told = match trace.fate {
                Fate::Routed(Some(source)) => End::As(source),
                _ => End::Lost,
            };
            world.compare(real, told, &[trace]);
        }
    }
    Ok(())
}

/// A frame with a selected pod's datagram, from the node and from a stranger on the underlay.
pub(super) fn injected(world: &mut World<'_>) -> Result {
    world.apply(&[by_b()?])?;
    let states = world.states()?;
    let link = states[1].link.clone().ok_or("no tunnel device")?;
    let sender = states[0].link.clone().ok_or("no tunnel device")?;
    let bytes = vxlan_frame(link.mac.octets(), sender.mac.octets());
    let packet = Packet::udp(POD_A[0], 5000, SERVER[0], PORT);
    let lab = world.lab;
    for (netns, from) in [(&lab.router, "10.10.0.1"), (&lab.node_a.netns, "10.10.0.11")] {
        drop(lab.outside.take_seen());
        netns.run(|| {
            UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?.send_to(&bytes, (NODE_B[0], link.port))
        })??;
        // An answered question later it has arrived, or never will.
        probe(&lab.pod_c, Proto::Udp, OTHER_SERVER[0])?;
        let seen = lab.outside.take_seen();
        let here = [POD_A[0], EIP_B[0]].into_iter();
        let mut here = here.filter(|source| seen.contains(&(*source, Proto::Udp)));
        let real = here.next().map_or(End::Lost, End::As);
        let (from, to, mac) = (from.parse()?, NODE_B[0], link.mac);
        let (port, vni, source_mac) = (link.port, link.vni, sender.mac);
        let frame = Frame { from, to, port, vni, source_mac, mac, packet };
        let trace = explain_received(&states[1], &frame);
        let told = match trace.fate {
            Fate::Routed(Some(source)) => End::As(source),
            _ => End::Lost,
        };
        world.compare(real, told, &[trace]);
    }
    Ok(())
}

/// Packets from outside to an egress IP at which a service listens.
pub(super) fn scanned(world: &mut World<'_>) -> Result {
    let _service = Echo::start(&world.lab.node_b.netns, &[EIP_B, NODE_B_OUTSIDE].concat())?;
    world.apply(&[by_b()?])?;
    let mut sim = world.simulated(1)?;
    let local = [NODE_B_OUTSIDE, EIP_B].concat();
    let listens = |ip: &IpAddr| {
        [Packet::TCP, Packet::UDP].map(|protocol| (protocol, SocketAddr::new(*ip, PORT)))
    };
    let sockets = local.iter().flat_map(listens).collect();
    sim = sim.with_host(HostContext::new(local).with_sockets(sockets));
    let name = world.lab.cluster(&world.lab.node_b)?.node;
    let mut sims = SimCluster::new([SimNode { name, sim, pods: Vec::new() }]);
    for to in [EIP_B, NODE_B_OUTSIDE] {
        for (server, to) in SERVER.into_iter().zip(to) {
            for proto in Proto::BOTH {
                let answer = probe(&world.lab.server, proto, to);
                let real = answer.map_or(End::Lost, End::As);
                let journey = sims.send(packet(proto, server, to));
                let told = match journey.outcome {
                    Outcome::Arrived { packet, .. } => End::As(packet.source),
                    _ => End::Lost,
                };
                world.compare(real, told, &[journey.trace]);
            }
        }
    }
    Ok(())
}

/// A UDP datagram from the selected pod to the server, as it comes through the tunnel.
fn vxlan_frame(to: [u8; 6], from: [u8; 6]) -> Vec<u8> {
    // 29 bytes, do not fragment, UDP, checksum 0x0495, 10.244.1.10 to 198.51.100.10.
    let ip = [69, 0, 0, 29, 0, 0, 0x40, 0, 64, 17, 4, 0x95, 10, 244, 1, 10, 198, 51, 100, 10];
    let vxlan = [0x08, 0, 0, 0, 0, 0, 100, 0];
    // From port 5000 to 7000, nine bytes, without checksum.
    let udp = [0x13, 0x88, 0x1b, 0x58, 0, 9, 0, 0, b'?'];
    [&vxlan[..], &to, &from, &[0x08, 0], &ip, &udp].concat()
}
