//! Encoding and decoding of set and map elements.

use std::net::IpAddr;

use super::expr;
use super::expr::{Expr, Verdict, verdict};
use crate::connection::Connection;
use crate::count::Count;
use crate::kernel::netlink::message::{Attribute, Malformed, Writer};
use crate::range::{address, number};
use crate::state::{ChainId, Comment, Data, Datum, Key, KeyValue, Set, Tag, Value};
use crate::types::{Family, MacAddr, Mark};

/// `NFT_SET_ELEM_INTERVAL_END`: flag of the first key after a range.
const END: u32 = 1;

/// `NFTA_SET_ELEM_EXPR`: expression that the kernel runs when the element is looked up.
const EXPR: u16 = 7;

/// Writes an element: one attribute, or two for a range.
pub(super) fn write(writer: &mut Writer, key: &Key, value: Option<&Value>) {
    writer.nest(expr::ELEMENT, |writer| {
        if key.set().is_interval() {
            writer.be32(3, 0);
        }
        writer.nest(1, |writer| write_key(writer, key));
        if let Some(value) = value {
            write_value(writer, value);
            if key.set().is_counting() {
                // Some kernels with set expressions do not copy the set's counter to a new element.
                Expr::Counter.write_as(writer, EXPR);
            }
        }
    });
    if let Some(behind) = behind(key) {
        writer.nest(expr::ELEMENT, |writer| {
            writer.be32(3, END);
            writer.nest(1, |writer| write_address(writer, behind));
        });
    }
}

/// Key of the replies of a connection, in the set [`Connection::answers`].
pub(super) fn answer(connection: &Connection) -> Vec<u8> {
    let mut key = octets(connection.peer);
    key.extend(octets(connection.snat_address));
    // Every part of a concatenation fills a register.
    key.extend([connection.protocol, 0, 0, 0]);
    if let Set::BlockedReply(_) = connection.blocked_replies() {
        for port in [connection.reply_source_port, connection.snat_port] {
            key.extend(port.to_be_bytes());
            key.extend([0, 0]);
        }
    }
    key
}

/// Writes an element that drops late replies until its timeout, or only its key.
pub(super) fn write_answer(writer: &mut Writer, key: &[u8], whole: bool) {
    let held = u64::try_from(Connection::REPLY_BLOCK_TIME.as_millis()).unwrap_or(u64::MAX);
    writer.nest(expr::ELEMENT, |writer| {
        if whole {
            writer.attribute(4, &held.to_be_bytes());
        }
        writer.nest(1, |writer| writer.attribute(1, key));
    });
}

fn write_value(writer: &mut Writer, value: &Value) {
    match value.data {
        Data::None => {}
        Data::Tag(tag) => {
            writer.nest(2, |writer| {
                writer.attribute(1, &tag.get().to_ne_bytes());
            });
        }
        Data::Address(address) => {
            writer.nest(2, |writer| write_address(writer, address));
        }
        Data::Ethernet(mac) => {
            writer.nest(2, |writer| writer.attribute(1, &mac.octets()));
        }
        Data::Verdict(way) => {
            let verdict = match way {
                crate::state::Verdict::Drop => Verdict::plain(verdict::DROP),
                crate::state::Verdict::Goto(chain) => Verdict::goto(chain),
            };
            writer.nest(2, |writer| verdict.write(writer));
        }
    }
    let note = value.comment.as_ref().and_then(|comment| {
        let text = comment.as_str().as_bytes();
        // The length of a user data entry is one byte and includes the NUL.
        let length = u8::try_from(text.len().checked_add(1)?).ok()?;
        Some([&[0, length], text, &[0]].concat())
    });
    if let Some(note) = note {
        writer.attribute(6, &note);
    }
}

/// Writes the key; for a range, its first address.
fn write_key(writer: &mut Writer, key: &Key) {
    match key.value() {
        KeyValue::Address(address) => write_address(writer, address),
        KeyValue::Range(range) => write_address(writer, range.first()),
        KeyValue::Mark(mark) => writer.attribute(1, &mark.get().to_ne_bytes()),
        KeyValue::Mac(mac) => writer.attribute(1, &mac.octets()),
        KeyValue::Tag(tag) => writer.attribute(1, &tag.get().to_ne_bytes()),
        KeyValue::AddressAndTag(address, tag) => {
            let mut bytes = octets(address);
            bytes.extend(tag.get().to_ne_bytes());
            writer.attribute(1, &bytes);
        }
    }
}

