//! The connections among which stale ones are looked for.

use std::collections::BTreeSet;
use std::net::IpAddr;

use crate::state::{KeyValue, MarkBits, Set, State};

/// Number of sources up to which it is worth listing their connections alone.
const FEW: usize = 16;

/// Number of elements up to which it is worth looking for the sources among them.
const SMALL: usize = 16_384;

/// The connections that may be stale: those of some sources, and those with some marks.
#[derive(Debug)]
pub(super) struct Suspects {
    pub(super) sources: BTreeSet<IpAddr>,
    pub(super) marks: BTreeSet<MarkBits>,
}

impl Suspects {
    /// Returns the suspects after a change of states; `None` if the sources are many, or ranges.
    ///
    /// A stale connection has a source that the wanted state selects, or a mark of one of the
    /// states: the connections of other sources are stale only if they are ours.
    pub(super) fn new(wanted: &State, before: &State) -> Option<Self> {
        let mut sources = BTreeSet::new();
        match &wanted.firewall {
            Some(firewall) if firewall.elements.len() <= SMALL => {
                for (key, _) in &firewall.elements {
                    match (key.set(), key.value()) {
                        (Set::Source(_), KeyValue::Address(source)) => {
                            sources.insert(source);
                        }
                        (Set::SourceNet(_), _) => return None,
                        _ => {}
                    }
                    if sources.len() > FEW {
                        return None;
                    }
                }
            }
            None if wanted.xtables.is_empty() => {}
            _ => return None,
        }
        let marks = [wanted, before].into_iter().flat_map(|state| {
            let cached = state.cached().map(|cached| cached.some);
            state.connection_mark().into_iter().chain(cached).chain(state.held_back())
        });
        Some(Self { sources, marks: marks.collect() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::alloc::{MarkPool, TablePool, TableRange};
    use crate::cluster::{Cluster, Node};
    use crate::connection::Connection;
    use crate::datapath::Among;
    use crate::mark::MarkLayout;
    use crate::plan::plan;
    use crate::policy::{EgressIp, EgressPolicy};
    use crate::state::Key;
    use crate::types::{Mark, NodeName, PolicyId};

    const POD: [u8; 4] = [10, 244, 1, 10];
    const EIP: [u8; 4] = [198, 51, 100, 200];

    /// States of a node without policies, as client, as gateway, and with a closed policy.
    fn states() -> Vec<State> {
        let name = |text: &str| NodeName::new(text).unwrap();
        let node = |text, number| {
            let tunnel = IpAddr::from([172, 31, 0, number]).into();
            Node::new(name(text), vec![[192, 0, 2, number].into()], vec![tunnel])
        };
        let pods = "10.244.0.0/16";
        let nodes = vec![node("a", 1), node("b", 2), node("c", 3)];
        let mut states = vec![State::default()];
        for layout in [MarkLayout::SEED, MarkLayout::COMPACT] {
            for caching in [false, true] {
                let mut cluster =
                    Cluster::new(name("a"), nodes.clone(), vec![pods.parse().unwrap()]);
                (cluster.marks, cluster.connection_caching) = (layout, caching);
                for gateway in [None, Some("a"), Some("b"), Some("c")] {
                    for eip in [EgressIp::V4(EIP.into()), EgressIp::Node] {
                        let source = IpAddr::from(POD).into();
                        let id = PolicyId::new("p").unwrap();
                        let mut policy = EgressPolicy::new(id, vec![source], eip);
                        policy.gateway = gateway.map(name);
                        let mut marks = MarkPool::new(layout);
                        let mut tables = TablePool::new(TableRange::default());
                        let plan = plan(&cluster, [policy], &mut marks, &mut tables);
                        states.extend(plan.map(|plan| plan.state));
                    }
                }
            }
        }
        states
    }

    #[test]
    fn every_stale_connection_is_suspect() {
        let states = states();
        assert!(states.len() > 24, "{}", states.len());
        let mut marks = BTreeSet::from([0, 0x2600_0000, 0x2600_0100, 0x1, 0xffff_ffff]);
        for layout in [MarkLayout::SEED, MarkLayout::COMPACT] {
            let MarkBits { mask, value } = layout.connection();
            marks.extend([value, value | 1, value | !mask, layout.tunnel().get()]);
            marks.extend((0..4).filter_map(|number| layout.mark(number)).map(Mark::get));
        }
        let (mut stale, mut passed) = (0, 0);
        for (wanted, before) in
            states.iter().flat_map(|wanted| states.iter().map(move |before| (wanted, before)))
        {
            let suspects = Suspects::new(wanted, before).unwrap();
            let among = Among::SourcesOrMarks(&suspects.sources, &suspects.marks);
            for source in [POD, [10, 244, 1, 11]] {
                for snat_address in [source, EIP, [192, 0, 2, 1]] {
                    for mark in &marks {
                        let connection = Connection {
                            protocol: 6,
                            source: source.into(),
                            source_port: 40_000,
                            destination: [203, 0, 113, 9].into(),
                            destination_port: 443,
                            peer: [203, 0, 113, 9].into(),
                            reply_source_port: 443,
                            snat_address: snat_address.into(),
                            snat_port: 40_000,
                            mark: *mark,
                            zone: 0,
                            reply_zone: 0,
                            id: 1,
                        };
                        let is_stale = connection.is_stale(wanted, before);
                        assert!(!is_stale || among.has(&connection), "{connection:?}");
                        stale += usize::from(is_stale);
                        passed += usize::from(!among.has(&connection));
                    }
                }
            }
        }
        assert!(stale > 1_000 && passed > 1_000, "{stale} {passed}");
    }

    #[test]
    fn ranges_and_many_sources_are_not_listed_alone() {
        let mut state = states().pop().unwrap();
        let nothing = State::default();
        assert_eq!(Suspects::new(&state, &nothing).unwrap().sources, [POD.into()].into());
        let elements = &mut state.firewall.as_mut().unwrap().elements;
        let source = |number| Key::source([10, 244, 2, number].into());
        let value = elements.get(&Key::source(POD.into())).unwrap();
        for number in 2..=16 {
            elements.insert(source(number), value.clone());
        }
        let mut more = state.clone();
        assert_eq!(Suspects::new(&state, &nothing).unwrap().sources.len(), FEW);
        let elements = &mut more.firewall.as_mut().unwrap().elements;
        elements.insert(source(17), value.clone());
        assert!(Suspects::new(&more, &nothing).is_none());
        let elements = &mut state.firewall.as_mut().unwrap().elements;
        let net: ipnet::IpNet = "10.0.0.0/8".parse().unwrap();
        elements.insert(Key::source_net(net.into()), value);
        assert!(Suspects::new(&state, &nothing).is_none());
    }
}
