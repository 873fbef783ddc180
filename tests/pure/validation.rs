//! Bad input: which error or finding it gives, and the sentence.

use std::net::IpAddr;

use egress_datapath::alloc::{MarkPool, TablePool, TableRange};
use egress_datapath::error::NameError;
use egress_datapath::explain::{Fate, Packet};
use egress_datapath::iptables::Iptables;
use egress_datapath::mark::LayoutError;
use egress_datapath::state::{Data, Key, KeyValue, Set, Tag, Variant};
use egress_datapath::{
    Backend, Claim, Cluster, Destinations, DeviceName, EgressIp, EgressPolicy, Finding, MacAddr,
    Mark, MarkAllocator, MarkLayout, Node, NodeName, Plan, PlanError, PolicyError, PolicyId,
    Reconciler, Sim, TableAllocator, Unavailable, Update, check_policy, explain, plan,
};
use ipnet::IpNet;

use crate::{cluster, dual, name, net, nets, planned, policy, v4};

macro_rules! refused {
    ($result:expr, $variant:pat, $sentence:expr) => {
        let error = $result.expect_err($sentence);
        assert!(matches!(error, $variant), "{error:?}");
        assert_eq!(error.to_string(), $sentence);
    };
}

fn of_cluster(change: impl FnOnce(&mut Cluster)) -> Result<(), PlanError> {
    let mut cluster = cluster("a");
    change(&mut cluster);
    planned(&cluster, [good()]).map(drop)
}

/// Every finding about the good policy in a changed cluster.
fn told(change: impl FnOnce(&mut Cluster)) -> Vec<String> {
    let mut cluster = cluster("a");
    change(&mut cluster);
    sentences(&planned(&cluster, [good()]).unwrap())
}

fn sentences(plan: &Plan) -> Vec<String> {
    plan.findings.iter().map(ToString::to_string).collect()
}

/// The errors of the good policy, changed: it is closed, and nothing else is different.
fn of_policy(change: impl FnOnce(&mut EgressPolicy)) -> Vec<PolicyError> {
    let mut cluster = cluster("a");
    cluster.pods = std::mem::take(&mut cluster.excluded);
    let mut policy = good();
    change(&mut policy);
    let plan = planned(&cluster, [&policy]).unwrap();
    let errors = check_policy(&cluster, &policy).err().unwrap_or_default();
    let told = match plan.findings.as_slice() {
        [] => Vec::new(),
        [finding @ Finding::InvalidPolicy { policy, unavailable: Unavailable::Drop, errors }] => {
            let all: Vec<_> = errors.iter().map(ToString::to_string).collect();
            let sentence = format!("policy {policy} drops its traffic: {}", all.join("; "));
            assert_eq!(finding.to_string(), sentence);
            assert_eq!(finding.code(), errors[0].code());
            errors.clone()
        }
        other => panic!("{other:?}"),
    };
    assert_eq!(told, errors);
    assert_eq!(plan.gateways.is_empty(), !errors.is_empty());
    errors
}

fn good() -> EgressPolicy {
    policy("shop/checkout", &["10.244.1.10/32"], Some("b"), v4("198.51.100.200"))
}

#[test]
fn egress_hook_without_prefix_refused() {
    use PlanError as E;
    let hook = egress_datapath::Steering::EgressHook;
    of_cluster(|cluster| cluster.steering = hook).unwrap();
    refused!(
        of_cluster(|cluster| (cluster.steering, cluster.marks) = (hook, MarkLayout::COMPACT)),
        E::EgressHookPrefix,
        "steering by the egress hook needs a layout of marks with a prefix: one routing rule must \
         tell them all"
    );
    let iptables = Iptables::new(Variant::Nft);
    let backend = Backend::Iptables(iptables);
    refused!(
        of_cluster(|cluster| (cluster.steering, cluster.backend) = (hook, backend)),
        E::EgressHookBackend,
        "steering by the egress hook needs nf_tables as backend: iptables has no such hook"
    );
}

#[test]
fn egress_hook_one_table_for_all_gateways() {
    let policies = || {
        let to = |id: &str, source: &str, gateway, eip| policy(id, &[source], Some(gateway), eip);
        [
            to("shop/b", "10.244.1.1/32", "b", v4("198.51.100.200")),
            to("shop/c", "10.244.1.2/32", "c", v4("198.51.100.201")),
        ]
    };
    let plan = |cluster: &Cluster| {
        let mut tables = TablePool::new(TableRange::new(3000, 0).unwrap());
        plan(cluster, policies(), &mut MarkPool::new(cluster.marks), &mut tables)
    };
    let mut cluster = cluster("a");
    let few = plan(&cluster).unwrap();
    assert_eq!(few.gateways.keys().collect::<Vec<_>>(), [&name("b")]);
    assert_eq!(few.findings.len(), 2, "{:?}", few.findings);
    cluster.steering = egress_datapath::Steering::EgressHook;
    let planned = plan(&cluster).unwrap();
    let tables: Vec<_> = planned.gateways.values().map(|(_, table)| table.get()).collect();
    assert_eq!(tables, [3000, 3000]);
    assert!(planned.findings.is_empty());
}

