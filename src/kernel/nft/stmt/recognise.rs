//! Statements found in expressions.
//!
//! A guess is made from what is characteristic of a statement; then the guess is compiled and
//! compared with what is there. So whatever is recognised compiles to what was found.

use super::{Needs, TCP, UDP, body, needs, nfproto};
use crate::kernel::nft::expr::{Expr, base, ct, meta, reg, verdict};
use crate::state::{ChainId, Direction, MarkBits, NftRule, Set, Stmt};
use crate::types::{DeviceName, Family};

/// The statements of a rule; what is not one of ours becomes [`Stmt::Unknown`].
pub(crate) fn recognise(exprs: &[Expr]) -> NftRule {
    let mut family = None;
    let mut statements = Vec::new();
    let mut rest = exprs;
    while let Some(first) = rest.first() {
        let (statement, length) =
            next(rest, &mut family).unwrap_or_else(|| (Stmt::Unknown(first.hash()), 1));
        statements.push(statement);
        rest = rest.get(length..).unwrap_or_default();
    }
    NftRule(statements)
}

/// The statement in front, and how many expressions it is.
fn next(exprs: &[Expr], known: &mut Option<Family>) -> Option<(Stmt, usize)> {
    let tested = tested_family(exprs);
    let skip = if tested.is_some() { 2 } else { 0 };
    let rest = exprs.get(skip..)?;
    let statement = guess(rest)?;
    let fits = match needs(&statement) {
        Needs::Nothing => tested.is_none(),
        Needs::Family(family) => tested.or(*known) == Some(family),
        Needs::OwnTest(family) => tested == Some(family),
    };
    let shape = body(&statement);
    if !fits || !rest.starts_with(&shape) {
        return None;
    }
    *known = tested.or(*known);
    Some((statement, skip + shape.len()))
}

fn tested_family(exprs: &[Expr]) -> Option<Family> {
    match exprs {
        [
            Expr::MetaLoad { key: meta::NFPROTO, dreg: reg::R1 },
            Expr::Cmp { sreg: reg::R1, equal: true, data },
            ..,
        ] => Family::BOTH.into_iter().find(|family| data.as_slice() == [nfproto(*family)]),
        _ => None,
    }
}

/// The statement that these expressions look like.
fn guess(exprs: &[Expr]) -> Option<Stmt> {
    match exprs.first()? {
        Expr::MetaLoad { key, .. } => guess_meta(*key, exprs.get(1..)?),
        Expr::Payload { base: base::TRANSPORT, .. } => match exprs.get(1)? {
            Expr::Cmp { data, .. } => Some(Stmt::Port(port(data)?)),
            _ => None,
        },
        Expr::Payload { offset, .. } => guess_address(*offset, exprs.get(1..)?),
        Expr::Ct { key, .. } => match (*key, exprs.get(1..)?) {
            (ct::DIRECTION, [Expr::Cmp { data, .. }, ..]) => match data.as_slice() {
                [0] => Some(Stmt::CtDirection(Direction::Original)),
                [1] => Some(Stmt::CtDirection(Direction::Reply)),
                _ => None,
            },
            (ct::STATE, [Expr::Bitwise { mask, .. }, ..]) => Some(Stmt::CtState(host(mask)?)),
            (ct::STATUS, _) => Some(Stmt::NotTranslated),
            (ct::MARK, [Expr::Bitwise { mask, xor, .. }, then, ..]) => {
                let (mask, xor) = (host(mask)?, host(xor)?);
                Some(match then {
                    Expr::Cmp { equal: true, data, .. } => {
                        Stmt::CtMarkIs(MarkBits { mask, value: host(data)? })
                    }
                    Expr::Cmp { data, .. } => {
                        Stmt::CtMarkIsNot(MarkBits { mask, value: host(data)? })
                    }
                    Expr::Lookup { set, .. } => {
                        Stmt::VerdictByCtMark { mask, set: Set::from_name(set)? }
                    }
                    _ => Stmt::SetCtMark(MarkBits { mask: !mask, value: xor }),
                })
            }
            _ => None,
        },
        Expr::NoTrack => Some(Stmt::NoTrack),
        Expr::Load { .. } => Some(Stmt::ClearTag),
        Expr::Masquerade => Some(Stmt::Masquerade),
        Expr::Counter => Some(Stmt::Counter),
        Expr::Immediate(end) => match end.code {
            verdict::DROP => Some(Stmt::Drop),
            verdict::RETURN => Some(Stmt::Return),
            verdict::JUMP => Some(Stmt::Jump(ChainId::from_name(end.chain.as_deref()?)?)),
            verdict::GOTO => Some(Stmt::Goto(ChainId::from_name(end.chain.as_deref()?)?)),
            _ => None,
        },
        _ => None,
    }
}

