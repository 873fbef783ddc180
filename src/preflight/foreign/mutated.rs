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
    found.push(filter_rule());
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

/// Rule with a reverse path filter of nf_tables and one of iptables.
fn filter_rule() -> Vec<u8> {
    let mut writer = Writer::default();
    let message = writer.message(kind::NEWRULE, 0, 1);
    writer.nfgen(2, 0);
    writer.string(1, "mangle");
    writer.string(2, "PREROUTING");
    writer.attribute(3, &7_u64.to_be_bytes());
    writer.nest(4, |writer| {
        writer.nest(ELEMENT, |writer| {
            writer.string(1, "fib");
            writer.nest(2, |writer| {
                for (kind, number) in [(1, 1), (2, 1), (3, 41)] {
                    writer.be32(kind, number);
                }
            });
        });
        Expr::Cmp { sreg: 1, equal: true, data: vec![0; 4] }.write(writer);
        Expr::MetaLoad { key: 6, dreg: 1 }.write(writer);
        Expr::Cmp { sreg: 1, equal: false, data: b"lo\0".to_vec() }.write(writer);
        writer.nest(ELEMENT, |writer| {
            writer.string(1, "match");
            writer.nest(2, |writer| {
                writer.string(1, "rpfilter");
                writer.be32(2, 0);
                writer.attribute(3, &[8]);
            });
        });
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
        let mut tables = BTreeSet::new();
        each(input, kind::NEWRULE, |body| read_rule(body, "ip", &mut found, &mut tables).is_ok())?;
        assert!(found.iter().all(|used| used.rules > 0));
        Some(found.iter().map(|used| size_of_val(used) + used.table.len() + used.chain.len()).sum())
    });
}

/// Flowtable as the kernel lists it, with an interface and a prefix of interfaces.
fn flowtable() -> Vec<u8> {
    let mut writer = Writer::default();
    let message = writer.message(kind::NEWFLOWTABLE, 0, 1);
    writer.nfgen(batch::INET, 0);
    writer.string(1, "host");
    writer.string(2, "fast");
    writer.be32(5, 1);
    writer.be32(7, 3);
    writer.nest(3, |writer| {
        writer.be32(1, 0);
        writer.be32(2, 0);
        writer.nest(3, |writer| {
            writer.string(1, "eth0");
            writer.string(2, "cali");
        });
    });
    writer.end(message);
    writer.finish().unwrap()
}

#[test]
fn flowtables_have_their_devices() {
    let mut found = Vec::new();
    let take = |body: Attributes<'_>| {
        found.extend(read_flowtable(body, "inet").unwrap());
        true
    };
    each(&flowtable(), kind::NEWFLOWTABLE, take).unwrap();
    let devices = vec!["eth0".to_owned(), "cali*".to_owned()];
    let (table, name) = ("inet host".to_owned(), "fast".to_owned());
    assert_eq!(found, [Flowtable { table, name, devices, hardware: true }]);
}

#[test]
fn mutated_foreign_flowtables() {
    mutate::messages("preflight flowtables", 32, &[flowtable()], |input| {
        let mut found = Vec::new();
        each(input, kind::NEWFLOWTABLE, |body| {
            let read = read_flowtable(body, "ip");
            let is_ok = read.is_ok();
            found.extend(read.ok().flatten());
            is_ok
        })?;
        let held = |f: &Flowtable| size_of_val(f) + size_of_val(f.devices.as_slice());
        Some(found.iter().map(held).sum())
    });
}

#[test]
fn mutated_foreign_filters() {
    let names = BTreeMap::from([(1, "lo".to_owned())]);
    mutate::messages("preflight filters", 128, &corpus(kind::GETRULE), |input| {
        let mut found = Filters::default();
        each(input, kind::NEWRULE, |body| read_filter(body, &names, &mut found).is_ok())?;
        let rules = found.chains.values().flatten();
        Some(rules.map(|rule| size_of_val(rule) + size_of_val(rule.tests.as_slice())).sum())
    });
}
