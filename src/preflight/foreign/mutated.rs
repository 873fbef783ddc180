//! Mutation tests of the parsers for chains and rules of other programs.

use super::*;
use crate::kernel::mutate;
use crate::kernel::mutated::{answers, golden_table};
use crate::kernel::netlink::message::{Messages, Writer};
use crate::kernel::nft::expr::ELEMENT;

fn corpus(kind: u16) -> Vec<Vec<u8>> {
    let mut body = Writer::default();
    body.nfgen(0, 0);
    let flags = flag::DUMP | flag::ACK;
    let mut found = answers(
        crate::kernel::netlink::nfnetlink::NETFILTER,
        vec![(kind, flags, body.finish().unwrap())],
    );
    found.extend(golden_table());
    found.push(iptables_rule());
    found
}

/// Rule as iptables-nft makes it.
fn iptables_rule() -> Vec<u8> {
    let mut writer = Writer::default();
    let message = writer.message(kind::NEWRULE, 0, 1);
    writer.nfgen(2, 0);
    writer.string(1, "mangle");
    writer.string(2, "PREROUTING");
    writer.nest(4, |writer| {
        for (what, name, revision) in
            [("match", "mark", 1), ("target", "MARK", 2), ("target", "CONNMARK", 2)]
        {
            writer.nest(ELEMENT, |writer| {
                writer.string(1, what);
                writer.nest(2, |writer| {
                    writer.string(1, name);
                    writer.be32(2, revision);
                    writer.attribute(3, &[0, 0x40, 0, 0, 0, 0xc0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0]);
                });
            });
        }
    });
    writer.end(message);
    writer.finish().unwrap()
}

/// Calls `take` with the body of each message of a type; `None` if none could be read.
fn each(input: &[u8], kind: u16, mut take: impl FnMut(Attributes<'_>) -> bool) -> Option<()> {
    let messages = Messages::new(input).flatten().filter(|message| message.kind == kind);
    let bodies = messages.filter_map(|message| message.nfgen().ok());
    let count = bodies.filter(|(_, body)| take(Attributes::new(body))).count();
    (count > 0).then_some(())
}

#[test]
fn mutated_foreign_chains() {
    mutate::messages("preflight chains", 16, &corpus(kind::GETCHAIN), |input| {
        let mut found = Vec::new();
        each(input, kind::NEWCHAIN, |body| {
            let read = read_chain(body, "ip", &[Family::V4]);
            let is_ok = read.is_ok();
            found.extend(read.ok().flatten());
            is_ok
        })?;
        Some(found.iter().map(|c| size_of_val(c) + 1 + c.table.len() + c.name.len()).sum())
    });
}

#[test]
fn mutated_foreign_rules() {
    mutate::messages("preflight rules", 32, &corpus(kind::GETRULE), |input| {
        let mut found = Vec::new();
        each(input, kind::NEWRULE, |body| read_rule(body, "ip", &mut found).is_ok())?;
        assert!(found.iter().all(|used| used.rules > 0));
        Some(found.iter().map(|used| size_of_val(used) + used.table.len() + used.chain.len()).sum())
    });
}
