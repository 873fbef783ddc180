//! Decoding of expressions.

use super::{Expr, exthdr, reg};
use crate::count::Count;
use crate::kernel::netlink::message::{Attribute, Attributes, Malformed, Writer};
use crate::state::ChainId;

/// Verdict as the kernel encodes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Verdict {
    pub(crate) code: i32,
    pub(crate) chain: Option<String>,
}

impl Verdict {
    pub(crate) const fn plain(code: i32) -> Self {
        Self { code, chain: None }
    }

    pub(crate) fn goto(chain: ChainId) -> Self {
        Self { code: super::verdict::GOTO, chain: Some(chain.to_string()) }
    }

    pub(crate) fn jump(chain: ChainId) -> Self {
        Self { code: super::verdict::JUMP, chain: Some(chain.to_string()) }
    }

    /// Writes the verdict as the content of a data attribute.
    pub(crate) fn write(&self, writer: &mut Writer) {
        writer.nest(2, |writer| {
            writer.attribute(1, &self.code.to_be_bytes());
            if let Some(chain) = &self.chain {
                writer.string(2, chain);
            }
        });
    }

    /// Reads a verdict from a data attribute; `None` if the attribute holds a value.
    pub(crate) fn read(data: &Attribute<'_>) -> Result<Option<Self>, Malformed> {
        let Some(inside) = find(data.nested(), 2)? else {
            return Ok(None);
        };
        let code = find(inside.nested(), 1)?.ok_or(Malformed("a verdict has no code"))?;
        let chain = find(inside.nested(), 2)?;
        Ok(Some(Self {
            code: i32::from_ne_bytes(code.be32()?.to_ne_bytes()),
            chain: chain.map(|chain| chain.text().map(String::from)).transpose()?,
        }))
    }
}

/// Bytes in a data attribute; `None` if the attribute holds a verdict.
pub(crate) fn value<'a>(data: &Attribute<'a>) -> Result<Option<&'a [u8]>, Malformed> {
    Ok(find(data.nested(), 1)?.map(|value| value.bytes()))
}

/// Reads packets and bytes of a counter; `None` for another expression.
pub(crate) fn count(expr: &Attribute<'_>) -> Result<Option<Count>, Malformed> {
    let name = find(expr.nested(), 1)?;
    let data = find(expr.nested(), 2)?;
    let (Some(_), Some(data)) = (name.filter(|name| name.is("counter")), data) else {
        return Ok(None);
    };
    let number = |kind| find(data.nested(), kind)?.map(|found| found.be64()).transpose();
    let (bytes, packets) = (number(1)?, number(2)?);
    Ok(packets.zip(bytes).map(|(packets, bytes)| Count { packets, bytes }))
}

fn find(list: Attributes<'_>, kind: u16) -> Result<Option<Attribute<'_>>, Malformed> {
    for attribute in list {
        let attribute = attribute?;
        if attribute.kind == kind {
            return Ok(Some(attribute));
        }
    }
    Ok(None)
}

/// Attributes of one expression, by type.
struct Fields<'a>(Attributes<'a>);

impl<'a> Fields<'a> {
    fn number(&self, kind: u16) -> Result<Option<u32>, Malformed> {
        find(self.0.clone(), kind)?.map(|attribute| attribute.be32()).transpose()
    }

    fn register(&self, kind: u16) -> Result<Option<u32>, Malformed> {
        Ok(self.number(kind)?.map(reg::canonical))
    }

    fn data(&self, kind: u16) -> Result<Option<Vec<u8>>, Malformed> {
        let Some(attribute) = find(self.0.clone(), kind)? else {
            return Ok(None);
        };
        Ok(value(&attribute)?.map(<[u8]>::to_vec))
    }

