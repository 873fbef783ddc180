//! Which messages are about what is ours.

use netlink_packet_core::{NetlinkDeserializable, NetlinkHeader};
use netlink_packet_route::AddressFamily;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::LinkMessage;
use netlink_packet_route::neighbour::{NeighbourAttribute, NeighbourMessage, NeighbourState};

use super::echo::Expected;
use super::filter::{DELROUTE, NEWROUTE, OWN_TABLES, REPLACE};
use crate::event::{News, Part, Process};
use crate::kernel::netlink::message::{Attribute, Attributes, Message};
use crate::kernel::nft;
use crate::kernel::rtnetlink::address;
use crate::kernel::rtnetlink::address::is_link_local;
use crate::kernel::rtnetlink::link::Device;
use crate::kernel::rtnetlink::{fdb, neighbour};
use crate::state::{LINK_ALIAS, NFT_TABLE, PROTOCOL, TableFamily};

// Types of messages, with the lengths of the structures that they begin with.
const NEWLINK: u16 = 16;
const DELLINK: u16 = 17;
const NEWADDR: u16 = 20;
const DELADDR: u16 = 21;
const NEWNEIGH: u16 = 28;
const DELNEIGH: u16 = 29;
const NEWRULE: u16 = 32;
const DELRULE: u16 = 33;
const NEWNETCONF: u16 = 80;
const LINK: usize = 16;
const ROUTE: usize = 12;
const RULE: usize = 12;
const NETCONF: usize = 4;

const IFLA_IFALIAS: u16 = 20;
const RTA_OIF: u16 = 4;
const FRA_PROTOCOL: u16 = 21;
const NETCONFA_IFINDEX: u16 = 1;
const NETCONFA_RP_FILTER: u16 = 3;

/// Subsystem 10 of netfilter, and the message that ends each of its transactions.
const NF_TABLES: u16 = 10;
const NEWGEN: u16 = 0xa0f;

/// Adds what a message tells to the news.
///
/// `unsigned` is whether our table was touched in a transaction that has not ended yet: who made
/// it is said at the end, and the news waits for that.
pub(crate) fn read(
    message: &Message<'_>,
    expected: &mut Expected,
    unsigned: &mut bool,
    news: &mut News,
) {
    if message.kind == NEWGEN {
        if std::mem::take(unsigned) {
            news.changed.insert(Part::Firewall);
            news.writers.extend(writer(message));
        }
    } else if message.kind >> 8 == NF_TABLES {
        *unsigned |= is_our_table(message);
    } else {
        news.changed.extend(part(message, expected));
    }
}

/// The generation of the rules that a transaction led to, where a message tells of one.
pub(crate) fn generation(message: &Message<'_>) -> Option<u32> {
    let end = Some(message).filter(|message| message.kind == NEWGEN)?;
    attribute(end.payload(), 4, 1)?.be32().ok()
}

fn is_our_table(message: &Message<'_>) -> bool {
    let body = message.payload();
    // In every kind of message about tables the first attribute is the table's name.
    let families = TableFamily::BOTH.map(nft::family_number);
    body.first().is_some_and(|family| families.contains(family))
        && attribute(body, 4, 1).is_some_and(|name| name.text() == Ok(NFT_TABLE))
}

fn writer(message: &Message<'_>) -> Option<Process> {
    let pid = attribute(message.payload(), 4, 2)?.be32().ok()?;
    let name = attribute(message.payload(), 4, 3)?;
    let name = String::from_utf8_lossy(name.bytes());
    Some(Process { pid, name: name.trim_end_matches('\0').to_owned() })
}

