//! A lab of network namespaces: three nodes, their pods, a router and a server outside the cluster.
//!
//! ```text
//! pod-a, stranger - node-a -- eth0 --\                             198.51.100.0/24
//! pod-b ----------- node-b -- eth0 ---+-- underlay -- router --+-- outside -- server .10, .20
//!                      \----- eth1 ---|------------------------|   2001:db8:51::/64
//! pod-c ----------- node-c -- eth0 --/    10.10.0.0/24         |
//!                      \----- eth1 ----   fd10::/64 -----------/
//! ```
//!
//! The router has routes to the nodes and the pods, so that a packet that leaves with an address of
//! a node or a pod gets a reply and is recorded by the server. The router's namespace also has the
//! bridges of the two segments.
//!
//! The namespaces have no names and live as long as the [`Lab`]; the host's network is not changed.
//! Code in a namespace runs on a thread of its own, and so does each [`Echo`]. Creating a namespace
//! needs `CAP_SYS_ADMIN`; a process without it calls [`isolate`] first.
//!
//! ```no_run
//! use egress_datapath::testing::lab::{self, Lab, POD_A, Proto, SERVER};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! lab::isolate()?; // first of all, while there is one thread
//! let lab = Lab::new()?;
//! for node in lab.nodes() {
//!     println!("{} is {:?}", node.name, lab.cluster(node)?.nodes);
//! }
//! assert_eq!(lab::probe(&lab.pod_a, Proto::Udp, SERVER[0])?, POD_A[0]);
//! # Ok(())
//! # }
//! ```

mod echo;
mod netns;
mod rtnl;

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsFd;

use crate::error::NameError;
use crate::{Cluster, DeviceName, EgressIp, EgressPolicy, Node, NodeName, PolicyId};
use ipnet::IpNet;

pub use echo::{Echo, PORT, Proto, probe, probe_patiently};
pub use netns::{Netns, inside, isolate};
pub use rtnl::{Device, LOOPBACK, Preference, Rtnl};

/// An address of each family, IPv4 first.
pub type Pair = [IpAddr; 2];

const fn pair(v4: [u8; 4], prefix: [u16; 3], host: u16) -> Pair {
    [
        IpAddr::V4(Ipv4Addr::new(v4[0], v4[1], v4[2], v4[3])),
        IpAddr::V6(Ipv6Addr::new(prefix[0], prefix[1], prefix[2], 0, 0, 0, 0, host)),
    ]
}

const fn outside(last: u8) -> Pair {
    // The same digits in both families: .20 and ::20.
    let digits = (last / 100) as u16 * 0x100 + (last / 10 % 10) as u16 * 0x10 + (last % 10) as u16;
    pair([198, 51, 100, last], [0x2001, 0xdb8, 0x51], digits)
}

const fn pod_of(node: u8, last: u8) -> Pair {
    let (cidr, digits) = (node as u16, (last / 10) as u16 * 0x10 + (last % 10) as u16);
    pair([10, 244, node, last], [0xfd44, cidr, 0], digits)
}

const fn underlay(node: u8) -> Pair {
    pair([10, 10, 0, 10 + node], [0xfd10, 0, 0], 0x10 + node as u16)
}

const fn tunnel(node: u8) -> Pair {
    pair([172, 31, 0, 10 + node], [0xfd11, 0, 0], 0x10 + node as u16)
}

/// First addresses of the server.
pub const SERVER: Pair = outside(10);
/// Second addresses of the server.
pub const OTHER_SERVER: Pair = outside(20);
/// An egress IP that is assigned to no node.
pub const EIP_A: Pair = outside(202);
/// An egress IP that is assigned to node-b.
pub const EIP_B: Pair = outside(200);
/// An egress IP that is assigned to node-c.
pub const EIP_C: Pair = outside(201);
/// Addresses of node-b on the outside segment.
pub const NODE_B_OUTSIDE: Pair = outside(12);
/// Addresses of node-c on the outside segment.
pub const NODE_C_OUTSIDE: Pair = outside(13);
/// Addresses of a pod on node-a, which the test policies select.
pub const POD_A: Pair = pod_of(1, 10);
/// Addresses of another pod on node-a, which the test policies do not select.
pub const STRANGER: Pair = pod_of(1, 11);
/// Addresses of the pod on node-b.
pub const POD_B: Pair = pod_of(2, 10);
/// Addresses of the pod on node-c.
pub const POD_C: Pair = pod_of(3, 10);
/// Underlay addresses of node-a, which is not a gateway.
pub const NODE_A: Pair = underlay(1);
/// Underlay addresses of node-b, a gateway.
pub const NODE_B: Pair = underlay(2);

