//! Plans the elements of the sets and maps.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::policies::NormalizedPolicy;
use super::skeleton::{Skeleton, Used};
use super::validate::ValidatedCluster;
use super::{Gateways, Role, gateway_of, roles, tested_bits};
use crate::cluster::{Replies, Steering};
use crate::policy::Unavailable;
use crate::range::IpRange;
use crate::state::{ChainId, Comment, Data, Firewall, Key, Tag, Value, Verdict};
use crate::types::{Family, Mark};

/// Returns the nf_tables table of this node without the elements of single policies.
pub(super) fn skeleton(
    world: &ValidatedCluster,
    gateways: &Gateways,
    own_mark: Option<Mark>,
    used: Used,
) -> (Firewall, BTreeMap<Key, Value>) {
    let layout = world.cluster.marks;
    let marks: BTreeSet<_> = gateways.values().map(|gateway| gateway.mark).collect();
    let mask = tested_bits(world, gateways, own_mark);
    let prefix = layout.tells_by_prefix();
    let mut elements = fixed(world, gateways);
    if !prefix {
        elements.extend(marks.iter().map(|mark| (Key::gateway(*mark), Value::plain(Data::None))));
    }
    let caching = world.cluster.connection_caching && prefix;
    if caching {
        elements.extend(gateways.iter().map(|(name, gateway)| {
            let data = Data::Verdict(Verdict::Goto(ChainId::Via(gateway.mark)));
            let comment = Some(Comment::of_name(name.as_str()));
            (Key::connection(gateway.mark), Value { data, comment })
        }));
    }
    let replies = world.cluster.replies == Replies::Tunnel;
    if replies {
        for (name, gateway) in gateways {
            let Some(node) = world.node(gateway.place) else { continue };
            let comment = Some(Comment::of_name(name.as_str()));
            let of_connection = Mark::new(layout.connection().set_in(gateway.mark.get()));
            for (key, chain) in [
                (Key::peer_mac(node.mac()), ChainId::FromNode(gateway.mark)),
                (Key::connection(of_connection), ChainId::Via(gateway.mark)),
            ] {
                let data = Data::Verdict(Verdict::Goto(chain));
                elements.insert(key, Value { data, comment: comment.clone() });
            }
        }
    }
    let skeleton = Skeleton {
        device: &world.cluster.tunnel.device,
        port: world.cluster.tunnel.port,
        only: world.cluster.tunnel.only_underlay(),
        mss: Family::BOTH
            .map(|family| Some((family, world.mss(family)?)))
            .into_iter()
            .flatten()
            .collect(),
        mask,
        values: layout.value_mask() & mask,
        replies: replies.then(|| own_mark.unwrap_or_else(|| layout.tunnel())),
        tunnel: layout.tunnel(),
        connection: layout.connection(),
        caching,
        prefix: prefix.then_some((layout.prefix(), layout.prefix_mask())),
        keeps_mark: world.cluster.steering == Steering::EgressHook,
        shared: prefix.then(|| layout.bound()),
        used,
        underlay: world.underlay,
        counting: world.cluster.policy_counters,
        gateways: marks,
        missing: &world.missing_fields,
    };
    let (chains, sets) = (skeleton.chains(), skeleton.sets());
    (Firewall { chains, sets, flowtable: true, ..Firewall::default() }, elements)
}

/// Returns the elements that do not depend on single policies.
fn fixed(world: &ValidatedCluster, gateways: &Gateways) -> BTreeMap<Key, Value> {
    // Collected at once, which compares far fewer keys than inserting one by one.
    let mut elements = Vec::new();
    for peer in world.peers() {
        let comment = Some(Comment::of_name(peer.name.as_str()));
        for address in &peer.underlay {
            let value = Value { data: Data::None, comment: comment.clone() };
            elements.push((Key::peer(*address), value));
        }
    }
    for address in &world.here.underlay {
        elements.push((Key::underlay(*address), Value::plain(Data::None)));
    }
    for net in &world.nodes.excluded {
        elements.push((Key::excluded(IpRange::from(*net)), Value::plain(Data::None)));
    }
    let mut policy_action = |tag, verdict, comment| {
        let data = Data::Verdict(verdict);
        elements.push((Key::policy_action(tag), Value { data, comment }));
    };
    policy_action(Tag::DENY, Verdict::Drop, Some(Comment::of_name("deny")));
    policy_action(Tag::BYPASS, Verdict::Goto(ChainId::Bypass), Some(Comment::of_name("bypass")));
    policy_action(
        Tag::LOCAL,
        Verdict::Goto(ChainId::LocalGateway),
        Some(Comment::of_name("this-node")),
    );
    for (name, gateway) in gateways {
        let comment = Some(Comment::of_name(name.as_str()));
        policy_action(
            Tag::gateway(gateway.value),
            Verdict::Goto(ChainId::To(gateway.mark)),
            comment,
        );
    }
    elements.into_iter().collect()
}

/// Returns the elements of a policy: its action, its SNAT address on this node, and its counter.
pub(super) fn ways_out(
    world: &ValidatedCluster,
    policy: &NormalizedPolicy,
    gateways: &Gateways,
) -> impl Iterator<Item = (Key, Value)> {
    roles(policy, world).flat_map(|(family, role)| {
        let policy_action = match (role, gateway_of(role, world, gateways)) {
            (Role::Gateway, _) => Tag::LOCAL,
            (_, Some(gateway)) => Tag::gateway(gateway.value),
            _ if policy.unavailable == Unavailable::Bypass => Tag::BYPASS,
            _ => Tag::DENY,
        };
        let value = |data| Value { data, comment: Some(policy.comment.clone()) };
        let steer = (Key::steer(family, policy.tag), value(Data::Tag(policy_action)));
        let translation =
            (policy_action == Tag::LOCAL).then(|| match policy.egress_ip.address(family) {
                Some(address) => (Key::snat(family, policy.tag), value(Data::Address(address))),
                None => (Key::masquerade(family, policy.tag), value(Data::None)),
            });
        // Depends on the policy's tag alone, so that the counter outlives every change of the
        // policy.
        let counted = world.cluster.policy_counters;
        let count = counted.then(|| (Key::count(family, policy.tag), value(Data::None)));
        [Some(steer), translation, count].into_iter().flatten()
    })
}

/// Returns the egress IPs of a policy in use, each with the index of its gateway node.
pub(super) fn egress_ips(
    policy: &NormalizedPolicy,
    world: &ValidatedCluster,
) -> impl Iterator<Item = (IpAddr, usize)> {
    let gateway = policy.gateway.as_ref().and_then(|gateway| gateway.as_ref().ok().copied());
    let in_use = roles(policy, world)
        .filter(|(_, role)| matches!(role, Role::Gateway | Role::Client(_)))
        .filter_map(|(family, _)| policy.egress_ip.address(family));
    in_use.filter_map(move |address| Some((address, gateway?)))
}
