//! Tests of statements against the messages of `nft` and against hostile bytes.

use proptest::prelude::*;

use super::{FIELDS, Form, TCP, UDP, compile, form, recognise};
use crate::kernel::netlink::message::{Attributes, Malformed, Writer};
use crate::kernel::nft::expr::Expr;
use crate::kernel::nft::{chain, element, set};
use crate::state::{Field, MarkBits, MarkOf, NftRule, Set, Stmt, TableFamily, Target};
use crate::types::Family;

/// Rules and the bytes that `nft` sends for them.
fn golden() -> Vec<(&'static str, Vec<u8>)> {
    let mut lines = include_str!("golden.txt").lines().filter(|line| !line.starts_with('#'));
    let mut list = Vec::new();
    while let (Some(rule), Some(hex)) = (lines.next(), lines.next()) {
        let byte = |at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap();
        list.push((rule, (0..hex.len()).step_by(2).map(byte).collect()));
    }
    assert_eq!(list.len(), 52);
    list
}

fn read(bytes: &[u8]) -> Result<Vec<Expr>, Malformed> {
    Attributes::new(bytes).map(|element| Ok(Expr::read(&element?))).collect()
}

fn written(exprs: &[Expr]) -> Vec<u8> {
    let mut writer = Writer::default();
    for expr in exprs {
        expr.write(&mut writer);
    }
    writer.finish().unwrap()
}

/// Statements, each kind at least once.
fn statements() -> Vec<Stmt> {
    let mut list: Vec<_> =
        golden().iter().flat_map(|(_, bytes)| recognise(&read(bytes).unwrap()).0).collect();
    let set_mark = |mask, value| Stmt::SetMark(MarkOf::Packet, MarkBits { mask, value });
    for family in Family::BOTH {
        let (source, destination) = (Field::Source(family), Field::Destination(family));
        list.extend([
            source.is_not_in(Set::Peer(family)),
            destination.is_not_in(Set::Excluded(family)),
            source.map(Set::SourceNet(family), Target::Priority),
            destination.map(Set::SourceNet(family), Target::Priority),
            Field::Priority.map(Set::Snat(family), Target::Snat(family)),
            Field::Priority.map(Set::Snat(family), Target::Priority),
            Stmt::answers(Set::BlockedReply(family)),
            Stmt::answers(Set::PortlessBlockedReply(family)),
            Stmt::KeepSource(family),
            Stmt::ClampMss(family, 1410),
        ]);
        list.extend((1..=family.bits()).map(|bits| Stmt::by_prefix(destination, bits)));
        list.extend((1..=family.bits()).map(|bits| Stmt::by_prefix(source, bits)));
    }
    // Each field, with and without a mask, even if no rule of the datapath compares it.
    let numbers =
        FIELDS.iter().filter(|field| !matches!(form(**field), Form::Address(_) | Form::Mac));
    for field in numbers {
        // The protocol occurs only in set keys: a comparison of it belongs to the field that
        // follows.
        if *field != Field::Protocol {
            let bits = MarkBits { mask: 0x7f, value: 0x13 };
            list.extend([field.is(7), field.is_not(0), field.has(bits), field.has_not(bits)]);
        }
    }
    list.extend([
        Field::EthernetSource.map(Set::PeerMac, Target::Verdict),
        Stmt::Unknown(7),
        set_mark(u32::MAX, 0),
        set_mark(0, 0),
        set_mark(u32::MAX, u32::MAX),
        Stmt::state(0),
        Field::Mark.has(MarkBits { mask: 0, value: 0 }),
        Field::DestinationPort.is(7789),
        Field::UdpDestinationPort.is(0),
        Field::Protocol.is(255),
    ]);
    list
}

