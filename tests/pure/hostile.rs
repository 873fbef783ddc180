//! Clusters and policies that nobody means: planned or refused with an error, never with a panic,
//! and what is planned can be made from whatever was planned before.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use egress_datapath::alloc::{MarkPool, TablePool, TableRange};
use egress_datapath::{
    Changes, Cluster, Datapath, Destinations, DeviceName, EgressIp, EgressPolicy, MacAddr, Mark,
    MarkLayout, Node, NodeName, Plan, PlanError, PolicyId, Sim, State, Unavailable, plan,
};
use harness::mutate::{Random, anything};
use ipnet::IpNet;

use crate::{cluster, dual, policy, v4};

/// Addresses at the edges of what means something else.
const EDGES: [&str; 22] = [
    "0.0.0.0",
    "0.0.0.1",
    "10.10.0.11",
    "10.244.0.0",
    "10.244.1.2",
    "127.0.0.1",
    "169.254.169.254",
    "172.31.0.12",
    "198.51.100.0",
    "223.255.255.255",
    "224.0.0.1",
    "240.0.0.0",
    "255.255.255.255",
    "::",
    "::1",
    "::ffff:0.0.0.0",
    "::ffff:10.0.0.1",
    "fd44::",
    "fe80::1",
    "ff02::1",
    "2001:db8::1",
    "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
];

const NAMES: [&str; 8] = ["a", "b", "c", "d", "0", "-_./:@+=,~#%", "node-b", "A"];

fn address(random: &mut Random) -> IpAddr {
    match random.below(8) {
        0 => Ipv4Addr::from_bits(random.edge()).into(),
        1 => Ipv6Addr::from_bits(u128::from(random.any()) << 64 | u128::from(random.edge())).into(),
        2 => Ipv4Addr::from_bits(0x0af4_0000 | random.edge() & 0xff).into(),
        _ => random.pick(&EDGES).parse().unwrap(),
    }
}

fn net(random: &mut Random) -> IpNet {
    let address = address(random);
    let bits = if address.is_ipv4() { 32 } else { 128 };
    let length = match random.below(4) {
        0 => bits,
        1 => 0,
        _ => random.below(bits + 1),
    };
    let net = IpNet::new(address, u8::try_from(length).unwrap()).unwrap();
    if random.one_in(16) { net } else { net.trunc() }
}

fn nets(random: &mut Random) -> Vec<IpNet> {
    let count = if random.one_in(64) { 400 } else { 6 };
    let mut nets: Vec<IpNet> = (0..random.below(count)).map(|_| net(random)).collect();
    if random.one_in(4) {
        nets.extend(nets.clone());
    }
    nets
}

fn name(random: &mut Random) -> NodeName {
    match random.below(32) {
        0 => NodeName::new("n".repeat(253)).unwrap(),
        1 => NodeName::new(format!("n{}", random.edge())).unwrap(),
        2.. => NodeName::new(random.pick(&NAMES)).unwrap(),
    }
}

fn egress_ip(random: &mut Random) -> EgressIp {
    match (random.below(5), address(random), address(random)) {
        (0, ..) => EgressIp::Node,
        (1 | 2, IpAddr::V4(v4), _) => EgressIp::V4(v4),
        (1 | 2, IpAddr::V6(v6), _) => EgressIp::V6(v6),
        (3, IpAddr::V4(v4), IpAddr::V6(v6)) => EgressIp::Dual(v4, v6),
        _ => dual("192.0.2.3", "2001:db8:ffff::3"),
    }
}

fn any_policy(random: &mut Random, number: usize) -> EgressPolicy {
    let id = match random.below(32) {
        0 => "p0".to_owned(),
        1 => "p".repeat(317),
        _ => format!("p{number}"),
    };
    let gateway = if random.one_in(6) { None } else { Some(name(random)) };
    let mut sources = nets(random);
    sources.push(net(random));
    EgressPolicy::new(PolicyId::new(id).unwrap(), sources, egress_ip(random))
        .with_priority(random.edge())
        .with_destinations(match nets(random) {
            nets if random.one_in(2) => Destinations::Nets(nets),
            _ => Destinations::External,
        })
        .with_gateway(gateway.filter(|name| random.one_in(8) || "abc".contains(name.as_str())))
        .with_unavailable(if random.one_in(2) { Unavailable::Drop } else { Unavailable::Bypass })
}

