//! Operations against a real kernel, in network namespaces of their own, with `ip` and `bridge`
//! as witnesses.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Write, stderr};
use std::process::Command;
use std::thread;

use serde_json::Value;

use super::route_socket::RouteSocket;
use crate::op::Op;
use crate::state::{BACKSTOP_METRIC, LINK_ALIAS, Route, RouteKey, Rule, RuleAction, State, Vxlan};
use crate::types::{DeviceName, Family, Mark, TableId};

/// Runs the test in a fresh network namespace, which ends with its thread.
fn in_namespace(test: impl FnOnce() + Send + 'static) {
    let done = thread::spawn(move || {
        if let Err(error) = unshare() {
            assert!(
                std::env::var_os("EGRESS_REQUIRE_NETNS").is_none_or(|value| value != "1"),
                "no network namespace: {error}"
            );
            let name = thread::current().name().unwrap_or_default().to_owned();
            // Not `eprintln`, which the test runner swallows.
            let _ = writeln!(stderr(), "SKIPPED, no network namespace: {name} {error}");
            return;
        }
        // `addrgenmode none`, so that no address appears in the middle of a test.
        sh("ip link set lo up
            ip link add u0 type veth peer name u1
            ip link set u0 addrgenmode none && ip link set u1 addrgenmode none
            ip addr add 192.0.2.1/24 dev u0 && ip addr add 2001:db8::1/64 dev u0 nodad
            ip link set u0 up && ip link set u1 up
            ip link add foreign type vxlan id 99 local 192.0.2.1 dev u0 dstport 4790
            ip link set foreign alias other addrgenmode none up");
        test();
    })
    .join();
    if let Err(panic) = done {
        std::panic::resume_unwind(panic);
    }
}

#[allow(
    deprecated,
    reason = "the descriptor table stays shared, so that it is sound"
)]
fn unshare() -> Result<(), rustix::io::Errno> {
    rustix::thread::unshare(rustix::thread::UnshareFlags::NEWNET)
}

#[track_caller]
fn sh(script: &str) -> String {
    let output = Command::new("sh").args(["-ec", script]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        output.status.success(),
        "{script}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    text
}

#[track_caller]
fn json(command: &str) -> Vec<Value> {
    serde_json::from_str(&sh(command)).unwrap()
}

/// Everything that may be left behind.
fn snapshot() -> String {
    sh(
        "ip -d link; ip addr; ip route show table all; ip -6 route show table all
        ip rule; ip -6 rule; bridge fdb; ip neigh",
    )
}

fn name(text: &str) -> DeviceName {
    text.parse().unwrap()
}

fn vxlan() -> Vxlan {
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
    }
}

fn key(table: u32, dst: &str, metric: u32) -> RouteKey {
    RouteKey {
        table: TableId::new(table).unwrap(),
        dst: dst.parse().unwrap(),
        metric,
    }
}

fn rule(family: Family, priority: u32, action: RuleAction) -> Rule {
    Rule {
        family,
        priority,
        mark: Mark::new(0x0100_0000),
        mask: 0xff00_0000,
        action,
    }
}

fn lookup(table: u32) -> RuleAction {
    RuleAction::Lookup(TableId::new(table).unwrap())
}

/// A state with everything in it, of both families.
fn full() -> State {
    let peer = "66:00:00:00:00:02".parse().unwrap();
    let peer6 = "66:00:00:00:00:06".parse().unwrap();
    let via = |text: &str| Route::Via(text.parse().unwrap());
    State {
        link: Some(vxlan()),
        addresses: ["10.9.0.1/16", "10.9.0.2/16", "fd09::1/64"]
            .map(|a| a.parse().unwrap())
            .into(),
        fdb: [
            (peer, "192.0.2.2".parse().unwrap()),
            (peer6, "192.0.2.6".parse().unwrap()),
        ]
        .into(),
        neighbours: [
            ("10.9.0.9".parse().unwrap(), peer),
            ("fd09::9".parse().unwrap(), peer6),
        ]
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
        ]
        .into(),
        firewall: None,
    }
}

