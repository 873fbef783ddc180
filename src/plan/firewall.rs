//! The elements of the maps.

use std::collections::{BTreeMap, BTreeSet};

use super::chains::Skeleton;
use super::check::{Checked, World};
use super::classes::{Classes, Rank, destinations, policy, policy_tags};
use super::{Finding, Gateway, Role, role};
use crate::policy::Unavailable;
use crate::range::IpRange;
use crate::state::{ChainId, Comment, Data, Firewall, Key, Set, Tag, Value, Verdict};
use crate::types::{Family, NodeName};

/// The nf_tables table of this node.
pub(super) fn firewall(
    world: &World<'_>,
    policies: &[Checked<'_>],
    gateways: &BTreeMap<&NodeName, Gateway<'_>>,
    findings: &mut Vec<Finding>,
) -> Firewall {
    let tags = policy_tags(policies);
    let mut elements = BTreeMap::new();
    fixed(world, gateways, &mut elements);
    for family in Family::BOTH {
        for (policy, tag) in policies.iter().zip(&tags) {
            if policy.sources.iter().any(|net| Family::of_net(net) == family) {
                ways_out(world, policy, *tag, family, gateways, &mut elements);
            }
        }
        let classes = Classes::new(policies, family);
        overlaps(&classes, policies, family, findings);
        class_elements(&classes, policies, &tags, family, &mut elements);
    }
    let layout = world.cluster.marks;
    let marks: BTreeSet<_> = gateways.values().map(|gateway| gateway.mark).collect();
    let prefix = layout.prefix_mask() != 0;
    if !prefix {
        elements.extend(marks.iter().map(|mark| (Key::Gateway(*mark), Value::plain(Data::None))));
    }
    let lengths = elements.keys().filter_map(|key| match key.set() {
        Set::Destination(family, length) => Some((family, length)),
        _ => None,
    });
    let skeleton = Skeleton {
        device: &world.cluster.tunnel.device,
        port: world.cluster.tunnel.port,
        mask: layout.tested(marks.iter().copied()),
        tunnel: layout.tunnel(),
        connection: layout.connection(),
        prefix: prefix.then_some((layout.prefix(), layout.prefix_mask())),
        lengths: lengths.collect(),
        gateways: marks,
    };
    Firewall { chains: skeleton.chains(), sets: skeleton.sets(), elements, strays: BTreeSet::new() }
}

/// Says which policies want the same packets.
pub(super) fn overlaps(
    classes: &Classes,
    policies: &[Checked<'_>],
    family: Family,
    findings: &mut Vec<Finding>,
) {
    for (winner, loser) in &classes.overlaps {
        let id = |rank: &Rank| policy(policies, *rank).map(|policy| policy.id.clone());
        if let (Some(winner), Some(loser)) = (id(winner), id(loser)) {
            findings.push(Finding::Overlap { winner, loser, family });
        }
    }
}

/// What does not depend on policies one by one.
fn fixed(
    world: &World<'_>,
    gateways: &BTreeMap<&NodeName, Gateway<'_>>,
    elements: &mut BTreeMap<Key, Value>,
) {
    for peer in world.peers() {
        let comment = Some(Comment::of_name(peer.name.as_str()));
        for address in &peer.underlay {
            let value = Value { data: Data::None, comment: comment.clone() };
            elements.insert(Key::Peer(*address), value);
        }
    }
    for net in &world.excluded {
        elements.insert(Key::Excluded(IpRange::from(*net)), Value::plain(Data::None));
    }
    let mut way_out = |tag, verdict, comment| {
        let data = Data::Verdict(verdict);
        elements.insert(Key::Verdict(tag), Value { data, comment });
    };
    way_out(Tag::CLOSED, Verdict::Drop, Some(Comment::of_name("closed")));
    way_out(Tag::BYPASS, Verdict::Goto(ChainId::Bypass), Some(Comment::of_name("bypass")));
    way_out(Tag::HERE, Verdict::Goto(ChainId::Here), Some(Comment::of_name("this-node")));
    for gateway in gateways.values() {
        let comment = Some(Comment::of_name(gateway.node.name.as_str()));
        way_out(Tag::gateway(gateway.value), Verdict::Goto(ChainId::To(gateway.mark)), comment);
    }
}

/// What becomes of a policy's packets, and what they wear if they leave from here.
fn ways_out(
    world: &World<'_>,
    policy: &Checked<'_>,
    tag: Tag,
    family: Family,
    gateways: &BTreeMap<&NodeName, Gateway<'_>>,
    elements: &mut BTreeMap<Key, Value>,
) {
    let comment = Some(Comment::of_policy(policy.id));
    let gateway = policy.gateway.and_then(|node| gateways.get(&node.name));
    let way_out = match (role(policy, family, world), gateway) {
        (Role::Gateway, _) => Tag::HERE,
        (Role::Client, Some(gateway)) => Tag::gateway(gateway.value),
        _ if policy.unavailable == Unavailable::Bypass => Tag::BYPASS,
        _ => Tag::CLOSED,
    };
    let value = Value { data: Data::Tag(way_out), comment: comment.clone() };
    elements.insert(Key::Steer(family, tag), value);
    if way_out != Tag::HERE {
        return;
    }
    if let Some(address) = policy.egress_ip.address(family) {
        let value = Value { data: Data::Address(address), comment };
        elements.insert(Key::Snat(family, tag), value);
        elements.insert(Key::Eip(address), Value::plain(Data::None));
    } else {
        let value = Value { data: Data::None, comment };
        elements.insert(Key::Masquerade(family, tag), value);
    }
}

fn class_elements(
    classes: &Classes,
    policies: &[Checked<'_>],
    tags: &[Tag],
    family: Family,
    elements: &mut BTreeMap<Key, Value>,
) {
    let plain = |tag: Tag| Value::plain(Data::Tag(tag));
    let tag_of = |rank: Rank| usize::try_from(rank).ok().and_then(|rank| tags.get(rank)).copied();
    for (class, members) in &classes.members {
        for (net, rank) in destinations(members, policies, family) {
            if let Some(tag) = tag_of(rank) {
                elements.insert(Key::Destination(net, *class), plain(tag));
            }
        }
        let takes_all =
            |rank: &&Rank| policy(policies, **rank).is_some_and(|p| p.takes_all(family));
        let any = members.last().filter(takes_all).and_then(|rank| tag_of(*rank));
        if let Some(tag) = any {
            elements.insert(Key::Any(family, *class), plain(tag));
        }
    }
    for (host, class) in &classes.hosts {
        elements.insert(Key::Source(*host), plain(*class));
    }
    for (range, class) in &classes.ranges {
        elements.insert(Key::SourceNet(*range), plain(*class));
    }
}
