//! Tests that packets which the conditions of the jumps exclude would pass the chains unchanged.

use std::net::IpAddr;

use crate::alloc::{MarkPool, TablePool};
use crate::cluster::{Backend, Cluster, Iptables, Node};
use crate::mark::MarkLayout;
use crate::policy::{EgressIp, EgressPolicy};
use crate::state::{
    Direction, Ipset, Is, MarkBits, Side, State, Variant, XtChain, XtMatch, XtName, XtRule,
    XtTable, XtTarget, Xtables,
};
use crate::types::{Family, NodeName, PolicyId};

/// The fields of a forwarded packet that the rules match.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Packet {
    mark: u32,
    connmark: u32,
    /// Results of the other matches, one bit each.
    facts: u16,
}

const FACTS: u16 = 8;

impl Packet {
    const fn is(self, fact: u16) -> bool {
        self.facts & 1 << fact != 0
    }

    fn holds(self, one: &XtMatch) -> bool {
        let (is, found) = match one {
            XtMatch::OutputDevice(_) => (Is::So, self.is(0)),
            XtMatch::UdpPort(_) => (Is::So, self.is(1)),
            XtMatch::Direction(direction) => {
                (Is::So, self.is(2) == (*direction == Direction::Original))
            }
            XtMatch::Confirmed(is) => (*is, self.is(3)),
            XtMatch::State(is, _) => (*is, self.is(4)),
            XtMatch::Set(is, Ipset::Ignored(_), Side::Dst) => (*is, self.is(5)),
            XtMatch::Set(is, Ipset::Peers(_), Side::Src) => (*is, self.is(6)),
            XtMatch::Set(is, Ipset::Peers(_), Side::Dst) => (*is, self.is(7)),
            XtMatch::Mark(is, bits) => (*is, bits.are_in(self.mark)),
            XtMatch::Connmark(is, bits) => (*is, bits.are_in(self.connmark)),
            other => panic!("nobody asks that of a forwarded packet: {other}"),
        };
        found == (is == Is::So)
    }
}

/// Returns the packet as it leaves a chain; `None` if it was dropped.
fn walk(tables: &Xtables, name: XtName, mut packet: Packet) -> Option<Packet> {
    let chain = XtChain { family: Family::V4, table: XtTable::Mangle, name };
    let rules: Vec<&XtRule> = if name.is_built_in() {
        tables.jumps[&chain].iter().map(|(_, rule)| rule).collect()
    } else {
        tables.chains[&chain].iter().collect()
    };
    for rule in rules {
        if !rule.matches.iter().all(|one| packet.holds(one)) {
            continue;
        }
        match &rule.target {
            XtTarget::Drop => return None,
            XtTarget::Return => return Some(packet),
            XtTarget::SetMark(MarkBits { mask, value }) => {
                packet.mark = packet.mark & !mask | value;
            }
            XtTarget::Goto(next) => return walk(tables, *next, packet),
            XtTarget::Jump(next) => packet = walk(tables, *next, packet)?,
            other => panic!("not in a chain that forwarded packets pass: {other:?}"),
        }
    }
    Some(packet)
}

fn planned(layout: MarkLayout) -> State {
    let name = |text: &str| NodeName::new(text).unwrap();
    let node = |text: &str, number: u8| {
        let tunnel = IpAddr::from([172, 31, 0, number]).into();
        Node::new(name(text), vec![[192, 0, 2, number].into()], vec![tunnel])
    };
    let nodes = vec![node("a", 1), node("b", 2), node("c", 3)];
    let mut cluster = Cluster::new(name("a"), nodes, vec!["10.0.0.0/8".parse().unwrap()]);
    cluster.backend = Backend::Iptables(Iptables::new(Variant::Nft));
    cluster.marks = layout;
    let policies = [("b", 8), ("c", 9)].map(|(gateway, pod)| EgressPolicy {
        gateway: Some(name(gateway)),
        ..EgressPolicy::new(
            PolicyId::new(gateway).unwrap(),
            vec![IpAddr::from([10, 0, 0, pod]).into()],
            EgressIp::V4([203, 0, 113, pod].into()),
        )
    });
    let (mut marks, mut tables) = (MarkPool::new(layout), TablePool::default());
    crate::plan(&cluster, policies, &mut marks, &mut tables).unwrap().state
}

#[test]
fn a_jump_passes_by_only_what_its_chain_would() {
    for layout in [
        MarkLayout::SEED,
        MarkLayout::COMPACT,
        MarkLayout::new(0x0100_0000, 0x0100_0000, 8, 16).unwrap(),
        MarkLayout::new(0x0200_0000, 0x0300_0000, 8, 16).unwrap(),
        MarkLayout::new(0, 0, 4, 3).unwrap(),
    ] {
        let state = planned(layout);
        let tables = &state.xtables[&Variant::Nft];
        let gateways = [1, 2].map(|value| layout.mark(value).unwrap().get());
        let ours = [layout.tunnel().get(), layout.closed().get()];
        let foreign = !layout.mask() & 0x0000_f00f;
        let marks = gateways.into_iter().chain(ours).chain([0]);
        let (mut touched, mut untouched) = (0, 0);
        for mark in marks.flat_map(|mark| [mark, mark | foreign]) {
            for connmark in [0, layout.connection().value, layout.connection().value | foreign] {
                for facts in 0..1 << FACTS {
                    let packet = Packet { mark, connmark, facts };
                    for (from, to) in [
                        (XtName::Forward, XtName::ResetMark),
                        (XtName::Postrouting, XtName::CheckSnat),
                    ] {
                        let (jumped, walked) =
                            (walk(tables, from, packet), walk(tables, to, packet));
                        assert_eq!(jumped, walked, "{layout:?}: {packet:?} in {to}");
                        let same = walked == Some(packet);
                        *(if same { &mut untouched } else { &mut touched }) += 1;
                    }
                }
            }
        }
        assert!(touched > 0 && untouched > 0);
    }
}
