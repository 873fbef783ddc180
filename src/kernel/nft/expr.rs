//! nf_tables expressions: the kernel's instructions that statements compile to.
//!
//! Numbers are those of `include/uapi/linux/netfilter/nf_tables.h`.

mod read;

use crate::kernel::netlink::message::{Attribute, Attributes, Malformed, Writer};
use crate::types::fnv1a;

pub(super) use read::{Verdict, count, value};

pub(crate) const ELEMENT: u16 = 1;

/// Register numbers.
///
/// A 32-bit register at the start of a 128-bit register has two numbers; the kernel lists the
/// 128-bit register, and so does this module.
pub(super) mod reg {
    pub(crate) const VERDICT: u32 = 0;
    pub(crate) const R1: u32 = 1;
    /// Register at an offset in bytes from the first one.
    pub(crate) const fn after(bytes: u32) -> u32 {
        canonical(8 + bytes / 4)
    }

    /// Register number that the kernel lists.
    pub(super) const fn canonical(number: u32) -> u32 {
        match number {
            8 | 12 | 16 | 20 => number / 4 - 1,
            _ => number,
        }
    }
}

/// Keys of `meta`.
pub(crate) mod meta {
    pub(crate) const PRIORITY: u32 = 2;
    pub(crate) const MARK: u32 = 3;
    pub(crate) const IIF: u32 = 4;
    pub(crate) const OIF: u32 = 5;
    pub(crate) const IIFNAME: u32 = 6;
    pub(crate) const IIFTYPE: u32 = 8;
    pub(crate) const OIFNAME: u32 = 7;
    pub(crate) const NFPROTO: u32 = 15;
    pub(crate) const L4PROTO: u32 = 16;
}

/// Keys of `ct`.
pub(crate) mod ct {
    pub(crate) const STATE: u32 = 0;
    pub(crate) const DIRECTION: u32 = 1;
    pub(crate) const STATUS: u32 = 2;
    pub(crate) const MARK: u32 = 3;
}

/// Keys of `socket`.
pub(super) mod socket {
    pub(crate) const WILDCARD: u32 = 2;
}

/// Flags and results of `fib`.
pub(super) mod fib {
    /// Looks up the destination address.
    pub(crate) const DESTINATION: u32 = 1 << 1;
    pub(crate) const TYPE: u32 = 3;
}

/// Operations of `exthdr`, and numbers of TCP options.
pub(super) mod exthdr {
    pub(crate) const TCP_OPTION: u32 = 1;
    /// Maximum segment size (RFC 9293 section 3.2).
    pub(crate) const MSS: u8 = 2;
}

/// Headers that offsets of `payload` are relative to.
pub(super) mod base {
    pub(crate) const LINK: u32 = 0;
    pub(crate) const NETWORK: u32 = 1;
    pub(crate) const TRANSPORT: u32 = 2;
}

/// nf_tables expression.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Expr {
    /// Loads metadata of the packet into a register.
    MetaLoad { key: u32, dreg: u32 },
    /// Sets metadata of the packet from a register.
    MetaSet { key: u32, sreg: u32 },
    /// Loads bytes of the packet into a register.
    Payload { base: u32, offset: u32, len: u32, dreg: u32 },
    /// Sets bytes of the packet that no checksum covers.
    PayloadSet { base: u32, offset: u32, len: u32, sreg: u32 },
    /// Lowers a number in a TCP option to that in a register.
    TcpOption { option: u8, offset: u32, len: u32, sreg: u32 },
    /// Ends the rule unless a register equals the value (`equal` false: unless it differs).
    Cmp { sreg: u32, equal: bool, data: Vec<u8> },
    /// Masks a register, then inverts bits (xor).
    Bitwise { sreg: u32, dreg: u32, mask: Vec<u8>, xor: Vec<u8> },
    /// Looks a register up in a set; ends the rule if it is not there (`invert`: if it is).
    Lookup { set: String, sreg: u32, dreg: Option<u32>, invert: bool },
    /// Loads a property of the conntrack entry into a register.
    Ct { key: u32, dreg: u32 },
    /// Sets a property of the conntrack entry from a register.
    CtSet { key: u32, sreg: u32 },
    /// Loads a property of the socket that takes the packet into a register.
    Socket { key: u32, dreg: u32 },
    /// Looks an address up in the routing tables; loads the result into a register.
    Fib { flags: u32, result: u32, dreg: u32 },
    /// Excludes the packet from connection tracking.
    NoTrack,
    /// Puts the connection into a flowtable; ends the rule if it is in one, or may be in none.
    FlowOffload { flowtable: String },
    /// Loads a constant into a register.
    Load { dreg: u32, data: Vec<u8> },
    /// Ends the rule with a verdict.
    Immediate(Verdict),
    /// Source NAT to the address in a register.
    Snat { family: u32, sreg: u32 },
    /// Source NAT to the address of the outgoing interface.
    Masquerade,
    /// Counter.
    Counter,
    /// Any other expression; the hash distinguishes two of them.
    Other(u64),
}

/// Verdict codes.
pub(crate) mod verdict {
    pub(crate) const ACCEPT: i32 = 1;
    pub(crate) const DROP: i32 = 0;
    pub(crate) const JUMP: i32 = -3;
    pub(crate) const GOTO: i32 = -4;
    pub(crate) const RETURN: i32 = -5;
}

impl Expr {
    /// Writes the expression as an element of a rule's expression list.
    pub(crate) fn write(&self, writer: &mut Writer) {
        self.write_as(writer, ELEMENT);
    }

