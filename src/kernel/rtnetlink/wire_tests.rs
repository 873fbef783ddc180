//! Compares this crate's messages with those of `ip` and `bridge` for the same command.
//!
//! Attributes are compared as a set: their order means nothing to the kernel.

use std::fmt::Debug;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage,
    NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::route::{RouteMessage, RouteScope};

use super::{address, fdb, link, neighbour, route, rule};
use crate::state::{BACKSTOP_METRIC, Route, RouteKey, Rule, RuleAction, Vxlan};
use crate::types::{Family, Mark, TableId};

const ADD: u16 = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
const PUT: u16 = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE;

fn bytes(hex: &str) -> Vec<u8> {
    let digits: String = hex.split_whitespace().collect();
    (0..digits.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap())
        .collect()
}

/// Captured message and its flags.
fn read(hex: &str) -> (RouteNetlinkMessage, u16) {
    let bytes = bytes(hex);
    let message = NetlinkMessage::deserialize(&bytes).unwrap();
    assert_eq!(message.header.length as usize, bytes.len());
    match message.payload {
        NetlinkPayload::InnerMessage(inner) => (inner, message.header.flags),
        other => panic!("{other:?}"),
    }
}

/// All captured messages.
pub(crate) fn golden() -> Vec<Vec<u8>> {
    [
        ROUTE_VIA,
        ROUTE_THROW,
        ROUTE_UNREACHABLE,
        ROUTE_DELETE,
        RULE,
        RULE_UNREACHABLE,
        FDB,
        NEIGHBOUR,
        ADDRESS,
        LINK,
    ]
    .map(bytes)
    .to_vec()
}

/// Message as the kernel would parse it.
fn sent(message: RouteNetlinkMessage) -> RouteNetlinkMessage {
    let mut message = NetlinkMessage::from(message);
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    match NetlinkMessage::deserialize(&bytes).unwrap().payload {
        NetlinkPayload::InnerMessage(inner) => inner,
        other => panic!("{other:?}"),
    }
}

fn set<T: Debug>(attributes: &[T]) -> Vec<String> {
    let mut set: Vec<_> = attributes.iter().map(|a| format!("{a:?}")).collect();
    set.sort();
    set
}

fn parts(message: &RouteNetlinkMessage) -> (String, Vec<String>) {
    match message {
        RouteNetlinkMessage::NewRoute(m) | RouteNetlinkMessage::DelRoute(m) => {
            (format!("{:?}", m.header), set(&m.attributes))
        }
        RouteNetlinkMessage::NewRule(m) | RouteNetlinkMessage::DelRule(m) => {
            (format!("{:?}", m.header), set(&m.attributes))
        }
        RouteNetlinkMessage::NewNeighbour(m) => (format!("{:?}", m.header), set(&m.attributes)),
        RouteNetlinkMessage::NewAddress(m) => (format!("{:?}", m.header), set(&m.attributes)),
        RouteNetlinkMessage::NewLink(m) => {
            let mut m = m.clone();
            for attribute in &mut m.attributes {
                use netlink_packet_route::link::{InfoData, LinkAttribute, LinkInfo};
                let LinkAttribute::LinkInfo(infos) = attribute else {
                    continue;
                };
                for info in infos {
                    if let LinkInfo::Data(InfoData::Vxlan(data)) = info {
                        data.sort_by_key(|datum| format!("{datum:?}"));
                    }
                }
            }
            (format!("{:?}", m.header), set(&m.attributes))
        }
        other => panic!("{other:?}"),
    }
}

#[track_caller]
fn same(ours: RouteNetlinkMessage, flags: u16, hex: &str) {
    let (theirs, theirs_flags) = read(hex);
    assert_eq!(parts(&sent(ours)), parts(&theirs));
    assert_eq!(flags, theirs_flags);
}

fn key(dst: &str, metric: u32) -> RouteKey {
    RouteKey { table: TableId::new(3000).unwrap(), dst: dst.parse().unwrap(), metric }
}

