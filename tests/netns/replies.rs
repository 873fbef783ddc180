//! Replies that return to the pod's node through the tunnel.

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use common::fleet::{Fleet, Result, check, dual, expect, expect_nothing, lab, nft, policy, tool};
use egress_datapath::testing::lab::{
    EIP_B, EIP_C, Host, Lab, Netns, POD_A, POD_B, POD_C, SERVER, STRANGER,
};
use egress_datapath::{Cluster, EgressPolicy, Replies};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::answers::{note_sources, noted};
use crate::flows::masquerade;

const PORT: u16 = 7011;
/// Long enough for a segment that was lost to be sent again.
const PATIENCE: Duration = Duration::from_secs(60);
/// Flows of each protocol and family.
const FLOWS: usize = 250;

fn tunnel(cluster: &mut Cluster) {
    cluster.replies = Replies::Tunnel;
}

fn direct(cluster: &mut Cluster) {
    cluster.replies = Replies::Direct;
}

fn by_b() -> Result<Vec<EgressPolicy>> {
    Ok(vec![policy("p", &[POD_A], Some("node-b"), dual(EIP_B))?])
}

/// Drops what arrives from the underlay with an address of the outside, as a fabric does that
/// knows the addresses of each port.
fn drop_foreign_sources(host: &Host) -> Result {
    harness::needs(&["nft"]);
    let rules = "table inet fabric {
        chain prerouting {
            type filter hook prerouting priority -400;
            iifname eth0 ip saddr 198.51.100.0/24 counter drop
            iifname eth0 ip6 saddr 2001:db8:51::/64 counter drop
        }
    }";
    nft(&host.netns, &[], rules)
}

#[test]
fn replies_reach_pod_where_underlay_drops_foreign_sources() -> Result {
    let lab = lab();
    let mut fleet = Fleet::with(&lab, tunnel)?;
    drop_foreign_sources(&lab.node_a)?;
    let policies = by_b()?;
    // A pod on the gateway, and one that is steered the other way, at the same time.
    let beside = [
        policy("q", &[POD_B], Some("node-b"), dual(EIP_B))?,
        policy("r", &[POD_C], Some("node-b"), dual(EIP_B))?,
        policy("s", &[STRANGER], Some("node-c"), dual(EIP_C))?,
    ];
    fleet.apply(&[policies, beside.into()].concat())?;
    check(&[
        expect(&lab.pod_a, SERVER, EIP_B),
        expect(&lab.pod_b, SERVER, EIP_B),
        expect(&lab.pod_c, SERVER, EIP_B),
        expect(&lab.stranger, SERVER, EIP_C),
        expect(&lab.pod_a, POD_C, POD_A),
        expect(&lab.pod_c, POD_A, POD_C),
    ]);
    fleet.remove()
}

#[test]
fn path_of_replies_changes_node_by_node() -> Result {
    let lab = lab();
    let mut fleet = Fleet::with(&lab, direct)?;
    let policies = by_b()?;
    let listener = listen(&lab.server, SERVER[0])?;
    fleet.apply(&policies)?;
    let pipe = open(&lab.pod_a, SERVER[0], &listener)?;
    for change in [tunnel, direct] {
        for name in ["node-a", "node-b", "node-c"] {
            fleet.change(|cluster| {
                if cluster.node.as_str() == name {
                    change(cluster);
                }
            });
            fleet.apply_to(name, &policies)?;
            pipe.server_first()?;
            pipe.client_first()?;
            check(&[expect(&lab.pod_a, SERVER, EIP_B)]);
        }
        fleet.apply(&policies)?;
    }
    Ok(())
}

/// Both ends of a TCP connection.
struct Pipe {
    client: TcpStream,
    server: TcpStream,
}

fn listen(netns: &Netns, on: IpAddr) -> Result<TcpListener> {
    Ok(netns.run(|| TcpListener::bind((on, PORT)))??)
}

fn open(from: &Netns, to: IpAddr, listener: &TcpListener) -> Result<Pipe> {
    let to = SocketAddr::from((to, PORT));
    let client = from.run(|| TcpStream::connect_timeout(&to, PATIENCE))??;
    let (server, _) = listener.accept()?;
    for stream in [&client, &server] {
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_nodelay(true)?;
    }
    Ok(Pipe { client, server })
}

