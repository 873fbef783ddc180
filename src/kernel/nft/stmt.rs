//! Statements as expressions, in the form that `nft` gives them.

mod recognise;
#[cfg(test)]
mod tests;

use super::expr::{Expr, Verdict, base, ct, meta, reg, verdict};
use crate::state::{Direction, MarkBits, NftRule, Set, Stmt};
use crate::types::Family;

pub(super) use recognise::recognise;

/// Protocol numbers of the IP header.
const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMP6: u8 = 58;

/// `ARPHRD_ETHER`, as the tunnel device is.
const ETHERNET: u16 = 1;

/// SYN among the flags of a TCP segment, which are its 14th byte (RFC 9293 section 3.1).
const SYN: u8 = 1 << 1;
const TCP_FLAGS: u32 = 13;

/// `IPS_SRC_NAT` (`include/uapi/linux/netfilter/nf_conntrack_common.h`).
const SOURCE_NAT: u32 = 1 << 4;

/// What must be known of a packet's family before a statement can run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Needs {
    Nothing,
    /// The family is tested unless an earlier statement of the rule did.
    Family(Family),
    /// The test is part of the statement.
    OwnTest(Family),
}

/// Protocol family as `meta nfproto` and `nat` have it.
const fn nfproto(family: Family) -> u8 {
    match family {
        Family::V4 => 2,
        Family::V6 => 10,
    }
}

/// The family of a set's keys.
fn family_of(set: Set) -> Family {
    set.family().unwrap_or(Family::V4)
}

fn needs(statement: &Stmt) -> Needs {
    match statement {
        Stmt::SourceIn(set)
        | Stmt::SourceNotIn(set)
        | Stmt::DestinationIn(set)
        | Stmt::DestinationNotIn(set)
        | Stmt::PacketIn(set)
        | Stmt::TagBySource(set)
        | Stmt::TagByReceiver(set) => Needs::Family(family_of(*set)),
        Stmt::TagByDestination(family, _) | Stmt::TagBySender(family, _) => Needs::Family(*family),
        Stmt::Icmp6Type(_) => Needs::Family(Family::V6),
        Stmt::SnatToSource(family) => Needs::OwnTest(*family),
        _ => Needs::Nothing,
    }
}

/// The expressions of a rule.
pub(super) fn compile(rule: &NftRule) -> Vec<Expr> {
    let mut family = None;
    let mut exprs = Vec::new();
    for statement in &rule.0 {
        match needs(statement) {
            Needs::Family(wanted) if family == Some(wanted) => {}
            Needs::Nothing => {}
            Needs::Family(wanted) | Needs::OwnTest(wanted) => {
                exprs.extend(family_test(wanted));
                family = Some(wanted);
            }
        }
        exprs.extend(body(statement));
    }
    exprs
}

fn family_test(family: Family) -> [Expr; 2] {
    [load(meta::NFPROTO), is(vec![nfproto(family)])]
}

const fn load(key: u32) -> Expr {
    Expr::MetaLoad { key, dreg: reg::R1 }
}

const fn set_tag() -> Expr {
    Expr::MetaSet { key: meta::PRIORITY, sreg: reg::R1 }
}

const fn cmp(equal: bool, data: Vec<u8>) -> Expr {
    Expr::Cmp { sreg: reg::R1, equal, data }
}

const fn is(data: Vec<u8>) -> Expr {
    cmp(true, data)
}

/// A number in host byte order, as marks, priorities and connection bits are.
fn host(number: u32) -> Vec<u8> {
    number.to_ne_bytes().to_vec()
}

fn bits(mask: Vec<u8>, xor: Vec<u8>) -> Expr {
    Expr::Bitwise { sreg: reg::R1, dreg: reg::R1, mask, xor }
}

fn masked(mask: u32) -> Expr {
    bits(host(mask), host(0))
}

fn lookup(set: Set, dreg: Option<u32>, invert: bool) -> Expr {
    Expr::Lookup { set: set.name(), sreg: reg::R1, dreg, invert }
}

/// Bytes of an address.
const fn width(family: Family) -> u32 {
    match family {
        Family::V4 => 4,
        Family::V6 => 16,
    }
}

const fn address(offset: u32, family: Family) -> Expr {
    Expr::Payload { base: base::NETWORK, offset, len: width(family), dreg: reg::R1 }
}

