//! What must not get out, whatever is missing, broken or not allowed.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::thread;

use egress_datapath::EgressIp;

use crate::fleet::{
    Expect, Fleet, Result, check, dual, expect, expect_nothing, have, is_beyond, lab, policy,
    sources, tool,
};
use crate::flows::masquerade;
use crate::lab::{
    EIP_B, EIP_C, Echo, Host, Lab, NODE_A, NODE_B, NODE_B_OUTSIDE, OTHER_SERVER, POD_A, POD_B,
    Proto, SERVER, STRANGER, probe,
};

const B: Option<&str> = Some("node-b");
const C: Option<&str> = Some("node-c");

#[test]
fn a_policy_without_a_gateway_lets_nothing_out() -> Result {
    let Some(lab) = lab()? else { return Ok(()) };
    let policies = [policy("p", &[POD_A, POD_B], None, dual(EIP_B))?];
    let reports = Fleet::open(&lab)?.apply(&policies)?;
    assert_eq!(reports.iter().map(|report| report.findings.len()).collect::<Vec<_>>(), [2; 3]);
    check(&[
        expect_nothing(&lab.pod_a, SERVER),
        expect_nothing(&lab.pod_b, SERVER),
        expect(&lab.pod_a, POD_B, POD_A),
        expect(&lab.server, POD_A, SERVER),
    ]);
    // What was seen are the answers to the server's own questions.
    let all = POD_A.into_iter().collect::<BTreeSet<_>>();
    assert_eq!(sources(&lab), all);
    check(&[expect_nothing(&lab.pod_a, SERVER)]);
    assert_eq!(sources(&lab), BTreeSet::new());
    Ok(())
}

#[test]
fn a_family_without_an_egress_ip_stays_inside() -> Result {
    let Some(lab) = lab()? else { return Ok(()) };
    let of_one_family = EIP_B.map(|ip| match ip {
        IpAddr::V4(v4) => EgressIp::V4(v4),
        IpAddr::V6(v6) => EgressIp::V6(v6),
    });
    for egress_ip in of_one_family {
        let policies = [policy("p", &[POD_A, POD_B], B, egress_ip)?];
        Fleet::open(&lab)?.apply(&policies)?;
        sources(&lab);
        let source = EIP_B.map(|ip| egress_ip.addresses().find(|address| *address == ip));
        check(&[
            Expect { from: &lab.pod_a, to: SERVER, source },
            Expect { from: &lab.pod_b, to: SERVER, source },
            expect(&lab.pod_a, POD_B, POD_A),
        ]);
        assert_eq!(sources(&lab), egress_ip.addresses().collect::<BTreeSet<_>>());
    }
    Ok(())
}

#[test]
fn a_gateway_that_is_not_ready_lets_nothing_out() -> Result {
    let Some(lab) = lab()? else { return Ok(()) };
    let mut fleet = Fleet::open(&lab)?;
    fleet.apply(&[policy("p", &[POD_A], C, dual(EIP_C))?])?;
    let policies = [policy("p", &[POD_A], B, dual(EIP_B))?];
    // Everybody but the new gateway knows.
    fleet.apply_to("node-c", &policies)?;
    fleet.apply_to("node-a", &policies)?;
    check(&[expect_nothing(&lab.pod_a, SERVER)]);
    assert_eq!(sources(&lab), BTreeSet::new());
    fleet.apply(&policies)?;
    check(&[expect(&lab.pod_a, SERVER, EIP_B)]);
    Ok(())
}

