//! What packets do with other marks, and with other software's.

use std::io::{Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::Duration;

use common::fleet::{
    Fleet, Result, check, dual, expect, is_beyond, lab, nft, policy, sources, tool,
};
use egress_datapath::testing::lab::{EIP_B, EIP_C, Netns, POD_A, POD_B, POD_C, SERVER, STRANGER};
use egress_datapath::{EgressPolicy, Mark, MarkLayout};
use ipnet::IpNet;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, ipproto, recv, sendto,
    socket_with,
};

const B: Option<&str> = Some("node-b");
const C: Option<&str> = Some("node-c");

#[test]
fn tunnel_packets_not_in_conntrack() -> Result {
    let lab = lab();
    harness::needs(&["conntrack"]);
    let is_tracked = is_beyond("the tunnel's own packets are tracked");
    let mut fleet = Fleet::open(&lab)?;
    fleet.apply(&[policy("p", &[POD_A], B, dual(EIP_B))?])?;
    check(&[expect(&lab.pod_a, SERVER, EIP_B)]);
    let mut own = String::new();
    for family in ["ipv4", "ipv6"] {
        let tracked = |more: &str| {
            tool(&lab.node_a.netns, &format!("conntrack -L -f {family} -p udp {more}"))
        };
        let sent = if family == "ipv4" { "-s 10.10.0.11" } else { "-s fd10::11" };
        own += &tracked(&format!("{sent} --orig-port-dst 7789"))?;
        assert_ne!(tracked("")?, "", "{family}");
    }
    assert_eq!(!own.is_empty(), is_tracked, "{own}");
    Ok(())
}

#[test]
fn mark_values_zero_and_one_steer() -> Result {
    let lab = lab();
    let mut fleet = Fleet::with(&lab, |cluster| {
        for (node, mark) in cluster.nodes.iter_mut().skip(1).zip([0x2600_0000, 0x2600_0100]) {
            node.mark = Some(Mark::new(mark));
        }
    })?;
    fleet.apply(&two_gateways()?)?;
    check(&[expect(&lab.pod_a, SERVER, EIP_B), expect(&lab.stranger, SERVER, EIP_C)]);
    Ok(())
}

#[test]
fn mark_layout_without_prefix_steers() -> Result {
    for layout in [MarkLayout::COMPACT, MarkLayout::COMPACT6] {
        let lab = lab();
        let mut fleet = Fleet::with(&lab, |cluster| cluster.marks = layout)?;
        fleet.apply(&two_gateways()?)?;
        check(&[
            expect(&lab.pod_a, SERVER, EIP_B),
            expect(&lab.stranger, SERVER, EIP_C),
            expect(&lab.pod_b, SERVER, POD_B),
            expect(&lab.pod_a, POD_B, POD_A),
        ]);
    }
    Ok(())
}

#[test]
fn foreign_mark_bits_preserved() -> Result {
    let lab = lab();
    harness::needs(&["nft"]);
    // On the client and on the gateway: one bit before us, one after us, and who still has both
    // when all is done.
    let foreign = "table inet foreign {
        counter stranger { }
        chain early {
            type filter hook prerouting priority -300;
            meta mark set meta mark | 0x40
        }
        chain late {
            type filter hook prerouting priority -90;
            meta mark set meta mark | 0x4000
        }
        chain last {
            type filter hook postrouting priority 300;
            meta l4proto != { tcp, udp } return
            oifname egress.vxlan iifname pod10 meta mark & 0x4040 == 0x4040 counter
            oifname eth1 meta mark != 0x4040 counter name stranger
            oifname eth0 udp dport 7789 meta mark != 0x4040 counter name stranger
        }
    }";
    for layout in [MarkLayout::SEED, MarkLayout::COMPACT] {
        let mut fleet = Fleet::with(&lab, |cluster| cluster.marks = layout)?;
        for host in [&lab.node_a, &lab.node_b] {
            nft(&host.netns, &[], foreign)?;
        }
        fleet.apply(&two_gateways()?)?;
        check(&[expect(&lab.pod_a, SERVER, EIP_B), expect(&lab.pod_a, POD_B, POD_A)]);
        let into_tunnel = tool(&lab.node_a.netns, "nft list chain inet foreign last")?;
        let count = into_tunnel.lines().find(|line| line.contains("oifname \"egress.vxlan\""));
        assert!(count.is_some_and(|line| !line.contains("packets 0 ")), "{into_tunnel}");
        for host in [&lab.node_a, &lab.node_b] {
            let counter = tool(&host.netns, "nft list counter inet foreign stranger")?;
            assert!(counter.contains("packets 0 "), "{}: {counter}", host.name);
            tool(&host.netns, "nft delete table inet foreign")?;
        }
    }
    Ok(())
}

