//! The nf_tables table at the egress hook of the tunnel interface.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::validate::ValidatedCluster;
use super::{Gateways, PlanError, tested_bits};
use crate::cluster::{Backend, Steering};
use crate::state::{
    Base, ChainId, ChainType, Comment, Data, Field, Firewall, Hook, Key, MarkBits, MarkOf, NftRule,
    Set, Stmt, Target, Value,
};
use crate::types::{Family, Mark};

/// Returns the next hop of all marked packets: a neighbour with this node's own MAC address.
///
/// No FDB entry on this node has that MAC address, so that a frame which the hook does not rewrite
/// is dropped. RFC 7600 section 4.8 reserves the IPv4 address for hosts that need one and have
/// none, RFC 6666 the IPv6 prefix for discarded traffic. A link-local address would not work: the
/// kernel handles those itself.
pub(super) const fn next_hop(family: Family) -> IpAddr {
    match family {
        Family::V4 => IpAddr::V4(Ipv4Addr::new(192, 0, 0, 8)),
        Family::V6 => IpAddr::V6(Ipv6Addr::new(0x100, 0, 0, 0, 0, 0, 0, 8)),
    }
}

/// Checks the requirements of the hook: a mark layout with a prefix, and nf_tables as backend.
///
/// One rule must match all our marks, and iptables has no such hook.
pub(super) fn check(world: &ValidatedCluster) -> Result<(), PlanError> {
    let cluster = &world.cluster;
    if cluster.steering == Steering::Tables {
        return Ok(());
    }
    if cluster.backend != Backend::Nftables {
        return Err(PlanError::EgressHookBackend);
    }
    if !cluster.marks.tells_by_prefix() {
        return Err(PlanError::EgressHookPrefix);
    }
    Ok(())
}

/// Returns the table, if steering uses the egress hook.
pub(super) fn hook(
    world: &ValidatedCluster,
    gateways: &Gateways,
    own_mark: Option<Mark>,
) -> Option<Firewall> {
    if world.cluster.steering == Steering::Tables {
        return None;
    }
    let layout = world.cluster.marks;
    let mask = tested_bits(world, gateways, own_mark);
    let prefix = MarkBits { mask: layout.prefix_mask(), value: layout.prefix() };
    let rules = [
        // Routed by another program; the MAC address that the frame has decides its path.
        vec![Field::Mark.has_not(prefix), Stmt::Return],
        vec![
            Field::Mark.bits(mask).map(Set::NextHop, Target::EthernetDestination),
            // The outer packet inherits the mark; routed by it, it would enter the tunnel again.
            Stmt::SetMark(MarkOf::Packet, MarkBits { mask, value: 0 }),
            Stmt::Return,
        ],
        vec![Stmt::Counter, Stmt::Drop],
    ];
    let base = Base {
        kind: ChainType::Filter,
        hook: Hook::Egress(world.cluster.tunnel.device.clone()),
        priority: 0,
    };
    let chain = (Some(base), rules.map(NftRule).into());
    let elements = gateways.iter().filter_map(|(name, gateway)| {
        let data = Data::Ethernet(world.node(gateway.place)?.mac());
        let comment = Some(Comment::of_name(name.as_str()));
        Some((Key::next_hop(gateway.mark), Value { data, comment }))
    });
    Some(Firewall {
        chains: BTreeMap::from([(ChainId::Egress, chain)]),
        sets: [Set::NextHop].into(),
        elements: elements.collect(),
        ..Firewall::default()
    })
}
