//! Tunnel, routes and rules.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;

use super::Gateway;
use super::check::{World, tunnel_of};
use crate::cluster::Node;
use crate::state::{BACKSTOP_METRIC, Route, RouteKey, Rule, RuleAction, State, Vxlan};
use crate::types::{Family, NodeName};

/// Whether the tunnel carries a family from this node to another.
pub(super) fn carries(world: &World<'_>, peer: &Node, family: Family) -> bool {
    tunnel_of(world.here, family).is_some() && tunnel_of(peer, family).is_some()
}

/// Fills in everything of a state but the firewall.
pub(super) fn routing(
    world: &World<'_>,
    gateways: &BTreeMap<&NodeName, Gateway<'_>>,
    state: &mut State,
) {
    let tunnel = &world.cluster.tunnel;
    state.link = world.underlay(world.here).map(|local| Vxlan {
        name: tunnel.device.clone(),
        vni: tunnel.vni,
        port: tunnel.port,
        local,
        underlay: tunnel.underlay_device.clone(),
        mac: world.here.mac(),
        mtu: world.mtu(),
        // Loose: the kernel takes the larger of this and `all`, and strict drops every steered
        // packet on the gateway, whose way back to the pod is not the tunnel.
        rp_filter: 2,
        up: true,
    });
    state.addresses = world.here.tunnel.iter().copied().collect();
    for peer in world.peers() {
        if let Some(address) = world.underlay(peer) {
            state.fdb.insert(peer.mac(), address);
        }
        for family in Family::BOTH.into_iter().filter(|family| carries(world, peer, *family)) {
            state.neighbours.extend(tunnel_of(peer, family).map(|address| (address, peer.mac())));
        }
    }
    let marks = world.cluster.marks;
    let mask = marks.tested(gateways.values().map(|gateway| gateway.mark));
    for family in Family::BOTH {
        let priority = world.cluster.rule_priority;
        for gateway in gateways.values() {
            if let Some(address) =
                tunnel_of(gateway.node, family).filter(|_| carries(world, gateway.node, family))
            {
                table(world, gateway, address, state);
                let action = RuleAction::Lookup(gateway.table);
                state.rules.insert(Rule { family, priority, mark: gateway.mark, mask, action });
            }
        }
    }
}

/// The table of one gateway and one family.
fn table(world: &World<'_>, gateway: &Gateway<'_>, via: IpAddr, state: &mut State) {
    let (family, table) = (Family::of(via), gateway.table);
    let metric = RouteKey::default_metric(family);
    // The outer packet to the gateway has lost the mark by then; should it not have, it must
    // still find another way than into the tunnel.
    let outer = world.underlay(gateway.node).map(IpNet::from);
    let inside = world.inside.iter().copied().chain(outer);
    for dst in inside.filter(|net| Family::of_net(net) == family) {
        state.routes.insert(RouteKey { table, dst, metric }, Route::Throw);
    }
    let dst = IpNet::new_assert(family.unspecified(), 0);
    state.routes.insert(RouteKey { table, dst, metric }, Route::Via(via));
    // Needs no device, so it is still there when the tunnel's routes have gone with the tunnel;
    // without it the lookup would fall through to the main table.
    let backstop = RouteKey { table, dst, metric: BACKSTOP_METRIC };
    state.routes.insert(backstop, Route::Unreachable);
}
