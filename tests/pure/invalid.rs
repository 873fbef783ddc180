//! Invalid policies and nodes among valid ones: they change nothing for the others, and what they
//! select is closed.

use std::collections::{BTreeMap, BTreeSet};

use egress_datapath::explain::{Fate, Packet, explain_received};
use egress_datapath::state::{Key, Set, Variant};
use egress_datapath::{
    Cluster, Destinations, EgressIp, EgressPolicy, Family, Finding, MacAddr, Mark, Node, Plan,
    PolicyError, PolicyId, State, Unavailable, check_policy, explain,
};
use ipnet::IpNet;
use proptest::prelude::*;

use crate::random::{clusters, policies};
use crate::semantics::{
    Wanted, became, frame, packets, steered, translated, winner, with_iptables,
};
use crate::{cluster, name, net, nets, planned, policy, v4};

/// Number of random cases: `EGRESS_INVALID`, or 10 000.
fn cases() -> u32 {
    let told = std::env::var("EGRESS_INVALID").ok();
    told.map_or(10_000, |number| number.parse().expect("EGRESS_INVALID is a number"))
}

/// The kinds of errors that a policy can have.
const KINDS: usize = 11;

/// Adds an error of a kind to a policy.
fn spoil(policy: &mut EgressPolicy, kind: usize) {
    let listed = |policy: &EgressPolicy| match &policy.destinations {
        Destinations::External => Vec::new(),
        Destinations::Nets(nets) => nets.clone(),
    };
    match kind {
        0 => policy.gateway = Some(name("nobody")),
        1 => policy.gateway = Some(name("x1")),
        2 => policy.egress_ip = v4("0.0.0.0"),
        3 => policy.egress_ip = v4("172.31.0.12"),
        4 => policy.egress_ip = EgressIp::V6("::ffff:192.0.2.1".parse().unwrap()),
        5 => policy.sources.push(net("10.244.1.2/24")),
        6 => policy.sources.push(net("fd44:1::3/64")),
        7 => policy.sources.push(net("::ffff:10.244.1.2/128")),
        8 => policy.destinations = Destinations::Nets(Vec::new()),
        9 => {
            let mut nets = listed(policy);
            nets.push(net("198.51.100.77/24"));
            policy.destinations = Destinations::Nets(nets);
        }
        _ => policy.sources.clear(),
    }
}

/// Invalid policies, some with one id, and some with the id of a valid one.
fn invalid() -> impl Strategy<Value = Vec<EgressPolicy>> {
    let errors = prop::collection::vec((0..KINDS, 0..KINDS, 0..8_usize, any::<bool>()), 1..5);
    (policies(), errors).prop_map(|(bases, errors)| {
        let default = policy("x", &["10.244.1.2/32"], Some("b"), v4("192.0.2.1"));
        let bases = bases.iter().chain(std::iter::repeat(&default));
        let each = bases.zip(errors).map(|(base, (one, other, number, bypass))| {
            let mut policy = base.clone();
            let prefix = if number == 0 { "p" } else { "x" };
            policy.id = PolicyId::new(format!("{prefix}{}", number / 2)).unwrap();
            policy.unavailable = if bypass { Unavailable::Bypass } else { Unavailable::Drop };
            spoil(&mut policy, one);
            if number % 2 == 0 {
                spoil(&mut policy, other);
            }
            policy
        });
        each.collect()
    })
}

/// Nodes that are left out: each alone, or several together.
fn bad_nodes() -> impl Strategy<Value = Vec<Node>> {
    prop::collection::vec(0..9_usize, 0..4).prop_map(|kinds| {
        let sound = |number: usize| {
            let number = u8::try_from(number).unwrap();
            let tunnel = [172, 31, 9, number];
            Node::new(
                name(&format!("x{number}")),
                vec![[10, 10, 9, number].into(), format!("fd10:9::{number}").parse().unwrap()],
                vec![IpNet::new(tunnel.into(), 16).unwrap()],
            )
        };
        let mut nodes = Vec::new();
        for (number, kind) in kinds.into_iter().enumerate() {
            let (mut node, mut other) = (sound(2 * number + 1), sound(2 * number + 2));
            match kind {
                0 => node.underlay[0] = [0, 0, 0, 0].into(),
                1 => node.tunnel.clear(),
                2 => node.mac = Some(MacAddr::new([0; 6])),
                3 => node.mark = Some(Mark::new(1)),
                4 => node.underlay.clear(),
                5 => other.underlay.clone_from(&node.underlay),
                6 => other.name = node.name.clone(),
                7 => other.mac = Some(node.mac()),
                // The tunnel address of this node.
                _ => node.tunnel = nets(&["172.31.0.11/16"]),
            }
            nodes.push(node);
            if (5..8).contains(&kind) {
                nodes.push(other);
            }
        }
        nodes
    })
}

fn is_valid(net: &IpNet) -> bool {
    let mapped = matches!(net, IpNet::V6(v6) if v6.addr().to_ipv4_mapped().is_some());
    net.trunc() == *net && !(mapped && net.prefix_len() >= 96)
}

