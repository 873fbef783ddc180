//! Reads nf_tables chains and rules of other programs, including iptables-nft.

mod expression;
mod filters;
mod marks;
#[cfg(test)]
mod mutated;

use std::collections::{BTreeMap, BTreeSet};

use super::facts::{Chain, FilterRule, Filters, Firewall, Flowtable, MarkUse};
use crate::error::KernelError;
use crate::kernel::netlink::exchange::{Answered, in_one_piece};
use crate::kernel::netlink::message::{Attribute, Attributes, Malformed, Writer, flag};
use crate::kernel::netlink::nfnetlink::{Request, ask};
use crate::kernel::netlink::socket::Socket;
use crate::kernel::nft::expr::Expr;
use crate::kernel::nft::{batch, chain, generation, kind};
use crate::state::{NFT_TABLE, XtName};
use crate::types::Family;
use expression::{printable, text};

/// Families whose packets the datapath steers: `NFPROTO_*` number and `nft` name.
const FAMILIES: [(u8, &str, &[Family]); 3] =
    [(batch::INET, "inet", &Family::BOTH), (2, "ip", &[Family::V4]), (10, "ip6", &[Family::V6])];

/// Reads base chains, mark uses, flowtables and reverse path filters, except the datapath's;
/// `names` are the interfaces by index.
///
/// A read is repeated if the ruleset generation changed meanwhile or a dump was interrupted.
pub(crate) fn foreign(
    socket: &mut Socket,
    names: &BTreeMap<u32, String>,
) -> Result<Firewall, KernelError> {
    let found = in_one_piece(|| {
        let before = generation(socket)?;
        let mut found = Firewall::default();
        let mut interrupted = false;
        for family in FAMILIES {
            interrupted |= chains(socket, family, &mut found.chains)?.interrupted;
            interrupted |= flowtables(socket, family, &mut found.flowtables)?.interrupted;
            let mut tables = BTreeSet::new();
            let answered = rules(socket, family, &mut found.marks, &mut tables)?;
            interrupted |= answered.interrupted;
            for table in &tables {
                interrupted |=
                    filters_of(socket, family, table, names, &mut found.filters)?.interrupted;
            }
        }
        interrupted |= generation(socket)? != before;
        Ok((found, Answered { interrupted }))
    })?;
    let changes = "other programs change nf_tables faster than it can be read";
    found.ok_or_else(|| KernelError::answer("nft list ruleset", changes))
}

fn chains(
    socket: &mut Socket,
    (number, name, families): (u8, &str, &[Family]),
    found: &mut Vec<Chain>,
) -> Result<Answered, KernelError> {
    let request = Request {
        text: &format!("nft list chains {name}"),
        kind: kind::GETCHAIN,
        flags: flag::DUMP,
        answer: kind::NEWCHAIN,
    };
    let take = |_, body: &[u8]| {
        if let Some(chain) = read_chain(Attributes::new(body), name, families)? {
            found.push(chain);
        }
        Ok(())
    };
    ask(socket, &request, |writer| writer.nfgen(number, 0), take)
}

/// Reads a base chain of another program; other chains and the datapath's own give `None`.
fn read_chain(
    attributes: Attributes<'_>,
    family: &str,
    families: &[Family],
) -> Result<Option<Chain>, Malformed> {
    let (mut table, mut name, mut kind) = (String::new(), String::new(), String::new());
    let (mut hook, mut drops) = (None, false);
    for attribute in attributes {
        let attribute = attribute?;
        match attribute.kind {
            1 => table = text(&attribute),
            3 => name = text(&attribute),
            4 => hook = Some(chain::read_hook(attribute.nested())?),
            // The policy is `NF_DROP`.
            5 => drops = attribute.be32()? == 0,
            7 => kind = text(&attribute),
            _ => {}
        }
    }
    Ok(hook.filter(|_| !is_ours(family, &table)).map(|(hook, priority)| Chain {
        table: format!("{family} {table}"),
        name,
        families: families.to_vec(),
        nat: kind == "nat",
        hook,
        priority,
        drops,
    }))
}

