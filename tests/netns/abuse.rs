//! Packets and sockets of a hostile pod, neighbour or process: SECURITY.md refers to these tests.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr as UnixAddr, UnixListener};
use std::time::Duration;

use common::backend::{outer, steering};
use common::fleet::{
    Fleet, Result, check, dual, expect, expect_nothing, lab, nft, policy, sources, tool,
};
use egress_datapath::testing::lab::{
    EIP_B, Echo, Host, Lab, NODE_A, NODE_B, Netns, OTHER_SERVER, POD_A, POD_B, PORT, Pair, Proto,
    SERVER, STRANGER, probe_patiently,
};
use egress_datapath::{KernelDatapath, MarkLayout, Ownership, Protection, Steering};
use rustix::net::{
    AddressFamily, SendFlags, SocketFlags, SocketType, ipproto, sendto, socket_with,
};
use rustix::thread::CapabilitySet;

const UDP: u8 = 17;
const ICMP: u8 = 1;
const ICMP6: u8 = 58;
const DESTINATION_OPTIONS: u8 = 60;
const FRAGMENT: u8 = 44;
/// Port of the pod.
const FROM: u16 = 5001;

/// Sum of RFC 1071.
fn checksum(parts: &[&[u8]]) -> [u8; 2] {
    let bytes = parts.concat();
    let words = bytes
        .chunks(2)
        .map(|two| u32::from(two[0]) << 8 | u32::from(two.get(1).copied().unwrap_or_default()));
    let mut sum: u32 = words.sum();
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!u16::try_from(sum).unwrap()).to_be_bytes()
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

/// An IP packet; for IPv4 the fragment field is given, too.
fn ip(protocol: u8, from: IpAddr, to: IpAddr, fragment: u16, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(payload.len()).unwrap();
    let mut header = if from.is_ipv4() {
        let mut header = vec![0x45, 0];
        header.extend((length + 20).to_be_bytes());
        header.extend([0x12, 0x34]);
        header.extend(fragment.to_be_bytes());
        header.extend([64, protocol, 0, 0]);
        header
    } else {
        let mut header = vec![0x60, 0, 0, 0];
        header.extend(length.to_be_bytes());
        header.extend([protocol, 64]);
        header
    };
    header.extend(octets(from));
    header.extend(octets(to));
    if from.is_ipv4() {
        let sum = checksum(&[&header]);
        header[10..12].copy_from_slice(&sum);
    }
    [header, payload.to_vec()].concat()
}

/// The transport checksum of an IPv6 or UDP packet.
fn transport_sum(protocol: u8, from: IpAddr, to: IpAddr, bytes: &[u8]) -> [u8; 2] {
    let length = u32::try_from(bytes.len()).unwrap().to_be_bytes();
    checksum(&[&octets(from), &octets(to), &length, &[0, 0, 0, protocol], bytes])
}

/// A UDP datagram without its IP header.
fn udp(from: (IpAddr, u16), to: (IpAddr, u16), payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(payload.len() + 8).unwrap();
    let mut bytes = [from.1, to.1, length, 0].map(u16::to_be_bytes).concat();
    bytes.extend(payload);
    let sum = transport_sum(UDP, from.0, to.0, &bytes);
    bytes[6..8].copy_from_slice(&sum);
    bytes
}

fn datagram(from: (IpAddr, u16), to: (IpAddr, u16), payload: &[u8]) -> Vec<u8> {
    ip(UDP, from.0, to.0, 0, &udp(from, to, payload))
}

/// Sends an IP packet as it is, by the route to an address that may be another than in its header.
fn send(netns: &Netns, by: IpAddr, packet: &[u8]) -> Result {
    let family = if by.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let open = || socket_with(family, SocketType::RAW, SocketFlags::CLOEXEC, Some(ipproto::RAW));
    let socket: OwnedFd = netns.run(open)??;
    sendto(&socket, packet, SendFlags::empty(), &SocketAddr::new(by, 0))?;
    Ok(())
}

