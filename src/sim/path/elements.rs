//! Lookups in sets and maps.

use std::net::IpAddr;

use ipnet::IpNet;

use super::skb::Loaded;
use crate::range::IpRange;
use crate::state::{Comment, Firewall, Key, Set, Tag, Value};
use crate::types::{Family, Mark};

/// The value of a set or map element.
pub(crate) fn found(firewall: &Firewall, key: &Key) -> Option<Value> {
    firewall.elements.get(key)
}

pub(crate) fn holds(firewall: &Firewall, key: &Key) -> bool {
    firewall.elements.contains_key(key)
}

/// The key in a set or map for values that were loaded from a packet, if there can be one.
pub(crate) fn element(firewall: &Firewall, set: Set, values: &[Loaded]) -> Option<Key> {
    match *values {
        [Loaded::Address(address)] => by_address(firewall, set, address),
        [Loaded::Number(number)] => by_number(set, number),
        [Loaded::Address(address), Loaded::Number(number)] => match set {
            Set::Destination(_, length) => by_destination(address, length, Tag::new(number)?),
            _ => None,
        },
        _ => None,
    }
}

/// The key of an address in a set of addresses or ranges, if there can be one.
fn by_address(firewall: &Firewall, set: Set, address: IpAddr) -> Option<Key> {
    let range = || IpRange::from(IpNet::from(address));
    if set.family() != Some(Family::of(address)) {
        return None;
    }
    match set {
        Set::Peer(_) => Some(Key::Peer(address)),
        Set::Underlay(_) => Some(Key::Underlay(address)),
        Set::Eip(_) => Some(Key::Eip(address)),
        Set::Source(_) => Some(Key::Source(address)),
        Set::Excluded(_) => firewall.overlapping(&Key::Excluded(range())).copied(),
        Set::SourceNet(_) => firewall.overlapping(&Key::SourceNet(range())).copied(),
        _ => None,
    }
}

/// The key of a mark or a tag.
fn by_number(set: Set, number: u32) -> Option<Key> {
    let (mark, tag) = (Mark::new(number), Tag::new(number));
    Some(match set {
        Set::Gateway => Key::Gateway(mark),
        Set::Connection => Key::Connection(mark),
        Set::NextHop => Key::NextHop(mark),
        Set::PolicyAction => Key::PolicyAction(tag?),
        Set::Steer(family) => Key::Steer(family, tag?),
        Set::Snat(family) => Key::Snat(family, tag?),
        Set::Masquerade(family) => Key::Masquerade(family, tag?),
        Set::Count(family) => Key::Count(family, tag?),
        Set::Any(family) => Key::Any(family, tag?),
        _ => return None,
    })
}

/// The key of a destination, truncated to a prefix length, and a class.
pub(crate) fn by_destination(destination: IpAddr, length: u8, class: Tag) -> Option<Key> {
    let net = IpNet::new(destination, length).ok()?.trunc();
    Some(Key::Destination(net, class))
}

/// The id of a policy, from the comment of its action element.
pub(crate) fn id(firewall: &Firewall, family: Family, policy: Tag) -> Option<Comment> {
    found(firewall, &Key::Steer(family, policy))?.comment
}

/// The text of an element, as an operator would search for it.
pub(crate) fn shown(firewall: &Firewall, key: &Key) -> String {
    let element = format!("element {} {{ {key} }}", key.set());
    match found(firewall, key).and_then(|value| value.comment) {
        Some(comment) => format!("{element} \"{}\"", comment.as_str().escape_default()),
        None => element,
    }
}