fn word(mut from: &TcpStream, mut to: &TcpStream) -> io::Result<()> {
    from.write_all(b"word")?;
    to.read_exact(&mut [0; 4])
}

impl Pipe {
    fn client_first(&self) -> io::Result<()> {
        word(&self.client, &self.server)?;
        word(&self.server, &self.client)
    }

    fn server_first(&self) -> io::Result<()> {
        word(&self.server, &self.client)?;
        word(&self.client, &self.server)
    }
}

/// A UDP flow: the pod's socket, and the address that the server knows.
struct Flow {
    pod: UdpSocket,
    known: SocketAddr,
}

fn datagrams(netns: &Netns, server: &UdpSocket) -> Result<Flow> {
    let to = server.local_addr()?;
    let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let pod = netns.run(|| UdpSocket::bind(any))??;
    pod.set_read_timeout(Some(PATIENCE))?;
    pod.connect(to)?;
    pod.send(b"word")?;
    let (_, known) = server.recv_from(&mut [0; 8])?;
    server.send_to(b"word", known)?;
    pod.recv(&mut [0; 8])?;
    Ok(Flow { pod, known })
}

impl Flow {
    /// A datagram from the server, and the pod's answer.
    fn server_first(&self, server: &UdpSocket) -> Result {
        server.send_to(b"word", self.known)?;
        self.pod.recv(&mut [0; 8])?;
        self.pod.send(b"word")?;
        let (_, source) = server.recv_from(&mut [0; 8])?;
        if source == self.known { Ok(()) } else { Err(format!("{source} spoke").into()) }
    }
}

fn serve(netns: &Netns, on: IpAddr) -> Result<UdpSocket> {
    let server = netns.run(|| UdpSocket::bind((on, PORT)))??;
    server.set_read_timeout(Some(PATIENCE))?;
    Ok(server)
}

fn many_files() -> Result {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    Ok(setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })?)
}

/// A lab in which pods that no policy selects leave with the node's address, and the server notes
/// pods that speak with their own.
fn masquerading_lab() -> Result<Lab> {
    let lab = lab();
    harness::needs(&["nft", "conntrack"]);
    masquerade(&lab)?;
    note_sources(&lab)?;
    Ok(lab)
}

#[test]
fn server_speaks_first_after_node_of_pod_has_forgotten() -> Result {
    let lab = masquerading_lab()?;
    many_files()?;
    let mut fleet = Fleet::with(&lab, tunnel)?;
    let policies = by_b()?;
    fleet.apply(&policies)?;
    let (mut pipes, mut flows) = (Vec::new(), Vec::new());
    let servers = SERVER.map(|address| (listen(&lab.server, address), serve(&lab.server, address)));
    for (listener, server) in servers {
        let (listener, server) = (listener?, server?);
        let to = server.local_addr()?.ip();
        for _ in 0..FLOWS {
            pipes.push(open(&lab.pod_a, to, &listener)?);
            flows.push((datagrams(&lab.pod_a, &server)?, server.try_clone()?));
        }
    }
    for round in 0..2 {
        tool(&lab.node_a.netns, "conntrack -F")?;
        pipes.iter().try_for_each(Pipe::server_first)?;
        flows.iter().try_for_each(|(flow, server)| flow.server_first(server))?;
        // Nothing has changed, and no connection is in the way.
        fleet.apply(&policies)?;
        if round == 0 {
            fleet.audit()?;
        }
        pipes.iter().try_for_each(Pipe::server_first)?;
        pipes.iter().try_for_each(Pipe::client_first)?;
        flows.iter().try_for_each(|(flow, server)| flow.server_first(server))?;
    }
    assert_eq!(noted(&lab)?, [""; 0], "a pod spoke with its own address");
    println!("{} connections and {} UDP flows go on", pipes.len(), flows.len());
    Ok(())
}

