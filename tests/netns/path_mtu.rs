//! TCP segments of full size through a tunnel that carries less than the links at its ends.

use std::collections::BTreeSet;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Shutdown, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use common::backend::{backend, outer, replies};
use common::fleet::{Fleet, Result, check, dual, expect, lab, nft, policy, sources, tool};
use egress_datapath::testing::lab::{EIP_B, Lab, Netns, POD_A, POD_B, POD_C, SERVER};
use egress_datapath::{Backend, EgressPolicy, MarkLayout, Replies};

const SIZE: usize = 200_000;
const PORT: u16 = 7013;
/// Longer than any transfer takes.
const PATIENCE: Duration = Duration::from_secs(20);
/// Long enough for segments to be sent again, and short enough to wait for.
const STALL: Duration = Duration::from_millis(500);

/// The end that receives.
#[derive(Clone, Copy, Debug)]
enum To {
    Server,
    Client,
}

/// Sends bytes by a connection that the client opens; returns how many arrive.
fn transfer(server: &Netns, client: &Netns, at: IpAddr, to: To, wait: Duration) -> Result<usize> {
    let listener = server.run(|| TcpListener::bind((at, PORT)))??;
    let client = client.run(|| TcpStream::connect((at, PORT)))??;
    let (server, _) = listener.accept()?;
    let (mut from, mut into) = match to {
        To::Server => (client, server),
        To::Client => (server, client),
    };
    from.set_write_timeout(Some(wait))?;
    into.set_read_timeout(Some(wait))?;
    thread::scope(|scope| {
        let sender = scope.spawn(move || {
            let _stalled = from.write_all(&vec![7; SIZE]);
            let _closed = from.shutdown(Shutdown::Write);
        });
        let (mut count, mut bytes) = (0, vec![0; 16_384]);
        let read = loop {
            match into.read(&mut bytes) {
                Ok(0) => break Ok(count),
                Ok(length) => count += length,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break Ok(count),
                Err(error) => break Err(error),
            }
        };
        drop(into);
        sender.join().map_err(|_| "the sender panicked")?;
        Ok(read?)
    })
}

/// Notes the MSS of each segment with the SYN flag that arrives.
fn note_mss(netns: &Netns) -> Result {
    let table = "table inet mss {
        set seen { typeof tcp option maxseg size; flags dynamic; }
        chain input {
            type filter hook input priority 0;
            tcp flags syn tcp dport 7013 add @seen { tcp option maxseg size }
            tcp flags syn tcp sport 7013 add @seen { tcp option maxseg size }
        }
    }";
    nft(netns, &[], table)
}

fn take_mss(netns: &Netns) -> Result<BTreeSet<u16>> {
    let list = tool(netns, "nft list set inet mss seen")?;
    tool(netns, "nft flush set inet mss seen")?;
    let Some((_, elements)) = list.split_once("elements = {") else { return Ok(BTreeSet::new()) };
    let numbers = elements.split(|one: char| !one.is_ascii_digit()).filter(|one| !one.is_empty());
    Ok(numbers.map(str::parse).collect::<std::result::Result<_, _>>()?)
}

/// Drops the ICMP errors by which a sender learns the path MTU.
fn drop_icmp_errors(netns: &Netns) -> Result {
    let table = "table inet errors { chain input {
        type filter hook input priority 0;
        icmp type destination-unreachable icmp code frag-needed counter drop
        icmpv6 type packet-too-big counter drop
    }; }";
    nft(netns, &[], table)
}

/// The paths of replies that this run is about.
fn paths() -> Vec<Replies> {
    match (backend(), replies(&MarkLayout::SEED, backend())) {
        (Backend::Nftables, Replies::Direct) => vec![Replies::Direct, Replies::Tunnel],
        (_, one) => vec![one],
    }
}

/// A pod that uses the tunnel, and one on the gateway.
fn policies() -> Result<Vec<EgressPolicy>> {
    Ok(vec![policy("p", &[POD_A, POD_B], Some("node-b"), dual(EIP_B))?])
}

fn fleet(lab: &Lab, replies: Replies) -> Result<Fleet> {
    let mut fleet = Fleet::with(lab, |cluster| cluster.replies = replies)?;
    fleet.apply(&policies()?)?;
    Ok(fleet)
}

/// Both directions, each over IPv4 and IPv6.
fn ways() -> impl Iterator<Item = (To, IpAddr)> {
    [To::Server, To::Client].into_iter().flat_map(|to| SERVER.map(|at| (to, at)))
}

