//! Compiles statements to the expressions that `nft` sends, and recognises them again.
//!
//! One table defines how the kernel loads each field: [`load`], [`Form`], [`protocol`] and
//! [`family`]. Both directions read it. A statement that [`recognise`] finds is compiled and
//! compared with the expressions read, so every recognised statement compiles to the expressions
//! that were found.

#[cfg(test)]
mod tests;

use super::expr::{Expr, Verdict, base, ct, exthdr, fib, meta, reg, socket, verdict};
use crate::state::{
    ChainId, FLOWTABLE, Field, Interface, MarkBits, MarkOf, Mask, NftRule, Selector, Set, Stmt,
    Target,
};
use crate::types::{DeviceName, Family};

/// Protocol numbers of the IP header.
const TCP: u8 = 6;
const UDP: u8 = 17;

/// `ARPHRD_ETHER`, the type of the tunnel device.
const ETHERNET: u16 = 1;

/// Offset of the flags in a TCP header (RFC 9293 section 3.1).
const TCP_FLAGS: u32 = 13;

/// All fields that can be loaded, with each family.
const FIELDS: [Field; 20] = [
    Field::Input,
    Field::Output,
    Field::Mark,
    Field::Priority,
    Field::Protocol,
    Field::CtDirection,
    Field::CtState,
    Field::CtStatus,
    Field::CtMark,
    Field::Source(Family::V4),
    Field::Source(Family::V6),
    Field::Destination(Family::V4),
    Field::Destination(Family::V6),
    Field::SourcePort,
    Field::DestinationPort,
    Field::UdpDestinationPort,
    Field::TcpFlags,
    Field::SocketWildcard,
    Field::EthernetSource,
    Field::DestinationType,
];

/// Returns the expression that loads a field into a register.
pub(super) const fn load(field: Field, dreg: u32) -> Expr {
    const fn payload(base: u32, offset: u32, len: u32, dreg: u32) -> Expr {
        Expr::Payload { base, offset, len, dreg }
    }
    match field {
        Field::Input => Expr::MetaLoad { key: meta::IIF, dreg },
        Field::Output => Expr::MetaLoad { key: meta::OIF, dreg },
        Field::Mark => Expr::MetaLoad { key: meta::MARK, dreg },
        Field::Priority => Expr::MetaLoad { key: meta::PRIORITY, dreg },
        Field::Protocol => Expr::MetaLoad { key: meta::L4PROTO, dreg },
        Field::CtDirection => Expr::Ct { key: ct::DIRECTION, dreg },
        Field::CtState => Expr::Ct { key: ct::STATE, dreg },
        Field::CtStatus => Expr::Ct { key: ct::STATUS, dreg },
        Field::CtMark => Expr::Ct { key: ct::MARK, dreg },
        Field::Source(Family::V4) => payload(base::NETWORK, 12, 4, dreg),
        Field::Source(Family::V6) => payload(base::NETWORK, 8, 16, dreg),
        Field::Destination(Family::V4) => payload(base::NETWORK, 16, 4, dreg),
        Field::Destination(Family::V6) => payload(base::NETWORK, 24, 16, dreg),
        Field::SourcePort => payload(base::TRANSPORT, 0, 2, dreg),
        Field::DestinationPort | Field::UdpDestinationPort => payload(base::TRANSPORT, 2, 2, dreg),
        Field::TcpFlags => payload(base::TRANSPORT, TCP_FLAGS, 1, dreg),
        Field::SocketWildcard => Expr::Socket { key: socket::WILDCARD, dreg },
        Field::EthernetSource => payload(base::LINK, 6, 6, dreg),
        Field::DestinationType => Expr::Fib { flags: fib::DESTINATION, result: fib::TYPE, dreg },
    }
}

/// Representation of a value in a register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// 32-bit number in host byte order: a mark, a priority, an index, bits.
    Host,
    /// Single byte.
    Byte,
    /// Port, in network byte order.
    Port,
    /// Address.
    Address(Family),
    /// MAC address.
    Mac,
}