fn device(random: &mut Random) -> DeviceName {
    let names = ["egress.vxlan", "e", "eth0", "0123456789abcde", "'$(x)`;&|"];
    DeviceName::new(random.pick(&names)).unwrap()
}

fn mac(random: &mut Random) -> MacAddr {
    MacAddr::new(std::array::from_fn(|_| random.byte()))
}

/// Changes one thing of a cluster, for the worse perhaps.
fn spoil(cluster: &mut Cluster, random: &mut Random) {
    let at = random.below(cluster.nodes.len());
    let Some(node) = cluster.nodes.get_mut(at) else { return };
    match random.below(18) {
        0 => node.underlay.push(address(random)),
        1 => node.underlay = vec![address(random)],
        2 => node.tunnel.push(net(random)),
        3 => node.tunnel = vec![net(random)],
        4 => node.name = name(random),
        5 => node.mac = Some(mac(random)),
        6 => node.mark = Some(Mark::new(random.edge())),
        7 => node.mark = cluster.marks.mark(u16::try_from(random.edge() >> 16).unwrap()),
        8 => cluster.node = name(random),
        9 => drop(cluster.nodes.remove(at)),
        10 => cluster.excluded.extend(nets(random)),
        11 => cluster.excluded = nets(random),
        12 => cluster.tunnel.vni = random.edge(),
        13 => cluster.tunnel.port = u16::try_from(random.edge() & 0xffff).unwrap(),
        14 => cluster.tunnel.underlay_mtu = random.edge(),
        15 => cluster.tunnel.device = device(random),
        16 => cluster.rule_priority = random.edge(),
        _ => {
            for number in 0..random.below(60) {
                let number = u8::try_from(number).unwrap();
                cluster.nodes.push(Node::new(
                    NodeName::new(format!("more-{number}")).unwrap(),
                    vec![[10, 11, 0, number].into(), address(random)],
                    vec![format!("172.31.1.{number}/16").parse().unwrap()],
                ));
            }
        }
    }
}

#[derive(Debug)]
struct World {
    cluster: Cluster,
    policies: Vec<EgressPolicy>,
    tables: TableRange,
    /// Which of the pools, perhaps of another layout.
    pool: usize,
}

fn world(random: &mut Random, layouts: &[MarkLayout]) -> World {
    let mut cluster = cluster("a");
    let pool = random.below(layouts.len());
    cluster.marks = layouts[if random.one_in(16) { 0 } else { pool }];
    for _ in 0..random.below(3) {
        spoil(&mut cluster, random);
    }
    let mut policies: Vec<_> =
        (0..random.below(6)).map(|number| any_policy(random, number)).collect();
    policies.push(policy("good", &["10.244.1.0/24"], Some("b"), v4("192.0.2.1")));
    let tables = TableRange::new(random.edge(), random.edge()).unwrap_or_default();
    World { cluster, policies, tables, pool }
}

/// Layouts of every kind that is accepted.
fn layouts() -> Vec<MarkLayout> {
    let mut random = Random::new(0);
    let any = std::iter::from_fn(|| {
        let (prefix, mask) = (random.edge(), random.edge());
        let layout = MarkLayout::new(prefix & mask, mask, random.byte() & 31, random.byte() & 31);
        Some(layout.ok().map(|layout| layout.with_avoid(random.edge())))
    });
    let fixed = [MarkLayout::SEED, MarkLayout::COMPACT, MarkLayout::COMPACT6];
    fixed.into_iter().chain(any.take(100_000).flatten().take(13)).collect()
}