#[test]
fn flow_that_gateway_has_returned_follows_policy_to_another_gateway() -> Result {
    let lab = masquerading_lab()?;
    let mut fleet = Fleet::with(&lab, tunnel)?;
    let other = policy("q", &[STRANGER], Some("node-b"), dual(EIP_B))?;
    // With and without another policy for which node-b goes on to be a gateway.
    for beside in [vec![], vec![other]] {
        let policies = [by_b()?, beside.clone()].concat();
        fleet.apply(&policies)?;
        let mut flows = Vec::new();
        for address in SERVER {
            let server = serve(&lab.server, address)?;
            flows.push((datagrams(&lab.pod_a, &server)?, server));
        }
        tool(&lab.node_a.netns, "conntrack -F")?;
        flows.iter().try_for_each(|(flow, server)| flow.server_first(server))?;
        let moved = [vec![policy("p", &[POD_A], Some("node-c"), dual(EIP_C))?], beside].concat();
        fleet.apply(&moved)?;
        for ((flow, server), eip) in flows.iter().zip(EIP_C) {
            flow.pod.send(b"word")?;
            let (_, source) = server.recv_from(&mut [0; 8])?;
            assert_eq!(source.ip(), eip);
        }
    }
    assert_eq!(noted(&lab)?, [""; 0], "a pod spoke with its own address");
    Ok(())
}

#[test]
fn icmp_error_of_pod_reaches_server_after_node_of_pod_has_forgotten() -> Result {
    let lab = masquerading_lab()?;
    let mut fleet = Fleet::with(&lab, tunnel)?;
    fleet.apply(&by_b()?)?;
    for address in SERVER {
        let server = serve(&lab.server, address)?;
        let flow = datagrams(&lab.pod_a, &server)?;
        drop(flow.pod);
        tool(&lab.node_a.netns, "conntrack -F")?;
        server.connect(flow.known)?;
        server.send(b"word")?;
        let heard = server.recv(&mut [0; 8]).map_err(|error| error.kind());
        assert_eq!(heard, Err(io::ErrorKind::ConnectionRefused), "{address}");
    }
    assert_eq!(noted(&lab)?, [""; 0], "a pod spoke with its own address");
    Ok(())
}

#[test]
fn nodes_without_route_to_server_get_replies() -> Result {
    let lab = lab();
    let mut fleet = Fleet::with(&lab, tunnel)?;
    let policies = by_b()?;
    fleet.apply(&policies)?;
    for family in ["-4", "-6"] {
        tool(&lab.node_a.netns, &format!("ip {family} route del default"))?;
    }
    for filter in ["2", "1", "0"] {
        lab.node_a.netns.sysctl(&[("ipv4/conf/all/rp_filter", filter)])?;
        check(&[expect(&lab.pod_a, SERVER, EIP_B)]);
    }
    Ok(())
}

#[test]
fn reverse_path_filters_pass_packets_from_tunnel() -> Result {
    let lab = lab();
    harness::needs(&["nft"]);
    let mut fleet = Fleet::with(&lab, tunnel)?;
    fleet.apply(&[by_b()?, vec![policy("q", &[POD_B], Some("node-b"), dual(EIP_B))?]].concat())?;
    for node in lab.nodes() {
        node.netns.sysctl(&[("ipv4/conf/all/rp_filter", "1")])?;
        // As firewalld has it, for either family.
        nft(
            &node.netns,
            &[],
            "table inet firewall {
            chain prerouting {
                type filter hook prerouting priority filter + 10;
                iifname { eth0, eth1, egress.vxlan } fib saddr . mark . iif oif missing counter drop
            }
        }",
        )?;
    }
    check(&[
        expect(&lab.pod_a, SERVER, EIP_B),
        expect(&lab.pod_b, SERVER, EIP_B),
        expect(&lab.pod_a, POD_C, POD_A),
    ]);
    // A host whose administrator has the mark looked up everywhere.
    for node in lab.nodes() {
        node.netns.sysctl(&[("ipv4/conf/all/src_valid_mark", "1")])?;
    }
    check(&[expect(&lab.pod_a, SERVER, EIP_B), expect(&lab.pod_b, SERVER, EIP_B)]);
    Ok(())
}

#[test]
fn connections_to_pods_are_left_alone() -> Result {
    let lab = lab();
    let mut fleet = Fleet::with(&lab, tunnel)?;
    fleet.apply(&by_b()?)?;
    check(&[
        expect(&lab.server, POD_A, SERVER),
        expect(&lab.pod_a, SERVER, EIP_B),
        expect_nothing(&lab.pod_a, EIP_C),
    ]);
    Ok(())
}
