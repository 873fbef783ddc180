use super::*;
use crate::cluster::Replies;
use crate::preflight::facts::{FilterRule, Filters, Test, Verdict};

const STRICT: Test = Test::WayBack { strict: true, by_mark: false, exists: false };
const EXISTS: Test = Test::WayBack { strict: true, by_mark: false, exists: true };

fn rule(handle: u64, tests: &[Test], verdict: Option<Verdict>) -> FilterRule {
    FilterRule { handle, tests: tests.to_vec(), marks: false, verdict }
}

fn input(name: &str, equal: bool) -> Test {
    let (name, begins) = name.strip_suffix('*').map_or((name, false), |begin| (begin, true));
    Test::Input { name: name.to_owned(), begins, equal }
}

fn drops(tests: &[Test]) -> FilterRule {
    rule(7, tests, Some(Verdict::Drop))
}

/// Facts with a base chain `pre`, and more chains.
fn with(hook: u32, drops: bool, chains: &[(&str, Vec<FilterRule>)]) -> Facts {
    let table = "inet host".to_owned();
    let mut facts = facts();
    facts.addresses.push(address("198.51.100.7", "eth0"));
    facts.firewall.chains.push(Chain {
        table: table.clone(),
        name: "pre".to_owned(),
        families: vec![Family::V4, Family::V6],
        nat: false,
        hook,
        priority: 10,
        drops,
    });
    let chains = chains.iter().map(|(name, rules)| ((*name).to_owned(), rules.clone())).collect();
    facts.firewall.filters.push(Filters { table, chains });
    facts
}

/// Filters found on a gateway of IPv4 traffic: chain, handle, and whether it is certain.
#[track_caller]
fn found(facts: &Facts) -> Vec<(String, Option<u64>, bool)> {
    let problems = judge_for(&cluster(), &policy("node-a", EIP), facts);
    let found = problems.into_iter().filter_map(|problem| match problem {
        Problem::ReversePathFilter { chain, rule, certain, family: Family::V4, device, .. } => {
            assert_eq!(device, "egress.vxlan");
            Some((chain, rule, certain))
        }
        Problem::DropPolicy { .. } => None,
        other => panic!("{other:?}"),
    });
    found.collect()
}

#[track_caller]
fn of(rules: Vec<FilterRule>) -> Vec<(String, Option<u64>, bool)> {
    found(&with(0, false, &[("pre", rules)]))
}

fn hit(chain: &str, rule: Option<u64>) -> [(String, Option<u64>, bool); 1] {
    [(chain.to_owned(), rule, true)]
}

#[test]
fn filters_that_hit_the_tunnel() {
    let family = |number, equal| Test::Family { number, equal };
    for tests in [
        vec![STRICT],
        vec![STRICT, input("egress.vxlan", true)],
        vec![STRICT, input("eth0", false)],
        vec![STRICT, input("egress*", true)],
        vec![STRICT, family(2, true)],
        vec![STRICT, family(10, false)],
        vec![STRICT, Test::Mark { value: 0x4_0000, mask: 0x4_0000, equal: false }],
    ] {
        assert_eq!(of(vec![drops(&tests)]), hit("pre", Some(7)), "{tests:?}");
    }
    assert_eq!(found(&with(2, false, &[("pre", vec![drops(&[STRICT])])])), hit("pre", Some(7)));
    let maybe = of(vec![drops(&[STRICT, Test::Unknown])]);
    assert_eq!(maybe, [("pre".to_owned(), Some(7), false)]);
}

#[test]
fn filters_that_cannot_hit_the_tunnel() {
    for tests in [
        vec![],
        vec![EXISTS],
        vec![Test::WayBack { strict: false, by_mark: false, exists: false }],
        vec![STRICT, input("eth0", true)],
        vec![STRICT, input("eth*", true)],
        vec![STRICT, input("egress.vxlan", false)],
        vec![STRICT, Test::Family { number: 10, equal: true }],
        vec![STRICT, Test::Mark { value: 0x4_0000, mask: 0x4_0000, equal: true }],
    ] {
        assert_eq!(of(vec![drops(&tests)]), [], "{tests:?}");
    }
    for hook in [1, 3, 4] {
        assert_eq!(found(&with(hook, false, &[("pre", vec![drops(&[STRICT])])])), [], "{hook}");
    }
    let accepts = rule(1, &[input("egress.vxlan", true)], Some(Verdict::Accept));
    assert_eq!(of(vec![accepts, drops(&[STRICT])]), []);
    let of_pods = with(0, false, &[("pre", vec![drops(&[STRICT])])]);
    let problems = judge_for(&cluster(), &policy("node-b", EIP), &of_pods);
    let is_elsewhere = |problem: &Problem| matches!(problem, Problem::EgressIpElsewhere { .. });
    assert!(problems.iter().all(is_elsewhere), "no gateway: {problems:?}");
}

