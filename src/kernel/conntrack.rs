//! Conntrack entries: dumped, marked, and deleted one by one.
//!
//! The numbers are from `include/uapi/linux/netfilter/nfnetlink_conntrack.h`. A delete request
//! without a connection in it would flush the whole table, so this module cannot write one.

#[cfg(test)]
mod listing;
#[cfg(test)]
mod mutated;

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};

use super::netlink::exchange::{AT_ONCE, in_one_piece, request_all};
use super::netlink::message::{Attribute, Attributes, Malformed, Writer, flag};
use super::netlink::nfnetlink::{Request, ask};
use super::netlink::socket::Socket;
use crate::connection::Connection;
use crate::datapath::{Among, MarkBits, OnConnection};
use crate::diff::op::Op;
use crate::error::{KernelError, errno};
use crate::types::Family;

const NEW: u16 = 0x100;
const GET: u16 = 0x101;
const DELETE: u16 = 0x102;
/// `IPCTNL_MSG_CT_GET_STATS`.
const STATS: u16 = 0x105;

const TUPLE_ORIG: u16 = 1;
const TUPLE_REPLY: u16 = 2;
const MARK: u16 = 8;
const ID: u16 = 12;
const ZONE: u16 = 18;
const MARK_MASK: u16 = 21;
/// Fields of the tuples that a dump is filtered by.
const FILTER: u16 = 25;
/// Filter by source address (`CTA_FILTER_FLAG(CTA_IP_SRC)` of `nf_conntrack_netlink.c`).
const BY_SOURCE: u32 = 1;

// Attributes of a tuple.
const TUPLE_IP: u16 = 1;
const TUPLE_PROTOCOL: u16 = 2;
const TUPLE_ZONE: u16 = 3;

const TEXT: &str = "conntrack -L";
const NO_CONNTRACK: &str = "load nf_conntrack_netlink or use a kernel with CONFIG_NF_CT_NETLINK";

/// Number of connections whose dump takes as long as a filtered dump of none: the kernel walks all
/// hash buckets of the whole machine for either.
const WALK: u32 = 3_500;

/// Number of connections that a filtered dump leaves out in the time in which one is sent.
const SKIPPED: u32 = 16;

/// Calls `each` with the connections among some that the kernel tracks here.
///
/// The dump is no snapshot: connections start and end during it, and a dump that is repeated lists
/// some of them twice. The kernel walks through all hash buckets of the whole machine for it, so it
/// is skipped if the kernel counts no connection.
pub(super) fn connections(
    socket: &mut Socket,
    among: Among<'_>,
    each: &mut OnConnection<'_>,
) -> Result<(), KernelError> {
    let tracked = count(socket);
    if tracked == Some(0) {
        return Ok(());
    }
    let tracked = tracked.unwrap_or(0);
    let few = tracked.saturating_add(WALK) / (tracked / SKIPPED + WALK);
    let mut picks = picks(among);
    if picks.len() > usize::try_from(few).unwrap_or(usize::MAX) {
        picks = [Pick::All].into();
    }
    picks.into_iter().try_for_each(|pick| dump(socket, pick, among, each))
}

/// The connections that the kernel sends in a dump.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Pick {
    All,
    V6,
    /// Connections from a source; kernels before 5.8 send all of the family.
    Source(Ipv4Addr),
    /// Connections whose replies have this source; kernels before 5.8 send all of the family.
    ReplySource(Ipv4Addr),
    Mark(MarkBits),
}

impl Pick {
    /// The connections of a source, and others.
    const fn of(source: IpAddr) -> Self {
        match source {
            IpAddr::V4(source) => Self::Source(source),
            // The kernel's filter by IPv6 source is inverted: it leaves out the requested address
            // and sends all others (`ctnetlink_filter_match_tuple`, seen on 6.18).
            IpAddr::V6(_) => Self::V6,
        }
    }

    /// The connections whose replies have a source, and others.
    const fn to(source: IpAddr) -> Self {
        match source {
            IpAddr::V4(source) => Self::ReplySource(source),
            IpAddr::V6(_) => Self::V6,
        }
    }