/// Drops pods' packets whose source is not routed to the interface that they come by.
const REVERSE_PATH: &str = "table inet reverse_path {
    chain prerouting {
        type filter hook prerouting priority raw;
        iifname pod* fib saddr . iif oif missing counter drop
    }
}";

fn with_reverse_path(lab: &Lab) -> Result {
    lab.nodes().iter().try_for_each(|host| nft(&host.netns, &[], REVERSE_PATH))
}

/// The sources that the server has seen, once everything sent before has arrived.
fn seen(lab: &Lab) -> Result<Vec<IpAddr>> {
    let mut probes = Vec::new();
    for to in OTHER_SERVER {
        probes.push(probe_patiently(&lab.pod_c, Proto::Udp, to)?);
    }
    Ok(sources(lab).into_iter().filter(|source| !probes.contains(source)).collect())
}

fn steered(lab: &Lab) -> Result<Fleet> {
    harness::needs(&["nft"]);
    let mut fleet = Fleet::open(lab)?;
    fleet.apply(&[policy("p", &[POD_A], Some("node-b"), dual(EIP_B))?])?;
    Ok(fleet)
}

#[test]
fn spoofed_source_of_selected_pod_dropped_by_reverse_path_filter() -> Result {
    let lab = lab();
    let _fleet = steered(&lab)?;
    let sent = || -> Result<Vec<IpAddr>> {
        for (from, to) in POD_A.into_iter().zip(SERVER) {
            send(&lab.stranger, to, &datagram((from, FROM), (to, PORT), b"?"))?;
        }
        seen(&lab)
    };
    assert_eq!(sent()?, EIP_B);
    // The setting is about IPv4 alone.
    lab.node_a.netns.sysctl(&[("ipv4/conf/pod11/rp_filter", "1")])?;
    assert_eq!(sent()?, [EIP_B[1]]);
    with_reverse_path(&lab)?;
    assert!(sent()?.is_empty());
    Ok(())
}

/// A frame of the tunnel to node-b with a datagram of the selected pod, as the payload of UDP.
fn frame(lab: &Lab) -> Result<Vec<u8>> {
    let cluster = lab.cluster(&lab.node_b)?;
    let mac = |name: &str| {
        cluster.nodes.iter().find(|node| node.name.as_str() == name).unwrap().mac().octets()
    };
    let header = [[8, 0, 0, 0], (cluster.tunnel.vni << 8).to_be_bytes()].concat();
    let inner = datagram((POD_A[0], FROM), (SERVER[0], PORT), b"?");
    Ok([&header[..], &mac("node-b"), &mac("node-a"), &[8, 0], &inner].concat())
}

const TUNNEL: u16 = 7789;

/// No address, of the family of the tunnel packets.
fn any() -> IpAddr {
    [IpAddr::from(Ipv4Addr::UNSPECIFIED), Ipv6Addr::UNSPECIFIED.into()][outer()]
}

#[test]
fn vxlan_frame_with_spoofed_node_source_dropped_by_reverse_path_filter() -> Result {
    let lab = lab();
    let _fleet = steered(&lab)?;
    let frame = frame(&lab)?;
    let node_c: Pair = ["10.10.0.13".parse()?, "fd10::13".parse()?];
    let [node_a, node_b, node_c] = [NODE_A, NODE_B, node_c].map(|node| node[outer()]);
    // A pod of another node in the name of a third one, and a pod of the gateway itself.
    for filtered in [false, true] {
        if filtered {
            with_reverse_path(&lab)?;
        }
        for (pod, name) in [(&lab.stranger, node_c), (&lab.pod_b, node_a)] {
            send(pod, node_b, &datagram((name, TUNNEL), (node_b, TUNNEL), &frame))?;
            let expected = if filtered { Vec::new() } else { vec![EIP_B[0]] };
            assert_eq!(seen(&lab)?, expected, "in the name of {name}, filtered: {filtered}");
        }
    }
    Ok(())
}