const fn form(field: Field) -> Form {
    match field {
        Field::Source(family) | Field::Destination(family) => Form::Address(family),
        Field::Protocol | Field::CtDirection | Field::TcpFlags | Field::SocketWildcard => {
            Form::Byte
        }
        Field::SourcePort | Field::DestinationPort | Field::UdpDestinationPort => Form::Port,
        Field::EthernetSource => Form::Mac,
        _ => Form::Host,
    }
}

/// Returns the transport protocol that must be tested before the field is loaded.
const fn protocol(field: Field) -> Option<u8> {
    match field {
        Field::UdpDestinationPort => Some(UDP),
        Field::TcpFlags => Some(TCP),
        _ => None,
    }
}

/// Returns the family that must be tested before the field is loaded, unless the rule tested it.
const fn family(field: Field) -> Option<Family> {
    field.family()
}

impl Form {
    /// Encodes a number in this form.
    fn bytes(self, number: u32) -> Option<Vec<u8>> {
        Some(match self {
            Self::Host => number.to_ne_bytes().to_vec(),
            Self::Byte => vec![u8::try_from(number).ok()?],
            Self::Port => u16::try_from(number).ok()?.to_be_bytes().to_vec(),
            Self::Address(_) | Self::Mac => return None,
        })
    }

    /// Decodes a number in this form.
    fn number(self, bytes: &[u8]) -> Option<u32> {
        match self {
            Self::Host => bytes.try_into().ok().map(u32::from_ne_bytes),
            Self::Byte => <[u8; 1]>::try_from(bytes).ok().map(|[byte]| byte.into()),
            Self::Port => bytes.try_into().ok().map(|bytes| u16::from_be_bytes(bytes).into()),
            Self::Address(_) | Self::Mac => None,
        }
    }

    /// Number of register bytes that a value fills.
    const fn width(self) -> u32 {
        match self {
            Self::Address(Family::V6) => 16,
            Self::Mac => 8,
            _ => 4,
        }
    }
}

/// Protocol family number in `meta nfproto` and `nat`.
const fn nfproto(family: Family) -> u8 {
    match family {
        Family::V4 => 2,
        Family::V6 => 10,
    }
}

/// Mask of a prefix length, in network byte order.
fn netmask(family: Family, length: u8) -> Vec<u8> {
    let low = u128::MAX.checked_shr(length.into()).unwrap_or(0);
    let bytes = (!low).to_be_bytes();
    let width = if matches!(family, Family::V4) { 4 } else { 16 };
    bytes.into_iter().take(width).collect()
}

/// Comparison of the first register with a constant.
const fn cmp(equal: bool, data: Vec<u8>) -> Expr {
    Expr::Cmp { sreg: reg::R1, equal, data }
}

fn family_test(family: Family) -> [Expr; 2] {
    let load = Expr::MetaLoad { key: meta::NFPROTO, dreg: reg::R1 };
    [load, cmp(true, vec![nfproto(family)])]
}

fn ethernet_test() -> [Expr; 2] {
    let load = Expr::MetaLoad { key: meta::IIFTYPE, dreg: reg::R1 };
    [load, cmp(true, ETHERNET.to_ne_bytes().to_vec())]
}

/// Loads a field into a register and masks it.
fn select(Selector { field, mask }: Selector, register: u32) -> Option<Vec<Expr>> {
    let mut exprs = vec![load(field, register)];
    let mask = match (mask, form(field)) {
        (Mask::Whole, _) => return Some(exprs),
        (Mask::Bits(bits), form) => form.bytes(bits)?,
        (Mask::Prefix(length), Form::Address(family)) if length < family.bits() => {
            netmask(family, length)
        }
        (Mask::Prefix(_), _) => return None,
    };
    let xor = vec![0; mask.len()];
    exprs.push(Expr::Bitwise { sreg: register, dreg: register, mask, xor });
    Some(exprs)
}

/// Compiles a rule to expressions.
pub(super) fn compile(rule: &NftRule) -> Vec<Expr> {
    let mut family = None;
    let statements = rule.0.iter();
    statements
        // A statement that cannot be expressed becomes an expression that the kernel refuses.
        .flat_map(|one| expressions(one, &mut family).unwrap_or_else(|| vec![Expr::Other(0)]))
        .collect()
}