fn additions(state: &State) -> Vec<Op> {
    let device = || name("e0");
    let mut ops = vec![Op::AddLink(state.link.clone().unwrap())];
    ops.extend(
        state
            .addresses
            .iter()
            .map(|net| Op::AddAddress(device(), *net)),
    );
    ops.extend(
        state
            .fdb
            .iter()
            .map(|(mac, node)| Op::PutFdb(device(), *mac, *node)),
    );
    let neighbours = state.neighbours.iter();
    ops.extend(neighbours.map(|(ip, mac)| Op::PutNeighbour(device(), *ip, *mac)));
    ops.extend(
        state
            .routes
            .iter()
            .map(|(key, route)| Op::PutRoute(device(), *key, *route)),
    );
    ops.extend(state.rules.iter().map(|rule| Op::AddRule(*rule)));
    ops
}

fn deletions(state: &State) -> Vec<Op> {
    let device = || name("e0");
    let mut ops: Vec<_> = state
        .rules
        .iter()
        .map(|rule| Op::DeleteRule(*rule))
        .collect();
    ops.extend(
        state
            .routes
            .iter()
            .map(|(key, route)| Op::DeleteRoute(device(), *key, *route)),
    );
    ops.extend(
        state
            .neighbours
            .keys()
            .map(|ip| Op::DeleteNeighbour(device(), *ip)),
    );
    ops.extend(
        state
            .fdb
            .iter()
            .map(|(mac, node)| Op::DeleteFdb(device(), *mac, *node)),
    );
    ops.extend(
        state
            .addresses
            .iter()
            .map(|net| Op::DeleteAddress(device(), *net)),
    );
    ops.push(Op::DeleteLink(device()));
    ops
}

#[track_caller]
fn make(socket: &mut RouteSocket, op: &Op) {
    socket.make(op).unwrap_or_else(|error| panic!("{error}"));
}

#[track_caller]
fn observe(socket: &mut RouteSocket) -> State {
    let mut state = State::default();
    socket
        .observe(&mut state)
        .unwrap_or_else(|error| panic!("{error}"));
    state
}

/// Removes from a state what an operation removes from the kernel.
fn forget(state: &mut State, op: &Op) {
    match op {
        Op::DeleteRule(rule) => assert!(state.rules.remove(rule)),
        Op::DeleteRoute(_, key, _) => assert!(state.routes.remove(key).is_some()),
        Op::DeleteNeighbour(_, ip) => assert!(state.neighbours.remove(ip).is_some()),
        Op::DeleteFdb(_, mac, _) => assert!(state.fdb.remove(mac).is_some()),
        Op::DeleteAddress(_, net) => assert!(state.addresses.remove(net)),
        Op::DeleteLink(_) => assert!(state.link.take().is_some()),
        other => panic!("{other}"),
    }
}

#[test]
fn what_is_put_is_observed_and_what_is_deleted_leaves_nothing() {
    in_namespace(|| {
        let mut socket = RouteSocket::open().unwrap();
        let before = snapshot();
        assert!(observe(&mut socket).is_empty());
        let mut state = full();
        for op in additions(&state) {
            make(&mut socket, &op);
        }
        assert_eq!(observe(&mut socket), state);
        for op in deletions(&state) {
            make(&mut socket, &op);
            forget(&mut state, &op);
            assert_eq!(observe(&mut socket), state, "after {op}");
        }
        assert_eq!(snapshot(), before);
    });
}

#[test]
fn deleting_a_second_time_says_that_it_was_not_found() {
    in_namespace(|| {
        let mut socket = RouteSocket::open().unwrap();
        let state = full();
        for op in additions(&state) {
            make(&mut socket, &op);
        }
        for op in deletions(&state) {
            make(&mut socket, &op);
            let error = socket.make(&op).unwrap_err();
            assert!(error.is_not_found(), "{error}");
            assert_eq!(error.request(), op.to_string());
        }
    });
}

#[test]
fn adding_twice_is_refused_and_putting_twice_is_not() {
    in_namespace(|| {
        let mut socket = RouteSocket::open().unwrap();
        let state = full();
        for op in additions(&state) {
            make(&mut socket, &op);
            let again = socket.make(&op);
            match op {
                Op::AddLink(_) | Op::AddAddress(..) | Op::AddRule(_) => {
                    let error = again.unwrap_err();
                    assert!(error.is_exists(), "{error}");
                }
                _ => again.unwrap(),
            }
        }
        assert_eq!(observe(&mut socket), state);
    });
}

