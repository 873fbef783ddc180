//! Reads by this crate, and by other programs.

use std::fs;

use super::*;

#[test]
fn ip_and_bridge_agree() {
    harness::needs(&["ip", "bridge"]);
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
        let metrics: Vec<_> = routes.iter().map(|route| route["metric"].as_u64()).collect();
        assert_eq!(metrics, [Some(1024), Some(1024), Some(BACKSTOP_METRIC.into())]);

        for family in ["-4", "-6"] {
            let rules = json(&format!("ip -j {family} rule show"));
            let ours: Vec<_> = rules.iter().filter(|rule| rule["protocol"] == "69").collect();
            for (past, device) in [(0, "e0"), (1, "lo")] {
                assert_eq!(
                    (&ours[past]["priority"], &ours[past]["goto"]),
                    (&99.into(), &101.into())
                );
                assert_eq!(ours[past]["iif"], device);
                assert!(ours[past].get("not").is_none());
            }
            assert_eq!(ours[2]["priority"], 99);
            assert!(ours[2].get("not").is_some());
            assert_eq!(ours[2]["goto"], 101);
            assert_eq!(ours[3]["priority"], 100);
            assert_eq!(ours[3]["fwmark"], "0x1000000");
            assert_eq!(ours[3]["fwmask"], "0xff000000");
            assert_eq!(ours[3]["table"], "3000");
            assert_eq!(ours[4]["action"], "unreachable");
            if family == "-4" {
                let over = ours[5..].iter().find(|rule| rule["goto"] == 103).unwrap();
                assert_eq!(
                    (&over["priority"], &over["fwmark"]),
                    (&102.into(), &"0x1000000".into())
                );
            }
        }

        let entries = json("bridge -j fdb show dev e0");
        assert_eq!(entries.len(), 2);
        assert!(entries.iter().all(|entry| entry["state"] == "permanent"));
        let is_peer =
            |entry: &Value| entry["mac"] == "66:00:00:00:00:02" && entry["dst"] == "192.0.2.2";
        assert!(entries.iter().any(is_peer));
        let neighbours = sh("ip neigh show dev e0 nud permanent; ip -6 neigh show dev e0");
        assert!(
            neighbours.contains("10.9.0.9 lladdr 66:00:00:00:00:02 PERMANENT proto 69"),
            "{neighbours}"
        );
        let addresses = json("ip -j -6 addr show dev e0");
        assert_eq!(addresses[0]["addr_info"].as_array().unwrap().len(), 1);
        assert_eq!(addresses[0]["addr_info"][0]["nodad"], true);
    });
}

#[test]
fn what_has_our_number_and_another_shape_is_seen_as_it_is_and_deleted() {
    in_namespace(|| {
        let mut socket = RouteSocket::open().unwrap();
        sh("ip route add blackhole default table 3000 proto 69
            ip route add blackhole default table 3000 metric 9 proto 70
            ip route add 10.1.0.0/16 via 192.0.2.9 dev u0 table 3000 proto 69
            ip route add 10.2.0.0/16 table 3000 proto 69 nexthop via 192.0.2.8 nexthop via 192.0.2.9
            ip route add 10.3.0.0/16 via 192.0.2.9 dev u0 table 254 proto 69
            ip rule add pref 32765 from 10.0.0.0/8 lookup 3000 protocol 69");
        let found = observe(&mut socket);
        let texts: Vec<_> = found.strays.iter().map(ToString::to_string).collect();
        assert_eq!(
            texts,
            [
                "0.0.0.0/0 table 3000 proto 69",
                "10.1.0.0/16 via 192.0.2.9 table 3000 proto 69",
                "10.2.0.0/16 table 3000 proto 69",
                "pref 32765 lookup 3000 protocol 69",
            ]
        );
        assert_eq!(observe(&mut socket), found, "nothing of it changes by itself");
        for stray in found.strays {
            make(&mut socket, &Op::DeleteStrayRouting(stray.clone()));
            make(&mut socket, &Op::DeleteStrayRouting(stray));
        }
        assert!(observe(&mut socket).is_empty());
        harness::needs(&["ip"]);
        assert_eq!(sh("ip route show table all proto 69").lines().count(), 1);
        assert_eq!(sh("ip route show table 3000"), "blackhole default proto 70 metric 9 \n");
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
        assert!(!tables.contains(&252), "252 is a stand-in for tables above 255");
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
fn what_is_read_while_others_change_things_is_whole_or_refused() {
    in_namespace(|| {
        let mut socket = RouteSocket::open().unwrap();
        make(&mut socket, &Op::AddLink(vxlan()));
        let mut state = observe(&mut socket);
        // More than fit into one datagram: only then can a change come in between.
        for n in 0..2000_u32 {
            let address = std::net::Ipv4Addr::from(0x0a00_0000 + n);
            let net = format!("{address}/32").parse().unwrap();
            make(&mut socket, &Op::AddAddress(name("e0"), net));
            state.addresses.insert(net);
        }
        // A thread starts in the network namespace of the thread that spawns it.
        let other = thread::spawn(|| {
            sh("for n in $(seq 3000); do
                    echo addr add 192.0.2.77/24 dev u0
                    echo addr del 192.0.2.77/24 dev u0
                done | ip -batch -");
        });
        let mut whole = 0;
        while !other.is_finished() {
            let mut found = State::default();
            match socket.observe(&mut found) {
                Ok(()) => {
                    assert_eq!(found, state);
                    whole += 1;
                }
                Err(error) => assert!(error.is_transient(), "{error}"),
            }
        }
        other.join().unwrap();
        assert!(whole > 0);
    });
}