#[cfg(target_endian = "little")]
#[test]
fn rules_are_what_nft_makes_of_their_words() {
    for (text, bytes) in golden() {
        let exprs = read(&bytes).unwrap();
        let rule = recognise(&exprs);
        assert_eq!(rule.to_string(), text);
        assert_eq!(compile(&rule), exprs, "{text}");
        // In a lookup, `nft` adds the set's number within its transaction; where it masks bits of
        // conntrack or of the TCP flags, it leaves out the default operation. The kernel lists both
        // forms alike.
        let differs = |expr: &Expr| match expr {
            Expr::Lookup { .. } | Expr::Ct { .. } => true,
            Expr::Bitwise { mask, .. } => mask.len() == 1,
            _ => false,
        };
        if !exprs.iter().any(differs) {
            assert_eq!(written(&exprs), bytes, "{text}");
        }
    }
}

#[test]
fn every_statement_compiles_to_what_is_recognised_as_it() {
    for statement in statements() {
        let rule = NftRule(vec![statement]);
        let exprs = compile(&rule);
        assert_eq!(recognise(&exprs), rule);
        if !exprs.iter().any(|expr| matches!(expr, Expr::Other(_))) {
            assert_eq!(read(&written(&exprs)), Ok(exprs), "{rule}");
        }
    }
}

#[test]
fn whatever_is_recognised_compiles_to_what_was_found() {
    for statement in statements() {
        let bytes = written(&compile(&NftRule(vec![statement])));
        for at in 0..bytes.len() {
            let mut other = bytes.clone();
            other[at] ^= 1;
            if let Ok(exprs) = read(&other) {
                let rule = recognise(&exprs);
                let compiled = compile(&rule);
                if !rule.0.iter().any(|found| matches!(found, Stmt::Unknown(_))) {
                    assert_eq!(compiled, exprs, "{rule}, byte {at}");
                }
            }
        }
    }
}

#[test]
fn registers_have_one_name() {
    let wide = |dreg| Expr::MetaLoad { key: 2, dreg };
    let bytes = written(&[wide(8), wide(9), wide(12), wide(20), wide(23)]);
    let names = [wide(1), wide(9), wide(2), wide(4), wide(23)];
    assert_eq!(read(&bytes).unwrap(), names);
}

fn read_all(bytes: &[u8]) {
    let _ = read(bytes).map(|exprs| recognise(&exprs));
    let _ = chain::read(Attributes::new(bytes), TableFamily::Netdev);
    let _ = chain::read_rule(Attributes::new(bytes));
    let _ = set::read(Attributes::new(bytes))
        .map(|found| found.map(|found| found.ours(TableFamily::Inet)));
    for set in [
        Set::Gateway,
        Set::PolicyAction,
        Set::Snat(Family::V6),
        Set::Destination(Family::V6, 64),
        Set::Excluded(Family::V4),
    ] {
        for found in Attributes::new(bytes).flatten() {
            if let Ok(Some(found)) = element::read(&found, set) {
                let _ = element::key(set, &found.key);
                let _ = crate::kernel::nft::range::ranges(set, vec![found]);
            }
        }
    }
}

#[test]
fn cut_rules_are_read_without_panic() {
    for (_, bytes) in golden() {
        (0..bytes.len()).for_each(|length| read_all(&bytes[..length]));
    }
}

proptest! {
    #[test]
    fn any_sequence_of_statements_is_recognised(
        picks in proptest::collection::vec(any::<prop::sample::Index>(), 0..8),
    ) {
        let mut pool = statements();
        // Ahead of a port, `meta l4proto udp` is a part of `udp dport`.
        pool.retain(|one| ![TCP, UDP].map(|of| Field::Protocol.is(of.into())).contains(one));
        let rule = NftRule(picks.iter().map(|pick| pick.get(&pool).clone()).collect());
        prop_assert_eq!(recognise(&compile(&rule)), rule);
    }

    #[test]
    fn arbitrary_bytes_are_read_without_panic(
        bytes in proptest::collection::vec(any::<u8>(), 0..256),
    ) {
        read_all(&bytes);
    }

    #[test]
    fn damaged_rules_are_read_without_panic(
        rule in any::<prop::sample::Index>(),
        hits in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let mut bytes = rule.get(&golden()).1.clone();
        for (at, value) in hits {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        read_all(&bytes);
    }
}
