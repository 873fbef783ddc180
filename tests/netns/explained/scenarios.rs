//! The scenarios: basics (A), marks (B), filters (C), what closes (D), egress IPs (F), other
//! software (G), abuse (I).

use std::net::IpAddr;

use common::fleet::{dual, policy};
use egress_datapath::testing::lab::{
    EIP_A, EIP_B, EIP_C, Echo, Netns, OTHER_SERVER, POD_A, POD_B, POD_C, Preference, SERVER,
    STRANGER, hosts, net,
};
use egress_datapath::{Destinations, EgressIp, EgressPolicy, Mark};
use ipnet::IpNet;

use super::special::{inbound, injected, invalid, scanned};
use super::{Fleet, Pair, Result, World, nft, tool};

/// A situation, and packets in it.
pub(super) struct Scenario {
    pub(super) id: &'static str,
    pub(super) what: &'static str,
    pub(super) run: fn(&mut World<'_>) -> Result,
}

const B: Option<&str> = Some("node-b");
const C: Option<&str> = Some("node-c");

/// The policy of most scenarios.
pub(super) fn by_b() -> Result<EgressPolicy> {
    Ok(policy("p", &[POD_A, POD_B], B, dual(EIP_B))?)
}

fn pair(v4: &str, v6: &str) -> Result<Pair> {
    Ok([v4.parse()?, v6.parse()?])
}

pub(super) const SCENARIOS: &[Scenario] = &[
    Scenario {
        id: "A01",
        what: "a pod to outside, and A02 by IPv6",
        run: |world| {
            world.apply(&[by_b()?])?;
            world.send(POD_A, SERVER)
        },
    },
    Scenario {
        id: "A",
        what: "a pod that is not selected",
        run: |world| {
            world.apply(&[by_b()?])?;
            world.send(STRANGER, SERVER)
        },
    },
    Scenario {
        id: "A",
        what: "selected pods to other pods",
        run: |world| {
            world.apply(&[by_b()?])?;
            world.send(POD_A, POD_C)?;
            world.send(POD_B, POD_A)
        },
    },
    Scenario {
        id: "A",
        what: "a list of destinations",
        run: |world| {
            let mut policy = by_b()?;
            policy.destinations = Destinations::Nets(hosts(&[OTHER_SERVER]));
            world.apply(&[policy])?;
            world.send(POD_A, OTHER_SERVER)?;
            world.send(POD_A, SERVER)
        },
    },
    Scenario {
        id: "A09",
        what: "a pod on the gateway",
        run: |world| {
            world.apply(&[by_b()?])?;
            world.send(POD_B, SERVER)
        },
    },
    Scenario {
        id: "A",
        what: "a gateway that is a client elsewhere",
        run: |world| {
            world.apply(&[
                policy("by-b", &[POD_A, POD_C], B, dual(EIP_B))?,
                policy("by-c", &[POD_B], C, dual(EIP_C))?,
            ])?;
            world.send(POD_A, SERVER)?;
            world.send(POD_B, SERVER)?;
            world.send(POD_C, SERVER)
        },
    },
    Scenario {
        id: "A",
        what: "the gateway's own address",
        run: |world| {
            world.apply(&[policy("p", &[POD_A, POD_B], B, EgressIp::Node)?])?;
            world.send(POD_A, SERVER)?;
            world.send(POD_B, SERVER)
        },
    },
    Scenario { id: "A12", what: "a selected pod answers who calls it from outside", run: inbound },
    Scenario {
        id: "A13",
        what: "a pod in two policies, and A14 on a gateway",
        run: |world| {
            let mut specific = policy("specific", &[POD_A, POD_B], C, dual(EIP_C))?;
            specific.destinations = Destinations::Nets(hosts(&[OTHER_SERVER]));
            let rest = by_b()?.with_priority(1);
            world.apply(&[rest, specific])?;
            for pod in [POD_A, POD_B] {
                world.send(pod, OTHER_SERVER)?;
                world.send(pod, SERVER)?;
            }
            Ok(())
        },
    },
    Scenario {
        id: "A15",
        what: "destinations of length zero",
        run: |world| {
            let nets = SERVER.map(|ip| net(ip, 0).trunc()).to_vec();
            world.apply(&[by_b()?.with_destinations(Destinations::Nets(nets))])?;
            world.send(POD_A, SERVER)?;
            world.send(POD_A, POD_C)
        },
    },
    Scenario {
        id: "B01",
        what: "a mark of value 0, and B02 of value 1",
        run: |world| {
            world.fleet = Fleet::with(world.lab, |cluster| {
                for (node, mark) in cluster.nodes.iter_mut().skip(1).zip([0x2600_0000, 0x2600_0100])
                {
                    node.mark = Some(Mark::new(mark));
                }
            })?;
            world.apply(&[by_b()?, policy("q", &[STRANGER], C, dual(EIP_C))?])?;
            world.send(POD_A, SERVER)?;
            world.send(STRANGER, SERVER)
        },
    },
    Scenario {
        id: "B03",
        what: "another program's bit ahead of ours, and B04 behind it",
        run: |world| {
            let rules = "table inet foreign {
            chain early {
                type filter hook prerouting priority -300;
                meta mark set meta mark | 0x40
            }
            chain late {
                type filter hook prerouting priority -90;
                meta mark set meta mark | 0x4000
            }
        }";
            world.apply(&[by_b()?])?;
            nft(&world.lab.node_a.netns, &[], rules)?;
            nft(&world.lab.node_b.netns, &[], rules)?;
            world.send(POD_A, SERVER)
        },
    },
    Scenario {
        id: "B09",
        what: "AWS-CNI's rule for its own mark",
        run: |world| {
            rules(world, &["pref 1024 fwmark 0x80/0x80 lookup main"])?;
            world.apply(&[by_b()?])?;
            world.send(POD_A, SERVER)
        },
    },
    Scenario {
        id: "B10",
        what: "local addresses looked up at 100, and one of a node",
        run: |world| {
            let at_node: [IpAddr; 1] = ["169.254.20.10".parse()?];
            rules(world, &["pref 100 lookup local"])?;
            let node = &world.lab.node_a.netns;
            for family in ["-4", "-6"] {
                tool(node, &format!("ip {family} rule del pref 0"))?;
            }
            node.link(|link| link.address(10, at_node[0].into(), Preference::Deprecated))?;
            let _service = Echo::start(node, &at_node)?;
            world.apply(&[by_b()?])?;
            world.send_by_way_of(POD_A, &at_node, &at_node)?;
            world.send(POD_A, SERVER)
        },
    },
    Scenario {
        id: "B11",
        what: "Calico's WireGuard rule ahead of ours",
        run: |world| {
            rules(world, &["pref 99 not fwmark 0x200000/0x200000 lookup 1"])?;
            world.apply(&[by_b()?])?;
            world.send(POD_A, SERVER)
        },
    },
    Scenario {
        id: "C01",
        what: "strict filtering on the tunnel device",
        run: |world| {
            world.apply(&[by_b()?])?;
            let strict = [("ipv4/conf/egress.vxlan/rp_filter", "1")];
            world.lab.node_b.netns.sysctl(&strict)?;
            world.send(POD_A, SERVER)
        },
    },
    Scenario {
        id: "C03",
        what: "strict filtering on all others",
        run: |world| {
            for host in world.lab.nodes() {
                let strict = [("ipv4/conf/all/rp_filter", "1"), ("ipv4/conf/eth0/rp_filter", "1")];
                host.netns.sysctl(&strict)?;
            }
            world.apply(&[by_b()?])?;
            world.send(POD_A, SERVER)?;
            world.send(POD_B, SERVER)
        },
    },
    Scenario {
        id: "C04",
        what: "marks that the kernel looks back with",
        run: |world| {
            let settings =
                [("ipv4/conf/all/rp_filter", "1"), ("ipv4/conf/all/src_valid_mark", "1")];
            world.lab.node_a.netns.sysctl(&settings)?;
            world.apply(&[by_b()?])?;
            world.send(POD_A, SERVER)
        },
    },
    Scenario {
        id: "D01",
        what: "the tunnel device is down",
        run: |world| spoilt(world, &["ip link set egress.vxlan down"]),
    },
    Scenario {
        id: "D02",
        what: "the gateways' rules are lost",
        run: |world| spoilt(world, &["ip -4 rule del pref 102", "ip -6 rule del pref 102"]),
    },
    Scenario {
        id: "D",
        what: "all rules are lost",
        run: |world| spoilt(world, &["ip -4 rule flush proto 69", "ip -6 rule flush proto 69"]),
    },
    Scenario {
        id: "D03",
        what: "the tables are emptied",
        run: |world| {
            let flush = "route flush table all proto 69";
            spoilt(world, &[&format!("ip -4 {flush}"), &format!("ip -6 {flush}")])
        },
    },
    Scenario {
        id: "D",
        what: "the neighbours are lost",
        run: |world| spoilt(world, &["ip neigh flush all dev egress.vxlan nud permanent"]),
    },
    Scenario {
        id: "D04",
        what: "a gateway that does not know the policy",
        run: |world| {
            world.fleet.apply_to("node-b", &[])?;
            world.fleet.apply_to("node-a", &[by_b()?])?;
            world.send(POD_A, SERVER)
        },
    },
    Scenario {
        id: "D05",
        what: "a policy without a gateway",
        run: |world| {
            world.apply(&[policy("p", &[POD_A, POD_B], None, dual(EIP_B))?])?;
            world.send(POD_A, SERVER)?;
            world.send(POD_B, SERVER)?;
            world.send(POD_A, POD_B)
        },
    },
    Scenario {
        id: "D",
        what: "a policy without an egress IP of one family",
        run: |world| {
            let IpAddr::V4(v4) = EIP_B[0] else { return Err("no IPv4".into()) };
            world.apply(&[policy("p", &[POD_A, POD_B], B, EgressIp::V4(v4))?])?;
            world.send(POD_A, SERVER)?;
            world.send(POD_B, SERVER)
        },
    },
    Scenario { id: "D06", what: "an invalid segment of a selected pod", run: invalid },
    Scenario {
        id: "D09",
        what: "two nodes disagree about the gateway",
        run: |world| {
            let by_c = [policy("p", &[POD_A], C, dual(EIP_C))?];
            world.fleet.apply_to("node-c", &[by_b()?])?;
            world.fleet.apply_to("node-b", &by_c)?;
            world.fleet.apply_to("node-a", &[by_b()?])?;
            world.send(POD_A, SERVER)
        },
    },
    Scenario {
        id: "F01",
        what: "an egress IP that nobody answers for",
        run: |world| {
            world.apply(&[policy("p", &[POD_A], B, dual(EIP_A))?])?;
            world.send(POD_A, SERVER)
        },
    },
    Scenario {
        id: "G01",
        what: "the CNI plugin masquerades first, and G02 on the gateway",
        run: |world| {
            // In the table that iptables uses, at the priority that it uses, and later than ours.
            world.apply(&[by_b()?])?;
            for host in [&world.lab.node_a, &world.lab.node_b] {
                masquerade_by(&host.netns, "iptables-nft")?;
            }
            world.send(POD_A, SERVER)?;
            world.send(POD_B, SERVER)
        },
    },
    Scenario {
        id: "G03",
        what: "a masquerade of an older table of nf_tables",
        run: |world| {
            crate::flows::masquerade(world.lab)?;
            world.apply(&[by_b()?])?;
            world.send(POD_A, SERVER)?;
            world.send(POD_B, SERVER)
        },
    },
    Scenario {
        id: "G05",
        what: "a masquerade of the other iptables",
        run: |world| {
            world.apply(&[by_b()?])?;
            for host in world.lab.nodes() {
                masquerade_by(&host.netns, "iptables-legacy")?;
            }
            world.send(POD_A, SERVER)?;
            world.send(POD_B, SERVER)
        },
    },
    Scenario {
        id: "G06",
        what: "a service whose endpoint is outside",
        run: |world| {
            let service = pair("10.96.0.50", "fd96::50")?;
            services(world)?;
            world.send_by_way_of(POD_A, &service, &SERVER)
        },
    },
    Scenario {
        id: "G07",
        what: "a service with an address outside whose endpoint is a pod",
        run: |world| {
            let service = pair("203.0.113.7", "2001:db8:7::7")?;
            services(world)?;
            world.send_by_way_of(POD_A, &service, &POD_B)
        },
    },
    Scenario { id: "I", what: "a stranger's frame for the tunnel", run: injected },
    Scenario { id: "I", what: "a service of the gateway at an egress IP", run: scanned },
    Scenario {
        id: "I",
        what: "the metadata service",
        run: |world| {
            let metadata: IpAddr = "169.254.169.254".parse()?;
            world
                .lab
                .router
                .link(|link| link.address(10, metadata.into(), Preference::Deprecated))?;
            let _service = Echo::start(&world.lab.router, &[metadata])?;
            world.apply(&[by_b()?])?;
            world.send_by_way_of(POD_A, &[metadata], &[metadata])
        },
    },
];

