//! Encoding and decoding of chains and rules.

use super::expr::{self, Expr};
use super::stmt;
use crate::count::Count;
use crate::kernel::netlink::message::{Attributes, Malformed, Writer};
use crate::state::{Base, ChainId, ChainType, Hook, NFT_TABLE, NftRule, TableFamily};
use crate::types::DeviceName;

/// `NF_ACCEPT`, the policy of every base chain of the datapath.
const ACCEPT: u32 = 1;

/// `NFTA_HOOK_DEV` and `NFTA_HOOK_DEVS`; the kernel lists a single device in the latter, too.
const DEVICE: u16 = 3;
const DEVICES: u16 = 4;

/// Writes a new chain.
pub(super) fn write(writer: &mut Writer, chain: ChainId, base: Option<&Base>) {
    writer.string(1, NFT_TABLE);
    writer.string(3, &chain.to_string());
    let Some(base) = base else { return };
    writer.string(
        7,
        match base.kind {
            ChainType::Filter => "filter",
            ChainType::Nat => "nat",
        },
    );
    writer.be32(5, ACCEPT);
    writer.nest(4, |writer| {
        writer.be32(
            1,
            match base.hook {
                Hook::Prerouting => 0,
                Hook::Input | Hook::Egress(_) => 1,
                Hook::Forward => 2,
                Hook::Output => 3,
                Hook::Postrouting => 4,
            },
        );
        writer.attribute(2, &base.priority.to_be_bytes());
        if let Hook::Egress(device) = &base.hook {
            writer.string(DEVICE, device.as_str());
        }
    });
}

/// Writes a new rule.
pub(super) fn write_rule(writer: &mut Writer, chain: ChainId, rule: &NftRule) {
    writer.string(1, NFT_TABLE);
    writer.string(2, &chain.to_string());
    writer.nest(4, |writer| {
        for expr in stmt::compile(rule) {
            expr.write(writer);
        }
    });
}

/// Kind of a listed chain: regular chain, or base chain with its hook.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Called {
    ByRules,
    ByHook(Base),
    /// Base chain with attributes that the datapath never uses.
    Otherwise,
}

/// Chain as the kernel lists it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) name: String,
    called: Called,
}

impl Found {
    /// Returns the datapath's chain that this is, if any.
    ///
    /// `None` if the chain is none of the table's, or a base chain with attributes that the
    /// datapath never uses.
    pub(super) fn ours(&self, table: TableFamily) -> Option<(ChainId, Option<Base>)> {
        let base = match &self.called {
            Called::ByRules => None,
            Called::ByHook(base) => Some(base.clone()),
            Called::Otherwise => return None,
        };
        let id = ChainId::from_name(&self.name).filter(|id| id.table() == table)?;
        Some((id, base))
    }
}

/// Reads a listed chain; `None` if it is in a table of another name.
pub(super) fn read(
    attributes: Attributes<'_>,
    table: TableFamily,
) -> Result<Option<Found>, Malformed> {
    let (mut ours, mut name, mut kind, mut policy) = (false, None, None, ACCEPT);
    let mut hook = None;
    for attribute in attributes {
        let attribute = attribute?;
        match attribute.kind {
            1 => ours = attribute.is(NFT_TABLE),
            3 => name = Some(attribute),
            4 => hook = Some((read_hook(attribute.nested())?, device(attribute.nested())?)),
            5 => policy = attribute.be32()?,
            7 => kind = Some(attribute),
            _ => {}
        }
    }
    // The kernel lists the chains of all tables, and accepts any bytes as a name.
    if !ours {
        return Ok(None);
    }
    let kind = kind.map_or(Ok(""), |kind| kind.text())?;
    let called = match hook {
        None => Called::ByRules,
        Some((place, device)) => {
            let hook = hook_of(table, place.0, device);
            base(kind, hook, place.1, policy).map_or(Called::Otherwise, Called::ByHook)
        }
    };
    let name = name.ok_or(Malformed("a chain has no name"))?.text()?.to_owned();
    Ok(Some(Found { name, called }))
}

/// Reads hook number and priority of a base chain.
pub(crate) fn read_hook(attributes: Attributes<'_>) -> Result<(u32, i32), Malformed> {
    let (mut number, mut priority) = (u32::MAX, 0);
    for attribute in attributes {
        let attribute = attribute?;
        match attribute.kind {
            1 => number = attribute.be32()?,
            2 => priority = i32::from_ne_bytes(attribute.be32()?.to_ne_bytes()),
            _ => {}
        }
    }
    Ok((number, priority))
}

/// Returns the device of a base chain; `None` for no device or several.
fn device(attributes: Attributes<'_>) -> Result<Option<DeviceName>, Malformed> {
    let (mut one, mut count) = (None, 0);
    for attribute in attributes {
        let attribute = attribute?;
        match attribute.kind {
            DEVICE => one = DeviceName::new(attribute.text()?).ok(),
            DEVICES => count = attribute.nested().count(),
            _ => {}
        }
    }
    Ok(one.filter(|_| count <= 1))
}

/// Returns the hook with this number; chains of a device have hook numbers of their own.
fn hook_of(table: TableFamily, number: u32, device: Option<DeviceName>) -> Option<Hook> {
    match (table, number) {
        (TableFamily::Inet, 0) => Some(Hook::Prerouting),
        (TableFamily::Inet, 1) => Some(Hook::Input),
        (TableFamily::Inet, 2) => Some(Hook::Forward),
        (TableFamily::Inet, 3) => Some(Hook::Output),
        (TableFamily::Inet, 4) => Some(Hook::Postrouting),
        (TableFamily::Netdev, 1) => device.map(Hook::Egress),
        _ => None,
    }
}

fn base(kind: &str, hook: Option<Hook>, priority: i32, policy: u32) -> Option<Base> {
    let kind = match kind {
        "filter" => ChainType::Filter,
        "nat" => ChainType::Nat,
        _ => return None,
    };
    hook.filter(|_| policy == ACCEPT).map(|hook| Base { kind, hook, priority })
}

/// Rule as the kernel lists it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct FoundRule {
    pub(super) chain: String,
    pub(super) handle: u64,
    pub(super) rule: NftRule,
    /// Value of the counter in the rule.
    pub(super) count: Option<Count>,
}

/// Reads a listed rule; `None` if it is in another table.
pub(super) fn read_rule(attributes: Attributes<'_>) -> Result<Option<FoundRule>, Malformed> {
    let (mut ours, mut chain, mut handle) = (false, None, 0);
    let (mut exprs, mut count) = (Vec::new(), None);
    for attribute in attributes {
        let attribute = attribute?;
        match attribute.kind {
            1 => ours = attribute.is(NFT_TABLE),
            2 => chain = Some(attribute),
            3 => handle = attribute.be64()?,
            4 => {
                for element in attribute.nested() {
                    let element = element?;
                    exprs.push(Expr::read(&element));
                    count = expr::count(&element)?.or(count);
                }
            }
            _ => {}
        }
    }
    if !ours {
        return Ok(None);
    }
    let chain = chain.ok_or(Malformed("a rule has no chain"))?.text()?.to_owned();
    Ok(Some(FoundRule { chain, handle, rule: stmt::recognise(&exprs), count }))
}
