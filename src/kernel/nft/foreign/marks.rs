//! Which bits of a packet's mark a rule tests and writes.

use std::collections::BTreeMap;

use super::super::expr::{ELEMENT, Expr, meta};
use crate::kernel::wire::{Attribute, Attributes, Malformed};

/// The bits that a rule tests and writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Uses {
    pub(super) tested: u32,
    pub(super) written: u32,
}

/// What is left of the mark in a register: bits that are kept, and bits that are turned over.
#[derive(Clone, Copy)]
struct Held {
    kept: u32,
    turned: u32,
}

/// Reads the expressions of a rule.
pub(super) fn read(list: Attributes<'_>) -> Result<Uses, Malformed> {
    let mut uses = Uses::default();
    let mut registers = BTreeMap::new();
    for element in list {
        let element = element?;
        if element.kind != ELEMENT || extension(&element, &mut uses) {
            continue;
        }
        match Expr::read(&element) {
            Ok(expr) => follow(&expr, &mut registers, &mut uses),
            // Of a later kernel; nothing is known of what it leaves in the registers.
            Err(_) => registers.clear(),
        }
    }
    Ok(uses)
}

fn follow(expr: &Expr, registers: &mut BTreeMap<u32, Held>, uses: &mut Uses) {
    match expr {
        Expr::MetaLoad { key: meta::MARK, dreg } => {
            registers.insert(*dreg, Held { kept: u32::MAX, turned: 0 });
        }
        Expr::MetaSet { key: meta::MARK, sreg } => {
            // A value that was not made from the mark replaces all of it.
            let held = registers.get(sreg);
            uses.written |= held.map_or(u32::MAX, |held| !held.kept | held.turned);
        }
        Expr::Bitwise { sreg, dreg, mask, xor } => {
            let held = registers.get(sreg).copied();
            match (held, host(mask), host(xor)) {
                (Some(held), Some(mask), Some(xor)) => {
                    let turned = held.turned & mask ^ xor;
                    registers.insert(*dreg, Held { kept: held.kept & mask, turned });
                }
                _ => drop(registers.remove(dreg)),
            }
        }
        Expr::Cmp { sreg, .. } => {
            uses.tested |= registers.get(sreg).map_or(0, |held| held.kept);
        }
        Expr::Lookup { dreg, .. } => {
            // A mark may be any part of a concatenation.
            uses.tested |= registers.values().fold(0, |bits, held| bits | held.kept);
            if let Some(dreg) = dreg {
                registers.remove(dreg);
            }
        }
        Expr::MetaLoad { dreg, .. }
        | Expr::Payload { dreg, .. }
        | Expr::Ct { dreg, .. }
        | Expr::Load { dreg, .. } => drop(registers.remove(dreg)),
        Expr::Other(_) => registers.clear(),
        Expr::MetaSet { .. }
        | Expr::Immediate(_)
        | Expr::Snat { .. }
        | Expr::Masquerade
        | Expr::Counter => {}
    }
}

/// Takes a match or a target of iptables; whether it was one.
fn extension(element: &Attribute<'_>, uses: &mut Uses) -> bool {
    let mut is_extension = false;
    let mut data = Attributes::new(&[]);
    for attribute in element.nested().flatten() {
        match attribute.kind {
            1 => is_extension = matches!(attribute.text(), Ok("match" | "target")),
            2 => data = attribute.nested(),
            _ => {}
        }
    }
    if !is_extension {
        return false;
    }
    let (mut name, mut revision, mut info) = ("", 0, &[][..]);
    for attribute in data.flatten() {
        match attribute.kind {
            1 => name = attribute.text().unwrap_or_default(),
            2 => revision = attribute.be32().unwrap_or_default(),
            3 => info = attribute.bytes(),
            _ => {}
        }
    }
    let word = |n: usize| info.get(n * 4..n * 4 + 4).and_then(host).unwrap_or_default();
    // `struct xt_mark_mtinfo1`, `xt_mark_tginfo2` and `xt_connmark_tginfo1` or `2`, in the byte
    // order of this machine; the first two words are value and mask.
    match (name, revision) {
        ("mark", 1) => uses.tested |= word(1),
        ("MARK", 2) => uses.written |= word(0) | word(1),
        // Connection's mark and its mask, packet's mask, mode; 2 puts it into the packet.
        ("CONNMARK", 1 | 2) if info.get(12) == Some(&2) => uses.written |= word(2),
        _ => {}
    }
    true
}

/// A number in host byte order.
fn host(bytes: &[u8]) -> Option<u32> {
    bytes.try_into().ok().map(u32::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::wire::Writer;

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
        let tested = |tested| Uses { tested, written: 0 };
        let written = |written| Uses { tested: 0, written };
        assert_eq!(xt("match", "mark", 1, &[0x4000, 0xc000, 0]), tested(0xc000));
        assert_eq!(xt("target", "MARK", 2, &[0x4000, 0]), written(0x4000));
        assert_eq!(xt("target", "MARK", 2, &[0, 0xff00]), written(0xff00));
        let restore = 2_u32.to_le();
        assert_eq!(xt("target", "CONNMARK", 1, &[0, 0xff, 0xf0, restore]), written(0xf0));
        assert_eq!(xt("target", "CONNMARK", 1, &[0, 0xff, 0xf0, 0]), Uses::default());
        assert_eq!(xt("match", "connmark", 1, &[1, 1, 0]), Uses::default());
        assert_eq!(xt("match", "mark", 1, &[1]), Uses::default(), "too short to have a mask");
    }

    #[test]
    fn a_mark_is_forgotten_when_its_register_is_used_for_something_else() {
        let mark = Expr::MetaLoad { key: meta::MARK, dreg: 1 };
        let other = Expr::MetaLoad { key: meta::L4PROTO, dreg: 1 };
        let test = || Expr::Cmp { sreg: 1, equal: true, data: vec![6] };
        let found = uses(|writer| {
            [mark.clone(), other, test()].iter().for_each(|expr| expr.write(writer));
        });
        assert_eq!(found, Uses::default());
        let found = uses(|writer| [mark, test()].iter().for_each(|expr| expr.write(writer)));
        assert_eq!(found, Uses { tested: u32::MAX, written: 0 });
    }
}
