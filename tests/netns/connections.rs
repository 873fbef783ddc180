//! Open connections over moves, again and again, and those that no policy is about.

use std::collections::BTreeSet;
use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};
use std::process;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use common::fleet::{Fleet, Result, dual, lab, nft, policy, sources, tool};
use common::stream::raw;
use egress_datapath::EgressPolicy;
use egress_datapath::testing::lab::{
    EIP_B, EIP_C, Host, Lab, NODE_A, Netns, POD_A, POD_C, Pair, SERVER, STRANGER,
};

use rustix::net::sockopt::set_socket_recv_buffer_size_force;
use rustix::net::{SendFlags, sendto};

use crate::flows::masquerade;

const PORT: u16 = 7002;
/// Long enough for a segment that was lost to be sent again.
const PATIENCE: Duration = Duration::from_secs(120);
const MOVES: usize = 20;
/// Addresses of node-a on the interface of its pods.
const POD_A_GATEWAY: [&str; 2] = ["10.244.1.1", "fd44:1::1"];
const SERVICE: [&str; 2] = ["10.96.0.10", "fd96::10"];

/// Both ends of a connection.
pub(crate) struct Pipe {
    name: String,
    pub(crate) client: TcpStream,
    pub(crate) server: TcpStream,
}

impl Pipe {
    fn open(from: &Netns, to: SocketAddr, listener: &TcpListener) -> Result<Self> {
        let client = from.run(|| TcpStream::connect_timeout(&to, PATIENCE))??;
        let (server, _) = listener.accept()?;
        for stream in [&client, &server] {
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.set_nodelay(true)?;
        }
        Ok(Self { name: format!("from {} to {to}", server.peer_addr()?), client, server })
    }

    /// As whom the server knows the client.
    fn source(&self) -> Result<IpAddr> {
        Ok(self.server.peer_addr()?.ip())
    }

    /// A word from the client, and one back.
    pub(crate) fn client_first(&self) -> io::Result<()> {
        say(&self.client, *b"ping")?;
        hear(&self.server, *b"ping")?;
        say(&self.server, *b"pong")?;
        hear(&self.client, *b"pong")
    }

    /// A word from the server while the client is silent, and one from the client a moment later.
    pub(crate) fn server_first(&self) -> io::Result<()> {
        say(&self.server, *b"pong")?;
        thread::sleep(Duration::from_millis(20));
        say(&self.client, *b"ping")?;
        hear(&self.client, *b"pong")?;
        hear(&self.server, *b"ping")
    }

    /// Whether the client learns that the connection is no more.
    fn is_reset(&self) -> bool {
        let spoken = say(&self.client, *b"ping").and_then(|()| hear(&self.client, *b"none"));
        spoken.is_err_and(|error| {
            let kind = error.kind();
            kind == io::ErrorKind::ConnectionReset || kind == io::ErrorKind::BrokenPipe
        })
    }
}

pub(crate) fn say(mut to: &TcpStream, word: [u8; 4]) -> io::Result<()> {
    to.write_all(&word)
}

fn hear(mut from: &TcpStream, word: [u8; 4]) -> io::Result<()> {
    let mut heard = [0; 4];
    from.read_exact(&mut heard)?;
    if heard == word { Ok(()) } else { Err(io::Error::other(format!("heard {heard:?}"))) }
}

pub(crate) fn listen(netns: &Netns, on: Pair) -> Result<[TcpListener; 2]> {
    let [v4, v6] = netns.run(|| on.map(|address| TcpListener::bind((address, PORT))))?;
    Ok([v4?, v6?])
}

/// A connection of each family, from a pod to the server.
pub(crate) fn outward(from: &Netns, listeners: &[TcpListener; 2]) -> Result<Vec<Pipe>> {
    let opened = SERVER.into_iter().zip(listeners);
    opened.map(|(to, listener)| Pipe::open(from, (to, PORT).into(), listener)).collect()
}

pub(crate) fn by(gateway: &str, egress_ip: Pair) -> Result<Vec<EgressPolicy>> {
    Ok(vec![policy("p", &[POD_A], Some(gateway), dual(egress_ip))?])
}

/// What is an operator's to do: the egress IP moves, and the neighbours are told.
fn hand_over(lab: &Lab, from: &Host, to: &Host, eip: Pair) -> Result {
    for (ip, length) in eip.into_iter().zip([32, 128]) {
        tool(&from.netns, &format!("ip addr del {ip}/{length} dev eth1"))?;
    }
    to.own(eip)?;
    for netns in [&lab.server, &lab.router] {
        tool(netns, "ip -4 neigh flush all")?;
        tool(netns, "ip -6 neigh flush all")?;
    }
    Ok(())
}