fn flowtables(
    socket: &mut Socket,
    (number, family, _): (u8, &str, &[Family]),
    found: &mut Vec<Flowtable>,
) -> Result<Answered, KernelError> {
    let request = Request {
        text: &format!("nft list flowtables {family}"),
        kind: kind::GETFLOWTABLE,
        flags: flag::DUMP,
        answer: kind::NEWFLOWTABLE,
    };
    let take = |_, body: &[u8]| {
        found.extend(read_flowtable(Attributes::new(body), family)?);
        Ok(())
    };
    ask(socket, &request, |writer| writer.nfgen(number, 0), take)
}

/// Reads a flowtable; the datapath's own gives `None`.
fn read_flowtable(
    attributes: Attributes<'_>,
    family: &str,
) -> Result<Option<Flowtable>, Malformed> {
    let (mut table, mut found) = (String::new(), Flowtable::default());
    for attribute in attributes {
        let attribute = attribute?;
        match attribute.kind {
            1 => table = text(&attribute),
            2 => found.name = text(&attribute),
            3 => {
                for part in attribute.nested() {
                    let part = part?;
                    if part.kind == 3 {
                        let names = part.nested().flatten();
                        // A prefix stands for all interfaces whose names begin with it.
                        found.devices.extend(names.map(|name| match name.kind {
                            1 => text(&name),
                            _ => text(&name) + "*",
                        }));
                    }
                }
            }
            // `NFT_FLOWTABLE_HW_OFFLOAD`
            7 => found.hardware = attribute.be32()? & 1 != 0,
            _ => {}
        }
    }
    found.table = format!("{family} {table}");
    Ok((!is_ours(family, &table)).then_some(found))
}

fn rules(
    socket: &mut Socket,
    (number, family, _): (u8, &str, &[Family]),
    found: &mut Vec<MarkUse>,
    filtered: &mut BTreeSet<String>,
) -> Result<Answered, KernelError> {
    let request = Request {
        text: &format!("nft list ruleset {family}"),
        kind: kind::GETRULE,
        flags: flag::DUMP,
        answer: kind::NEWRULE,
    };
    let take = |_, body: &[u8]| read_rule(Attributes::new(body), family, found, filtered);
    ask(socket, &request, |writer| writer.nfgen(number, 0), take)
}

/// Adds the mark uses of a rule of another program, and its table if it filters by reverse path.
fn read_rule(
    attributes: Attributes<'_>,
    family: &str,
    found: &mut Vec<MarkUse>,
    filtered: &mut BTreeSet<String>,
) -> Result<(), Malformed> {
    let (mut table, mut chain, mut uses) = ("", String::new(), marks::Uses::default());
    let (mut name, mut filters, mut jumps) = (String::new(), false, false);
    for attribute in attributes {
        let attribute = attribute?;
        match attribute.kind {
            1 => {
                table = attribute.text().unwrap_or_default();
                name = text(&attribute);
            }
            2 => chain = text(&attribute),
            4 => {
                uses = marks::read(attribute.nested())?;
                filters = attribute.nested().flatten().any(|element| filters::is_strict(&element));
                jumps = attribute.nested().flatten().any(|element| jumps_to_ours(&element));
            }
            _ => {}
        }
    }
    if is_ours(family, &name) || is_chain_of_ours(&chain) || jumps {
        return Ok(());
    }
    if filters && !table.is_empty() {
        filtered.insert(table.to_owned());
    }
    let table = format!("{family} {name}");
    for ((kind, writes), bits) in uses.0 {
        let (table, chain) = (table.clone(), chain.clone());
        count(found, MarkUse { table, chain, kind, bits, writes, rules: 1 });
    }
    Ok(())
}

/// Reads the rules of a table with a reverse path filter.
fn filters_of(
    socket: &mut Socket,
    (number, family, _): (u8, &str, &[Family]),
    table: &str,
    names: &BTreeMap<u32, String>,
    found: &mut Vec<Filters>,
) -> Result<Answered, KernelError> {
    let request = Request {
        text: &format!("nft list table {family} {}", printable(table)),
        kind: kind::GETRULE,
        flags: flag::DUMP,
        answer: kind::NEWRULE,
    };
    let mut filters =
        Filters { table: format!("{family} {}", printable(table)), ..Filters::default() };
    let take = |_, body: &[u8]| {
        let body = Attributes::new(body);
        // A kernel that does not filter the dump sends the rules of all tables.
        if body.clone().flatten().any(|attribute| attribute.kind == 1 && attribute.is(table)) {
            read_filter(body, names, &mut filters)?;
        }
        Ok(())
    };
    let write = |writer: &mut Writer| {
        writer.nfgen(number, 0);
        writer.string(1, table);
    };
    let answered = ask(socket, &request, write, take)?;
    found.push(filters);
    Ok(answered)
}