const CLOSED: &str =
    "policy shop/checkout drops its traffic: gateway b is left out of the cluster's nodes";

/// Checks that the node with this index is left out for this reason, and what that means.
#[track_caller]
fn left_out(at: usize, change: impl FnOnce(&mut Node), reason: &str) {
    let mut cluster = cluster("a");
    change(&mut cluster.nodes[at]);
    let node = cluster.nodes[at].clone();
    let plan = planned(&cluster, [good()]).unwrap();
    assert_eq!(sentences(&plan), [&format!("node {} is left out: {reason}", node.name), CLOSED],);
    let Finding::InvalidNode { errors, .. } = &plan.findings[0] else { panic!() };
    assert_eq!(plan.findings[0].code(), errors[0].code());
    let peers = plan.state.fdb.values().chain(plan.state.neighbours.keys());
    assert!(peers.clone().any(|peer| *peer == IpAddr::from([10, 10, 0, 13])));
    let own = |address: &IpAddr| {
        node.underlay.contains(address) || node.tunnel.iter().any(|net| net.addr() == *address)
    };
    assert!(!peers.chain(plan.state.fdb.values()).any(own), "{:?}", plan.state);
    let elements = &plan.state.firewall.as_ref().unwrap().elements;
    for address in node.underlay.iter().filter(|address| address.to_string().starts_with("10.")) {
        assert!(elements.get(&Key::peer(*address)).is_none());
        assert!(elements.get(&Key::excluded(IpNet::from(*address).into())).is_some());
    }
}

#[test]
fn invalid_nodes_left_out() {
    use PlanError as E;
    assert!(told(|_| {}).is_empty());
    refused!(
        of_cluster(|cluster| cluster.node = name("z")),
        E::UnknownNode { .. },
        "node z is not in the cluster's list of nodes"
    );
    for address in ["224.0.0.1", "0.0.0.0", "127.0.0.1", "169.254.1.1", "255.255.255.255"] {
        let reason = format!("{address} is not a unicast address");
        left_out(1, |node| node.underlay[0] = address.parse().unwrap(), &reason);
    }
    for address in ["ff02::1", "::", "::1", "fe80::1"] {
        let reason = format!("{address} is not a unicast address");
        left_out(1, |node| node.tunnel[1] = net(&format!("{address}/64")), &reason);
    }
    left_out(
        1,
        |node| node.underlay[1] = "::ffff:10.10.0.12".parse().unwrap(),
        "::ffff:10.10.0.12 is an IPv4-mapped IPv6 address; write IPv4 addresses as IPv4",
    );
    left_out(
        1,
        |node| node.underlay.push("10.10.0.99".parse().unwrap()),
        "it has more than one IPv4 underlay or tunnel address",
    );
    left_out(
        1,
        |node| node.tunnel[0] = net("10.10.0.12/16"),
        "10.10.0.12 is both its underlay and its tunnel address",
    );
    left_out(1, |node| node.underlay.clear(), "it has no underlay address");
    left_out(
        1,
        |node| node.underlay.retain(IpAddr::is_ipv6),
        "it has no IPv4 underlay address, which the tunnel of this node uses",
    );
    left_out(1, |node| node.tunnel.clear(), "it has no tunnel address");
    left_out(
        1,
        |node| node.mac = Some(MacAddr::new([1, 0, 0x5e, 0, 0, 1])),
        "Ethernet address 01:00:5e:00:00:01 is zero or a group address",
    );
    left_out(
        1,
        |node| node.mark = Some(Mark::new(0x2700_0000)),
        "mark 0x27000000 is no gateway mark of the layout",
    );
    left_out(
        1,
        |node| {
            node.underlay[0] = "0.0.0.0".parse().unwrap();
            node.tunnel.clear();
        },
        "0.0.0.0 is not a unicast address; it has no tunnel address",
    );
}