/// First address after a range; `None` after the highest address of the family.
fn behind(key: &Key) -> Option<IpAddr> {
    let KeyValue::Range(range) = key.value() else { return None };
    address(range.family(), number(range.last()).checked_add(1)?)
}

fn write_address(writer: &mut Writer, address: IpAddr) {
    match address {
        IpAddr::V4(v4) => writer.attribute(1, &v4.octets()),
        IpAddr::V6(v6) => writer.attribute(1, &v6.octets()),
    }
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

/// Element as the kernel lists it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) key: Vec<u8>,
    /// Set for the first key after a range.
    pub(super) is_end: bool,
    /// Data and comment; `None` if the datapath never writes such an element.
    pub(super) value: Option<Value>,
}

/// Reads one element of a set; `None` if it has no key, like a catch-all element.
pub(super) fn read(element: &Attribute<'_>, set: Set) -> Result<Option<Found>, Malformed> {
    let (mut key, mut data, mut flags, mut comment, mut counts) = (None, None, 0, None, false);
    for attribute in element.nested() {
        let attribute = attribute?;
        match attribute.kind {
            1 => key = expr::value(&attribute)?,
            2 => data = Some(attribute),
            3 => flags = attribute.be32()?,
            6 => comment = note(attribute.bytes()),
            EXPR => counts = Expr::read(&attribute) == Expr::Counter,
            _ => {}
        }
    }
    let Some(key) = key else { return Ok(None) };
    let data = match (set.data(), &data) {
        (None, _) if set.is_counting() && !counts => None,
        (None, _) => Some(Data::None),
        (Some(datum), Some(data)) => read_data(data, datum)?,
        (Some(_), None) => None,
    };
    Ok(Some(Found {
        key: key.to_vec(),
        is_end: flags & END != 0,
        value: data.map(|data| Value { data, comment }),
    }))
}

/// Reads key and counter of an element of a counting set.
///
/// `None` if the datapath never writes such an element.
pub(super) fn read_count(
    element: &Attribute<'_>,
    set: Set,
) -> Result<Option<(Key, Count)>, Malformed> {
    let (mut found, mut count) = (None, None);
    for attribute in element.nested() {
        let attribute = attribute?;
        match attribute.kind {
            1 => found = expr::value(&attribute)?.and_then(|bytes| key(set, bytes)),
            EXPR => count = expr::count(&attribute)?,
            _ => {}
        }
    }
    Ok(found.zip(count))
}

fn read_data(data: &Attribute<'_>, datum: Datum) -> Result<Option<Data>, Malformed> {
    if let Some(verdict) = Verdict::read(data)? {
        let chain = verdict.chain.as_deref().and_then(ChainId::from_name);
        return Ok(match (verdict.code, chain) {
            (verdict::DROP, _) => Some(Data::Verdict(crate::state::Verdict::Drop)),
            (verdict::GOTO, Some(chain)) => Some(Data::Verdict(crate::state::Verdict::Goto(chain))),
            _ => None,
        });
    }
    let Some(bytes) = expr::value(data)? else {
        return Ok(None);
    };
    Ok(match datum {
        Datum::Ipv4 => ip(Family::V4, bytes).map(Data::Address),
        Datum::Ipv6 => ip(Family::V6, bytes).map(Data::Address),
        Datum::ClassId => tag(bytes).map(Data::Tag),
        Datum::Ethernet => mac(bytes).map(Data::Ethernet),
        Datum::Mark | Datum::Protocol | Datum::Service | Datum::Verdict => None,
    })
}

/// Returns the comment in the user data of an element.
fn note(mut bytes: &[u8]) -> Option<Comment> {
    while let [kind, length, rest @ ..] = bytes {
        let value = rest.get(..usize::from(*length))?;
        if *kind == 0 {
            let text = value.strip_suffix(&[0]).unwrap_or(value);
            return Some(Comment::found(&String::from_utf8_lossy(text)));
        }
        bytes = rest.get(value.len()..)?;
    }
    None
}