fn planned(world: &World, pools: &[MarkPool]) -> Result<Plan, PlanError> {
    let mut tables = TablePool::new(world.tables).with_start(u32::MAX);
    plan(&world.cluster, &world.policies, &mut pools[world.pool].clone(), &mut tables)
}

#[test]
fn mutated_clusters_and_policies() {
    let layouts = layouts();
    assert_eq!(layouts.len(), 16);
    let pools: Vec<MarkPool> = layouts.iter().map(|layout| MarkPool::new(*layout)).collect();
    let some = |random: &mut Random| {
        let count = if random.one_in(4) { 2 } else { 1 };
        (0..count).map(|_| world(random, &layouts)).collect::<Vec<_>>()
    };
    anything("clusters and policies", some, |worlds| {
        let mut kernel = Sim::new();
        let mut accepted = false;
        for world in worlds {
            match planned(world, &pools) {
                Ok(Plan { state, findings, .. }) => {
                    accepted = true;
                    become_(&mut kernel, &state);
                    assert!(findings.iter().all(|finding| !finding.to_string().is_empty()));
                }
                Err(error) => assert!(!error.to_string().is_empty()),
            }
        }
        become_(&mut kernel, &State::default());
        accepted
    });
}

#[track_caller]
fn become_(kernel: &mut Sim, wanted: &State) {
    let changes = Changes::between(kernel.state(), wanted);
    if let Err(error) = kernel.apply(&changes) {
        panic!("{error}");
    }
    assert_eq!(kernel.state(), wanted);
    assert!(Changes::between(kernel.state(), wanted).is_empty());
}

/// So many prefixes of this length, one after another.
fn row(count: u32, first: u32, length: u8) -> Vec<IpNet> {
    let step = 1_u32 << (32 - length);
    let address = |number: u32| Ipv4Addr::from_bits(first + number * step);
    (0..count).map(|number| IpNet::new(address(number).into(), length).unwrap()).collect()
}

fn shared(count: u32, sources: &[IpNet], destinations: &Destinations) -> Vec<EgressPolicy> {
    let one = |number: u32| {
        EgressPolicy::new(
            PolicyId::new(format!("p{number}")).unwrap(),
            sources.to_vec(),
            v4("192.0.2.1"),
        )
        .with_priority(number)
        .with_gateway(crate::name("b"))
        .with_destinations(destinations.clone())
    };
    (0..count).map(one).collect()
}

/// How long this thread has had a processor, where the kernel tells: other programs do not count.
fn busy() -> Duration {
    let told = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    let nanoseconds = told.split_whitespace().next().and_then(|number| number.parse().ok());
    Duration::from_nanos(nanoseconds.unwrap_or_default())
}

#[test]
fn huge_lists_planned_in_bounded_time() {
    let external = Destinations::External;
    let listed = Destinations::Nets(row(2000, 0xc000_0000, 32));
    let hosts = row(300, 0x0af4_0100, 32);
    let everyone = [crate::net("0.0.0.0/0")];
    let mut around = shared(300, &everyone, &external);
    around.extend(shared(301, &row(1000, 0x0af4_0000, 30), &external).pop());
    let twice = [row(20_000, 0x0af4_0000, 32), row(20_000, 0x0af4_0000, 32)].concat();
    for (what, policies) in [
        ("300 policies of the same 300 sources", shared(300, &hosts, &external)),
        (
            "100 policies of the same 300 sources and 2000 destinations",
            shared(100, &hosts, &listed),
        ),
        ("20000 sources, each twice", shared(1, &twice, &external)),
        ("300 policies of everything around 1000 prefixes", around),
    ] {
        let begin = busy();
        let plan = crate::planned(&cluster("a"), &policies).unwrap();
        let elements = plan.state.firewall.as_ref().unwrap().elements.len();
        let took = busy().saturating_sub(begin);
        note!("{what}: {elements} elements, {} findings, {took:?}", plan.findings.len());
        assert!(took < Duration::from_secs(10), "{what}: {took:?}");
        become_(&mut Sim::new(), &plan.state);
    }
}
