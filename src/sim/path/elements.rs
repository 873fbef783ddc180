//! Look-ups in the sets and maps.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::range::IpRange;
use crate::state::{Comment, Firewall, Key, Set, Tag, Value};
use crate::types::Family;

/// What a set or map has for a key.
pub(crate) fn found(firewall: &Firewall, key: &Key) -> Option<Value> {
    firewall.elements.get(key)
}

pub(crate) fn holds(firewall: &Firewall, key: &Key) -> bool {
    firewall.elements.contains_key(key)
}

/// Whether an address is in a set of addresses; `None` if the set is of another family or kind,
/// so that neither the test nor its contrary holds.
pub(crate) fn has_address(firewall: &Firewall, set: Set, address: IpAddr) -> Option<bool> {
    let family = family_of(set)?;
    (family == Family::of(address))
        .then(|| by_address(firewall, set, address).is_some_and(|key| holds(firewall, &key)))
}

/// The key that an address has in a set of addresses or ranges, if it can have one.
pub(crate) fn by_address(firewall: &Firewall, set: Set, address: IpAddr) -> Option<Key> {
    let range = || IpRange::from(IpNet::from(address));
    if family_of(set) != Some(Family::of(address)) {
        return None;
    }
    match set {
        Set::Peer(_) => Some(Key::Peer(address)),
        Set::Underlay(_) => Some(Key::Underlay(address)),
        Set::Eip(_) => Some(Key::Eip(address)),
        Set::Source(_) => Some(Key::Source(address)),
        Set::Excluded(_) => firewall.overlapping(&Key::Excluded(range())).copied(),
        Set::SourceNet(_) => firewall.overlapping(&Key::SourceNet(range())).copied(),
        Set::Gateway
        | Set::Connection
        | Set::Answer(_)
        | Set::PortlessAnswer(_)
        | Set::Verdict
        | Set::Steer(_)
        | Set::Snat(_)
        | Set::Masquerade(_)
        | Set::Count(_)
        | Set::Any(_)
        | Set::Destination(..)
        | Set::NextHop => None,
    }
}

/// The family of a set whose keys are addresses and nothing else.
fn family_of(set: Set) -> Option<Family> {
    set.family().filter(|_| set.key().len() == 1)
}

/// The key of a set that is asked by the tag that a packet carries.
pub(crate) const fn by_tag(set: Set, priority: u32) -> Option<Key> {
    let Some(tag) = Tag::new(priority) else { return None };
    match set {
        Set::Verdict => Some(Key::Verdict(tag)),
        Set::Steer(family) => Some(Key::Steer(family, tag)),
        Set::Snat(family) => Some(Key::Snat(family, tag)),
        Set::Masquerade(family) => Some(Key::Masquerade(family, tag)),
        Set::Count(family) => Some(Key::Count(family, tag)),
        Set::Any(family) => Some(Key::Any(family, tag)),
        Set::Peer(_)
        | Set::Underlay(_)
        | Set::Excluded(_)
        | Set::Eip(_)
        | Set::Gateway
        | Set::Connection
        | Set::Answer(_)
        | Set::PortlessAnswer(_)
        | Set::Destination(..)
        | Set::Source(_)
        | Set::SourceNet(_)
        | Set::NextHop => None,
    }
}

/// The key of a destination, cut to a length, and a class.
pub(crate) fn by_destination(destination: IpAddr, length: u8, class: Tag) -> Option<Key> {
    let net = IpNet::new(destination, length).ok()?.trunc();
    Some(Key::Destination(net, class))
}

/// The id of a policy, as its way out says.
pub(crate) fn id(firewall: &Firewall, family: Family, policy: Tag) -> Option<Comment> {
    found(firewall, &Key::Steer(family, policy))?.comment
}

/// An element as an operator would look for it.
pub(crate) fn shown(firewall: &Firewall, key: &Key) -> String {
    let element = format!("element {} {{ {key} }}", key.set());
    match found(firewall, key).and_then(|value| value.comment) {
        Some(comment) => format!("{element} \"{}\"", comment.as_str().escape_default()),
        None => element,
    }
}
