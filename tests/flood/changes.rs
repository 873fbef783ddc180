//! The kinds of changes; in each the flooding pods stay selected by policy `p`.

use std::net::IpAddr;
use std::time::Duration;

use common::backend::{replies, steering};
use common::fleet::{Result, dual, policy};
use egress_datapath::iptables::Iptables;
use egress_datapath::state::Variant;
use egress_datapath::testing::lab::{
    EIP_A, EIP_B, EIP_C, Lab, NODE_A, NODE_B_OUTSIDE, OTHER_SERVER, POD_A, POD_B, Pair, SERVER,
    hosts, net,
};
use egress_datapath::{
    Backend, Claim, Destinations, DeviceName, EgressIp, EgressPolicy, Mark, MarkLayout, Node,
    NodeName, PolicyId, Replies, Report, Steering,
};
use ipnet::IpNet;

use crate::change::{Change, Loss, Reads, Size, To};
use crate::growth::outgrown;
use crate::moves::{egress_ip, moved, moved_otherwise, moved_with_many};
use crate::nodes::Nodes;

const FULL: Size =
    Size { packets: 100_000, per_second: 4_000, commits: 5_000, at_most: Duration::from_secs(300) };
/// As many as a machine of two cores carries while it changes.
const A_MILLION: Size = Size { packets: 1_000_000, per_second: 20_000, ..FULL };
const USUAL: Change = Change {
    name: "",
    allowed: [&[EIP_B]; 2],
    marks: MarkLayout::SEED,
    to: To::Server,
    loss: Loss::None,
    in_full: FULL,
    idle: false,
    foreign: "",
    backends: false,
    caching: false,
    reads: Reads::Everything,
    round: |_, _, _| Ok(Vec::new()),
};
const EITHER: [&[Pair]; 2] = [&[EIP_B, EIP_C]; 2];
const ADDED: [&[Pair]; 2] = [&[EIP_A, EIP_B]; 2];
/// As a CNI plugin does it: a pod without policy has the node's address, and its own is a leak.
const MASQUERADE: &str = "table inet foreign { chain post {
    type nat hook postrouting priority 100
    ip saddr 10.244.0.0/16 ip daddr != 10.244.0.0/16 masquerade
    ip6 saddr fd44::/16 ip6 daddr != fd44::/16 masquerade
    }
}";
const PLAIN: [&[Pair]; 2] = [&[EIP_B, NODE_A], &[EIP_B, NODE_B_OUTSIDE]];
/// Other software sets a bit that is not ours yet.
const EARLY_BIT: &str = "table inet foreign { chain early {
    type filter hook prerouting priority -300
    meta mark set meta mark | 0x4000
    }
}";
/// The same after us, so that no mark that needs the bit is what we made it.
const LATE_BIT: &str = "table inet foreign { chain late {
    type filter hook prerouting priority -90
    meta mark set meta mark | 0x4000
    }
}";

/// Other software offloads connections of pods, whose nodes all have these devices.
const OFFLOAD: &str = "table inet foreign {
    flowtable f { hook ingress priority 0; devices = { eth0, pod10 }; }
    chain forward { type filter hook forward priority 10; meta l4proto udp flow add @f; }
}";
const OFFLOAD_AND_MASQUERADE: &str = "table inet foreign {
    flowtable f { hook ingress priority 0; devices = { eth0, pod10 }; }
    chain forward { type filter hook forward priority 10; meta l4proto udp flow add @f; }
    chain post {
        type nat hook postrouting priority 100
        ip saddr 10.244.0.0/16 ip daddr != 10.244.0.0/16 masquerade
        ip6 saddr fd44::/16 ip6 daddr != fd44::/16 masquerade
    }
}";
/// Other software copies the mark of the connection to its packets.
const RESTORE_AND_MASQUERADE: &str = "table inet foreign {
    chain restore { type filter hook prerouting priority -150; meta mark set ct mark; }
    chain post {
        type nat hook postrouting priority 100
        ip saddr 10.244.0.0/16 ip daddr != 10.244.0.0/16 masquerade
        ip6 saddr fd44::/16 ip6 daddr != fd44::/16 masquerade
    }
}";

