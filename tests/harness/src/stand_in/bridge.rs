//! `bridge`: entries of a forwarding database.

use std::io;
use std::net::IpAddr;

use super::ip::{self, Neighbour};
use super::netlink::{Body, Netlink, ROUTE, flag, octets};
use super::words::{Words, unknown};

/// `AF_BRIDGE`.
const BRIDGE: u8 = 7;
/// `NTF_SELF`.
const SELF: u8 = 2;
/// `NUD_PERMANENT | NUD_NOARP`.
const PERMANENT: u16 = 0x80 | 0x40;

pub(super) fn main(mut words: Words) -> io::Result<String> {
    while words.take("-d") {}
    if !words.take("fdb") {
        return Err(unknown("bridge but fdb"));
    }
    let mut netlink = Netlink::open(ROUTE)?;
    let (kind, flags) = match words.next().as_deref() {
        None => return ip::listed(&mut netlink, &ip::NEIGHBOURS, &Neighbour::any(BRIDGE)),
        Some("add") => (ip::NEIGHBOURS.new, flag::CREATE | flag::EXCL),
        Some("append") => (ip::NEIGHBOURS.new, flag::CREATE | flag::APPEND),
        Some("replace") => (ip::NEIGHBOURS.new, flag::CREATE | flag::REPLACE),
        Some("del") => (ip::NEIGHBOURS.new + 1, 0),
        Some("flush") => {
            words.take("dev");
            let device = ip::index(&words.word()?)?;
            let is_there = |entry: &[u8]| Neighbour::index_of(entry) == Some(device);
            return ip::flush(&mut netlink, &ip::NEIGHBOURS, &Neighbour::any(BRIDGE), is_there);
        }
        Some(verb) => return Err(unknown(format_args!("bridge fdb {verb}"))),
    };
    let mac = words.mac()?;
    let (mut device, mut attributes) = (0, Body::default());
    while let Some(word) = words.next() {
        attributes = match word.as_str() {
            "dev" => {
                device = ip::index(&words.word()?)?;
                attributes
            }
            "dst" => attributes.put(1, &octets(words.value::<IpAddr>()?)),
            "port" => attributes.put(6, &words.value::<u16>()?.to_be_bytes()),
            "vni" => attributes.u32(7, words.number()?),
            // As it is without the word.
            "self" | "permanent" => attributes,
            word => return Err(unknown(format_args!("bridge fdb ... {word}"))),
        };
    }
    let header = Neighbour { family: BRIDGE, device, state: PERMANENT, flags: SELF };
    let body = header.body().raw(&attributes.put(2, &mac).0);
    netlink.request(kind, flags, &body)?;
    Ok(String::new())
}