#[test]
fn vxlan_frame_with_source_of_a_node_accepted_from_neighbour_and_node_without_datapath() -> Result {
    let lab = lab();
    harness::needs(&["nft"]);
    crate::flows::masquerade(&lab)?;
    let mut fleet = Fleet::open(&lab)?;
    let policies = [policy("p", &[POD_A], Some("node-b"), dual(EIP_B))?];
    let frame = frame(&lab)?;
    let frames = || -> Result<[Vec<IpAddr>; 2]> {
        // A neighbour that forges the source, and a pod that its own node masquerades.
        let [node_a, node_b] = [NODE_A, NODE_B].map(|node| node[outer()]);
        let to = (node_b, TUNNEL);
        send(&lab.router, node_b, &datagram((node_a, TUNNEL), to, &frame))?;
        let of_neighbour = seen(&lab)?;
        lab.stranger.run(|| UdpSocket::bind((any(), 0))?.send_to(&frame, to))??;
        Ok([of_neighbour, seen(&lab)?])
    };
    fleet.apply_to("node-b", &policies)?;
    assert_eq!(frames()?, [vec![EIP_B[0]], vec![EIP_B[0]]]);
    fleet.apply(&policies)?;
    assert_eq!(frames()?, [vec![EIP_B[0]], vec![]]);
    Ok(())
}

#[test]
fn connection_opened_by_spoofed_reply_dropped_by_reverse_path_filter() -> Result {
    let lab = lab();
    let mut fleet = steered(&lab)?;
    let mut from = FROM;
    for gateway in [Some("node-b"), None] {
        fleet.apply(&[policy("p", &[POD_A], gateway, dual(EIP_B))?])?;
        let steered = if gateway.is_some() { EIP_B.to_vec() } else { Vec::new() };
        for (filtered, expected) in [(false, POD_A.to_vec()), (true, steered)] {
            if filtered {
                with_reverse_path(&lab)?;
            }
            from += 1;
            for (pod, server) in POD_A.into_iter().zip(SERVER) {
                // By the route to the server, so that the packet leaves the pod.
                send(&lab.pod_a, server, &datagram((server, PORT), (pod, from), b"!"))?;
                send(&lab.pod_a, server, &datagram((pod, from), (server, PORT), b"?"))?;
            }
            assert_eq!(seen(&lab)?, expected, "by {gateway:?}, filtered: {filtered}");
        }
        for host in lab.nodes() {
            tool(&host.netns, "nft delete table inet reverse_path")?;
        }
    }
    Ok(())
}

/// Counts packets of the pod and of the egress IP in every protocol at the server.
const COUNTED: &str = "table inet counted {
    set seen4 { type ipv4_addr; flags dynamic; }
    set seen6 { type ipv6_addr; flags dynamic; }
    chain prerouting {
        type filter hook prerouting priority -350;
        ip saddr { 10.244.0.0/16, 10.10.0.0/24, 198.51.100.200 } add @seen4 { ip saddr }
        ip6 saddr { fd44::/16, fd10::/64, 2001:db8:51::200 } add @seen6 { ip6 saddr }
    }
}";

fn counted(lab: &Lab) -> Result<String> {
    let _all_here = seen(lab)?;
    let listed = tool(&lab.server, "nft list table inet counted")?;
    let mut found = String::new();
    for line in listed.lines().filter(|line| line.contains("elements")) {
        found.push_str(line.trim());
    }
    for set in ["seen4", "seen6"] {
        tool(&lab.server, &format!("nft flush set inet counted {set}"))?;
    }
    let probes = ["10.244.3.10", "fd44:3::10", "elements = {", "}", ",", " "];
    Ok(probes.iter().fold(found, |text, probe| text.replace(probe, "")))
}