const fn source(family: Family) -> Expr {
    address(if matches!(family, Family::V4) { 12 } else { 8 }, family)
}

const fn destination(family: Family) -> Expr {
    address(if matches!(family, Family::V4) { 16 } else { 24 }, family)
}

const fn transport(offset: u32, len: u32) -> Expr {
    Expr::Payload { base: base::TRANSPORT, offset, len, dreg: reg::R1 }
}

const fn end(code: i32) -> Expr {
    Expr::Immediate(Verdict::plain(code))
}

/// The mask of a prefix length, in network byte order.
fn netmask(family: Family, length: u8) -> Vec<u8> {
    let low = u128::MAX.checked_shr(length.into()).unwrap_or(0);
    let bytes = (!low).to_be_bytes();
    let width = if matches!(family, Family::V4) { 4 } else { 16 };
    bytes.into_iter().take(width).collect()
}

/// A device name as the kernel compares it: all of `IFNAMSIZ` bytes.
fn device(name: &str) -> Vec<u8> {
    let mut bytes = name.as_bytes().to_vec();
    bytes.resize(16, 0);
    bytes
}

/// The expressions of one statement, but for the test of the family in front of it.
fn body(statement: &Stmt) -> Vec<Expr> {
    let on_mark = |mask: u32, then: Expr| vec![load(meta::MARK), masked(mask), then];
    match statement {
        Stmt::HasInput => vec![load(meta::IIF), cmp(false, host(0))],
        Stmt::HasNoOutput => vec![load(meta::OIF), is(host(0))],
        Stmt::InputDevice(name) => vec![load(meta::IIFNAME), is(device(name.as_str()))],
        Stmt::OutputDevice(name) => vec![load(meta::OIFNAME), is(device(name.as_str()))],
        Stmt::MarkIs { mask, value } => on_mark(*mask, is(host(*value))),
        Stmt::MarkIsNot { mask, value } => on_mark(*mask, cmp(false, host(*value))),
        Stmt::MarkIn { mask, set } => on_mark(*mask, lookup(*set, None, false)),
        Stmt::SourceIn(set) => vec![source(family_of(*set)), lookup(*set, None, false)],
        Stmt::SourceNotIn(set) => vec![source(family_of(*set)), lookup(*set, None, true)],
        Stmt::DestinationIn(set) => vec![destination(family_of(*set)), lookup(*set, None, false)],
        Stmt::DestinationNotIn(set) => vec![destination(family_of(*set)), lookup(*set, None, true)],
        Stmt::PacketIn(set) => packet_in(*set),
        Stmt::CtDirection(direction) => {
            let number = match direction {
                Direction::Original => 0,
                Direction::Reply => 1,
            };
            vec![connection(ct::DIRECTION), is(vec![number])]
        }
        Stmt::CtState(states) => vec![connection(ct::STATE), masked(*states), cmp(false, host(0))],
        Stmt::NotTranslated => vec![connection(ct::STATUS), masked(SOURCE_NAT), is(host(0))],
        Stmt::CtMarkIs(MarkBits { mask, value }) => {
            vec![connection(ct::MARK), masked(*mask), is(host(*value))]
        }
        Stmt::CtMarkIsNot(MarkBits { mask, value }) => {
            vec![connection(ct::MARK), masked(*mask), cmp(false, host(*value))]
        }
        Stmt::VerdictByCtMark { mask, set } => {
            vec![connection(ct::MARK), masked(*mask), lookup(*set, Some(reg::VERDICT), false)]
        }
        Stmt::SetCtMark(MarkBits { mask, value }) => vec![
            connection(ct::MARK),
            bits(host(!mask), host(*value)),
            Expr::CtSet { key: ct::MARK, sreg: reg::R1 },
        ],
        Stmt::NoTrack => vec![Expr::NoTrack],
        Stmt::Port(port) => vec![transport(2, 2), is(port.to_be_bytes().to_vec())],
        Stmt::UdpPort(port) => vec![
            load(meta::L4PROTO),
            is(vec![UDP]),
            transport(2, 2),
            is(port.to_be_bytes().to_vec()),
        ],
        Stmt::TcpWithoutSyn => vec![
            load(meta::L4PROTO),
            is(vec![TCP]),
            transport(TCP_FLAGS, 1),
            bits(vec![SYN], vec![0]),
            is(vec![0]),
        ],
        Stmt::Icmp6Type(kind) => {
            vec![load(meta::L4PROTO), is(vec![ICMP6]), transport(0, 1), is(vec![*kind])]
        }
        Stmt::SetMark { keep, value } => vec![
            load(meta::MARK),
            bits(host(*keep), host(*value)),
            Expr::MetaSet { key: meta::MARK, sreg: reg::R1 },
        ],
        // At this hook the device counts as the one that the packet came in by.
        Stmt::SetNextHop { mask } => vec![
            load(meta::IIFTYPE),
            is(ETHERNET.to_ne_bytes().to_vec()),
            load(meta::MARK),
            masked(*mask),
            lookup(Set::NextHop, Some(reg::R1), false),
            Expr::PayloadSet { base: base::LINK, offset: 0, len: 6, sreg: reg::R1 },
        ],
        Stmt::ClearTag => vec![Expr::Load { dreg: reg::R1, data: host(0) }, set_tag()],
        Stmt::TagBySource(set) => {
            vec![source(family_of(*set)), lookup(*set, Some(reg::R1), false), set_tag()]
        }
        Stmt::TagByReceiver(set) => {
            vec![destination(family_of(*set)), lookup(*set, Some(reg::R1), false), set_tag()]
        }
        Stmt::TagByDestination(family, length) => {
            tag_by_net(destination(*family), *family, *length)
        }
        Stmt::TagBySender(family, length) => tag_by_net(source(*family), *family, *length),
        Stmt::TagByTag(set) => {
            vec![load(meta::PRIORITY), lookup(*set, Some(reg::R1), false), set_tag()]
        }
        Stmt::TagIn(set) => vec![load(meta::PRIORITY), lookup(*set, None, false)],
        Stmt::VerdictByTag(set) => {
            vec![load(meta::PRIORITY), lookup(*set, Some(reg::VERDICT), false)]
        }
        Stmt::SnatToSource(family) => vec![source(*family), snat(*family)],
        Stmt::SnatByTag(family) => vec![
            load(meta::PRIORITY),
            lookup(Set::Snat(*family), Some(reg::R1), false),
            snat(*family),
        ],
        Stmt::Masquerade => vec![Expr::Masquerade],
        Stmt::Counter => vec![Expr::Counter],
        Stmt::Drop => vec![end(verdict::DROP)],
        Stmt::Return => vec![end(verdict::RETURN)],
        Stmt::Jump(chain) => vec![Expr::Immediate(Verdict::jump(*chain))],
        Stmt::Goto(chain) => vec![Expr::Immediate(Verdict::goto(*chain))],
        Stmt::Unknown(hash) => vec![Expr::Other(*hash)],
    }
}