#[test]
fn connections_survive_gateway_move_with_same_egress_ip() -> Result {
    they_survive(false)
}

#[test]
fn cached_connections_survive_gateway_move_with_same_egress_ip() -> Result {
    they_survive(true)
}

fn they_survive(caching: bool) -> Result {
    let lab = lab();
    masquerade(&lab)?;
    let listeners = listen(&lab.server, SERVER)?;
    let mut fleet = Fleet::with(&lab, |cluster| cluster.connection_caching = caching)?;
    fleet.apply(&by("node-b", EIP_B)?)?;
    let talkers = outward(&lab.pod_a, &listeners)?;
    let listening = outward(&lab.pod_a, &listeners)?;
    let (mut from, mut to) = (&lab.node_b, &lab.node_c);
    let mut longest = Duration::ZERO;
    for number in 1..=MOVES {
        let policies = by(to.name, EIP_B)?;
        fleet.apply_to(to.name, &policies)?;
        hand_over(&lab, from, to, EIP_B)?;
        fleet.apply_to("node-a", &policies)?;
        fleet.apply_to(from.name, &policies)?;
        for (pipes, speak) in
            [(&talkers, Pipe::client_first as fn(&Pipe) -> _), (&listening, Pipe::server_first)]
        {
            for pipe in pipes {
                let begin = Instant::now();
                let spoken: io::Result<()> = speak(pipe);
                spoken.map_err(|error| format!("move {number}, {}: {error}", pipe.name))?;
                longest = longest.max(begin.elapsed());
            }
        }
        (from, to) = (to, from);
    }
    let count = talkers.len() + listening.len();
    writeln!(
        io::stderr(),
        "{count} connections survived {MOVES} of {MOVES} moves, longest stall {longest:?}"
    )?;
    assert_eq!(sources(&lab), EIP_B.into_iter().collect::<BTreeSet<_>>());
    Ok(())
}

/// Moves the first pod of node-a to another node, with its addresses and its interface.
fn move_pod(lab: &Lab, to: &Host) -> Result {
    let netns = format!("/proc/{}/fd/{}", process::id(), to.netns.as_fd().as_raw_fd());
    tool(&lab.node_a.netns, &format!("ip link set pod10 netns {netns} name moved"))?;
    tool(&to.netns, "ip link set moved up")?;
    let cluster = lab.cluster(to)?;
    let node = cluster.nodes.iter().find(|node| node.name.as_str() == to.name);
    let underlay = &node.ok_or("no such node")?.underlay;
    for ((pod, gateway), via) in POD_A.into_iter().zip(POD_A_GATEWAY).zip(underlay) {
        tool(&to.netns, &format!("ip addr add {gateway} dev moved nodad"))?;
        tool(&to.netns, &format!("ip route replace {pod} dev moved"))?;
        for (other, device) in
            [(&lab.node_a.netns, "eth0"), (&lab.node_b.netns, "eth0"), (&lab.router, "underlay")]
        {
            tool(other, &format!("ip route replace {pod} via {via} dev {device}"))?;
        }
    }
    Ok(())
}

#[test]
fn connections_survive_move_of_pod_to_another_node() -> Result {
    harness::needs(&["ip"]);
    for caching in [false, true] {
        let lab = lab();
        masquerade(&lab)?;
        let listeners = listen(&lab.server, SERVER)?;
        let mut fleet = Fleet::with(&lab, |cluster| cluster.connection_caching = caching)?;
        let policies = by("node-b", EIP_B)?;
        fleet.apply(&policies)?;
        let mut pipes = Vec::new();
        for _ in 0..15 {
            pipes.extend(outward(&lab.pod_a, &listeners)?);
        }
        pipes.iter().try_for_each(Pipe::client_first)?;
        move_pod(&lab, &lab.node_c)?;
        for pipe in &pipes {
            pipe.client_first().map_err(|error| format!("{}: {error}", pipe.name))?;
            pipe.server_first().map_err(|error| format!("{}: {error}", pipe.name))?;
            assert!(EIP_B.contains(&pipe.source()?), "{}", pipe.name);
        }
        // New ones, from the new node.
        for pipe in outward(&lab.pod_a, &listeners)? {
            assert!(EIP_B.contains(&pipe.source()?), "{}", pipe.name);
        }
        assert_eq!(fleet.apply(&policies)?.iter().map(|one| one.changes.len()).sum::<usize>(), 0);
    }
    Ok(())
}

