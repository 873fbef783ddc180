//! Netlink encoding of ipset members.

use std::net::IpAddr;

use ipnet::IpNet;

use super::protocol::{NETWORK_ORDER, NOMATCH, attribute, byte, data};
use crate::kernel::netlink::message::{Attribute, Attributes, Malformed, Writer};
use crate::state::{MarkBits, Member};

/// Maximum number of members in one message.
///
/// The longest member, IPv6 with a mark and a number, takes 64 bytes. The length of the enclosing
/// attribute has 16 bits, and the kernel returns the message if it refuses a member, which must fit
/// the read buffer of a socket.
pub(crate) const AT_ONCE: usize = 1000;

/// Writes a member, with its number in the message where a refusal must name it.
pub(crate) fn write(writer: &mut Writer, number: Option<u32>, net: IpNet, member: Member) {
    writer.nest(attribute::DATA, |writer| {
        if let Some(number) = number {
            writer.be32(attribute::LINE | NETWORK_ORDER, number);
        }
        writer.nest(data::IP, |writer| match net.addr() {
            IpAddr::V4(v4) => writer.attribute(NETWORK_ORDER | 1, &v4.octets()),
            IpAddr::V6(v6) => writer.attribute(NETWORK_ORDER | 2, &v6.octets()),
        });
        writer.attribute(data::CIDR, &[net.prefix_len()]);
        match member {
            Member::In => {}
            Member::Marked(MarkBits { mask, value }) => {
                let both = u64::from(value) << 32 | u64::from(mask);
                writer.attribute(data::MARK | NETWORK_ORDER, &both.to_be_bytes());
            }
            Member::Not => writer.be32(data::FLAGS | NETWORK_ORDER, NOMATCH),
        }
    });
}

/// Decodes a member of a listing; `None` if it has no address.
pub(crate) fn read(attributes: Attributes<'_>) -> Result<Option<(IpNet, Member)>, Malformed> {
    let (mut address, mut length, mut member) = (None, None, Member::In);
    for found in attributes {
        let found = found?;
        match found.kind {
            data::IP => address = ip(found.nested())?,
            data::CIDR => length = Some(byte(&found)?),
            data::MARK => {
                let both = found.be64()?;
                let half = |bits: u64| u32::try_from(bits & 0xffff_ffff).unwrap_or_default();
                let (value, mask) = (half(both >> 32), half(both));
                // A set with marks lists a mark of 0/0 for a member without mark.
                if member == Member::In && mask != 0 {
                    member = Member::Marked(MarkBits { mask, value });
                }
            }
            data::FLAGS if found.be32()? & NOMATCH != 0 => member = Member::Not,
            _ => {}
        }
    }
    let Some(address) = address else { return Ok(None) };
    let full = if address.is_ipv4() { 32 } else { 128 };
    let net = IpNet::new(address, length.unwrap_or(full));
    let net = net.map_err(|_| Malformed("a prefix has a wrong length"))?;
    Ok(Some((net.trunc(), member)))
}

fn ip(attributes: Attributes<'_>) -> Result<Option<IpAddr>, Malformed> {
    let mut address = None;
    for found in attributes {
        address = Some(of(&found?)?);
    }
    Ok(address)
}

fn of(found: &Attribute<'_>) -> Result<IpAddr, Malformed> {
    let wrong = Malformed("an address has a wrong length");
    match found.kind {
        1 => <[u8; 4]>::try_from(found.bytes()).map(IpAddr::from).map_err(|_| wrong),
        2 => <[u8; 16]>::try_from(found.bytes()).map(IpAddr::from).map_err(|_| wrong),
        _ => Err(Malformed("an address of no family")),
    }
}