#[test]
fn nothing_gets_out_while_a_piece_is_missing_and_it_is_put_back() -> Result {
    let Some(lab) = lab()? else { return Ok(()) };
    if !have("ip")? {
        return Ok(());
    }
    let policies = [policy("p", &[POD_A], B, dual(EIP_B))?];
    let mut fleet = Fleet::open(&lab)?;
    fleet.apply(&policies)?;
    tool(&lab.node_a.netns, "ip link add bridge type bridge")?;
    tool(&lab.node_a.netns, "ip link set bridge up")?;
    for damage in [
        &["ip link set egress.vxlan down"][..],
        &["ip link del egress.vxlan"],
        &["ip -4 rule del pref 102", "ip -6 rule del pref 102"],
        &["ip -4 rule del pref 102", "ip -6 rule del pref 102", "ip link set egress.vxlan down"],
        &["ip -4 rule del pref 101", "ip -6 rule del pref 101"],
        &["ip -4 rule del pref 103", "ip -6 rule del pref 103"],
        &["ip -4 rule flush proto 69", "ip -6 rule flush proto 69"],
        &["ip -4 route flush table all proto 69", "ip -6 route flush table all proto 69"],
        &["ip neigh flush all dev egress.vxlan nud permanent"],
        &["ip addr flush dev egress.vxlan"],
        &[
            "ip -4 route prepend default via 10.10.0.1 table TABLE proto 69",
            "ip -6 route add default via fd10::1 table TABLE metric 1 proto 69",
        ],
        &[
            "ip -4 rule add pref 50 from 10.244.0.0/16 lookup main proto 69",
            "ip -6 rule add pref 50 from fd44::/16 lookup main proto 69",
        ],
        &["ip link set egress.vxlan alias uplink", "ip link set egress.vxlan down"],
        &["ip link set egress.vxlan master bridge"],
    ] {
        let rules = tool(&lab.node_a.netns, "ip -4 rule show pref 102")?;
        let table = rules.split_whitespace().skip_while(|word| *word != "lookup").nth(1);
        for line in damage {
            let line = line.replace("TABLE", table.unwrap_or_default());
            tool(&lab.node_a.netns, &line)?;
        }
        let (pod, wearing) = (&lab.pod_a, EIP_B.into_iter().collect::<BTreeSet<_>>());
        thread::scope(|scope| {
            for to in SERVER {
                // Answered or not: what counts is what the server sees.
                scope.spawn(move || probe(pod, Proto::Udp, to));
            }
        });
        let seen = sources(&lab);
        assert!(seen.is_subset(&wearing), "after {damage:?}: {seen:?}");
        fleet.apply(&policies).map_err(|error| format!("after {damage:?}: {error}"))?;
        let again = fleet.apply(&policies)?;
        let changes = again.iter().map(|report| report.changes.to_string()).collect::<String>();
        assert_eq!(changes, "", "after {damage:?}");
        check(&[expect(&lab.pod_a, SERVER, EIP_B)]);
        sources(&lab);
    }
    Ok(())
}

#[test]
fn a_firewall_that_others_have_changed_is_put_right() -> Result {
    if is_beyond("there is no table of nf_tables; see what_others_change_is_put_right")? {
        return Ok(());
    }
    let Some(lab) = lab()? else { return Ok(()) };
    if !have("nft")? {
        return Ok(());
    }
    let policies = [policy("p", &[POD_A], B, dual(EIP_B))?];
    let mut fleet = Fleet::open(&lab)?;
    fleet.apply(&policies)?;
    for damage in [
        "nft flush ruleset",
        "nft delete table inet egress_datapath",
        "nft flush table inet egress_datapath",
        "nft flush chain inet egress_datapath nat_postrouting",
        "nft flush map inet egress_datapath source4",
        "nft add rule inet egress_datapath prerouting counter",
        "nft insert rule inet egress_datapath forward drop",
        "nft add chain inet egress_datapath stray",
        "nft add table inet egress_datapath { flags dormant ; }",
        "nft add set inet egress_datapath stray { type mark ; }",
        "nft add element inet egress_datapath source4 { 10.244.1.99 : 7:7 }",
        "nft add element inet egress_datapath excluded4 { 198.51.100.0/24 }",
    ] {
        for host in [&lab.node_a, &lab.node_b] {
            tool(&host.netns, damage)?;
        }
        fleet.apply(&policies).map_err(|error| format!("after {damage}: {error}"))?;
        let again = fleet.apply(&policies)?;
        let changes = again.iter().map(|report| report.changes.to_string()).collect::<String>();
        assert_eq!(changes, "", "after {damage}");
        check(&[expect(&lab.pod_a, SERVER, EIP_B)]);
    }
    Ok(())
}