/// Has node-b and the server send each other packets by the router, and not at once.
fn by_router(lab: &Lab) -> Result {
    for netns in [&lab.router, &lab.node_b.netns, &lab.server] {
        for setting in ["send_redirects", "accept_redirects"] {
            netns.sysctl(&[(&format!("ipv4/conf/all/{setting}"), "0")])?;
        }
    }
    let devices = tool(&lab.server, "ip -o link")?;
    for device in devices.lines().filter_map(|line| line.split([':', '@']).nth(1)) {
        lab.server.sysctl(&[(&format!("ipv6/conf/{}/accept_redirects", device.trim()), "0")])?;
    }
    let router = ["198.51.100.1", "2001:db8:51::1"];
    for ((server, eip), via) in SERVER.into_iter().zip(EIP_B).zip(router) {
        tool(&lab.node_b.netns, &format!("ip route replace {server} via {via} dev eth1"))?;
        tool(&lab.server, &format!("ip route replace {eip} via {via}"))?;
    }
    Ok(())
}

#[test]
fn path_mtu_of_tunnel_and_beyond_is_discovered_in_both_directions() -> Result {
    harness::needs(&["ip"]);
    for replies in paths() {
        let lab = lab();
        let _fleet = fleet(&lab, replies)?;
        by_router(&lab)?;
        for mtu in [1500, 1400, 1290] {
            tool(&lab.router, &format!("ip link set outside mtu {mtu}"))?;
            for (to, at) in ways() {
                for pod in [&lab.pod_a, &lab.pod_b] {
                    // By what a receiver knows, it would announce an MSS that spares the sender.
                    for netns in [pod, &lab.server] {
                        tool(netns, "ip -4 route flush cache")?;
                        tool(netns, "ip -6 route flush cache")?;
                    }
                    let arrived = transfer(&lab.server, pod, at, to, PATIENCE)?;
                    assert_eq!(arrived, SIZE, "{replies:?}, path of {mtu}, to the {to:?}, {at}");
                    let (sender, receiver) = match to {
                        To::Server => (pod, at),
                        To::Client => (&lab.server, EIP_B[usize::from(at.is_ipv6())]),
                    };
                    let route = tool(sender, &format!("ip route get {receiver}"))?;
                    let learned = mtu == 1500 || route.contains(&format!("mtu {mtu}"));
                    assert!(learned, "{replies:?}, path of {mtu}, to the {to:?}: {route}");
                }
            }
        }
        assert_eq!(sources(&lab), EIP_B.into());
    }
    Ok(())
}

#[test]
fn clamped_mss_needs_no_icmp_errors() -> Result {
    harness::needs(&["nft"]);
    for replies in paths() {
        let by_tunnel = replies == Replies::Tunnel;
        let lab = lab();
        for netns in [&lab.pod_a, &lab.server] {
            drop_icmp_errors(netns)?;
        }
        for netns in [&lab.pod_a, &lab.pod_b, &lab.server] {
            note_mss(netns)?;
        }
        let mut fleet = fleet(&lab, replies)?;
        for (to, at) in ways() {
            let through = matches!(to, To::Server) || by_tunnel;
            let wait = if through { STALL } else { PATIENCE };
            let arrived = transfer(&lab.server, &lab.pod_a, at, to, wait)?;
            assert_eq!(arrived < SIZE, through, "{replies:?}, not clamped, to the {to:?}, {at}");
        }
        let whole = BTreeSet::from([1460, 1440]);
        for netns in [&lab.pod_a, &lab.server] {
            assert_eq!(take_mss(netns)?, whole, "{replies:?}, not clamped");
        }
        fleet.change(|cluster| cluster.tunnel.clamp_mss = true);
        fleet.apply(&policies()?)?;
        for (to, at) in ways() {
            let arrived = transfer(&lab.server, &lab.pod_a, at, to, PATIENCE)?;
            assert_eq!(arrived, SIZE, "{replies:?}, clamped, to the {to:?}, {at}");
        }
        // The headers of the tunnel take 50 bytes over IPv4, and 70 over IPv6.
        let clamped = [[1410, 1390], [1390, 1370]][outer()];
        let clamped = BTreeSet::from(clamped);
        assert_eq!(take_mss(&lab.pod_a)?, clamped, "{replies:?}");
        assert_eq!(take_mss(&lab.server)?, if by_tunnel { &clamped } else { &whole }.clone());
        // Neither direction of these uses the tunnel.
        for (server, pod) in SERVER.into_iter().zip(POD_B) {
            transfer(&lab.server, &lab.pod_b, server, To::Server, PATIENCE)?;
            transfer(&lab.pod_b, &lab.pod_a, pod, To::Server, PATIENCE)?;
        }
        for netns in [&lab.pod_b, &lab.server] {
            assert_eq!(take_mss(netns)?, whole, "{replies:?}");
        }
        check(&[expect(&lab.pod_a, SERVER, EIP_B), expect(&lab.pod_a, POD_C, POD_A)]);
        fleet.mend(&policies()?, &"nothing")?;
        fleet.audit()?;
        fleet.remove()?;
    }
    Ok(())
}
