//! Reads rules that filter by the reverse path, and those that decide whether a packet meets them.

use std::collections::BTreeMap;

use super::expression::{expression, extension, printable};
use crate::kernel::netlink::message::{Attribute, Attributes, Malformed};
use crate::kernel::nft::expr::{ELEMENT, Expr, meta, verdict};
use crate::preflight::facts::{FilterRule, Test, Verdict};

// Flags and results of `fib` (`enum nft_fib_flags`, `enum nft_fib_result`).
const SADDR: u32 = 1;
const BY_MARK: u32 = 1 << 2;
const IIF: u32 = 1 << 3;
const PRESENT: u32 = 1 << 5;
const OIF: u32 = 1;
const OIFNAME: u32 = 2;

// Flags in `struct xt_rpfilter_info`.
const LOOSE: u8 = 1;
const VALID_MARK: u8 = 1 << 1;
const INVERT: u8 = 1 << 3;

/// Content of a register.
#[derive(Clone, Copy)]
enum Held {
    InputName,
    InputIndex,
    Family,
    /// These bits of the firewall mark.
    Mark(u32),
    /// The interface of the route to the source, or whether there is one.
    WayBack {
        strict: bool,
        by_mark: bool,
        present: bool,
    },
}

/// Returns whether an expression looks up the route to the source of the packet by the interface.
pub(crate) fn is_strict(element: &Attribute<'_>) -> bool {
    let (name, data) = expression(element);
    match name {
        "fib" => matches!(fib(data), Some((_, Held::WayBack { strict: true, .. }))),
        "match" => {
            let (name, _, info) = extension(data);
            name == "rpfilter" && info.first().is_some_and(|flags| flags & LOOSE == 0)
        }
        _ => false,
    }
}

/// Reads the expressions of a rule; `names` are the interfaces by index.
pub(crate) fn read(
    list: Attributes<'_>,
    names: &BTreeMap<u32, String>,
) -> Result<FilterRule, Malformed> {
    let mut rule = FilterRule::default();
    let mut registers = BTreeMap::new();
    for element in list {
        let element = element?;
        if element.kind == ELEMENT {
            follow(&element, names, &mut registers, &mut rule);
        }
    }
    Ok(rule)
}

fn follow(
    element: &Attribute<'_>,
    names: &BTreeMap<u32, String>,
    registers: &mut BTreeMap<u32, Held>,
    rule: &mut FilterRule,
) {
    match Expr::read(element) {
        Expr::MetaLoad { key, dreg } => {
            let held = match key {
                meta::IIFNAME => Some(Held::InputName),
                meta::IIF => Some(Held::InputIndex),
                meta::NFPROTO => Some(Held::Family),
                meta::MARK => Some(Held::Mark(u32::MAX)),
                _ => None,
            };
            set(registers, dreg, held);
        }
        Expr::Payload { dreg, .. } | Expr::Ct { dreg, .. } | Expr::Load { dreg, .. } => {
            set(registers, dreg, None);
        }
        Expr::Bitwise { sreg, dreg, mask, xor } => {
            let held = match (registers.get(&sreg), number(&mask), number(&xor)) {
                (Some(Held::Mark(held)), Some(mask), Some(0)) => Some(Held::Mark(held & mask)),
                _ => None,
            };
            set(registers, dreg, held);
        }
        Expr::Cmp { sreg, equal, data } => {
            let held = registers.get(&sreg).copied();
            rule.tests.push(held.map_or(Test::Unknown, |held| test(held, equal, &data, names)));
        }
        Expr::Lookup { dreg, .. } => {
            rule.tests.push(Test::Unknown);
            if let Some(dreg) = dreg {
                set(registers, dreg, None);
            }
        }
        Expr::Immediate(found) => {
            rule.verdict = match (found.code, found.chain) {
                (verdict::ACCEPT, _) => Some(Verdict::Accept),
                (verdict::DROP, _) => Some(Verdict::Drop),
                (verdict::RETURN, _) => Some(Verdict::Return),
                (verdict::JUMP, Some(chain)) => Some(Verdict::Jump(printable(&chain))),
                (verdict::GOTO, Some(chain)) => Some(Verdict::Goto(printable(&chain))),
                _ => None,
            }
        }
        Expr::MetaSet { key, .. } => rule.marks |= key == meta::MARK,
        Expr::Other(_) | Expr::Fib { .. } | Expr::Socket { .. } | Expr::FlowOffload { .. } => {
            other(element, registers, rule);
        }
        _ => {}
    }
}