/// Addresses, protocol and ports, one behind the other, looked up as one key.
fn packet_in(set: Set) -> Vec<Expr> {
    let family = family_of(set);
    let (at, len) = (|parts: u32| reg::after(2 * width(family) + 4 * parts), width(family));
    let (from, to) = if len == 4 { (12, 16) } else { (8, 24) };
    let header = |base, offset, len, dreg| Expr::Payload { base, offset, len, dreg };
    let mut exprs = vec![
        header(base::NETWORK, from, len, reg::R1),
        header(base::NETWORK, to, len, reg::after(len)),
        Expr::MetaLoad { key: meta::L4PROTO, dreg: at(0) },
    ];
    if let Set::Answer(_) = set {
        exprs.push(header(base::TRANSPORT, 0, 2, at(1)));
        exprs.push(header(base::TRANSPORT, 2, 2, at(2)));
    }
    exprs.push(lookup(set, None, false));
    exprs
}

const fn connection(key: u32) -> Expr {
    Expr::Ct { key, dreg: reg::R1 }
}

fn snat(family: Family) -> Expr {
    Expr::Snat { family: nfproto(family).into(), sreg: reg::R1 }
}

fn tag_by_net(address: Expr, family: Family, length: u8) -> Vec<Expr> {
    let mut exprs = vec![address];
    if length < family.bits() {
        let mask = netmask(family, length);
        let zero = vec![0; mask.len()];
        exprs.push(bits(mask, zero));
    }
    exprs.extend([
        Expr::MetaLoad {
            key: meta::PRIORITY,
            dreg: match family {
                Family::V4 => reg::AFTER_4,
                Family::V6 => reg::AFTER_16,
            },
        },
        lookup(Set::Destination(family, length), Some(reg::R1), false),
        set_tag(),
    ]);
    exprs
}