    /// Writes the filter of a dump.
    fn write(self, writer: &mut Writer) {
        match self {
            Self::All => writer.nfgen(0, 0),
            Self::V6 => writer.nfgen(10, 0),
            Self::Source(source) | Self::ReplySource(source) => {
                let (tuple, flags) = match self {
                    Self::Source(_) => (TUPLE_ORIG, [BY_SOURCE, 0]),
                    _ => (TUPLE_REPLY, [0, BY_SOURCE]),
                };
                writer.nfgen(2, 0);
                writer.nest(tuple, |writer| {
                    writer.nest(1, |writer| writer.attribute(1, &source.octets()));
                });
                writer.nest(FILTER, |writer| {
                    // Native byte order, as the kernel reads these flags.
                    for (kind, flags) in (1..).zip(flags) {
                        writer.attribute(kind, &flags.to_ne_bytes());
                    }
                });
            }
            Self::Mark(bits) => {
                writer.nfgen(0, 0);
                writer.be32(MARK, bits.value);
                writer.be32(MARK_MASK, bits.mask);
            }
        }
    }
}

/// Returns the dumps that together have all connections among some.
fn picks(among: Among<'_>) -> BTreeSet<Pick> {
    let of = |sources: &BTreeSet<IpAddr>| sources.iter().copied().map(Pick::of).collect();
    match among {
        Among::All => [Pick::All].into(),
        Among::Sources(sources) => of(sources),
        Among::Pods(pods) => {
            let mut picks: BTreeSet<_> = of(pods);
            picks.extend(pods.iter().copied().map(Pick::to));
            picks
        }
        Among::SourcesOrMarks(sources, marks) => {
            let mut picks: BTreeSet<_> = of(sources);
            picks.extend(marks.iter().copied().map(Pick::Mark));
            picks
        }
    }
}

/// Dumps connections, and leaves out those that are not needed.
fn dump(
    socket: &mut Socket,
    pick: Pick,
    among: Among<'_>,
    each: &mut OnConnection<'_>,
) -> Result<(), KernelError> {
    let request = Request { text: TEXT, kind: GET, flags: flag::DUMP, answer: NEW };
    let found = in_one_piece(|| {
        let take = |_, body: &[u8]| {
            // An entry that cannot be parsed must not prevent the others from being checked.
            let found = read(Attributes::new(body)).ok().flatten();
            found.into_iter().filter(|found| among.has(found)).for_each(&mut *each);
            Ok(())
        };
        let answered = ask(socket, &request, |writer| pick.write(writer), take);
        Ok(((), answered.map_err(explained)?))
    })?;
    found.ok_or_else(|| {
        KernelError::answer(TEXT, "connections change faster than they can be listed")
    })
}

/// Number of connections in this network namespace, unconfirmed ones included.
///
/// `None` if the kernel does not report it.
fn count(socket: &mut Socket) -> Option<u32> {
    let request = Request { text: "conntrack -C", kind: STATS, flags: 0, answer: STATS };
    let mut count = None;
    let take = |_, body: &[u8]| {
        let entries = Attributes::new(body).flatten().find(|attribute| attribute.kind == 1);
        count = entries.and_then(|entries| entries.be32().ok());
        Ok(())
    };
    ask(socket, &request, |writer| writer.nfgen(0, 0), take).ok()?;
    count
}

fn explained(error: KernelError) -> KernelError {
    match error.errno() {
        Some(errno::EINVAL | errno::EOPNOTSUPP) => error.with_remedy(NO_CONNTRACK),
        _ => error,
    }
}

/// Tuple of one direction of a connection.
struct Tuple {
    protocol: u8,
    source: IpAddr,
    source_port: u16,
    destination: IpAddr,
    destination_port: u16,
    /// Conntrack zone of this direction, if the two directions have different zones.
    zone: Option<u16>,
}

