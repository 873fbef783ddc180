//! What the rules and maps do to a packet is what the policies say.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use egress_datapath::explain::{Decision, Fate, Frame, Packet, Reason, Trace, explain_received};
use egress_datapath::iptables::Iptables;
use egress_datapath::state::{Action, ChainId, Ipset, Set, State, Variant, action};
use egress_datapath::{
    Backend, Cluster, Destinations, EgressPolicy, Family, Mark, NodeName, Plan, Replies, Steering,
    explain,
};
use proptest::prelude::*;
use proptest::sample::select;

use crate::random::{clusters, policies};
use crate::{net, planned};

/// What should become of the first packet of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// Left alone.
    Alone,
    Dropped,
    /// Sent to the gateway with this mark.
    Sent(Mark),
    Wears(IpAddr),
    WearsNodes,
}

/// The policies' side: the first in order that takes the packet.
pub(crate) fn winner<'a>(
    cluster: &Cluster,
    policies: &'a [EgressPolicy],
    packet: Packet,
) -> Option<&'a EgressPolicy> {
    let to = packet.destination;
    let nodes = cluster
        .nodes
        .iter()
        .any(|node| node.underlay.contains(&to) || node.tunnel.iter().any(|net| net.addr() == to));
    let never = ["169.254.0.0/16", "224.0.0.0/4", "fe80::/10", "ff00::/8"].map(net);
    let mut excluded = cluster.excluded.iter().chain(&never);
    if nodes || excluded.any(|net| net.contains(&to)) {
        return None;
    }
    let takes = |policy: &&EgressPolicy| {
        policy.sources.iter().any(|net| net.contains(&packet.source))
            && match &policy.destinations {
                Destinations::External => true,
                Destinations::Nets(nets) => nets.iter().any(|net| net.contains(&to)),
            }
    };
    let taking = policies.iter().filter(takes);
    taking.min_by_key(|policy| (policy.priority, policy.id.clone()))
}

/// What the policy wants on the pod's node.
pub(crate) fn steered(
    cluster: &Cluster,
    plan: &Plan,
    policy: &EgressPolicy,
    family: Family,
) -> Wanted {
    let Some(gateway) = &policy.gateway else { return Wanted::Dropped };
    if !policy.egress_ip.serves(family) {
        return Wanted::Dropped;
    }
    if *gateway == cluster.node {
        return translated(cluster, policy, family);
    }
    let carries = |name: &NodeName| {
        let node = cluster.nodes.iter().find(|node| node.name == *name).unwrap();
        node.tunnel.iter().any(|net| Family::of_net(net) == family)
    };
    if carries(gateway) && carries(&cluster.node) {
        Wanted::Sent(plan.gateways[gateway].0)
    } else {
        Wanted::Dropped
    }
}

/// What the policy wants where the packet came out of the tunnel.
pub(crate) fn translated(cluster: &Cluster, policy: &EgressPolicy, family: Family) -> Wanted {
    if policy.gateway.as_ref() != Some(&cluster.node) || !policy.egress_ip.serves(family) {
        return Wanted::Dropped;
    }
    policy.egress_ip.address(family).map_or(Wanted::WearsNodes, Wanted::Wears)
}