fn guess_meta(key: u32, rest: &[Expr]) -> Option<Stmt> {
    match (key, rest) {
        (meta::IIF, _) => Some(Stmt::HasInput),
        (meta::OIF, _) => Some(Stmt::HasNoOutput),
        (meta::IIFTYPE, [_, _, Expr::Bitwise { mask, .. }, ..]) => {
            Some(Stmt::SetNextHop { mask: host(mask)? })
        }
        (meta::IIFNAME, [Expr::Cmp { data, .. }, ..]) => Some(Stmt::InputDevice(device(data)?)),
        (meta::OIFNAME, [Expr::Cmp { data, .. }, ..]) => Some(Stmt::OutputDevice(device(data)?)),
        (meta::MARK, [Expr::Bitwise { mask, xor, .. }, then, ..]) => {
            let (mask, xor) = (host(mask)?, host(xor)?);
            match then {
                Expr::Cmp { equal: true, data, .. } => {
                    Some(Stmt::MarkIs { mask, value: host(data)? })
                }
                Expr::Cmp { data, .. } => Some(Stmt::MarkIsNot { mask, value: host(data)? }),
                Expr::Lookup { set, .. } => Some(Stmt::MarkIn { mask, set: Set::from_name(set)? }),
                _ => Some(Stmt::SetMark { keep: mask, value: xor }),
            }
        }
        (meta::L4PROTO, [Expr::Cmp { data, .. }, _, Expr::Bitwise { .. }, ..])
            if data.as_slice() == [TCP] =>
        {
            Some(Stmt::TcpWithoutSyn)
        }
        (meta::L4PROTO, [Expr::Cmp { data: proto, .. }, _, Expr::Cmp { data, .. }, ..]) => {
            match (proto.as_slice(), data.as_slice()) {
                ([UDP], data @ [_, _]) => Some(Stmt::UdpPort(port(data)?)),
                (_, [kind]) => Some(Stmt::Icmp6Type(*kind)),
                _ => None,
            }
        }
        (meta::PRIORITY, [Expr::Lookup { set, dreg, .. }, then @ ..]) => {
            let set = Set::from_name(set)?;
            match (dreg, then.first(), set) {
                (None, ..) => Some(Stmt::TagIn(set)),
                (Some(reg::VERDICT), ..) => Some(Stmt::VerdictByTag(set)),
                (_, Some(Expr::Snat { .. }), Set::Snat(family)) => Some(Stmt::SnatByTag(family)),
                _ => Some(Stmt::TagByTag(set)),
            }
        }
        _ => None,
    }
}

/// A statement that begins with an address, whose offset says which.
fn guess_address(offset: u32, rest: &[Expr]) -> Option<Stmt> {
    let rest = match rest {
        [Expr::Bitwise { .. }, rest @ ..] => rest,
        _ => rest,
    };
    let other = |expr: &&Expr| !matches!(expr, Expr::Payload { .. } | Expr::MetaLoad { .. });
    let behind = rest.iter().find(other);
    if let ([Expr::Payload { .. }, ..], Some(Expr::Lookup { set, dreg: None, .. })) = (rest, behind)
    {
        return Set::from_name(set).map(Stmt::PacketIn);
    }
    let is_source = offset == 12 || offset == 8;
    match rest {
        [Expr::MetaLoad { .. }, Expr::Lookup { set, .. }, ..] => match Set::from_name(set)? {
            Set::Destination(family, length) if is_source => {
                Some(Stmt::TagBySender(family, length))
            }
            Set::Destination(family, length) => Some(Stmt::TagByDestination(family, length)),
            _ => None,
        },
        [Expr::Lookup { set, dreg, invert, .. }, ..] => {
            let set = Set::from_name(set)?;
            Some(match (is_source, dreg.is_some(), invert) {
                (true, true, _) => Stmt::TagBySource(set),
                (true, false, false) => Stmt::SourceIn(set),
                (true, false, true) => Stmt::SourceNotIn(set),
                (false, true, _) => Stmt::TagByReceiver(set),
                (false, false, false) => Stmt::DestinationIn(set),
                (false, false, true) => Stmt::DestinationNotIn(set),
            })
        }
        [Expr::Snat { family, .. }, ..] => Family::BOTH
            .into_iter()
            .find(|candidate| u32::from(nfproto(*candidate)) == *family)
            .map(Stmt::SnatToSource),
        _ => None,
    }
}

/// A number in host byte order.
fn host(bytes: &[u8]) -> Option<u32> {
    bytes.try_into().ok().map(u32::from_ne_bytes)
}

/// A number in network byte order.
fn port(bytes: &[u8]) -> Option<u16> {
    bytes.try_into().ok().map(u16::from_be_bytes)
}

fn device(bytes: &[u8]) -> Option<DeviceName> {
    let name = bytes.split(|byte| *byte == 0).next()?;
    DeviceName::new(std::str::from_utf8(name).ok()?).ok()
}