#[test]
fn a_stranger_on_the_underlay_cannot_speak_through_the_tunnel() -> Result {
    let Some(lab) = lab()? else { return Ok(()) };
    let policies = [policy("p", &[POD_A], B, dual(EIP_B))?];
    Fleet::open(&lab)?.apply(&policies)?;
    check(&[expect(&lab.pod_a, SERVER, EIP_B)]);
    sources(&lab);
    let frame = vxlan_frame(mac_of(&lab, &lab.node_b)?, mac_of(&lab, &lab.node_a)?);
    for (netns, arrives) in [(&lab.node_a.netns, true), (&lab.router, false)] {
        for _ in 0..3 {
            netns.run(|| {
                let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
                socket.send_to(&frame, (NODE_B[0], 7789))
            })??;
        }
        // An answered question later the frames have arrived, or never will.
        check(&[expect(&lab.stranger, OTHER_SERVER, STRANGER)]);
        let seen = sources(&lab);
        assert_eq!(seen.contains(&EIP_B[0]), arrives, "{seen:?}");
    }
    Ok(())
}

#[test]
fn a_pod_cannot_speak_through_the_tunnel_in_the_name_of_its_node() -> Result {
    let Some(lab) = lab()? else { return Ok(()) };
    if !have("nft")? {
        return Ok(());
    }
    masquerade(&lab)?;
    let policies = [policy("p", &[POD_A], B, dual(EIP_B))?];
    Fleet::open(&lab)?.apply(&policies)?;
    let frame = vxlan_frame(mac_of(&lab, &lab.node_b)?, mac_of(&lab, &lab.node_a)?);
    for pod in [&lab.pod_a, &lab.stranger, &lab.pod_c] {
        for to in [NODE_B, NODE_B_OUTSIDE].as_flattened() {
            let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
            for _ in 0..3 {
                pod.run(|| UdpSocket::bind(any)?.send_to(&frame, (*to, 7789)))??;
            }
        }
    }
    // An answered question later the frames have arrived, or never will.
    check(&[expect(&lab.stranger, OTHER_SERVER, NODE_A)]);
    assert_eq!(sources(&lab), NODE_A.into_iter().collect::<BTreeSet<_>>());
    // It is the pods that are refused, not the frame.
    let node = &lab.node_a.netns;
    node.run(|| UdpSocket::bind("0.0.0.0:0")?.send_to(&frame, (NODE_B[0], 7789)))??;
    check(&[expect(&lab.stranger, OTHER_SERVER, NODE_A)]);
    assert!(sources(&lab).contains(&EIP_B[0]));
    Ok(())
}

#[test]
fn no_service_of_the_gateway_answers_on_an_egress_ip() -> Result {
    let Some(lab) = lab()? else { return Ok(()) };
    let _service = Echo::start(&lab.node_b.netns, &[EIP_B, NODE_B_OUTSIDE].concat())?;
    check(&[expect(&lab.server, EIP_B, SERVER)]);
    Fleet::open(&lab)?.apply(&[policy("p", &[POD_A], B, dual(EIP_B))?])?;
    check(&[expect_nothing(&lab.server, EIP_B), expect(&lab.server, NODE_B_OUTSIDE, SERVER)]);
    Ok(())
}

/// Of a node's tunnel device.
fn mac_of(lab: &Lab, host: &Host) -> Result<[u8; 6]> {
    let cluster = lab.cluster(host)?;
    let node = cluster.nodes.iter().find(|node| node.name == cluster.node);
    Ok(node.map(|node| node.mac().octets()).unwrap_or_default())
}

/// A UDP datagram from the selected pod to the server, as it comes through the tunnel.
fn vxlan_frame(to: [u8; 6], from: [u8; 6]) -> Vec<u8> {
    // 29 bytes, do not fragment, UDP, checksum 0x0495, 10.244.1.10 to 198.51.100.10.
    let ip = [69, 0, 0, 29, 0, 0, 0x40, 0, 64, 17, 4, 0x95, 10, 244, 1, 10, 198, 51, 100, 10];
    let vxlan = [0x08, 0, 0, 0, 0, 0, 100, 0];
    // From port 5000 to 7000, nine bytes, without checksum.
    let udp = [0x13, 0x88, 0x1b, 0x58, 0, 9, 0, 0, b'?'];
    [&vxlan[..], &to, &from, &[0x08, 0], &ip, &udp].concat()
}
