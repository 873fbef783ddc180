//! Objects that are written are observed, and deleted objects leave nothing behind.

use std::collections::BTreeSet;

use super::*;
use crate::error::errno;

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
            let error = socket.make_one(&op).unwrap_err();
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
            let again = socket.make_one(&op);
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

/// Objects that differ from this crate's in one attribute.
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
        let extra: BTreeSet<_> = found.rules.difference(&state.rules).cloned().collect();
        assert_eq!(extra.len(), 4, "those with our protocol are ours");
        found.rules.retain(|rule| state.rules.contains(rule));
        assert_eq!(found, state);
        for op in deletions(&state) {
            make(&mut socket, &op);
            socket.make_one(&op).unwrap_err();
        }
        assert_eq!(snapshot(), before);
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
        assert!(down.routes.values().all(|route| !matches!(route, Route::Via(_))));
        assert_eq!(down.rules, state.rules);
        sh("ip link del e0");
        let gone = observe(&mut socket);
        assert_eq!((gone.link, gone.addresses.len(), gone.fdb.len()), (None, 0, 0));
        let op =
            Op::PutRoute(name("e0"), key(3000, "0.0.0.0/0", 0), Route::Via([10, 9, 0, 9].into()));
        let error = socket.make_one(&op).unwrap_err();
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
            make(&mut socket, &Op::PutFdb(name("e0"), mac, [192, 0, 2, 2].into()));
        }
        let state = observe(&mut socket);
        assert_eq!((state.routes.len(), state.fdb.len()), (3000, 3000));
    });
}

#[test]
fn each_of_many_changes_has_an_answer_of_its_own() {
    in_namespace(|| {
        let mut socket = RouteSocket::open().unwrap();
        make(&mut socket, &Op::AddLink(vxlan()));
        let add = |priority| Op::AddRule(rule(Family::V4, priority, RuleAction::Unreachable));
        // More than fit into one datagram.
        let mut ops: Vec<_> = (1_000..1_300).map(add).collect();
        ops.insert(7, add(1_003));
        ops.insert(150, Op::AddLink(vxlan()));
        let mac = "66:f7:06:23:81:6c".parse().unwrap();
        ops.insert(200, Op::PutFdb(name("nowhere"), mac, [192, 0, 2, 9].into()));
        ops.push(Op::PutFdb(name("e0"), mac, [192, 0, 2, 9].into()));
        ops.push(add(1_299));
        let refused = socket.make(&ops);
        let errnos: Vec<_> = refused.iter().map(|(at, error)| (*at, error.errno())).collect();
        let (exists, no_device) = (Some(errno::EEXIST), Some(errno::ENODEV));
        assert_eq!(errnos, [(7, exists), (150, exists), (200, no_device), (304, exists)]);
        for (at, error) in refused {
            assert_eq!(error.request(), ops[at].to_string());
        }
        let found = observe(&mut socket);
        assert_eq!((found.rules.len(), found.fdb.len()), (300, 1));
    });
}