fn part(message: &Message<'_>, expected: &mut Expected) -> Option<Part> {
    let body = message.payload();
    match message.kind {
        NEWLINK | DELLINK => is_link_news(message, expected).then_some(Part::Link),
        NEWADDR | DELADDR if expected.concerns(index(body)) => {
            is_address_news(message, expected).then_some(Part::Address)
        }
        NEWNEIGH | DELNEIGH if expected.concerns(index(body)) => neighbour_news(message, expected),
        NEWROUTE | DELROUTE => is_route_news(message, expected).then_some(Part::Route),
        NEWRULE | DELRULE => {
            let protocol = attribute(body, RULE, FRA_PROTOCOL);
            protocol.is_some_and(|protocol| protocol.bytes() == [PROTOCOL]).then_some(Part::Rule)
        }
        NEWNETCONF => is_setting_news(body, expected).then_some(Part::Link),
        _ => None,
    }
}

fn is_link_news(message: &Message<'_>, expected: &mut Expected) -> bool {
    let index = index(message.payload());
    let deleted = message.kind == DELLINK;
    if expected.is_leaving(index) {
        if deleted {
            expected.has_left();
        }
        return false;
    }
    if !expected.concerns(index) {
        let alias = attribute(message.payload(), LINK, IFLA_IFALIAS);
        return alias.is_some_and(|alias| alias.text() == Ok(LINK_ALIAS));
    }
    match link(message) {
        Some(link) if !deleted => !expected.is_expected(&Device::parse(link)),
        _ => true,
    }
}

fn is_address_news(message: &Message<'_>, expected: &mut Expected) -> bool {
    let found = match typed(message) {
        Some(RouteNetlinkMessage::NewAddress(found) | RouteNetlinkMessage::DelAddress(found)) => {
            address::parse(&found)
        }
        _ => None,
    };
    // What cannot be read may be anything.
    found.is_none_or(|(_, net)| {
        !is_link_local(net.addr()) && !expected.is_expected_address(net, message.kind == NEWADDR)
    })
}

fn neighbour_news(message: &Message<'_>, expected: &mut Expected) -> Option<Part> {
    let Some(RouteNetlinkMessage::NewNeighbour(found) | RouteNetlinkMessage::DelNeighbour(found)) =
        typed(message)
    else {
        return Some(Part::Neighbour);
    };
    let deleted = message.kind == DELNEIGH;
    if found.header.family == AddressFamily::Bridge {
        // Kernels before 6.13 tell of a write twice: the device does, and then, without most of
        // it, whoever has handed it over.
        let told = |attribute: &_| matches!(attribute, NeighbourAttribute::CacheInfo(_));
        if !found.attributes.iter().any(told) {
            return None;
        }
        let entry = fdb::parse(&found);
        let mac = neighbour::lladdr(&found.attributes)?;
        let news = match entry {
            Some((_, node)) if !deleted => !expected.is_expected_fdb(mac, Some(node)),
            _ if deleted => !expected.is_expected_fdb(mac, None),
            _ => true,
        };
        return news.then_some(Part::Fdb);
    }
    (deleted || may_be_permanent(&found)).then_some(())?;
    let address = neighbour::destination(&found.attributes);
    let news = address.is_none_or(|ip| {
        let ours = !ip.is_multicast() && !is_link_local(ip);
        ours && !(deleted && expected.is_expected_to_go(ip))
    });
    news.then_some(Part::Neighbour)
}

/// Whether it is or may have been permanent; the kernel resolves one that never was without end
/// while somebody sends to it.
fn may_be_permanent(found: &NeighbourMessage) -> bool {
    !matches!(
        found.header.state,
        NeighbourState::Incomplete
            | NeighbourState::Failed
            | NeighbourState::Delay
            | NeighbourState::Probe
    )
}

fn is_route_news(message: &Message<'_>, expected: &Expected) -> bool {
    let body = message.payload();
    let (Some(table), Some(protocol)) = (body.get(4), body.get(5)) else {
        return true;
    };
    let replaces = message.kind == NEWROUTE && message.flags & REPLACE != 0;
    if *protocol != PROTOCOL {
        return replaces && *table < OWN_TABLES;
    }
    // IPv6 tells of every route that goes with a device, IPv4 of none.
    let oif = attribute(body, ROUTE, RTA_OIF).and_then(|oif| oif.u32().ok());
    !(message.kind == DELROUTE && oif.is_some_and(|oif| expected.is_leaving(oif)))
}

