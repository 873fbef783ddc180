//! What the rules and maps do to a packet is what the policies say.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use egress_datapath::state::{ChainId, Data, Direction, Firewall, Key, Set, Stmt, Tag, Verdict};
use egress_datapath::{Cluster, Destinations, EgressPolicy, Family, IpRange, Mark, NodeName, Plan};
use ipnet::IpNet;
use proptest::prelude::*;
use proptest::sample::select;

use crate::random::{clusters, policies};
use crate::{net, planned};

/// The first packet of a connection.
#[derive(Clone, Copy, Debug)]
struct Packet {
    source: IpAddr,
    destination: IpAddr,
}

impl Packet {
    const fn family(self) -> Family {
        Family::of(self.source)
    }
}

/// What becomes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// Left alone.
    Alone,
    Dropped,
    /// Marked, for a gateway or to be translated here.
    Marked(Mark),
    Snat(IpAddr),
    Masquerade,
}

/// The policies' side: the first in order that takes the packet.
fn winner<'a>(
    cluster: &Cluster,
    policies: &'a [EgressPolicy],
    packet: Packet,
) -> Option<&'a EgressPolicy> {
    let to = packet.destination;
    let nodes = cluster
        .nodes
        .iter()
        .any(|node| node.underlay.contains(&to) || node.tunnel.iter().any(|net| net.addr() == to));
    let never = ["169.254.0.0/16", "224.0.0.0/4", "fe80::/10", "ff00::/8"].map(net);
    let mut excluded = cluster.excluded.iter().chain(&never);
    if nodes || excluded.any(|net| net.contains(&to)) {
        return None;
    }
    let takes = |policy: &&EgressPolicy| {
        policy.sources.iter().any(|net| net.contains(&packet.source))
            && match &policy.destinations {
                Destinations::External => true,
                Destinations::Nets(nets) => nets.iter().any(|net| net.contains(&to)),
            }
    };
    let taking = policies.iter().filter(takes);
    taking.min_by_key(|policy| (policy.priority, policy.id.clone()))
}

/// What the policy wants on the pod's node.
fn steered(cluster: &Cluster, plan: &Plan, policy: &EgressPolicy, family: Family) -> Fate {
    let Some(gateway) = &policy.gateway else { return Fate::Dropped };
    if !policy.egress_ip.serves(family) {
        return Fate::Dropped;
    }
    if *gateway == cluster.node {
        return Fate::Marked(cluster.marks.tunnel());
    }
    let carries = |name: &NodeName| {
        let node = cluster.nodes.iter().find(|node| node.name == *name).unwrap();
        node.tunnel.iter().any(|net| Family::of_net(net) == family)
    };
    if carries(gateway) && carries(&cluster.node) {
        Fate::Marked(plan.gateways[gateway].0)
    } else {
        Fate::Dropped
    }
}

/// What the policy wants where the packet came out of the tunnel.
fn translated(cluster: &Cluster, policy: &EgressPolicy, family: Family) -> Fate {
    if policy.gateway.as_ref() != Some(&cluster.node) || !policy.egress_ip.serves(family) {
        return Fate::Dropped;
    }
    policy.egress_ip.address(family).map_or(Fate::Masquerade, Fate::Snat)
}

/// The kernel's side: runs a packet through a chain.
struct Walk<'a> {
    firewall: &'a Firewall,
    packet: Packet,
    mark: u32,
    tag: u32,
}