/// Inside and right outside of the prefixes that the random policies are made of.
pub(crate) fn packets() -> impl Strategy<Value = Packet> {
    let low = |most: u8| 0..=most;
    let v4 = |text: &str| text.parse::<Ipv4Addr>().unwrap();
    let v6 = |text: &str| text.parse::<Ipv6Addr>().unwrap();
    let source4 = prop_oneof![
        4 => low(5).prop_map(|n| Ipv4Addr::new(10, 244, 1, n)),
        1 => select(vec![v4("10.244.9.9"), v4("10.243.255.255"), v4("255.255.255.255")]),
    ];
    let to4 = prop_oneof![
        4 => any::<u8>().prop_map(|n| Ipv4Addr::new(198, 51, 100, n)),
        2 => select(["198.51.100.77", "203.0.113.9", "127.255.255.255", "128.0.0.0", "10.245.0.1",
            "10.244.1.1", "10.10.0.12", "172.31.0.12", "169.254.169.254", "224.0.0.1"]
            .map(v4).to_vec()),
        1 => any::<Ipv4Addr>(),
    ];
    let source6 = prop_oneof![
        4 => low(5).prop_map(|n| Ipv6Addr::new(0xfd44, 1, 0, 0, 0, 0, 0, n.into())),
        1 => select(vec![v6("fd44:2::"), v6("fd45::"), Ipv6Addr::from_bits(u128::MAX)]),
    ];
    let to6 = prop_oneof![
        4 => (0..3_u16, 0..2_u16, 0..9_u16)
            .prop_map(|(a, b, c)| Ipv6Addr::new(0x2001, 0xdb8, a, b, 0, 0, 0, c)),
        2 => select(["7fff::", "8000::", "2001:db9::", "fd44::1", "fd10::12", "fe80::1", "ff02::1"]
            .map(v6).to_vec()),
        1 => any::<Ipv6Addr>(),
    ];
    prop_oneof![
        (source4, to4).prop_map(|(s, d)| Packet::udp(s.into(), 40_000, d.into(), 53)),
        (source6, to6).prop_map(|(s, d)| Packet::udp(s.into(), 40_000, d.into(), 53)),
    ]
}

/// What became of it, by the rules.
pub(crate) fn became(packet: Packet, trace: &Trace) -> Wanted {
    let translates = |reason: &Reason| matches!(reason.decision, Decision::Snat(_));
    let left_alone = !trace.reasons.iter().any(translates);
    match (trace.fate, trace.mark()) {
        (Fate::Dropped, _) => Wanted::Dropped,
        (Fate::Tunnelled(frame), Some(mark)) if frame.packet == packet => Wanted::Sent(mark),
        (Fate::Routed(Some(source)), _) if source == packet.source && left_alone => Wanted::Alone,
        (Fate::Routed(Some(source)), _) => Wanted::Wears(source),
        (Fate::Routed(None), _) => Wanted::WearsNodes,
        other => panic!("{other:?}"),
    }
}

/// What the connection check wants of a connection.
fn checked(state: &State, source: IpAddr, destination: IpAddr) -> Wanted {
    match action(state, source, destination) {
        Action::None => Wanted::Alone,
        Action::Deny => Wanted::Dropped,
        Action::Gateway(mark) => Wanted::Sent(mark),
        Action::Local(address) => address.map_or(Wanted::WearsNodes, Wanted::Wears),
    }
}

/// Deletes every so-manyth element and member that decides between policies, as drift does.
///
/// What the guard rules, the tunnel and its routes need stays: the connection check does not ask
/// for it.
fn lose_some(state: &mut State, every: usize, offset: usize) {
    let mut number = offset;
    let mut stays = || {
        number += 1;
        number % every != 0
    };
    if let Some(firewall) = &mut state.firewall {
        firewall.elements.retain(|key, _| match key.set() {
            Set::PolicyAction
            | Set::Steer(_)
            | Set::Snat(_)
            | Set::Masquerade(_)
            | Set::Any(_)
            | Set::Destination(..)
            | Set::Source(_)
            | Set::SourceNet(_) => stays(),
            _ => true,
        });
    }
    for (set, contents) in &mut state.ipsets {
        match set {
            Ipset::Peers(_) | Ipset::Underlay(_) | Ipset::EgressIps(_) | Ipset::Ignored(_) => {}
            _ => contents.members.retain(|_, _| stays()),
        }
    }
}

/// The packet in a frame of another node.
pub(crate) fn frame(cluster: &Cluster, plan: &Plan, packet: Packet) -> Frame {
    let link = plan.state.link.as_ref().unwrap();
    let peer = cluster.nodes.iter().find(|node| node.name != cluster.node).unwrap();
    let (from, to) = (peer.underlay[0], link.local);
    let source_mac = peer.mac();
    Frame { from, to, port: link.port, vni: link.vni, source_mac, mac: link.mac, packet }
}

