//! Answers that are still under way when the connection they belong to is ended.

use std::io::{self, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

use common::fleet::{Fleet, Result, dual, is_beyond, lab, nft, policy, tool};
use egress_datapath::Destinations;
use egress_datapath::testing::lab::{EIP_B, Lab, POD_A, Proto, SERVER, probe_patiently};
use ipnet::IpNet;
use rustix::fd::OwnedFd;
use rustix::net::sockopt::Timeout;
use rustix::net::{self, AddressFamily, RecvFlags, SendFlags, SocketType};

use crate::flows::masquerade;

const PORT: u16 = 7004;
/// "Use for experimentation and testing" (RFC 3692): no ports.
const EXPERIMENT: u32 = 253;
const PATIENCE: Duration = Duration::from_secs(120);

/// Has the server note which pods speak to it with their own address, in any protocol.
pub(crate) fn note_sources(lab: &Lab) -> Result {
    let rules = "table inet noted {
        set pods4 { type ipv4_addr; flags dynamic; }
        set pods6 { type ipv6_addr; flags dynamic; }
        chain input {
            type filter hook input priority 0;
            ip saddr 10.244.0.0/16 add @pods4 { ip saddr }
            ip6 saddr fd44::/16 add @pods6 { ip6 saddr }
        }
    }";
    nft(&lab.server, &[], rules)
}

/// A lab whose nodes masquerade as a CNI plugin does, with a server that notes sources.
fn noting_lab() -> Result<Lab> {
    let lab = lab();
    harness::needs(&["nft"]);
    masquerade(&lab)?;
    note_sources(&lab)?;
    Ok(lab)
}

/// The lines of the table that tell of pods.
pub(crate) fn noted(lab: &Lab) -> Result<Vec<String>> {
    let listed = tool(&lab.server, "nft list table inet noted")?;
    Ok(listed.lines().filter(|line| line.contains("elements")).map(String::from).collect())
}

/// A flow of a pod: both ends can say a word, whoever hears it.
struct Flow {
    name: String,
    pod_says: Box<dyn Fn() -> io::Result<()> + Send + Sync>,
    server_says: Box<dyn Fn() -> io::Result<()> + Send + Sync>,
    snat_address: IpAddr,
}

fn datagrams(lab: &Lab, to: IpAddr) -> Result<Flow> {
    let server = lab.server.run(|| UdpSocket::bind((to, PORT)))??;
    let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let pod = lab.pod_a.run(|| UdpSocket::bind(any))??;
    server.set_read_timeout(Some(PATIENCE))?;
    pod.connect((to, PORT))?;
    pod.send(b"?")?;
    let (_, peer) = server.recv_from(&mut [0; 8])?;
    Ok(Flow {
        name: format!("datagrams to {to}"),
        pod_says: Box::new(move || pod.send(b"?").map(drop)),
        server_says: Box::new(move || server.send_to(b"!", peer).map(drop)),
        snat_address: peer.ip(),
    })
}

fn connection(lab: &Lab, to: IpAddr) -> Result<Flow> {
    let listener = lab.server.run(|| TcpListener::bind((to, PORT)))??;
    let pod = lab.pod_a.run(|| TcpStream::connect_timeout(&(to, PORT).into(), PATIENCE))??;
    let (server, peer) = listener.accept()?;
    server.set_nodelay(true)?;
    // Nobody reads, so that the window closes in the end.
    server.set_nonblocking(true)?;
    pod.set_nonblocking(true)?;
    Ok(Flow {
        name: format!("connection to {to}"),
        pod_says: Box::new(move || (&pod).write_all(b"?")),
        server_says: Box::new(move || (&server).write_all(b"!")),
        snat_address: peer.ip(),
    })
}

fn portless(lab: &Lab, to: IpAddr) -> Result<Flow> {
    let family = if to.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let protocol = net::Protocol::from_raw(EXPERIMENT.try_into()?);
    let open = || net::socket(family, SocketType::RAW, Some(protocol));
    let (server, pod): (OwnedFd, OwnedFd) = (lab.server.run(open)??, lab.pod_a.run(open)??);
    let say = |from: &OwnedFd, to: IpAddr| -> io::Result<()> {
        net::sendto(from, b"word", SendFlags::empty(), &SocketAddr::new(to, 0))?;
        Ok(())
    };
    net::sockopt::set_socket_timeout(&server, Timeout::Recv, Some(PATIENCE))?;
    say(&pod, to)?;
    let (_, _, peer) = net::recvfrom(&server, &mut [0; 64], RecvFlags::empty())?;
    let peer = SocketAddr::try_from(peer.ok_or("no peer")?)?.ip();
    Ok(Flow {
        name: format!("protocol {EXPERIMENT} to {to}"),
        pod_says: Box::new(move || say(&pod, to)),
        server_says: Box::new(move || say(&server, peer)),
        snat_address: peer,
    })
}