#[test]
fn ip_and_bridge_agree() {
    in_namespace(|| {
        let mut socket = RouteSocket::open().unwrap();
        for op in additions(&full()) {
            make(&mut socket, &op);
        }
        let links = json("ip -j -d link show dev e0");
        let info = &links[0]["linkinfo"]["info_data"];
        assert_eq!(links[0]["ifalias"], LINK_ALIAS);
        assert_eq!(links[0]["address"], "66:f7:06:23:81:6b");
        assert_eq!(links[0]["mtu"], 1400);
        assert_eq!(links[0]["inet6_addr_gen_mode"], "none");
        assert_eq!(info["id"], 7);
        assert_eq!(info["port"], 4790);
        assert_eq!(info["local"], "192.0.2.1");
        assert_eq!(info["link"], "u0");
        assert_eq!(info["learning"], false);
        let rp_filter = fs::read_to_string("/proc/sys/net/ipv4/conf/e0/rp_filter").unwrap();
        assert_eq!(rp_filter, "2\n");

        let routes = json("ip -j route show table 3000");
        assert_eq!(routes.len(), 3);
        assert!(routes.iter().all(|route| route["protocol"] == "69"));
        assert_eq!(routes[0]["gateway"], "10.9.0.9");
        assert_eq!(routes[0]["flags"][0], "onlink");
        assert_eq!(routes[0]["dev"], "e0");
        assert_eq!(routes[1]["type"], "unreachable");
        assert_eq!(routes[1]["metric"], BACKSTOP_METRIC);
        assert_eq!(routes[2]["type"], "throw");
        let routes = json("ip -j -6 route show table 3000");
        let metrics: Vec<_> = routes
            .iter()
            .map(|route| route["metric"].as_u64())
            .collect();
        assert_eq!(
            metrics,
            [Some(1024), Some(1024), Some(BACKSTOP_METRIC.into())]
        );

        for family in ["-4", "-6"] {
            let rules = json(&format!("ip -j {family} rule show"));
            let ours: Vec<_> = rules
                .iter()
                .filter(|rule| rule["protocol"] == "69")
                .collect();
            assert_eq!(ours[0]["priority"], 100);
            assert_eq!(ours[0]["fwmark"], "0x1000000");
            assert_eq!(ours[0]["fwmask"], "0xff000000");
            assert_eq!(ours[0]["table"], "3000");
            assert_eq!(ours[1]["action"], "unreachable");
        }

        let entries = json("bridge -j fdb show dev e0");
        assert_eq!(entries[0]["mac"], "66:00:00:00:00:02");
        assert_eq!(entries[0]["dst"], "192.0.2.2");
        assert_eq!(entries[0]["state"], "permanent");
        let neighbours = sh("ip neigh show dev e0 nud permanent; ip -6 neigh show dev e0");
        assert!(
            neighbours.contains("10.9.0.9 lladdr 66:00:00:00:00:02 PERMANENT proto 69"),
            "{neighbours}"
        );
        let addresses = json("ip -j -6 addr show dev e0");
        assert_eq!(addresses[0]["addr_info"].as_array().unwrap().len(), 1);
    });
}

/// Things that differ from ours in one attribute.
const DECOYS: &str = "
    ip rule add pref 100 fwmark 0x1000000/0xff000000 lookup 3000 protocol 70
    ip rule add pref 99 fwmark 0x1000000/0xff000000 lookup 3000 protocol 69
    ip rule add pref 100 fwmark 0x1000000/0xffff0000 lookup 3000 protocol 69
    ip rule add pref 100 fwmark 0x2000000/0xff000000 lookup 3000 protocol 69
    ip rule add pref 100 fwmark 0x1000000/0xff000000 lookup 3001 protocol 69
    ip -6 rule add pref 100 fwmark 0x1000000/0xff000000 lookup 3000 protocol 70
    ip route add default via 192.0.2.9 dev u0 table 3000 proto 70 metric 5
    ip route add 10.0.0.0/9 via 192.0.2.9 dev u0 table 3000 proto 70
    ip -6 route add default via 2001:db8::9 dev u0 table 3000 proto 70 metric 5
    ip neigh add 10.9.0.9 lladdr 66:00:00:00:00:02 dev u0 nud permanent
    ip neigh add fd09::9 lladdr 66:00:00:00:00:02 dev u0 nud permanent
    ip addr add 10.9.0.1/16 dev foreign
    bridge fdb add 66:00:00:00:00:02 dev foreign dst 192.0.2.2 self permanent";

