//! `ip`: links, addresses, routes, rules and neighbours.

use std::io::{self, Read};
use std::net::IpAddr;

use super::netlink::{Body, Netlink, ROUTE, attributes, flag, octets};
use super::words::{Words, net, number, unknown};

const INET: u8 = 2;
const INET6: u8 = 10;

/// A kind of object of rtnetlink (`include/uapi/linux/rtnetlink.h`).
pub(super) struct Objects {
    /// The request that makes one; the next ones delete and list.
    pub(super) new: u16,
    /// Length of the fixed header.
    header: usize,
    /// Attributes that change by themselves: statistics, times.
    volatile: &'static [u16],
}

const LINKS: Objects = Objects { new: 16, header: 16, volatile: &[7, 23, 26, 35, 47, 48] };
const ADDRESSES: Objects = Objects { new: 20, header: 8, volatile: &[6] };
const ROUTES: Objects = Objects { new: 24, header: 12, volatile: &[12, 23] };
pub(super) const NEIGHBOURS: Objects = Objects { new: 28, header: 12, volatile: &[3, 4] };
const RULES: Objects = Objects { new: 32, header: 12, volatile: &[] };

pub(super) fn main(mut words: Words) -> io::Result<String> {
    let mut family = None;
    loop {
        match words.peek() {
            Some("-4") => family = Some(INET),
            Some("-6") => family = Some(INET6),
            Some("-d") => {}
            Some("-batch") => {
                let mut text = String::new();
                io::stdin().read_to_string(&mut text)?;
                let command = |line: &str| line.split_whitespace().map(str::to_owned).collect();
                let mut netlink = Netlink::open(ROUTE)?;
                return text
                    .lines()
                    .map(|line| run(&mut netlink, family, Words::new(command(line))))
                    .collect();
            }
            _ => return run(&mut Netlink::open(ROUTE)?, family, words),
        }
        words.next();
    }
}

fn run(netlink: &mut Netlink, family: Option<u8>, mut words: Words) -> io::Result<String> {
    let object = words.word()?;
    let verb = words.next();
    let verb = verb.as_deref().unwrap_or("show");
    match (object.as_str(), verb) {
        ("link", "show") => listed(netlink, &LINKS, &Body::default().raw(&[0; 16])),
        ("link", "add") => add_link(netlink, words),
        ("link", "set") => set_link(netlink, words),
        ("link", "del") => {
            let body = link(index(&words.word()?)?, 0, 0);
            netlink.request(LINKS.new + 1, 0, &body).map(|()| String::new())
        }
        ("addr", "flush") => {
            words.take("dev");
            let device = index(&words.word()?)?;
            let there = |entry: &[u8]| entry.get(4..8) == Some(&device.to_ne_bytes()[..]);
            flush(netlink, &ADDRESSES, &any(&ADDRESSES, family), there)
        }
        ("addr", "add") => address(netlink, words, ADDRESSES.new, flag::CREATE | flag::EXCL),
        ("addr", "change") => address(netlink, words, ADDRESSES.new, flag::REPLACE),
        ("addr", "del") => address(netlink, words, ADDRESSES.new + 1, 0),
        ("route", "flush") => flush_routes(netlink, family, words),
        ("route", "add") => route(netlink, family, words, flag::CREATE | flag::EXCL),
        ("route", "replace") => route(netlink, family, words, flag::CREATE | flag::REPLACE),
        ("route", "prepend") => route(netlink, family, words, flag::CREATE),
        ("route", "append") => route(netlink, family, words, flag::CREATE | flag::APPEND),
        ("route", "del") => route(netlink, family, words, 0),
        ("rule", "add") => rule(netlink, family, words, flag::CREATE | flag::EXCL),
        ("rule", "del") => rule(netlink, family, words, 0),
        ("rule", "flush") => {
            let _protocol = words.word()?;
            let protocol = protocol(&words.word()?)?;
            let ours = |entry: &[u8]| attribute(entry, &RULES, 21) == Some(&[protocol][..]);
            flush(netlink, &RULES, &any(&RULES, family.or(Some(INET))), ours)
        }
        ("neigh", "add") => neighbour(netlink, words),
        ("neigh", "flush") => flush_neighbours(netlink, family, words),
        ("addr" | "neigh" | "route" | "rule", "show") => show(netlink, &object, family, words),
        _ => Err(unknown(format_args!("ip {object} {verb}"))),
    }
}

