//! The lab's nodes and what is around them, in both worlds.

use std::io;
use std::net::IpAddr;

use common::backend;
use egress_datapath::alloc::{MarkPool, TablePool, TableRange};
use egress_datapath::explain::HostContext;
use egress_datapath::sim::SimNode;
use egress_datapath::testing::lab::{
    self, EIP_B, EIP_C, Host, Lab, NODE_B_OUTSIDE, NODE_C_OUTSIDE, POD_A, Pair, Preference, SERVER,
    net,
};
use egress_datapath::{Cluster, Datapath, Reconciler, Sim};
use ipnet::IpNet;

/// Addresses outside.
pub(crate) const OUTSIDE: [&str; 12] = [
    "198.51.100.10",
    "198.51.100.20",
    "198.51.100.21",
    "198.51.100.40",
    "203.0.113.5",
    "203.0.113.200",
    "2001:db8:51::10",
    "2001:db8:51::20",
    "2001:db8:51::21",
    "2001:db8:51::40",
    "2001:db8:113::5",
    "2001:db8:7::7",
];

/// A table of somebody else's.
pub(crate) const FOREIGN: &str = "table inet foreign {
    chain prerouting {
        type filter hook prerouting priority 0;
        ct state new counter
    }
    chain postrouting {
        type nat hook postrouting priority 200;
    }
}";

/// Nobody listens, and nobody complains about that: an error (RFC 792, RFC 4443) is a packet of the
/// connection, too, and the simulator's pods send none.
pub(crate) const QUIET: &str = "table inet quiet {
    chain output {
        type filter hook output priority 0;
        icmp type destination-unreachable drop
        icmpv6 type destination-unreachable drop
    }
}";

/// More addresses outside.
pub(crate) fn outside(lab: &Lab) -> io::Result<()> {
    const UPLINK: u32 = 10;
    const OUTSIDE_BRIDGE: u32 = 11;
    lab.server.link(|link| {
        for text in OUTSIDE {
            let address: IpAddr = text.parse().unwrap();
            let full = if address.is_ipv4() { 32 } else { 128 };
            let _known = link.address(UPLINK, net(address, full), Preference::Deprecated);
        }
        Ok(())
    })?;
    lab.router.link(|link| {
        for (text, via) in [
            ("203.0.113.0/24", SERVER[0]),
            ("2001:db8:113::/48", SERVER[1]),
            ("2001:db8:7::/48", SERVER[1]),
        ] {
            link.route(text.parse().unwrap(), Some(via), OUTSIDE_BRIDGE)?;
        }
        Ok(())
    })
}

pub(crate) fn datapath(host: &Host) -> io::Result<Box<dyn Datapath>> {
    backend::datapath(&host.netns, backend::backend()).map_err(io::Error::other)
}

pub(crate) fn kernel(host: &Host, cluster: &Cluster) -> io::Result<Reconciler<Box<dyn Datapath>>> {
    let datapath = datapath(host)?;
    let tables = TablePool::new(TableRange::default()).with_start(0);
    Ok(Reconciler::with_allocators(datapath, MarkPool::new(cluster.marks), tables))
}

pub(crate) fn simulated(cluster: &Cluster) -> Reconciler<Sim> {
    let tables = TablePool::new(TableRange::default()).with_start(0);
    Reconciler::with_allocators(crate::world::sim(), MarkPool::new(cluster.marks), tables)
}

/// The twin of the lab's node of this number.
pub(crate) fn node(number: u8, cluster: &Cluster) -> SimNode {
    let own = addresses(number);
    let mut around = HostContext::new(own.clone());
    let everything = ["0.0.0.0/0", "::/0"].map(|net| net.parse().unwrap());
    around.own.extend(everything.into_iter().zip(own));
    let (outside, eip): (Pair, Pair) = match number {
        2 => (NODE_B_OUTSIDE, EIP_B),
        3 => (NODE_C_OUTSIDE, EIP_C),
        _ => (POD_A, POD_A),
    };
    if number > 1 {
        around.local.extend([outside, eip].concat());
        let segment = ["198.51.100.0/24", "2001:db8:51::/64"].map(|net| net.parse().unwrap());
        around.own.extend(segment.into_iter().zip(outside));
    }
    let pods = [format!("10.244.{number}.0/24"), format!("fd44:{number}::/64")];
    let pods: Vec<IpNet> = pods.iter().map(|net| net.parse().unwrap()).collect();
    around.own.extend(pods.iter().copied().zip(beside_pods(number)));
    SimNode { name: cluster.node.clone(), sim: crate::world::sim().with_host(around), pods }
}

/// Addresses of a node on the interface of the underlay, whichever the tunnel uses.
pub(crate) fn addresses(number: u8) -> Vec<IpAddr> {
    let nodes = lab::cluster("node-a").unwrap().nodes;
    nodes[usize::from(number) - 1].underlay.clone()
}

/// Addresses of a node on the interfaces of its pods.
pub(crate) fn beside_pods(number: u8) -> Pair {
    let pods = u16::from(number);
    [[10, 244, number, 1].into(), [0xfd44, pods, 0, 0, 0, 0, 0, 1].into()]
}
