//! Flowtables of other programs, which offload connections past all hooks.

use std::collections::BTreeSet;
use std::net::{IpAddr, UdpSocket};
use std::time::{Duration, Instant};

use common::fleet::{Fleet, Result, dual, lab, needs_flowtables, nft, policy, sources, tool};
use egress_datapath::testing::lab::{
    EIP_B, EIP_C, Host, Lab, NODE_A, Netns, POD_A, Pair, SERVER, STRANGER,
};

use crate::connections::{Pipe, by, listen, outward, say};
use crate::flows::{ask_twice, datagrams, masquerade};

/// Datagrams of a flow and words of a connection; the second packet may be offloaded.
const PACKETS: usize = 8;

/// Time in which the kernel offloads a flow whose packets pass.
const SOON: Duration = Duration::from_secs(30);

/// Offloads every established connection between these devices, as the nft mode of Calico does.
fn offload(host: &Host, devices: &str) -> Result {
    let table = format!(
        "table inet offloading {{
            flowtable f {{ hook ingress priority 0; devices = {{ {devices} }}; }}
            chain c {{
                type filter hook forward priority 10;
                meta l4proto {{ tcp, udp }} ct state established flow add @f
            }}
        }}"
    );
    nft(&host.netns, &[], &table)
}

fn offload_everywhere(lab: &Lab) -> Result {
    offload(&lab.node_a, "eth0, pod10, pod11, egress.vxlan")?;
    for gateway in [&lab.node_b, &lab.node_c] {
        offload(gateway, "eth0, eth1, pod10, egress.vxlan")?;
    }
    Ok(())
}

/// Asks until the kernel has offloaded the flow of this source on node-a.
fn until_offloaded(lab: &Lab, from: &Netns, source: Pair) -> Result {
    for (to, source) in SERVER.into_iter().zip(source) {
        let flow = datagrams(from, to)?;
        let began = Instant::now();
        while !is_offloaded(lab, source)? {
            assert!(began.elapsed() < SOON, "nothing from {source} is offloaded");
            ask_twice(&flow)?;
        }
    }
    Ok(())
}

/// A flow of each family to the server.
fn flows(from: &Netns) -> Result<Vec<UdpSocket>> {
    SERVER.into_iter().map(|to| datagrams(from, to)).collect()
}

fn is_offloaded(lab: &Lab, source: IpAddr) -> Result<bool> {
    let family = if source.is_ipv4() { "ipv4" } else { "ipv6" };
    let list = tool(&lab.node_a.netns, &format!("conntrack -L -f {family} -s {source}"))?;
    Ok(list.contains("[OFFLOAD]"))
}

fn set(pair: Pair) -> BTreeSet<IpAddr> {
    pair.into_iter().collect()
}

#[test]
fn steered_connections_not_offloaded_past_tunnel() -> Result {
    not_offloaded("")
}

#[test]
fn steered_connections_not_offloaded_where_connection_mark_is_copied_to_packets() -> Result {
    not_offloaded(
        "table inet copying { chain prerouting {
            type filter hook prerouting priority mangle
            meta mark set ct mark
        }
        }",
    )
}

/// Connections of a selected pod stay on the path of the hooks, beside other rules on its node.
fn not_offloaded(rules: &str) -> Result {
    let lab = lab();
    needs_flowtables(&lab);
    harness::needs(&["conntrack"]);
    masquerade(&lab)?;
    nft(&lab.node_a.netns, &[], rules)?;
    let mut fleet = Fleet::open(&lab)?;
    fleet.apply(&by("node-b", EIP_B)?)?;
    offload_everywhere(&lab)?;
    until_offloaded(&lab, &lab.stranger, STRANGER)?;
    sources(&lab);

    let listeners = listen(&lab.server, SERVER)?;
    let pipes = outward(&lab.pod_a, &listeners)?;
    let flows = flows(&lab.pod_a)?;
    for _ in 0..PACKETS {
        for (flow, egress_ip) in flows.iter().zip(EIP_B) {
            assert_eq!(ask_twice(flow)?, egress_ip);
        }
        for pipe in &pipes {
            pipe.client_first()?;
            pipe.server_first()?;
        }
    }
    // A flowtable that is new when the connections are old.
    for host in [&lab.node_a, &lab.node_b, &lab.node_c] {
        tool(&host.netns, "nft delete table inet offloading")?;
    }
    offload_everywhere(&lab)?;
    for _ in 0..PACKETS {
        for pipe in &pipes {
            pipe.server_first()?;
        }
        for (flow, egress_ip) in flows.iter().zip(EIP_B) {
            assert_eq!(ask_twice(flow)?, egress_ip);
        }
    }
    assert_eq!(sources(&lab), set(EIP_B));
    Ok(())
}