/// The index of a device.
pub(super) fn index(device: &str) -> io::Result<u32> {
    let mut netlink = Netlink::open(ROUTE)?;
    let name = [device.as_bytes(), b"\0"].concat();
    for entry in netlink.dump(LINKS.new + 2, &Body::default().raw(&[0; 16]))? {
        if attribute(&entry, &LINKS, 3) == Some(&name) {
            return word_at(&entry, 4).ok_or_else(|| io::ErrorKind::InvalidData.into());
        }
    }
    Err(io::Error::other(format!("Cannot find device \"{device}\"")))
}

fn word_at(entry: &[u8], at: usize) -> Option<u32> {
    entry.get(at..)?.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes))
}

fn attribute<'a>(entry: &'a [u8], of: &Objects, kind: u16) -> Option<&'a [u8]> {
    let attributes = attributes(entry.get(of.header..)?).into_iter();
    attributes.filter(|(found, _)| *found == kind).map(|(_, value)| value).next()
}

/// A request for all objects of a family.
fn any(of: &Objects, family: Option<u8>) -> Body {
    let mut header = vec![0; of.header];
    header.splice(..1, family);
    header.resize(of.header, 0);
    Body(header)
}

/// What the kernel lists, a line for each object, but for what changes by itself.
pub(super) fn listed(netlink: &mut Netlink, of: &Objects, request: &Body) -> io::Result<String> {
    listed_those(netlink, of, request, |_| true)
}

/// The same of those that a test picks.
fn listed_those(
    netlink: &mut Netlink,
    of: &Objects,
    request: &Body,
    picked: impl Fn(&[u8]) -> bool,
) -> io::Result<String> {
    let mut text = String::new();
    for entry in netlink.dump(of.new + 2, request)?.into_iter().filter(|entry| picked(entry)) {
        let (header, rest) = entry.split_at_checked(of.header).unwrap_or_default();
        text.push_str(&format!("{header:02x?}"));
        for (kind, value) in attributes(rest) {
            if !of.volatile.contains(&kind) {
                text.push_str(&format!(" {kind}={value:02x?}"));
            }
        }
        text.push('\n');
    }
    Ok(text)
}

/// Deletes those objects of a listing that a test picks.
pub(super) fn flush(
    netlink: &mut Netlink,
    of: &Objects,
    request: &Body,
    picked: impl Fn(&[u8]) -> bool,
) -> io::Result<String> {
    for entry in netlink.dump(of.new + 2, request)? {
        if picked(&entry) {
            netlink.request(of.new + 1, 0, &Body(entry))?;
        }
    }
    Ok(String::new())
}

fn show(
    netlink: &mut Netlink,
    object: &str,
    family: Option<u8>,
    mut words: Words,
) -> io::Result<String> {
    let objects = match object {
        "addr" => &ADDRESSES,
        "neigh" => &NEIGHBOURS,
        "rule" => &RULES,
        _ if words.take("table") && words.take("all") => &ROUTES,
        _ => return Err(unknown("ip route show of one table")),
    };
    let permanent = object == "neigh" && words.take("nud") && words.take("permanent");
    if let Some(word) = words.next() {
        return Err(unknown(format_args!("ip {object} show {word}")));
    }
    let family = if object == "addr" || object == "neigh" { family } else { family.or(Some(INET)) };
    let state = |entry: &[u8]| !permanent || Neighbour::state_of(entry) == Some(PERMANENT);
    listed_those(netlink, objects, &any(objects, family), state)
}

/// The header of a link, and which of its flags are set.
fn link(index: u32, flags: u32, change: u32) -> Body {
    let header = [index, flags, change].map(u32::to_ne_bytes).concat();
    Body::default().raw(&[0; 4]).raw(&header)
}

/// Attributes of a link that are the same when it is made and when it is changed.
fn link_attribute(body: Body, word: &str, words: &mut Words) -> io::Result<Body> {
    Ok(match word {
        "address" => body.put(1, &words.mac()?),
        "alias" => body.put(20, words.word()?.as_bytes()),
        "group" => body.u32(27, words.number()?),
        "mtu" => body.u32(4, words.number()?),
        "master" => body.u32(10, index(&words.word()?)?),
        "name" => body.text(3, &words.word()?),
        "addrgenmode" if words.take("none") => {
            let six = Body::default().put(8, &[1]);
            body.nest(26, Body::default().nest(u16::from(INET6), six))
        }
        word => return Err(unknown(format_args!("ip link ... {word}"))),
    })
}