const MOVE_OF_MANY: &str = "move of 100 000 sources";
pub(crate) const COUNTERS: &str = "counters";
/// Of one backend only.
pub(crate) const STEERING: &str = "steering";
pub(crate) const REPLIES: &str = "path of replies";

const EVERYBODY: &[&str] = &["node-c", "node-b", "node-a"];
pub(crate) const GATEWAY_FIRST: &[&str] = &["node-b", "node-a"];

pub(crate) const ALL: &[Change] = &[
    Change { name: "same again", idle: true, round: same, ..USUAL },
    Change { name: "restart", idle: true, round: restart, ..USUAL },
    Change { name: "members", round: members, ..USUAL },
    Change { name: "destinations", round: destinations, ..USUAL },
    Change { name: "destinations of another policy", round: destinations_of_another, ..USUAL },
    Change { name: "other policies", round: policies, ..USUAL },
    Change { name: "policies before it", round: before, ..USUAL },
    Change { name: "ranges of sources", round: ranges, ..USUAL },
    Change { name: "sets outgrown", round: outgrown, ..USUAL },
    Change { name: "source as address or prefix", round: address_or_prefix, ..USUAL },
    Change { name: "move, same egress IP", loss: Loss::Few, round: moved, ..USUAL },
    Change {
        name: MOVE_OF_MANY,
        in_full: A_MILLION,
        reads: Reads::Drift,
        round: moved_with_many,
        ..USUAL
    },
    Change {
        name: "move, other egress IP",
        loss: Loss::Few,
        allowed: EITHER,
        round: moved_otherwise,
        ..USUAL
    },
    Change {
        name: "move, marks without prefix",
        allowed: EITHER,
        marks: MarkLayout::COMPACT,
        loss: Loss::Few,
        round: moved_otherwise,
        ..USUAL
    },
    Change { name: "move of all there is", loss: Loss::Any, round: moved, ..USUAL },
    Change { name: "egress IP", allowed: EITHER, round: egress_ip, ..USUAL },
    Change { name: "egress IP that the gateway adds", allowed: ADDED, round: added, ..USUAL },
    Change { name: "gateways", round: gateways, ..USUAL },
    Change { name: STEERING, round: steerings, ..USUAL },
    Change { name: REPLIES, round: replies_change, ..USUAL },
    Change { name: "nodes", round: known, ..USUAL },
    Change { name: "marks among foreign bits", foreign: EARLY_BIT, round: marks, ..USUAL },
    Change {
        name: "marks that others write to",
        foreign: LATE_BIT,
        loss: Loss::Any,
        round: marks,
        ..USUAL
    },
    Change {
        name: "layout of the marks",
        foreign: MASQUERADE,
        loss: Loss::Any,
        round: layouts,
        ..USUAL
    },
    Change { name: "closed and open", loss: Loss::Any, round: closed, ..USUAL },
    Change {
        name: "excluded prefixes",
        allowed: [&[POD_A], &[POD_B]],
        to: To::PodC,
        round: excluded,
        ..USUAL
    },
    Change {
        name: "policy",
        allowed: PLAIN,
        foreign: MASQUERADE,
        loss: Loss::Few,
        round: comes,
        ..USUAL
    },
    Change {
        name: "policy, the only one",
        allowed: PLAIN,
        foreign: MASQUERADE,
        loss: Loss::Any,
        round: comes,
        ..USUAL
    },
    Change {
        name: "everything",
        allowed: PLAIN,
        foreign: MASQUERADE,
        loss: Loss::Any,
        round: everything,
        ..USUAL
    },
    Change { name: COUNTERS, round: counters, ..USUAL },
    Change { name: "cached: same again", idle: true, round: same, caching: true, ..USUAL },
    Change { name: "cached: restart", idle: true, round: restart, caching: true, ..USUAL },
    Change { name: "cached: members", round: members, caching: true, ..USUAL },
    Change { name: "cached: destinations", round: destinations, caching: true, ..USUAL },
    Change { name: "cached: policies before it", round: before, caching: true, ..USUAL },
    Change { name: "cached: gateways", round: gateways, caching: true, ..USUAL },
    Change {
        name: "cached: move, same egress IP",
        loss: Loss::OnGateway,
        round: moved,
        caching: true,
        ..USUAL
    },
    Change {
        name: "cached: move, other egress IP",
        loss: Loss::OnGateway,
        allowed: EITHER,
        round: moved_otherwise,
        caching: true,
        ..USUAL
    },
    Change {
        name: "cached: closed and open",
        loss: Loss::Any,
        round: closed,
        caching: true,
        ..USUAL
    },
    Change {
        name: "cached: policy",
        allowed: PLAIN,
        foreign: MASQUERADE,
        loss: Loss::Any,
        round: comes,
        caching: true,
        ..USUAL
    },
    Change {
        name: "cached: everything",
        allowed: PLAIN,
        foreign: MASQUERADE,
        loss: Loss::Any,
        round: everything,
        caching: true,
        ..USUAL
    },
    Change {
        name: "offloaded: move, same egress IP",
        foreign: OFFLOAD,
        loss: Loss::Any,
        round: moved,
        ..USUAL
    },
    Change {
        name: "offloaded: egress IP",
        foreign: OFFLOAD,
        allowed: EITHER,
        loss: Loss::Any,
        round: egress_ip,
        ..USUAL
    },
    Change {
        name: "offloaded: everything",
        allowed: PLAIN,
        foreign: OFFLOAD_AND_MASQUERADE,
        loss: Loss::Any,
        round: everything,
        ..USUAL
    },
    Change {
        name: "restored marks: move",
        allowed: EITHER,
        foreign: RESTORE_AND_MASQUERADE,
        loss: Loss::Any,
        round: moved_otherwise,
        ..USUAL
    },
    Change {
        name: "restored marks: everything",
        allowed: PLAIN,
        foreign: RESTORE_AND_MASQUERADE,
        loss: Loss::Any,
        round: everything,
        caching: true,
        ..USUAL
    },
    // The new one closes before it opens: on the gateway for the milliseconds that its maps take.
    Change { name: "backend", backends: true, loss: Loss::Any, round: backends, ..USUAL },
];