impl Walk<'_> {
    fn data(&self, key: &Key) -> Option<Data> {
        self.firewall.elements.get(key).map(|value| value.data)
    }

    fn holds(&self, set: Set, address: IpAddr) -> Option<Data> {
        assert!(self.firewall.sets.contains(&set), "{set}");
        if let Set::Source(_) = set {
            return self.data(&Key::Source(address));
        }
        let inside = |range: &IpRange| range.contains(address);
        let mut found = self.firewall.elements.iter().filter(|(key, _)| match key {
            Key::Excluded(range) | Key::SourceNet(range) => key.set() == set && inside(range),
            _ => false,
        });
        let value = found.next().map(|(_, value)| value.data);
        assert!(found.next().is_none(), "{address} is in {set} twice");
        value
    }

    /// Replaces the tag by what a map gives; without an element the rule ends.
    fn retag(&mut self, data: Option<Data>) -> bool {
        match data {
            Some(Data::Tag(tag)) => {
                self.tag = tag.get();
                true
            }
            None => false,
            other => panic!("{other:?} is no tag"),
        }
    }

    fn run(&mut self, chain: ChainId) -> Fate {
        self.enter(chain).unwrap_or(match self.mark {
            0 => Fate::Alone,
            mark => Fate::Marked(Mark::new(mark)),
        })
    }

    /// The verdict of a chain, if it gives one.
    fn enter(&mut self, chain: ChainId) -> Option<Fate> {
        let firewall = self.firewall;
        let (_, rules) = &firewall.chains[&chain];
        for rule in rules {
            for statement in &rule.0 {
                match self.step(statement) {
                    Next::Statement => {}
                    Next::Rule => break,
                    Next::Chain(chain) => return self.enter(chain),
                    Next::Call(chain) => {
                        if let Some(fate) = self.enter(chain) {
                            return Some(fate);
                        }
                    }
                    Next::Return => return None,
                    Next::End(fate) => return Some(fate),
                }
            }
        }
        None
    }

    fn step(&mut self, statement: &Stmt) -> Next {
        let Packet { source, destination } = self.packet;
        let family = self.packet.family();
        let tag = Tag::new(self.tag);
        let of_family = |set: &Set| match set {
            Set::Source(of) | Set::SourceNet(of) | Set::Excluded(of) => *of == family,
            other => panic!("{other}"),
        };
        let holds = match statement {
            // It is no answer to a connection that was ended, and no tunnel packet; nor has its
            // connection gone any way of ours before.
            Stmt::InputDevice(_)
            | Stmt::OutputDevice(_)
            | Stmt::PacketIn(_)
            | Stmt::UdpPort(_)
            | Stmt::CtMarkIs(_) => false,
            Stmt::CtDirection(direction) => *direction == Direction::Original,
            Stmt::CtState(bits) => bits & Stmt::NEW != 0,
            Stmt::MarkIsNot { mask, value } => self.mark & mask != *value,
            Stmt::DestinationIn(set) => of_family(set) && self.holds(*set, destination).is_some(),
            Stmt::TagBySource(set) => {
                of_family(set) && {
                    let data = self.holds(*set, source);
                    self.retag(data)
                }
            }
            Stmt::TagByDestination(of, length) => {
                *of == family && {
                    assert!(self.firewall.sets.contains(&Set::Destination(*of, *length)));
                    let cut = IpNet::new(destination, *length).unwrap().trunc();
                    let data = tag.and_then(|tag| self.data(&Key::Destination(cut, tag)));
                    self.retag(data)
                }
            }
            Stmt::TagByTag(Set::Any(of)) => {
                let data = tag.and_then(|tag| self.data(&Key::Any(*of, tag)));
                self.retag(data)
            }
            Stmt::TagByTag(Set::Steer(of)) => {
                let data = tag.and_then(|tag| self.data(&Key::Steer(*of, tag)));
                self.retag(data)
            }
            Stmt::VerdictByTag(Set::Verdict) => {
                match tag.and_then(|tag| self.data(&Key::Verdict(tag))) {
                    Some(Data::Verdict(Verdict::Drop)) => return Next::End(Fate::Dropped),
                    Some(Data::Verdict(Verdict::Goto(chain))) => return Next::Chain(chain),
                    None => false,
                    other => panic!("{other:?} is no verdict"),
                }
            }
            Stmt::SnatByTag(of) => match tag.and_then(|tag| self.data(&Key::Snat(*of, tag))) {
                Some(Data::Address(address)) => return Next::End(Fate::Snat(address)),
                None => false,
                other => panic!("{other:?} is no address"),
            },
            Stmt::TagIn(Set::Masquerade(of)) => {
                tag.is_some_and(|tag| self.data(&Key::Masquerade(*of, tag)).is_some())
            }
            Stmt::Masquerade => return Next::End(Fate::Masquerade),
            Stmt::Drop => return Next::End(Fate::Dropped),
            Stmt::Return => return Next::Return,
            Stmt::Jump(chain) => return Next::Call(*chain),
            Stmt::MarkIn { mask, set: Set::Gateway } => {
                self.data(&Key::Gateway(Mark::new(self.mark & mask))).is_some()
            }
            Stmt::MarkIs { mask, value } => self.mark & mask == *value,
            Stmt::Goto(chain) => return Next::Chain(*chain),
            Stmt::Counter | Stmt::SetCtMark(_) | Stmt::HasInput => true,
            Stmt::ClearTag => {
                self.tag = 0;
                true
            }
            Stmt::SetMark { keep, value } => {
                self.mark = self.mark & keep | value;
                true
            }
            other => panic!("{other} is not expected here"),
        };
        if holds { Next::Statement } else { Next::Rule }
    }
}

