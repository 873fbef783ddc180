//! What becomes of connections that are open while policies come, move and go.

use std::collections::BTreeSet;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use crate::fleet::{Fleet, Result, dual, have, lab, nft, policy, sources};
use crate::lab::echo::PORT;
use crate::lab::{EIP_B, EIP_C, Lab, NODE_A, Netns, POD_A, Pair, SERVER};

const PATIENCE: Duration = Duration::from_millis(900);

#[test]
fn an_open_datagram_flow_wears_what_a_new_one_would() -> Result {
    let Some(lab) = lab()? else { return Ok(()) };
    if !have("nft")? {
        return Ok(());
    }
    masquerade(&lab)?;
    let flows = [datagrams(&lab.pod_a, SERVER[0])?, datagrams(&lab.pod_a, SERVER[1])?];
    let settles = |source: Pair| -> Result {
        for (flow, source) in flows.iter().zip(source) {
            // A flow that is ended may lose the datagram that finds it out.
            assert_eq!(ask(flow).or_else(|_| ask(flow))?, source);
            assert_eq!(ask(flow)?, source);
        }
        assert_eq!(sources(&lab), source.into_iter().collect::<BTreeSet<_>>());
        Ok(())
    };
    let other: Pair = ["198.51.100.210".parse()?, "2001:db8:51::210".parse()?];
    lab.node_b.own(other)?;
    let mut fleet = Fleet::open(&lab)?;
    settles(NODE_A)?;
    fleet.apply(&[policy("p", &[POD_A], Some("node-b"), dual(EIP_B))?])?;
    settles(EIP_B)?;
    fleet.apply(&[policy("p", &[POD_A], Some("node-b"), dual(other))?])?;
    settles(other)?;
    fleet.apply(&[policy("p", &[POD_A], Some("node-c"), dual(EIP_C))?])?;
    settles(EIP_C)?;
    fleet.apply(&[])?;
    settles(NODE_A)?;
    fleet.apply(&[policy("p", &[POD_A], Some("node-b"), dual(EIP_B))?])?;
    settles(EIP_B)?;
    fleet.remove()?;
    settles(NODE_A)?;
    Ok(())
}

#[test]
fn an_open_connection_ends_or_goes_on_but_never_leaves_as_the_pod() -> Result {
    let Some(lab) = lab()? else { return Ok(()) };
    if !have("nft")? {
        return Ok(());
    }
    masquerade(&lab)?;
    let listener = lab.server.run(|| TcpListener::bind((SERVER[0], PORT + 1)))??;
    let connect = || -> Result<(TcpStream, TcpStream)> {
        let client = lab.pod_a.run(|| TcpStream::connect((SERVER[0], PORT + 1)))??;
        let (server, _) = listener.accept()?;
        for stream in [&client, &server] {
            stream.set_read_timeout(Some(PATIENCE))?;
        }
        Ok((client, server))
    };
    let policies = [policy("p", &[POD_A], Some("node-b"), dual(EIP_B))?];
    let mut fleet = Fleet::open(&lab)?;
    let before = connect()?;
    fleet.apply(&policies)?;
    let _ends = speak(&before);
    let steered = connect()?;
    assert!(speak(&steered).is_ok());
    assert_eq!(steered.1.peer_addr()?.ip(), EIP_B[0]);
    // The same again leaves what is open alone.
    fleet.apply(&policies)?;
    assert!(speak(&steered).is_ok());
    fleet.remove()?;
    let _ends = speak(&steered);
    assert!(!sources(&lab).contains(&POD_A[0]));
    Ok(())
}

#[test]
fn open_connections_of_others_are_left_alone() -> Result {
    let Some(lab) = lab()? else { return Ok(()) };
    if !have("nft")? {
        return Ok(());
    }
    masquerade(&lab)?;
    let listener = lab.server.run(|| TcpListener::bind((SERVER[0], PORT + 1)))??;
    let client = lab.stranger.run(|| TcpStream::connect((SERVER[0], PORT + 1)))??;
    let (server, _) = listener.accept()?;
    let pair = (client, server);
    for stream in [&pair.0, &pair.1] {
        stream.set_read_timeout(Some(PATIENCE))?;
    }
    let mut fleet = Fleet::open(&lab)?;
    assert!(speak(&pair).is_ok());
    fleet.apply(&[policy("p", &[POD_A], Some("node-b"), dual(EIP_B))?])?;
    assert!(speak(&pair).is_ok());
    fleet.apply(&[policy("p", &[POD_A], Some("node-c"), dual(EIP_C))?])?;
    assert!(speak(&pair).is_ok());
    fleet.remove()?;
    assert!(speak(&pair).is_ok());
    Ok(())
}

/// Hides the pods behind their nodes, as a CNI plugin does.
pub(crate) fn masquerade(lab: &Lab) -> Result {
    for host in lab.nodes() {
        let rules = "table inet cni {
            chain postrouting {
                type nat hook postrouting priority srcnat;
                ip daddr != 10.244.0.0/16 ip saddr 10.244.0.0/16 masquerade
                ip6 daddr != fd44::/16 ip6 saddr fd44::/16 masquerade
            }
        }";
        nft(&host.netns, &[], rules)?;
    }
    Ok(())
}

/// A socket whose datagrams are all of one flow.
pub(crate) fn datagrams(netns: &Netns, server: IpAddr) -> Result<UdpSocket> {
    let any: IpAddr = match server {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = netns.run(|| UdpSocket::bind((any, 0)))??;
    socket.connect((server, PORT))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    Ok(socket)
}

/// The source that the server saw.
pub(crate) fn ask(flow: &UdpSocket) -> Result<IpAddr> {
    let mut answer = [0; 64];
    flow.send(b"?")?;
    let length = flow.recv(&mut answer)?;
    Ok(String::from_utf8_lossy(answer.get(..length).unwrap_or_default()).parse()?)
}

/// A word there and back.
pub(crate) fn speak((client, server): &(TcpStream, TcpStream)) -> io::Result<()> {
    let mut word = [0; 4];
    let (mut client, mut server) = (client, server);
    client.write_all(b"ping")?;
    server.read_exact(&mut word)?;
    server.write_all(b"pong")?;
    client.read_exact(&mut word)
}