/// What is kept of a list of prefixes: those that are valid, and the addresses that others name.
fn kept(nets: &[IpNet]) -> Vec<IpNet> {
    let each = nets.iter().map(|net| if is_valid(net) { *net } else { net.addr().into() });
    each.filter(is_valid).collect()
}

/// The closed policy that stands for the policies of one id, by the documentation.
fn closed(all: &[&EgressPolicy]) -> EgressPolicy {
    let lists: Option<Vec<_>> = all
        .iter()
        .map(|policy| match &policy.destinations {
            Destinations::Nets(nets) if nets.iter().any(is_valid) => Some(kept(nets)),
            _ => None,
        })
        .collect();
    let bypass = all.iter().all(|policy| policy.unavailable == Unavailable::Bypass);
    let sources = all.iter().flat_map(|policy| kept(&policy.sources)).collect();
    EgressPolicy::new(all[0].id.clone(), sources, EgressIp::Node)
        .with_priority(all.iter().map(|policy| policy.priority).min().unwrap())
        .with_destinations(
            lists.map_or(Destinations::External, |lists| Destinations::Nets(lists.concat())),
        )
        .with_unavailable(if bypass { Unavailable::Bypass } else { Unavailable::Drop })
}

fn invalid_ids(plan: &Plan) -> BTreeSet<PolicyId> {
    let ids = plan.findings.iter().filter_map(|finding| match finding {
        Finding::InvalidPolicy { policy, .. } => Some(policy.clone()),
        _ => None,
    });
    ids.collect()
}

/// The state without the firewall, which alone may have objects of closed policies.
fn routing(state: &State) -> State {
    let mut state = state.clone();
    (state.firewall, state.ipsets, state.xtables) = <_>::default();
    state
}

/// The elements that differ from those of the valid policies alone.
///
/// Sources that valid and invalid policies have in common are in other classes.
fn foreign_elements(
    plan: &Plan,
    base: &Plan,
    invalid: &BTreeSet<PolicyId>,
    apart: bool,
) -> Vec<Key> {
    let (Some(all), Some(base)) = (&plan.state.firewall, &base.state.firewall) else {
        return Vec::new();
    };
    let of_class = |key: &Key| {
        matches!(key.set(), Set::Source(_) | Set::SourceNet(_) | Set::Destination(..) | Set::Any(_))
    };
    let lost = base.elements.iter().filter(|(key, value)| {
        (apart || !of_class(key)) && all.elements.get(key).as_ref() != Some(value)
    });
    let named = |comment: &str| invalid.iter().any(|id| id.as_str() == comment);
    let more = all.elements.iter().filter(|(key, value)| {
        let known = base.elements.get(key).as_ref() == Some(value);
        let closed = value.comment.as_ref().is_some_and(|comment| named(comment.as_str()));
        !(known || of_class(key) || closed || matches!(key.set(), Set::Excluded(_)))
    });
    lost.chain(more).map(|(key, _)| key).collect()
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: cases(), failure_persistence: None, ..<_>::default()
    })]

    #[test]
    fn valid_policies_do_not_depend_on_invalid_ones(
        base in clusters(),
        valid in policies(),
        invalid in invalid(),
        nodes in bad_nodes(),
        backend in 0..8_u8,
        packets in prop::collection::vec(packets(), 1..6),
    ) {
        let base = match backend {
            0 => with_iptables(base, Variant::Nft, false),
            1 => with_iptables(base, Variant::Legacy, false),
            _ => base,
        };
        let mut cluster = base.clone();
        let left_out: BTreeSet<_> = nodes.iter().map(|node| node.name.clone()).collect();
        cluster.nodes.extend(nodes);
        let all: Vec<_> = valid.iter().chain(&invalid).cloned().collect();
        let plan = planned(&cluster, &all).unwrap();
        let ids = invalid_ids(&plan);
        let told: BTreeSet<_> = plan.findings.iter().filter_map(|finding| match finding {
            Finding::InvalidNode { node, .. } if *node != cluster.node => Some(node.clone()),
            _ => None,
        }).collect();
        prop_assert_eq!(told, left_out);
        for policy in &invalid {
            prop_assert!(ids.contains(&policy.id), "{:?}", policy);
        }
        for policy in &all {
            prop_assert!(check_policy(&cluster, policy).is_ok() || ids.contains(&policy.id));
        }

        let sound: Vec<_> = valid.iter().filter(|one| !ids.contains(&one.id)).cloned().collect();
        let alone = planned(&base, &sound).unwrap();
        prop_assert!(invalid_ids(&alone).is_empty());
        prop_assert_eq!(&plan.gateways, &alone.gateways);
        prop_assert_eq!(routing(&plan.state), routing(&alone.state));
        let mut by_id: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for policy in all.iter().filter(|policy| ids.contains(&policy.id)) {
            by_id.entry(policy.id.clone()).or_default().push(policy);
        }
        let closed: Vec<_> = by_id.values().map(|policies| closed(policies)).collect();
        let meets = |one: &IpNet, other: &IpNet| one.contains(other) || other.contains(one);
        let apart = closed.iter().flat_map(|policy| &policy.sources).all(|source| {
            sound.iter().flat_map(|policy| &policy.sources).all(|other| !meets(source, other))
        });
        prop_assert_eq!(foreign_elements(&plan, &alone, &ids, apart), []);

        let wanted: Vec<_> = sound.iter().chain(&closed).cloned().collect();
        // An address that no host can have excludes nothing.
        let mut excluding = cluster.clone();
        for node in &mut excluding.nodes {
            node.underlay.retain(|address| !address.is_unspecified());
        }
        for packet in packets {
            let winner = winner(&excluding, &wanted, packet);
            let family = Family::of(packet.source);
            let trace = explain(&plan.state, &packet);
            let expected = match winner {
                None => Wanted::Alone,
                Some(policy) if !ids.contains(&policy.id) => steered(&base, &alone, policy, family),
                Some(policy) if policy.unavailable == Unavailable::Bypass => Wanted::Alone,
                Some(_) => Wanted::Dropped,
            };
            prop_assert_eq!(became(packet, &trace), expected, "{} of {:?}", trace, winner);
            let Some(policy) = winner else { continue };
            let received = explain_received(&plan.state, &frame(&base, &plan, packet));
            if ids.contains(&policy.id) {
                prop_assert_eq!(received.fate, Fate::Dropped, "{} of {:?}", received, policy);
            } else {
                prop_assert_eq!(became(packet, &trace), became(packet, &explain(&alone.state, &packet)));
                let expected = translated(&base, policy, family);
                prop_assert_eq!(became(packet, &received), expected, "{} of {:?}", received, policy);
            }
        }
    }
}

