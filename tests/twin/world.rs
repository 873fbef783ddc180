//! Random policies and clusters, out of few addresses, so that they meet.

use std::net::IpAddr;
use std::sync::OnceLock;

use common::suited;
use egress_datapath::alloc::{MarkPool, TablePool, TableRange};
use egress_datapath::datapath::observe;
use egress_datapath::testing::lab::{self, Netns, Pair};
use egress_datapath::{
    Cluster, Destinations, EgressIp, EgressPolicy, KernelDatapath, MacAddr, MarkLayout, NodeName,
    PolicyId, Sim, State, Unavailable, plan,
};
use ipnet::IpNet;

use crate::random::Random;

const SOURCES: [&str; 14] = [
    "10.244.1.10/32",
    "10.244.1.11/32",
    "10.244.2.10/32",
    "10.244.3.10/32",
    "10.244.1.10/31",
    "10.244.1.0/24",
    "10.244.0.0/16",
    "fd44:1::10/128",
    "fd44:1::11/128",
    "fd44:2::10/128",
    "fd44:3::10/128",
    "fd44:1::10/127",
    "fd44:1::/64",
    "fd44::/16",
];

const DESTINATIONS: [&str; 12] = [
    "0.0.0.0/0",
    "198.51.100.0/24",
    "198.51.100.0/27",
    "198.51.100.10/32",
    "198.51.100.20/31",
    "203.0.113.0/25",
    "::/0",
    "2001:db8:51::/64",
    "2001:db8:51::10/128",
    "2001:db8:51::20/127",
    "2001:db8::/32",
    "2001:db8:113::/48",
];

/// Egress IPs, by the node that answers for them.
pub(crate) const EIPS: [Pair; 3] = [lab::EIP_A, lab::EIP_B, lab::EIP_C];

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

fn some(random: &mut Random, from: &[&str], most: usize) -> Vec<IpNet> {
    (0..=random.below(most)).map(|_| net(random.of(from))).collect()
}

/// So many policies at most.
pub(crate) fn policies(random: &mut Random, most: usize) -> Vec<EgressPolicy> {
    (0..random.below(most + 1)).map(|number| policy(random, number)).collect()
}

/// The policy of this number.
pub(crate) fn policy(random: &mut Random, number: usize) -> EgressPolicy {
    let gateway = random.below(7);
    let [IpAddr::V4(v4), IpAddr::V6(v6)] = EIPS[gateway % 3] else { unreachable!() };
    let egress_ip = match random.below(6) {
        0 => EgressIp::V4(v4),
        1 => EgressIp::V6(v6),
        2 => EgressIp::Node,
        _ => EgressIp::Dual(v4, v6),
    };
    let name = |name: &&str| NodeName::new(name).unwrap();
    let priority = u32::try_from(random.below(3)).unwrap();
    let destinations = if random.once_in(3) {
        Destinations::External
    } else {
        Destinations::Nets(some(random, &DESTINATIONS, 3))
    };
    let unavailable = random.of(&[Unavailable::Drop, Unavailable::Drop, Unavailable::Bypass]);
    let id = PolicyId::new(format!("p{number}")).unwrap();
    EgressPolicy::new(id, some(random, &SOURCES, 4), egress_ip)
        .with_priority(priority)
        .with_destinations(destinations)
        .with_gateway((gateway < 6).then(|| name(&["node-a", "node-b", "node-c"][gateway % 3])))
        .with_unavailable(unavailable)
}

/// A cluster as one of its nodes sees it, no two alike.
pub(crate) fn cluster(random: &mut Random, of: &str) -> Cluster {
    let mut cluster = lab::cluster(of).unwrap();
    cluster.marks = random.of(&[MarkLayout::SEED, MarkLayout::COMPACT]);
    cluster.connection_caching = random.once_in(2);
    cluster.policy_counters = !cluster.connection_caching && random.once_in(2);
    cluster.tunnel.port = random.of(&[7789, 7789, 7790]);
    cluster.tunnel.vni = random.of(&[100, 100, 101]);
    cluster.tunnel.underlay_mtu = random.of(&[1500, 1400]);
    cluster.rule_priority = random.of(&[101, 102]);
    if random.once_in(3) {
        cluster.excluded.push(net("203.0.113.0/26"));
    }
    for node in &mut cluster.nodes {
        if random.once_in(4) {
            let last = u8::try_from(random.below(2)).unwrap();
            node.mac = Some(MacAddr::new([2, 0, 0, 0, node.name.as_str().as_bytes()[5], last]));
        }
        if random.once_in(6) {
            node.tunnel.retain(|net| net.addr().is_ipv4());
        }
    }
    cluster
}

/// What a node should hold for some policies.
pub(crate) fn planned(cluster: &Cluster, policies: &[EgressPolicy]) -> State {
    let mut tables = TablePool::new(TableRange::default()).with_start(0);
    let plan = plan(cluster, policies, &mut MarkPool::new(cluster.marks), &mut tables).unwrap();
    let mut found = State::default();
    found.missing.flowtables = !has_flowtables();
    suited(plan.state, &found)
}

/// A simulated kernel that has flowtables if the kernel has them.
pub(crate) fn sim() -> Sim {
    let mut sim = Sim::new();
    sim.set_flowtables(has_flowtables());
    sim
}

/// Whether the kernel has flowtables; true if it cannot be asked.
fn has_flowtables() -> bool {
    static HAS: OnceLock<bool> = OnceLock::new();
    *HAS.get_or_init(|| {
        let asked = Netns::new().and_then(|netns| netns.run(KernelDatapath::open));
        let state =
            asked.ok().and_then(Result::ok).and_then(|mut kernel| observe(&mut kernel).ok());
        state.is_none_or(|state| !state.missing.flowtables)
    })
}
