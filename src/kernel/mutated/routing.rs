//! Answers of the routing subsystem, damaged.

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::AddressAttribute;
use netlink_packet_route::link::LinkAttribute;
use netlink_packet_route::neighbour::NeighbourAttribute;
use netlink_packet_route::route::RouteAttribute;
use netlink_packet_route::rule::RuleAttribute;

use super::{answers, golden_acks};
use crate::error::KernelError;
use crate::kernel::mutate;
use crate::kernel::netlink::exchange::{Answer, Answered, Outcome};
use crate::kernel::netlink::message::{Message, flag};
use crate::kernel::netlink::socket::NETLINK_ROUTE;
use crate::kernel::rtnetlink::link::Device;
use crate::kernel::rtnetlink::socket::object;
use crate::kernel::rtnetlink::wire_tests::golden;
use crate::kernel::rtnetlink::{address, fdb, neighbour, route, rule};
use crate::types::Family;

const SEQUENCE: u32 = 1;

/// The kernel's answers to dumps of a type, by family, and what others write of the same kinds.
fn corpus(kind: u16, body: usize, families: &[u8]) -> Vec<Vec<u8>> {
    let request = |family: &u8| {
        let mut body = vec![0; body];
        body[0] = *family;
        (kind, flag::DUMP, body)
    };
    let mut found = answers(NETLINK_ROUTE, families.iter().map(request).collect());
    found.extend(golden());
    found.extend(golden_acks());
    for message in &mut found {
        message[8..12].copy_from_slice(&SEQUENCE.to_ne_bytes());
    }
    found
}

/// Gives damaged answers to a dump to `take`, by way of what reads all of them.
pub(crate) fn dumps(
    what: &str,
    (kind, body, families): (u16, usize, &[u8]),
    mut take: impl FnMut(RouteNetlinkMessage) -> bool,
) {
    mutate::messages(what, 64, &corpus(kind, body, families), |input| {
        let (mut size, mut count) = (0, 0);
        let mut each = |message| {
            size += held(&message);
            count += usize::from(take(message));
        };
        let _answered = answered(input, &mut each);
        (count > 0).then_some(size)
    });
}

/// Reads a datagram of the answer to a dump.
fn answered(
    input: &[u8],
    each: &mut dyn FnMut(RouteNetlinkMessage),
) -> Result<Answered, KernelError> {
    let mut take = |message: &Message<'_>| object(message).map(&mut *each);
    let mut answer = Answer::new(SEQUENCE, flag::DUMP, &mut take);
    let mut outcome = Outcome::default();
    outcome.read(input, &mut |message| answer.read(message));
    answer.finish("ip show", outcome)
}

/// Bytes of memory that the attributes of a message take, but for what they point to.
fn held(message: &RouteNetlinkMessage) -> usize {
    match message {
        RouteNetlinkMessage::NewLink(m) | RouteNetlinkMessage::DelLink(m) => {
            m.attributes.len() * size_of::<LinkAttribute>()
        }
        RouteNetlinkMessage::NewAddress(m) | RouteNetlinkMessage::DelAddress(m) => {
            m.attributes.len() * size_of::<AddressAttribute>()
        }
        RouteNetlinkMessage::NewNeighbour(m) | RouteNetlinkMessage::DelNeighbour(m) => {
            m.attributes.len() * size_of::<NeighbourAttribute>()
        }
        RouteNetlinkMessage::NewRoute(m) | RouteNetlinkMessage::DelRoute(m) => {
            m.attributes.len() * size_of::<RouteAttribute>()
        }
        RouteNetlinkMessage::NewRule(m) | RouteNetlinkMessage::DelRule(m) => {
            m.attributes.len() * size_of::<RuleAttribute>()
        }
        _ => 0,
    }
}

pub(crate) const LINKS: (u16, usize, &[u8]) = (18, 16, &[0]);
pub(crate) const ADDRESSES: (u16, usize, &[u8]) = (22, 8, &[2, 10]);
pub(crate) const ROUTES: (u16, usize, &[u8]) = (26, 12, &[2, 10]);
pub(crate) const RULES: (u16, usize, &[u8]) = (34, 12, &[2, 10]);
const NEIGHBOURS: (u16, usize, &[u8]) = (30, 12, &[2, 10]);
const FDB: (u16, usize, &[u8]) = (30, 12, &[7]);

#[test]
fn mutated_links() {
    dumps("links", LINKS, |message| match message {
        RouteNetlinkMessage::NewLink(link) => Device::parse(link).name.len() < 1 << 16,
        _ => false,
    });
}

#[test]
fn mutated_addresses() {
    dumps("addresses", ADDRESSES, |message| match message {
        RouteNetlinkMessage::NewAddress(found) => address::parse(&found).is_some(),
        _ => false,
    });
}

#[test]
fn mutated_neighbours() {
    dumps("neighbours", NEIGHBOURS, |message| match message {
        RouteNetlinkMessage::NewNeighbour(found) => neighbour::parse(&found).is_some(),
        _ => false,
    });
}

#[test]
fn mutated_forwarding_entries() {
    dumps("forwarding entries", FDB, |message| match message {
        RouteNetlinkMessage::NewNeighbour(found) => fdb::parse(&found).is_some(),
        _ => false,
    });
}

#[test]
fn mutated_routes() {
    dumps("routes", ROUTES, |message| match message {
        RouteNetlinkMessage::NewRoute(found) => {
            let _table = route::table(&found);
            let oif = [None, Some(2), Some(4)];
            let parsed = oif.into_iter().filter_map(|oif| route::parse(&found, oif)).next_back();
            // What was read can be written.
            parsed.map(|(key, parsed)| route::message(&key, parsed, 4)).is_some()
        }
        _ => false,
    });
}

#[test]
fn mutated_rules() {
    dumps("rules", RULES, |message| match message {
        RouteNetlinkMessage::NewRule(found) => {
            let parsed = Family::BOTH.into_iter().filter_map(|family| rule::parse(&found, family));
            parsed
                .filter(|parsed| {
                    rule::parse(&rule::message(parsed), parsed.family) == Some(parsed.clone())
                })
                .count()
                > 0
        }
        _ => false,
    });
}

#[test]
fn mutated_route_answers() {
    dumps("routing acknowledgements", LINKS, |_| true);
    mutate::messages("routing refusals", 4, &corpus(LINKS.0, LINKS.1, &[0]), |input| {
        let error = answered(input, &mut |_| {}).err();
        Some(error.and_then(|error| error.words().map(str::len)).unwrap_or(0))
    });
}