/// What is not about the way of a packet that a pod sends, and is held by other tests.
pub(super) const NOT_COVERED: &[(&str, &str)] = &[
    ("A06", "a node's own packets enter no chain that is explained; see conforms::node_itself"),
    (
        "B05",
        "a mark of others on a packet of others is no way; see packets::foreign_mark_bits_preserved",
    ),
    ("B06 B07", "a state has nothing of other people's firewalls; see conforms::network_policy"),
    ("B08", "nor of their routing rules, which come first there; preflight reports them"),
    ("D10", "what conntrack is told to think invalid is a setting of the host"),
    ("E01 to E13", "open connections, of which SimCluster knows; see packets_fare_alike in twin"),
    ("F02 F05 F06", "who answers for an egress IP is up to the host; preflight looks at it"),
    ("G10 G11 G12", "firewalls of the host that drop; an option of the iptables backend"),
    ("H02 H05", "sizes of packets and errors about them; a walk has neither"),
];

/// Rules of others for both families, on every node.
fn rules(world: &World<'_>, lines: &[&str]) -> Result {
    for host in world.lab.nodes() {
        for line in lines {
            for family in ["-4", "-6"] {
                tool(&host.netns, &format!("ip {family} rule add {line}"))?;
            }
        }
    }
    Ok(())
}