/// Request of `ip route replace default via 10.9.0.9 dev e0 onlink table 3000 proto 69`.
const ROUTE_VIA: &str = "34000000 1800 0505 6096036b 00000000 \
    02000000 00450001 04000000 0800 0500 0a090009 0800 0f00 b80b0000 0800 0400 04000000";

/// Request of `ip route replace throw 10.0.0.0/8 table 3000 proto 69`.
const ROUTE_THROW: &str = "2c000000 1800 0505 6096036b 00000000 \
    02080000 00450009 00000000 0800 0100 0a000000 0800 0f00 b80b0000";

/// `ip -6 route replace unreachable 2001:db8::/32 table 3000 metric 4278198272 proto 69`.
const ROUTE_UNREACHABLE: &str = "40000000 1800 0505 6096036b 00000000 \
    0a200000 00450007 00000000 1400 0100 20010db8000000000000000000000000 \
    0800 0f00 b80b0000 0800 0600 002000ff";

/// Request of `ip route del default via 10.9.0.9 dev e0 onlink table 3000 proto 69`.
const ROUTE_DELETE: &str = "34000000 1900 0500 6096036b 00000000 \
    02000000 0045ff00 04000000 0800 0500 0a090009 0800 0f00 b80b0000 0800 0400 04000000";

/// Request of `ip rule add pref 100 fwmark 0x01000000/0xff000000 lookup 3000 protocol 69`.
const RULE: &str = "44000000 2000 0506 6096036b 00000000 02000000 00000001 00000000 \
    0800 0600 64000000 0800 0a00 00000001 0800 1000 000000ff 0800 0f00 b80b0000 0500 1500 45000000";

/// Request of `ip -6 rule add pref 101 fwmark 0x02000000/0xff000000 unreachable protocol 69`.
const RULE_UNREACHABLE: &str = "3c000000 2000 0506 6096036b 00000000 0a000000 00000007 00000000 \
    0800 0600 65000000 0800 0a00 00000002 0800 1000 000000ff 0500 1500 45000000";

/// Request of `ip rule add pref 99 not fwmark 0x01000000/0xff000000 goto 101 protocol 69`.
const RULE_PAST: &str = "44000000 2000 0506 6096036b 00000000 02000000 00000002 02000000 \
    0800 0600 63000000 0800 0a00 00000001 0800 1000 000000ff 0800 0400 65000000 0500 1500 45000000";

/// Request of `ip rule add pref 99 fwmark 0x01000000/0xff000000 iif lo goto 101 protocol 69`.
const RULE_HERE: &str = "4c000000 2000 0506 6096036b 00000000 02000000 00000002 00000000 \
    0800 0600 63000000 0800 0a00 00000001 0800 1000 000000ff 0700 0300 6c6f00 00 \
    0800 0400 65000000 0500 1500 45000000";

/// Request of `ip rule add pref 99 fwmark 0x01001000/0xff001000 goto 101 protocol 69`.
const RULE_OVER: &str = "44000000 2000 0506 6096036b 00000000 02000000 00000002 00000000 \
    0800 0600 63000000 0800 0a00 00100001 0800 1000 001000ff 0800 0400 65000000 0500 1500 45000000";

/// Request of `bridge fdb replace 66:00:00:00:00:02 dev e0 dst 192.0.2.2 self permanent`.
const FDB: &str = "30000000 1c00 0505 6196036b 00000000 07000000 04000000 c0000200 \
    0a00 0200 660000000002 0000 0800 0100 c0000202";

/// `ip neigh replace 10.9.0.9 lladdr 66:00:00:00:00:02 dev e0 nud permanent protocol 69`.
const NEIGHBOUR: &str = "38000000 1c00 0505 6196036b 00000000 02000000 04000000 80000000 \
    0500 0c00 45000000 0800 0100 0a090009 0a00 0200 660000000002 0000";

/// Request of `ip -6 addr add fd09::1/64 dev e0 nodad`.
const ADDRESS: &str = "40000000 1400 0506 6096036b 00000000 0a400200 04000000 \
    1400 0200 fd090000000000000000000000000001 1400 0100 fd090000000000000000000000000001";