fn vxlan(mut words: Words) -> io::Result<Body> {
    let mut data = Body::default();
    while let Some(word) = words.next() {
        data = match word.as_str() {
            "id" => data.u32(1, words.number()?),
            "dev" => data.u32(3, index(&words.word()?)?),
            "local" => match words.value::<IpAddr>()? {
                IpAddr::V4(v4) => data.put(4, &v4.octets()),
                IpAddr::V6(v6) => data.put(17, &v6.octets()),
            },
            "ttl" => data.put(5, &[words.value()?]),
            "learning" => data.put(7, &[1]),
            "nolearning" => data.put(7, &[0]),
            "dstport" => data.put(15, &words.value::<u16>()?.to_be_bytes()),
            "external" => data.put(25, &[1]).put(7, &[0]),
            word => return Err(unknown(format_args!("ip link ... type vxlan {word}"))),
        };
    }
    Ok(data)
}

/// Kind and data of a link.
fn info(kind: &str, data: Body) -> Body {
    Body::default().text(1, kind).nest(2, data)
}

fn add_link(netlink: &mut Netlink, mut words: Words) -> io::Result<String> {
    let mut body = link(0, 0, 0).text(3, &words.word()?);
    while let Some(word) = words.next() {
        if word != "type" {
            body = link_attribute(body, &word, &mut words)?;
            continue;
        }
        let kind = words.word()?;
        let data = match kind.as_str() {
            "vxlan" => vxlan(words)?,
            "veth" if words.take("peer") && words.take("name") => {
                Body::default().nest(1, link(0, 0, 0).text(3, &words.word()?))
            }
            "bridge" => Body::default(),
            kind => return Err(unknown(format_args!("ip link add ... type {kind}"))),
        };
        let body = body.nest(18, info(&kind, data));
        let made = netlink.request(LINKS.new, flag::CREATE | flag::EXCL, &body);
        return made.map(|()| String::new());
    }
    Err(unknown("ip link add without a type"))
}

fn set_link(netlink: &mut Netlink, mut words: Words) -> io::Result<String> {
    words.take("dev");
    let index = index(&words.word()?)?;
    let mut body = Body::default();
    let (mut up, mut changed) = (0, 0);
    while let Some(word) = words.next() {
        match word.as_str() {
            "up" | "down" => (up, changed) = (u32::from(word == "up"), 1),
            "type" if words.take("vxlan") => {
                body = body.nest(18, info("vxlan", vxlan(words.clone())?));
                break;
            }
            word => body = link_attribute(body, word, &mut words)?,
        }
    }
    netlink.request(LINKS.new, 0, &link(index, up, changed).raw(&body.0)).map(|()| String::new())
}

fn address(netlink: &mut Netlink, mut words: Words, kind: u16, flags: u16) -> io::Result<String> {
    let (address, length) = net(&words.word()?)?;
    let (mut device, mut no_dad, mut lifetime) = (0, false, None);
    while let Some(word) = words.next() {
        match word.as_str() {
            "dev" => device = index(&words.word()?)?,
            "nodad" => no_dad = true,
            // `struct ifa_cacheinfo`: preferred for so long, valid for ever.
            "preferred_lft" => {
                lifetime = Some([words.number()?, u32::MAX, 0, 0].map(u32::to_ne_bytes).concat());
            }
            word => return Err(unknown(format_args!("ip addr ... {word}"))),
        }
    }
    let mut body = Body::default()
        .raw(&[family_of(address), length, 0, 0])
        .raw(&device.to_ne_bytes())
        .put(2, &octets(address))
        .put(1, &octets(address))
        .put_if(6, lifetime);
    if no_dad {
        body = body.u32(8, 2);
    }
    netlink.request(kind, flags, &body).map(|()| String::new())
}

fn family_of(address: IpAddr) -> u8 {
    if address.is_ipv4() { INET } else { INET6 }
}

fn protocol(word: &str) -> io::Result<u8> {
    match word {
        "static" => Ok(4),
        "bgp" => Ok(186),
        word => word.parse().map_err(|_| unknown(format_args!("the protocol {word}"))),
    }
}

fn table(word: &str) -> io::Result<u32> {
    match word {
        "main" => Ok(254),
        "local" => Ok(255),
        word => number(word),
    }
}

fn flush_routes(netlink: &mut Netlink, family: Option<u8>, mut words: Words) -> io::Result<String> {
    // Without a word about tables it is the main one.
    let (mut wanted, mut of) = (Some(254), None);
    while let Some(word) = words.next() {
        match word.as_str() {
            "table" if words.take("all") => wanted = None,
            "table" => wanted = Some(table(&words.word()?)?),
            "proto" => of = Some(protocol(&words.word()?)?),
            word => return Err(unknown(format_args!("ip route flush ... {word}"))),
        }
    }
    let picked = |entry: &[u8]| {
        let table = attribute(entry, &ROUTES, 15).and_then(|value| word_at(value, 0));
        wanted.is_none_or(|wanted| table == Some(wanted))
            && of.is_none_or(|of| entry.get(5) == Some(&of))
    };
    flush(netlink, &ROUTES, &any(&ROUTES, family.or(Some(INET))), picked)
}