#[test]
fn fragments_and_extension_headers_translated() -> Result {
    let lab = lab();
    let mut fleet = steered(&lab)?;
    nft(&lab.server, &[], COUNTED)?;
    fleet.apply(&[policy("p", &[POD_A, POD_B], Some("node-b"), dual(EIP_B))?])?;
    for (pod, address) in [(&lab.pod_a, POD_A), (&lab.pod_b, POD_B)] {
        let [v4, v6] = [0, 1].map(|family| ((address[family], FROM), (SERVER[family], PORT)));
        // Two fragments of IPv4, the second one first.
        let whole = udp(v4.0, v4.1, &[0; 40]);
        send(pod, SERVER[0], &ip(UDP, v4.0.0, v4.1.0, 3, &whole[24..]))?;
        send(pod, SERVER[0], &ip(UDP, v4.0.0, v4.1.0, 0x2000, &whole[..24]))?;
        assert_eq!(counted(&lab)?, "198.51.100.200");
        // The same of IPv6.
        let whole = udp(v6.0, v6.1, &[0; 40]);
        for (offset, part) in [(24_u16, &whole[24..]), (1, &whole[..24])] {
            let [high, low] = offset.to_be_bytes();
            let payload = [&[UDP, 0, high, low, 0, 0, 0, 7][..], part].concat();
            send(pod, SERVER[1], &ip(FRAGMENT, v6.0.0, v6.1.0, 0, &payload))?;
        }
        assert_eq!(counted(&lab)?, "2001:db8:51::200");
        let payload = [&[UDP, 0, 1, 4, 0, 0, 0, 0][..], &udp(v6.0, v6.1, b"?")].concat();
        send(pod, SERVER[1], &ip(DESTINATION_OPTIONS, v6.0.0, v6.1.0, 0, &payload))?;
        assert_eq!(counted(&lab)?, "2001:db8:51::200");
    }
    Ok(())
}

/// An ICMP error about a packet.
fn unreachable(from: IpAddr, to: IpAddr, about: &[u8]) -> Vec<u8> {
    let protocol = if from.is_ipv4() { ICMP } else { ICMP6 };
    let kind = if from.is_ipv4() { [3, 3] } else { [1, 4] };
    let mut bytes = [&kind[..], &[0; 6], about].concat();
    let sum =
        if from.is_ipv4() { checksum(&[&bytes]) } else { transport_sum(ICMP6, from, to, &bytes) };
    bytes[2..4].copy_from_slice(&sum);
    ip(protocol, from, to, 0, &bytes)
}

#[test]
fn icmp_of_selected_pod_without_connection_dropped() -> Result {
    let lab = lab();
    let mut fleet = steered(&lab)?;
    nft(&lab.server, &[], COUNTED)?;
    for gateway in ["node-b", "node-a"] {
        fleet.apply(&[policy("p", &[POD_A], Some(gateway), dual(EIP_B))?])?;
        for (family, server) in SERVER.into_iter().enumerate() {
            let (pod, stranger) = (POD_A[family], STRANGER[family]);
            // A connection of another pod, and an error of the selected pod about it.
            let ask = datagram((stranger, FROM), (server, PORT), b"?");
            send(&lab.stranger, server, &ask)?;
            let _asked = counted(&lab)?;
            let answer = datagram((server, PORT), (stranger, FROM), b"?");
            send(&lab.stranger, server, &unreachable(stranger, server, &answer))?;
            assert_eq!(counted(&lab)?, stranger.to_string(), "of the connection's own pod");
            send(&lab.pod_a, server, &unreachable(pod, server, &answer))?;
            assert_eq!(counted(&lab)?, "", "about another's connection, by {gateway}");
            let unknown = datagram((server, PORT), (pod, 9), b"?");
            send(&lab.pod_a, server, &unreachable(pod, server, &unknown))?;
            assert_eq!(counted(&lab)?, "", "about no connection, by {gateway}");
        }
        // Conntrack does not track neighbour discovery, wherever it goes.
        let mut solicitation = [&[135, 0, 0, 0, 0, 0, 0, 0][..], &octets(SERVER[1])].concat();
        let sum = transport_sum(ICMP6, POD_A[1], SERVER[1], &solicitation);
        solicitation[2..4].copy_from_slice(&sum);
        send(&lab.pod_a, SERVER[1], &ip(ICMP6, POD_A[1], SERVER[1], 0, &solicitation))?;
        assert_eq!(counted(&lab)?, "", "untracked, by {gateway}");
    }
    Ok(())
}