/// A cluster with a node that is left out, and 1 000 policies of which 100 are invalid.
fn thousand() -> (Cluster, Vec<EgressPolicy>) {
    let mut cluster = cluster("a");
    let tunnel = nets(&["172.31.9.1/16"]);
    cluster.nodes.push(Node::new(name("x1"), vec![[127, 0, 0, 1].into()], tunnel));
    let mut all = Vec::new();
    for number in 0..1_000_u32 {
        let pod = format!("10.244.{}.{}/32", 1 + number / 250, 1 + number % 250);
        let mut one = policy(&format!("p{number}"), &[&pod], Some("b"), v4("198.51.100.200"));
        if number % 10 == 3 {
            match usize::try_from(number).unwrap() / 10 % (KINDS + 1) {
                KINDS => all.push(one.clone()),
                5 => one.sources = vec![IpNet::new(one.sources[0].addr(), 24).unwrap()],
                kind => spoil(&mut one, kind),
            }
        }
        all.push(one);
    }
    (cluster, all)
}

#[test]
fn of_a_thousand_policies_the_valid_ones_in_force() {
    let (cluster, all) = thousand();
    for backend in [None, Some(Variant::Nft)] {
        let cluster = match backend {
            Some(variant) => with_iptables(cluster.clone(), variant, false),
            None => cluster.clone(),
        };
        let plan = planned(&cluster, &all).unwrap();
        let ids = invalid_ids(&plan);
        assert_eq!(ids.len(), 100);
        let told = |finding: &&Finding| matches!(finding, Finding::InvalidPolicy { .. });
        assert_eq!(plan.findings.iter().filter(told).count(), 100);
        let codes: BTreeSet<_> = plan.findings.iter().filter(told).map(Finding::code).collect();
        assert_eq!(
            codes.into_iter().collect::<Vec<_>>(),
            [
                "duplicate_policy",
                "egress_ip_not_unicast",
                "egress_ip_of_node",
                "gateway_left_out",
                "host_bits",
                "mapped",
                "no_destinations",
                "no_sources",
                "unknown_gateway",
            ]
        );
        let mark = plan.gateways[&name("b")].0;
        let (mut steered, mut dropped, mut nobody) = (0, 0, 0);
        for number in 0..1_000_u32 {
            let byte = |number: u32| u8::try_from(1 + number).unwrap();
            let pod = [10, 244, byte(number / 250), byte(number % 250)];
            let packet = Packet::udp(pod.into(), 40_000, [198, 51, 100, 77].into(), 53);
            let trace = explain(&plan.state, &packet);
            let id = PolicyId::new(format!("p{number}")).unwrap();
            match became(packet, &trace) {
                Wanted::Sent(to) if to == mark && !ids.contains(&id) => steered += 1,
                Wanted::Dropped if ids.contains(&id) => dropped += 1,
                Wanted::Alone if ids.contains(&id) => {
                    let one = all.iter().find(|policy| policy.id == id).unwrap();
                    assert!(one.sources.is_empty(), "{trace}");
                    nobody += 1;
                }
                other => panic!("{other:?}: {trace}"),
            }
        }
        assert_eq!((steered, dropped + nobody), (900, 100));
        assert_eq!(nobody, all.iter().filter(|policy| policy.sources.is_empty()).count());
        let errors: Vec<_> =
            all.iter().filter_map(|one| check_policy(&cluster, one).err()).collect();
        assert!(errors.len() > 90 && !errors.concat().contains(&PolicyError::Duplicate));
    }
}