/// Decodes the key of a set without ranges; `None` if the datapath never writes such a key.
pub(super) fn key(set: Set, bytes: &[u8]) -> Option<Key> {
    let value = match *set.key() {
        [Datum::Mark] => KeyValue::Mark(mark(bytes)?),
        [Datum::Ethernet] => KeyValue::Mac(mac(bytes)?),
        [Datum::ClassId] => KeyValue::Tag(tag(bytes)?),
        [_] => KeyValue::Address(ip(set.family()?, bytes)?),
        [_, Datum::ClassId] => {
            let (head, class) = bytes.split_at_checked(bytes.len().checked_sub(4)?)?;
            KeyValue::AddressAndTag(ip(set.family()?, head)?, tag(class)?)
        }
        _ => return None,
    };
    Key::new(set, value)
}

/// Decodes an address of the family.
pub(super) fn ip(family: Family, bytes: &[u8]) -> Option<IpAddr> {
    match family {
        Family::V4 => <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from),
        Family::V6 => <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from),
    }
}

fn mark(bytes: &[u8]) -> Option<Mark> {
    bytes.try_into().ok().map(u32::from_ne_bytes).map(Mark::new)
}

fn mac(bytes: &[u8]) -> Option<MacAddr> {
    bytes.try_into().ok().map(MacAddr::new)
}

