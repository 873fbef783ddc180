//! Mutation tests of the parsers for interfaces, addresses, routes and rules of other programs.

use netlink_packet_route::RouteNetlinkMessage;

use super::{devices, routing};
use crate::kernel::mutated::{ADDRESSES, LINKS, ROUTES, RULES, dumps};
use crate::types::Family;

#[test]
fn mutated_foreign_devices() {
    dumps("preflight devices", LINKS, |message| match message {
        RouteNetlinkMessage::NewLink(link) => devices::device(link).1.name.len() < 1 << 16,
        _ => false,
    });
    dumps("preflight addresses", ADDRESSES, |message| match message {
        RouteNetlinkMessage::NewAddress(found) => !devices::is_deprecated(&found),
        _ => false,
    });
}

#[test]
fn mutated_foreign_routing() {
    dumps("preflight routing rules", RULES, |message| match message {
        RouteNetlinkMessage::NewRule(found) => {
            let found = routing::foreign(&found, Family::V4);
            found.is_some_and(|rule| !rule.to_string().is_empty())
        }
        _ => false,
    });
    dumps("preflight routes", ROUTES, |message| match message {
        RouteNetlinkMessage::NewRoute(found) => {
            let _everything = routing::is_catch_all(&found);
            true
        }
        _ => false,
    });
}
