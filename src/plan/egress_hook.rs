//! The table at the egress hook of the tunnel device.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::validate::World;
use super::{Gateways, PlanError};
use crate::cluster::{Backend, Steering};
use crate::state::{
    Base, ChainId, ChainType, Comment, Data, Field, Firewall, Hook, Key, MarkBits, MarkOf, NftRule,
    Set, Stmt, Target, Value,
};
use crate::types::Family;

/// What marked packets are routed to: a neighbour whose Ethernet address is this node's own, which
/// no forwarding entry here has. A frame that the hook does not rewrite goes nowhere.
///
/// RFC 7600 section 4.8 keeps the IPv4 address for what needs one and has none, RFC 6666 the IPv6
/// prefix for what is to be thrown away. A link-local one would not do: those are the kernel's.
pub(super) const fn next_hop(family: Family) -> IpAddr {
    match family {
        Family::V4 => IpAddr::V4(Ipv4Addr::new(192, 0, 0, 8)),
        Family::V6 => IpAddr::V6(Ipv6Addr::new(0x100, 0, 0, 0, 0, 0, 0, 8)),
    }
}

/// Whether what the hook needs is there: one rule must tell our marks, and iptables has no such
/// hook.
pub(super) fn check(world: &World) -> Result<(), PlanError> {
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

/// The table, if there is to be one.
pub(super) fn hook(world: &World, gateways: &Gateways) -> Option<Firewall> {
    if world.cluster.steering == Steering::Tables {
        return None;
    }
    let layout = world.cluster.marks;
    let mask = layout.tested(gateways.values().map(|gateway| gateway.mark));
    let prefix = MarkBits { mask: layout.prefix_mask(), value: layout.prefix() };
    let rules = [
        // Routed by somebody else; where it goes is decided by the Ethernet address that it has.
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
        Some((Key::NextHop(gateway.mark), Value { data, comment }))
    });
    Some(Firewall {
        chains: BTreeMap::from([(ChainId::Egress, chain)]),
        sets: [Set::NextHop].into(),
        elements: elements.collect(),
        ..Firewall::default()
    })
}