/// Runs a closure in a namespace without any capability.
fn unprivileged<T: Send>(netns: &Netns, work: impl FnOnce() -> T + Send) -> Result<T> {
    Ok(netns.run(|| -> rustix::io::Result<T> {
        let mut sets = rustix::thread::capabilities(None)?;
        sets.effective = CapabilitySet::empty();
        sets.permitted = CapabilitySet::empty();
        rustix::thread::set_capabilities(None, sets)?;
        Ok(work())
    })??)
}

/// A rule against datagrams of programs to the tunnel's port: the kernel's own have no user.
const NO_PROGRAMS: &str = "table inet no_programs {
    chain output {
        type filter hook output priority raw;
        udp dport 7789 meta skuid 0-4294967295 counter drop
    }
}";

#[test]
fn vxlan_frame_of_unprivileged_process_dropped_by_rule_about_users() -> Result {
    let lab = lab();
    let _fleet = steered(&lab)?;
    let frame = frame(&lab)?;
    for filtered in [false, true] {
        if filtered {
            lab.nodes().iter().try_for_each(|host| nft(&host.netns, &[], NO_PROGRAMS))?;
        }
        let sent = unprivileged(&lab.node_a.netns, || {
            let socket = UdpSocket::bind((any(), 0))?;
            socket.send_to(&frame, (NODE_B[outer()], TUNNEL))
        })?;
        assert_eq!(sent.is_err(), filtered, "{sent:?}");
        let expected = if filtered { Vec::new() } else { vec![EIP_B[0]] };
        assert_eq!(seen(&lab)?, expected, "filtered: {filtered}");
    }
    check(&[expect(&lab.pod_a, SERVER, EIP_B)]);
    Ok(())
}

/// The host's own rule against packets of the tunnel for the host itself.
const NOT_FOR_THE_HOST: &str = "table inet not_for_the_host {
    chain input {
        type filter hook input priority 0;
        iifname egress.vxlan counter drop
    }
}";

#[test]
fn tunnel_address_of_a_peer_reached_by_any_pod_unless_host_drops() -> Result {
    let lab = lab();
    let _fleet = steered(&lab)?;
    let at: Pair = ["172.31.0.12".parse()?, "fd11::12".parse()?];
    let _service = Echo::start(&lab.node_b.netns, &at)?;
    if steering(&MarkLayout::SEED) == Steering::EgressHook {
        // Nodes have no neighbour entry for the address.
        check(&[expect_nothing(&lab.stranger, at)]);
        return Ok(());
    }
    check(&[expect(&lab.stranger, at, STRANGER), expect(&lab.pod_a, at, POD_A)]);
    lab.nodes().iter().try_for_each(|host| nft(&host.netns, &[], NOT_FOR_THE_HOST))?;
    check(&[expect_nothing(&lab.stranger, at), expect_nothing(&lab.pod_a, at)]);
    check(&[expect(&lab.pod_a, SERVER, EIP_B)]);
    Ok(())
}

#[test]
fn flow_of_selected_pod_to_tunnel_address_of_another_node_continues() -> Result {
    if steering(&MarkLayout::SEED) == Steering::EgressHook {
        harness::limit("with the egress hook nodes have no neighbour entry for a tunnel address");
    }
    let lab = lab();
    let _fleet = steered(&lab)?;
    let at: Pair = ["172.31.0.13".parse()?, "fd11::13".parse()?];
    let _service = Echo::start(&lab.node_c.netns, &at)?;
    for (from, to) in POD_A.into_iter().zip(at) {
        let socket = lab.pod_a.run(|| UdpSocket::bind((from, 0)))??;
        socket.set_read_timeout(Some(Duration::from_secs(10)))?;
        socket.connect((to, PORT))?;
        for number in 0..3_u8 {
            socket.send(&[number])?;
            socket.recv(&mut [0; 256]).map_err(|error| format!("packet {number}: {error}"))?;
        }
    }
    Ok(())
}

