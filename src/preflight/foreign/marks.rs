//! Bits of the firewall mark and the connection mark that a rule tests and writes.

use std::collections::BTreeMap;

use super::expression;
use crate::kernel::netlink::message::{Attribute, Attributes, Malformed};
use crate::kernel::nft::expr::{ELEMENT, Expr, ct, meta};
use crate::preflight::MarkKind;

/// Mark bits, by kind of mark and by access (true for written, false for tested).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Uses(pub(crate) BTreeMap<(MarkKind, bool), u32>);

impl Uses {
    fn tests(&mut self, kind: MarkKind, bits: u32) {
        *self.0.entry((kind, false)).or_default() |= bits;
    }

    fn writes(&mut self, kind: MarkKind, bits: u32) {
        *self.0.entry((kind, true)).or_default() |= bits;
    }

    /// Records that a register is stored into a mark.
    fn stores(&mut self, kind: MarkKind, held: Option<&Held>) {
        // A value that was not made from the same mark replaces all of it.
        let own = held.filter(|held| held.kind == kind);
        self.writes(kind, own.map_or(u32::MAX, |held| !held.kept | held.turned));
    }
}

/// Part of a mark that a register holds: bits kept and bits inverted.
#[derive(Clone, Copy)]
struct Held {
    kind: MarkKind,
    kept: u32,
    turned: u32,
}

impl Held {
    const fn all(kind: MarkKind) -> Self {
        Self { kind, kept: u32::MAX, turned: 0 }
    }
}

/// Reads the expressions of a rule.
pub(crate) fn read(list: Attributes<'_>) -> Result<Uses, Malformed> {
    let mut uses = Uses::default();
    let mut registers = BTreeMap::new();
    for element in list {
        let element = element?;
        if element.kind != ELEMENT || extension(&element, &mut uses) {
            continue;
        }
        follow(&Expr::read(&element), &mut registers, &mut uses);
    }
    Ok(uses)
}

fn follow(expr: &Expr, registers: &mut BTreeMap<u32, Held>, uses: &mut Uses) {
    match expr {
        Expr::MetaLoad { key: meta::MARK, dreg } => {
            registers.insert(*dreg, Held::all(MarkKind::Packet));
        }
        Expr::Ct { key: ct::MARK, dreg } => {
            registers.insert(*dreg, Held::all(MarkKind::Connection));
        }
        Expr::MetaSet { key: meta::MARK, sreg } => {
            uses.stores(MarkKind::Packet, registers.get(sreg));
        }
        Expr::CtSet { key: ct::MARK, sreg } => {
            uses.stores(MarkKind::Connection, registers.get(sreg));
        }
        Expr::Bitwise { sreg, dreg, mask, xor } => {
            let held = registers.get(sreg).copied();
            match (held, host(mask), host(xor)) {
                (Some(held), Some(mask), Some(xor)) => {
                    let (kept, turned) = (held.kept & mask, (held.turned & mask) ^ xor);
                    registers.insert(*dreg, Held { kept, turned, ..held });
                }
                _ => drop(registers.remove(dreg)),
            }
        }
        Expr::Cmp { sreg, .. } => {
            if let Some(held) = registers.get(sreg) {
                uses.tests(held.kind, held.kept);
            }
        }
        Expr::Lookup { dreg, .. } => {
            // A mark may be any part of a concatenation.
            for held in registers.values() {
                uses.tests(held.kind, held.kept);
            }
            if let Some(dreg) = dreg {
                registers.remove(dreg);
            }
        }
        Expr::MetaLoad { dreg, .. }
        | Expr::Payload { dreg, .. }
        | Expr::Ct { dreg, .. }
        | Expr::Load { dreg, .. }
        | Expr::Socket { dreg, .. }
        | Expr::Fib { dreg, .. } => drop(registers.remove(dreg)),
        // The registers may hold anything after an unknown expression.
        Expr::Other(_) => registers.clear(),
        _ => {}
    }
}

