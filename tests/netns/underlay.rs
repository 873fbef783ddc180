//! Tunnel packets by the interface of the underlay, and by no other.

use std::net::UdpSocket;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

use common::backend::{backend, outer};
use common::fleet::{
    Fleet, Result, check, dual, expect, expect_nothing, feed, lab, nft, policy, sources, tool,
};
use egress_datapath::testing::lab::{Device, EIP_B, Lab, Netns, POD_A, PORT, SERVER};
use egress_datapath::{Backend, Cluster, DeviceName, EgressPolicy};

const TIMES: u32 = 100;
/// Datagrams sent at least while the link goes down and comes back once.
const DATAGRAMS: u32 = 1_000;
/// Times that suffice to see packets that are not held back.
const FEW: u32 = 10;
const CRYPT: Device<'_> = Device { name: "crypt0", index: 12 };

/// A lab whose nodes a and b have a second link.
fn encrypted() -> Result<Lab> {
    if backend() != Backend::Nftables {
        harness::limit("underlay_only needs nf_tables");
    }
    let lab = lab();
    encrypt(&lab)?;
    Ok(lab)
}

/// Gives node-a and node-b a second link, for their underlay addresses while it is up.
fn encrypt(lab: &Lab) -> Result {
    let (a, b) = (&lab.node_a.netns, &lab.node_b.netns);
    a.link(|link| link.veth(CRYPT, None, CRYPT, b.as_fd()))?;
    up(a, 11)?;
    up(b, 12)
}

/// Brings up the second link of a node, by the last part of its underlay addresses.
fn up(netns: &Netns, own: u8) -> Result {
    tool(netns, "ip link set crypt0 up")?;
    // In IPv6 an interface replies to neighbour solicitations for its own addresses alone.
    if outer() == 1 {
        tool(netns, &format!("ip addr replace fd10::{own}/128 dev crypt0 nodad"))?;
    }
    let peer = format!("{}{}", ["10.10.0.", "fd10::"][outer()], 23 - own);
    tool(netns, &format!("ip route replace {peer} dev crypt0 metric 1"))?;
    Ok(())
}

/// A link between node-a and node-b, and how it comes up on a node.
struct Link {
    name: &'static str,
    up: fn(&Netns, u8) -> Result,
}

const CRYPT_LINK: Link = Link { name: "crypt0", up };
const WIREGUARD: Link = Link { name: "wg0", up: wireguard_up };

/// A fleet whose nodes a and b may send tunnel packets by this interface alone.
fn fleet(lab: &Lab, only: bool) -> Result<Fleet> {
    Fleet::with(lab, |cluster| limit_to(&CRYPT_LINK, only, cluster))
}

fn limit_to(link: &Link, only: bool, cluster: &mut Cluster) {
    if cluster.node.as_str() != "node-c" {
        let device = DeviceName::new(link.name).ok();
        cluster.tunnel.underlay_device = device.filter(|_| only);
        cluster.tunnel.underlay_only = only;
    }
}

fn policies() -> Result<Vec<EgressPolicy>> {
    Ok(vec![policy("p", &[POD_A], Some("node-b"), dual(EIP_B))?])
}

/// Counts the tunnel packets of node-a and node-b on the network between the nodes.
const COUNT: &str = "table netdev between
delete table netdev between
table netdev between {
    counter seen { }
    chain a { type filter hook ingress device port121 priority 0; udp dport 7789 counter name seen; }
    chain b { type filter hook ingress device port122 priority 0; udp dport 7789 counter name seen; }
}";

/// Begins to count tunnel packets on the network between the nodes.
fn count(lab: &Lab) -> Result {
    nft(&lab.router, &[], COUNT)
}

/// Number of tunnel packets that have passed since.
fn tunnelled(lab: &Lab) -> Result<u64> {
    let listed = tool(&lab.router, "nft list counter netdev between seen")?;
    let (_, rest) = listed.split_once("packets ").ok_or("no counter")?;
    Ok(rest.split_whitespace().next().ok_or("no number")?.parse()?)
}