#[test]
fn nodes_that_contradict_each_other_left_out() {
    let both = |what: &str| {
        [
            format!("node b is left out: node c has {what} too"),
            format!("node c is left out: node b has {what} too"),
            CLOSED.to_owned(),
        ]
    };
    let address = |at: &'static str| {
        move |cluster: &mut Cluster| cluster.nodes[1].underlay[0] = at.parse().unwrap()
    };
    assert_eq!(told(address("10.10.0.13")), both("10.10.0.13"));
    assert_eq!(told(address("172.31.0.13")), both("172.31.0.13"));
    let mac = MacAddr::new([2, 0, 0, 0, 0, 1]);
    let macs =
        |cluster: &mut Cluster| cluster.nodes[1..].iter_mut().for_each(|n| n.mac = Some(mac));
    assert_eq!(told(macs), both("02:00:00:00:00:01"));
    let mark = MarkLayout::SEED.mark(1);
    let marks = |cluster: &mut Cluster| cluster.nodes[1..].iter_mut().for_each(|n| n.mark = mark);
    assert_eq!(told(marks), both("0x26000100"));
    let twice = |cluster: &mut Cluster| cluster.nodes[2].name = name("b");
    assert_eq!(told(twice), ["node b is left out: it is listed twice", CLOSED]);
    let mut again = cluster("a");
    again.nodes.push(again.nodes[1].clone());
    let plan = planned(&again, [good()]).unwrap();
    assert_eq!(sentences(&plan), ["node b is left out: it is listed twice", CLOSED]);
    // c is a peer as before.
    assert_eq!(plan.state.fdb.values().collect::<Vec<_>>(), [&IpAddr::from([10, 10, 0, 13])]);
}

#[test]
fn this_node_steers_on_beside_a_node_that_contradicts_it() {
    use PlanError as E;
    let here = policy("own", &["10.244.1.11/32"], Some("a"), v4("198.51.100.201"));
    let with = |change: &dyn Fn(&mut Cluster)| {
        let mut cluster = cluster("a");
        // The mark that the pool would give first stays this node's.
        cluster.nodes[0].mark = Some(Mark::new(0x2600_0000));
        change(&mut cluster);
        planned(&cluster, [good(), here.clone()]).unwrap()
    };
    let sound = with(&|_| {});
    assert!(sound.findings.is_empty());
    let own = "policy own drops its traffic: gateway a is left out of the cluster's nodes";
    for (change, reasons) in [
        (
            &(|cluster: &mut Cluster| cluster.nodes[2].underlay[0] = [10, 10, 0, 11].into())
                as &dyn Fn(&mut Cluster),
            &[
                "node a is left out: node c has 10.10.0.11 too",
                "node c is left out: node a has 10.10.0.11 too",
            ][..],
        ),
        (&|cluster| cluster.nodes[2].name = name("a"), &["node a is left out: it is listed twice"]),
        (
            &|cluster| cluster.nodes[0].mark = Some(Mark::new(1)),
            &["node a is left out: mark 0x00000001 is no gateway mark of the layout"],
        ),
        (
            &|cluster| cluster.nodes[0].underlay[1] = "fe80::1".parse().unwrap(),
            &["node a is left out: fe80::1 is not a unicast address"],
        ),
        (
            &|cluster| cluster.nodes[0].tunnel.push(net("fd11::99/112")),
            &["node a is left out: it has more than one IPv6 underlay or tunnel address"],
        ),
    ] {
        let plan = with(change);
        assert_eq!(sentences(&plan), [reasons, &[own]].concat());
        let foreign = reasons[0].contains("mark");
        assert_eq!(plan.gateways == sound.gateways, !foreign);
        assert!(plan.gateways.keys().eq(sound.gateways.keys()));
        assert_eq!(plan.state.link, sound.state.link);
        let addresses = &plan.state.addresses;
        assert!(addresses.is_subset(&sound.state.addresses) && !addresses.is_empty());
        let b = IpAddr::from([10, 10, 0, 12]);
        assert!(plan.state.fdb.values().any(|peer| *peer == b));
    }
    let mut reversed = cluster("a");
    reversed.nodes[2].name = name("a");
    let one = planned(&reversed, [good()]).unwrap();
    reversed.nodes.reverse();
    assert_eq!(planned(&reversed, [good()]).unwrap(), one);
    let of_here = |change: fn(&mut Node)| of_cluster(|cluster| change(&mut cluster.nodes[0]));
    let this = "node a, this one, has no usable addresses:";
    refused!(
        of_here(|node| node.underlay.clear()),
        E::ThisNode { .. },
        format!("{this} it has no underlay address").as_str()
    );
    refused!(
        of_here(|node| node.tunnel.clear()),
        E::ThisNode { .. },
        format!("{this} it has no tunnel address").as_str()
    );
    refused!(
        of_here(|node| node.underlay = vec!["127.0.0.1".parse().unwrap()]),
        E::ThisNode { .. },
        format!("{this} 127.0.0.1 is not a unicast address").as_str()
    );
    refused!(
        of_here(|node| node.mac = Some(MacAddr::new([0; 6]))),
        E::ThisNode { .. },
        format!("{this} Ethernet address 00:00:00:00:00:00 is zero or a group address").as_str()
    );
    let error = of_here(|node| node.tunnel.clear()).unwrap_err();
    assert_eq!(error.code(), "no_tunnel");
    let pods = nets(&["172.31.0.0/16", "fd11::/64"]);
    let error = of_cluster(|cluster| cluster.pods = pods).unwrap_err();
    assert_eq!(error.code(), "tunnel_of_pods");
    let sentence = "its tunnel address 172.31.0.11 lies in 172.31.0.0/16, a prefix of pods";
    assert!(error.to_string().contains(sentence), "{error}");
}