pub(crate) fn make(
    nodes: &mut Nodes,
    round: u64,
    order: &[&str],
    all: &[EgressPolicy],
) -> Result<Vec<Report>> {
    let order = if round == 0 { EVERYBODY } else { order };
    order.iter().map(|name| nodes.apply_to(name, all)).collect()
}

/// The policy of the flooding pods.
pub(crate) fn p() -> Result<EgressPolicy> {
    Ok(policy("p", &[POD_A, POD_B], Some("node-b"), dual(EIP_B))?)
}

/// Policies of pods that are not there, one for each gateway.
pub(crate) fn beside() -> Result<[EgressPolicy; 2]> {
    let stays = |id, gateway| policy(id, &pods(190, 2), Some(gateway), dual(EIP_B));
    Ok([stays("beside-b", "node-b")?, stays("beside-c", "node-c")?])
}

/// Pods that are not there.
pub(crate) fn pods(first: u64, count: u64) -> Vec<Pair> {
    let pod = |number: u64| {
        let last = 20 + u8::try_from(number % 200).unwrap_or_default();
        [
            IpAddr::from([10, 244, 1, last]),
            IpAddr::from([0xfd44, 1, 0, 0, 0, 0, 1, u16::from(last)]),
        ]
    };
    (first..first + count).map(pod).collect()
}

/// Prefixes around two addresses.
fn around(pair: Pair, lengths: [u8; 2]) -> Vec<IpNet> {
    pair.into_iter().zip(lengths).map(|(ip, length)| net(ip, length).trunc()).collect()
}

/// Lists that the server is in, and that look for it at different lengths.
fn lists(round: u64) -> Destinations {
    let server = hosts(&[SERVER]);
    let wide = around(SERVER, [24, 64]);
    let half = around(SERVER, [25, 65]);
    let other = around(OTHER_SERVER, [30, 126]);
    Destinations::Nets(match round % 6 {
        0 => return Destinations::External,
        1 => server,
        2 => wide,
        3 => [half, other].concat(),
        4 => around(SERVER, [0, 0]),
        _ => [server, wide].concat(),
    })
}

fn same(_: &Lab, nodes: &mut Nodes, round: u64) -> Result<Vec<Report>> {
    make(nodes, round, GATEWAY_FIRST, &[p()?])
}