/// Sends datagrams of a selected pod while the second link goes down and comes back; returns the
/// number sent and that of tunnel packets on the other link.
fn flap(lab: &Lab, link: &Link, times: u32) -> Result<(u32, u64)> {
    count(lab)?;
    let flow = lab.pod_a.run(|| UdpSocket::bind("0.0.0.0:0"))??;
    flow.connect((SERVER[0], PORT))?;
    let done = AtomicBool::new(false);
    thread::scope(|scope| -> Result<(u32, u64)> {
        let sender = scope.spawn(|| {
            let mut sent = 0;
            while sent < times * DATAGRAMS || !done.load(Relaxed) {
                sent += u32::from(flow.send(b"?").is_ok());
                if sent % 64 == 0 {
                    thread::sleep(Duration::from_micros(500));
                }
            }
            sent
        });
        let flap = || -> Result {
            for _ in 0..times {
                tool(&lab.node_a.netns, &format!("ip link set {} down", link.name))?;
                (link.up)(&lab.node_a.netns, 11)?;
            }
            Ok(())
        };
        let flapped = flap();
        done.store(true, Relaxed);
        let sent = sender.join().map_err(|_| "the sender panicked")?;
        flapped?;
        Ok((sent, tunnelled(lab)?))
    })
}

#[test]
fn underlay_goes_down_and_no_tunnel_packet_leaves_by_another_interface() -> Result {
    harness::needs(&["ip", "nft"]);
    let lab = encrypted()?;
    // Without the option packets take the route that there is.
    let mut plain = fleet(&lab, false)?;
    plain.apply(&policies()?)?;
    let (_, seen) = flap(&lab, &CRYPT_LINK, FEW)?;
    assert_ne!(seen, 0);
    let mut only = fleet(&lab, true)?;
    only.apply(&policies()?)?;
    check(&[expect(&lab.pod_a, SERVER, EIP_B)]);
    for report in fleet(&lab, true)?.apply(&policies()?)? {
        assert!(report.changes.is_empty(), "{}", report.changes);
    }
    let (sent, seen) = flap(&lab, &CRYPT_LINK, TIMES)?;
    println!("{sent} datagrams, the underlay down and up {TIMES} times, {seen} in the clear");
    assert_eq!(seen, 0);
    check(&[expect(&lab.pod_a, SERVER, EIP_B)]);
    // The interface is created again, and the tunnel, which the kernel deletes with it.
    count(&lab)?;
    tool(&lab.node_a.netns, "ip link del crypt0")?;
    check(&[expect_nothing(&lab.pod_a, SERVER)]);
    encrypt(&lab)?;
    check(&[expect_nothing(&lab.pod_a, SERVER)]);
    only.apply(&policies()?)?;
    check(&[expect(&lab.pod_a, SERVER, EIP_B)]);
    assert_eq!(tunnelled(&lab)?, 0);
    Ok(())
}

#[test]
fn tunnel_packets_by_another_interface_are_dropped() -> Result {
    harness::needs(&["ip", "nft"]);
    let lab = encrypted()?;
    let mut only = fleet(&lab, true)?;
    only.apply(&policies()?)?;
    check(&[expect(&lab.pod_a, SERVER, EIP_B)]);
    // Another program routes the tunnel packets of node-a again, by their mark.
    let rules = "table inet foreign {
        chain output {
            type route hook output priority mangle;
            udp dport 7789 meta mark set 0x77
        }
    }";
    nft(&lab.node_a.netns, &[], rules)?;
    tool(&lab.node_a.netns, "ip rule add pref 50 fwmark 0x77 lookup 77")?;
    tool(&lab.node_a.netns, "ip -6 rule add pref 50 fwmark 0x77 lookup 77")?;
    let net = ["10.10.0.0/24", "fd10::/64"][outer()];
    tool(&lab.node_a.netns, &format!("ip route add {net} dev eth0 table 77"))?;
    count(&lab)?;
    sources(&lab);
    check(&[expect_nothing(&lab.pod_a, SERVER)]);
    assert_eq!((tunnelled(&lab)?, sources(&lab).len()), (0, 0));
    // They arrive where the option is not set, and are dropped where it is.
    let mut plain = fleet(&lab, false)?;
    plain.apply_to("node-a", &policies()?)?;
    check(&[expect_nothing(&lab.pod_a, SERVER)]);
    assert_ne!(tunnelled(&lab)?, 0);
    assert!(sources(&lab).is_empty());
    plain.apply_to("node-b", &policies()?)?;
    check(&[expect(&lab.pod_a, SERVER, EIP_B)]);
    Ok(())
}

