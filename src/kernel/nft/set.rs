//! Encoding of sets and maps, and recognition of the datapath's sets among listed ones.

use super::expr::Expr;
use crate::kernel::netlink::message::{Attributes, Malformed, Writer};
use crate::state::{Datum, NFT_TABLE, Set, TableFamily};

/// Flags of a set (`enum nft_set_flags`).
const INTERVAL: u32 = 0x4;
const MAP: u32 = 0x8;
const TIMEOUT: u32 = 0x10;

/// Expressions that every element of a set runs when it is looked up.
///
/// `NFTA_SET_EXPR` holds one expression and `NFTA_SET_EXPRESSIONS` a list of several.
const EXPR: u16 = 17;
const EXPRESSIONS: u16 = 18;

/// `NFTA_SET_DESC`, which contains `NFTA_SET_DESC_SIZE`.
const DESCRIPTION: u16 = 9;

/// Data type of a verdict (`NFT_DATA_VERDICT`).
const VERDICT: u32 = 0xffff_ff00;

/// Type number of `nft` (`include/datatype.h`), which the kernel only stores.
const fn type_of(datum: Datum) -> u32 {
    match datum {
        Datum::Ipv4 => 7,
        Datum::Ipv6 => 8,
        Datum::Ethernet => 9,
        Datum::Protocol => 12,
        Datum::Service => 13,
        Datum::Mark => 19,
        Datum::ClassId => 23,
        Datum::Verdict => VERDICT,
    }
}

/// Byte order in the notation of `nft`: 0 for none, 1 for host order, 2 for network order.
const fn byte_order(datum: Datum) -> u8 {
    match datum {
        Datum::Ipv4 | Datum::Ipv6 | Datum::Ethernet | Datum::Service => 2,
        Datum::Mark | Datum::ClassId => 1,
        Datum::Protocol | Datum::Verdict => 0,
    }
}

/// Attributes of a set that the kernel lists, without its name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Shape {
    flags: u32,
    key_type: u32,
    key_len: u32,
    data_type: u32,
    data_len: u32,
    runs: Option<Expr>,
}

impl Shape {
    fn of(set: Set) -> Self {
        let key_len = set.key().iter().map(|part| part.len()).sum::<usize>();
        let data = set.data();
        Self {
            flags: if set.is_interval() { INTERVAL } else { 0 }
                | if set.is_fleeting() { TIMEOUT } else { 0 }
                | if data.is_some() { MAP } else { 0 },
            // Six bits for each part, the first part highest.
            key_type: set.key().iter().fold(0, |sum, part| sum << 6 | type_of(*part)),
            key_len: u32::try_from(key_len).unwrap_or(u32::MAX),
            data_type: data.map_or(0, type_of),
            data_len: data.map_or(0, |data| u32::try_from(data.len()).unwrap_or(u32::MAX)),
            runs: set.is_counting().then_some(Expr::Counter),
        }
    }
}

/// Writes a new set; `id` is unique within the transaction.
///
/// A set with a size never grows.
pub(super) fn write(writer: &mut Writer, set: Set, id: u32, size: Option<u32>) {
    let shape = Shape::of(set);
    writer.string(1, NFT_TABLE);
    writer.string(2, &set.name());
    writer.be32(3, shape.flags);
    writer.be32(4, shape.key_type);
    writer.be32(5, shape.key_len);
    if set.data().is_some() {
        writer.be32(6, shape.data_type);
        writer.be32(7, shape.data_len);
    }
    if let Some(size) = size {
        writer.nest(DESCRIPTION, |writer| writer.be32(1, size));
    }
    writer.be32(10, id);
    writer.attribute(13, &userdata(set));
    if let Some(expr) = &shape.runs {
        expr.write_as(writer, EXPR);
    }
}