fn route(
    netlink: &mut Netlink,
    family: Option<u8>,
    mut words: Words,
    flags: u16,
) -> io::Result<String> {
    /// `RTN_UNICAST`.
    const UNICAST: u8 = 1;
    let kind = match words.peek() {
        Some("blackhole") => 6,
        Some("unreachable") => 7,
        Some("throw") => 9,
        _ => UNICAST,
    };
    if kind != UNICAST {
        words.next();
    }
    let destination = words.word()?;
    let destination = if destination == "default" { None } else { Some(net(&destination)?) };
    let family = destination.map(|(address, _)| family_of(address)).or(family).unwrap_or(INET);
    // A route that is deleted may have any protocol and be of any kind, where nothing is said.
    let is_new = flags != 0;
    let mut protocol_of = if is_new { 3 } else { 0 };
    let (mut tos, mut table_of, mut onlink) = (0, 254, false);
    let (mut device, mut gateway, mut metric) = (None, None, None);
    let mut hops = Vec::new();
    while let Some(word) = words.next() {
        match word.as_str() {
            "via" => gateway = Some(words.value::<IpAddr>()?),
            "dev" => device = Some(index(&words.word()?)?),
            "table" => table_of = table(&words.word()?)?,
            "proto" | "protocol" => protocol_of = protocol(&words.word()?)?,
            "metric" => metric = Some(words.number()?),
            "tos" => tos = words.value()?,
            "onlink" => onlink = true,
            "nexthop" => hops.push((None, None)),
            word => return Err(unknown(format_args!("ip route ... {word}"))),
        }
        if let Some(hop) = hops.last_mut() {
            *hop = (gateway.take().or(hop.0), device.take().or(hop.1));
        }
    }
    let is_link = kind == UNICAST && gateway.is_none() && hops.is_empty();
    let scope = match (is_new, is_link) {
        (false, _) => 255,
        (true, true) => 253,
        (true, false) => 0,
    };
    let kind = if is_new || kind != UNICAST { kind } else { 0 };
    let length = destination.map_or(0, |(_, length)| length);
    let header = [family, length, 0, tos, 0, protocol_of, scope, kind];
    let mut nexthops = Vec::new();
    for (gateway, device) in hops {
        let attributes = Body::default().put_if(5, gateway.map(octets)).0;
        let length = u16::try_from(8 + attributes.len()).unwrap_or(u16::MAX);
        nexthops.extend(length.to_ne_bytes());
        nexthops.extend([0, 0]);
        nexthops.extend(device.unwrap_or(0).to_ne_bytes());
        nexthops.extend(attributes);
    }
    let number = |number: Option<u32>| number.map(u32::to_ne_bytes);
    let body = Body::default()
        .raw(&header)
        // RTNH_F_ONLINK
        .raw(&(u32::from(onlink) * 4).to_ne_bytes())
        .put_if(1, destination.map(|(address, _)| octets(address)))
        .put_if(5, gateway.map(octets))
        .put_if(4, number(device))
        .put_if(6, number(metric))
        .put_if(9, (!nexthops.is_empty()).then_some(nexthops))
        .u32(15, table_of);
    let request = if is_new { ROUTES.new } else { ROUTES.new + 1 };
    netlink.request(request, flags, &body).map(|()| String::new())
}