/// Keys of node-a and node-b: private, public.
const KEYS: [[&str; 2]; 2] = [
    [
        "YMK2XcwryQnFc8LpB+Lb3x7lqu3GHgzf4IN3X2YFmVE=",
        "kOxYCv6FMaO+Q5YOwGsi+WVP+FnOiwT0fqSvN9SAF08=",
    ],
    [
        "SPHvpthyI11e4tAR4bEooDdsGJ6Mbn8WExBzildCxl8=",
        "SmC/o8CUx3sh4+XLafThGLfhitWXtHXPm4rlz4Yt4So=",
    ],
];
/// Addresses of the nodes in the encrypted network, ahead of the last part.
const ENCRYPTED: [&str; 2] = ["10.99.0.", "fd99::"];

/// Gives node-a and node-b a WireGuard interface.
fn wireguard(lab: &Lab) -> Result {
    let [[private_a, public_a], [private_b, public_b]] = KEYS;
    let nodes = [(&lab.node_a, 11, private_a, public_b), (&lab.node_b, 12, private_b, public_a)];
    for (host, own, private, public) in nodes {
        let peer = 23 - own;
        let made = tool(&host.netns, "ip link add wg0 type wireguard");
        harness::needs_other_kernel("WireGuard", made.is_ok());
        harness::needs(&["wg"]);
        let allowed = ENCRYPTED.map(|net| format!("{net}{peer}")).join(",");
        let line = format!(
            "set wg0 private-key /dev/stdin listen-port 51820 peer {public} allowed-ips {allowed} \
             endpoint 10.10.0.{peer}:51820"
        );
        feed(&host.netns, "wg", &line.split_whitespace().collect::<Vec<_>>(), private)?;
        tool(&host.netns, &format!("ip addr add {}{own}/24 dev wg0", ENCRYPTED[0]))?;
        wireguard_up(&host.netns, own)?;
    }
    Ok(())
}

fn wireguard_up(netns: &Netns, own: u8) -> Result {
    tool(netns, "ip link set wg0 up")?;
    // The kernel deletes the IPv6 address when the interface goes down.
    tool(netns, &format!("ip addr replace {}{own}/64 dev wg0 nodad", ENCRYPTED[1]))?;
    Ok(())
}

#[test]
fn wireguard_interface_goes_down_and_no_tunnel_packet_leaves_in_the_clear() -> Result {
    harness::needs(&["ip", "nft"]);
    if backend() != Backend::Nftables {
        harness::limit("underlay_only needs nf_tables");
    }
    let lab = lab();
    wireguard(&lab)?;
    let fleet = |only: bool| {
        Fleet::with(&lab, |cluster| {
            limit_to(&WIREGUARD, only, cluster);
            cluster.tunnel.underlay_mtu = 1420;
            for (node, last) in cluster.nodes.iter_mut().zip(11..=12) {
                node.underlay = vec![format!("{}{last}", ENCRYPTED[outer()]).parse().unwrap()];
            }
        })
    };
    let apply = |only: bool| -> Result {
        let mut fleet = fleet(only)?;
        for node in ["node-b", "node-a"] {
            fleet.apply_to(node, &policies()?)?;
        }
        check(&[expect(&lab.pod_a, SERVER, EIP_B)]);
        Ok(())
    };
    apply(false)?;
    let (_, seen) = flap(&lab, &WIREGUARD, FEW)?;
    assert_ne!(seen, 0);
    apply(true)?;
    let (sent, seen) = flap(&lab, &WIREGUARD, TIMES)?;
    println!("{sent} datagrams, WireGuard down and up {TIMES} times, {seen} in the clear");
    assert_eq!(seen, 0);
    check(&[expect(&lab.pod_a, SERVER, EIP_B)]);
    Ok(())
}