/// User data for `nft`, as `nft` writes it; without it, `nft` prints numbers byte-swapped.
fn userdata(set: Set) -> Vec<u8> {
    let order = match set.key() {
        [part] => byte_order(*part),
        _ => 0,
    };
    let mut bytes = note(0, order);
    if let Some(data) = set.data() {
        bytes.extend(note(1, byte_order(data)));
    }
    if set.key().len() > 1 {
        // The key is a concatenation: expression type 13 with empty content.
        let expression = [note(0, 13), vec![1, 0]].concat();
        bytes.extend([3, 8]);
        bytes.extend(expression);
    }
    if set.data().is_some() {
        bytes.extend(note(6, 0));
    }
    bytes
}

fn note(kind: u8, value: u8) -> Vec<u8> {
    let mut bytes = vec![kind, 4];
    bytes.extend(u32::from(value).to_ne_bytes());
    bytes
}

/// Set as the kernel lists it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) name: String,
    /// Number of elements, if the kernel reports it.
    pub(super) count: Option<u32>,
    shape: Shape,
}

impl Found {
    /// Returns the datapath's set that this is, if any.
    ///
    /// `None` if the set is none of the table's, or has the name of one and another type.
    pub(super) fn ours(&self, table: TableFamily) -> Option<Set> {
        let set = Set::from_name(&self.name).filter(|set| set.table() == table)?;
        (Shape::of(set) == self.shape).then_some(set)
    }

    /// Returns true for an anonymous set, which belongs to a rule and is deleted with it.
    pub(super) const fn is_anonymous(&self) -> bool {
        self.shape.flags & 1 != 0
    }
}