/// Two pods open more flows to one destination than an egress IP has ports.
#[test]
fn flows_beyond_ports_of_egress_ip_are_dropped() -> Result {
    const PORTS: Range<u16> = 1024..41_024;
    let lab = lab();
    masquerade(&lab)?;
    let policies = [policy("p", &[POD_A, STRANGER], Some("node-b"), dual(EIP_B))?];
    Fleet::open(&lab)?.apply(&policies)?;
    let server = SERVER[0];
    let receiver = lab.server.run(|| UdpSocket::bind((server, PORT)))??;
    let _refused = set_socket_recv_buffer_size_force(&receiver, 8 << 20);
    receiver.set_read_timeout(Some(Duration::from_millis(500)))?;
    let done = AtomicBool::new(false);
    let receive = || {
        let (mut seen, mut packet) = (BTreeSet::new(), [0; 8]);
        loop {
            match receiver.recv_from(&mut packet) {
                Ok((_, from)) => drop(seen.insert(from)),
                Err(_) if done.load(Relaxed) => return seen,
                Err(_) => {}
            }
        }
    };
    // A flow whose first datagram was lost on the way has a second.
    let open_flows = || -> Result {
        for pod in [&lab.pod_a, &lab.stranger, &lab.pod_a, &lab.stranger] {
            let socket = pod.run(|| raw(server))??;
            for port in PORTS {
                // Source and destination port, length; without a checksum.
                let header = [port.to_be_bytes(), PORT.to_be_bytes(), [0, 8], [0, 0]].concat();
                sendto(&socket, &header, SendFlags::empty(), &SocketAddr::new(server, 0))?;
                if port % 64 == 0 {
                    thread::sleep(Duration::from_millis(1));
                }
            }
        }
        Ok(())
    };
    let (opened, seen) = thread::scope(|scope| {
        let receiver = scope.spawn(receive);
        let opened = open_flows();
        done.store(true, Relaxed);
        (opened, receiver.join())
    });
    opened?;
    let seen = seen.map_err(|_| "the receiver panicked")?;
    let others: BTreeSet<_> =
        seen.iter().map(SocketAddr::ip).filter(|ip| *ip != EIP_B[0]).collect();
    let (flows, ports) = (2 * PORTS.len(), seen.len());
    writeln!(io::stderr(), "{flows} flows, {ports} ports of the egress IP, others: {others:?}")?;
    assert!(others.is_empty(), "{others:?}");
    // Ports 1024 to 65535: `net/netfilter/nf_nat_core.c`.
    assert!((PORTS.len()..=64_512).contains(&ports), "{ports}");
    Ok(())
}

#[test]
fn connection_that_cannot_continue_is_reset() -> Result {
    they_are_reset(false)
}

#[test]
fn cached_connection_that_cannot_continue_is_reset() -> Result {
    they_are_reset(true)
}

fn they_are_reset(caching: bool) -> Result {
    let lab = lab();
    masquerade(&lab)?;
    let listeners = listen(&lab.server, SERVER)?;
    let other: Pair = ["198.51.100.210".parse()?, "2001:db8:51::210".parse()?];
    lab.node_b.own(other)?;
    let mut fleet = Fleet::with(&lab, |cluster| cluster.connection_caching = caching)?;
    let mut wanted = NODE_A;
    for (what, next, policies) in [
        ("a policy is added", EIP_B, by("node-b", EIP_B)?),
        ("the egress IP changes", other, by("node-b", other)?),
        ("the gateway and the egress IP change", EIP_C, by("node-c", EIP_C)?),
        ("the policy is removed", NODE_A, Vec::new()),
    ] {
        let pipes = outward(&lab.pod_a, &listeners)?;
        for (pipe, wanted) in pipes.iter().zip(wanted) {
            assert_eq!(pipe.source()?, wanted, "before {what}");
            pipe.client_first()?;
        }
        fleet.apply(&policies)?;
        for pipe in &pipes {
            assert!(pipe.is_reset(), "{what}: {}", pipe.name);
        }
        for (pipe, next) in outward(&lab.pod_a, &listeners)?.iter().zip(next) {
            assert_eq!(pipe.source()?, next, "after {what}");
        }
        wanted = next;
    }
    let right = [NODE_A, EIP_B, other, EIP_C].concat().into_iter().collect::<BTreeSet<_>>();
    let seen = sources(&lab);
    assert!(seen.is_subset(&right), "{seen:?}");
    Ok(())
}

