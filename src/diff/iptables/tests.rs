//! Tests of the order of changes, as a packet sees it, and that few rules are touched.

use std::net::IpAddr;

use ipnet::IpNet;
use proptest::prelude::*;

use super::*;
use crate::alloc::{MarkPool, TablePool, TableRange};
use crate::iptables::Iptables;
use crate::state::{Action, MarkBits, XtTarget};
use crate::{
    Backend, Changes, Cluster, Destinations, EgressIp, EgressPolicy, Node, NodeName, PolicyId, plan,
};

fn rule(number: u8) -> XtRule {
    let bits = MarkBits { mask: 0xff, value: number.into() };
    XtRule { matches: BTreeSet::new(), target: XtTarget::SetMark(bits), comment: "".into() }
}

fn apply(rules: &mut Vec<XtRule>, edits: &[XtEdit]) {
    for edit in edits {
        match edit {
            XtEdit::Insert(place, rule) => rules.insert(place - 1, rule.clone()),
            XtEdit::Delete(place) => drop(rules.remove(place - 1)),
            XtEdit::Append(_) | XtEdit::Remove(_) => panic!("never in such a chain"),
        }
    }
}

proptest! {
    #[test]
    fn edits_turn_one_list_into_another_by_way_of_both(
        was in proptest::collection::vec(0_u8..8, 0..12),
        is in proptest::collection::vec(0_u8..8, 0..12),
    ) {
        let [was, is] = [was, is].map(|list| list.into_iter().map(rule).collect::<Vec<_>>());
        let Edits { add, delete } = edits(&was, &is);
        let mut rules = was.clone();
        apply(&mut rules, &add);
        for wanted in &is {
            // Packets match wanted rules before old ones, rule by rule.
            let place = rules.iter().position(|rule| rule == wanted);
            prop_assert!(place.is_some());
        }
        apply(&mut rules, &delete);
        prop_assert_eq!(&rules, &is);
        if was == is {
            prop_assert!(add.is_empty() && delete.is_empty());
        }
    }
}

/// Plans the policies of a node with three pods, each policy encoded by its number.
fn planned(here: &str, variant: Variant, numbers: [u8; 3]) -> State {
    let name = |text: &str| NodeName::new(text).unwrap();
    let node = |text: &str, number: u8| {
        let tunnel = IpAddr::from([172, 31, 0, number]).into();
        let node = Node::new(name(text), vec![[192, 0, 2, number].into()], vec![tunnel]);
        Node { mark: crate::MarkLayout::SEED.mark(number.into()), ..node }
    };
    let nodes = vec![node("a", 1), node("b", 2), node("c", 3)];
    let mut cluster = Cluster::new(name(here), nodes, vec!["10.0.0.0/8".parse().unwrap()]);
    cluster.backend = Backend::Iptables(Iptables::new(variant));
    let policies = numbers.into_iter().zip(1..).map(|(kind, number): (u8, u8)| EgressPolicy {
        priority: u32::from(kind % 2),
        destinations: match kind / 2 % 3 {
            0 => Destinations::External,
            1 => Destinations::Nets(vec!["198.51.100.0/24".parse().unwrap()]),
            _ => Destinations::Nets(vec!["198.51.100.9/32".parse().unwrap()]),
        },
        gateway: [Some("a"), Some("b"), Some("c"), None][usize::from(kind / 6 % 4)].map(name),
        ..EgressPolicy::new(
            PolicyId::new(format!("p{number}")).unwrap(),
            // The third policy selects the pods of the other two, too.
            [vec![1], vec![2], vec![1, 2, 3]][usize::from(number - 1)]
                .iter()
                .map(|pod| IpNet::from(IpAddr::from([10, 0, 0, *pod])))
                .collect(),
            EgressIp::V4([203, 0, 113, number].into()),
        )
    });
    let tables = TableRange::new(3000, 100).unwrap();
    let mut tables = TablePool::new(tables).with_start(0);
    plan(&cluster, policies, &mut MarkPool::new(cluster.marks), &mut tables).unwrap().state
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..<_>::default() })]

    /// Checks that a stop between two operations leaves no pod without one of its own policies.
    ///
    /// Selected packets take the path of one of the policies or are dropped, and no other packets
    /// are selected.
    #[test]
    fn no_operation_leaves_a_pod_on_a_way_of_its_own(
        here in proptest::sample::select(vec!["a", "b"]),
        variants in proptest::array::uniform2(proptest::sample::select(Variant::BOTH.to_vec())),
        was in proptest::array::uniform3(0_u8..24),
        is in proptest::array::uniform3(0_u8..24),
    ) {
        let [before, after] = [(variants[0], was), (variants[1], is)]
            .map(|(variant, numbers)| planned(here, variant, numbers));
        let mut state = before.clone();
        for op in Changes::between(&before, &after).ops().filter(|op| op.is_xtables()) {
            crate::sim::iptables::make(&mut state, op).unwrap();
            for (pod, destination) in [(1, 9), (1, 8), (2, 9), (2, 8), (3, 9), (3, 8), (4, 9)] {
                let way = |state: &State| {
                    let outside = IpAddr::from([198, 51, 100, destination]);
                    let pod = IpAddr::from([10, 0, 0, pod]);
                    // The rules of both variants see a packet.
                    let mut ways = state.xtables.values().map(|tables| {
                        tables.action(&state.ipsets, pod, outside)
                    });
                    ways.find(|way| *way != Action::None).unwrap_or(Action::None)
                };
                let ends = [way(&before), way(&after)];
                let own = |address: IpAddr| {
                    let translated = [Some(pod), Some(3)].into_iter().flatten();
                    pod < 4 && translated.map(|n| IpAddr::from([203, 0, 113, n])).any(|a| a == address)
                };
                let now = way(&state);
                let is_good = ends.contains(&now) || pod < 4 && match now {
                    Action::None => false,
                    Action::Deny | Action::Gateway(_) | Action::Local(None) => true,
                    Action::Local(Some(address)) => own(address),
                };
                prop_assert!(is_good, "pod {} to {}: {:?}, not {:?}, after\n{}",
                    pod, destination, now, ends, op);
            }
        }
    }
}

#[test]
fn a_rule_that_comes_or_goes_is_one_edit() {
    let list = |numbers: &[u8]| numbers.iter().copied().map(rule).collect::<Vec<_>>();
    let Edits { add, delete } = edits(&list(&[1, 2, 4]), &list(&[1, 2, 3, 4]));
    assert_eq!((add, delete), (vec![XtEdit::Insert(3, rule(3))], vec![]));
    let Edits { add, delete } = edits(&list(&[1, 2, 3, 4]), &list(&[1, 2, 4]));
    assert_eq!((add, delete), (vec![], vec![XtEdit::Delete(3)]));
    let Edits { add, delete } = edits(&list(&[1, 2, 3]), &list(&[1, 9, 3]));
    assert_eq!((add, delete), (vec![XtEdit::Insert(2, rule(9))], vec![XtEdit::Delete(3)]));
}
