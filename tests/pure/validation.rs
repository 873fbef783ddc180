//! Bad input: which error it gives, and the sentence.

use egress_datapath::state::Variant;
use egress_datapath::{
    Backend, Cluster, Destinations, DeviceName, EgressIp, EgressPolicy, Iptables, LayoutError,
    MacAddr, Mark, MarkLayout, MarkPool, NameError, Node, NodeName, PlanError, PolicyError,
    PolicyId, TablePool, TableRange, plan,
};

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

fn of_node(change: impl FnOnce(&mut Node)) -> Result<(), PlanError> {
    of_cluster(|cluster| change(&mut cluster.nodes[1]))
}

fn of_policy(change: impl FnOnce(&mut EgressPolicy)) -> Result<(), PolicyError> {
    let mut policy = good();
    change(&mut policy);
    planned(&cluster("a"), [policy]).map(drop).map_err(|error| {
        let sentence = error.to_string();
        match error {
            PlanError::Policy { policy, source } => {
                assert_eq!(sentence, format!("policy {policy}: {source}"));
                source
            }
            other => panic!("{other}"),
        }
    })
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
        let to = |id: &str, source: &str, gateway| {
            policy(id, &[source], Some(gateway), v4("198.51.100.200"))
        };
        [to("shop/b", "10.244.1.1/32", "b"), to("shop/c", "10.244.1.2/32", "c")]
    };
    let plan = |cluster: &Cluster| {
        let mut tables = TablePool::new(TableRange::new(3000, 0).unwrap());
        plan(cluster, policies(), &mut MarkPool::new(cluster.marks), &mut tables)
    };
    let mut cluster = cluster("a");
    assert!(matches!(plan(&cluster), Err(PlanError::Table(_))));
    cluster.steering = egress_datapath::Steering::EgressHook;
    let planned = plan(&cluster).unwrap();
    let tables: Vec<_> = planned.gateways.values().map(|(_, table)| table.get()).collect();
    assert_eq!(tables, [3000, 3000]);
    assert!(planned.findings.is_empty());
}