/// Request of `ip link add` for the sample device.
///
/// `ip link add e0 address 66:f7:06:23:81:6b mtu 1400 group 1701278328 type vxlan id 7
/// local 192.0.2.1 dev u0 dstport 4790 nolearning`
const LINK: &str = "80000000 1000 0506 6096036b 00000000 00000000 00000000 00000000 00000000 \
    0a00 0100 66f70623816b 0000 0800 0400 78050000 \
    0800 1b00 78726765 0700 0300 6530 00 00 \
    3c00 1200 0900 0100 76786c616e 000000 \
    2c00 0200 0800 0300 03000000 0800 0100 07000000 0800 0400 c0000201 \
    0500 0700 00 000000 0600 0f00 12b6 0000";

#[test]
fn routes_are_written_as_ip_writes_them() {
    let via = Route::Via([10, 9, 0, 9].into());
    let default = key("0.0.0.0/0", 0);
    let message = route::message(&default, via, 4);
    same(RouteNetlinkMessage::NewRoute(message), PUT, ROUTE_VIA);
    let message = route::message(&key("10.0.0.0/8", 0), Route::Throw, 0);
    same(RouteNetlinkMessage::NewRoute(message), PUT, ROUTE_THROW);
    let unreachable = key("2001:db8::/32", BACKSTOP_METRIC);
    let message = route::message(&unreachable, Route::Unreachable, 0);
    same(RouteNetlinkMessage::NewRoute(message), PUT, ROUTE_UNREACHABLE);
}

#[test]
fn a_route_is_deleted_by_its_kind_too() {
    let default = key("0.0.0.0/0", 0);
    let mut message = route::message(&default, Route::Via([10, 9, 0, 9].into()), 4);
    message.header.scope = RouteScope::NoWhere;
    let (RouteNetlinkMessage::DelRoute(mut theirs), _) = read(ROUTE_DELETE) else {
        panic!("not a deletion");
    };
    // `ip` leaves the route type open; an IPv4 metric of 0 would then match the backstop route.
    assert_eq!(u8::from(theirs.header.kind), 0);
    theirs.header.kind = message.header.kind;
    let ours = sent(RouteNetlinkMessage::DelRoute(message));
    assert_eq!(parts(&ours), parts(&RouteNetlinkMessage::DelRoute(theirs)));
}

#[test]
fn routes_are_read_as_ip_writes_them() {
    let cases = [
        (ROUTE_VIA, key("0.0.0.0/0", 0), Route::Via([10, 9, 0, 9].into())),
        (ROUTE_THROW, key("10.0.0.0/8", 0), Route::Throw),
        (ROUTE_UNREACHABLE, key("2001:db8::/32", BACKSTOP_METRIC), Route::Unreachable),
    ];
    for (hex, key, expected) in cases {
        let (RouteNetlinkMessage::NewRoute(message), _) = read(hex) else {
            panic!("not a route");
        };
        assert_eq!(route::parse(&message, Some(4)), Some((key, expected)));
    }
}

#[test]
fn a_route_of_another_shape_is_not_ours() {
    let (RouteNetlinkMessage::NewRoute(message), _) = read(ROUTE_VIA) else {
        panic!("not a route");
    };
    assert_eq!(route::parse(&message, Some(5)), None, "another device");
    assert_eq!(route::parse(&message, None), None, "no device of ours");
    let spoils: [fn(&mut RouteMessage); 5] = [
        |m| m.header.protocol = 4.into(),
        |m| m.header.tos = 4,
        |m| m.header.source_prefix_length = 8,
        |m| m.header.kind = 6.into(),
        |m| m.header.kind = 9.into(),
    ];
    for spoil in spoils {
        let mut message = message.clone();
        spoil(&mut message);
        assert_eq!(route::parse(&message, Some(4)), None, "{message:?}");
    }
}