fn rule(
    netlink: &mut Netlink,
    family: Option<u8>,
    mut words: Words,
    flags: u16,
) -> io::Result<String> {
    let is_new = flags != 0;
    let mut family = family;
    let (mut source, mut source_length, mut inverted) = (None, 0, 0_u32);
    // `FR_ACT_TO_TBL`; a rule that is deleted may have any.
    let mut action = u8::from(is_new);
    let mut lookup = is_new.then_some(254);
    let mut attributes = Body::default();
    let mut said = None;
    while let Some(word) = words.next() {
        attributes = match word.as_str() {
            "not" => {
                inverted = 2;
                attributes
            }
            "from" => {
                let (address, length) = net(&words.word()?)?;
                family = family.or(Some(family_of(address)));
                (source, source_length) = (Some(octets(address)), length);
                attributes
            }
            "lookup" | "table" => {
                (action, lookup) = (1, Some(table(&words.word()?)?));
                attributes
            }
            "unreachable" | "prohibit" => {
                (action, lookup) = (if word == "prohibit" { 8 } else { 7 }, None);
                attributes
            }
            "goto" => {
                (action, lookup) = (2, None);
                attributes.u32(4, words.number()?)
            }
            "pref" => attributes.u32(6, words.number()?),
            "fwmark" => {
                let mark = words.word()?;
                let (mark, mask) =
                    mark.split_once('/').map_or((&*mark, None), |(mark, mask)| (mark, Some(mask)));
                let mask = mask.map(number).transpose()?.map(u32::to_ne_bytes);
                attributes.u32(10, number(mark)?).put_if(16, mask)
            }
            "iif" => attributes.text(3, &words.word()?),
            "protocol" | "proto" => {
                said = Some(protocol(&words.word()?)?);
                attributes
            }
            "ipproto" if words.take("udp") => attributes.put(22, &[17]),
            "dport" => {
                let port = words.value::<u16>()?.to_ne_bytes();
                attributes.put(24, &[port, port].concat())
            }
            "suppress_prefixlength" => attributes.u32(14, words.number()?),
            word => return Err(unknown(format_args!("ip rule ... {word}"))),
        };
    }
    let family = family.unwrap_or(INET);
    let body = Body::default()
        .raw(&[family, 0, source_length, 0, 0, 0, 0, action])
        .raw(&inverted.to_ne_bytes())
        .put_if(2, source)
        .put_if(15, lookup.map(u32::to_ne_bytes))
        .put_if(21, said.map(u8::to_ne_bytes))
        .raw(&attributes.0);
    let request = if is_new { RULES.new } else { RULES.new + 1 };
    netlink.request(request, flags, &body).map(|()| String::new())
}

/// The fixed header of a neighbour (`struct ndmsg`).
pub(super) struct Neighbour {
    pub(super) family: u8,
    pub(super) device: u32,
    pub(super) state: u16,
    pub(super) flags: u8,
}

impl Neighbour {
    /// A request for all neighbours of a family.
    pub(super) fn any(family: u8) -> Body {
        Self { family, device: 0, state: 0, flags: 0 }.body()
    }

    pub(super) fn body(&self) -> Body {
        Body::default()
            .raw(&[self.family, 0, 0, 0])
            .raw(&self.device.to_ne_bytes())
            .raw(&self.state.to_ne_bytes())
            .raw(&[self.flags, 0])
    }

    pub(super) fn index_of(entry: &[u8]) -> Option<u32> {
        word_at(entry, 4)
    }

    fn state_of(entry: &[u8]) -> Option<u16> {
        entry.get(8..)?.first_chunk().map(|bytes| u16::from_ne_bytes(*bytes))
    }
}

/// `NUD_PERMANENT`.
const PERMANENT: u16 = 0x80;
/// `NUD_NOARP`.
const NO_ARP: u16 = 0x40;

fn neighbour(netlink: &mut Netlink, mut words: Words) -> io::Result<String> {
    let address: IpAddr = words.value()?;
    let (mut device, mut mac) = (0, Vec::new());
    while let Some(word) = words.next() {
        match word.as_str() {
            "lladdr" => mac = words.mac()?,
            "dev" => device = index(&words.word()?)?,
            "nud" if words.take("permanent") => {}
            word => return Err(unknown(format_args!("ip neigh add ... {word}"))),
        }
    }
    let header = Neighbour { family: family_of(address), device, state: PERMANENT, flags: 0 };
    let body = header.body().put(1, &octets(address)).put(2, &mac);
    netlink.request(NEIGHBOURS.new, flag::CREATE | flag::EXCL, &body).map(|()| String::new())
}

fn flush_neighbours(
    netlink: &mut Netlink,
    family: Option<u8>,
    mut words: Words,
) -> io::Result<String> {
    let (mut device, mut permanent) = (None, false);
    while let Some(word) = words.next() {
        match word.as_str() {
            "all" => {}
            "dev" => device = Some(index(&words.word()?)?),
            "nud" if words.take("permanent") => permanent = true,
            word => return Err(unknown(format_args!("ip neigh flush ... {word}"))),
        }
    }
    let picked = |entry: &[u8]| {
        let state = Neighbour::state_of(entry).unwrap_or(0);
        let is_meant =
            if permanent { state == PERMANENT } else { state & (PERMANENT | NO_ARP) == 0 };
        is_meant && device.is_none_or(|device| Neighbour::index_of(entry) == Some(device))
    };
    flush(netlink, &NEIGHBOURS, &any(&NEIGHBOURS, family), picked)
}