/// Compiles a statement to expressions; `known` is the family that the rule has tested.
fn expressions(statement: &Stmt, known: &mut Option<Family>) -> Option<Vec<Expr>> {
    let mut exprs = Vec::new();
    let mut require = |exprs: &mut Vec<Expr>, field: Field| {
        if let Some(family) = family(field).filter(|family| *known != Some(*family)) {
            exprs.extend(family_test(family));
            *known = Some(family);
        }
        if let Some(protocol) = protocol(field) {
            let load = Expr::MetaLoad { key: meta::L4PROTO, dreg: reg::R1 };
            exprs.extend([load, cmp(true, vec![protocol])]);
        }
        if field == Field::EthernetSource {
            exprs.extend(ethernet_test());
        }
    };
    let lookup =
        |set: Set, dreg, invert| Expr::Lookup { set: set.name(), sreg: reg::R1, dreg, invert };
    let key = |exprs: &mut Vec<Expr>, key: &[Selector]| {
        let mut at = 0;
        for part in key {
            exprs.extend(select(*part, reg::after(at))?);
            at += form(part.field).width();
        }
        Some(())
    };
    match statement {
        Stmt::Match { of, negated, value } => {
            require(&mut exprs, of.field);
            exprs.extend(select(*of, reg::R1)?);
            exprs.push(cmp(!negated, form(of.field).bytes(*value)?));
        }
        Stmt::Interface(interface, name) | Stmt::OtherInterface(interface, name) => {
            let equal = matches!(statement, Stmt::Interface(..));
            let key = match interface {
                Interface::Input => meta::IIFNAME,
                Interface::Output => meta::OIFNAME,
            };
            let mut padded = name.as_str().as_bytes().to_vec();
            padded.resize(DEVICE, 0);
            exprs.extend([Expr::MetaLoad { key, dreg: reg::R1 }, cmp(equal, padded)]);
        }
        Stmt::Lookup { key: parts, set, negated } => {
            require(&mut exprs, parts.first()?.field);
            key(&mut exprs, parts)?;
            exprs.push(lookup(*set, None, *negated));
        }
        Stmt::Map { key: parts, map, into } => {
            if *into == Target::EthernetDestination {
                // At the egress hook, the kernel takes the device for the packet's input interface.
                exprs.extend(ethernet_test());
            }
            require(&mut exprs, parts.first()?.field);
            key(&mut exprs, parts)?;
            let register = if *into == Target::Verdict { reg::VERDICT } else { reg::R1 };
            exprs.push(lookup(*map, Some(register), false));
            exprs.extend(store(*into));
        }
        Stmt::SetMark(of, MarkBits { mask, value }) => {
            let (field, set) = match of {
                MarkOf::Packet => (Field::Mark, Expr::MetaSet { key: meta::MARK, sreg: reg::R1 }),
                MarkOf::Connection => (Field::CtMark, Expr::CtSet { key: ct::MARK, sreg: reg::R1 }),
            };
            let [mask, xor] = [!mask, *value].map(|bits| bits.to_ne_bytes().to_vec());
            let change = Expr::Bitwise { sreg: reg::R1, dreg: reg::R1, mask, xor };
            exprs.extend([load(field, reg::R1), change, set]);
        }
        Stmt::ClearPriority => {
            exprs.push(Expr::Load { dreg: reg::R1, data: vec![0; 4] });
            exprs.extend(store(Target::Priority));
        }
        Stmt::KeepSource(family) => {
            // `nft` repeats the family test.
            exprs.extend(family_test(*family));
            *known = Some(*family);
            exprs.push(load(Field::Source(*family), reg::R1));
            exprs.extend(store(Target::Snat(*family)));
        }
        Stmt::Masquerade => exprs.push(Expr::Masquerade),
        Stmt::ClampMss(family, size) => {
            // As for `KeepSource`, the family is tested again.
            exprs.extend(family_test(*family));
            *known = Some(*family);
            exprs.push(Expr::Load { dreg: reg::R1, data: size.to_be_bytes().to_vec() });
            exprs.push(Expr::TcpOption {
                option: exthdr::MSS,
                offset: MSS_OFFSET,
                len: 2,
                sreg: reg::R1,
            });
        }
        Stmt::NoTrack => exprs.push(Expr::NoTrack),
        Stmt::NoOffload => exprs.push(Expr::FlowOffload { flowtable: FLOWTABLE.to_owned() }),
        Stmt::Counter => exprs.push(Expr::Counter),
        Stmt::Drop => exprs.push(Expr::Immediate(Verdict::plain(verdict::DROP))),
        Stmt::Return => exprs.push(Expr::Immediate(Verdict::plain(verdict::RETURN))),
        Stmt::Jump(chain) => exprs.push(Expr::Immediate(Verdict::jump(*chain))),
        Stmt::Goto(chain) => exprs.push(Expr::Immediate(Verdict::goto(*chain))),
        Stmt::Unknown(hash) => exprs.push(Expr::Other(*hash)),
    }
    Some(exprs)
}