fn rules() -> [(Rule, &'static str); 5] {
    let rule = |family, priority, mark, action| Rule {
        family,
        priority,
        mark: Mark::new(mark),
        mask: 0xff00_0000,
        inverted: false,
        input: None,
        action,
    };
    let table = TableId::new(3000).unwrap();
    let past = rule(Family::V4, 99, 0x0100_0000, RuleAction::Goto(101));
    [
        (rule(Family::V4, 100, 0x0100_0000, RuleAction::Lookup(table)), RULE),
        (rule(Family::V6, 101, 0x0200_0000, RuleAction::Unreachable), RULE_UNREACHABLE),
        (Rule { input: Some("lo".parse().unwrap()), ..past.clone() }, RULE_HERE),
        (Rule { mark: Mark::new(0x0100_1000), mask: 0xff00_1000, ..past.clone() }, RULE_OVER),
        (Rule { inverted: true, ..past }, RULE_PAST),
    ]
}

#[test]
fn rules_are_written_and_read_as_ip_writes_them() {
    for (rule, hex) in rules() {
        same(RouteNetlinkMessage::NewRule(rule::message(&rule)), ADD, hex);
        let (RouteNetlinkMessage::NewRule(message), _) = read(hex) else {
            panic!("not a rule");
        };
        assert_eq!(rule::parse(&message, rule.family), Some(rule));
    }
}

#[test]
fn a_rule_of_another_shape_is_not_ours() {
    use netlink_packet_route::rule::{RuleAttribute, RuleFlags, RuleMessage};
    let [(ours, _), ..] = rules();
    let spoils: [fn(&mut RuleMessage); 9] = [
        |m| m.attributes.push(RuleAttribute::Goto(101)),
        |m| m.header.flags = RuleFlags::Invert,
        |m| m.header.src_len = 8,
        |m| m.header.tos = 4,
        |m| m.attributes.push(RuleAttribute::Iifname("e0".into())),
        |m| m.attributes.push(RuleAttribute::Protocol(4.into())),
        |m| m.attributes.push(RuleAttribute::SuppressPrefixLen(0)),
        |m| {
            m.attributes.retain(|a| !matches!(a, RuleAttribute::Protocol(_)));
        },
        |m| {
            m.attributes.retain(|a| !matches!(a, RuleAttribute::FwMask(_)));
        },
    ];
    for spoil in spoils {
        let mut message = rule::message(&ours);
        spoil(&mut message);
        assert_eq!(rule::parse(&message, ours.family), None, "{message:?}");
    }
}

#[test]
fn what_is_on_the_device_is_written_as_ip_and_bridge_write_it() {
    let mac = "66:00:00:00:00:02".parse().unwrap();
    let message = fdb::message(4, mac, [192, 0, 2, 2].into());
    same(RouteNetlinkMessage::NewNeighbour(message), PUT, FDB);
    let message = neighbour::permanent(4, [10, 9, 0, 9].into(), mac);
    same(RouteNetlinkMessage::NewNeighbour(message), PUT, NEIGHBOUR);
    let mut message = address::message(4, "fd09::1/64".parse().unwrap());
    message.header.flags = netlink_packet_route::address::AddressHeaderFlags::Nodad;
    same(RouteNetlinkMessage::NewAddress(message), ADD, ADDRESS);
}

#[test]
fn forwarding_entries_are_read_in_both_families() {
    let mac = "66:00:00:00:00:02".parse().unwrap();
    for node in ["192.0.2.2", "2001:db8::2"] {
        let node = node.parse().unwrap();
        let message = RouteNetlinkMessage::NewNeighbour(fdb::message(4, mac, node));
        let RouteNetlinkMessage::NewNeighbour(read) = sent(message) else {
            panic!("not an entry");
        };
        assert_eq!(neighbour::destination(&read.attributes), Some(node));
        assert_eq!(neighbour::lladdr(&read.attributes), Some(mac));
    }
}

#[test]
fn the_device_is_written_as_ip_writes_it() {
    let device = Vxlan {
        name: "e0".parse().unwrap(),
        vni: 7,
        port: 4790,
        local: [192, 0, 2, 1].into(),
        underlay: Some("u0".parse().unwrap()),
        mac: "66:f7:06:23:81:6b".parse().unwrap(),
        mtu: 1400,
        rp_filter: 2,
        up: true,
        intact: true,
    };
    let message = RouteNetlinkMessage::NewLink(link::create(&device, 3));
    same(message, ADD, LINK);
}
