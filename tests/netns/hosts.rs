//! Addresses of a node that the node uses itself: egress IPs, and destinations of a policy that
//! selects every source.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use common::fleet::{
    Fleet, Result, check, dual, expect, expect_nothing, lab, policy, sources, tool,
};
use egress_datapath::testing::lab::{
    EIP_B, Echo, Lab, NODE_B_OUTSIDE, Netns, POD_A, POD_B, POD_C, PORT, Pair, SERVER,
};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, bind, recv, socket_with};

use crate::packets::ping;

const B: Option<&str> = Some("node-b");
const ANY: Pair = [IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED)];
const SSH: u16 = 22;
const PATIENCE: Option<Duration> = Some(Duration::from_secs(60));

/// A connection from the server to a service of node-b.
struct Session {
    client: TcpStream,
    host: TcpStream,
}

impl Session {
    fn open(lab: &Lab, bound: IpAddr, to: IpAddr) -> Result<Self> {
        let listener = lab.node_b.netns.run(|| TcpListener::bind((bound, SSH)))??;
        let client = lab.server.run(|| TcpStream::connect((to, SSH)))??;
        let (host, _) = listener.accept()?;
        [&client, &host].into_iter().try_for_each(|end| end.set_read_timeout(PATIENCE))?;
        Ok(Self { client, host })
    }

    /// Both ends say a word, the client first: conntrack may not know the connection.
    fn talk(&mut self) -> Result {
        for (from, to) in [(&self.client, &self.host), (&self.host, &self.client)] {
            let (mut from, mut to) = (from, to);
            from.write_all(b"word")?;
            to.read_exact(&mut [0; 4])?;
        }
        Ok(())
    }
}

/// Asks the server from an address of a node, by TCP and UDP.
fn ask_from(node: &Netns, from: IpAddr, server: IpAddr) -> Result {
    let udp = node.run(|| UdpSocket::bind((from, 0)))??;
    udp.set_read_timeout(PATIENCE)?;
    udp.send_to(b"?", (server, PORT))?;
    udp.recv(&mut [0; 64])?;
    let family = if from.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let tcp =
        node.run(|| socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None))??;
    set_socket_timeout(&tcp, Timeout::Recv, PATIENCE)?;
    set_socket_timeout(&tcp, Timeout::Send, PATIENCE)?;
    bind(&tcp, &SocketAddr::new(from, 0))?;
    rustix::net::connect(&tcp, &SocketAddr::new(server, PORT))?;
    let mut answer = [0; 64];
    let (length, _) = recv(&tcp, &mut answer, RecvFlags::empty())?;
    assert_eq!(answer.get(..length), Some(from.to_string().as_bytes()));
    Ok(())
}

#[test]
fn egress_ip_of_gateway_used_by_gateway_and_pods() -> Result {
    // An address of its own with services at every address, and one more with services at that one.
    for (eip, bound) in [(NODE_B_OUTSIDE, ANY), (EIP_B, EIP_B)] {
        let lab = lab();
        let node = &lab.node_b.netns;
        node.sysctl(&[("ipv6/bindv6only", "1")])?;
        let _service = Echo::start(node, &bound)?;
        let mut sessions = Vec::new();
        for (bound, to) in bound.into_iter().zip(eip) {
            sessions.push(Session::open(&lab, bound, to)?);
        }
        let mut fleet = Fleet::open(&lab)?;
        fleet.apply(&[policy("p", &[POD_A, POD_B], B, dual(eip))?])?;
        for round in 0..2 {
            sessions.iter_mut().try_for_each(Session::talk)?;
            for (from, server) in eip.into_iter().zip(SERVER) {
                ask_from(node, from, server)?;
                ping(&lab.server, from)?;
                ping(node, server)?;
            }
            check(&[
                expect(&lab.server, eip, SERVER),
                expect(&lab.pod_a, SERVER, eip),
                expect(&lab.pod_b, SERVER, eip),
            ]);
            if round == 0 {
                harness::needs(&["conntrack"]);
                tool(node, "conntrack -F")?;
            }
        }
        let mut seen = sources(&lab);
        // Echo requests of the node have the address that its routes prefer.
        seen.retain(|source| !NODE_B_OUTSIDE.contains(source));
        assert!(seen.iter().all(|source| eip.contains(source)), "{seen:?}");
    }
    Ok(())
}

#[test]
fn addresses_of_node_reached_while_every_source_is_selected() -> Result {
    let lab = lab();
    let node = &lab.node_b.netns;
    let _service = Echo::start(node, &NODE_B_OUTSIDE)?;
    let mut everybody = policy("everybody", &[], None, dual(EIP_B))?;
    everybody.sources = vec!["0.0.0.0/0".parse()?, "::/0".parse()?];
    for gateway in [None, B] {
        everybody.gateway = gateway.map(egress_datapath::NodeName::new).transpose()?;
        let mut fleet = Fleet::open(&lab)?;
        fleet.apply(std::slice::from_ref(&everybody))?;
        drop(sources(&lab));
        check(&[
            expect(&lab.server, NODE_B_OUTSIDE, SERVER),
            expect(&lab.pod_b, NODE_B_OUTSIDE, POD_B),
            expect(node, SERVER, NODE_B_OUTSIDE),
            expect(node, POD_C, egress_datapath::testing::lab::NODE_B),
        ]);
        for (from, server) in NODE_B_OUTSIDE.into_iter().zip(SERVER) {
            ask_from(node, from, server)?;
            ping(&lab.server, from)?;
        }
        assert!(sources(&lab).is_subset(&NODE_B_OUTSIDE.into_iter().collect()));
        let pods = [&lab.pod_a, &lab.pod_b, &lab.stranger];
        check(&pods.map(|pod| match gateway {
            Some(_) => expect(pod, SERVER, EIP_B),
            None => expect_nothing(pod, SERVER),
        }));
        let expected: BTreeSet<_> = gateway.map(|_| EIP_B).into_iter().flatten().collect();
        // A repeated datagram of the node itself may be late.
        let seen = sources(&lab).into_iter().filter(|source| !NODE_B_OUTSIDE.contains(source));
        assert_eq!(seen.collect::<BTreeSet<_>>(), expected);
    }
    Ok(())
}
