//! Plans the tunnel, its neighbours and FDB entries, routes and rules.

use std::net::IpAddr;

use ipnet::IpNet;

use super::egress_hook::next_hop;
use super::reverse_path::reverse_rules;
use super::validate::{ValidatedCluster, tunnel_of};
use super::{Gateways, tested_bits};
use crate::cluster::{Node, RulePriorities, Steering};
use crate::state::{BACKSTOP_METRIC, MarkBits, Route, RouteKey, Rule, RuleAction, State, Vxlan};
use crate::types::{DeviceName, Family, Mark, TableId};

/// Returns whether the tunnel carries a family between this node and another.
pub(super) fn carries(world: &ValidatedCluster, peer: &Node, family: Family) -> bool {
    tunnel_of(&world.here, family).is_some() && tunnel_of(peer, family).is_some()
}

/// Fills in everything of a state except the firewall.
pub(super) fn routing(
    world: &ValidatedCluster,
    gateways: &Gateways,
    own_mark: Option<Mark>,
    (closing, reverse): (Option<TableId>, Option<TableId>),
    state: &mut State,
) {
    let tunnel = &world.cluster.tunnel;
    state.link = world.underlay(&world.here).map(|local| Vxlan {
        name: tunnel.device.clone(),
        vni: tunnel.vni,
        port: tunnel.port,
        local,
        underlay: tunnel.underlay_device.clone(),
        mac: world.here.mac(),
        mtu: world.mtu(),
        // Loose mode: the kernel uses the larger of this value and `all`, and strict mode would
        // drop every steered packet on the gateway, where the reverse path to the pod is not the
        // tunnel.
        rp_filter: 2,
        up: true,
        intact: true,
    });
    let one_for_all = world.cluster.steering == Steering::EgressHook;
    state.addresses = world.here.tunnel.iter().copied().collect();
    for peer in world.peers() {
        if let Some(address) = world.underlay(peer) {
            state.fdb.insert(peer.mac(), address);
        }
        let families = Family::BOTH.into_iter().filter(|family| carries(world, peer, *family));
        for family in families.filter(|_| !one_for_all) {
            state.neighbours.extend(tunnel_of(peer, family).map(|address| (address, peer.mac())));
        }
    }
    let layout = world.cluster.marks;
    let mask = tested_bits(world, gateways, own_mark);
    for family in Family::BOTH {
        if let Some(own) = own_mark.filter(|_| tunnel_of(&world.here, family).is_some()) {
            let values = layout.value_mask() & mask;
            let own = MarkBits { mask: values, value: own.get() & values };
            reverse_rules(world, reverse, own, family, state);
        }
        let priorities = RulePriorities::of(&world.cluster);
        if !one_for_all {
            gateway_rules(world, gateways, (mask, closing.is_some()), family, state);
        }
        if let Some(table) = closing.filter(|_| tunnel_of(&world.here, family).is_some()) {
            // Packets with our prefix that match no gateway's rule fail closed here, and do not
            // reach the main table. A table is used, not a rule that refuses: where
            // `src_valid_mark` is set, the kernel looks up the reverse path to the pod with our
            // mark, and that lookup must succeed. With replies by the tunnel, rules skip the table
            // for such lookups, and replies to pods are routed by it.
            if one_for_all && own_mark.is_some() {
                backstop(table, family, state);
            } else {
                inside(world, table, family, None, state);
            }
            let closing = Rule {
                family,
                priority: priorities.closing,
                mark: Mark::new(layout.prefix()),
                mask: layout.prefix_mask(),
                inverted: false,
                input: None,
                action: RuleAction::Lookup(table),
            };
            state.rules.insert(closing.clone());
            if one_for_all {
                // A second rule to the same table, so that steering works if one of the two is
                // lost.
                state.rules.insert(Rule { priority: priorities.gateways, ..closing.clone() });
                let via = next_hop(family);
                state.routes.insert(default_route(table, family), Route::Via(via));
                state.neighbours.insert(via, world.here.mac());
                continue;
            }
            let asked = |priority| {
                let mut rules = state.rules.iter();
                rules.any(|rule| rule.family == family && rule.priority == priority)
            };
            if asked(priorities.gateways) && asked(priorities.half) {
                // The rule only saves time, wherever it comes among those of its priority: none of
                // them matches a mark that it matches.
                state.rules.insert(Rule {
                    priority: priorities.gateways,
                    mark: Mark::new(layout.prefix() | layout.half()),
                    mask: layout.prefix_mask() | layout.half(),
                    action: RuleAction::Goto(priorities.half),
                    ..closing.clone()
                });
            }
            let past = Rule {
                priority: priorities.guard,
                action: RuleAction::Goto(priorities.closing),
                ..closing
            };
            // No gateway's rule may match this node's own packets, such as a reply with the mark of
            // the packet it replies to (`fwmark_reflect`), nor the lookup of the reverse path to
            // the sender of a packet that is about to enter the tunnel (`src_valid_mark`).
            for device in [DeviceName::known(Rule::LOOPBACK), tunnel.device.clone()] {
                if own_mark.is_none() {
                    state.rules.insert(Rule { input: Some(device), ..past.clone() });
                }
            }
            // Packets without our marks need not be matched against every gateway.
            let MarkBits { mask, value } = match own_mark {
                Some(_) => layout.bound(),
                None => MarkBits { mask: layout.prefix_mask(), value: layout.prefix() },
            };
            state.rules.insert(Rule { mark: Mark::new(value), mask, inverted: true, ..past });
        }
    }
}