    /// Writes the expression as an attribute of this type.
    pub(super) fn write_as(&self, writer: &mut Writer, kind: u16) {
        let name = match self {
            Self::MetaLoad { .. } | Self::MetaSet { .. } => "meta",
            Self::Payload { .. } | Self::PayloadSet { .. } => "payload",
            Self::TcpOption { .. } => "exthdr",
            Self::Cmp { .. } => "cmp",
            Self::Bitwise { .. } => "bitwise",
            Self::Lookup { .. } => "lookup",
            Self::Ct { .. } | Self::CtSet { .. } => "ct",
            Self::Socket { .. } => "socket",
            Self::Fib { .. } => "fib",
            Self::NoTrack => "notrack",
            Self::FlowOffload { .. } => "flow_offload",
            Self::Load { .. } | Self::Immediate(_) => "immediate",
            Self::Snat { .. } => "nat",
            Self::Masquerade => "masq",
            Self::Counter => "counter",
            // No kernel has this expression, so a rule with one is refused instead of weakened.
            Self::Other(_) => "unknown",
        };
        writer.nest(kind, |writer| {
            writer.string(1, name);
            if *self != Self::NoTrack {
                writer.nest(2, |writer| self.write_data(writer));
            }
        });
    }

    fn write_data(&self, writer: &mut Writer) {
        match self {
            Self::MetaLoad { key, dreg } | Self::Ct { key, dreg } => {
                writer.be32(2, *key);
                writer.be32(1, *dreg);
            }
            Self::MetaSet { key, sreg } => {
                writer.be32(2, *key);
                writer.be32(3, *sreg);
            }
            Self::CtSet { key, sreg } => {
                writer.be32(2, *key);
                writer.be32(4, *sreg);
            }
            Self::Socket { key, dreg } => {
                writer.be32(1, *key);
                writer.be32(2, *dreg);
                writer.be32(3, 0);
            }
            Self::Fib { flags, result, dreg } => {
                writer.be32(3, *flags);
                writer.be32(2, *result);
                writer.be32(1, *dreg);
            }
            Self::Payload { base, offset, len, dreg } => {
                writer.be32(1, *dreg);
                writer.be32(2, *base);
                writer.be32(3, *offset);
                writer.be32(4, *len);
            }
            Self::PayloadSet { base, offset, len, sreg } => {
                writer.be32(5, *sreg);
                writer.be32(2, *base);
                writer.be32(3, *offset);
                writer.be32(4, *len);
                writer.be32(6, 0);
                writer.be32(7, 0);
                writer.be32(8, 0);
            }
            Self::TcpOption { option, offset, len, sreg } => {
                writer.be32(7, *sreg);
                writer.attribute(2, &[*option]);
                writer.be32(3, *offset);
                writer.be32(4, *len);
                writer.be32(6, exthdr::TCP_OPTION);
            }
            Self::Cmp { sreg, equal, data } => {
                writer.be32(1, *sreg);
                writer.be32(2, u32::from(!equal));
                writer.nest(3, |writer| writer.attribute(1, data));
            }
            Self::Bitwise { sreg, dreg, mask, xor } => {
                writer.be32(1, *sreg);
                writer.be32(2, *dreg);
                writer.be32(6, 0);
                writer.be32(3, u32::try_from(mask.len()).unwrap_or(u32::MAX));
                writer.nest(4, |writer| writer.attribute(1, mask));
                writer.nest(5, |writer| writer.attribute(1, xor));
            }
            Self::Lookup { set, sreg, dreg, invert } => {
                writer.be32(2, *sreg);
                if let Some(dreg) = dreg {
                    writer.be32(3, *dreg);
                }
                writer.string(1, set);
                if *invert {
                    writer.be32(5, 1);
                }
            }
            Self::FlowOffload { flowtable } => writer.string(1, flowtable),
            Self::Load { dreg, data } => {
                writer.be32(1, *dreg);
                writer.nest(2, |writer| writer.attribute(1, data));
            }
            Self::Immediate(verdict) => {
                writer.be32(1, reg::VERDICT);
                writer.nest(2, |writer| verdict.write(writer));
            }
            Self::Snat { family, sreg } => {
                writer.be32(1, 0);
                writer.be32(2, *family);
                writer.be32(3, *sreg);
            }
            Self::NoTrack | Self::Masquerade | Self::Counter | Self::Other(_) => {}
        }
    }

    /// Reads an element of a rule's expression list, or an attribute with a single expression.
    ///
    /// An expression of a form that the datapath never writes is not malformed but belongs to
    /// another program: the direction in `ct original packets` is a single byte.
    pub(crate) fn read(element: &Attribute<'_>) -> Self {
        let read = Self::read_ours(element).ok().flatten();
        read.unwrap_or_else(|| Self::Other(fnv1a(element.bytes())))
    }

    fn read_ours(element: &Attribute<'_>) -> Result<Option<Self>, Malformed> {
        let (mut name, mut data) = ("", Attributes::new(&[]));
        for attribute in element.nested() {
            let attribute = attribute?;
            match attribute.kind {
                1 => name = attribute.text()?,
                2 => data = attribute.nested(),
                _ => {}
            }
        }
        read::data(name, data)
    }

    /// Hash that distinguishes the expression from others.
    pub(super) fn hash(&self) -> u64 {
        if let Self::Other(hash) = self {
            return *hash;
        }
        let mut writer = Writer::default();
        self.write(&mut writer);
        fnv1a(&writer.finish().unwrap_or_default())
    }
}