/// The same cluster with the iptables backend, which has fewer features.
pub(crate) fn with_iptables(mut cluster: Cluster, variant: Variant, accept: bool) -> Cluster {
    cluster.tunnel.underlay_only = false;
    cluster
        .with_backend(Backend::Iptables(Iptables::new(variant).with_accept(accept)))
        .with_steering(Steering::Tables)
        .with_replies(Replies::Direct)
        .with_policy_counters(false)
        .with_connection_caching(false)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..<_>::default() })]

    #[test]
    fn packet_follows_first_matching_policy(
        cluster in clusters(),
        policies in policies(),
        packets in prop::collection::vec(packets(), 1..64),
    ) {
        let plan = planned(&cluster, &policies).unwrap();
        for packet in packets {
            let winner = winner(&cluster, &policies, packet);
            let family = Family::of(packet.source);
            let wanted = winner.map_or(Wanted::Alone, |policy| {
                steered(&cluster, &plan, policy, family)
            });
            let trace = explain(&plan.state, &packet);
            prop_assert_eq!(became(packet, &trace), wanted, "{} of {:?}", trace, winner);

            // The same packet where it got no mark, or somebody has taken it away: nobody else
            // decides about it.
            let mut unmarked = plan.state.clone();
            let firewall = unmarked.firewall.as_mut().unwrap();
            firewall.chains.get_mut(&ChainId::Prerouting).unwrap().1.clear();
            let lost = if let Wanted::Sent(_) = wanted { Wanted::Dropped } else { wanted };
            let trace = explain(&unmarked, &packet);
            prop_assert_eq!(became(packet, &trace), lost, "{} of {:?}", trace, winner);

            // The same packet where it came out of the tunnel. What is excluded never gets there.
            let Some(policy) = winner else { continue };
            let trace = explain_received(&plan.state, &frame(&cluster, &plan, packet));
            let wanted = translated(&cluster, policy, family);
            prop_assert_eq!(became(packet, &trace), wanted, "{} of {:?}", trace, policy);
        }
    }

    #[test]
    fn connection_check_agrees_with_explained_packet(
        cluster in clusters(),
        backend in prop::option::of(select(Variant::BOTH.to_vec())),
        policies in policies(),
        losses in prop::collection::vec((2..12_usize, 0..12_usize), 2),
        packets in prop::collection::vec(packets(), 1..64),
    ) {
        let cluster = match backend {
            Some(variant) => with_iptables(cluster, variant, false),
            None => cluster,
        };
        let planned = planned(&cluster, &policies).unwrap().state;
        let damaged = losses.into_iter().map(|(every, offset)| {
            let mut state = planned.clone();
            lose_some(&mut state, every, offset);
            state
        });
        for state in damaged.chain([planned.clone()]) {
            for packet in &packets {
                let trace = explain(&state, packet);
                let checked = checked(&state, packet.source, packet.destination);
                prop_assert_eq!(became(*packet, &trace), checked, "{}", trace);
            }
        }
    }

    #[test]
    fn iptables_packet_follows_first_matching_policy(
        cluster in clusters(),
        variant in select(Variant::BOTH.to_vec()),
        accept in any::<bool>(),
        policies in policies(),
        packets in prop::collection::vec(packets(), 1..64),
    ) {
        let cluster = with_iptables(cluster, variant, accept);
        let plan = planned(&cluster, &policies).unwrap();
        for packet in packets {
            let winner = winner(&cluster, &policies, packet);
            let family = Family::of(packet.source);
            let wanted = winner.map_or(Wanted::Alone, |policy| {
                steered(&cluster, &plan, policy, family)
            });
            let trace = explain(&plan.state, &packet);
            prop_assert_eq!(became(packet, &trace), wanted, "{} of {:?}", trace, winner);

            // The same packet where it came out of the tunnel. What is excluded never gets there.
            let Some(policy) = winner else { continue };
            let trace = explain_received(&plan.state, &frame(&cluster, &plan, packet));
            let wanted = translated(&cluster, policy, family);
            prop_assert_eq!(became(packet, &trace), wanted, "{} of {:?}", trace, policy);
        }
    }
}
