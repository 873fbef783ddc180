//! Conformance cases of open connections while policies are added, moved and removed.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use super::super::lab::{EIP_B, EIP_C, NODE_A, Netns, POD_A, PORT, Pair, SERVER};
use super::Failure;
use super::trial::{Result, Trial, dual, policy};

const B: Option<&str> = Some("node-b");
const C: Option<&str> = Some("node-c");
/// Timeout of a message on a connection that may have ended; it covers a retransmission.
const PATIENCE: Duration = Duration::from_secs(3);
/// Timeout of a reply to a datagram that may be lost.
const SOON: Duration = Duration::from_millis(900);
/// Timeout of a reply that must arrive, on a busy machine too.
const LATE: Duration = Duration::from_secs(120);
/// An egress IP that the case assigns to node-b.
const ANOTHER: Pair = [
    IpAddr::V4(Ipv4Addr::new(198, 51, 100, 210)),
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0x51, 0, 0, 0, 0, 0x210)),
];

pub(super) fn restart(trial: &mut Trial<'_>) -> Result {
    let policies = [policy("p", &[POD_A], B, dual(EIP_B))?];
    trial.apply(&policies)?;
    let pipe = Pipe::open(trial, &trial.lab.pod_a)?;
    pipe.speak("a new connection")?;
    trial.restart()?;
    pipe.speak("a connection after a restart")?;
    trial.apply(&policies)?;
    pipe.speak("a connection after what was wanted is wanted again")?;
    let [source, _] = EIP_B;
    pipe.is_from(source)?;
    trial.saw(&[[source; 2]])
}

pub(super) fn open_datagrams(trial: &mut Trial<'_>) -> Result {
    trial.masquerade("cni")?;
    trial.lab.node_b.own(ANOTHER)?;
    let flows = [flow(&trial.lab.pod_a, SERVER, 0)?, flow(&trial.lab.pod_a, SERVER, 1)?];
    let settles = |trial: &Trial<'_>, source: Pair| -> Result {
        for (flow, source) in flows.iter().zip(source) {
            // An ended flow may lose the first datagram.
            let seen = ask(flow, SOON).or_else(|_| ask(flow, LATE));
            let what = || format!("datagrams that should leave as {source}");
            let seen = seen.map_err(|error| Failure::Connection { what: what(), error })?;
            if seen != source {
                let error = io::Error::other(format!("they leave as {seen}"));
                return Err(Failure::Connection { what: what(), error });
            }
        }
        trial.saw(&[source])
    };
    settles(trial, NODE_A)?;
    trial.apply(&[policy("p", &[POD_A], B, dual(EIP_B))?])?;
    settles(trial, EIP_B)?;
    trial.apply(&[policy("p", &[POD_A], B, dual(ANOTHER))?])?;
    settles(trial, ANOTHER)?;
    trial.apply(&[policy("p", &[POD_A], C, dual(EIP_C))?])?;
    settles(trial, EIP_C)?;
    trial.apply(&[])?;
    settles(trial, NODE_A)?;
    trial.apply(&[policy("p", &[POD_A], B, dual(EIP_B))?])?;
    settles(trial, EIP_B)?;
    trial.remove()?;
    settles(trial, NODE_A)
}

pub(super) fn open_connection(trial: &mut Trial<'_>) -> Result {
    trial.masquerade("cni")?;
    let policies = [policy("p", &[POD_A], B, dual(EIP_B))?];
    let before = Pipe::open(trial, &trial.lab.pod_a)?;
    trial.apply(&policies)?;
    let _ends = before.word(PATIENCE);
    let steered = Pipe::open(trial, &trial.lab.pod_a)?;
    steered.speak("a new connection of a selected pod")?;
    let [source, _] = EIP_B;
    steered.is_from(source)?;
    trial.apply(&policies)?;
    steered.speak("a connection while the same is wanted again")?;
    trial.apply(&[])?;
    let _ends = steered.word(PATIENCE);
    trial.saw_no_others(&[NODE_A, EIP_B])
}

pub(super) fn connections_of_others(trial: &mut Trial<'_>) -> Result {
    trial.masquerade("cni")?;
    let pipe = Pipe::open(trial, &trial.lab.stranger)?;
    pipe.speak("a connection before there are policies")?;
    trial.apply(&[policy("p", &[POD_A], B, dual(EIP_B))?])?;
    pipe.speak("a connection while another pod is selected")?;
    trial.apply(&[policy("p", &[POD_A], C, dual(EIP_C))?])?;
    pipe.speak("a connection while another pod's policy moves")?;
    trial.remove()?;
    pipe.speak("a connection while all is removed")
}

/// Both ends of a TCP connection to the server.
struct Pipe {
    client: TcpStream,
    server: TcpStream,
}

impl Pipe {
    fn open(trial: &Trial<'_>, from: &Netns) -> Result<Self> {
        let [to, _] = SERVER;
        let to = (to, PORT + 1);
        let listener = trial.lab.server.run(|| TcpListener::bind(to))??;
        let connect = from.run(|| TcpStream::connect_timeout(&to.into(), LATE))?;
        let what = "a new connection".to_owned();
        let client = connect.map_err(|error| Failure::Connection { what, error })?;
        let (server, _) = listener.accept()?;
        Ok(Self { client, server })
    }

    fn is_from(&self, source: IpAddr) -> Result {
        let seen = self.server.peer_addr()?.ip();
        let error = || io::Error::other(format!("it is from {seen}"));
        let what = || format!("a connection that should be from {source}");
        if seen == source {
            Ok(())
        } else {
            Err(Failure::Connection { what: what(), error: error() })
        }
    }

    fn speak(&self, what: &str) -> Result {
        self.word(LATE).map_err(|error| Failure::Connection { what: what.to_owned(), error })
    }

    /// Sends a message to the server and one back.
    fn word(&self, patience: Duration) -> io::Result<()> {
        let mut word = [0; 4];
        let (mut client, mut server) = (&self.client, &self.server);
        client.set_read_timeout(Some(patience))?;
        server.set_read_timeout(Some(patience))?;
        client.write_all(b"ping")?;
        server.read_exact(&mut word)?;
        server.write_all(b"pong")?;
        client.read_exact(&mut word)
    }
}

/// Opens a socket whose datagrams are one UDP flow, to the server's address of this family.
fn flow(netns: &Netns, server: Pair, family: usize) -> io::Result<UdpSocket> {
    let [v4, v6] = server;
    let (any, to): (IpAddr, IpAddr) = match family {
        0 => (Ipv4Addr::UNSPECIFIED.into(), v4),
        _ => (Ipv6Addr::UNSPECIFIED.into(), v6),
    };
    let socket = netns.run(|| UdpSocket::bind((any, 0)))??;
    socket.connect((to, PORT))?;
    Ok(socket)
}

/// Sends a datagram and returns the source that the server saw.
fn ask(flow: &UdpSocket, patience: Duration) -> io::Result<IpAddr> {
    let mut answer = [0; 64];
    flow.set_read_timeout(Some(patience))?;
    flow.send(b"?")?;
    let length = flow.recv(&mut answer)?;
    let answer = String::from_utf8_lossy(answer.get(..length).unwrap_or_default()).into_owned();
    answer.parse().map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}