/// Parses a conntrack entry; `None` if it lacks an address or a protocol.
fn read(attributes: Attributes<'_>) -> Result<Option<Connection>, Malformed> {
    let (mut orig, mut reply, mut mark, mut both, mut id) = (None, None, 0, None, 0);
    for attribute in attributes {
        let attribute = attribute?;
        match attribute.kind {
            TUPLE_ORIG => orig = tuple(attribute.nested())?,
            TUPLE_REPLY => reply = tuple(attribute.nested())?,
            MARK => mark = attribute.be32()?,
            ZONE => both = Some(be16(&attribute)?),
            ID => id = attribute.be32()?,
            _ => {}
        }
    }
    // Zone of both directions, or of one of them, and then the other has zone 0.
    let zone = |tuple: &Tuple| both.or(tuple.zone).unwrap_or(0);
    Ok(orig.zip(reply).map(|(orig, reply)| Connection {
        protocol: orig.protocol,
        source: orig.source,
        source_port: orig.source_port,
        destination: orig.destination,
        destination_port: orig.destination_port,
        peer: reply.source,
        reply_source_port: reply.source_port,
        snat_address: reply.destination,
        snat_port: reply.destination_port,
        mark,
        zone: zone(&orig),
        reply_zone: zone(&reply),
        id,
    }))
}

fn tuple(attributes: Attributes<'_>) -> Result<Option<Tuple>, Malformed> {
    let (mut source, mut destination) = (None, None);
    let (mut protocol, mut ports, mut icmp, mut zone) = (None, [0; 2], [None; 3], None);
    for attribute in attributes {
        let attribute = attribute?;
        match attribute.kind {
            TUPLE_IP | TUPLE_PROTOCOL => {}
            TUPLE_ZONE => {
                zone = Some(be16(&attribute)?);
                continue;
            }
            _ => continue,
        }
        for inner in attribute.nested() {
            let inner = inner?;
            match (attribute.kind, inner.kind) {
                (TUPLE_IP, 1 | 3) => source = address(&inner)?,
                (TUPLE_IP, 2 | 4) => destination = address(&inner)?,
                (TUPLE_PROTOCOL, 1) => protocol = inner.bytes().first().copied(),
                (TUPLE_PROTOCOL, 2) => ports[0] = be16(&inner)?,
                (TUPLE_PROTOCOL, 3) => ports[1] = be16(&inner)?,
                (TUPLE_PROTOCOL, 4 | 7) => icmp[0] = Some(be16(&inner)?),
                (TUPLE_PROTOCOL, 5 | 8) => icmp[1] = inner.bytes().first().copied().map(u16::from),
                (TUPLE_PROTOCOL, 6 | 9) => icmp[2] = inner.bytes().first().copied().map(u16::from),
                _ => {}
            }
        }
    }
    let ([source_port, destination_port], [icmp_id, kind, code]) = (ports, icmp);
    let type_code = kind.zip(code).map(|(kind, code)| kind << 8 | code);
    let addresses = source.zip(destination).zip(protocol);
    Ok(addresses.map(|((source, destination), protocol)| Tuple {
        protocol,
        source,
        source_port: icmp_id.unwrap_or(source_port),
        destination,
        destination_port: type_code.unwrap_or(destination_port),
        zone,
    }))
}

fn be16(attribute: &Attribute<'_>) -> Result<u16, Malformed> {
    let bytes = attribute.bytes().try_into();
    bytes.map(u16::from_be_bytes).map_err(|_| Malformed("a port has a wrong length"))
}

fn address(attribute: &Attribute<'_>) -> Result<Option<IpAddr>, Malformed> {
    let bytes = attribute.bytes();
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Ok(Some(IpAddr::from(v4)));
    }
    let v6 = <[u8; 16]>::try_from(bytes);
    v6.map(|v6| Some(IpAddr::from(v6))).map_err(|_| Malformed("an address has a wrong length"))
}

/// Marks or deletes conntrack entries; an entry that no longer exists is no error.
pub(super) fn make(socket: &mut Socket, ops: &[Op]) -> Vec<(usize, KernelError)> {
    let mut refused = Vec::new();
    for (part, chunk) in ops.chunks(AT_ONCE).enumerate() {
        let found = make_some(socket, chunk);
        refused.extend(found.into_iter().map(|(index, error)| (part * AT_ONCE + index, error)));
    }
    refused
}