    fn get(&self, kind: u16) -> Result<Option<Attribute<'a>>, Malformed> {
        find(self.0.clone(), kind)
    }

    /// Returns true if all these attributes are absent or zero.
    fn none(&self, kinds: &[u16]) -> Result<bool, Malformed> {
        for kind in kinds {
            if self.number(*kind)?.unwrap_or(0) != 0 {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// Decodes an expression; `None` if the datapath never writes one of this form.
///
/// Unknown attributes are those of later kernels, which use them only to override a default. Known
/// attributes that change the meaning make the expression one of another program.
pub(super) fn data(name: &str, list: Attributes<'_>) -> Result<Option<Expr>, Malformed> {
    let fields = Fields(list);
    Ok(match name {
        "meta" => match (fields.number(2)?, fields.register(1)?, fields.register(3)?) {
            (Some(key), Some(dreg), None) => Some(Expr::MetaLoad { key, dreg }),
            (Some(key), None, Some(sreg)) => Some(Expr::MetaSet { key, sreg }),
            _ => None,
        },
        "payload" => payload(&fields)?,
        "exthdr" => tcp_option(&fields)?,
        "cmp" => match (fields.register(1)?, fields.number(2)?, fields.data(3)?) {
            (Some(sreg), Some(op @ (0 | 1)), Some(data)) => {
                Some(Expr::Cmp { sreg, equal: op == 0, data })
            }
            _ => None,
        },
        "bitwise" => bitwise(&fields)?,
        "lookup" => lookup(&fields)?,
        "ct" | "socket" if !fields.none(&[3])? => None,
        "ct" => match (fields.number(2)?, fields.register(1)?, fields.register(4)?) {
            (Some(key), Some(dreg), None) => Some(Expr::Ct { key, dreg }),
            (Some(key), None, Some(sreg)) => Some(Expr::CtSet { key, sreg }),
            _ => None,
        },
        "socket" => match (fields.number(1)?, fields.register(2)?) {
            (Some(key), Some(dreg)) => Some(Expr::Socket { key, dreg }),
            _ => None,
        },
        "fib" => match (fields.number(3)?, fields.number(2)?, fields.register(1)?) {
            (Some(flags), Some(result), Some(dreg)) => Some(Expr::Fib { flags, result, dreg }),
            _ => None,
        },
        "notrack" => Some(Expr::NoTrack),
        "flow_offload" => match fields.get(1)? {
            Some(name) => Some(Expr::FlowOffload { flowtable: name.text()?.to_owned() }),
            None => None,
        },
        "immediate" => immediate(&fields)?,
        "nat" => nat(&fields)?,
        "masq" => fields.none(&[1, 2, 3])?.then_some(Expr::Masquerade),
        "counter" => Some(Expr::Counter),
        _ => None,
    })
}

fn payload(fields: &Fields<'_>) -> Result<Option<Expr>, Malformed> {
    let numbers = (fields.number(2)?, fields.number(3)?, fields.number(4)?);
    let (dreg, sreg) = (fields.register(1)?, fields.register(5)?);
    Ok(match (dreg, sreg, numbers) {
        (Some(dreg), None, (Some(base), Some(offset), Some(len))) => {
            Some(Expr::Payload { base, offset, len, dreg })
        }
        // The datapath's payload writes update no checksum.
        (None, Some(sreg), (Some(base), Some(offset), Some(len))) if fields.none(&[6, 8])? => {
            Some(Expr::PayloadSet { base, offset, len, sreg })
        }
        _ => None,
    })
}

fn tcp_option(fields: &Fields<'_>) -> Result<Option<Expr>, Malformed> {
    let option = fields.get(2)?.and_then(|option| option.bytes().first().copied());
    let numbers = (fields.number(3)?, fields.number(4)?, fields.register(7)?);
    let is_write = fields.number(6)? == Some(exthdr::TCP_OPTION) && fields.none(&[1, 5])?;
    Ok(match (option, numbers) {
        (Some(option), (Some(offset), Some(len), Some(sreg))) if is_write => {
            Some(Expr::TcpOption { option, offset, len, sreg })
        }
        _ => None,
    })
}

fn bitwise(fields: &Fields<'_>) -> Result<Option<Expr>, Malformed> {
    if !fields.none(&[6])? {
        return Ok(None);
    }
    let registers = (fields.register(1)?, fields.register(2)?);
    Ok(match (registers, fields.data(4)?, fields.data(5)?) {
        ((Some(sreg), Some(dreg)), Some(mask), Some(xor)) => {
            Some(Expr::Bitwise { sreg, dreg, mask, xor })
        }
        _ => None,
    })
}

fn lookup(fields: &Fields<'_>) -> Result<Option<Expr>, Malformed> {
    let set = fields.get(1)?.map(|set| set.text()).transpose()?;
    let (Some(set), Some(sreg)) = (set, fields.register(2)?) else {
        return Ok(None);
    };
    let invert = match fields.number(5)?.unwrap_or(0) {
        0 => false,
        1 => true,
        _ => return Ok(None),
    };
    Ok(Some(Expr::Lookup { set: set.into(), sreg, dreg: fields.register(3)?, invert }))
}

fn immediate(fields: &Fields<'_>) -> Result<Option<Expr>, Malformed> {
    let (Some(dreg), Some(data)) = (fields.register(1)?, fields.get(2)?) else {
        return Ok(None);
    };
    if let Some(verdict) = Verdict::read(&data)? {
        return Ok((dreg == reg::VERDICT).then_some(Expr::Immediate(verdict)));
    }
    Ok(value(&data)?.map(|data| Expr::Load { dreg, data: data.to_vec() }))
}

/// `NF_NAT_RANGE_MAP_IPS`: the kernel sets the flag if there is an address.
const MAP_IPS: u32 = 1;

fn nat(fields: &Fields<'_>) -> Result<Option<Expr>, Malformed> {
    let (kind, family) = (fields.number(1)?, fields.number(2)?);
    let (Some(0), Some(family), Some(sreg)) = (kind, family, fields.register(3)?) else {
        return Ok(None);
    };
    // The kernel repeats the lower end of the range as its upper end.
    let single = fields.register(4)?.is_none_or(|max| max == sreg);
    let plain = fields.number(7)?.unwrap_or(0) & !MAP_IPS == 0 && fields.none(&[5, 6])?;
    Ok((single && plain).then_some(Expr::Snat { family, sreg }))
}