#[test]
fn udp_flows_policy_changes_no_pod_address_leak() -> Result {
    let lab = lab();
    masquerade(&lab)?;
    let listeners = listen(&lab.server, SERVER)?;
    let mut fleet = Fleet::open(&lab)?;
    let done = AtomicBool::new(false);
    let flows = |to: IpAddr| -> io::Result<Vec<UdpSocket>> {
        let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let open = || -> io::Result<_> {
            let flow = UdpSocket::bind(any)?;
            flow.connect((to, egress_datapath::testing::lab::PORT))?;
            Ok(flow)
        };
        (0..4).map(|_| open()).collect()
    };
    let [v4, v6] = lab.pod_a.run(|| SERVER.map(flows))?;
    let flows: Vec<_> = v4?.into_iter().chain(v6?).collect();
    let sent = thread::scope(|scope| -> Result<u64> {
        let sender = scope.spawn(|| {
            let mut sent = 0;
            while !done.load(Relaxed) {
                // Where a policy closes, the node may say that there is no way; that is right.
                sent += flows.iter().map(|flow| u64::from(flow.send(b"?").is_ok())).sum::<u64>();
                thread::sleep(Duration::from_micros(300));
            }
            sent
        });
        let mut rounds = || -> Result {
            for round in 0..MOVES {
                let pipes = outward(&lab.pod_a, &listeners)?;
                match round % 4 {
                    0 => drop(fleet.apply(&by("node-b", EIP_B)?)?),
                    1 => drop(fleet.apply(&[])?),
                    2 => drop(fleet.apply(&by("node-c", EIP_C)?)?),
                    _ => fleet.remove()?,
                }
                for pipe in &pipes {
                    assert!(pipe.is_reset(), "round {round}: {}", pipe.name);
                }
            }
            Ok(())
        };
        let rounds = rounds();
        done.store(true, Relaxed);
        let sent = sender.join().map_err(|_| "the sender panicked")?;
        rounds.map(|()| sent)
    })?;
    let right = [NODE_A, EIP_B, EIP_C].concat().into_iter().collect::<BTreeSet<_>>();
    let seen = sources(&lab);
    assert_eq!(seen, right, "of {sent} datagrams");
    Ok(())
}

#[test]
fn unselected_connections_survive_policy_changes() -> Result {
    let lab = lab();
    masquerade(&lab)?;
    let [v4, v6] = SERVICE;
    let [to_v4, to_v6] = POD_C;
    let service = format!(
        "table inet service {{
            chain prerouting {{
                type nat hook prerouting priority dstnat;
                ip daddr {v4} dnat ip to {to_v4}
                ip6 daddr {v6} dnat ip6 to {to_v6}
            }}
        }}"
    );
    nft(&lab.node_a.netns, &[], &service)?;
    let at_server = listen(&lab.server, SERVER)?;
    let at_pod_a = listen(&lab.pod_a, POD_A)?;
    let at_pod_c = listen(&lab.pod_c, POD_C)?;
    let mut fleet = Fleet::open(&lab)?;
    let mut pipes = Vec::new();
    let mut open = |from: &Netns, to: Pair, at: &[TcpListener; 2], wanted: Pair| -> Result {
        for ((to, listener), wanted) in to.into_iter().zip(at).zip(wanted) {
            let pipe = Pipe::open(from, (to, PORT).into(), listener)?;
            assert_eq!(pipe.source()?, wanted, "{}", pipe.name);
            pipes.push(pipe);
        }
        Ok(())
    };
    let service: Pair = [v4.parse()?, v6.parse()?];
    open(&lab.pod_a, POD_C, &at_pod_c, POD_A)?;
    open(&lab.pod_a, service, &at_pod_c, POD_A)?;
    open(&lab.pod_c, POD_A, &at_pod_a, POD_C)?;
    open(&lab.stranger, POD_A, &at_pod_a, STRANGER)?;
    open(&lab.server, POD_A, &at_pod_a, SERVER)?;
    open(&lab.stranger, SERVER, &at_server, NODE_A)?;
    open(&lab.stranger, service, &at_pod_c, STRANGER)?;
    for (what, policies) in [
        ("a policy was added", Some(by("node-b", EIP_B)?)),
        ("its egress IP was changed", Some(by("node-b", EIP_C)?)),
        ("it was moved", Some(by("node-c", EIP_C)?)),
        ("it was closed", Some(vec![policy("p", &[POD_A], None, dual(EIP_B))?])),
        ("it was opened", Some(by("node-b", EIP_B)?)),
        ("it was removed", Some(Vec::new())),
        ("everything was removed", None),
    ] {
        match policies {
            Some(policies) => drop(fleet.apply(&policies)?),
            None => fleet.remove()?,
        }
        for pipe in &pipes {
            let spoken = pipe.client_first().and_then(|()| pipe.server_first());
            spoken.map_err(|error| format!("after {what}, {}: {error}", pipe.name))?;
        }
    }
    Ok(())
}