fn make_some(socket: &mut Socket, ops: &[Op]) -> Vec<(usize, KernelError)> {
    let mut writer = Writer::default();
    let mut requests = Vec::with_capacity(ops.len());
    let mut places = Vec::with_capacity(ops.len());
    for (place, op) in ops.iter().enumerate() {
        let sequence = socket.next_sequence();
        if write(&mut writer, op, sequence) {
            requests.push((sequence, op));
            places.push(place);
        }
    }
    let too_large = |(_, op): &(u32, &Op)| KernelError::answer(op, "it does not fit");
    let refused = match writer.finish() {
        Some(datagram) => request_all(socket, &datagram, &requests),
        None => requests.iter().map(too_large).enumerate().collect(),
    };
    let refused = refused.into_iter().filter(|(_, error)| error.errno() != Some(errno::ENOENT));
    refused.filter_map(|(index, error)| Some((*places.get(index)?, explained(error)))).collect()
}

/// Writes a request; `false` if the operation is not about a connection.
///
/// It names the connection by its reply tuple. The kernel may end a translated connection after it
/// was listed (`nf_nat_oif_changed` of `net/netfilter/nf_nat_core.c` does when it is steered), and
/// the pod's next packet opens one with the same original tuple and often the same id. Its replies
/// are not translated, so only the reply tuple tells it from the first.
fn write(writer: &mut Writer, op: &Op, sequence: u32) -> bool {
    let (connection, kind) = match op {
        // Without NLM_F_CREATE the kernel creates no entry.
        Op::MarkConnection(connection, _) => (connection, NEW),
        Op::EndConnection(connection) => (connection, DELETE),
        _ => return false,
    };
    let (family, base) = match Family::of(connection.source) {
        Family::V4 => (2, 0),
        Family::V6 => (10, 2),
    };
    let message = writer.message(kind, flag::REQUEST | flag::ACK, sequence);
    writer.nfgen(family, 0);
    writer.nest(TUPLE_REPLY, |writer| {
        writer.nest(TUPLE_IP, |writer| {
            for (kind, address) in [(1, connection.peer), (2, connection.snat_address)] {
                match address {
                    IpAddr::V4(v4) => writer.attribute(base + kind, &v4.octets()),
                    IpAddr::V6(v6) => writer.attribute(base + kind, &v6.octets()),
                }
            }
        });
        writer.nest(TUPLE_PROTOCOL, |writer| protocol(writer, connection));
    });
    match op {
        Op::MarkConnection(_, bits) => {
            // The kernel does not compare the id here: a new connection with the same addresses has
            // the same policy and goes to the same gateway.
            writer.be32(MARK, bits.value);
            writer.be32(MARK_MASK, bits.mask);
        }
        // Without the id the request would delete any new connection with the same addresses.
        _ => writer.be32(ID, connection.id),
    }
    if connection.reply_zone != 0 {
        writer.attribute(ZONE, &connection.reply_zone.to_be_bytes());
    }
    writer.end(message);
    true
}