/// Adds a rule to its chain.
fn read_filter(
    attributes: Attributes<'_>,
    names: &BTreeMap<u32, String>,
    filters: &mut Filters,
) -> Result<(), Malformed> {
    let (mut chain, mut handle, mut rule) = (String::new(), 0, None);
    for attribute in attributes {
        let attribute = attribute?;
        match attribute.kind {
            2 => chain = text(&attribute),
            3 => handle = attribute.be64()?,
            4 => rule = Some(filters::read(attribute.nested(), names)?),
            _ => {}
        }
    }
    let rule = FilterRule { handle, ..rule.unwrap_or_default() };
    filters.chains.entry(chain).or_default().push(rule);
    Ok(())
}

/// Adds a mark use to an equal one of its table.
fn count(found: &mut Vec<MarkUse>, used: MarkUse) {
    let alike = found.iter_mut().find(|other| {
        (other.kind, other.writes, other.bits) == (used.kind, used.writes, used.bits)
            && other.table == used.table
    });
    match alike {
        Some(other) => other.rules += used.rules,
        None => found.push(used),
    }
}

fn is_ours(family: &str, table: &str) -> bool {
    family == "inet" && table == NFT_TABLE
}

/// Returns whether a chain has the name of one that the iptables backend makes.
fn is_chain_of_ours(chain: &str) -> bool {
    XtName::from_name(chain).is_some_and(|name| !name.is_built_in())
}

/// Returns whether an expression is a jump to a chain of the iptables backend.
fn jumps_to_ours(element: &Attribute<'_>) -> bool {
    match Expr::read(element) {
        Expr::Immediate(verdict) => verdict.chain.is_some_and(|chain| is_chain_of_ours(&chain)),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::nft::tests::netns::{in_netns, nft};
    use crate::preflight::MarkKind::{Connection, Packet};

    const RULESET: &str = "
        table ip nat {
            chain early { type nat hook postrouting priority 50; }
            chain late { type nat hook postrouting priority 100; masquerade; }
        }
        table inet host {
            chain in { type filter hook input priority 0; policy drop;
                meta mark & 0xff0000 == 0x40000 accept
                meta mark & 0xff0000 == 0x50000 accept
                meta mark vmap { 1 : accept }
                ip daddr 192.0.2.1 meta mark set 0x80
                meta mark set meta mark & 0xffff00ff | 0x200
                meta mark set ct mark
                ct mark & 0xff == 7 accept
                ct mark set ct mark | 0x10
                tcp dport 1 accept
            }
        }
        table inet egress_datapath {
            chain x { type filter hook input priority 0; policy drop; meta mark 1 drop; }
        }";

    #[test]
    fn chains_and_marks_of_others_are_read_and_ours_are_not() {
        in_netns(|socket| {
            harness::needs(&["nft"]);
            nft(&["-f", "-"], RULESET).unwrap();
            let found = foreign(socket, &BTreeMap::new()).unwrap();
            let chains: Vec<_> = found
                .chains
                .iter()
                .map(|c| (c.table.as_str(), c.name.as_str(), c.nat, c.hook, c.priority, c.drops))
                .collect();
            assert_eq!(
                chains,
                [
                    ("inet host", "in", false, 1, 0, true),
                    ("ip nat", "early", true, 4, 50, false),
                    ("ip nat", "late", true, 4, 100, false),
                ]
            );
            let marks: Vec<_> = found
                .marks
                .iter()
                .map(|used| (used.table.as_str(), used.kind, used.bits, used.writes, used.rules))
                .collect();
            assert_eq!(
                marks,
                [
                    ("inet host", Packet, 0x00ff_0000, false, 2),
                    ("inet host", Packet, 0xffff_ffff, false, 1),
                    ("inet host", Packet, 0xffff_ffff, true, 2),
                    ("inet host", Packet, 0x0000_ff00, true, 1),
                    ("inet host", Connection, 0xff, false, 1),
                    ("inet host", Connection, 0x10, true, 1),
                ]
            );
        });
    }
}
