//! A sender, a router and a receiver.
//!
//! ```text
//! sender .2 -- 192.168.1.0/24 -- in  router  out -- 192.168.2.0/24 -- receiver .2
//! pods 10.64.0.0/10                10.10.0.11                   nodes 10.10.0.0/16, everything
//! ```
//!
//! The router sends everything but what is for the pods to a neighbour that the receiver is not,
//! so that the receiver's device counts a packet and its network drops it at once.

use std::io::Write;
use std::net::Ipv4Addr;
use std::os::fd::AsFd;
use std::process::{Command, Stdio};

use egress_datapath::testing::lab::Netns;
use egress_datapath::testing::lab::{Device, Preference};
use ipnet::{IpNet, Ipv4Net};
use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr};

use crate::Result;
use crate::port::{Port, Tap};

/// The router among the nodes.
pub(crate) const NODE: Ipv4Addr = Ipv4Addr::new(10, 10, 0, 11);
/// Where the pods are, selected and others.
pub(crate) const PODS: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(10, 64, 0, 0), 10);

const NODES: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(10, 10, 0, 0), 16);
const SENDER: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 2);
const NOBODY: Ipv4Addr = Ipv4Addr::new(192, 168, 2, 3);
const NOBODYS_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0x99];
const IN: u32 = 10;
const OUT: u32 = 11;

/// An end of the path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    Sender,
    Receiver,
}

/// The three namespaces and the ends that frames are put in by.
pub(crate) struct Path {
    pub(crate) router: Netns,
    receiver: Netns,
    /// Where the sender's frames are put in.
    pub(crate) there: Port,
    /// Where the receiver's are.
    pub(crate) back: Port,
    sender: Netns,
}

impl Path {
    /// A path with nothing on it but routes.
    pub(crate) fn new() -> Result<Self> {
        let (sender, router, receiver) = (Netns::new()?, Netns::new()?, Netns::new()?);
        for end in [&sender, &receiver] {
            end.sysctl(&[("ipv6/conf/default/disable_ipv6", "1")])?;
        }
        router.sysctl(&[
            ("ipv4/conf/all/rp_filter", "0"),
            ("ipv4/conf/default/rp_filter", "0"),
            ("ipv4/ip_forward", "1"),
            // Connections last as long as the bench.
            ("netfilter/nf_conntrack_udp_timeout", "3600"),
            ("netfilter/nf_conntrack_udp_timeout_stream", "3600"),
        ])?;
        for (name, index, net, end) in [("in", IN, 1, &sender), ("out", OUT, 2, &receiver)] {
            let address = |host| IpNet::new_assert(Ipv4Addr::new(192, 168, net, host).into(), 24);
            let far = Device { name: "eth0", index: IN };
            router.link(|link| {
                link.veth(Device { name, index }, None, far, end.as_fd())?;
                link.address(index, address(1), Preference::Usual)
            })?;
            end.link(|link| {
                link.up(IN)?;
                link.address(IN, address(2), Preference::Usual)
            })?;
        }
        let there = Port::open(&sender, &router, SENDER)?;
        let back = Port::open(&receiver, &router, NOBODY)?;
        router.link(|link| {
            link.address(OUT, IpNet::from(Ipv4Net::from(NODE)), Preference::Usual)?;
            link.neighbour(OUT, NOBODY.into(), NOBODYS_MAC)?;
            link.route(PODS.into(), Some(SENDER.into()), IN)?;
            link.route(NODES.into(), Some(NOBODY.into()), OUT)?;
            link.route(Ipv4Net::default().into(), Some(NOBODY.into()), OUT)
        })?;
        Ok(Self { router, receiver, there, back, sender })
    }

    fn netns(&self, end: End) -> &Netns {
        match end {
            End::Sender => &self.sender,
            End::Receiver => &self.receiver,
        }
    }

    /// How many packets have come out at an end.
    pub(crate) fn received(&self, end: End) -> Result<u64> {
        let devices =
            self.netns(end).run(|| std::fs::read_to_string("/proc/thread-self/net/dev"))??;
        let line = devices.lines().find_map(|line| line.trim_start().strip_prefix("eth0:"));
        let packets = line.and_then(|line| line.split_whitespace().nth(1));
        Ok(packets.ok_or("the receiver has no device")?.parse()?)
    }

    /// Sees what comes out at an end, for as long as it is there.
    pub(crate) fn tap(&self, end: End) -> Result<Tap> {
        Tap::open(self.netns(end))
    }

    /// Forgets all connections, so that those of one round are not in the way of the next.
    pub(crate) fn forget(&self) -> Result {
        const LENGTH: u32 = 20;
        // `IPCTNL_MSG_CT_DELETE` of conntrack's subsystem, with no filter: all of them.
        const DELETE: u16 = 1 << 8 | 2;
        const REQUEST_AND_ACK: u16 = 1 | 4;
        let mut request = LENGTH.to_ne_bytes().to_vec();
        request.extend(DELETE.to_ne_bytes());
        request.extend(REQUEST_AND_ACK.to_ne_bytes());
        request.extend([0; 12]);
        self.router.run(|| {
            let socket = Socket::new(NETLINK_NETFILTER)?;
            socket.send_to(&request, &SocketAddr::new(0, 0), 0)?;
            socket.recv_from_full().map(drop)
        })??;
        Ok(())
    }

    /// Feeds a program in the router's namespace; words are split at blanks.
    pub(crate) fn feed(&self, line: &str, input: &str) -> Result {
        let mut words = line.split_whitespace();
        let program = words.next().unwrap_or_default();
        let output = self.router.run(|| {
            let mut child = Command::new(program)
                .args(words)
                .stdin(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()?;
            if let Some(mut stdin) = child.stdin.take() {
                stdin.write_all(input.as_bytes())?;
            }
            child.wait_with_output()
        });
        let output = output?.map_err(|error| format!("cannot run {program}: {error}"))?;
        if output.status.success() {
            return Ok(());
        }
        Err(format!("{line}: {}", String::from_utf8_lossy(&output.stderr)).into())
    }
}
