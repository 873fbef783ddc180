//! Flows of pods that hide behind their nodes.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpStream, UdpSocket};
use std::time::Duration;

use common::fleet::{Result, nft};
use egress_datapath::testing::lab::{Lab, Netns, PORT};

/// How long an answer to a datagram may take that may be lost, and one that may not.
const SOON: Duration = Duration::from_millis(900);
const LATE: Duration = Duration::from_secs(120);

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
    Ok(socket)
}

/// The source that the server saw; a flow that is ended may lose the datagram that finds it out.
pub(crate) fn ask_twice(flow: &UdpSocket) -> Result<IpAddr> {
    ask(flow, SOON).or_else(|_| ask(flow, LATE))
}

fn ask(flow: &UdpSocket, patience: Duration) -> Result<IpAddr> {
    let mut answer = [0; 64];
    flow.set_read_timeout(Some(patience))?;
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