#[test]
fn flowtable_read_and_repaired() -> Result {
    let lab = lab();
    needs_flowtables(&lab);
    let policies = by("node-b", EIP_B)?;
    let mut fleet = Fleet::open(&lab)?;
    fleet.apply(&policies)?;
    let node = &lab.node_a.netns;
    let list = |netns| tool(netns, "nft list flowtables inet");
    let made = list(node)?;
    assert!(made.contains("flowtable no_offload") && !made.contains("devices"), "{made}");
    fleet.mend(&policies, &"nothing")?;
    for damage in [
        "add flowtable inet egress_datapath other { hook ingress priority 0; }",
        "add flowtable inet egress_datapath no_offload \
         { hook ingress priority 0; devices = { eth0 }; }",
        "flush chain inet egress_datapath marked; flush chain inet egress_datapath tracked; \
         delete flowtable inet egress_datapath no_offload",
        "flush chain inet egress_datapath tracked",
    ] {
        nft(node, &[], damage)?;
        fleet.mend(&policies, &damage)?;
        assert_eq!(list(node)?, made, "{damage}");
    }
    fleet.remove()?;
    assert_eq!(list(node)?, "");
    Ok(())
}

#[test]
fn offloaded_connections_end_with_their_first_policy() -> Result {
    let lab = lab();
    needs_flowtables(&lab);
    harness::needs(&["conntrack"]);
    masquerade(&lab)?;
    offload(&lab.node_a, "eth0, pod10, pod11")?;
    let listeners = listen(&lab.server, SERVER)?;
    let pipes = outward(&lab.pod_a, &listeners)?;
    let flows = flows(&lab.pod_a)?;
    for _ in 0..PACKETS {
        for (flow, node) in flows.iter().zip(NODE_A) {
            assert_eq!(ask_twice(flow)?, node);
        }
        pipes.iter().try_for_each(Pipe::client_first)?;
    }
    for source in POD_A {
        assert!(is_offloaded(&lab, source)?, "{source}");
    }

    let mut fleet = Fleet::open(&lab)?;
    fleet.apply(&by("node-b", EIP_B)?)?;
    sources(&lab);
    for _ in 0..PACKETS {
        for (flow, egress_ip) in flows.iter().zip(EIP_B) {
            assert_eq!(ask_twice(flow)?, egress_ip);
        }
        for pipe in &pipes {
            // The server knows no such connection with the egress IP, and resets it.
            drop(say(&pipe.client, *b"ping"));
        }
    }
    assert_eq!(sources(&lab), set(EIP_B));
    Ok(())
}

#[test]
fn offloaded_connections_follow_their_policy() -> Result {
    let lab = lab();
    needs_flowtables(&lab);
    masquerade(&lab)?;
    let mut fleet = Fleet::open(&lab)?;
    fleet.apply(&by("node-b", EIP_B)?)?;
    offload_everywhere(&lab)?;
    let flows = flows(&lab.pod_a)?;
    let listeners = listen(&lab.server, SERVER)?;
    for (gateway, eip) in [("node-b", EIP_B), ("node-c", EIP_C), ("node-b", EIP_B)] {
        fleet.apply(&by(gateway, eip)?)?;
        sources(&lab);
        let pipes = outward(&lab.pod_a, &listeners)?;
        for _ in 0..PACKETS {
            for (flow, egress_ip) in flows.iter().zip(eip) {
                assert_eq!(ask_twice(flow)?, egress_ip);
            }
            pipes.iter().try_for_each(Pipe::client_first)?;
        }
        assert_eq!(sources(&lab), set(eip));
    }
    fleet.apply(&[policy("p", &[POD_A], None, dual(EIP_B))?])?;
    sources(&lab);
    for _ in 0..PACKETS {
        flows.iter().try_for_each(|flow| flow.send(b"?").map(drop))?;
    }
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(sources(&lab), BTreeSet::new());
    Ok(())
}
