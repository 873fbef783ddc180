//! Operations against a real kernel, in network namespaces, checked with `ip` and `bridge`.

mod links;
mod reads;
mod round_trip;

use std::collections::BTreeSet;
use std::thread;
use std::time::Duration;

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkMessage, State as LinkState};
use serde_json::Value;

use super::socket::RouteSocket;
use crate::diff::op::Op;
use crate::state::{BACKSTOP_METRIC, LINK_ALIAS, Route, RouteKey, Rule, RuleAction, State, Vxlan};
use crate::testing::lab::Netns;
use crate::types::{DeviceName, Family, Mark, TableId};

/// Runs the test in a network namespace with a veth pair and another program's VXLAN device.
pub(crate) fn in_namespace(test: impl FnOnce() + Send) {
    let netns = harness::given("network namespace", Netns::new());
    netns
        .run(|| {
            // `addrgenmode none`, so that the kernel adds no address in the middle of a test.
            sh("ip link add u0 type veth peer name u1
                ip link set u0 addrgenmode none
                ip link set u1 addrgenmode none
                ip addr add 192.0.2.1/24 dev u0
                ip addr add 2001:db8::1/64 dev u0 nodad
                ip link set u0 up
                ip link set u1 up
                ip link add foreign type vxlan id 99 local 192.0.2.1 dev u0 dstport 4790
                ip link set foreign alias other addrgenmode none
                ip link set foreign up");
            // The kernel reports the carrier later, much later on a busy machine.
            let mut socket = RouteSocket::open().unwrap();
            for _ in 0..500 {
                if all_have_a_carrier(&mut socket) {
                    break;
                }
                thread::sleep(Duration::from_millis(20));
            }
            test();
        })
        .unwrap();
}

/// Whether the kernel reports both ends of the veth pair as up.
///
/// Until then their state is unknown or down; that of other interfaces is always unknown.
fn all_have_a_carrier(socket: &mut RouteSocket) -> bool {
    let request = RouteNetlinkMessage::GetLink(LinkMessage::default());
    let ups = socket.dump(&"ip link show", &request, |message| match message {
        RouteNetlinkMessage::NewLink(link) => {
            let is_up = |it: &LinkAttribute| matches!(it, LinkAttribute::OperState(LinkState::Up));
            link.attributes.iter().any(is_up).then_some(())
        }
        _ => None,
    });
    ups.unwrap().len() == 2
}

/// Runs commands that change the namespace, and returns their output; each must succeed.
///
/// A test that reads the output of a program needs that program.
#[track_caller]
pub(crate) fn sh(script: &str) -> String {
    let output = harness::shell(script).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
    text
}

#[track_caller]
pub(crate) fn json(command: &str) -> Vec<Value> {
    serde_json::from_str(&sh(command)).unwrap()
}

/// Text of all objects that a test may leave behind.
fn snapshot() -> String {
    sh("ip -d link; ip addr; ip route show table all; ip -6 route show table all
        ip rule; ip -6 rule; bridge fdb; ip neigh")
}

pub(crate) fn name(text: &str) -> DeviceName {
    text.parse().unwrap()
}

pub(crate) fn vxlan() -> Vxlan {
    Vxlan {
        name: name("e0"),
        vni: 7,
        port: 4790,
        local: [192, 0, 2, 1].into(),
        underlay: Some(name("u0")),
        mac: "66:f7:06:23:81:6b".parse().unwrap(),
        mtu: 1400,
        rp_filter: 2,
        up: true,
        intact: true,
    }
}

fn key(table: u32, dst: &str, metric: u32) -> RouteKey {
    RouteKey { table: TableId::new(table).unwrap(), dst: dst.parse().unwrap(), metric }
}

fn rule(family: Family, priority: u32, action: RuleAction) -> Rule {
    Rule {
        family,
        priority,
        mark: Mark::new(0x0100_0000),
        mask: 0xff00_0000,
        inverted: false,
        input: None,
        action,
    }
}

/// `goto` rule for packets without the mark.
fn past(family: Family) -> Rule {
    Rule { inverted: true, ..rule(family, 99, RuleAction::Goto(101)) }
}

/// `goto` rule for packets with the mark that come in by this interface.
fn past_by(device: &str, family: Family) -> Rule {
    Rule { input: Some(name(device)), inverted: false, ..past(family) }
}

fn lookup(table: u32) -> RuleAction {
    RuleAction::Lookup(TableId::new(table).unwrap())
}

/// State with every kind of object, of both families.
pub(crate) fn full() -> State {
    let peer = "66:00:00:00:00:02".parse().unwrap();
    let peer6 = "66:00:00:00:00:06".parse().unwrap();
    let via = |text: &str| Route::Via(text.parse().unwrap());
    State {
        link: Some(vxlan()),
        addresses: ["10.9.0.1/16", "10.9.0.2/16", "fd09::1/64"].map(|a| a.parse().unwrap()).into(),
        fdb: [(peer, "192.0.2.2".parse().unwrap()), (peer6, "192.0.2.6".parse().unwrap())].into(),
        neighbours: [("10.9.0.9".parse().unwrap(), peer), ("fd09::9".parse().unwrap(), peer6)]
            .into(),
        routes: [
            (key(3000, "0.0.0.0/0", 0), via("10.9.0.9")),
            (key(3000, "0.0.0.0/0", BACKSTOP_METRIC), Route::Unreachable),
            (key(3000, "10.0.0.0/8", 0), Route::Throw),
            (key(u32::MAX, "10.0.0.0/8", 7), Route::Throw),
            (key(200, "198.51.100.0/24", 7), via("10.9.0.9")),
            (key(3000, "::/0", 1024), via("fd09::9")),
            (key(3000, "::/0", BACKSTOP_METRIC), Route::Unreachable),
            (key(3000, "fd00::/8", 1024), Route::Throw),
        ]
        .into(),
        rules: [
            rule(Family::V4, 100, lookup(3000)),
            rule(Family::V4, 101, RuleAction::Unreachable),
            rule(Family::V6, 100, lookup(3000)),
            rule(Family::V6, 101, RuleAction::Unreachable),
            rule(Family::V4, 102, lookup(200)),
            past(Family::V4),
            past(Family::V6),
            rule(Family::V4, 102, RuleAction::Goto(103)),
            past_by("lo", Family::V4),
            past_by("lo", Family::V6),
            past_by("e0", Family::V4),
            past_by("e0", Family::V6),
        ]
        .into(),
        strays: BTreeSet::new(),
        firewall: None,
        ..State::default()
    }
}

pub(crate) fn additions(state: &State) -> Vec<Op> {
    let device = || name("e0");
    let mut ops = vec![Op::AddLink(state.link.clone().unwrap())];
    ops.extend(state.addresses.iter().map(|net| Op::AddAddress(device(), *net)));
    ops.extend(state.fdb.iter().map(|(mac, node)| Op::PutFdb(device(), *mac, *node)));
    let neighbours = state.neighbours.iter();
    ops.extend(neighbours.map(|(ip, mac)| Op::PutNeighbour(device(), *ip, *mac)));
    ops.extend(state.routes.iter().map(|(key, route)| Op::PutRoute(device(), *key, *route)));
    ops.extend(state.rules.iter().map(|rule| Op::AddRule(rule.clone())));
    ops
}

fn deletions(state: &State) -> Vec<Op> {
    let device = || name("e0");
    let mut ops: Vec<_> = state.rules.iter().map(|rule| Op::DeleteRule(rule.clone())).collect();
    ops.extend(state.routes.iter().map(|(key, route)| Op::DeleteRoute(device(), *key, *route)));
    ops.extend(state.neighbours.keys().map(|ip| Op::DeleteNeighbour(device(), *ip)));
    ops.extend(state.fdb.iter().map(|(mac, node)| Op::DeleteFdb(device(), *mac, *node)));
    ops.extend(state.addresses.iter().map(|net| Op::DeleteAddress(device(), *net)));
    ops.push(Op::DeleteLink(device()));
    ops
}

#[track_caller]
fn make(socket: &mut RouteSocket, op: &Op) {
    socket.make_one(op).unwrap_or_else(|error| panic!("{error}"));
}

#[track_caller]
fn observe(socket: &mut RouteSocket) -> State {
    let mut state = State::default();
    socket.observe(&mut state).unwrap_or_else(|error| panic!("{error}"));
    state
}