#[test]
fn invalid_settings_refused() {
    use PlanError as E;
    for vni in [0, 1 << 24] {
        refused!(
            of_cluster(|cluster| cluster.tunnel.vni = vni),
            E::Vni { .. },
            format!("VXLAN network identifier {vni} is not between 1 and 16777215").as_str()
        );
    }
    refused!(
        of_cluster(|cluster| cluster.tunnel.port = 0),
        E::Port,
        "the tunnel needs a UDP port other than 0"
    );
    of_cluster(|cluster| cluster.tunnel.underlay_mtu = 1330).unwrap();
    refused!(
        of_cluster(|cluster| cluster.tunnel.underlay_mtu = 1329),
        E::Mtu { .. },
        "underlay MTU 1329 is too small: the tunnel needs 1330 to carry 1280 bytes"
    );
    for priority in [0, 32_762] {
        refused!(
            of_cluster(|cluster| cluster.rule_priority = priority),
            E::RulePriority { .. },
            format!("rule priority {priority} is not between 1 and 32761").as_str()
        );
    }
    refused!(
        of_cluster(|cluster| {
            cluster.policy_counters = true;
            cluster.connection_caching = true;
        }),
        E::CachedCounters,
        "policy_counters and connection_caching cannot both be on: cached packets are not counted"
    );
    refused!(
        of_cluster(|cluster| {
            cluster.policy_counters = true;
            cluster.backend = Backend::Iptables(Iptables::new(Variant::Nft));
        }),
        E::IptablesCounters,
        "policy_counters need nf_tables: with iptables packets are not counted"
    );
    refused!(
        of_cluster(|cluster| cluster.excluded.clear()),
        E::NothingExcluded,
        "no excluded prefix is given: name at least the prefix of the pods"
    );
    refused!(
        of_cluster(|cluster| cluster.pods = nets(&["10.245.1.0/16"])),
        E::Excluded { .. },
        "excluded prefixes: 10.245.1.0/16 has host bits set; 10.245.0.0/16 may be meant"
    );
    refused!(
        of_cluster(|cluster| cluster.excluded[0] = net("10.244.1.0/16")),
        E::Excluded { .. },
        "excluded prefixes: 10.244.1.0/16 has host bits set; 10.244.0.0/16 may be meant"
    );
    refused!(
        of_cluster(|cluster| cluster.tunnel.underlay_only = true),
        E::UnderlayOnlyDevice,
        "underlay_only needs an underlay_device: name the interface of the underlay"
    );
    refused!(
        of_cluster(|cluster| {
            cluster.tunnel.underlay_only = true;
            cluster.tunnel.underlay_device = Some(DeviceName::new("wg0").unwrap());
            cluster.backend = Backend::Iptables(Iptables::new(Variant::Nft));
        }),
        E::UnderlayOnlyBackend,
        "underlay_only needs nf_tables as backend"
    );
    let claim = |text, device| Claim::new(net(text), DeviceName::new(device).unwrap());
    of_cluster(|cluster| cluster.claims = vec![claim("198.51.100.200/32", "eth1")]).unwrap();
    refused!(
        of_cluster(|cluster| cluster.claims = vec![claim("198.51.100.200/24", "eth1")]),
        E::Claim { .. },
        "claims: 198.51.100.200/24 has host bits set; 198.51.100.0/24 may be meant"
    );
    refused!(
        of_cluster(|cluster| cluster.claims = vec![claim("198.51.100.0/24", "egress.vxlan")]),
        E::ClaimDevice { .. },
        "egress IPs cannot be claimed on egress.vxlan, which is the tunnel: name the interface of \
         their network"
    );
}

#[track_caller]
fn closed(change: impl FnOnce(&mut EgressPolicy), sentences: &[&str]) {
    let errors = of_policy(change);
    assert_eq!(errors.iter().map(ToString::to_string).collect::<Vec<_>>(), sentences);
}