#[test]
fn exclusive_open_while_unprivileged_process_has_the_name() -> Result {
    let lab = lab();
    let open = |host: &Host| host.netns.run(|| KernelDatapath::open_as(Ownership::Exclusive));
    let name = UnixAddr::from_abstract_name("egress-datapath")?;
    let _holder = unprivileged(&lab.node_a.netns, || UnixListener::bind_addr(&name))??;
    let datapath = open(&lab.node_a)??;
    assert!(datapath.protection() >= Protection::Lock);
    // The error has the PID, whatever sockets the process had before.
    let error = open(&lab.node_a)?.err().ok_or("it was opened twice")?;
    assert_eq!(error.holder(), Some(std::process::id()));
    Ok(())
}

#[test]
fn tunnel_refused_while_unprivileged_process_has_the_port() -> Result {
    let lab = lab();
    let node = &lab.node_a.netns;
    let bind = |port| unprivileged(node, move || UdpSocket::bind((any(), port)));
    let policies = [policy("p", &[POD_A], Some("node-b"), dual(EIP_B))?];
    let socket = bind(TUNNEL)??;
    let mut fleet = Fleet::open(&lab)?;
    let error = fleet.apply(&policies).err().ok_or("it was applied")?.to_string();
    assert!(error.contains("Address already in use"), "{error}");
    // The pod is selected, and has no way without the tunnel.
    check(&[expect_nothing(&lab.pod_a, SERVER)]);
    assert!(sources(&lab).is_empty());
    drop(socket);
    fleet.apply(&policies)?;
    check(&[expect(&lab.pod_a, SERVER, EIP_B)]);
    // A port that needs a privilege.
    assert!(bind(789)?.is_err());
    fleet.change(|cluster| cluster.tunnel.port = 789);
    fleet.apply(&policies)?;
    check(&[expect(&lab.pod_a, SERVER, EIP_B)]);
    Ok(())
}

/// A rule of the pod's own namespace: its marks and priorities end there.
const MARKING: &str = "table inet marking {
    chain output {
        type filter hook output priority 300;
        meta mark set MARK
        meta priority set 1:2
    }
}";

#[test]
fn mark_and_priority_of_a_pod_ignored() -> Result {
    let lab = lab();
    let _fleet = steered(&lab)?;
    for mark in ["0x27000000", "0x26000000", "0x26000100"] {
        for pod in [&lab.stranger, &lab.pod_a] {
            nft(pod, &[], &MARKING.replace("MARK", mark))?;
        }
        check(&[expect(&lab.stranger, SERVER, STRANGER), expect(&lab.pod_a, SERVER, EIP_B)]);
        for pod in [&lab.stranger, &lab.pod_a] {
            tool(pod, "nft delete table inet marking")?;
        }
    }
    Ok(())
}

#[test]
fn egress_ip_bound_by_process_of_gateway_gets_replies() -> Result {
    let lab = lab();
    let _fleet = steered(&lab)?;
    for (ip, server) in EIP_B.into_iter().zip(SERVER) {
        let socket = unprivileged(&lab.node_b.netns, || UdpSocket::bind((ip, 0)))??;
        socket.set_read_timeout(Some(Duration::from_secs(60)))?;
        socket.send_to(b"?", (server, PORT))?;
        socket.recv(&mut [0; 64])?;
        assert_eq!(seen(&lab)?, [ip], "{ip}");
    }
    Ok(())
}

