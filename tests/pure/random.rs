//! Random clusters and policies, out of few addresses, so that they meet.

use egress_datapath::{
    Claim, Cluster, Destinations, DeviceName, EgressIp, EgressPolicy, MacAddr, MarkLayout,
    PolicyId, Replies, Steering,
};
use ipnet::IpNet;
use proptest::prelude::*;
use proptest::sample::select;

use crate::{cluster, dual, name, net, nets, v4};

const SOURCES: [&str; 16] = [
    "0.0.0.0/0",
    "10.244.0.0/16",
    "10.244.1.0/24",
    "10.244.1.0/30",
    "10.244.1.2/31",
    "10.244.1.0/32",
    "10.244.1.2/32",
    "10.244.1.3/32",
    "255.255.255.255/32",
    "::/0",
    "fd44::/16",
    "fd44:1::/64",
    "fd44:1::/126",
    "fd44:1::1/128",
    "fd44:1::2/128",
    "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff/128",
];

const DESTINATIONS: [&str; 14] = [
    "0.0.0.0/0",
    "128.0.0.0/1",
    "198.51.100.0/24",
    "198.51.100.0/25",
    "198.51.100.64/26",
    "198.51.100.77/32",
    "203.0.113.0/24",
    "10.244.0.0/15",
    "::/0",
    "8000::/1",
    "2001:db8::/32",
    "2001:db8:1::/48",
    "2001:db8:1::/64",
    "2001:db8:1::7/128",
];

pub(crate) fn policies() -> impl Strategy<Value = Vec<EgressPolicy>> {
    let sources = prop::collection::vec(select(&SOURCES[..]).prop_map(net), 1..4);
    let listed = prop::collection::vec(select(&DESTINATIONS[..]).prop_map(net), 1..5);
    let destinations = prop_oneof![
        1 => Just(Destinations::External),
        3 => listed.prop_map(Destinations::Nets),
    ];
    let gateway = select(&[None, Some("a"), Some("a"), Some("b"), Some("c")][..]);
    let egress_ip = select(vec![
        v4("192.0.2.1"),
        v4("192.0.2.2"),
        EgressIp::V6("2001:db8:ffff::1".parse().unwrap()),
        dual("192.0.2.3", "2001:db8:ffff::3"),
        dual("192.0.2.3", "2001:db8:ffff::3"),
        EgressIp::Node,
    ]);
    let one = (0..3_u32, sources, destinations, gateway, egress_ip).prop_map(
        |(priority, sources, destinations, gateway, egress_ip)| {
            EgressPolicy::new(PolicyId::new("p").unwrap(), sources, egress_ip)
                .with_priority(priority)
                .with_destinations(destinations)
                .with_gateway(gateway.map(name))
        },
    );
    prop::collection::vec(one, 0..7).prop_map(|mut policies| {
        for (number, policy) in policies.iter_mut().enumerate() {
            // Ids in another order than the list.
            policy.id = PolicyId::new(format!("p{}", (number * 5) % 7)).unwrap();
        }
        policies
    })
}

prop_compose! {
    /// Node a's view, of two nodes or three, some without IPv6 in the tunnel.
    pub(crate) fn clusters()(
        (layout, steering, replies) in select(vec![
            (MarkLayout::SEED, Steering::Tables, Replies::Direct),
            (MarkLayout::SEED, Steering::Tables, Replies::Tunnel),
            (MarkLayout::SEED, Steering::EgressHook, Replies::Direct),
            (MarkLayout::SEED, Steering::EgressHook, Replies::Tunnel),
            (MarkLayout::COMPACT, Steering::Tables, Replies::Direct),
        ]),
        v6 in prop::array::uniform3(prop::bool::weighted(0.8)),
        macs in prop::array::uniform3(prop::option::weighted(0.3, 0..4_u8)),
        marks in prop::array::uniform3(prop::option::weighted(0.3, 0..3_u16)),
        (port, mtu, priority) in (7789..7791_u16, select(vec![1500, 9000]), 101..103_u32),
        (vni, device) in (100..102_u32, select(vec!["egress.vxlan", "egress1"])),
        under in select(vec![None, Some("eth0"), Some("eth1")]),
        claims in select(vec![
            vec![],
            vec![("192.0.2.0/24", "eth0"), ("192.0.2.2/32", "eth1"), ("2001:db8:ffff::/48", "eth1")],
            vec![("192.0.2.2/31", "eth1")],
        ]),
        (up_v4, counting) in (prop::bool::weighted(0.9), any::<bool>()),
        (only, clamp) in (any::<bool>(), any::<bool>()),
        caching in any::<bool>(),
        excluded in select(vec![
            vec!["10.244.0.0/16", "fd44::/16"],
            vec!["10.244.0.0/16"],
            vec!["10.0.0.0/8", "fd44::/16", "198.51.100.77/32", "198.51.100.128/25"],
            vec!["2001:db8:1::/64", "10.244.1.0/24"],
        ]),
    ) -> Cluster {
        let mut cluster = cluster("a");
        cluster.marks = layout;
        cluster.steering = steering;
        cluster.replies = replies;
        cluster.connection_caching = caching;
        cluster.tunnel.port = port;
        cluster.tunnel.underlay_mtu = mtu;
        cluster.tunnel.vni = vni;
        cluster.tunnel.device = DeviceName::new(device).unwrap();
        cluster.tunnel.underlay_device = under.map(|name| DeviceName::new(name).unwrap());
        cluster.tunnel.underlay_only = only && under.is_some();
        cluster.tunnel.clamp_mss = clamp;
        cluster.rule_priority = priority;
        let claim = |(net, device): (&str, _)| {
            Claim::new(net.parse().unwrap(), DeviceName::new(device).unwrap())
        };
        cluster.claims = claims.into_iter().map(claim).collect();
        cluster.excluded = nets(&excluded);
        cluster.policy_counters = counting && !caching;
        for (number, node) in cluster.nodes.iter_mut().enumerate() {
            if !v6[number] {
                node.tunnel.retain(|net| matches!(net, IpNet::V4(_)));
            }
            if !up_v4 {
                node.underlay.retain(std::net::IpAddr::is_ipv6);
            }
            let place = u8::try_from(number).unwrap();
            node.mac = macs[number].map(|last| MacAddr::new([2, 0, 0, 0, place, last]));
            let value = |n: u16| 3 * n + u16::from(place) + 1;
            node.mark = marks[number].and_then(|n| layout.mark(value(n)));
        }
        cluster
    }
}
