//! Decides which notifications concern the datapath's objects.

use netlink_packet_route::AddressFamily;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::neighbour::{NeighbourAttribute, NeighbourMessage, NeighbourState};

use super::filter::{DELROUTE, NEWROUTE, OWN_TABLES, REPLACE};
use crate::event::{ChangeEvents, Component, Process};
use crate::kernel::netlink::message::{Attribute, Attributes, Message};
use crate::kernel::nft;
use crate::kernel::rtnetlink::address;
use crate::kernel::rtnetlink::address::is_link_local;
use crate::kernel::rtnetlink::ahead::OurRules;
use crate::kernel::rtnetlink::neighbour;
use crate::kernel::rtnetlink::socket::object;
use crate::state::{LINK_ALIAS, NFT_TABLE, PROTOCOL, TableFamily};

// Message types, and the lengths of the structures at the start of their payloads.
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
const ADDRESS: usize = 8;
const RULE: usize = 12;
const NETCONF: usize = 4;

const IFLA_IFALIAS: u16 = 20;
const IFA_PROTO: u16 = 11;
const FRA_PROTOCOL: u16 = 21;
const NETCONFA_IFINDEX: u16 = 1;
const NETCONFA_FORWARDING: u16 = 2;
const NETCONFA_RP_FILTER: u16 = 3;

/// Netfilter subsystem 10 (nf_tables), and the message that ends each of its transactions.
const NF_TABLES: u16 = 10;
const NEWGEN: u16 = 0xa0f;

/// Adds the change that a message reports; `ours` are the VXLAN device's index, 0 for none, and our
/// routing rules.
///
/// `unsigned` is whether our table was changed by a transaction that has not ended yet: the writer
/// is named in the message that ends it, so the change is reported then.
pub(super) fn read(
    message: &Message<'_>,
    ours: (u32, &OurRules),
    unsigned: &mut bool,
    events: &mut ChangeEvents,
) {
    if message.kind == NEWGEN {
        if std::mem::take(unsigned) {
            events.changed.insert(Component::Firewall);
            events.writers.extend(writer(message));
        }
    } else if message.kind >> 8 == NF_TABLES {
        *unsigned |= is_our_table(message);
    } else {
        events.changed.extend(part(message, ours));
    }
}

/// Ruleset generation after a transaction, if the message is the end of one.
pub(super) fn generation(message: &Message<'_>) -> Option<u32> {
    let end = Some(message).filter(|message| message.kind == NEWGEN)?;
    attribute(end.payload(), 4, 1)?.be32().ok()
}