fn tag(bytes: &[u8]) -> Option<Tag> {
    Tag::new(u32::from_ne_bytes(bytes.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::netlink::message::Attributes;
    use crate::range::IpRange;

    fn bytes(key: &Key, value: &Value) -> Vec<u8> {
        let mut writer = Writer::default();
        write(&mut writer, key, Some(value));
        writer.finish().unwrap()
    }

    fn tag(number: u32) -> Tag {
        Tag::new(number).unwrap()
    }

    #[cfg(target_endian = "little")]
    #[test]
    fn elements_have_the_bytes_that_nft_sends() {
        // nft add element inet t m '{ 198.51.100.0 . 3f2a:91c4 comment "hi" : a:b }'
        let net = "198.51.100.0/24".parse().unwrap();
        let value =
            Value { data: Data::Tag(tag(0x000a_000b)), comment: Some(Comment::of_name("hi")) };
        assert_eq!(
            bytes(&Key::destination(net, tag(0x3f2a_91c4)), &value),
            b"\x2c\0\x01\x80\
              \x10\0\x01\x80\x0c\0\x01\0\xc6\x33\x64\0\xc4\x91\x2a\x3f\
              \x0c\0\x02\x80\x08\0\x01\0\x0b\0\x0a\0\
              \x09\0\x06\0\0\x03hi\0\0\0\0"
        );

        // nft add element inet t a '{ 1:1 : drop }'
        let drop = Value::plain(Data::Verdict(crate::state::Verdict::Drop));
        assert_eq!(
            bytes(&Key::policy_action(tag(0x0001_0001)), &drop),
            b"\x20\0\x01\x80\x0c\0\x01\x80\x08\0\x01\0\x01\0\x01\0\
              \x10\0\x02\x80\x0c\0\x02\x80\x08\0\x01\0\0\0\0\0"
        );

        // nft add element inet t a '{ 1:3 : goto local_gateway }'
        let goto = Value::plain(Data::Verdict(crate::state::Verdict::Goto(ChainId::LocalGateway)));
        assert_eq!(
            bytes(&Key::policy_action(tag(0x0001_0003)), &goto),
            b"\x34\0\x01\x80\x0c\0\x01\x80\x08\0\x01\0\x03\0\x01\0\
              \x24\0\x02\x80\x20\0\x02\x80\x08\0\x01\0\xff\xff\xff\xfc\
              \x12\0\x02\0local_gateway\0\0\0"
        );
    }

    #[test]
    fn a_counter_has_the_bytes_that_nft_sends_and_is_read_from_those_that_it_gets() {
        // nft add element inet t c '{ 1:2 counter comment "x" }'
        let value = Value { data: Data::None, comment: Some(Comment::of_name("x")) };
        let key = Key::count(Family::V4, tag(0x0001_0002));
        assert_eq!(
            bytes(&key, &value),
            b"\x2c\0\x01\x80\x0c\0\x01\x80\x08\0\x01\0\x02\0\x01\0\x08\0\x06\0\0\x02x\0\
              \x14\0\x07\x80\x0c\0\x01\0counter\0\x04\0\x02\x80"
        );
        let listed = b"\x44\0\x01\0\x0c\0\x01\0\x08\0\x01\0\x02\0\x01\0\
            \x2c\0\x07\0\x0c\0\x01\0counter\0\
            \x1c\0\x02\0\x0c\0\x01\0\0\0\0\0\0\0\x01\x0e\x0c\0\x02\0\0\0\0\0\0\0\0\x06\
            \x08\0\x06\0\0\x02x\0";
        let set = key.set();
        let element = Attributes::new(listed).next().unwrap().unwrap();
        assert_eq!(read(&element, set).unwrap().unwrap().value, Some(value));
        let count = Count { packets: 6, bytes: 270 };
        assert_eq!(read_count(&element, set).unwrap(), Some((key, count)));
        // An element without a counter does not belong to the datapath.
        let bare = b"\x10\0\x01\0\x0c\0\x01\0\x08\0\x01\0\x02\0\x01\0";
        let element = Attributes::new(bare).next().unwrap().unwrap();
        assert_eq!(read(&element, set).unwrap().unwrap().value, None);
        assert_eq!(read_count(&element, set).unwrap(), None);
    }

    #[test]
    fn an_answer_has_the_bytes_that_nft_sends() {
        // nft add element inet t a '{ 1.2.3.4 . 4.5.6.7 . udp . 7 . 8 timeout 30s }'
        let (opener, peer) = ("4.5.6.7".parse().unwrap(), "1.2.3.4".parse().unwrap());
        let connection = Connection {
            protocol: 17,
            source: opener,
            source_port: 9,
            destination: peer,
            destination_port: 10,
            peer,
            reply_source_port: 7,
            snat_address: opener,
            snat_port: 8,
            mark: 0,
            zone: 0,
            reply_zone: 0,
            id: 0,
        };
        let mut writer = Writer::default();
        write_answer(&mut writer, &answer(&connection), true);
        assert_eq!(
            writer.finish().unwrap(),
            b"\x2c\0\x01\x80\x0c\0\x04\0\0\0\0\0\0\0\x75\x30\
              \x1c\0\x01\x80\x18\0\x01\0\x01\x02\x03\x04\x04\x05\x06\x07\
              \x11\0\0\0\0\x07\0\0\0\x08\0\0"
        );
    }

    #[test]
    fn a_range_ends_behind_its_last_address_unless_there_is_none() {
        let count = |first: &str, last: &str| {
            let range = IpRange::new(first.parse().unwrap(), last.parse().unwrap()).unwrap();
            let bytes = bytes(&Key::excluded(range), &Value::plain(Data::None));
            let set = Set::Excluded(range.family());
            Attributes::new(&bytes)
                .map(|found| read(&found.unwrap(), set).unwrap().unwrap())
                .map(|found| (ip(range.family(), &found.key).unwrap().to_string(), found.is_end))
                .collect::<Vec<_>>()
        };
        assert_eq!(
            count("10.244.0.0", "10.244.255.255"),
            [("10.244.0.0".into(), false), ("10.245.0.0".into(), true)]
        );
        assert_eq!(count("240.0.0.0", "255.255.255.255"), [("240.0.0.0".into(), false)]);
        let highest = "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff";
        assert_eq!(count("::", highest), [("::".into(), false)]);
    }

    #[test]
    fn what_we_never_write_has_no_key() {
        assert_eq!(key(Set::Any(Family::V4), &[0, 0, 0, 0]), None);
        assert_eq!(key(Set::Peer(Family::V4), &[1, 2, 3]), None);
        assert_eq!(key(Set::Destination(Family::V4, 24), &[1, 2, 3, 4, 1, 0, 1]), None);
        assert_eq!(key(Set::Destination(Family::V4, 24), &[1]), None);
    }
}