/// Names of the nodes; their numbers start with 1.
const NODES: [&str; 3] = ["node-a", "node-b", "node-c"];

const UPLINK: u32 = 10;
const OUTSIDE: u32 = 11;
const FIRST_POD: u32 = 20;
const PREFIX: [u8; 2] = [24, 64];
const FULL: [u8; 2] = [32, 128];

/// A node: a network namespace that routes to its pods.
#[derive(Debug)]
#[non_exhaustive]
pub struct Host {
    /// Name of the node in the cluster.
    pub name: &'static str,
    /// Network namespace of the node.
    pub netns: Netns,
    number: u8,
}

/// The lab: all network namespaces and echo servers.
#[derive(Debug)]
#[non_exhaustive]
pub struct Lab {
    /// Echo server on the server's addresses.
    pub outside: Echo,
    /// Echo servers on the addresses of pod-a, pod-b and pod-c.
    pub pods: Vec<Echo>,
    /// Network namespace of the server.
    pub server: Netns,
    /// Network namespace of the pod that the test policies select.
    pub pod_a: Netns,
    /// Network namespace of the pod that the test policies do not select.
    pub stranger: Netns,
    /// Network namespace of the pod on node-b.
    pub pod_b: Netns,
    /// Network namespace of the pod on node-c.
    pub pod_c: Netns,
    /// The node that is connected to the underlay only, and is not a gateway.
    pub node_a: Host,
    /// A gateway node.
    pub node_b: Host,
    /// Another gateway node.
    pub node_c: Host,
    /// Network namespace of the router, which is not a node.
    pub router: Netns,
}

impl Lab {
    /// Builds the lab, without any datapath state; takes a fraction of a second.
    ///
    /// # Errors
    ///
    /// The kernel's error. Without `CAP_SYS_ADMIN` the first namespace is refused.
    pub fn new() -> io::Result<Self> {
        let router = router()?;
        let server = server(&router)?;
        let [a, b, c] = NODES;
        let node_a = Host::new(a, 1, &router)?;
        let node_b = Host::new(b, 2, &router)?;
        let node_c = Host::new(c, 3, &router)?;
        for (host, eip) in [(&node_b, EIP_B), (&node_c, EIP_C)] {
            host.attach_outside(&router, eip)?;
        }
        let pod_a = node_a.pod(10)?;
        let stranger = node_a.pod(11)?;
        let pod_b = node_b.pod(10)?;
        let pod_c = node_c.pod(10)?;
        let pods = [(&pod_a, POD_A), (&pod_b, POD_B), (&pod_c, POD_C)];
        let pods = pods.map(|(pod, address)| Echo::start(pod, &address));
        Ok(Self {
            outside: Echo::start(&server, &[SERVER, OTHER_SERVER].concat())?,
            pods: pods.into_iter().collect::<Result<_, _>>()?,
            server,
            pod_a,
            stranger,
            pod_b,
            pod_c,
            node_a,
            node_b,
            node_c,
            router,
        })
    }

    /// Returns the nodes.
    pub fn nodes(&self) -> [&Host; 3] {
        [&self.node_a, &self.node_b, &self.node_c]
    }

    /// Returns the cluster as seen by one of its nodes.
    #[allow(clippy::unused_self, reason = "there is no cluster without a lab")]
    pub fn cluster(&self, of: &Host) -> Result<Cluster, NameError> {
        cluster(of.name)
    }
}