#[test]
fn decoys_stay() {
    in_namespace(|| {
        let mut socket = RouteSocket::open().unwrap();
        sh(DECOYS);
        let before = snapshot();
        let state = full();
        for op in additions(&state) {
            make(&mut socket, &op);
        }
        let mut found = observe(&mut socket);
        let extra: BTreeSet<_> = found.rules.difference(&state.rules).copied().collect();
        assert_eq!(extra.len(), 4, "those with our protocol are ours");
        found.rules.retain(|rule| state.rules.contains(rule));
        assert_eq!(found, state);
        for op in deletions(&state) {
            make(&mut socket, &op);
            socket.make(&op).unwrap_err();
        }
        assert_eq!(snapshot(), before);
    });
}

#[test]
fn routes_of_a_shape_that_we_never_write_are_not_seen() {
    in_namespace(|| {
        let mut socket = RouteSocket::open().unwrap();
        sh("ip route add blackhole default table 3000 proto 69
            ip route add 10.1.0.0/16 via 192.0.2.9 dev u0 table 3000 proto 69
            ip route add 10.2.0.0/16 table 3000 proto 69 nexthop via 192.0.2.8 nexthop via 192.0.2.9
            ip route add 10.3.0.0/16 via 192.0.2.9 dev u0 table 254 proto 69
            ip rule add from 10.0.0.0/8 lookup 3000 protocol 69");
        assert!(observe(&mut socket).is_empty());
    });
}

#[test]
fn a_device_that_is_not_ours_is_left_alone() {
    in_namespace(|| {
        let mut socket = RouteSocket::open().unwrap();
        for (make_it, kind) in [
            (
                "ip link add e0 type vxlan id 7 local 192.0.2.1 dstport 4790",
                "without alias",
            ),
            (
                "ip link add e0 type veth peer name e1; ip link set e0 alias egress-datapath",
                "veth",
            ),
        ] {
            sh(make_it);
            let before = snapshot();
            let error = socket.make(&Op::AddLink(vxlan())).unwrap_err();
            assert!(error.is_exists(), "{kind}: {error}");
            assert!(error.remedy().unwrap().contains("somebody else"), "{error}");
            let peer = "66:00:00:00:00:02".parse().unwrap();
            for op in [
                Op::SetLink(vxlan()),
                Op::DeleteLink(name("e0")),
                Op::AddAddress(name("e0"), "10.9.0.1/16".parse().unwrap()),
                Op::PutFdb(name("e0"), peer, [192, 0, 2, 2].into()),
                Op::PutNeighbour(name("e0"), [10, 9, 0, 9].into(), peer),
            ] {
                let error = socket.make(&op).unwrap_err();
                assert!(error.is_not_found(), "{kind}: {error}");
            }
            assert!(observe(&mut socket).is_empty());
            assert_eq!(snapshot(), before);
            sh("ip link del e0");
        }
    });
}

#[test]
fn a_vni_that_is_taken_is_said() {
    in_namespace(|| {
        let mut socket = RouteSocket::open().unwrap();
        let link = Vxlan { vni: 99, ..vxlan() };
        let error = socket.make(&Op::AddLink(link)).unwrap_err();
        assert!(error.is_exists(), "{error}");
        assert!(error.remedy().unwrap().contains("VNI"), "{error}");
    });
}

#[test]
fn a_half_made_device_is_replaced_and_a_refused_one_is_removed() {
    in_namespace(|| {
        let mut socket = RouteSocket::open().unwrap();
        sh("ip link add e0 address 66:f7:06:23:81:6b type vxlan id 7 local 192.0.2.1 dstport 4790");
        make(&mut socket, &Op::AddLink(vxlan()));
        assert_eq!(observe(&mut socket).link, Some(vxlan()));
        make(&mut socket, &Op::DeleteLink(name("e0")));

        let before = snapshot();
        // Outer packets cannot leave by a device that is down: created, but it does not come up.
        let link = Vxlan {
            local: "2001:db8::1".parse().unwrap(),
            underlay: Some(name("missing")),
            ..vxlan()
        };
        let error = socket.make(&Op::AddLink(link)).unwrap_err();
        assert!(error.is_not_found(), "{error}");
        assert_eq!(snapshot(), before);
    });
}

#[test]
fn the_device_is_changed_without_being_made_anew() {
    in_namespace(|| {
        let mut socket = RouteSocket::open().unwrap();
        sh("ip addr add 192.0.2.3/24 dev u0");
        make(&mut socket, &Op::AddLink(vxlan()));
        let index =
            sh("cat /sys/class/net/e0/ifindex 2>/dev/null || ip -o link show e0 | cut -d: -f1");
        let changes: [fn(&mut Vxlan); 8] = [
            |link| link.mac = "66:00:00:00:00:99".parse().unwrap(),
            |link| link.mtu = 1300,
            |link| link.rp_filter = 0,
            |link| link.local = [192, 0, 2, 3].into(),
            |link| link.underlay = Some(name("u1")),
            |link| link.up = false,
            |link| link.underlay = None,
            |link| *link = vxlan(),
        ];
        let mut link = vxlan();
        for (at, change) in changes.iter().enumerate() {
            change(&mut link);
            make(&mut socket, &Op::SetLink(link.clone()));
            assert_eq!(
                observe(&mut socket).link.as_ref(),
                Some(&link),
                "change {at}"
            );
        }
        let now =
            sh("cat /sys/class/net/e0/ifindex 2>/dev/null || ip -o link show e0 | cut -d: -f1");
        assert_eq!(index, now);

        let unchangeable: [fn(&mut Vxlan); 3] = [
            |link| link.vni = 8,
            |link| link.port = 4791,
            |link| link.local = "2001:db8::1".parse().unwrap(),
        ];
        for change in unchangeable {
            let mut link = vxlan();
            change(&mut link);
            let error = socket.make(&Op::SetLink(link)).unwrap_err();
            assert!(
                error.remedy().unwrap().contains("delete the device"),
                "{error}"
            );
        }
    });
}

#[test]
fn an_ipv6_underlay_and_a_device_that_stays_down() {
    in_namespace(|| {
        let mut socket = RouteSocket::open().unwrap();
        let link = Vxlan {
            local: "2001:db8::1".parse().unwrap(),
            up: false,
            ..vxlan()
        };
        make(&mut socket, &Op::AddLink(link.clone()));
        assert_eq!(observe(&mut socket).link, Some(link.clone()));
        let mac = "66:00:00:00:00:02".parse().unwrap();
        let node = "2001:db8::2".parse().unwrap();
        make(&mut socket, &Op::PutFdb(name("e0"), mac, node));
        assert_eq!(observe(&mut socket).fdb, [(mac, node)].into());

        let via = Route::Via([10, 9, 0, 9].into());
        let op = Op::PutRoute(name("e0"), key(3000, "0.0.0.0/0", 0), via);
        let error = socket.make(&op).unwrap_err();
        assert_eq!(error.errno(), Some(100), "ENETDOWN: {error}");
        make(&mut socket, &Op::SetLink(Vxlan { up: true, ..link }));
        make(&mut socket, &op);
        assert_eq!(observe(&mut socket).routes.len(), 1);
    });
}

#[test]
fn what_goes_with_the_device_is_seen_to_be_gone() {
    in_namespace(|| {
        let mut socket = RouteSocket::open().unwrap();
        let state = full();
        for op in additions(&state) {
            make(&mut socket, &op);
        }
        sh("ip link set e0 down");
        let down = observe(&mut socket);
        assert!(!down.link.unwrap().up);
        assert!(down.neighbours.is_empty());
        assert!(
            down.routes
                .values()
                .all(|route| !matches!(route, Route::Via(_)))
        );
        assert_eq!(down.rules, state.rules);
        sh("ip link del e0");
        let gone = observe(&mut socket);
        assert_eq!(
            (gone.link, gone.addresses.len(), gone.fdb.len()),
            (None, 0, 0)
        );
        let op = Op::PutRoute(
            name("e0"),
            key(3000, "0.0.0.0/0", 0),
            Route::Via([10, 9, 0, 9].into()),
        );
        let error = socket.make(&op).unwrap_err();
        assert!(error.is_not_found());
        assert!(error.to_string().contains("dev e0"), "{error}");
        assert!(error.to_string().contains("No such device"), "{error}");
    });
}

#[test]
fn replacing_a_route_changes_its_gateway() {
    in_namespace(|| {
        let mut socket = RouteSocket::open().unwrap();
        for op in additions(&full()) {
            make(&mut socket, &op);
        }
        for (dst, metric, gateway) in [("0.0.0.0/0", 0, "10.9.0.8"), ("::/0", 1024, "fd09::8")] {
            let route = Route::Via(gateway.parse().unwrap());
            let key = key(3000, dst, metric);
            make(&mut socket, &Op::PutRoute(name("e0"), key, route));
            assert_eq!(observe(&mut socket).routes.get(&key), Some(&route));
        }
        assert_eq!(observe(&mut socket).routes.len(), full().routes.len());
    });
}

#[test]
fn tables_in_use_are_those_of_rules_and_of_routes_of_anybody() {
    in_namespace(|| {
        let mut socket = RouteSocket::open().unwrap();
        sh("ip rule add pref 7 lookup 4001
            ip -6 rule add pref 7 lookup 4002
            ip route add throw 10.0.0.0/8 table 4003
            ip -6 route add throw fd00::/8 table 4004
            ip route add throw 10.0.0.0/8 table 17");
        let tables = socket.tables_in_use().unwrap();
        for table in [17, 253, 254, 255, 4001, 4002, 4003, 4004] {
            assert!(tables.contains(&table), "{table}");
        }
        assert!(
            !tables.contains(&252),
            "252 is a stand-in for tables above 255"
        );
        assert!(!tables.contains(&3000));
    });
}

#[test]
fn the_device_of_an_address_is_found() {
    in_namespace(|| {
        let mut socket = RouteSocket::open().unwrap();
        sh("ip link set u0 mtu 1450");
        for address in ["192.0.2.1", "2001:db8::1"] {
            let found = socket.device_of(address.parse().unwrap()).unwrap();
            assert_eq!(found, Some((name("u0"), 1450)));
        }
        for address in ["192.0.2.2", "2001:db8::2"] {
            assert_eq!(socket.device_of(address.parse().unwrap()).unwrap(), None);
        }
    });
}

#[test]
fn without_ipv6_on_the_device_the_rest_works() {
    in_namespace(|| {
        let mut socket = RouteSocket::open().unwrap();
        fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1").unwrap();
        make(&mut socket, &Op::AddLink(vxlan()));
        make(
            &mut socket,
            &Op::AddAddress(name("e0"), "10.9.0.1/16".parse().unwrap()),
        );
        let state = observe(&mut socket);
        assert_eq!((state.link, state.addresses.len()), (Some(vxlan()), 1));
        // Below 1280 the kernel takes IPv6 off the device altogether.
        let link = Vxlan {
            mtu: 1000,
            ..vxlan()
        };
        make(&mut socket, &Op::SetLink(link.clone()));
        assert_eq!(observe(&mut socket).link, Some(link.clone()));
        make(&mut socket, &Op::DeleteLink(name("e0")));
        make(&mut socket, &Op::AddLink(link.clone()));
        assert_eq!(observe(&mut socket).link, Some(link));
    });
}

#[test]
fn many_objects_are_read_whole() {
    in_namespace(|| {
        let mut socket = RouteSocket::open().unwrap();
        make(&mut socket, &Op::AddLink(vxlan()));
        for n in 0..3000_u32 {
            let dst = std::net::Ipv4Addr::from(0x0a00_0000 + n * 256);
            let key = key(3000, &format!("{dst}/24"), 0);
            make(&mut socket, &Op::PutRoute(name("e0"), key, Route::Throw));
            let [.., a, b] = n.to_be_bytes();
            let mac = crate::types::MacAddr::new([0x66, 0, 0, 0, a, b]);
            make(
                &mut socket,
                &Op::PutFdb(name("e0"), mac, [192, 0, 2, 2].into()),
            );
        }
        let state = observe(&mut socket);
        assert_eq!((state.routes.len(), state.fdb.len()), (3000, 3000));
    });
}