#[test]
fn invalid_policies_closed() {
    closed(|_| {}, &[]);
    let bits = "10.244.1.10/24 has host bits set; 10.244.1.0/24 may be meant";
    closed(|policy| policy.sources = nets(&["10.244.1.10/24"]), &[bits]);
    closed(
        |policy| policy.destinations = Destinations::Nets(nets(&["2001:db8::1/64"])),
        &["2001:db8::1/64 has host bits set; 2001:db8::/64 may be meant"],
    );
    let mapped =
        "::ffff:10.244.1.10/128 is an IPv4-mapped IPv6 prefix; write IPv4 prefixes as IPv4";
    closed(|policy| policy.sources = nets(&["::ffff:10.244.1.10/128"]), &[mapped]);
    let none = "destinations are an empty list; say external, or name a prefix";
    closed(|policy| policy.destinations = Destinations::Nets(Vec::new()), &[none]);
    let unknown = "gateway z is not a node of the cluster";
    closed(|policy| policy.gateway = Some(name("z")), &[unknown]);
    for address in ["0.0.0.0", "127.0.0.1", "224.0.0.1", "240.0.0.1", "169.254.0.1"] {
        let why = format!("egress IP {address} is not a unicast address that can leave the link");
        closed(|policy| policy.egress_ip = v4(address), &[&why]);
    }
    for address in ["::", "::1", "ff02::1", "fe80::1", "::ffff:1.2.3.4"] {
        let why = format!("egress IP {address} is not a unicast address that can leave the link");
        closed(|policy| policy.egress_ip = EgressIp::V6(address.parse().unwrap()), &[&why]);
    }
    let excluded =
        "egress IP fd44::7 lies in fd44::/16, a prefix of pods; choose an address of no pod";
    closed(|policy| policy.egress_ip = dual("198.51.100.200", "fd44::7"), &[excluded]);
    let own = "egress IP 10.10.0.12 is an address of node b; ask for the node's own instead";
    closed(|policy| policy.egress_ip = v4("10.10.0.12"), &[own]);
    closed(
        |policy| {
            policy.sources = nets(&["10.244.1.10/24", "::ffff:10.244.1.10/128", "10.244.1.9/32"]);
            policy.destinations = Destinations::Nets(Vec::new());
            policy.gateway = Some(name("z"));
            policy.egress_ip = dual("10.10.0.12", "fd44::7");
        },
        &[bits, mapped, none, own, excluded, unknown],
    );
}

/// The elements of a policy alone: which sources it selects, and which destinations.
fn selected(policy: &EgressPolicy) -> Vec<String> {
    let plan = planned(&cluster("a"), [policy]).unwrap();
    let elements = plan.state.firewall.unwrap().elements;
    let told =
        elements.iter().filter_map(|(key, value)| match (key.set(), key.value(), &value.data) {
            (Set::Source(_), KeyValue::Address(address), _) => Some(format!("from {address}")),
            (Set::SourceNet(_), KeyValue::Range(range), _) => {
                Some(format!("from {}", range.first()))
            }
            (Set::Destination(_, length), KeyValue::AddressAndTag(address, _), _) => {
                Some(format!("to {address}/{length}"))
            }
            (Set::Any(family), ..) => Some(format!("to any {family}")),
            (Set::Steer(_), _, Data::Tag(tag)) if *tag == Tag::DENY => Some("drop".to_owned()),
            (Set::Steer(_), _, Data::Tag(tag)) if *tag == Tag::BYPASS => Some("bypass".to_owned()),
            (Set::Steer(_), ..) => Some("steer".to_owned()),
            _ => None,
        });
    let mut told: Vec<_> = told.collect();
    told.sort();
    told
}

#[test]
fn closed_policy_selects_what_is_valid_of_it() {
    let with = |change: &dyn Fn(&mut EgressPolicy)| {
        let mut policy = good();
        change(&mut policy);
        selected(&policy)
    };
    let sources = |texts: &[&str]| with(&|policy| policy.sources = nets(texts));
    assert_eq!(with(&|_| {}), ["from 10.244.1.10", "steer", "to any IPv4"]);
    let both = ["drop", "from 10.244.1.10", "from 10.244.1.9", "to any IPv4"];
    assert_eq!(sources(&["10.244.1.10/24", "10.244.1.9/32"]), both);
    assert_eq!(sources(&["::ffff:10.244.1.9/128", "10.244.1.9/32"])[1..2], ["from 10.244.1.9"]);
    assert!(sources(&["::ffff:10.244.1.9/128"]).is_empty());
    assert!(sources(&["::ffff:10.244.1.9/97"]).is_empty(), "names no IPv6 host");
    assert!(sources(&[]).is_empty());
    let destinations =
        |texts: &[&str]| with(&|policy| policy.destinations = Destinations::Nets(nets(texts)));
    assert_eq!(destinations(&[]), ["drop", "from 10.244.1.10", "to any IPv4"]);
    assert_eq!(destinations(&["192.0.2.9/24"]), ["drop", "from 10.244.1.10", "to any IPv4"]);
    assert_eq!(
        destinations(&["192.0.2.9/24", "::ffff:1.2.3.4/128", "203.0.113.0/24"]),
        ["drop", "from 10.244.1.10", "to 192.0.2.9/32", "to 203.0.113.0/24"]
    );
    assert_eq!(
        with(&|policy| {
            policy.gateway = Some(name("z"));
            policy.unavailable = Unavailable::Bypass;
        }),
        ["bypass", "from 10.244.1.10", "to any IPv4"]
    );
}

