//! Tests of the judgement of given facts, without a kernel.

mod devices;
mod egress_ips;
mod fast_paths;
mod firewall;
mod reverse_path;
mod routing;
mod settings;

use super::facts::{
    Action, Address, Chain, Device, Firewall, Intruder, MarkUse, Rule, Settings, Vxlan,
};
use super::*;
use crate::cluster::Tunnel;
use crate::mark::MarkLayout;
use crate::policy::{EgressIp, EgressPolicy};
use crate::types::NodeName;

fn cluster() -> Cluster {
    let node = |name: &str, number: u8| {
        Node::new(
            name.parse().unwrap(),
            vec![[192, 0, 2, number].into()],
            vec![format!("172.31.0.{number}/16").parse().unwrap()],
        )
    };
    let nodes = vec![node("node-a", 1), node("node-b", 2)];
    Cluster::new("node-a".parse().unwrap(), nodes, vec!["10.244.0.0/16".parse().unwrap()])
}

fn policy(gateway: &str, egress_ip: EgressIp) -> EgressPolicy {
    let sources = ["10.244.1.0/24", "fd00:1::/64"].map(|net| net.parse().unwrap());
    EgressPolicy {
        gateway: Some(NodeName::new(gateway).unwrap()),
        ..EgressPolicy::new("shop/checkout".parse().unwrap(), sources.to_vec(), egress_ip)
    }
}

const EIP: EgressIp = EgressIp::V4(std::net::Ipv4Addr::new(198, 51, 100, 7));

fn rule(priority: u32, action: Action) -> Rule {
    let family = Family::V4;
    Rule { family, priority, mark: None, source: None, selects: false, inverted: false, action }
}

fn lookup(priority: u32, table: u32) -> Rule {
    rule(priority, Action::Lookup { table, without_default: false })
}

fn address(ip: &str, device: &str) -> Address {
    Address { ip: ip.parse().unwrap(), device: device.to_owned(), deprecated: false }
}

/// Facts about a host without any problem for IPv4.
fn facts() -> Facts {
    Facts {
        settings: Settings([("ipv4/ip_forward".to_owned(), 1)].into()),
        devices: vec![Device { name: "eth0".to_owned(), mtu: 1500, ..Device::default() }],
        addresses: vec![address("192.0.2.1", "eth0")],
        rules: vec![lookup(0, 255), lookup(32_766, 254), lookup(32_767, 253)],
        tables: [253, 254, 255].into(),
        catch_all: [(Family::V4, 254)].into(),
        ..Facts::default()
    }
}

fn set(facts: &mut Facts, name: &str, value: u64) {
    facts.settings.0.insert(name.to_owned(), value);
}

/// Problems of a node that sends its pods' packets to another gateway node.
fn judge(facts: &Facts) -> Vec<Problem> {
    judge_for(&cluster(), &policy("node-b", EIP), facts)
}

#[track_caller]
fn judge_for(cluster: &Cluster, policy: &EgressPolicy, facts: &Facts) -> Vec<Problem> {
    let problems = Preflight::new(cluster, [policy]).judge(facts);
    assert!(problems.is_sorted_by_key(|problem| std::cmp::Reverse(problem.severity())));
    for problem in &problems {
        assert!(!problem.to_string().is_empty() && !problem.remedy().is_empty(), "{problem:?}");
    }
    problems
}

#[test]
fn a_host_without_problems_has_none() {
    assert_eq!(judge(&facts()), []);
}

#[test]
fn without_policies_the_families_are_those_of_the_tunnel() {
    let mut facts = facts();
    set(&mut facts, "ipv4/ip_forward", 0);
    let cluster = cluster();
    let problems = Preflight::new(&cluster, <[EgressPolicy; 0]>::default()).judge(&facts);
    assert_eq!(problems, [Problem::NotForwarding { family: Family::V4 }]);
}

#[test]
fn the_worst_comes_first() {
    let mut facts = facts();
    set(&mut facts, "netfilter/nf_conntrack_tcp_loose", 0);
    facts.tables.insert(3000);
    facts.legacy = vec!["nat".to_owned()];
    facts.denied = true;
    let problems = judge(&facts);
    assert_eq!(problems[0], Problem::Denied);
    assert_eq!(problems[0].severity(), Severity::Broken);
    assert_eq!(problems.len(), 4);
}

#[test]
fn a_problem_of_one_family_leaves_the_other_ready() {
    let (cluster, dual) = (cluster(), policy("node-b", EgressIp::Node));
    let preflight = Preflight::new(&cluster, [&dual]);
    let mut facts = facts();
    set(&mut facts, "ipv6/conf/all/forwarding", 1);
    let ready = |facts: &Facts| {
        let ready = preflight.ready(&preflight.judge(facts)).into_iter();
        ready.map(|family| family.to_string()).collect::<Vec<_>>().join(" ")
    };
    assert_eq!(ready(&facts), "IPv4 IPv6");
    set(&mut facts, "netfilter/nf_conntrack_tcp_loose", 0);
    assert_eq!(ready(&facts), "IPv4 IPv6", "a note");
    set(&mut facts, "ipv6/conf/all/forwarding", 0);
    assert_eq!(ready(&facts), "IPv4");
    let before = facts.clone();
    facts.rules.push(rule(50, Action::Refuse));
    assert_eq!(ready(&facts), "");
    facts = before;
    facts.denied = true;
    assert_eq!(ready(&facts), "");
    let four = policy("node-b", EIP);
    assert_eq!(Preflight::new(&cluster, [&four]).ready(&[]), [Family::V4].into());
}
