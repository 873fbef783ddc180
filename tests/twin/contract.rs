//! One body of cases, on the simulator and on the kernel: what each refuses, with which error
//! number, and what is there afterwards.

use std::net::IpAddr;

use egress_datapath::state::IpRange;
use egress_datapath::state::{
    ChainId, Data, Field, Key, NftRule, Route, RouteKey, Set, State, Stmt, Tag, Value, Verdict,
};
use egress_datapath::{Changes, DeviceName, Family, MacAddr, Mark, NodeName, TableId};

use crate::checks::policies;
use crate::{Result, Twins, lab, say, world};

const ENOENT: i32 = 2;
const ESRCH: i32 = 3;
const EBUSY: i32 = 16;
const EEXIST: i32 = 17;
const ENODEV: i32 = 19;
const EINVAL: i32 = 22;
const ERANGE: i32 = 34;
const EADDRNOTAVAIL: i32 = 99;
const ENETDOWN: i32 = 100;

/// Something done to a state.
type Edit = fn(&mut State);

/// What both hold, what they are taken for, and what is wanted, each by what differs from the
/// usual; and the first refusal.
type Case = (&'static str, [Edit; 3], Option<i32>);

const AS_IS: Edit = |_| {};

const CASES: [Case; 52] = [
    ("all of it is added", [nothing, nothing, AS_IS], None),
    ("all of it is deleted", [AS_IS, AS_IS, nothing], None),
    ("all of it is added again", [AS_IS, nothing, AS_IS], Some(EEXIST)),
    ("all of it is deleted again", [nothing, AS_IS, nothing], Some(ENODEV)),
    ("a table is there", [AS_IS, |state| state.firewall = None, AS_IS], Some(EEXIST)),
    ("a table is not there", [no_table, AS_IS, no_table], Some(ENOENT)),
    ("a set is there", [AS_IS, no_eip_set, AS_IS], Some(EEXIST)),
    ("a set is not there", [AS_IS, more_set, AS_IS], Some(ENOENT)),
    ("a set that rules look into", [AS_IS, AS_IS, no_eip_set], Some(EBUSY)),
    ("a rule looks into a set that is not there", [AS_IS, AS_IS, rule_of_set], Some(ENOENT)),
    ("a rule goes to a chain that is not there", [AS_IS, AS_IS, rule_to_chain], Some(ENOENT)),
    ("a chain is there", [AS_IS, no_chain, AS_IS], Some(EEXIST)),
    ("a chain is not there", [AS_IS, more_chain, AS_IS], Some(ENOENT)),
    ("a chain that an element goes to", [AS_IS, AS_IS, no_chain], Some(EBUSY)),
    ("a chain that a rule goes to", [AS_IS, AS_IS, no_steer], Some(EBUSY)),
    ("a chain at another place", [AS_IS, AS_IS, other_base], None),
    ("an element is there", [AS_IS, no_source, AS_IS], Some(EEXIST)),
    ("an element is not there", [no_source, AS_IS, no_source], Some(ENOENT)),
    ("an element has another value", [AS_IS, AS_IS, other_value], None),
    ("an element of a set that is not there", [AS_IS, AS_IS, element_of_none], Some(ENOENT)),
    ("an element goes to a chain that is not there", [AS_IS, AS_IS, element_to_none], Some(ENOENT)),
    ("a range overlaps another", [AS_IS, AS_IS, overlap], Some(EEXIST)),
    ("a range takes the place of another", [AS_IS, AS_IS, wider], None),
    ("one of many in a transaction is bad", [AS_IS, no_source, other_excluded], Some(EEXIST)),
    ("a rule is there", [AS_IS, |state| state.rules.clear(), AS_IS], Some(EEXIST)),
    ("a rule is not there", [no_rules, AS_IS, no_rules], Some(ENOENT)),
    ("a route is there", [AS_IS, |state| state.routes.clear(), AS_IS], None),
    ("a route is not there", [no_routes, AS_IS, no_routes], Some(ESRCH)),
    ("a route is another one", [AS_IS, throws, no_routes], Some(ESRCH)),
    ("a route over a device that is down", [down, down, up_routes], Some(ENETDOWN)),
    ("a route over a device that is not there", [no_device, has_device, AS_IS], Some(ENODEV)),
    ("a neighbour is there", [AS_IS, |state| state.neighbours.clear(), AS_IS], None),
    ("a neighbour is not there", [no_neighbours, AS_IS, no_neighbours], Some(ENOENT)),
    ("a neighbour on a device that is down", [down, down, up_neighbours], None),
    ("a forwarding entry is there", [AS_IS, |state| state.fdb.clear(), AS_IS], None),
    ("a forwarding entry is not there", [no_fdb, AS_IS, no_fdb], Some(ENOENT)),
    ("a forwarding entry leads elsewhere", [AS_IS, other_fdb, no_fdb], None),
    ("an address is there", [AS_IS, |state| state.addresses.clear(), AS_IS], Some(EEXIST)),
    ("an address is not there", [no_addresses, AS_IS, no_addresses], Some(EADDRNOTAVAIL)),
    ("an egress IP is on the interface", [claim, AS_IS, claim], Some(EEXIST)),
    ("an egress IP is not on the interface", [AS_IS, claim, AS_IS], Some(EADDRNOTAVAIL)),
    ("the last addresses go", [AS_IS, AS_IS, no_addresses], None),
    ("a device goes down", [AS_IS, AS_IS, only_down], None),
    ("a device gets another address", [AS_IS, AS_IS, other_mac], None),
    ("a device becomes too small for IPv6", [AS_IS, AS_IS, only_small], None),
    ("a device becomes large enough for IPv6", [small, small, large], None),
    ("an IPv6 address where there is no IPv6", [small, small, small_addresses], Some(EINVAL)),
    ("an IPv6 neighbour where there is no IPv6", [small, small, small_neighbours], Some(EINVAL)),
    ("an IPv6 route where there is no IPv6", [small, small, small_routes], Some(ENODEV)),
    ("a device with an impossible address", [AS_IS, AS_IS, group_mac], Some(EADDRNOTAVAIL)),
    ("a device with an impossible MTU", [AS_IS, AS_IS, small_mtu], Some(EINVAL)),
    ("a device with an impossible number", [AS_IS, AS_IS, large_vni], Some(ERANGE)),
];

fn nothing(state: &mut State) {
    *state = State::default();
}

fn no_table(state: &mut State) {
    state.firewall = None;
}

fn table(state: &mut State) -> &mut egress_datapath::state::Firewall {
    state.firewall.as_mut().unwrap()
}

fn no_eip_set(state: &mut State) {
    let set = Set::Eip(Family::V4);
    table(state).sets.remove(&set);
    table(state).elements.retain(|key: &Key, _| key.set() != set);
}

const UNUSED: Set = Set::Destination(Family::V4, 7);

fn more_set(state: &mut State) {
    table(state).sets.insert(UNUSED);
}

fn more_rule(state: &mut State, statement: Stmt) {
    let (_, rules) = table(state).chains.get_mut(&ChainId::Bypass).unwrap();
    rules.push(NftRule(vec![statement]));
}

fn rule_of_set(state: &mut State) {
    more_rule(state, Stmt::by_prefix(Field::Destination(Family::V4), 7));
}

const NOWHERE: ChainId = ChainId::To(Mark::new(0x26ff_0000));

fn rule_to_chain(state: &mut State) {
    more_rule(state, Stmt::Goto(NOWHERE));
}

fn no_chain(state: &mut State) {
    table(state).chains.remove(&ChainId::LocalGateway);
}

fn no_steer(state: &mut State) {
    table(state).chains.remove(&ChainId::Steer(Family::V6));
}

fn more_chain(state: &mut State) {
    table(state).chains.insert(NOWHERE, (None, Vec::new()));
}

fn other_base(state: &mut State) {
    let (base, _) = table(state).chains.get_mut(&ChainId::Output).unwrap();
    base.as_mut().unwrap().priority = 150;
}

fn source() -> Key {
    Key::source(lab::POD_A[0])
}

fn no_source(state: &mut State) {
    table(state).elements.remove(&source());
}

fn put(state: &mut State, key: Key, data: Data) {
    table(state).elements.insert(key, Value { data, comment: None });
}

fn other_value(state: &mut State) {
    put(state, source(), Data::Tag(Tag::LOCAL));
}

fn element_of_none(state: &mut State) {
    let key = Key::destination("192.0.0.0/7".parse().unwrap(), Tag::LOCAL);
    put(state, key, Data::Tag(Tag::LOCAL));
}

fn element_to_none(state: &mut State) {
    put(state, Key::policy_action(Tag::gateway(999)), Data::Verdict(Verdict::Goto(NOWHERE)));
}

fn range(text: &str) -> Key {
    Key::excluded(IpRange::from(text.parse::<ipnet::IpNet>().unwrap()))
}

fn overlap(state: &mut State) {
    put(state, range("10.244.7.0/24"), Data::None);
}

fn wider(state: &mut State) {
    table(state).elements.remove(&range("10.244.0.0/16"));
    put(state, range("10.244.0.0/15"), Data::None);
}

fn other_excluded(state: &mut State) {
    for last in 0..4 {
        put(state, Key::source([10, 244, 9, last].into()), Data::Tag(Tag::LOCAL));
    }
}

fn no_rules(state: &mut State) {
    state.rules.clear();
}

fn no_routes(state: &mut State) {
    state.routes.clear();
}

fn throws(state: &mut State) {
    for route in state.routes.values_mut() {
        *route = match route {
            Route::Throw => Route::Unreachable,
            Route::Via(_) | Route::Unreachable => Route::Throw,
        };
    }
}

/// What a device that is down leaves.
fn down(state: &mut State) {
    state.link.as_mut().unwrap().up = false;
    state.addresses.retain(|net| net.addr().is_ipv4());
    state.neighbours.clear();
    state.routes.retain(|_, route| !matches!(route, Route::Via(_)));
}

fn only_down(state: &mut State) {
    state.link.as_mut().unwrap().up = false;
}

fn up_routes(state: &mut State) {
    let routes = std::mem::take(&mut state.routes);
    down(state);
    state.routes = routes;
}

fn up_neighbours(state: &mut State) {
    let neighbours = std::mem::take(&mut state.neighbours);
    down(state);
    state.neighbours = neighbours;
}

/// What a device that is too small for IPv6 leaves.
fn small(state: &mut State) {
    only_small(state);
    state.addresses.retain(|net| net.addr().is_ipv4());
    state.neighbours.retain(|address, _| address.is_ipv4());
    state.routes.retain(|_, route| !matches!(route, Route::Via(via) if via.is_ipv6()));
}

fn only_small(state: &mut State) {
    state.link.as_mut().unwrap().mtu = 1279;
}

fn large(state: &mut State) {
    small(state);
    state.link.as_mut().unwrap().mtu = 1280;
}

fn small_addresses(state: &mut State) {
    let addresses = std::mem::take(&mut state.addresses);
    small(state);
    state.addresses = addresses;
}

fn small_neighbours(state: &mut State) {
    let neighbours = std::mem::take(&mut state.neighbours);
    small(state);
    state.neighbours = neighbours;
}

fn small_routes(state: &mut State) {
    let routes = std::mem::take(&mut state.routes);
    small(state);
    state.routes = routes;
}

fn no_device(state: &mut State) {
    down(state);
    state.link = None;
    state.addresses.clear();
    state.fdb.clear();
}

/// As if the device alone were there.
fn has_device(state: &mut State) {
    let link = state.link.clone();
    no_device(state);
    state.link = link;
}

fn no_neighbours(state: &mut State) {
    state.neighbours.clear();
}

fn no_fdb(state: &mut State) {
    state.fdb.clear();
}

fn other_fdb(state: &mut State) {
    for node in state.fdb.values_mut() {
        *node = IpAddr::from([10, 10, 0, 99]);
    }
}

fn no_addresses(state: &mut State) {
    state.addresses.clear();
}

fn claim(state: &mut State) {
    let device = DeviceName::new("lo").unwrap();
    state.claims.insert(([198, 51, 100, 77].into(), device));
}

fn other_mac(state: &mut State) {
    state.link.as_mut().unwrap().mac = MacAddr::new([2, 9, 9, 9, 9, 9]);
}

fn group_mac(state: &mut State) {
    state.link.as_mut().unwrap().mac = MacAddr::new([1, 9, 9, 9, 9, 9]);
}

fn small_mtu(state: &mut State) {
    state.link.as_mut().unwrap().mtu = 67;
}

fn large_vni(state: &mut State) {
    state.link.as_mut().unwrap().vni = 1 << 24;
}

#[test]
fn every_case_ends_the_same_way() -> Result {
    let mut twins = harness::given("network namespaces", Twins::new());
    let usual = usual()?;
    let mut refusals = 0;
    for (case, [holds, taken, wanted], refused) in CASES {
        let with = |edit: Edit| {
            let mut state = usual.clone();
            edit(&mut state);
            state
        };
        let what = |error| format!("{case}: {error}");
        // What goes may take others along, which then cannot be deleted, or must be made again.
        for _ in 0..3 {
            let now = twins.observe().map_err(what)?;
            let _made = twins.apply(&Changes::between(&now, &with(holds))).map_err(what)?;
        }
        let now = twins.observe().map_err(what)?;
        assert_eq!(now, State { missing: usual.missing.clone(), ..with(holds) }, "{case}");
        let outcome = twins.apply(&Changes::between(&with(taken), &with(wanted))).map_err(what)?;
        let first = outcome.as_ref().and_then(|outcome| outcome.refused.first());
        assert_eq!(first.and_then(|(_, errno)| *errno), refused, "{case}: {outcome:?}");
        refusals += outcome.map_or(0, |outcome| outcome.refused.len());
        twins.observe().map_err(what)?;
    }
    say(&format!(
        "{} cases on the simulator and the kernel, {refusals} refusals, the same",
        CASES.len()
    ));
    Ok(())
}

/// What a node holds that sends to two gateways, and is one itself.
fn usual() -> Result<State> {
    let mut policies = policies();
    policies[2].gateway = Some(NodeName::new("node-a")?);
    let mut state = world::planned(&lab::cluster("node-a")?, &policies);
    // A table whose only routes are of one family.
    let key = RouteKey {
        table: TableId::new(4000).ok_or("no table")?,
        dst: "192.0.2.0/24".parse()?,
        metric: 7,
    };
    state.routes.insert(key, Route::Throw);
    Ok(state)
}