#[test]
fn filters_of_two_rules_or_a_policy() {
    // NixOS with iptables: what has a way back returns, the rest is dropped.
    let returns = rule(1, &[EXISTS], Some(Verdict::Return));
    let jump = |tests: &[Test]| rule(3, tests, Some(Verdict::Jump("rpf".to_owned())));
    let chains =
        |jump| with(0, false, &[("pre", vec![jump]), ("rpf", vec![returns.clone(), drops(&[])])]);
    assert_eq!(found(&chains(jump(&[]))), hit("rpf", Some(7)));
    assert_eq!(found(&chains(jump(&[input("eth0", true)]))), []);
    let maybe = found(&chains(jump(&[Test::Unknown])));
    assert_eq!(maybe, [("rpf".to_owned(), Some(7), false)]);
    // NixOS with nf_tables: what has a way back is accepted, the policy drops.
    let dhcp = rule(1, &[Test::Unknown], Some(Verdict::Accept));
    let accepts = rule(2, &[EXISTS], Some(Verdict::Accept));
    let policy = |rules| found(&with(0, true, &[("pre", rules)]));
    assert_eq!(policy(vec![dhcp.clone(), accepts.clone()]), hit("pre", None));
    let exempt = rule(3, &[input("egress.vxlan", true)], Some(Verdict::Accept));
    assert_eq!(policy(vec![dhcp, accepts, exempt]), []);
    assert_eq!(policy(vec![]), [], "a policy alone is another problem");
}

#[test]
fn marks_that_the_rules_write_are_unknown() {
    let is_workload = Test::Mark { value: 0x4_0000, mask: 0x4_0000, equal: true };
    let mark = |tests: &[Test]| FilterRule { marks: true, ..rule(1, tests, None) };
    let filter = || drops(&[is_workload.clone(), STRICT]);
    // Calico marks the packets of its own interfaces.
    assert_eq!(of(vec![mark(&[input("cali*", true)]), filter()]), []);
    let maybe = of(vec![mark(&[Test::Unknown]), filter()]);
    assert_eq!(maybe, [("pre".to_owned(), Some(7), false)]);
}

#[test]
fn jumps_end() {
    let jump = |to: &str| rule(1, &[], Some(Verdict::Jump(to.to_owned())));
    let twice = |to| vec![jump(to), jump(to)];
    let mut chains = vec![("pre", vec![jump("a"), drops(&[STRICT])])];
    for (name, to) in ["a", "b", "c", "d", "e", "f", "g", "h"]
        .into_iter()
        .zip(["b", "c", "d", "e", "f", "g", "h", "a"])
    {
        chains.push((name, twice(to)));
    }
    assert_eq!(found(&with(0, false, &chains)), hit("pre", Some(7)));
    let goto = rule(1, &[], Some(Verdict::Goto("a".to_owned())));
    let past = with(0, false, &[("pre", vec![goto, drops(&[STRICT])]), ("a", vec![])]);
    assert_eq!(found(&past), []);
}

#[test]
fn each_family_is_a_problem() {
    let mut facts = with(0, false, &[("pre", vec![drops(&[STRICT])])]);
    set(&mut facts, "ipv6/conf/all/forwarding", 1);
    let problems = judge_for(&cluster(), &policy("node-a", EgressIp::Node), &facts);
    let text: Vec<_> = problems.iter().map(ToString::to_string).collect();
    let of = |family| {
        format!(
            "chain pre of nft table inet host drops {family} packets that come out of egress.vxlan, by \
         the rule with handle 7: a reverse path filter"
        )
    };
    assert_eq!(text, [of("IPv4"), of("IPv6")]);
    assert!(problems.iter().all(|problem| problem.severity() == Severity::Broken));
    let remedy = problems[0].remedy();
    assert!(remedy.starts_with("nft insert rule inet host pre iifname egress.vxlan accept;"));
}

#[test]
fn filters_by_mark_pass_packets_with_replies_by_tunnel() {
    let by_mark = Test::WayBack { strict: true, by_mark: true, exists: false };
    let facts =
        |hook, test: &Test| with(hook, false, &[("pre", vec![drops(std::slice::from_ref(test))])]);
    let found = |replies, node: &str, facts: &Facts| {
        let cluster = cluster().with_replies(replies);
        let problems = judge_for(&cluster, &policy(node, EIP), facts);
        problems.iter().filter(|one| matches!(one, Problem::ReversePathFilter { .. })).count()
    };
    for (replies, node, hook, test, count) in [
        (Replies::Direct, "node-a", 0, &by_mark, 1),
        (Replies::Tunnel, "node-a", 0, &by_mark, 0),
        (Replies::Tunnel, "node-a", 2, &by_mark, 1),
        (Replies::Tunnel, "node-a", 0, &STRICT, 1),
        // On the node of the pod, replies come out of the tunnel.
        (Replies::Direct, "node-b", 0, &STRICT, 0),
        (Replies::Tunnel, "node-b", 0, &STRICT, 1),
        (Replies::Tunnel, "node-b", 0, &by_mark, 0),
    ] {
        assert_eq!(found(replies, node, &facts(hook, test)), count, "{replies:?} {node} {hook}");
    }
}