#[test]
fn invalid_nodes_refused() {
    use PlanError as E;
    of_cluster(|_| {}).unwrap();
    refused!(
        of_cluster(|cluster| cluster.node = name("z")),
        E::UnknownNode { .. },
        "node z is not in the cluster's list of nodes"
    );
    refused!(
        of_node(|node| node.name = name("c")),
        E::DuplicateNode { .. },
        "node c is listed twice"
    );
    for address in ["224.0.0.1", "0.0.0.0", "127.0.0.1", "169.254.1.1", "255.255.255.255"] {
        refused!(
            of_node(|node| node.underlay[0] = address.parse().unwrap()),
            E::NodeAddress { .. },
            format!("node b cannot have address {address}: it is not a unicast address").as_str()
        );
    }
    for address in ["ff02::1", "::", "::1", "fe80::1"] {
        refused!(
            of_node(|node| node.tunnel[1] = net(&format!("{address}/64"))),
            E::NodeAddress { .. },
            format!("node b cannot have address {address}: it is not a unicast address").as_str()
        );
    }
    refused!(
        of_node(|node| node.underlay[1] = "::ffff:10.10.0.12".parse().unwrap()),
        E::NodeMapped { .. },
        "node b has address ::ffff:10.10.0.12: write IPv4 addresses as IPv4"
    );
    refused!(
        of_node(|node| node.underlay.push("10.10.0.99".parse().unwrap())),
        E::NodeFamily { .. },
        "node b has more than one IPv4 underlay or tunnel address"
    );
    refused!(
        of_cluster(|cluster| cluster.nodes[0].underlay.clear()),
        E::NoUnderlay { .. },
        "node a has no underlay address"
    );
    refused!(
        of_node(|node| node.underlay.truncate(0)),
        E::UnderlayFamily { .. },
        "node b has no IPv4 underlay address, which the tunnel of this node uses"
    );
    refused!(
        of_node(|node| node.tunnel.clear()),
        E::NoTunnel { .. },
        "node b has no tunnel address"
    );
    refused!(
        of_node(|node| node.mac = Some(MacAddr::new([1, 0, 0x5e, 0, 0, 1]))),
        E::Mac { .. },
        "node b cannot have Ethernet address 01:00:5e:00:00:01: it is zero or a group address"
    );
    refused!(
        of_node(|node| node.mark = Some(Mark::new(0x2700_0000))),
        E::ForeignMark { .. },
        "node b cannot have mark 0x27000000: the layout has no such gateway mark"
    );
    refused!(
        of_node(|node| node.underlay[0] = "10.10.0.13".parse().unwrap()),
        E::Shared { .. },
        "nodes b and c both have 10.10.0.13"
    );
    let mac = MacAddr::new([2, 0, 0, 0, 0, 1]);
    refused!(
        of_cluster(|cluster| cluster.nodes[..2].iter_mut().for_each(|n| n.mac = Some(mac))),
        E::Shared { .. },
        "nodes a and b both have 02:00:00:00:00:01"
    );
    let mark = MarkLayout::SEED.mark(1);
    refused!(
        of_cluster(|cluster| cluster.nodes[1..].iter_mut().for_each(|n| n.mark = mark)),
        E::Shared { .. },
        "nodes b and c both have 0x26000100"
    );
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
    for priority in [0, 32_763] {
        refused!(
            of_cluster(|cluster| cluster.rule_priority = priority),
            E::RulePriority { .. },
            format!("rule priority {priority} is not between 1 and 32762").as_str()
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
        of_cluster(|cluster| cluster.excluded[0] = net("10.244.1.0/16")),
        E::Excluded { .. },
        "excluded prefixes: 10.244.1.0/16 has host bits set; 10.244.0.0/16 may be meant"
    );
    refused!(
        planned(&cluster("a"), [good(), good()]),
        E::DuplicatePolicy { .. },
        "policy shop/checkout is given twice"
    );
}

#[test]
fn invalid_policies_refused() {
    use PolicyError as E;
    of_policy(|_| {}).unwrap();
    refused!(
        of_policy(|policy| policy.sources = nets(&["10.244.1.10/24"])),
        E::HostBits { .. },
        "10.244.1.10/24 has host bits set; 10.244.1.0/24 may be meant"
    );
    refused!(
        of_policy(|policy| {
            policy.destinations = Destinations::Nets(nets(&["2001:db8::1/64"]));
        }),
        E::HostBits { .. },
        "2001:db8::1/64 has host bits set; 2001:db8::/64 may be meant"
    );
    refused!(
        of_policy(|policy| policy.sources = nets(&["::ffff:10.244.1.10/128"])),
        E::Mapped { .. },
        "::ffff:10.244.1.10/128 is an IPv4-mapped IPv6 prefix; write IPv4 prefixes as IPv4"
    );
    refused!(
        of_policy(|policy| policy.sources.clear()),
        E::NoSources,
        "sources are empty; a policy needs at least one"
    );
    refused!(
        of_policy(|policy| policy.destinations = Destinations::Nets(Vec::new())),
        E::NoDestinations,
        "destinations are an empty list; say external, or name a prefix"
    );
    refused!(
        of_policy(|policy| policy.gateway = Some(name("z"))),
        E::UnknownGateway { .. },
        "gateway z is not a node of the cluster"
    );
    for address in ["0.0.0.0", "127.0.0.1", "224.0.0.1", "240.0.0.1", "169.254.0.1"] {
        refused!(
            of_policy(|policy| policy.egress_ip = v4(address)),
            E::EgressIpNotUnicast { .. },
            format!("egress IP {address} is not a unicast address that can leave the link")
                .as_str()
        );
    }
    for address in ["::", "::1", "ff02::1", "fe80::1", "::ffff:1.2.3.4"] {
        refused!(
            of_policy(|policy| policy.egress_ip = EgressIp::V6(address.parse().unwrap())),
            E::EgressIpNotUnicast { .. },
            format!("egress IP {address} is not a unicast address that can leave the link")
                .as_str()
        );
    }
    refused!(
        of_policy(|policy| policy.egress_ip = dual("198.51.100.200", "fd44::7")),
        E::EgressIpExcluded { .. },
        "egress IP fd44::7 lies in the excluded prefix fd44::/16"
    );
    refused!(
        of_policy(|policy| policy.egress_ip = v4("10.10.0.12")),
        E::EgressIpOfNode { .. },
        "egress IP 10.10.0.12 is an address of node b; ask for the node's own instead"
    );
}

#[test]
fn exhausted_allocator_refused() {
    let cluster = cluster("a");
    let policies = [good(), policy("shop/other", &["10.244.1.11/32"], Some("c"), EgressIp::Node)];
    let mut tables = TablePool::new(TableRange::new(3000, 0).unwrap());
    let mut marks = MarkPool::new(cluster.marks);
    refused!(
        plan(&cluster, &policies, &mut marks, &mut tables),
        PlanError::Table(_),
        "routing tables: none of 1 ids is free for node c"
    );
    let mut few = cluster.clone();
    few.marks = MarkLayout::new(0, 0, 16, 2).unwrap();
    let (mut marks, mut tables) = (MarkPool::new(few.marks), TablePool::default());
    refused!(
        plan(&few, &policies, &mut marks, &mut tables),
        PlanError::Mark(_),
        "marks: none of 1 ids is free for node c"
    );
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
fn invalid_names_refused() {
    use NameError as E;
    refused!(NodeName::new(""), E::Empty { .. }, "a node name cannot be empty");
    refused!(
        PolicyId::new("p".repeat(254)),
        E::TooLong { .. },
        "a policy id has at most 253 bytes, this one has 254"
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