/// Counts what an egress IP tells the server: TCP resets and ICMP errors.
const ERRORS: &str = "table inet counted {
    set seen4 { type ipv4_addr; flags dynamic; }
    set seen6 { type ipv6_addr; flags dynamic; }
    chain prerouting {
        type filter hook prerouting priority -350;
        ip saddr 198.51.100.200 tcp flags rst add @seen4 { ip saddr }
        ip saddr 198.51.100.200 icmp type destination-unreachable add @seen4 { ip saddr }
        ip6 saddr 2001:db8:51::200 tcp flags rst add @seen6 { ip6 saddr }
        ip6 saddr 2001:db8:51::200 icmpv6 type destination-unreachable add @seen6 { ip6 saddr }
    }
}";

const TCP: u8 = 6;
const SYN: u8 = 2;
const ACK: u8 = 16;

/// A port of no socket, and of one that is bound to no address.
const CLOSED: u16 = 7012;
const EVERYWHERE: u16 = 7013;

/// A TCP segment with these flags.
fn segment(from: (IpAddr, u16), to: (IpAddr, u16), flags: u8) -> Vec<u8> {
    let ports = [from.1, to.1].map(u16::to_be_bytes).concat();
    let mut bytes = [&ports[..], &[0, 0, 0, 7, 0, 0, 0, 7, 0x50, flags, 1, 0, 0, 0, 0, 0]].concat();
    let sum = transport_sum(TCP, from.0, to.0, &bytes);
    bytes[16..18].copy_from_slice(&sum);
    ip(TCP, from.0, to.0, 0, &bytes)
}

#[test]
fn stray_packets_to_egress_ip_answered_with_no_error() -> Result {
    let lab = lab();
    let _fleet = steered(&lab)?;
    nft(&lab.server, &[], ERRORS)?;
    lab.node_b.netns.sysctl(&[("ipv6/bindv6only", "1")])?;
    for (server, eip) in SERVER.into_iter().zip(EIP_B) {
        let any: IpAddr =
            if eip.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let _service = lab.node_b.netns.run(|| TcpListener::bind((any, EVERYWHERE)))??;
        let from = (server, FROM);
        for port in [CLOSED, EVERYWHERE] {
            for flags in [ACK, SYN | ACK] {
                send(&lab.server, eip, &segment(from, (eip, port), flags))?;
            }
        }
        send(&lab.server, eip, &datagram(from, (eip, CLOSED), b"!"))?;
        assert_eq!(counted(&lab)?, "", "{eip}");
        // A new connection is for this node alone, which refuses it.
        send(&lab.server, eip, &segment(from, (eip, CLOSED), SYN))?;
        assert_eq!(counted(&lab)?, eip.to_string());
    }
    Ok(())
}

/// A service of another program, such as a node port of kube-proxy, at every address of the node.
const NODE_PORT: &str = "table inet node_port {
    chain prerouting {
        type nat hook prerouting priority dstnat;
        fib daddr type != local return
        meta nfproto ipv4 th dport 7000 dnat ip to 10.244.2.10
        meta nfproto ipv6 th dport 7000 dnat ip6 to fd44:2::10
    }
}";

#[test]
fn egress_ip_with_destination_nat_of_another_program_reached() -> Result {
    let lab = lab();
    let _fleet = steered(&lab)?;
    check(&[expect_nothing(&lab.server, EIP_B)]);
    nft(&lab.node_b.netns, &[], NODE_PORT)?;
    check(&[expect(&lab.server, EIP_B, SERVER)]);
    Ok(())
}

#[test]
fn packets_to_egress_ip_leave_no_conntrack_entry() -> Result {
    let lab = lab();
    harness::needs(&["conntrack"]);
    let _fleet = steered(&lab)?;
    for to in EIP_B {
        for port in 1..100 {
            send(
                &lab.server,
                to,
                &datagram((SERVER[usize::from(to.is_ipv6())], FROM), (to, port), b"?"),
            )?;
        }
    }
    let _later = seen(&lab)?;
    for family in ["ipv4", "ipv6"] {
        let listed = tool(
            &lab.node_b.netns,
            &format!("conntrack -L -f {family} -p udp --orig-port-src {FROM}"),
        )?;
        assert_eq!(listed, "");
    }
    Ok(())
}