#[test]
fn policies_of_one_id_closed_together() {
    let mut other = good()
        .with_priority(7)
        .with_unavailable(Unavailable::Bypass)
        .with_sources(nets(&["10.244.1.11/32"]))
        .with_destinations(Destinations::Nets(nets(&["192.0.2.0/24"])));
    let lower = policy("lower", &["10.244.1.11/32"], Some("c"), v4("198.51.100.201"));
    let lower = lower.with_priority(3);
    let all = [good(), lower.clone(), other.clone()];
    let plan = planned(&cluster("a"), &all).unwrap();
    assert_eq!(
        sentences(&plan),
        [
            "policy shop/checkout drops its traffic: the id is given to more than one policy",
            "policies shop/checkout and lower overlap in IPv4: shop/checkout comes first and wins",
        ]
    );
    assert_eq!(plan.findings[0].code(), "duplicate_policy");
    let packet =
        |from: &str, to: &str| Packet::tcp(from.parse().unwrap(), 40_000, to.parse().unwrap(), 443);
    for source in ["10.244.1.10", "10.244.1.11"] {
        let trace = explain(&plan.state, &packet(source, "203.0.113.9"));
        assert!(matches!(trace.fate, Fate::Dropped), "{trace}");
    }
    let mut reversed = all;
    reversed.reverse();
    assert_eq!(planned(&cluster("a"), &reversed).unwrap(), plan);
    // Both bypass: so do they together.
    let bypass = good().with_unavailable(Unavailable::Bypass);
    let plan = planned(&cluster("a"), [&bypass, &other]).unwrap();
    assert_eq!(
        sentences(&plan),
        ["policy shop/checkout leaves its traffic unchanged: \
          the id is given to more than one policy"]
    );
    // Two lists: what either of them selects.
    other.unavailable = Unavailable::Drop;
    let one = good().with_destinations(Destinations::Nets(nets(&["203.0.113.0/24"])));
    let plan = planned(&cluster("a"), [&one, &other]).unwrap();
    for to in ["192.0.2.1", "203.0.113.9"] {
        let trace = explain(&plan.state, &packet("10.244.1.10", to));
        assert!(matches!(trace.fate, Fate::Dropped), "{trace}");
    }
}

#[test]
fn policy_checked_in_a_cluster_with_errors() {
    let mut bad = cluster("a");
    bad.node = name("z");
    bad.tunnel.vni = 0;
    bad.excluded.push(net("10.1.2.3/8"));
    bad.nodes[2].tunnel.clear();
    assert_eq!(check_policy(&bad, &good()), Ok(()));
    let by_c = good().with_gateway(name("c"));
    let errors = check_policy(&bad, &by_c).unwrap_err();
    assert_eq!(errors, [PolicyError::GatewayLeftOut { gateway: name("c") }]);
    let empty = good().with_sources(Vec::new());
    assert_eq!(check_policy(&bad, &empty).unwrap_err(), [PolicyError::NoSources]);
}

#[test]
fn gateways_beyond_the_marks_or_tables_closed() {
    let cluster = cluster("a");
    let by = |id: &str, source: &str, gateway| policy(id, &[source], Some(gateway), EgressIp::Node);
    let to_b = by("shop/b", "10.244.1.10/32", "b");
    let to_c = by("shop/c", "10.244.1.11/32", "c");
    let few =
        |world: &Cluster, marks: &mut MarkPool, tables: &mut TablePool, all: &[&EgressPolicy]| {
            let plan = plan(world, all, marks, tables).unwrap();
            let gateways: Vec<_> = plan.gateways.keys().map(ToString::to_string).collect();
            let findings = plan.findings.iter();
            let denied = findings.filter(|finding| finding.code() == "policy_denied");
            (gateways.concat(), denied.map(ToString::to_string).collect::<Vec<_>>())
        };
    let denied = |id: &str| {
        let why = "no mark or no routing table is left for its gateway";
        vec![format!("policy shop/{id} drops its IPv4 traffic: {why}")]
    };
    let mut small = cluster.clone();
    small.marks = MarkLayout::new(0, 0, 16, 2).unwrap();
    let one = || TablePool::new(TableRange::new(3000, 0).unwrap());
    let pools = || (MarkPool::new(cluster.marks), one());
    let marks = || (MarkPool::new(small.marks), TablePool::default());
    let mut small = small.clone();
    for (world, (mut marks, mut tables)) in [(&cluster, pools()), (&small, marks())] {
        // By name, and who has an id keeps it.
        let names = few(world, &mut marks, &mut tables, &[&to_c, &to_b]);
        assert_eq!(names, ("b".to_owned(), denied("c")));
        assert_eq!((marks.get(&name("c")), tables.get(&name("c"))), (None, None));
        // An idle gateway gives its id away.
        assert_eq!(few(world, &mut marks, &mut tables, &[&to_c]), ("c".to_owned(), vec![]));
        let names = few(world, &mut marks, &mut tables, &[&to_b, &to_c]);
        assert_eq!(names, ("c".to_owned(), denied("b")));
        assert_eq!((marks.get(&name("b")), tables.get(&name("b"))), (None, None));
    }
    // A mark that the caller gives is no other gateway's.
    small.nodes[1].mark = (0..4).find_map(|value| small.marks.mark(value));
    assert!(small.nodes[1].mark.is_some());
    let (mut marks, mut tables) = (MarkPool::new(small.marks), TablePool::default());
    let names = few(&small, &mut marks, &mut tables, &[&to_c]);
    assert_eq!(names, (String::new(), denied("c")));
    // With the egress hook one table is enough, and without one no gateway can be used.
    let mut hook = cluster.clone();
    hook.steering = egress_datapath::Steering::EgressHook;
    let in_use = std::collections::BTreeSet::from([3000]);
    let mut none = TablePool::with_probe(TableRange::new(3000, 0).unwrap(), in_use);
    let (gateways, findings) =
        few(&hook, &mut MarkPool::new(hook.marks), &mut none, &[&to_b, &to_c]);
    assert_eq!((gateways.as_str(), findings), ("", [denied("b"), denied("c")].concat()));
    // Where it bypasses, it says so.
    let (mut marks, mut tables) = (MarkPool::new(cluster.marks), one());
    let bypass = to_c.clone().with_unavailable(Unavailable::Bypass);
    let planned = plan(&cluster, [&to_b, &bypass], &mut marks, &mut tables).unwrap();
    assert!(planned.findings.iter().any(|finding| finding.code() == "policy_bypassed"));
    let elements = planned.state.firewall.unwrap().elements;
    let bypasses = elements.iter().any(|(key, value)| {
        matches!(key.set(), Set::Steer(_)) && value.data == Data::Tag(Tag::BYPASS)
    });
    assert!(bypasses);
}