fn is_our_table(message: &Message<'_>) -> bool {
    let body = message.payload();
    // In every message type about tables the first attribute is the table name.
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

fn part(message: &Message<'_>, (device, rules): (u32, &OurRules)) -> Option<Component> {
    let body = message.payload();
    let is_ours = |index| index != 0 && index == device;
    match message.kind {
        NEWLINK | DELLINK => {
            let alias = attribute(body, LINK, IFLA_IFALIAS);
            let named = alias.is_some_and(|alias| alias.text() == Ok(LINK_ALIAS));
            (named || is_ours(index(body))).then_some(Component::Link)
        }
        NEWADDR | DELADDR if is_ours(index(body)) => {
            is_address_of_ours(message).then_some(Component::Address)
        }
        // The kernel names no writer of a new IPv6 address: it is mostly this process.
        DELADDR => {
            let protocol = attribute(body, ADDRESS, IFA_PROTO);
            let own = protocol.is_some_and(|protocol| protocol.bytes() == [PROTOCOL]);
            own.then_some(Component::Address)
        }
        NEWNEIGH | DELNEIGH if is_ours(index(body)) => neighbour_or_fdb(message),
        NEWROUTE | DELROUTE => is_route_of_ours(message).then_some(Component::Route),
        NEWRULE | DELRULE => {
            let protocol = attribute(body, RULE, FRA_PROTOCOL);
            let own = protocol.is_some_and(|protocol| protocol.bytes() == [PROTOCOL]);
            (own || comes_first(message, rules)).then_some(Component::Rule)
        }
        NEWNETCONF => {
            let index = setting(body, NETCONFA_IFINDEX).unwrap_or_default();
            (is_ours(index) && is_one_setting(body)).then_some(Component::Link)
        }
        _ => None,
    }
}

/// Returns true for a new rule of another program that may take our packets.
fn comes_first(message: &Message<'_>, ours: &OurRules) -> bool {
    match object(message) {
        Ok(RouteNetlinkMessage::NewRule(rule)) => ours.are_preceded_by(&rule),
        _ => false,
    }
}

fn is_address_of_ours(message: &Message<'_>) -> bool {
    let found = match object(message) {
        Ok(RouteNetlinkMessage::NewAddress(found) | RouteNetlinkMessage::DelAddress(found)) => {
            address::parse(&found)
        }
        _ => None,
    };
    // An address that cannot be parsed may be any address.
    found.is_none_or(|(_, net)| !is_link_local(net.addr()))
}

fn neighbour_or_fdb(message: &Message<'_>) -> Option<Component> {
    let Ok(RouteNetlinkMessage::NewNeighbour(found) | RouteNetlinkMessage::DelNeighbour(found)) =
        object(message)
    else {
        return Some(Component::Neighbour);
    };
    if found.header.family == AddressFamily::Bridge {
        // Kernels before 6.13 send two notifications of a write: one by the device, and one,
        // without most attributes, by the rtnetlink code that called it.
        let told = |attribute: &_| matches!(attribute, NeighbourAttribute::CacheInfo(_));
        return found.attributes.iter().any(told).then_some(Component::Fdb);
    }
    (message.kind == DELNEIGH || may_be_permanent(&found)).then_some(())?;
    let address = neighbour::destination(&found.attributes);
    let is_ours = address.is_none_or(|ip| !ip.is_multicast() && !is_link_local(ip));
    is_ours.then_some(Component::Neighbour)
}

/// Whether the neighbour is or may have been permanent.
///
/// The kernel resolves a neighbour that was never permanent again and again while packets are sent
/// to it.
fn may_be_permanent(found: &NeighbourMessage) -> bool {
    !matches!(
        found.header.state,
        NeighbourState::Incomplete
            | NeighbourState::Failed
            | NeighbourState::Delay
            | NeighbourState::Probe
    )
}

fn is_route_of_ours(message: &Message<'_>) -> bool {
    let body = message.payload();
    let (Some(table), Some(protocol)) = (body.get(4), body.get(5)) else {
        return true;
    };
    let replaces = message.kind == NEWROUTE && message.flags & REPLACE != 0;
    *protocol == PROTOCOL || replaces && *table < OWN_TABLES
}

/// Whether a setting of ours is the only one in the message, as when `sysctl` changes it.
///
/// The notification of a new device has more settings.
fn is_one_setting(body: &[u8]) -> bool {
    let count = Attributes::new(body.get(NETCONF..).unwrap_or_default()).count();
    let ours = [NETCONFA_FORWARDING, NETCONFA_RP_FILTER];
    count == 2 && ours.into_iter().any(|kind| setting(body, kind).is_some())
}

fn setting(body: &[u8], kind: u16) -> Option<u32> {
    attribute(body, NETCONF, kind).and_then(|number| number.u32().ok())
}

/// Interface index, at the same offset in link, address and neighbour messages.
fn index(body: &[u8]) -> u32 {
    let bytes = body.get(4..8).and_then(|bytes| bytes.try_into().ok());
    bytes.map(u32::from_ne_bytes).unwrap_or_default()
}

fn attribute(body: &[u8], header: usize, kind: u16) -> Option<Attribute<'_>> {
    let mut attributes = Attributes::new(body.get(header..)?).map_while(Result::ok);
    attributes.find(|attribute| attribute.kind == kind)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::kernel::netlink::message::{Messages, Writer};

    fn tell(kind: u16, body: &[u8], events: &mut ChangeEvents, unsigned: &mut bool) {
        let mut writer = Writer::default();
        let message = writer.message(kind, 0, 0);
        writer.raw(body);
        writer.end(message);
        let bytes = writer.finish().unwrap();
        for message in Messages::new(&bytes).flatten() {
            read(&message, (7, &OurRules::default()), unsigned, events);
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
        let (mut events, mut unsigned) = (ChangeEvents::default(), false);
        for body in [table(2, NFT_TABLE), table(1, "other")] {
            tell(0xa06, &body, &mut events, &mut unsigned);
            tell(NEWGEN, &end, &mut events, &mut unsigned);
            assert!(events.is_empty());
        }
        for family in [1, 5] {
            events = ChangeEvents::default();
            tell(0xa06, &table(family, NFT_TABLE), &mut events, &mut unsigned);
            assert!(events.is_empty() && unsigned);
            tell(NEWGEN, &end, &mut events, &mut unsigned);
            assert!(!unsigned);
            assert_eq!(events.changed, [Component::Firewall].into());
            assert_eq!(events.writers, [Process { pid: 77, name: "nft".into() }].into());
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
            tell(kind, &body, &mut ChangeEvents::default(), &mut false);
        }
    }
}
