use super::*;
use crate::preflight::facts::Saved;

fn chain(hook: u32) -> Chain {
    Chain {
        table: "ip filter".to_owned(),
        name: "CHAIN".to_owned(),
        families: vec![Family::V4],
        nat: false,
        hook,
        priority: 0,
        drops: true,
    }
}

fn with(chain: Chain) -> Vec<Problem> {
    let firewall = Firewall { chains: vec![chain], ..Firewall::default() };
    judge(&Facts { firewall, ..facts() })
}

#[test]
fn chains_that_drop_what_nobody_accepts() {
    for (number, hook) in [(1, DropHook::Input), (2, DropHook::Forward), (3, DropHook::Output)] {
        let (table, name) = ("ip filter".to_owned(), "CHAIN".to_owned());
        let problem = Problem::DropPolicy { table, chain: name, hook, port: 7789 };
        assert_eq!(with(chain(number)), std::slice::from_ref(&problem));
        assert_eq!(problem.remedy().contains("UDP port 7789"), hook != DropHook::Forward);
        assert_eq!(with(Chain { drops: false, ..chain(number) }), []);
        assert_eq!(with(Chain { families: vec![Family::V6], ..chain(number) }), []);
    }
    assert_eq!(with(chain(0)), []);
}

#[test]
fn a_chain_that_translates_before_ours() {
    let nat = |priority| Chain { nat: true, drops: false, priority, ..chain(4) };
    for priority in [50, 99] {
        let (table, chain) = ("ip filter".to_owned(), "CHAIN".to_owned());
        let problem = Problem::NatFirst { table, chain, priority, ours: 99 };
        assert_eq!(with(nat(priority)), [problem]);
    }
    assert_eq!(with(nat(100)), []);
    assert_eq!(with(Chain { nat: false, ..nat(50) }), []);
    assert_eq!(with(Chain { hook: 1, ..nat(50) }), []);
}

#[test]
fn rules_that_use_our_bits() {
    let used_of = |kind, bits, writes| {
        let (table, chain) = ("ip mangle".to_owned(), "cali-x".to_owned());
        let marks = vec![MarkUse { table, chain, kind, bits, writes, rules: 3 }];
        judge(&Facts { firewall: Firewall { marks, ..Firewall::default() }, ..facts() })
    };
    let used = |bits, writes| used_of(MarkKind::Packet, bits, writes);
    assert_eq!(used(0x4000, true), [], "a bit that the layout avoids");
    let problems = used(0x10000, true);
    assert_eq!(
        problems[0].to_string(),
        "3 rule(s) of nft table ip mangle, one in chain cali-x, write bits 0x00010000 of the \
         packet mark, of which 0x00010000 are in the mark layout"
    );
    assert!(used(u32::MAX, false)[0].to_string().contains("test bits 0xffffffff"));
    assert_eq!(used_of(MarkKind::Connection, 0x10000, true), [], "only the prefix is ours there");
    let problems = used_of(MarkKind::Connection, 0x0f00_0000, true);
    assert!(problems[0].to_string().contains("of the connection mark"));
}

#[test]
fn saved_rules() {
    let mut facts = facts();
    let saved = |for_iptables| Saved { file: "/etc/saved".to_owned(), for_iptables };
    facts.saved = vec![saved(true), saved(false)];
    let problems = judge(&facts);
    let problem =
        |for_iptables| Problem::SavedRules { file: "/etc/saved".to_owned(), for_iptables };
    assert_eq!(problems, [problem(true), problem(false)]);
    assert!(problems.iter().all(|problem| problem.severity() == Severity::Risk));
    assert!(problems[0].remedy().starts_with("sed -i /EGRESSGATEWAY-/d /etc/saved;"));
}

#[test]
fn two_variants_of_iptables() {
    let mut facts = facts();
    facts.legacy = vec!["filter".to_owned(), "nat".to_owned()];
    let problems = judge(&facts);
    let tables = facts.legacy.clone();
    assert_eq!(problems, [Problem::LegacyIptables { tables, both: false }]);
    assert_eq!(problems[0].severity(), Severity::Note);
    facts.firewall.chains = vec![Chain { name: "INPUT".to_owned(), drops: false, ..chain(1) }];
    let problems = judge(&facts);
    assert_eq!(problems[0].severity(), Severity::Risk);
    assert!(problems[0].to_string().ends_with("; iptables-nft is in use as well"));
}
