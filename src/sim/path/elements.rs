//! Lookups in sets and maps.

use ipnet::IpNet;

use super::skb::Loaded;
use crate::range::IpRange;
use crate::state::{Comment, Datum, Firewall, Key, KeyValue, Set, Tag, Value};
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
    let value = match *values {
        [Loaded::Address(address)] if set.is_interval() => {
            let range = KeyValue::Range(IpRange::from(IpNet::from(address)));
            return firewall.overlapping(&Key::new(set, range)?).copied();
        }
        [Loaded::Address(address)] => KeyValue::Address(address),
        [Loaded::Mac(mac)] => KeyValue::Mac(mac),
        [Loaded::Number(number)] => match Tag::new(number) {
            Some(tag) if *set.key() == [Datum::ClassId] => KeyValue::Tag(tag),
            _ => KeyValue::Mark(Mark::new(number)),
        },
        [Loaded::Address(address), Loaded::Number(number)] => {
            KeyValue::AddressAndTag(address, Tag::new(number)?)
        }
        _ => return None,
    };
    Key::new(set, value)
}

/// The id of a policy, from the comment of its action element.
pub(crate) fn id(firewall: &Firewall, family: Family, policy: Tag) -> Option<Comment> {
    found(firewall, &Key::steer(family, policy))?.comment
}

/// The text of an element, as an operator would search for it.
pub(crate) fn shown(firewall: &Firewall, key: &Key) -> String {
    let element = format!("element {} {{ {key} }}", key.set());
    match found(firewall, key).and_then(|value| value.comment) {
        Some(comment) => format!("{element} \"{}\"", comment.as_str().escape_default()),
        None => element,
    }
}