/// Reads an expression by its name.
fn other(element: &Attribute<'_>, registers: &mut BTreeMap<u32, Held>, rule: &mut FilterRule) {
    let (name, data) = expression(element);
    match name {
        "fib" => match fib(data) {
            Some((dreg, held)) => set(registers, dreg, Some(held)),
            None => registers.clear(),
        },
        "match" => rule.tests.push(matching(data)),
        "target" => {
            let (name, ..) = extension(data);
            rule.marks |= matches!(name, "MARK" | "CONNMARK");
            if name == "REJECT" {
                rule.verdict = Some(Verdict::Drop);
            }
        }
        "reject" => rule.verdict = Some(Verdict::Drop),
        "log" | "objref" | "dynset" | "last" | "dup" => {}
        // The registers may hold anything after an unknown expression.
        _ => {
            registers.clear();
            rule.tests.push(Test::Unknown);
        }
    }
}

fn set(registers: &mut BTreeMap<u32, Held>, register: u32, held: Option<Held>) {
    match held {
        Some(held) => drop(registers.insert(register, held)),
        None => drop(registers.remove(&register)),
    }
}

fn test(held: Held, equal: bool, data: &[u8], names: &BTreeMap<u32, String>) -> Test {
    match held {
        Held::InputName => {
            let mut parts = data.split(|byte| *byte == 0);
            let name = String::from_utf8_lossy(parts.next().unwrap_or_default()).into_owned();
            // Without its end a name stands for all that begin with it.
            Test::Input { name, begins: parts.next().is_none(), equal }
        }
        Held::InputIndex => match number(data).and_then(|index| names.get(&index)) {
            Some(name) => Test::Input { name: name.clone(), begins: false, equal },
            None => Test::Unknown,
        },
        Held::Family => match data {
            [number] => Test::Family { number: *number, equal },
            _ => Test::Unknown,
        },
        Held::Mark(mask) => match number(data) {
            Some(value) => Test::Mark { value, mask, equal },
            None => Test::Unknown,
        },
        Held::WayBack { strict, by_mark, present } => {
            let zero = data.iter().all(|byte| *byte == 0);
            // One interface of several is no answer.
            if zero || present {
                Test::WayBack { strict, by_mark, exists: zero != equal }
            } else {
                Test::Unknown
            }
        }
    }
}

/// Reads the register and the result of `fib`, if that is the route to the source.
fn fib(data: Attributes<'_>) -> Option<(u32, Held)> {
    let (mut dreg, mut result, mut flags) = (None, 0, 0);
    for attribute in data.flatten() {
        match attribute.kind {
            1 => dreg = attribute.be32().ok(),
            2 => result = attribute.be32().ok()?,
            3 => flags = attribute.be32().ok()?,
            _ => {}
        }
    }
    let is_way_back = flags & SADDR != 0 && matches!(result, OIF | OIFNAME);
    let has = |flag| flags & flag != 0;
    let (strict, by_mark, present) = (has(IIF), has(BY_MARK), has(PRESENT));
    let held = Held::WayBack { strict, by_mark, present };
    is_way_back.then_some((dreg?, held))
}

/// Reads a match of iptables.
fn matching(data: Attributes<'_>) -> Test {
    let (name, revision, info) = extension(data);
    match (name, revision, info) {
        ("rpfilter", 0, [flags, ..]) => {
            let has = |flag| flags & flag != 0;
            let (strict, exists) = (!has(LOOSE), !has(INVERT));
            Test::WayBack { strict, by_mark: has(VALID_MARK), exists }
        }
        // `struct xt_mark_mtinfo1`: value, mask, and whether it is inverted.
        ("mark", 1, info) => {
            let word = |at: usize| info.get(at..at + 4).and_then(number);
            match (word(0), word(4), info.get(8)) {
                (Some(value), Some(mask), Some(invert)) => {
                    Test::Mark { value, mask, equal: *invert == 0 }
                }
                _ => Test::Unknown,
            }
        }
        ("comment", ..) => Test::Mark { value: 0, mask: 0, equal: true },
        _ => Test::Unknown,
    }
}

/// Reads a number in host byte order.
fn number(bytes: &[u8]) -> Option<u32> {
    bytes.try_into().ok().map(u32::from_ne_bytes)
}
