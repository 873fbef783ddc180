//! The operations as an operator would type them, in order, word for word.
//!
//! `UPDATE_GOLDEN=1` writes the files anew.

use std::fmt::Write;
use std::path::Path;

use egress_datapath::datapath::Op;
use egress_datapath::state::{ChainId, Set};
use egress_datapath::{
    Changes, Claim, Cluster, Destinations, DeviceName, EgressIp, EgressPolicy, MarkLayout, Plan,
    Replies, State, Steering,
};

use crate::{cluster, cluster_v4, dual, nets, planned, policy, v4};

#[track_caller]
pub(crate) fn check(file: &str, plan: &Plan, from: &State) {
    let changes = Changes::between(from, &plan.state);
    let mut text = String::new();
    for step in changes.steps() {
        writeln!(text, "# {:?}", step.phase).unwrap();
        for op in &step.ops {
            writeln!(text, "{op}").unwrap();
        }
    }
    for finding in &plan.findings {
        writeln!(text, "note: {finding}").unwrap();
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/pure/golden").join(file);
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&path, &text).unwrap();
    }
    let expected = std::fs::read_to_string(&path).unwrap_or_default();
    for (number, (is, should)) in (1..).zip(text.lines().zip(expected.lines())) {
        assert_eq!(is, should, "{file}:{number}");
    }
    assert_eq!(text.lines().count(), expected.lines().count(), "{file}");
}

fn checkout() -> EgressPolicy {
    policy("shop/checkout", &["10.244.1.10/32"], Some("b"), v4("198.51.100.200"))
        .with_destinations(Destinations::Nets(nets(&["203.0.113.0/24"])))
}

fn both() -> Vec<EgressPolicy> {
    let everything = policy(
        "shop/all",
        &["10.244.1.0/24", "fd44:1::/64"],
        Some("b"),
        dual("198.51.100.201", "2001:db8:51::201"),
    );
    let partners =
        policy("shop/partners", &["10.244.2.7/32", "fd44:1::7/128"], Some("c"), EgressIp::Node)
            .with_priority(1)
            .with_destinations(Destinations::Nets(nets(&["203.0.113.0/24", "2001:db8:9::/48"])));
    vec![everything, partners]
}

#[test]
fn client_one_policy() {
    let plan = planned(&cluster_v4("a"), [checkout()]).unwrap();
    check("client.txt", &plan, &State::default());
}

#[test]
fn gateway_one_policy() {
    let plan = planned(&cluster_v4("b"), [checkout()]).unwrap();
    check("gateway.txt", &plan, &State::default());
}

#[test]
fn dual_stack() {
    let plan = planned(&cluster("a"), both()).unwrap();
    check("dual_stack.txt", &plan, &State::default());
}

#[test]
fn gateway_adds_egress_ips() {
    let mut cluster = cluster("b");
    let without = planned(&cluster, both()).unwrap();
    let device = DeviceName::new("eth1").unwrap();
    let claim = |net| Claim::new(net, device.clone());
    cluster.claims =
        nets(&["198.51.100.0/24", "2001:db8:51::/64"]).into_iter().map(claim).collect();
    let with = planned(&cluster, both()).unwrap();
    check("claims.txt", &with, &without.state);
    check("release.txt", &without, &with.state);
}

#[test]
fn dual_stack_gateway() {
    let plan = planned(&cluster("b"), both()).unwrap();
    check("dual_stack_gateway.txt", &plan, &State::default());
}

#[test]
fn counters_add_set_and_rule_per_family() {
    let mut counting = cluster("a");
    counting.policy_counters = true;
    let before = planned(&cluster("a"), both()).unwrap();
    check("counters.txt", &planned(&counting, both()).unwrap(), &before.state);
}

#[test]
fn closed_policy_drops() {
    let sources = ["10.244.1.10/32", "fd44:1::10/128"];
    let closed = policy("shop/closed", &sources, None, EgressIp::Node);
    let half = policy("shop/half", &["fd44:1::11/128"], Some("b"), v4("198.51.100.200"));
    let plan = planned(&cluster("a"), [closed, half]).unwrap();
    check("closed.txt", &plan, &State::default());
}