#[test]
fn invalid_mark_layouts_refused() {
    use LayoutError as E;
    refused!(
        MarkLayout::new(0, 0, 30, 4),
        E::Field { .. },
        "4 value bits at bit 30 do not fit: a layout has 1 to 16 of them below bit 32"
    );
    refused!(
        MarkLayout::new(0x2600_0000, 0x0600_0000, 8, 8),
        E::PrefixOutsideMask { .. },
        "prefix 0x26000000 has bits outside its mask 0x06000000"
    );
    refused!(
        MarkLayout::new(0, 0xff00_0000, 8, 8),
        E::PrefixZero { .. },
        "a prefix of zero under mask 0xff000000 is what unmarked packets carry"
    );
    refused!(
        MarkLayout::new(0x2600_0000, 0xff00_0000, 20, 8),
        E::Overlap { .. },
        "prefix mask 0xff000000 and value bits 0x0ff00000 overlap"
    );
    refused!(
        MarkLayout::new(0, 0, 0, 1),
        E::NoValues { .. },
        "1 value bits without a wider prefix leave no value for a gateway"
    );
}

#[test]
fn longest_policy_ids_that_differ_in_last_byte_are_two_policies() {
    let long = |last: u8| format!("{}/{}{last}", "n".repeat(63), "p".repeat(252));
    let one = |last: u8| {
        let source = format!("10.244.1.{last}/32");
        policy(&long(last), &[&source], Some("a"), v4(&format!("192.0.2.{last}")))
            .with_destinations(Destinations::Nets(nets(&["203.0.113.0/24"])))
    };
    let policies = [one(1), one(2)];
    let iptables = Backend::Iptables(Iptables::new(Variant::Nft));
    for backend in [Backend::default(), iptables] {
        let plan = planned(&cluster("a").with_backend(backend), &policies).unwrap();
        assert_eq!(plan.findings, []);
        let names = [1, 2].map(|last: u8| {
            let (pod, peer) = ([10, 244, 1, last].into(), [203, 0, 113, 9].into());
            let trace = explain(&plan.state, &Packet::udp(pod, 40_000, peer, 53));
            let wanted = Fate::Routed(Some([192, 0, 2, last].into()));
            assert_eq!(trace.fate, wanted, "{trace}");
            trace.policy().map(str::to_owned)
        });
        assert!(backend != Backend::default() || names[0].is_some() && names[0] != names[1]);
    }
    let mut egress = Reconciler::new(Sim::new());
    let cluster = cluster("a").with_policy_counters(true);
    egress.reconcile(&cluster, &policies).unwrap();
    egress.datapath().send(Packet::udp([10, 244, 1, 2].into(), 7, [203, 0, 113, 9].into(), 53));
    let counted = egress.counters().unwrap();
    let counted = counted.iter().map(|one| (one.policy.as_str().to_owned(), one.count.packets));
    assert_eq!(counted.collect::<Vec<_>>(), [(long(1), 0), (long(2), 1)]);
}

