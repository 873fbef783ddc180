//! Reads nf_tables chains and mark uses of other programs, including iptables-nft.

mod marks;
#[cfg(test)]
mod mutated;

use super::facts::{Chain, Firewall, MarkUse};
use crate::error::KernelError;
use crate::kernel::netlink::exchange::{Answered, in_one_piece};
use crate::kernel::netlink::message::{Attribute, Attributes, Malformed, flag};
use crate::kernel::netlink::nfnetlink::{Request, ask};
use crate::kernel::netlink::socket::Socket;
use crate::kernel::nft::{batch, chain, generation, kind};
use crate::state::NFT_TABLE;
use crate::types::Family;

/// Families whose packets the datapath steers: `NFPROTO_*` number and `nft` name.
const FAMILIES: [(u8, &str, &[Family]); 3] =
    [(batch::INET, "inet", &Family::BOTH), (2, "ip", &[Family::V4]), (10, "ip6", &[Family::V6])];

/// Reads base chains and mark uses from all tables except the datapath's.
///
/// A read is repeated if the ruleset generation changed meanwhile or a dump was interrupted.
pub(crate) fn foreign(socket: &mut Socket) -> Result<Firewall, KernelError> {
    let found = in_one_piece(|| {
        let before = generation(socket)?;
        let mut found = Firewall::default();
        let mut interrupted = false;
        for family in FAMILIES {
            interrupted |= chains(socket, family, &mut found.chains)?.interrupted;
            interrupted |= rules(socket, family, &mut found.marks)?.interrupted;
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

fn rules(
    socket: &mut Socket,
    (number, family, _): (u8, &str, &[Family]),
    found: &mut Vec<MarkUse>,
) -> Result<Answered, KernelError> {
    let request = Request {
        text: &format!("nft list ruleset {family}"),
        kind: kind::GETRULE,
        flags: flag::DUMP,
        answer: kind::NEWRULE,
    };
    let take = |_, body: &[u8]| read_rule(Attributes::new(body), family, found);
    ask(socket, &request, |writer| writer.nfgen(number, 0), take)
}

/// Adds the mark uses of a rule of another program.
fn read_rule(
    attributes: Attributes<'_>,
    family: &str,
    found: &mut Vec<MarkUse>,
) -> Result<(), Malformed> {
    let (mut table, mut chain, mut uses) = (String::new(), String::new(), marks::Uses::default());
    for attribute in attributes {
        let attribute = attribute?;
        match attribute.kind {
            1 => table = text(&attribute),
            2 => chain = text(&attribute),
            4 => uses = marks::read(attribute.nested())?,
            _ => {}
        }
    }
    if is_ours(family, &table) {
        return Ok(());
    }
    let table = format!("{family} {table}");
    for ((kind, writes), bits) in uses.0 {
        let (table, chain) = (table.clone(), chain.clone());
        count(found, MarkUse { table, chain, kind, bits, writes, rules: 1 });
    }
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

/// Returns a name in printable form, because the kernel accepts any bytes as a name.
fn text(attribute: &Attribute<'_>) -> String {
    let bytes = attribute.bytes();
    let bytes = bytes.strip_suffix(&[0]).unwrap_or(bytes);
    String::from_utf8_lossy(bytes).escape_debug().collect()
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
            let found = foreign(socket).unwrap();
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