/// Offset of the size in the option (RFC 9293 section 3.2).
const MSS_OFFSET: u32 = 2;

/// Length of an interface name, padded with zeros (`IFNAMSIZ`).
const DEVICE: usize = 16;

/// Returns the expression that stores the value of a map from the first register.
fn store(target: Target) -> Option<Expr> {
    let sreg = reg::R1;
    Some(match target {
        Target::Priority => Expr::MetaSet { key: meta::PRIORITY, sreg },
        Target::Snat(family) => Expr::Snat { family: nfproto(family).into(), sreg },
        Target::EthernetDestination => {
            Expr::PayloadSet { base: base::LINK, offset: 0, len: 6, sreg }
        }
        Target::Verdict => return None,
    })
}

/// Recognises the statements of a rule; any other expression becomes [`Stmt::Unknown`].
pub(super) fn recognise(exprs: &[Expr]) -> NftRule {
    let mut known = None;
    let mut statements = Vec::new();
    let mut rest = exprs;
    while let Some(first) = rest.first() {
        let (statement, length) =
            next(rest, &mut known).unwrap_or_else(|| (Stmt::Unknown(first.hash()), 1));
        statements.push(statement);
        rest = rest.get(length..).unwrap_or_default();
    }
    NftRule(statements)
}

/// Recognises the first statement; returns it with its number of expressions.
fn next(exprs: &[Expr], known: &mut Option<Family>) -> Option<(Stmt, usize)> {
    let statement = guess(exprs)?;
    let mut family = *known;
    let shape = expressions(&statement, &mut family)?;
    if !exprs.starts_with(&shape) {
        return None;
    }
    *known = family;
    Some((statement, shape.len()))
}

/// Takes a comparison for equality from the front of the list; returns the compared value.
fn tested<'a>(exprs: &mut &'a [Expr], of: u32) -> Option<&'a [u8]> {
    match exprs {
        [
            Expr::MetaLoad { key, dreg: reg::R1 },
            Expr::Cmp { sreg: reg::R1, equal: true, data },
            rest @ ..,
        ] if *key == of => {
            *exprs = rest;
            Some(data)
        }
        _ => None,
    }
}

/// Takes a selector from the front of the list, with a field that needs this protocol.
fn selected(exprs: &mut &[Expr], register: u32, tested: Option<u8>) -> Option<Selector> {
    let (first, rest) = exprs.split_first()?;
    let of = |field: &&Field| protocol(**field) == tested && load(**field, register) == *first;
    let field = *FIELDS.iter().find(of)?;
    *exprs = rest;
    let mask = match rest {
        [Expr::Bitwise { mask, xor, .. }, rest @ ..] if xor.iter().all(|byte| *byte == 0) => {
            *exprs = rest;
            match form(field) {
                Form::Address(_) => Mask::Prefix(
                    u8::try_from(mask.iter().map(|b| b.count_ones()).sum::<u32>()).ok()?,
                ),
                form => Mask::Bits(form.number(mask)?),
            }
        }
        _ => Mask::Whole,
    };
    Some(Selector { field, mask })
}