/// Something is lost on the pod's node.
fn spoilt(world: &mut World<'_>, damage: &[&str]) -> Result {
    world.apply(&[by_b()?])?;
    for line in damage {
        tool(&world.lab.node_a.netns, line)?;
    }
    world.send(POD_A, SERVER)
}

fn masquerade_by(netns: &Netns, variant: &str) -> Result {
    for (program, pods) in
        [(variant.to_owned(), "10.244.0.0/16"), (variant.replace("ip", "ip6"), "fd44::/16")]
    {
        let rule = format!("-s {pods} ! -d {pods} -j MASQUERADE");
        tool(netns, &format!("{program} -w -t nat -I POSTROUTING 1 {rule}"))?;
    }
    Ok(())
}

fn services(world: &mut World<'_>) -> Result {
    let rules = "table inet services {
        chain prerouting {
            type nat hook prerouting priority dstnat;
            ip daddr 10.96.0.50 dnat ip to 198.51.100.10
            ip6 daddr fd96::50 dnat ip6 to 2001:db8:51::10
            ip daddr 203.0.113.7 dnat ip to 10.244.2.10
            ip6 daddr 2001:db8:7::7 dnat ip6 to fd44:2::10
        }
    }";
    nft(&world.lab.node_a.netns, &[], rules)?;
    let services: [IpNet; 2] = ["10.96.0.0/16".parse()?, "fd96::/16".parse()?];
    world.fleet = Fleet::with(world.lab, |cluster| cluster.excluded.extend(services))?;
    world.apply(&[by_b()?])
}
