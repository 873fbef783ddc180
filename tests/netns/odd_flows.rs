//! Connections that are not like others: of the node itself, and in zones.

use std::net::{TcpListener, TcpStream};
use std::slice;

use common::fleet::{Fleet, Result, dual, lab, nft, policy};
use egress_datapath::testing::lab::{EIP_B, EIP_C, NODE_A, SERVER, STRANGER};

use crate::flows::{ask_twice, datagrams, masquerade, speak};

const PORT: u16 = 7003;

#[test]
fn node_connections_survive_policy_for_all_sources() -> Result {
    let lab = lab();
    let listener = lab.server.run(|| TcpListener::bind((SERVER[0], PORT)))??;
    let mut pairs = Vec::new();
    for netns in [&lab.node_a.netns, &lab.node_b.netns] {
        let client = netns.run(|| TcpStream::connect((SERVER[0], PORT)))??;
        pairs.push((client, listener.accept()?.0));
    }
    let all = policy("p", &[], Some("node-b"), dual(EIP_B))?
        .with_sources(vec!["0.0.0.0/0".parse()?, "::/0".parse()?]);
    let mut fleet = Fleet::open(&lab)?;
    for round in 0..2 {
        let reports = fleet.apply(slice::from_ref(&all))?;
        let ended = reports.iter().flat_map(|report| report.changes.ops());
        assert_eq!(ended.filter(|op| op.to_string().starts_with("conntrack")).count(), 0);
        assert!(round == 0 || reports.iter().all(|report| report.changes.is_empty()));
        for pair in &pairs {
            speak(pair)?;
        }
        // Whoever has no memory looks through the connections again.
        fleet = Fleet::open(&lab)?;
    }
    Ok(())
}

#[test]
fn conntrack_zone_of_original_direction_policy_followed() -> Result {
    policy_followed(
        "ip saddr 10.244.0.0/16 ct original zone set 5
        ip6 saddr fd44::/16 ct original zone set 5",
    )
}

#[test]
fn conntrack_zone_of_reply_direction_policy_followed() -> Result {
    harness::needs(&["nft"]);
    policy_followed("ct reply zone set 5")
}

#[test]
fn conntrack_zone_policy_followed() -> Result {
    harness::needs(&["nft"]);
    policy_followed("ct zone set 5")
}

fn policy_followed(zone: &str) -> Result {
    let lab = lab();
    masquerade(&lab)?;
    let zones = format!(
        "table inet zones {{
            chain prerouting {{
                type filter hook prerouting priority raw;
                {zone}
            }}
        }}"
    );
    nft(&lab.node_a.netns, &[], &zones)?;
    let mut fleet = Fleet::open(&lab)?;
    let flows = [datagrams(&lab.stranger, SERVER[0])?, datagrams(&lab.stranger, SERVER[1])?];
    for (policies, source) in [
        (vec![], NODE_A),
        (vec![policy("p", &[STRANGER], Some("node-b"), dual(EIP_B))?], EIP_B),
        (vec![policy("p", &[STRANGER], Some("node-c"), dual(EIP_C))?], EIP_C),
        (vec![], NODE_A),
    ] {
        fleet.apply(&policies)?;
        for (flow, source) in flows.iter().zip(source) {
            // A flow that is ended may lose the datagram that finds it out.
            assert_eq!(ask_twice(flow)?, source);
        }
    }
    Ok(())
}