/// Reads a listed set; `None` if it is in another table.
pub(super) fn read(attributes: Attributes<'_>) -> Result<Option<Found>, Malformed> {
    let (mut ours, mut name, mut count, mut shape) = (false, None, None, Shape::default());
    for attribute in attributes {
        let attribute = attribute?;
        match attribute.kind {
            1 => ours = attribute.is(NFT_TABLE),
            2 => name = Some(attribute),
            3 => shape.flags = attribute.be32()?,
            4 => shape.key_type = attribute.be32()?,
            5 => shape.key_len = attribute.be32()?,
            6 => shape.data_type = attribute.be32()?,
            7 => shape.data_len = attribute.be32()?,
            // A set with several expressions is none of the datapath's.
            EXPR | EXPRESSIONS => shape.runs = Some(Expr::read(&attribute)),
            20 => count = Some(attribute.be32()?),
            _ => {}
        }
    }
    if !ours {
        return Ok(None);
    }
    if shape.data_type == VERDICT {
        // For a verdict the kernel reports the memory that it takes, which is an implementation
        // detail.
        shape.data_len = 0;
    }
    let name = name.ok_or(Malformed("a set has no name"))?.text()?.to_owned();
    Ok(Some(Found { name, count, shape }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::Family;

    /// Bytes of a new set after the table's name.
    fn bytes(set: Set, id: u32) -> Vec<u8> {
        let mut writer = Writer::default();
        write(&mut writer, set, id, None);
        let skip = (4 + NFT_TABLE.len() + 1 + 3) & !3;
        writer.bytes()[skip..].to_vec()
    }

    fn attribute(kind: u8, value: &[u8]) -> Vec<u8> {
        let mut bytes = vec![u8::try_from(value.len() + 4).unwrap(), 0, kind, 0];
        bytes.extend(value);
        bytes.resize(bytes.len().div_ceil(4) * 4, 0);
        bytes
    }

    #[cfg(target_endian = "little")]
    #[test]
    fn a_set_has_the_bytes_that_nft_sends() {
        // nft add map inet t m '{ type ipv4_addr . classid : classid; }'
        let expected = [
            attribute(2, b"dest4_24\0"),
            attribute(3, &[0, 0, 0, 8]),
            attribute(4, &[0, 0, 0x01, 0xd7]),
            attribute(5, &[0, 0, 0, 8]),
            attribute(6, &[0, 0, 0, 0x17]),
            attribute(7, &[0, 0, 0, 4]),
            attribute(10, &[0, 0, 0, 2]),
            attribute(
                13,
                b"\0\x04\0\0\0\0\x01\x04\x01\0\0\0\x03\x08\0\x04\x0d\0\0\0\x01\0\x06\x04\0\0\0\0",
            ),
        ]
        .concat();
        assert_eq!(bytes(Set::Destination(Family::V4, 24), 2), expected);

        // nft add map inet t a '{ type classid : verdict; }'
        let expected = [
            attribute(2, b"policy_action\0"),
            attribute(3, &[0, 0, 0, 8]),
            attribute(4, &[0, 0, 0, 0x17]),
            attribute(5, &[0, 0, 0, 4]),
            attribute(6, &[0xff, 0xff, 0xff, 0]),
            attribute(7, &[0, 0, 0, 0]),
            attribute(10, &[0, 0, 0, 4]),
            attribute(13, b"\0\x04\x01\0\0\0\x01\x04\0\0\0\0\x06\x04\0\0\0\0"),
        ]
        .concat();
        assert_eq!(bytes(Set::PolicyAction, 4), expected);

        // nft add set inet t s '{ type ipv4_addr; flags interval; }'
        let expected = [
            attribute(2, b"excluded4\0"),
            attribute(3, &[0, 0, 0, 4]),
            attribute(4, &[0, 0, 0, 7]),
            attribute(5, &[0, 0, 0, 4]),
            attribute(10, &[0, 0, 0, 1]),
            attribute(13, b"\0\x04\x02\0\0\0"),
        ]
        .concat();
        assert_eq!(bytes(Set::Excluded(Family::V4), 1), expected);

        // nft add set inet t a '{ type ipv4_addr . ipv4_addr . inet_proto . inet_service
        //     . inet_service; flags timeout; }'
        let expected = [
            attribute(2, b"blocked_reply4\0"),
            attribute(3, &[0, 0, 0, 0x10]),
            attribute(4, &[0x07, 0x1c, 0xc3, 0x4d]),
            attribute(5, &[0, 0, 0, 0x14]),
            attribute(10, &[0, 0, 0, 1]),
            attribute(13, b"\0\x04\0\0\0\0\x03\x08\0\x04\x0d\0\0\0\x01\0"),
        ]
        .concat();
        assert_eq!(bytes(Set::BlockedReply(Family::V4), 1), expected);

        // nft add set inet t c '{ type classid; counter; }'
        let expected = [
            attribute(2, b"count4\0"),
            attribute(3, &[0, 0, 0, 0]),
            attribute(4, &[0, 0, 0, 0x17]),
            attribute(5, &[0, 0, 0, 4]),
            attribute(10, &[0, 0, 0, 1]),
            attribute(13, b"\0\x04\x01\0\0\0"),
            b"\x14\0\x11\x80\x0c\0\x01\0counter\0\x04\0\x02\x80".to_vec(),
        ]
        .concat();
        assert_eq!(bytes(Set::Count(Family::V4), 1), expected);

        // nft add set inet t g '{ type mark; }'
        let expected = [
            attribute(2, b"gateway_mark\0"),
            attribute(3, &[0, 0, 0, 0]),
            attribute(4, &[0, 0, 0, 0x13]),
            attribute(5, &[0, 0, 0, 4]),
            attribute(10, &[0, 0, 0, 6]),
            attribute(13, b"\0\x04\x01\0\0\0"),
        ]
        .concat();
        assert_eq!(bytes(Set::Gateway, 6), expected);
    }

    #[test]
    fn a_set_of_another_type_is_not_ours() {
        let mut writer = Writer::default();
        write(&mut writer, Set::Gateway, 1, None);
        let found = read(Attributes::new(writer.bytes())).unwrap().unwrap();
        assert_eq!(found.ours(TableFamily::Inet), Some(Set::Gateway));
        assert_eq!(found.ours(TableFamily::Netdev), None);
        let mut other = found;
        other.shape.flags |= INTERVAL;
        assert_eq!(other.ours(TableFamily::Inet), None);
    }
}