/// Guesses the statement of these expressions; the caller verifies it.
fn guess(mut exprs: &[Expr]) -> Option<Stmt> {
    match exprs.first()? {
        Expr::NoTrack => return Some(Stmt::NoTrack),
        Expr::FlowOffload { .. } => return Some(Stmt::NoOffload),
        Expr::Load { .. } => return Some(Stmt::ClearPriority),
        Expr::Masquerade => return Some(Stmt::Masquerade),
        Expr::Counter => return Some(Stmt::Counter),
        Expr::Immediate(Verdict { code, chain }) => {
            let chain = || ChainId::from_name(chain.as_deref()?);
            return match *code {
                verdict::DROP => Some(Stmt::Drop),
                verdict::RETURN => Some(Stmt::Return),
                verdict::JUMP => chain().map(Stmt::Jump),
                verdict::GOTO => chain().map(Stmt::Goto),
                _ => None,
            };
        }
        _ => {}
    }
    for (key, interface) in [(meta::IIFNAME, Interface::Input), (meta::OIFNAME, Interface::Output)]
    {
        if let [
            Expr::MetaLoad { key: loaded, dreg: reg::R1 },
            Expr::Cmp { sreg: reg::R1, equal, data },
            ..,
        ] = exprs
        {
            if *loaded == key {
                let name = data.split(|byte| *byte == 0).next()?;
                let name = DeviceName::new(std::str::from_utf8(name).ok()?).ok()?;
                let of = if *equal { Stmt::Interface } else { Stmt::OtherInterface };
                return Some(of(interface, name));
            }
        }
    }
    if let [load_mark, Expr::Bitwise { mask, xor, .. }, set, ..] = exprs {
        let of = match set {
            Expr::MetaSet { key: meta::MARK, .. } => Some((MarkOf::Packet, Field::Mark)),
            Expr::CtSet { key: ct::MARK, .. } => Some((MarkOf::Connection, Field::CtMark)),
            _ => None,
        };
        if let Some((of, field)) = of.filter(|(_, field)| load(*field, reg::R1) == *load_mark) {
            let (keep, value) = (form(field).number(mask)?, form(field).number(xor)?);
            return Some(Stmt::SetMark(of, MarkBits { mask: !keep, value }));
        }
    }
    let family = tested(&mut exprs, meta::NFPROTO);
    if let (Some(&[number]), [Expr::Load { data, .. }, Expr::TcpOption { .. }, ..]) =
        (family, exprs)
    {
        let family = Family::BOTH.into_iter().find(|family| nfproto(*family) == number)?;
        return Some(Stmt::ClampMss(family, u16::from_be_bytes(data.as_slice().try_into().ok()?)));
    }
    let protocol = tested(&mut exprs, meta::L4PROTO).map(|bytes| Form::Byte.number(bytes));
    let protocol = protocol.flatten().and_then(|number| u8::try_from(number).ok());
    let _ethernet = tested(&mut exprs, meta::IIFTYPE);
    let (mut key, mut at) = (Vec::new(), 0);
    while let Some(part) = selected(&mut exprs, reg::after(at), protocol) {
        at += form(part.field).width();
        key.push(part);
    }
    if let (Some(number), []) = (protocol, key.as_slice()) {
        return Some(Field::Protocol.is(number.into()));
    }
    match (exprs, key.as_slice()) {
        ([Expr::Cmp { equal, data, .. }, ..], [of]) => {
            let value = form(of.field).number(data)?;
            Some(Stmt::Match { of: *of, negated: !equal, value })
        }
        ([Expr::Snat { .. }, ..], [Selector { field: Field::Source(family), .. }]) => {
            Some(Stmt::KeepSource(*family))
        }
        ([Expr::Lookup { set, dreg, invert, .. }, then @ ..], _) => {
            let set = Set::from_name(set)?;
            let into = match (dreg, then.first()) {
                (None, _) => return Some(Stmt::Lookup { key, set, negated: *invert }),
                (Some(reg::VERDICT), _) => Target::Verdict,
                (_, Some(Expr::MetaSet { key: meta::PRIORITY, .. })) => Target::Priority,
                (_, Some(Expr::PayloadSet { .. })) => Target::EthernetDestination,
                (_, Some(Expr::Snat { family, .. })) => {
                    let of = |one: &Family| u32::from(nfproto(*one)) == *family;
                    Target::Snat(Family::BOTH.into_iter().find(of)?)
                }
                _ => return None,
            };
            Some(Stmt::Map { key, map: set, into })
        }
        _ => None,
    }
}