fn restart(lab: &Lab, nodes: &mut Nodes, round: u64) -> Result<Vec<Report>> {
    nodes.restart(lab)?;
    make(nodes, round, GATEWAY_FIRST, &[p()?])
}

/// On and off.
fn counters(_: &Lab, nodes: &mut Nodes, round: u64) -> Result<Vec<Report>> {
    for name in EVERYBODY {
        nodes.node(name)?.0.policy_counters = round % 2 == 0;
    }
    make(nodes, round, GATEWAY_FIRST, &[p()?])
}

fn members(_: &Lab, nodes: &mut Nodes, round: u64) -> Result<Vec<Report>> {
    let mut p = p()?;
    p.sources.extend(hosts(&pods(round * 3, 5)));
    let other = policy("other", &pods(round * 5 + 100, 7), Some("node-c"), dual(EIP_C))?;
    make(nodes, round, GATEWAY_FIRST, &[p, other])
}

fn destinations(_: &Lab, nodes: &mut Nodes, round: u64) -> Result<Vec<Report>> {
    let p = p()?.with_destinations(lists(round));
    make(nodes, round, GATEWAY_FIRST, &[p])
}

fn destinations_of_another(_: &Lab, nodes: &mut Nodes, round: u64) -> Result<Vec<Report>> {
    let other = policy("other", &pods(0, 3), Some("node-c"), dual(EIP_C))?;
    let other = other.with_destinations(lists(round));
    make(nodes, round, GATEWAY_FIRST, &[p()?, other])
}

/// Other policies, some of them for the flooding pods too but for other destinations.
fn policies(_: &Lab, nodes: &mut Nodes, round: u64) -> Result<Vec<Report>> {
    let mut all = vec![p()?];
    for number in 0..round % 5 {
        let mut other = policy(
            &format!("other-{}", round / 5 + number),
            &pods(round + 10 * number, 3),
            Some(if number % 2 == 0 { "node-b" } else { "node-c" }),
            dual(if number % 2 == 0 { EIP_B } else { EIP_C }),
        )?;
        if number < 3 {
            other.priority = u32::try_from(number)?;
            other.sources.extend(hosts(&[POD_A, POD_B]));
            other.destinations =
                Destinations::Nets(around(OTHER_SERVER, [30 + u8::try_from(number)?, 126]));
        }
        all.push(other);
    }
    make(nodes, round, GATEWAY_FIRST, &all)
}

/// Policies that take the flood over and give it back, with the same egress IP.
fn before(_: &Lab, nodes: &mut Nodes, round: u64) -> Result<Vec<Report>> {
    let mut all = vec![p()?.with_priority(9)];
    for number in 0..round % 3 {
        let sources = [POD_A, POD_B];
        let other = policy(&format!("first-{number}"), &sources, Some("node-b"), dual(EIP_B))?;
        let destinations = lists(round + number);
        all.push(other.with_priority(u32::try_from(number)?).with_destinations(destinations));
    }
    make(nodes, round, GATEWAY_FIRST, &all)
}

/// Prefixes around the flooding pods that other policies cut in two.
fn ranges(_: &Lab, nodes: &mut Nodes, round: u64) -> Result<Vec<Report>> {
    let mut p = p()?;
    p.sources = [around(POD_A, [24, 64]), around(POD_B, [24, 64])].concat();
    let mut all = vec![p];
    if round % 4 > 0 {
        let mut other = policy("other", &[POD_A], Some("node-c"), dual(EIP_C))?;
        other.destinations = Destinations::Nets(hosts(&[OTHER_SERVER]));
        let length = 25 + u8::try_from(round % 4)?;
        other.sources = around(POD_A, [length, 96 + length]);
        other.sources.extend(around(POD_B, [length, 96 + length]));
        all.push(other);
    }
    make(nodes, round, GATEWAY_FIRST, &all)
}

fn address_or_prefix(_: &Lab, nodes: &mut Nodes, round: u64) -> Result<Vec<Report>> {
    let mut p = p()?;
    let (narrow, wide) = (hosts(&[POD_A, POD_B]), [[24, 64]; 2]);
    let wide = [POD_A, POD_B].into_iter().zip(wide).flat_map(|(pod, by)| around(pod, by));
    p.sources = match round % 3 {
        0 => narrow,
        1 => wide.collect(),
        _ => wide.chain(narrow.clone()).collect(),
    };
    make(nodes, round, GATEWAY_FIRST, &[p])
}