fn two_gateways() -> Result<[EgressPolicy; 2]> {
    Ok([policy("one", &[POD_A], B, dual(EIP_B))?, policy("two", &[STRANGER], C, dual(EIP_C))?])
}

/// Sends an ICMP echo request and waits for the reply.
pub(crate) fn ping(from: &Netns, to: IpAddr) -> Result {
    let reply = from.run(|| -> std::io::Result<bool> {
        let (family, protocol, request, reply) = match to {
            IpAddr::V4(_) => (AddressFamily::INET, ipproto::ICMP, 8, 0),
            IpAddr::V6(_) => (AddressFamily::INET6, ipproto::ICMPV6, 128, 129),
        };
        let socket = socket_with(family, SocketType::RAW, SocketFlags::CLOEXEC, Some(protocol))?;
        set_socket_timeout(&socket, Timeout::Recv, Some(Duration::from_secs(5)))?;
        // Identifier 7, number 1; the kernel fills in the checksum of ICMPv6 alone.
        let mut packet = [request, 0, 0, 0, 0, 7, 0, 1];
        if to.is_ipv4() {
            packet[2..4].copy_from_slice(&(!0x0808_u16).to_be_bytes());
        }
        sendto(&socket, &packet, SendFlags::empty(), &SocketAddr::new(to, 0))?;
        let mut bytes = [0; 256];
        for _ in 0..100 {
            let (length, _) = recv(&socket, &mut bytes, RecvFlags::empty())?;
            // A raw socket of IPv4 receives the header, too.
            let begin = if to.is_ipv4() { 20 } else { 0 };
            if bytes.get(begin..length).is_some_and(|icmp| icmp.first() == Some(&reply)) {
                return Ok(true);
            }
        }
        Ok(false)
    })??;
    if reply { Ok(()) } else { Err(format!("no echo reply from {to}").into()) }
}

/// Sends datagrams of more than 1500 bytes until one arrives, and returns its source.
///
/// The sender must learn the path MTU first. Unlike TCP segments, they are no GSO packets, which
/// virtual interfaces forward whatever their size.
fn large_datagram(server: &Netns, from: &Netns, to: IpAddr) -> Result<Option<IpAddr>> {
    const PORT: u16 = 7012;
    let listener = server.run(|| UdpSocket::bind((to, PORT)))??;
    listener.set_read_timeout(Some(Duration::from_millis(200)))?;
    let arrived = from.run(|| -> std::io::Result<Option<IpAddr>> {
        let any = SocketAddr::new(if to.is_ipv4() { [0; 4].into() } else { [0; 16].into() }, 0);
        let socket = UdpSocket::bind(any)?;
        socket.connect((to, PORT))?;
        for _ in 0..50 {
            // The kernel may report a path MTU that it has just learned as the error of a send.
            let _sent = socket.send(&[7; 4000]);
            if let Ok((_, source)) = listener.recv_from(&mut [0; 4000]) {
                return Ok(Some(source.ip()));
            }
        }
        Ok(None)
    })??;
    Ok(arrived)
}