/// Returns the lab's cluster as seen by the node of this name.
pub fn cluster(of: &str) -> Result<Cluster, NameError> {
    let node = |(name, number): (&str, u8)| {
        let tunnel = tunnel(number).into_iter().zip([16, 112]);
        Ok(Node::new(
            NodeName::new(name)?,
            underlay(number).to_vec(),
            tunnel.map(|(ip, length)| net(ip, length)).collect(),
        ))
    };
    let nodes = NODES.into_iter().zip(1..).map(node).collect::<Result<_, _>>()?;
    let pods = pair([10, 244, 0, 0], [0xfd44, 0, 0], 0);
    let excluded = vec![net(pods[0], 16), net(pods[1], 16)];
    let mut cluster = Cluster::new(NodeName::new(of)?, nodes, excluded);
    cluster.tunnel.underlay_device = Some(DeviceName::new("eth0")?);
    Ok(cluster)
}

impl Host {
    fn new(name: &'static str, number: u8, router: &Netns) -> io::Result<Self> {
        let netns = forwarding()?;
        plug(router, u32::from(number), UPLINK, &netns, Device { name: "eth0", index: UPLINK })?;
        netns.link(|link| {
            for (ip, length) in underlay(number).into_iter().zip(PREFIX) {
                link.address(UPLINK, net(ip, length), Preference::Usual)?;
            }
            for gateway in underlay_router() {
                link.route(everything(gateway), Some(gateway), UPLINK)?;
            }
            for other in (1..=3).filter(|other| *other != number) {
                let pods = pod_of(other, 0).into_iter().zip(PREFIX);
                for ((pods, length), via) in pods.zip(underlay(other)) {
                    link.route(net(pods, length), Some(via), UPLINK)?;
                }
            }
            Ok(())
        })?;
        Ok(Self { name, netns, number })
    }

    /// Adds an uplink to the outside segment, and assigns an egress IP to it.
    fn attach_outside(&self, router: &Netns, eip: Pair) -> io::Result<()> {
        let uplink = Device { name: "eth1", index: OUTSIDE };
        plug(router, u32::from(self.number), OUTSIDE, &self.netns, uplink)?;
        self.netns.link(|link| {
            let mut addresses = outside(10 + self.number).into_iter().zip(PREFIX);
            addresses.try_for_each(|(ip, length)| {
                link.address(OUTSIDE, net(ip, length), Preference::Usual)
            })
        })?;
        self.own(eip)
    }

    /// Assigns another egress IP to the outside uplink of a gateway, node-b or node-c.
    pub fn own(&self, eip: Pair) -> io::Result<()> {
        self.netns.link(|link| {
            let mut addresses = eip.into_iter().zip(FULL);
            addresses.try_for_each(|(ip, length)| {
                link.address(OUTSIDE, net(ip, length), Preference::Deprecated)
            })
        })
    }

    fn pod(&self, last: u8) -> io::Result<Netns> {
        let pod = quiet()?;
        let index = FIRST_POD + u32::from(last);
        let name = format!("pod{last}");
        let eth0 = Device { name: "eth0", index: UPLINK };
        let (addresses, gateways) = (pod_of(self.number, last), pod_of(self.number, 1));
        self.netns.link(|link| {
            link.veth(Device { name: &name, index }, None, eth0, pod.as_fd())?;
            for ((address, gateway), full) in addresses.into_iter().zip(gateways).zip(FULL) {
                link.address(index, net(gateway, full), Preference::Usual)?;
                link.route(net(address, full), None, index)?;
            }
            Ok(())
        })?;
        pod.link(|link| {
            link.up(UPLINK)?;
            for ((address, gateway), full) in addresses.into_iter().zip(gateways).zip(FULL) {
                link.address(UPLINK, net(address, full), Preference::Usual)?;
                link.route(net(gateway, full), None, UPLINK)?;
                link.route(everything(gateway), Some(gateway), UPLINK)?;
            }
            Ok(())
        })?;
        Ok(pod)
    }
}

