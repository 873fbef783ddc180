use super::*;

fn with(rule: Rule) -> Vec<Problem> {
    let mut facts = facts();
    facts.rules.push(rule);
    judge(&facts)
}

fn marked(value: u32, mask: u32, priority: u32) -> Rule {
    Rule { mark: Some((value, mask)), ..lookup(priority, 254) }
}

fn takes_first(text: &str) -> [Problem; 1] {
    [Problem::RuleTakesFirst { rule: text.to_owned(), family: Family::V4, priority: 101 }]
}

#[test]
fn a_rule_ahead_of_ours_takes_our_packets() {
    assert_eq!(with(lookup(50, 254)), takes_first("ip rule 50: lookup 254"));
    assert_eq!(with(rule(50, Action::Refuse)), takes_first("ip rule 50: refuse"));
    let of_pods = Rule { source: Some("10.244.0.0/16".parse().unwrap()), ..lookup(50, 254) };
    assert_eq!(with(of_pods), takes_first("ip rule 50: from 10.244.0.0/16 lookup 254"));
    let unless = Rule { inverted: true, ..marked(0xca6c, u32::MAX, 50) };
    assert_eq!(with(unless), takes_first("ip rule 50: not fwmark 0xca6c/0xffffffff lookup 254"));
    let prefix = marked(0x2600_0000, 0xff00_0000, 50);
    assert_eq!(with(prefix), takes_first("ip rule 50: fwmark 0x26000000/0xff000000 lookup 254"));
}

#[test]
fn a_rule_ahead_of_ours_that_lets_our_packets_pass() {
    let of_others = Rule { source: Some("192.168.0.0/16".parse().unwrap()), ..lookup(50, 254) };
    let without_default = rule(50, Action::Lookup { table: 254, without_default: true });
    let selects = Rule { selects: true, ..lookup(50, 254) };
    let aws = marked(0x80, 0x80, 50);
    for rule in [of_others, without_default, selects, aws, lookup(50, 7), rule(50, Action::Other)] {
        assert_eq!(with(rule.clone()), [], "{rule}");
    }
}

#[test]
fn values_with_avoided_bits_are_expected_only_if_they_are_given() {
    let cilium = marked(0x200, 0xf00, 9);
    assert_eq!(with(cilium.clone()), []);
    let (mut cluster, mut facts, policy) = (cluster(), facts(), policy("node-b", EIP));
    facts.rules.push(cilium);
    cluster.nodes[1].mark = MarkLayout::SEED.mark(1);
    let problems = judge_for(&cluster, &policy, &facts);
    let [Problem::MarkTestedByRule { bits: 0xf00, shared: 0x100, .. }] = &problems[..] else {
        panic!("{problems:?}")
    };
    cluster.nodes[1].mark = MarkLayout::SEED.mark(2);
    let problems = judge_for(&cluster, &policy, &facts);
    assert_eq!(problems, takes_first("ip rule 9: fwmark 0x200/0xf00 lookup 254"));
    cluster.marks = MarkLayout::COMPACT;
    cluster.nodes[1].mark = None;
    assert_eq!(judge_for(&cluster, &policy, &facts), []);
}

#[test]
fn a_rule_that_tests_our_bits() {
    let tailscale = marked(0x8_0000, 0xff_0000, 5210);
    let rule = "ip rule 5210: fwmark 0x80000/0xff0000 lookup 254".to_owned();
    let problem = Problem::MarkTestedByRule { rule, bits: 0xff_0000, shared: 0xff_0000 };
    assert_eq!(with(tailscale), std::slice::from_ref(&problem));
    assert_eq!(
        problem.to_string(),
        "ip rule 5210: fwmark 0x80000/0xff0000 lookup 254 tests bits 0x00ff0000 of the mark, of \
         which 0x00ff0000 are in the mark layout"
    );
}

#[test]
fn a_rule_at_one_of_our_priorities() {
    for (priority, count) in [(100, 0), (101, 1), (102, 1), (103, 1), (104, 1), (105, 0)] {
        let problems = with(Rule { selects: true, ..lookup(priority, 7) });
        assert_eq!(problems.len(), count, "{priority}");
        assert!(problems.iter().all(|p| matches!(p, Problem::PriorityShared { .. })));
    }
    let cluster = Cluster { marks: MarkLayout::COMPACT, ..cluster() };
    let mut facts = facts();
    facts.rules.push(Rule { selects: true, ..lookup(103, 7) });
    let problems = judge_for(&cluster, &policy("node-b", EIP), &facts);
    assert_eq!(problems, [], "a layout without prefix has no closing rule");
}

#[test]
fn the_rule_for_local_addresses_comes_too_late() {
    let late = [Problem::LocalRuleLate { family: Family::V4, priority: 101 }];
    let mut facts = facts();
    facts.rules[0].priority = 100;
    assert_eq!(judge(&facts), []);
    facts.rules[0].priority = 200;
    assert_eq!(judge(&facts), late);
    facts.rules.remove(0);
    assert_eq!(judge(&facts), late);
}

#[test]
fn tables_in_use() {
    let (cluster, policy) = (cluster(), policy("node-b", EIP));
    let mut facts = facts();
    facts.tables.extend([2999, 3001, 3002]);
    let range = |count| TableRange::new(3000, count).unwrap();
    let judge = |count| Preflight::new(&cluster, [&policy]).with_tables(range(count)).judge(&facts);
    let taken = Problem::TablesTaken { start: 3000, end: 3003, taken: 2, free: 2 };
    assert_eq!(judge(3), std::slice::from_ref(&taken));
    assert_eq!(taken.severity(), Severity::Note);
    facts.tables.insert(3000);
    let here = self::policy("node-a", EIP);
    facts.addresses.push(address("198.51.100.7", "eth0"));
    let all = Preflight::new(&cluster, [&here]).with_tables(range(2)).judge(&facts);
    assert_eq!(all, [Problem::TablesTaken { start: 3000, end: 3002, taken: 3, free: 0 }]);
    assert_eq!(all[0].severity(), Severity::Broken);
}

#[test]
fn fewer_tables_than_gateways() {
    let (mut cluster, mut facts) = (cluster(), facts());
    let third = Node::new(
        "node-c".parse().unwrap(),
        vec![[192, 0, 2, 3].into()],
        vec!["172.31.0.3/16".parse().unwrap()],
    );
    cluster.nodes.push(third);
    let to = |gateway: &str| {
        let id = gateway.parse().unwrap();
        EgressPolicy { id, ..policy(gateway, EIP) }
    };
    let policies = ["node-b", "node-c", "node-c"].map(to);
    let range = TableRange::new(3000, 1).unwrap();
    let judge = |facts: &_| Preflight::new(&cluster, &policies).with_tables(range).judge(facts);
    assert_eq!(judge(&facts), []);
    facts.tables.insert(3001);
    let few = Problem::TablesFew { start: 3000, end: 3001, free: 1, gateways: 2 };
    assert_eq!(judge(&facts), std::slice::from_ref(&few));
    assert_eq!(few.severity(), Severity::Broken);
}

#[test]
fn a_route_of_somebody_else_in_a_table_of_ours() {
    let mut facts = facts();
    let route = "198.51.100.0/24 via 192.0.2.9 table 3000 proto 4".to_owned();
    facts.intruders = vec![Intruder { family: Family::V4, text: route.clone() }];
    let problems = judge(&facts);
    assert_eq!(problems, [Problem::RouteInOurTable { family: Family::V4, route }]);
    let wanted = "ip route del 198.51.100.0/24 via 192.0.2.9 table 3000 proto 4";
    assert_eq!(problems[0].remedy(), wanted);
}