#[test]
fn gateway_move_is_small() {
    let cluster = cluster("a");
    let before = planned(&cluster, both()).unwrap();
    let mut policies = both();
    let other = policies[1].gateway.clone();
    policies[0].gateway = other;
    let (mut marks, mut tables) = crate::pools(&cluster);
    // The marks of before, as a running agent would have them.
    egress_datapath::plan(&cluster, both(), &mut marks, &mut tables).unwrap();
    let after = egress_datapath::plan(&cluster, policies, &mut marks, &mut tables).unwrap();
    check("move.txt", &after, &before.state);
}

#[test]
fn removal_deletes_guards_last() {
    let before = planned(&cluster("a"), both()).unwrap();
    let mut nothing = before.clone();
    nothing.state = State::default();
    nothing.findings.clear();
    check("removal.txt", &nothing, &before.state);
}

fn by_hook(here: &str) -> Cluster {
    cluster(here).with_steering(Steering::EgressHook)
}

#[test]
fn egress_hook_steering() {
    let plan = planned(&by_hook("a"), both()).unwrap();
    check("egress_hook.txt", &plan, &State::default());
}

#[test]
fn replies_by_tunnel() {
    let cluster = |here| cluster(here).with_replies(Replies::Tunnel);
    check("replies_client.txt", &planned(&cluster("a"), both()).unwrap(), &State::default());
    check("replies_gateway.txt", &planned(&cluster("b"), both()).unwrap(), &State::default());
}

#[test]
fn steering_change_to_egress_hook_and_back() {
    let (tables, hook) = (cluster("a"), by_hook("a"));
    let (mut marks, mut ids) = crate::pools(&tables);
    // The tables of before, as a running agent would have them.
    let mut plan = |cluster| egress_datapath::plan(cluster, both(), &mut marks, &mut ids).unwrap();
    let (by_tables, by_hook) = (plan(&tables), plan(&hook));
    check("to_egress_hook.txt", &by_hook, &by_tables.state);
    check("from_egress_hook.txt", &by_tables, &by_hook.state);
}

#[test]
fn egress_hook_added_gateway_changes_only_elements() {
    let cluster = by_hook("a");
    let one = planned(&cluster, both().split_off(1)).unwrap();
    let (mut marks, mut tables) = crate::pools(&cluster);
    egress_datapath::plan(&cluster, both().split_off(1), &mut marks, &mut tables).unwrap();
    let two = egress_datapath::plan(&cluster, both(), &mut marks, &mut tables).unwrap();
    let changes = Changes::between(&one.state, &two.state);
    assert!(changes.ops().all(|op| op.to_string().starts_with("nft ")), "{changes}");
    let hops = changes
        .ops()
        .filter(|op| matches!(op, Op::AddElement(key, _) if key.set() == Set::NextHop));
    assert_eq!(hops.count(), 1, "{changes}");
}

#[test]
fn egress_hook_chain_deleted_before_device_added_after() {
    let mut cluster = by_hook("a");
    let before = planned(&cluster, both()).unwrap();
    cluster.tunnel.vni += 1;
    let after = planned(&cluster, both()).unwrap();
    let changes = Changes::between(&before.state, &after.state);
    let place = |wanted: fn(&Op) -> bool| changes.ops().position(wanted).unwrap();
    let order = [
        place(|op| matches!(op, Op::DeleteChain(ChainId::Egress))),
        place(|op| matches!(op, Op::DeleteLink(_))),
        place(|op| matches!(op, Op::AddLink(_))),
        place(|op| matches!(op, Op::AddChain(ChainId::Egress, _))),
        place(|op| matches!(op, Op::PutRoute(..))),
    ];
    assert!(order.is_sorted(), "{changes}");
}

#[test]
fn guard_element_outlives_rules_with_its_mark() {
    let mut cluster = cluster_v4("a");
    cluster.marks = MarkLayout::COMPACT;
    let with = planned(&cluster, [checkout()]).unwrap();
    let without = planned(&cluster, Vec::<EgressPolicy>::new()).unwrap();
    let changes = Changes::between(&with.state, &without.state);
    let place = |wanted: fn(&Op) -> bool| changes.ops().position(wanted);
    let rule = place(|op| matches!(op, Op::DeleteRule(_))).unwrap();
    let mark =
        place(|op| matches!(op, Op::DeleteElement(key, _) if key.set() == Set::Gateway)).unwrap();
    assert!(rule < mark, "{changes}");
}