/// A node that is not there, by its number.
fn node(number: u64) -> Result<Node> {
    let last = 100 + u8::try_from(number)?;
    let low = u16::from(last);
    let underlay = [IpAddr::from([10, 10, 0, last]), IpAddr::from([0xfd10, 0, 0, 0, 0, 0, 0, low])];
    let tunnel = [IpAddr::from([172, 31, 0, last]), IpAddr::from([0xfd11, 0, 0, 0, 0, 0, 0, low])];
    let tunnel = tunnel.into_iter().zip([16, 112]).map(|(ip, length)| net(ip, length));
    Ok(Node::new(NodeName::new(format!("node-{number}"))?, underlay.to_vec(), tunnel.collect()))
}

/// Makes the first of the nodes that are not there known everywhere.
fn know(nodes: &mut Nodes, count: u64, mark: impl Fn(u64) -> Option<Mark>) -> Result {
    for name in EVERYBODY {
        let (cluster, _) = nodes.node(name)?;
        cluster.nodes.truncate(EVERYBODY.len());
        for number in 0..count {
            cluster.nodes.push(node(number)?.with_mark(mark(number)));
        }
    }
    Ok(())
}

/// A policy of other pods for each of the nodes that are not there.
fn by_nodes(count: u64) -> Result<Vec<EgressPolicy>> {
    let mut all = vec![p()?];
    for number in 0..count {
        let pods = pods(number, 1);
        all.push(
            EgressPolicy::new(PolicyId::new(format!("by-{number}"))?, hosts(&pods), EgressIp::Node)
                .with_gateway(node(number)?.name),
        );
    }
    Ok(all)
}

/// Zero to so many and back to zero.
const fn to_and_fro(round: u64, most: u64) -> u64 {
    let place = round % (2 * most);
    if place < most { place } else { 2 * most - place }
}

fn gateways(_: &Lab, nodes: &mut Nodes, round: u64) -> Result<Vec<Report>> {
    know(nodes, 40, |_| None)?;
    make(nodes, round, GATEWAY_FIRST, &by_nodes(to_and_fro(round, 40))?)
}

fn known(_: &Lab, nodes: &mut Nodes, round: u64) -> Result<Vec<Report>> {
    know(nodes, to_and_fro(round, 40), |_| None)?;
    make(nodes, round, GATEWAY_FIRST, &[p()?])
}

/// Gateways whose marks need the bits that other software sets, and so have them tested.
fn marks(_: &Lab, nodes: &mut Nodes, round: u64) -> Result<Vec<Report>> {
    let needs = [0x2600_4100, 0x2600_0900, 0x2600_c200];
    let mark = |number| usize::try_from(number).ok().and_then(|at| needs.get(at));
    know(nodes, 3, |number| mark(number).map(|mark| Mark::new(*mark)))?;
    make(nodes, round, GATEWAY_FIRST, &by_nodes(to_and_fro(round, 3))?)
}

/// Every node starts anew with the other layout, while the marks of the last one are about.
fn layouts(lab: &Lab, nodes: &mut Nodes, round: u64) -> Result<Vec<Report>> {
    for name in EVERYBODY {
        let marks = if round % 2 == 0 { MarkLayout::SEED } else { MarkLayout::COMPACT };
        let cluster = &mut nodes.node(name)?.0;
        (cluster.marks, cluster.steering) = (marks, steering(&marks));
        cluster.replies = replies(&marks, cluster.backend);
    }
    nodes.restart(lab)?;
    make(nodes, round, if round % 4 < 2 { GATEWAY_FIRST } else { &["node-a", "node-b"] }, &[p()?])
}

/// From tables to the egress hook and back.
fn steerings(_: &Lab, nodes: &mut Nodes, round: u64) -> Result<Vec<Report>> {
    for name in EVERYBODY {
        let by_hook = round % 2 == 0;
        nodes.node(name)?.0.steering =
            if by_hook { Steering::EgressHook } else { Steering::Tables };
    }
    make(nodes, round, if round % 4 < 2 { GATEWAY_FIRST } else { &["node-a", "node-b"] }, &[p()?])
}