#[test]
fn larger_underlay_of_one_node_loses_no_large_packet() -> Result {
    let lab = lab();
    harness::needs(&["nft"]);
    for line in ["ip link set eth0 mtu 9000", "ip link set pod10 mtu 9000"] {
        tool(&lab.node_a.netns, line)?;
    }
    tool(&lab.pod_a, "ip link set eth0 mtu 9000")?;
    tool(&lab.router, "ip link set port121 mtu 9000")?;
    // The other nodes' ports of a switch drop what is larger, and nobody is told.
    let switch = "table netdev switch { chain out {
        type filter hook ingress device port121 priority 0; meta length > 1500 drop; }; }";
    nft(&lab.router, &[], switch)?;
    Fleet::open(&lab)?.apply(&[policy("p", &[POD_A], B, dual(EIP_B))?])?;
    for (to, eip) in SERVER.into_iter().zip(EIP_B) {
        let arrived = large_datagram(&lab.server, &lab.pod_a, to)?;
        assert_eq!(arrived, Some(eip), "to {to}");
    }
    Ok(())
}

/// Sends so much that packets of full size are needed; returns the number of bytes that arrive.
fn bulk(server: &Netns, from: &Netns, to: IpAddr) -> Result<usize> {
    const PORT: u16 = 7011;
    const SIZE: usize = 200_000;
    let patience = Some(Duration::from_secs(20));
    let listener = server.run(|| TcpListener::bind((to, PORT)))??;
    thread::scope(|scope| {
        let sender = scope.spawn(|| {
            from.run(|| -> std::io::Result<()> {
                let mut stream = TcpStream::connect((to, PORT))?;
                stream.set_write_timeout(patience)?;
                stream.set_read_timeout(patience)?;
                stream.write_all(&vec![7; SIZE])?;
                stream.shutdown(Shutdown::Write)?;
                stream.read_exact(&mut [0]).or(Ok(()))
            })
        });
        let (mut stream, _) = listener.accept()?;
        stream.set_read_timeout(patience)?;
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes)?;
        drop(stream);
        sender.join().map_err(|_| "the sender panicked")???;
        Ok(bytes.len())
    })
}

#[test]
fn egress_ip_in_subnet_of_nodes_on_the_only_interface() -> Result {
    let lab = lab();
    let eip: [IpAddr; 2] = ["10.10.0.200".parse()?, "fd10::200".parse()?];
    tool(&lab.node_a.netns, "ip addr add 10.10.0.200/32 dev eth0")?;
    tool(&lab.node_a.netns, "ip addr add fd10::200/128 dev eth0 nodad preferred_lft 0")?;
    let subnet: [IpNet; 2] = ["10.10.0.0/24".parse()?, "fd10::/64".parse()?];
    let mut fleet = Fleet::with(&lab, |cluster| cluster.excluded.extend(subnet))?;
    let policy = policy("p", &[POD_A, POD_B, POD_C], Some("node-a"), dual(eip))?;
    for report in fleet.apply(std::slice::from_ref(&policy))? {
        assert!(report.findings.is_empty(), "{:?}", report.findings);
    }
    let pods = [&lab.pod_a, &lab.pod_b, &lab.pod_c];
    check(&pods.map(|pod| expect(pod, SERVER, eip)));
    for (pod, to) in pods.into_iter().flat_map(|pod| SERVER.map(|to| (pod, to))) {
        ping(pod, to)?;
        assert_eq!(bulk(&lab.server, pod, to)?, 200_000, "to {to}");
    }
    // The path beyond the gateway has a smaller MTU than the tunnel.
    tool(&lab.router, "ip link set outside mtu 1290")?;
    for (pod, to) in pods.into_iter().flat_map(|pod| SERVER.map(|to| (pod, to))) {
        assert_eq!(bulk(&lab.server, pod, to)?, 200_000, "to {to}, over a path of 1290");
    }
    assert_eq!(sources(&lab), eip.into());
    Ok(())
}