enum Next {
    Statement,
    Rule,
    Chain(ChainId),
    Call(ChainId),
    Return,
    End(Fate),
}

/// Inside and right outside of the prefixes that the random policies are made of.
fn packets() -> impl Strategy<Value = Packet> {
    let low = |most: u8| 0..=most;
    let v4 = |text: &str| text.parse::<Ipv4Addr>().unwrap();
    let v6 = |text: &str| text.parse::<Ipv6Addr>().unwrap();
    let source4 = prop_oneof![
        4 => low(5).prop_map(|n| Ipv4Addr::new(10, 244, 1, n)),
        1 => select(vec![v4("10.244.9.9"), v4("10.243.255.255"), v4("255.255.255.255")]),
    ];
    let to4 = prop_oneof![
        4 => any::<u8>().prop_map(|n| Ipv4Addr::new(198, 51, 100, n)),
        2 => select(["198.51.100.77", "203.0.113.9", "127.255.255.255", "128.0.0.0", "10.245.0.1",
            "10.244.1.1", "10.10.0.12", "172.31.0.12", "169.254.169.254", "224.0.0.1"]
            .map(v4).to_vec()),
        1 => any::<Ipv4Addr>(),
    ];
    let source6 = prop_oneof![
        4 => low(5).prop_map(|n| Ipv6Addr::new(0xfd44, 1, 0, 0, 0, 0, 0, n.into())),
        1 => select(vec![v6("fd44:2::"), v6("fd45::"), Ipv6Addr::from_bits(u128::MAX)]),
    ];
    let to6 = prop_oneof![
        4 => (0..3_u16, 0..2_u16, 0..9_u16)
            .prop_map(|(a, b, c)| Ipv6Addr::new(0x2001, 0xdb8, a, b, 0, 0, 0, c)),
        2 => select(["7fff::", "8000::", "2001:db9::", "fd44::1", "fd10::12", "fe80::1", "ff02::1"]
            .map(v6).to_vec()),
        1 => any::<Ipv6Addr>(),
    ];
    prop_oneof![
        (source4, to4).prop_map(|(s, d)| Packet { source: s.into(), destination: d.into() }),
        (source6, to6).prop_map(|(s, d)| Packet { source: s.into(), destination: d.into() }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..<_>::default() })]

    #[test]
    fn packets_fare_as_the_first_policy_says(
        cluster in clusters(),
        policies in policies(),
        packets in prop::collection::vec(packets(), 1..64),
    ) {
        let plan = planned(&cluster, &policies).unwrap();
        let firewall = plan.state.firewall.as_ref().unwrap();
        for packet in packets {
            let winner = winner(&cluster, &policies, packet);
            let family = packet.family();
            let wanted = winner.map_or(Fate::Alone, |policy| {
                steered(&cluster, &plan, policy, family)
            });
            let mut walk = Walk { firewall, packet, mark: 0, tag: 0 };
            prop_assert_eq!(walk.run(ChainId::Prerouting), wanted, "{:?} of {:?}", packet, winner);

            // The same packet where somebody has taken its mark away: nobody else decides about it.
            let lost = match (wanted, winner) {
                (Fate::Marked(mark), Some(policy)) if mark == cluster.marks.tunnel() => {
                    translated(&cluster, policy, family)
                }
                (Fate::Marked(_), _) => Fate::Dropped,
                (wanted, _) => wanted,
            };
            let mut walk = Walk { firewall, packet, mark: 0, tag: 0 };
            let fate = walk.run(ChainId::NatPostrouting);
            prop_assert_eq!(fate, lost, "{:?} of {:?}", packet, winner);

            // The same packet where it came out of the tunnel. What is excluded never gets there.
            let Some(policy) = winner else { continue };
            let mark = cluster.marks.tunnel().get();
            let mut walk = Walk { firewall, packet, mark, tag: 0 };
            let wanted = translated(&cluster, policy, family);
            let fate = walk.run(ChainId::NatPostrouting);
            prop_assert_eq!(fate, wanted, "{:?} of {:?}", packet, policy);
        }
    }
}
