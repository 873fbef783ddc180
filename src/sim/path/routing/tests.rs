//! Tests that packets to cluster destinations stay out of the tunnel at every step of a change.

use std::collections::BTreeSet;

use super::*;
use crate::alloc::{MarkPool, TablePool, TableRange};
use crate::cluster::{Cluster, Node, Steering};
use crate::count::Counts;
use crate::datapath::Datapath;
use crate::diff::changes::{Changes, Step};
use crate::mark::MarkLayout;
use crate::plan;
use crate::policy::{EgressIp, EgressPolicy};
use crate::sim::Sim;
use crate::sim::path::HostContext;
use crate::sim::path::conntrack::Conntrack;
use crate::state::{Rule, State};
use crate::types::{NodeName, PolicyId};

/// A destination outside the cluster and one inside, of each family.
const TO: [[&str; 2]; 2] = [["192.0.2.1", "10.244.1.10"], ["2001:db8::1", "fd44::10"]];

fn name(of: &str) -> NodeName {
    NodeName::new(of).unwrap()
}

/// The routes and rules of a node with these gateways, in a range with this many tables.
fn routing(gateways: &[&str], tables: u32, change: impl FnOnce(&mut Cluster)) -> State {
    let node = |(number, of): (usize, &str)| {
        let tunnel = [format!("172.31.0.{}/16", number + 1), format!("fd11::{}/112", number + 1)];
        let underlay = format!("10.10.0.{}", number + 1).parse().unwrap();
        Node::new(name(of), vec![underlay], tunnel.iter().map(|net| net.parse().unwrap()).collect())
    };
    let nodes = ["a", "b", "c"].into_iter().enumerate().map(node).collect();
    let inside = ["10.244.0.0/16", "fd44::/16"].map(|net| net.parse().unwrap());
    let mut cluster = Cluster::new(name("a"), nodes, inside.to_vec());
    change(&mut cluster);
    let policy = |(number, gateway): (usize, &&str)| EgressPolicy {
        gateway: Some(name(gateway)),
        ..EgressPolicy::new(
            PolicyId::new(*gateway).unwrap(),
            vec![format!("10.244.1.{number}/32").parse().unwrap()],
            EgressIp::Dual("198.51.100.9".parse().unwrap(), "2001:db8:51::9".parse().unwrap()),
        )
    };
    let policies: Vec<_> = gateways.iter().enumerate().map(policy).collect();
    let mut marks = MarkPool::new(cluster.marks);
    let range = TableRange::new(3000, tables).unwrap();
    let mut tables = TablePool::new(range).with_start(0);
    let state = plan(&cluster, &policies, &mut marks, &mut tables).unwrap().state;
    State { hook: None, ..state.routing() }
}

/// The state with `throw` routes in every table instead of rules by input interface.
fn with_throws(mut state: State) -> State {
    state.rules.retain(|rule| rule.input.is_none());
    let tables: BTreeSet<_> = state.routes.keys().map(|key| key.table).collect();
    let throws: Vec<_> = state.routes.iter().filter(|(_, route)| **route == Route::Throw).collect();
    let throws: Vec<_> = throws.into_iter().map(|(key, route)| (*key, *route)).collect();
    for table in tables {
        state.routes.extend(throws.iter().map(|(key, route)| (RouteKey { table, ..*key }, *route)));
    }
    state
}

fn routed(state: &State, to: &str, mark: u32, input: Option<&str>) -> &'static str {
    let (mut conntrack, around) = (Conntrack::default(), HostContext::default());
    let mut walk = Walk {
        state,
        conntrack: &mut conntrack,
        counts: &mut Counts::new(),
        around: &around,
        reasons: Vec::new(),
    };
    match walk.route(to.parse().unwrap(), mark, input) {
        Routed::Via(..) => "into the tunnel",
        Routed::Refused => "nowhere",
        Routed::Own => "by the host's routes",
    }
}

/// Asserts that reverse path lookups and replies of the node stay out of the tunnel.
///
/// The reverse path lookup must find that steered packets come from their pods, and the node's
/// replies must reach those pods.
fn check(state: &State, marks: &BTreeSet<u32>, when: &str) {
    let device = "egress.vxlan";
    for mark in marks {
        for [outside, inside] in TO {
            if routed(state, outside, *mark, None) != "into the tunnel" {
                continue;
            }
            for input in [Rule::LOOPBACK, device] {
                let found = routed(state, inside, *mark, Some(input));
                assert_eq!(found, "by the host's routes", "{when}: {mark:#x} iif {input}");
            }
        }
    }
}

#[test]
fn at_every_point_of_a_change_packets_that_are_steered_find_back() {
    let plain = |_: &mut Cluster| {};
    let states = [
        ("nothing", State::default()),
        ("one gateway", routing(&["b"], 8, plain)),
        ("two gateways", routing(&["b", "c"], 8, plain)),
        ("with throws", with_throws(routing(&["b", "c"], 8, plain))),
        ("egress hook", routing(&["b", "c"], 8, |it| it.steering = Steering::EgressHook)),
        ("no prefix", routing(&["b", "c"], 8, |it| it.marks = MarkLayout::COMPACT)),
    ];
    let leads = |rule: &Rule| matches!(rule.action, RuleAction::Lookup(_));
    let rules = states.iter().flat_map(|(_, state)| &state.rules);
    let marks: BTreeSet<_> = rules.filter(|rule| leads(rule)).map(|rule| rule.mark.get()).collect();
    assert!(marks.len() > 3);
    for (from, old) in &states {
        for (to, new) in &states {
            let mut sim = Sim::with_state(old.clone());
            for step in Changes::between(old, new).steps() {
                for op in &step.ops {
                    let one = Step { phase: step.phase, ops: vec![op.clone()] };
                    sim.apply(&Changes::new(vec![one])).unwrap();
                    check(sim.state(), &marks, &format!("{from} to {to}, after {op}"));
                }
            }
            assert_eq!(sim.state(), new);
        }
    }
}

#[test]
fn a_gateways_table_has_no_more_than_its_way_where_rules_lead_past_it() {
    let steered = |state: &State| {
        let ways = state.routes.iter().filter(|(_, route)| matches!(route, Route::Via(_)));
        let tables: BTreeSet<_> = ways.map(|(key, _)| key.table).collect();
        let routes =
            |table: &TableId| state.routes.keys().filter(|key| key.table == *table).count();
        tables.iter().map(routes).collect::<Vec<_>>()
    };
    let plain = |_: &mut Cluster| {};
    assert_eq!(steered(&routing(&["b", "c"], 8, plain)), [4, 4]);
    // Six destinations inside the cluster, and the gateway's own address.
    assert_eq!(steered(&routing(&["b", "c"], 8, |it| it.marks = MarkLayout::COMPACT)), [11, 11]);
    let full = routing(&["b", "c"], 1, plain);
    assert_eq!(steered(&full), [11, 11], "no table is left for closing");
    assert!(full.rules.iter().all(|rule| rule.input.is_none()));
}