fn router() -> io::Result<Netns> {
    let router = forwarding()?;
    router.link(|link| {
        for (name, index, addresses) in
            [("underlay", UPLINK, underlay_router()), ("outside", OUTSIDE, outside(1))]
        {
            link.bridge(Device { name, index })?;
            for (ip, length) in addresses.into_iter().zip(PREFIX) {
                link.address(index, net(ip, length), Preference::Usual)?;
            }
        }
        for node in 1..=3 {
            let pods = pod_of(node, 0).into_iter().zip(PREFIX);
            for ((pods, length), via) in pods.zip(underlay(node)) {
                link.route(net(pods, length), Some(via), UPLINK)?;
            }
        }
        Ok(())
    })?;
    Ok(router)
}

fn server(router: &Netns) -> io::Result<Netns> {
    let server = quiet()?;
    plug(router, 0, OUTSIDE, &server, Device { name: "eth0", index: UPLINK })?;
    server.link(|link| {
        for (addresses, preference) in
            [(SERVER, Preference::Usual), (OTHER_SERVER, Preference::Deprecated)]
        {
            for (ip, length) in addresses.into_iter().zip(PREFIX) {
                link.address(UPLINK, net(ip, length), preference)?;
            }
        }
        for gateway in outside(1) {
            link.route(everything(gateway), Some(gateway), UPLINK)?;
        }
        Ok(())
    })?;
    Ok(server)
}

/// Connects a namespace to a bridge of the router's namespace by a veth pair.
fn plug(
    router: &Netns,
    port: u32,
    bridge: u32,
    host: &Netns,
    device: Device<'_>,
) -> io::Result<()> {
    let index = FIRST_POD + bridge * 10 + port;
    let name = format!("port{index}");
    let here = Device { name: &name, index };
    router.link(|link| link.veth(here, Some(bridge), device, host.as_fd()))?;
    host.link(|link| link.up(device.index))
}

/// Creates a namespace without duplicate address detection, router solicitations and `rp_filter`.
///
/// Its addresses are usable at once, and it has no other routes than those added.
fn quiet() -> io::Result<Netns> {
    let netns = Netns::new()?;
    netns.sysctl(&[
        ("ipv4/conf/all/rp_filter", "0"),
        ("ipv4/conf/default/rp_filter", "0"),
        ("ipv6/conf/all/accept_dad", "0"),
        ("ipv6/conf/default/accept_dad", "0"),
        ("ipv6/conf/default/router_solicitations", "0"),
    ])?;
    Ok(netns)
}

fn forwarding() -> io::Result<Netns> {
    let netns = quiet()?;
    netns.sysctl(&[("ipv4/ip_forward", "1"), ("ipv6/conf/all/forwarding", "1")])?;
    Ok(netns)
}

const fn underlay_router() -> Pair {
    pair([10, 10, 0, 1], [0xfd10, 0, 0], 1)
}

/// Returns the default prefix (length 0) of an address family.
fn everything(of: IpAddr) -> IpNet {
    net(of, 0).trunc()
}

/// Returns an address with a prefix length; a length over the maximum becomes the full length.
pub fn net(address: IpAddr, length: u8) -> IpNet {
    IpNet::new(address, length).unwrap_or_else(|_| IpNet::from(address))
}

/// Returns the addresses as prefixes of full length.
pub fn hosts(pairs: &[Pair]) -> Vec<IpNet> {
    pairs.concat().into_iter().map(IpNet::from).collect()
}

/// Returns both addresses of a pair as a dual-stack egress IP.
pub fn dual(pair: Pair) -> EgressIp {
    match pair {
        [IpAddr::V4(v4), IpAddr::V6(v6)] => EgressIp::Dual(v4, v6),
        _ => EgressIp::Node,
    }
}

/// Returns a policy of single pods for all external destinations.
///
/// # Errors
///
/// [`NameError`] if the id or the gateway's name is invalid.
pub fn policy(
    id: &str,
    sources: &[Pair],
    gateway: Option<&str>,
    egress_ip: EgressIp,
) -> Result<EgressPolicy, NameError> {
    Ok(EgressPolicy {
        gateway: gateway.map(NodeName::new).transpose()?,
        ..EgressPolicy::new(PolicyId::new(id)?, hosts(sources), egress_ip)
    })
}