/// Waits until the pod's packets have come to the server, as those have that it sends after them.
fn await_packets(lab: &Lab) -> Result {
    for to in SERVER {
        probe_patiently(&lab.pod_a, Proto::Udp, to)?;
    }
    Ok(())
}

/// What the server has noted is nothing, or where answers are not held back, something.
fn check_noted(lab: &Lab, held: bool, what: &str) -> Result {
    await_packets(lab)?;
    let noted = noted(lab)?;
    assert_eq!(noted.is_empty(), held, "{what}: {noted:?}");
    Ok(())
}

#[test]
fn late_answers_policy_removed_flow_not_reversed() -> Result {
    let lab = noting_lab()?;
    let held = !is_beyond("late answers are not held back");
    let mut fleet = Fleet::open(&lab)?;
    let policies = [policy("p", &[POD_A], Some("node-b"), dual(EIP_B))?];
    // None is closed: a pod's answer to the end of a connection that nobody tracks is invalid to
    // every NAT, and the pod is not selected any more.
    let mut flows = Vec::new();
    for open in [datagrams, connection, portless] {
        for to in SERVER {
            fleet.apply(&policies)?;
            let flow = open(&lab, to)?;
            assert!(EIP_B.contains(&flow.snat_address), "{}: {}", flow.name, flow.snat_address);
            let (done, said) = (AtomicBool::new(false), AtomicU32::new(0));
            let hundred_more = || {
                let enough = said.load(Relaxed) + 100;
                while said.load(Relaxed) < enough {
                    thread::sleep(Duration::from_millis(1));
                }
            };
            thread::scope(|scope| -> Result {
                scope.spawn(|| {
                    while !done.load(Relaxed) {
                        let _refused = (flow.server_says)();
                        said.fetch_add(1, Relaxed);
                        thread::sleep(Duration::from_micros(200));
                    }
                });
                hundred_more();
                // The client first, so that the gateway still lets the answers through.
                let removed = fleet.apply_to("node-a", &[]);
                hundred_more();
                for _ in 0..20 {
                    let _reset = (flow.pod_says)();
                    thread::sleep(Duration::from_millis(1));
                }
                done.store(true, Relaxed);
                removed
            })?;
            check_noted(&lab, held, &flow.name)?;
            flows.push(flow);
        }
    }
    fleet.remove()
}

/// For datagrams nothing tells the two ends apart; see the design notes.
#[test]
fn conntrack_flush_connection_reopened_by_pod_only() -> Result {
    let lab = noting_lab()?;
    let held = !is_beyond("answers of forgotten connections are not held back");
    let mut fleet = Fleet::open(&lab)?;
    let everywhere = policy("p", &[POD_A], Some("node-b"), dual(EIP_B))?;
    let mut listed = everywhere.clone();
    let around =
        |to: IpAddr| IpNet::new(to, if to.is_ipv4() { 24 } else { 64 }).map(|net| net.trunc());
    listed.destinations = Destinations::Nets(vec![around(SERVER[0])?, around(SERVER[1])?]);
    for policy in [everywhere, listed] {
        fleet.apply(&[policy])?;
        for to in SERVER {
            let flow = connection(&lab, to)?;
            assert!(EIP_B.contains(&flow.snat_address), "{}: {}", flow.name, flow.snat_address);
            for _ in 0..20 {
                tool(&lab.node_a.netns, "conntrack -F")?;
                let spoken = (flow.server_says)();
                thread::sleep(Duration::from_millis(5));
                let spoken = spoken.and_then(|()| (flow.pod_says)());
                if held {
                    spoken?;
                }
            }
            check_noted(&lab, held, &flow.name)?;
        }
    }
    fleet.remove()
}

#[test]
fn connection_ends_with_policy_after_caching_change() -> Result {
    let lab = noting_lab()?;
    let policies = [policy("p", &[POD_A], Some("node-b"), dual(EIP_B))?];
    let open = |caching| Fleet::with(&lab, move |cluster| cluster.connection_caching = caching);
    for (before, after) in [(true, false), (false, true)] {
        for to in SERVER {
            open(before)?.apply(&policies)?;
            let flows = [datagrams(&lab, to)?, connection(&lab, to)?];
            let mut fleet = open(after)?;
            fleet.apply(&policies)?;
            for flow in &flows {
                (flow.server_says)()?;
                (flow.pod_says)()?;
            }
            fleet.apply_to("node-a", &[])?;
            for flow in &flows {
                for _ in 0..20 {
                    let _reset = (flow.pod_says)();
                    thread::sleep(Duration::from_millis(1));
                }
            }
            check_noted(&lab, true, &format!("caching {before}, then {after}, to {to}"))?;
            fleet.apply(&[])?;
        }
    }
    open(false)?.remove()
}