/// Whether this is a change of `rp_filter` alone, as `sysctl` makes it; a new device has more to
/// tell.
fn is_setting_news(body: &[u8], expected: &Expected) -> bool {
    let number = |kind| attribute(body, NETCONF, kind).and_then(|number| number.u32().ok());
    let alone = Attributes::new(body.get(NETCONF..).unwrap_or_default()).count() == 2;
    let index = number(NETCONFA_IFINDEX).unwrap_or_default();
    let value = number(NETCONFA_RP_FILTER).filter(|_| alone && expected.concerns(index));
    value.is_some_and(|value| !expected.is_expected_rp_filter(value))
}

/// Index of the device, which is at the same place for devices, addresses and neighbours.
fn index(body: &[u8]) -> u32 {
    let bytes = body.get(4..8).and_then(|bytes| bytes.try_into().ok());
    bytes.map(u32::from_ne_bytes).unwrap_or_default()
}

fn attribute(body: &[u8], header: usize, kind: u16) -> Option<Attribute<'_>> {
    let mut attributes = Attributes::new(body.get(header..)?).map_while(Result::ok);
    attributes.find(|attribute| attribute.kind == kind)
}

fn link(message: &Message<'_>) -> Option<LinkMessage> {
    match typed(message)? {
        RouteNetlinkMessage::NewLink(link) | RouteNetlinkMessage::DelLink(link) => Some(link),
        _ => None,
    }
}

fn typed(message: &Message<'_>) -> Option<RouteNetlinkMessage> {
    let mut header = NetlinkHeader::default();
    header.message_type = message.kind;
    RouteNetlinkMessage::deserialize(&header, message.payload()).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::kernel::netlink::message::{Messages, Writer};

    fn tell(kind: u16, body: &[u8], news: &mut News, unsigned: &mut bool) {
        let mut expected = Expected::default();
        expected.found(7);
        let mut writer = Writer::default();
        let message = writer.message(kind, 0, 0);
        writer.raw(body);
        writer.end(message);
        let bytes = writer.finish().unwrap();
        for message in Messages::new(&bytes).flatten() {
            read(&message, &mut expected, unsigned, news);
        }
    }

    fn table(family: u8, name: &str) -> Vec<u8> {
        let mut writer = Writer::default();
        writer.nfgen(family, 0);
        writer.string(1, name);
        writer.finish().unwrap()
    }

    #[test]
    fn a_transaction_is_told_at_its_end_with_its_writer() {
        let mut end = Writer::default();
        end.nfgen(0, 0);
        end.be32(1, 5);
        end.be32(2, 77);
        end.string(3, "nft");
        let end = end.finish().unwrap();
        let (mut news, mut unsigned) = (News::default(), false);
        for body in [table(2, NFT_TABLE), table(1, "other")] {
            tell(0xa06, &body, &mut news, &mut unsigned);
            tell(NEWGEN, &end, &mut news, &mut unsigned);
            assert!(news.is_empty());
        }
        for family in [1, 5] {
            news = News::default();
            tell(0xa06, &table(family, NFT_TABLE), &mut news, &mut unsigned);
            assert!(news.is_empty() && unsigned);
            tell(NEWGEN, &end, &mut news, &mut unsigned);
            assert!(!unsigned);
            assert_eq!(news.changed, [Part::Firewall].into());
            assert_eq!(news.writers, [Process { pid: 77, name: "nft".into() }].into());
        }
    }

    proptest! {
        #[test]
        fn arbitrary_messages_are_read_without_panic(
            kind in prop_oneof![16_u16..34, Just(NEWNETCONF), 0xa00_u16..0xa20],
            mut body in proptest::collection::vec(any::<u8>(), 0..200),
            ours in any::<bool>(),
        ) {
            if let (true, Some(index)) = (ours, body.get_mut(4..8)) {
                index.copy_from_slice(&7_u32.to_ne_bytes());
            }
            tell(kind, &body, &mut News::default(), &mut false);
        }
    }
}
