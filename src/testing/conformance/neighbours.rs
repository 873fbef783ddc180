//! Conformance cases of coexistence with other software and kernel settings on the nodes.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::Destinations;

use super::super::lab::{
    EIP_B, NODE_A, OTHER_SERVER, POD_A, POD_B, POD_C, Pair, SERVER, hosts, net,
};
use super::expect::{Expect, check};
use super::trial::{Result, Trial, dual, nft, policy};

const B: Option<&str> = Some("node-b");

pub(super) fn strict_rp_filter(trial: &mut Trial<'_>) -> Result {
    // `rp_filter` of `all` applies to every interface without a value or with a lower value.
    for host in trial.lab.nodes() {
        let strict = ["all", "default", "eth0"].map(|of| format!("ipv4/conf/{of}/rp_filter"));
        host.netns.sysctl(&strict.each_ref().map(|name| (name.as_str(), "1")))?;
    }
    trial.apply(&[policy("p", &[POD_A, POD_B], B, dual(EIP_B))?])?;
    check(&[
        Expect::source(trial.pod_a(), SERVER, EIP_B),
        Expect::source(trial.pod_b(), SERVER, EIP_B),
        Expect::source(trial.pod_a(), POD_C, POD_A),
    ])
}

pub(super) fn marks_looked_back_with(trial: &mut Trial<'_>) -> Result {
    trial.lab.node_a.netns.sysctl(&[
        ("ipv4/conf/all/rp_filter", "1"),
        ("ipv4/conf/all/src_valid_mark", "1"),
        ("ipv4/fwmark_reflect", "1"),
    ])?;
    trial.apply(&[policy("p", &[POD_A], B, dual(EIP_B))?])?;
    check(&[Expect::source(trial.pod_a(), SERVER, EIP_B)])
}

pub(super) fn masquerade(trial: &mut Trial<'_>) -> Result {
    trial.masquerade("early")?;
    trial.apply(&[policy("p", &[POD_A, POD_B], B, dual(EIP_B))?])?;
    trial.masquerade("late")?;
    check(&[
        Expect::source(trial.pod_a(), SERVER, EIP_B),
        Expect::source(trial.pod_b(), SERVER, EIP_B),
        Expect::source(trial.stranger(), SERVER, NODE_A),
    ])
}

pub(super) fn network_policy(trial: &mut Trial<'_>) -> Result {
    let rules = "table inet network_policy {
        chain forward {
            type filter hook forward priority filter;
            ip saddr 10.244.1.10 ip daddr 198.51.100.20 drop
            ip6 saddr fd44:1::10 ip6 daddr 2001:db8:51::20 drop
        }
    }";
    nft(&trial.lab.node_a.netns, rules)?;
    trial.apply(&[policy("p", &[POD_A], B, dual(EIP_B))?])?;
    check(&[
        Expect::nothing(trial.pod_a(), OTHER_SERVER),
        Expect::source(trial.pod_a(), SERVER, EIP_B),
    ])
}

/// Addresses of a service whose endpoint is outside the cluster.
const SERVICE: Pair = [
    IpAddr::V4(Ipv4Addr::new(10, 96, 0, 50)),
    IpAddr::V6(Ipv6Addr::new(0xfd96, 0, 0, 0, 0, 0, 0, 0x50)),
];
/// External addresses of a service whose endpoint is a pod.
const PUBLISHED: Pair = [
    IpAddr::V4(Ipv4Addr::new(203, 0, 113, 7)),
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 7, 0, 0, 0, 0, 7)),
];

pub(super) fn service_address(trial: &mut Trial<'_>) -> Result {
    let rules = "table inet services {
        chain prerouting {
            type nat hook prerouting priority dstnat;
            ip daddr 10.96.0.50 dnat ip to 198.51.100.10
            ip6 daddr fd96::50 dnat ip6 to 2001:db8:51::10
            ip daddr 203.0.113.7 dnat ip to 10.244.2.10
            ip6 daddr 2001:db8:7::7 dnat ip6 to fd44:2::10
        }
    }";
    nft(&trial.lab.node_a.netns, rules)?;
    let services = SERVICE.into_iter().zip([16, 112]).map(|(ip, length)| net(ip, length).trunc());
    let services: Vec<_> = services.collect();
    trial.change(|cluster| cluster.excluded.extend(services.iter().copied()));
    trial.apply(&[policy("p", &[POD_A], B, dual(EIP_B))?])?;
    check(&[
        Expect::source(trial.pod_a(), SERVICE, EIP_B),
        Expect::source(trial.pod_a(), PUBLISHED, POD_A),
    ])?;
    // A list of destinations is matched against the endpoint too, not the service's address.
    let mut listed = policy("p", &[POD_A], B, dual(EIP_B))?;
    listed.destinations = Destinations::Nets(hosts(&[SERVER]));
    trial.apply(&[listed])?;
    check(&[Expect::source(trial.pod_a(), SERVICE, EIP_B)])
}