/// Reads an iptables match or target; returns false for any other expression.
fn extension(element: &Attribute<'_>, uses: &mut Uses) -> bool {
    let (name, data) = expression::expression(element);
    if !matches!(name, "match" | "target") {
        return false;
    }
    let (name, revision, info) = expression::extension(data);
    let word = |n: usize| info.get(n * 4..n * 4 + 4).and_then(host).unwrap_or_default();
    // `struct xt_mark_mtinfo1`, `xt_connmark_mtinfo1` and `xt_mark_tginfo2` begin with value and
    // mask, `xt_connmark_tginfo1` and `xt_connmark_tginfo2` with value, mask and the mask of the
    // packet's mark; then comes the mode, in the second of them after two bytes of shifting.
    match (name, revision) {
        ("mark", 1) => uses.tests(MarkKind::Packet, word(1)),
        ("connmark", 1) => uses.tests(MarkKind::Connection, word(1)),
        ("MARK", 2) => uses.writes(MarkKind::Packet, word(0) | word(1)),
        ("CONNMARK", 1 | 2) => match info.get(if revision == 1 { 12 } else { 14 }) {
            Some(0) => uses.writes(MarkKind::Connection, word(0) | word(1)),
            Some(1) => uses.writes(MarkKind::Connection, word(1) | word(2)),
            Some(2) => uses.writes(MarkKind::Packet, word(1) | word(2)),
            _ => {}
        },
        _ => {}
    }
    true
}

/// Reads a number in host byte order.
fn host(bytes: &[u8]) -> Option<u32> {
    bytes.try_into().ok().map(u32::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::netlink::message::Writer;

    fn uses(write: impl FnOnce(&mut Writer)) -> Uses {
        let mut writer = Writer::default();
        write(&mut writer);
        let bytes = writer.finish().unwrap();
        read(Attributes::new(&bytes)).unwrap()
    }

    fn xt(kind: &str, name: &str, revision: u32, words: &[u32]) -> Uses {
        uses(|writer| {
            writer.nest(ELEMENT, |writer| {
                writer.string(1, kind);
                writer.nest(2, |writer| {
                    writer.string(1, name);
                    writer.be32(2, revision);
                    let info: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
                    writer.attribute(3, &info);
                });
            });
        })
    }

    #[test]
    fn extensions_of_iptables_are_understood() {
        use MarkKind::{Connection, Packet};
        let of = |kind, writes, bits| Uses([((kind, writes), bits)].into());
        assert_eq!(xt("match", "mark", 1, &[0x4000, 0xc000, 0]), of(Packet, false, 0xc000));
        assert_eq!(xt("match", "connmark", 1, &[1, 3, 0]), of(Connection, false, 3));
        assert_eq!(xt("target", "MARK", 2, &[0x4000, 0]), of(Packet, true, 0x4000));
        assert_eq!(xt("target", "MARK", 2, &[0, 0xff00]), of(Packet, true, 0xff00));
        for (revision, shift) in [(1, 0), (2, 16)] {
            let connmark = |mode: u32| {
                let words = [1, 0xe, 0xf0, (mode << shift).to_le()];
                xt("target", "CONNMARK", revision, &words)
            };
            assert_eq!(connmark(0), of(Connection, true, 0xf));
            assert_eq!(connmark(1), of(Connection, true, 0xfe));
            assert_eq!(connmark(2), of(Packet, true, 0xfe));
            assert_eq!(connmark(3), Uses::default());
        }
        assert_eq!(xt("match", "mark", 1, &[1]), of(Packet, false, 0), "too short to have a mask");
    }

    #[test]
    fn a_mark_is_forgotten_when_its_register_is_used_for_something_else() {
        let mark = Expr::MetaLoad { key: meta::MARK, dreg: 1 };
        let other = Expr::MetaLoad { key: meta::L4PROTO, dreg: 1 };
        let test = || Expr::Cmp { sreg: 1, equal: true, data: vec![6] };
        let found = uses(|writer| {
            for expr in [mark.clone(), other, test()] {
                expr.write(writer);
            }
        });
        assert_eq!(found, Uses::default());
        let found = uses(|writer| {
            mark.write(writer);
            test().write(writer);
        });
        assert_eq!(found, Uses([((MarkKind::Packet, false), u32::MAX)].into()));
    }
}
