//! VXLAN device: created, changed, and told apart from other programs' devices.

use std::fs;
use std::net::UdpSocket;

use super::*;

#[test]
fn a_device_that_is_not_ours_is_left_alone() {
    in_namespace(|| {
        let mut socket = RouteSocket::open().unwrap();
        for (make_it, kind) in [
            ("ip link add e0 type vxlan id 7 local 192.0.2.1 dstport 4790", "without alias"),
            ("ip link add e0 type veth peer name e1; ip link set e0 alias egress-datapath", "veth"),
        ] {
            sh(make_it);
            let before = snapshot();
            let error = socket.make_one(&Op::AddLink(vxlan())).unwrap_err();
            assert!(error.is_exists(), "{kind}: {error}");
            assert!(error.remedy().unwrap().contains("another program"), "{error}");
            let peer = "66:00:00:00:00:02".parse().unwrap();
            for op in [
                Op::SetLink(vxlan()),
                Op::DeleteLink(name("e0")),
                Op::AddAddress(name("e0"), "10.9.0.1/16".parse().unwrap()),
                Op::PutFdb(name("e0"), peer, [192, 0, 2, 2].into()),
                Op::PutNeighbour(name("e0"), [10, 9, 0, 9].into(), peer),
            ] {
                let error = socket.make_one(&op).unwrap_err();
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
        let error = socket.make_one(&Op::AddLink(link)).unwrap_err();
        assert!(error.is_exists(), "{error}");
        assert!(error.remedy().unwrap().contains("VNI"), "{error}");
    });
}

#[test]
fn a_half_made_device_is_finished_or_deleted_and_a_refused_one_is_removed() {
    in_namespace(|| {
        let mut socket = RouteSocket::open().unwrap();
        let before = snapshot();
        let half_made = "ip link add e0 group 1701278328 type vxlan id 7 local 192.0.2.1 \
                         dev u0 dstport 4790 nolearning";
        sh(half_made);
        make(&mut socket, &Op::SetLink(vxlan()));
        assert_eq!(observe(&mut socket).link, Some(vxlan()));
        make(&mut socket, &Op::DeleteLink(name("e0")));
        sh(half_made);
        assert!(observe(&mut socket).link.is_some());
        make(&mut socket, &Op::DeleteLink(name("e0")));
        assert_eq!(snapshot(), before);

        let link = Vxlan { underlay: Some(name("missing")), ..vxlan() };
        let error = socket.make_one(&Op::AddLink(link)).unwrap_err();
        assert!(error.is_not_found(), "{error}");
        assert!(error.remedy().unwrap().contains("underlay"), "{error}");

        // The device is created and named, but cannot come up while another socket has the port.
        let _taken = UdpSocket::bind("0.0.0.0:4999").unwrap();
        let link = Vxlan { port: 4999, ..vxlan() };
        let error = socket.make_one(&Op::AddLink(link)).unwrap_err();
        assert_eq!(error.errno(), Some(98), "EADDRINUSE: {error}");
        assert_eq!(snapshot(), before);
    });
}

fn index_of(socket: &mut RouteSocket, device: &str) -> u32 {
    let devices = socket.all_devices().unwrap();
    let (index, _) = devices.into_iter().find(|(_, it)| it.name == device).unwrap();
    index
}

#[test]
fn the_device_is_changed_without_being_made_anew() {
    in_namespace(|| {
        let mut socket = RouteSocket::open().unwrap();
        sh("ip addr add 192.0.2.3/24 dev u0");
        make(&mut socket, &Op::AddLink(vxlan()));
        let index = index_of(&mut socket, "e0");
        let changes: [fn(&mut Vxlan); 7] = [
            |link| link.mac = "66:00:00:00:00:99".parse().unwrap(),
            |link| link.mtu = 1300,
            |link| link.rp_filter = 0,
            |link| link.local = [192, 0, 2, 3].into(),
            |link| link.underlay = Some(name("u1")),
            |link| link.up = false,
            |link| *link = vxlan(),
        ];
        let mut link = vxlan();
        for (at, change) in changes.iter().enumerate() {
            change(&mut link);
            make(&mut socket, &Op::SetLink(link.clone()));
            assert_eq!(observe(&mut socket).link.as_ref(), Some(&link), "change {at}");
        }
        assert_eq!(index_of(&mut socket, "e0"), index);

        let unchangeable: [fn(&mut Vxlan); 4] = [
            |link| link.underlay = None,
            |link| link.vni = 8,
            |link| link.port = 4791,
            |link| link.local = "2001:db8::1".parse().unwrap(),
        ];
        for change in unchangeable {
            let mut link = vxlan();
            change(&mut link);
            let error = socket.make_one(&Op::SetLink(link)).unwrap_err();
            assert!(error.remedy().unwrap().contains("delete the device"), "{error}");
        }
    });
}

#[test]
fn a_device_that_others_have_changed_is_known_and_put_right() {
    in_namespace(|| {
        let mut socket = RouteSocket::open().unwrap();
        make(&mut socket, &Op::AddLink(vxlan()));
        assert_eq!(observe(&mut socket).link, Some(vxlan()));
        sh("ip link add br0 type bridge; ip link set br0 addrgenmode none");
        for script in [
            "ip link set e0 alias ''",
            "ip link set e0 alias 'uplink of rack 7'",
            "ip link set e0 group 7",
            "ip link set e0 master br0",
            "ip link set e0 type vxlan learning",
            "ip link set e0 type vxlan ttl 3",
        ] {
            sh(script);
            let intact = false;
            assert_eq!(observe(&mut socket).link, Some(Vxlan { intact, ..vxlan() }), "{script}");
            make(&mut socket, &Op::SetLink(vxlan()));
            assert_eq!(observe(&mut socket).link, Some(vxlan()), "{script}");
        }
        sh("ip link set e0 alias '' group 0");
        assert_eq!(observe(&mut socket).link, None, "whoever takes both away has it");
    });
}

#[test]
fn forwarding_entries_that_lead_elsewhere_are_seen_and_go_at_once() {
    in_namespace(|| {
        let mut socket = RouteSocket::open().unwrap();
        make(&mut socket, &Op::AddLink(vxlan()));
        sh("for node in 2 3 4; do
                bridge fdb append 00:00:00:00:00:00 dev e0 dst 192.0.2.$node self permanent
                bridge fdb append 01:00:5e:00:00:01 dev e0 dst 192.0.2.$node self permanent
            done
            bridge fdb add 66:00:00:00:00:05 dev e0 dst 192.0.2.5 port 99 self permanent
            bridge fdb add 66:00:00:00:00:06 dev e0 dst 192.0.2.6 vni 99 self permanent");
        let found = observe(&mut socket).fdb;
        assert_eq!(found.len(), 4);
        assert_eq!(found.values().filter(|node| node.is_unspecified()).count(), 2);
        for (mac, node) in found {
            make(&mut socket, &Op::DeleteFdb(name("e0"), mac, node));
        }
        assert!(observe(&mut socket).fdb.is_empty());
        harness::needs(&["bridge"]);
        assert_eq!(sh("bridge fdb show dev e0"), "");
    });
}

#[test]
fn an_ipv6_underlay_and_a_device_that_stays_down() {
    in_namespace(|| {
        let mut socket = RouteSocket::open().unwrap();
        let link = Vxlan { local: "2001:db8::1".parse().unwrap(), up: false, ..vxlan() };
        make(&mut socket, &Op::AddLink(link.clone()));
        assert_eq!(observe(&mut socket).link, Some(link.clone()));
        let mac = "66:00:00:00:00:02".parse().unwrap();
        let node = "2001:db8::2".parse().unwrap();
        make(&mut socket, &Op::PutFdb(name("e0"), mac, node));
        assert_eq!(observe(&mut socket).fdb, [(mac, node)].into());

        let via = Route::Via([10, 9, 0, 9].into());
        let op = Op::PutRoute(name("e0"), key(3000, "0.0.0.0/0", 0), via);
        let error = socket.make_one(&op).unwrap_err();
        assert_eq!(error.errno(), Some(100), "ENETDOWN: {error}");
        make(&mut socket, &Op::SetLink(Vxlan { up: true, ..link }));
        make(&mut socket, &op);
        assert_eq!(observe(&mut socket).routes.len(), 1);
    });
}

#[test]
fn without_ipv6_on_the_device_the_rest_works() {
    in_namespace(|| {
        let mut socket = RouteSocket::open().unwrap();
        fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1").unwrap();
        make(&mut socket, &Op::AddLink(vxlan()));
        make(&mut socket, &Op::AddAddress(name("e0"), "10.9.0.1/16".parse().unwrap()));
        let state = observe(&mut socket);
        assert_eq!((state.link, state.addresses.len()), (Some(vxlan()), 1));
        // Below an MTU of 1280 the kernel disables IPv6 on the interface.
        let link = Vxlan { mtu: 1000, ..vxlan() };
        make(&mut socket, &Op::SetLink(link.clone()));
        assert_eq!(observe(&mut socket).link, Some(link.clone()));
        make(&mut socket, &Op::DeleteLink(name("e0")));
        make(&mut socket, &Op::AddLink(link.clone()));
        assert_eq!(observe(&mut socket).link, Some(link));
    });
}

#[test]
fn ipv6_enabled_with_first_ipv6_address() {
    in_namespace(|| {
        let mut socket = RouteSocket::open().unwrap();
        fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1").unwrap();
        make(&mut socket, &Op::AddLink(vxlan()));
        let op = Op::AddAddress(name("e0"), "fd09::1/64".parse().unwrap());
        for _ in 0..2 {
            assert!(observe(&mut socket).missing.families.is_empty());
            make(&mut socket, &op);
            assert_eq!(observe(&mut socket).addresses.len(), 1);
            fs::write("/proc/sys/net/ipv6/conf/e0/disable_ipv6", "1").unwrap();
            assert!(observe(&mut socket).addresses.is_empty());
        }
        // A thread in another namespace may not enable it, whatever has that name there.
        thread::scope(|scope| {
            let elsewhere = scope.spawn(|| {
                in_namespace(|| {
                    make(&mut RouteSocket::open().unwrap(), &Op::AddLink(vxlan()));
                    let setting = "/proc/sys/net/ipv6/conf/e0/disable_ipv6";
                    fs::write(setting, "1").unwrap();
                    let error = socket.make_one(&op).unwrap_err().to_string();
                    assert!(error.contains("another network namespace"), "{error}");
                    assert_eq!(observe(&mut socket).missing.families, [Family::V6].into());
                    assert_eq!(fs::read_to_string(setting).unwrap().trim(), "1");
                });
            });
            elsewhere.join().unwrap();
        });
    });
}

#[test]
fn ipv4_forwarding_of_the_device_is_not_the_default_of_the_host() {
    in_namespace(|| {
        let mut socket = RouteSocket::open().unwrap();
        fs::write("/proc/sys/net/ipv4/conf/default/forwarding", "0").unwrap();
        make(&mut socket, &Op::AddLink(vxlan()));
        let setting = "/proc/sys/net/ipv4/conf/e0/forwarding";
        assert_eq!(fs::read_to_string(setting).unwrap().trim(), "1");
        assert_eq!(observe(&mut socket).link, Some(vxlan()));
        fs::write(setting, "0").unwrap();
        assert!(!observe(&mut socket).link.unwrap().intact);
        make(&mut socket, &Op::SetLink(vxlan()));
        assert_eq!(fs::read_to_string(setting).unwrap().trim(), "1");
    });
}

#[test]
fn without_the_privilege_the_error_names_it() {
    in_namespace(|| {
        let mut socket = RouteSocket::open().unwrap();
        make(&mut socket, &Op::AddLink(vxlan()));
        let mut sets = rustix::thread::capabilities(None).unwrap();
        sets.effective.remove(rustix::thread::CapabilitySet::NET_ADMIN);
        rustix::thread::set_capabilities(None, sets).unwrap();
        let op = Op::AddRule(rule(Family::V4, 100, lookup(3000)));
        let error = socket.make_one(&op).unwrap_err();
        assert!(error.is_denied(), "{error}");
        assert!(error.to_string().contains("CAP_NET_ADMIN"), "{error}");
        assert_eq!(observe(&mut socket).link, Some(vxlan()), "reading needs none");
    });
}