#[test]
fn invalid_names_refused() {
    use NameError as E;
    refused!(NodeName::new(""), E::Empty { .. }, "a node name cannot be empty");
    refused!(
        PolicyId::new("p".repeat(318)),
        E::TooLong { .. },
        "a policy id has at most 317 bytes, this one has 318"
    );
    refused!(
        DeviceName::new("egress.vxlan.100"),
        E::TooLong { .. },
        "a device name has at most 15 bytes, this one has 16"
    );
    for (id, found, at) in [("a b", ' ', 1), ("a\"", '"', 1), ("über", 'ü', 0), ("a;", ';', 1)] {
        refused!(
            PolicyId::new(id),
            E::Character { .. },
            format!("a policy id cannot contain {found:?} (at byte {at})").as_str()
        );
    }
    refused!(
        DeviceName::new("eth0*"),
        E::Character { .. },
        "a device name cannot contain '*' (at byte 4)"
    );
    let mac = "66:f7:06:23:81".parse::<MacAddr>().unwrap_err();
    assert_eq!(
        mac.to_string(),
        "\"66:f7:06:23:81\" is not an Ethernet address such as 66:f7:06:23:81:6b"
    );
}

#[test]
fn egress_ip_on_several_gateways_reported_once() {
    let cluster = cluster("a");
    let on = |id: &str, gateway: &str, source: &str, eip: EgressIp| {
        let id = PolicyId::new(id).unwrap();
        EgressPolicy::new(id, nets(&[source]), eip).with_gateway(name(gateway))
    };
    let shared = v4("198.51.100.7");
    let mut policies = vec![
        on("p", "a", "10.244.1.1/32", shared),
        on("q", "b", "10.244.1.2/32", shared),
        on("r", "b", "10.244.1.3/32", shared),
        on("s", "b", "10.244.1.4/32", v4("198.51.100.8")),
        on("t", "c", "10.244.1.5/32", EgressIp::Node),
        on("u", "b", "10.244.1.6/32", EgressIp::Node),
    ];
    let finding = Finding::EgressIpOnGateways {
        address: "198.51.100.7".parse().unwrap(),
        gateways: vec![name("a"), name("b")],
    };
    let sentence = "egress IP 198.51.100.7 is used on several gateways: a, b";
    assert_eq!(finding.to_string(), sentence);
    assert_eq!(planned(&cluster, &policies).unwrap().findings, std::slice::from_ref(&finding));
    let mut egress = Reconciler::new(Sim::new());
    let first = policies.remove(0);
    assert!(egress.reconcile(&cluster, &policies).unwrap().findings.is_empty());
    let report = egress.update([Update::Upsert(&first)]).unwrap();
    assert_eq!(report.findings, std::slice::from_ref(&finding));
    policies.push(first);
    assert_eq!(egress.reconcile(&cluster, &policies).unwrap().findings, [finding]);
    let moved = policies.pop().unwrap().with_gateway(name("b"));
    assert!(egress.update([Update::Upsert(&moved)]).unwrap().findings.is_empty());
}

#[test]
fn sources_of_nodes_reported() {
    let cluster = cluster("a");
    let nodes = &cluster.nodes;
    let (underlay, tunnel) = (nodes[1].underlay[0], nodes[2].tunnel[0].addr());
    let around = IpNet::new(underlay, 24).unwrap().trunc();
    let sentence = format!(
        "policy p selects addresses of nodes ({around}, {underlay}, {tunnel}): packets that a node \
         or a pod in its network namespace sends are not steered, and keep that source"
    );
    let eip = v4("198.51.100.7");
    let of = |sources: Vec<IpNet>| {
        EgressPolicy::new(PolicyId::new("p").unwrap(), sources, eip).with_gateway(name("a"))
    };
    let mut selected: Vec<IpNet> = vec![underlay.into(), tunnel.into(), around];
    let pods =
        (0..100_u32).map(|number| IpNet::from(IpAddr::from((0x0af4_0100 + number).to_be_bytes())));
    // Fewer sources than nodes have addresses, and more.
    for pods in [Vec::new(), pods.collect()] {
        let mut all = selected.clone();
        all.extend(&pods);
        let findings = planned(&cluster, &[of(all)]).unwrap().findings;
        let expected: Vec<_> =
            findings.iter().filter(|one| one.code() == "sources_of_nodes").collect();
        assert_eq!(expected.len(), 1);
        assert_eq!(expected[0].to_string(), sentence);
        let pod = of([vec![net("10.244.0.0/16")], pods].concat());
        assert!(planned(&cluster, &[pod]).unwrap().findings.is_empty());
    }
    selected.sort_unstable();
    let mut egress = Reconciler::new(Sim::new());
    egress.reconcile(&cluster, [of(nets(&["10.244.1.1/32"]))]).unwrap();
    let id = PolicyId::new("p").unwrap();
    let added =
        Update::AddSources::<EgressPolicy> { policy: id.clone(), sources: vec![underlay.into()] };
    let finding = Finding::SourcesOfNodes { policy: id, sources: vec![underlay.into()] };
    assert!(egress.update([added]).unwrap().findings.contains(&finding));
}