fn protocol(writer: &mut Writer, connection: &Connection) {
    let (source, destination) =
        (connection.reply_source_port.to_be_bytes(), connection.snat_port.to_be_bytes());
    writer.attribute(1, &[connection.protocol]);
    let icmp = match connection.protocol {
        1 => 4,
        58 => 7,
        _ => {
            writer.attribute(2, &source);
            writer.attribute(3, &destination);
            return;
        }
    };
    let [kind, code] = destination;
    writer.attribute(icmp, &source);
    writer.attribute(icmp + 1, &[kind]);
    writer.attribute(icmp + 2, &[code]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::netlink::message::Messages;

    pub(super) fn sample(source: &str, destination: &str, protocol: u8) -> Connection {
        Connection {
            protocol,
            source: source.parse().unwrap(),
            source_port: 40_000,
            destination: destination.parse().unwrap(),
            destination_port: 0x0800,
            peer: destination.parse().unwrap(),
            reply_source_port: 0x0800,
            snat_address: source.parse().unwrap(),
            snat_port: 40_000,
            mark: 0,
            zone: 7,
            reply_zone: 7,
            id: 0x1234_5678,
        }
    }

    /// Payload of the only message of a datagram.
    fn body(datagram: &[u8]) -> &[u8] {
        let message = Messages::new(datagram).next().unwrap().unwrap();
        let (_, rest) = message.nfgen().unwrap();
        rest
    }

    #[test]
    fn what_is_written_reads_back() {
        for connection in [
            sample("10.244.1.10", "198.51.100.10", 17),
            sample("fd44:1::10", "2001:db8:51::10", 6),
            sample("10.244.1.10", "198.51.100.10", 1),
            sample("fd44:1::10", "2001:db8:51::10", 58),
        ] {
            let mut writer = Writer::default();
            write(&mut writer, &Op::EndConnection(connection), 1);
            let datagram = writer.finish().unwrap();
            // A dumped entry has the tuple of the original direction, too.
            let both = [body(&datagram), &original(body(&datagram))].concat();
            let read = read(Attributes::new(&both)).unwrap().unwrap();
            // The original tuple is a copy of the reply tuple, so the peer is read as its source.
            let Connection { peer, reply_source_port, snat_address, snat_port, .. } = connection;
            let (source, source_port) = (peer, reply_source_port);
            let (destination, destination_port) = (snat_address, snat_port);
            assert_eq!(
                read,
                Connection { source, source_port, destination, destination_port, ..connection }
            );
        }
    }

    #[test]
    fn zone_of_one_direction_is_read_and_that_of_replies_requested() {
        let mut connection = sample("10.244.1.10", "198.51.100.10", 17);
        connection.reply_zone = 0;
        let mut writer = Writer::default();
        write(&mut writer, &Op::EndConnection(connection), 1);
        let datagram = writer.finish().unwrap();
        let tuple = Attributes::new(body(&datagram)).next().unwrap().unwrap().bytes().to_vec();
        for (kind, zones) in [(TUPLE_ORIG, (5, 0)), (TUPLE_REPLY, (0, 5))] {
            let mut writer = Writer::default();
            for side in [TUPLE_ORIG, TUPLE_REPLY] {
                writer.nest(side, |writer| {
                    writer.raw(&tuple);
                    if side == kind {
                        writer.attribute(TUPLE_ZONE, &5_u16.to_be_bytes());
                    }
                });
            }
            let read = read(Attributes::new(&writer.finish().unwrap())).unwrap().unwrap();
            assert_eq!((read.zone, read.reply_zone), zones);
            let mut writer = Writer::default();
            write(&mut writer, &Op::EndConnection(read), 1);
            let datagram = writer.finish().unwrap();
            let mut requested = Attributes::new(body(&datagram)).flatten();
            let zone = requested.find(|attribute| attribute.kind == ZONE);
            assert_eq!(zone.map_or(0, |zone| be16(&zone).unwrap()), zones.1);
        }
    }

    /// Tuple of a request, as the tuple of the original direction.
    fn original(body: &[u8]) -> Vec<u8> {
        let tuple = Attributes::new(body).next().unwrap().unwrap();
        let mut writer = Writer::default();
        writer.nest(TUPLE_ORIG, |writer| writer.raw(tuple.bytes()));
        writer.finish().unwrap()
    }

    #[test]
    fn damaged_connections_are_read_without_panic() {
        let mut writer = Writer::default();
        write(&mut writer, &Op::EndConnection(sample("10.244.1.10", "198.51.100.10", 1)), 1);
        let bytes = body(&writer.finish().unwrap()).to_vec();
        for at in 0..bytes.len() {
            for flip in 1..=255 {
                let mut other = bytes.clone();
                other[at] ^= flip;
                let _any = read(Attributes::new(&other));
                let _cut = read(Attributes::new(&other[..at]));
            }
        }
    }
}
