//! Mutation tests of the parsers for interfaces, addresses, routes and rules of other programs.

use netlink_packet_route::RouteNetlinkMessage;

use super::{devices, fast_paths, routing};
use crate::kernel::mutate;
use crate::kernel::mutated::{ADDRESSES, LINKS, ROUTES, RULES, dumps};
use crate::kernel::netlink::message::{Messages, Writer};
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

/// Filter of tc as the kernel lists it, with an action.
fn filter(kind: &str, option: u16, action: &str) -> Vec<u8> {
    let mut writer = Writer::default();
    let message = writer.message(44, 0, 1);
    writer.raw(&[0; 20]);
    writer.string(1, kind);
    writer.nest(2, |writer| {
        writer.attribute(9, &2_u32.to_ne_bytes());
        writer.nest(option, |writer| {
            writer.nest(1, |writer| {
                writer.string(1, action);
                let words = [0, 0, 0, 0, 0, 1, 7].map(u32::to_ne_bytes).concat();
                writer.nest(2, |writer| writer.attribute(2, &words));
            });
        });
    });
    writer.end(message);
    writer.finish().unwrap()
}

#[test]
fn mutated_foreign_tc_filters() {
    let corpus =
        [filter("u32", 7, "mirred"), filter("matchall", 2, "bpf"), filter("bpf", 1, "mirred")];
    mutate::messages("preflight tc filters", 64, &corpus, |input| {
        let mut found = fast_paths::Found::default();
        let messages = Messages::new(input).flatten();
        let read = messages.filter(|message| {
            fast_paths::qdisc(message).is_ok() & fast_paths::filter(message, &mut found).is_ok()
        });
        (read.count() > 0).then_some(4 * found.redirects.len() + found.ways.len())
    });
}