/// Adds the rules and tables of the gateways, one of each for a gateway.
///
/// `spared` says that rules skip the tables for packets that must not enter the tunnel.
fn gateway_rules(
    world: &ValidatedCluster,
    gateways: &Gateways,
    (mask, spared): (u32, bool),
    family: Family,
    state: &mut State,
) {
    let priorities = RulePriorities::of(&world.cluster);
    for gateway in gateways.values() {
        let Some(node) = world.node(gateway.place) else { continue };
        let via = tunnel_of(node, family);
        if let Some(via) = via.filter(|_| carries(world, node, family)) {
            table(world, node, gateway.table, via, spared, state);
            let of_half = gateway.mark.get() & world.cluster.marks.half() != 0;
            state.rules.insert(Rule {
                family,
                priority: if of_half { priorities.half } else { priorities.gateways },
                mark: gateway.mark,
                mask,
                inverted: false,
                input: None,
                action: RuleAction::Lookup(gateway.table),
            });
        }
    }
}

/// Adds the routes of one gateway and one family.
///
/// `spared` says that rules skip the table for packets that must not enter the tunnel.
fn table(
    world: &ValidatedCluster,
    gateway: &Node,
    table: TableId,
    via: IpAddr,
    spared: bool,
    state: &mut State,
) {
    let family = Family::of(via);
    if spared {
        backstop(table, family, state);
    } else {
        // The outer packet to the gateway has lost the mark by then. If it has not, it must still
        // be routed otherwise than into the tunnel.
        inside(world, table, family, world.underlay(gateway), state);
    }
    state.routes.insert(default_route(table, family), Route::Via(via));
}

fn default_route(table: TableId, family: Family) -> RouteKey {
    RouteKey { table, dst: everything(family), metric: RouteKey::default_metric(family) }
}

/// Adds routes that leave excluded destinations to the main table, and make others unreachable.
fn inside(
    world: &ValidatedCluster,
    table: TableId,
    family: Family,
    outer: Option<IpAddr>,
    state: &mut State,
) {
    let metric = RouteKey::default_metric(family);
    let inside = world.nodes.inside.iter().copied().chain(outer.map(IpNet::from));
    for dst in inside.filter(|net| Family::of_net(net) == family) {
        state.routes.insert(RouteKey { table, dst, metric }, Route::Throw);
    }
    backstop(table, family, state);
}

fn backstop(table: TableId, family: Family, state: &mut State) {
    // The route needs no interface, so that it stays when the tunnel's routes are deleted with the
    // tunnel; without it the lookup would continue in the main table.
    let backstop = RouteKey { table, dst: everything(family), metric: BACKSTOP_METRIC };
    state.routes.insert(backstop, Route::Unreachable);
}

fn everything(family: Family) -> IpNet {
    IpNet::new_assert(family.unspecified(), 0)
}