/// From direct replies to replies by the tunnel and back, and not on all nodes at once.
fn replies_change(_: &Lab, nodes: &mut Nodes, round: u64) -> Result<Vec<Report>> {
    let mut reports = Vec::new();
    for (name, number) in EVERYBODY.iter().zip(0..) {
        let tunnel = (round + number) % 4 < 2;
        nodes.node(name)?.0.replies = if tunnel { Replies::Tunnel } else { Replies::Direct };
        reports.extend(make(nodes, round, &[name], &[p()?])?);
    }
    Ok(reports)
}

/// From an egress IP that the host has to one that the gateway adds, and back.
fn added(_: &Lab, nodes: &mut Nodes, round: u64) -> Result<Vec<Report>> {
    let device = DeviceName::new("eth1")?;
    for name in EVERYBODY {
        let claim = |address: IpAddr| Claim::new(address.into(), device.clone());
        nodes.node(name)?.0.claims = EIP_A.map(claim).to_vec();
    }
    let egress_ip = dual(if round % 2 == 0 { EIP_A } else { EIP_B });
    make(nodes, round, GATEWAY_FIRST, &[p()?.with_egress_ip(egress_ip)])
}

/// Prefixes that the packets' destination is always in, cut one way or another.
fn excluded(_: &Lab, nodes: &mut Nodes, round: u64) -> Result<Vec<Report>> {
    let texts: &[&str] = match round % 5 {
        0 => &["10.244.0.0/16", "fd44::/16"],
        1 => &["10.240.0.0/12", "fd40::/12"],
        2 => &["10.244.0.0/17", "10.244.128.0/17", "fd44::/17", "fd44:8000::/17"],
        3 => &["10.244.0.0/16", "10.96.0.0/12", "fd44::/16", "fd96::/16"],
        _ => &["10.0.0.0/8", "fd00::/8"],
    };
    for name in EVERYBODY {
        let excluded = texts.iter().map(|text| text.parse()).collect::<std::result::Result<_, _>>();
        nodes.node(name)?.0.excluded = excluded?;
    }
    make(nodes, round, GATEWAY_FIRST, &[p()?])
}

fn closed(_: &Lab, nodes: &mut Nodes, round: u64) -> Result<Vec<Report>> {
    let mut p = p()?;
    if round % 2 == 1 {
        p.gateway = None;
    }
    make(nodes, round, GATEWAY_FIRST, &[p])
}

fn comes(_: &Lab, nodes: &mut Nodes, round: u64) -> Result<Vec<Report>> {
    if round % 2 == 0 {
        make(nodes, round, GATEWAY_FIRST, &[p()?])
    } else {
        make(nodes, round, &["node-a", "node-b"], &[])
    }
}

/// Installs everything, and removes it again, every other time by a new process after a drain.
fn everything(lab: &Lab, nodes: &mut Nodes, round: u64) -> Result<Vec<Report>> {
    if round % 2 == 0 {
        return make(nodes, round, GATEWAY_FIRST, &[p()?]);
    }
    let clients_first = ["node-a", "node-b"];
    let mut reports = Vec::new();
    if round % 4 == 3 {
        nodes.restart(lab)?;
        for name in clients_first {
            reports.push(nodes.node(name)?.1.drain()?);
        }
    }
    for name in clients_first {
        reports.push(nodes.node(name)?.1.remove()?);
    }
    Ok(reports)
}

/// From one backend to the other, and between the variants of iptables.
fn backends(_: &Lab, nodes: &mut Nodes, round: u64) -> Result<Vec<Report>> {
    let iptables = |variant| Backend::Iptables(Iptables::new(variant));
    let backend = match round % 5 {
        0 | 2 => Backend::Nftables,
        1 | 4 => iptables(Variant::Legacy),
        _ => iptables(Variant::Nft),
    };
    for name in EVERYBODY {
        let cluster = &mut nodes.node(name)?.0;
        cluster.backend = backend;
        cluster.steering = match backend {
            Backend::Nftables => steering(&cluster.marks),
            _ => Steering::Tables,
        };
        cluster.replies = replies(&cluster.marks, backend);
    }
    make(nodes, round, GATEWAY_FIRST, &[p()?])
}
