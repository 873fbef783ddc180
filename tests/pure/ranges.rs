//! Ranges of sources are looked up only where there are any.

use egress_datapath::state::{ChainId, Set, Stmt};
use egress_datapath::{Family, Op, Phase, Reconciler, Sim};

use crate::{cluster_v4, policy, v4};

const LOOK: Stmt = Stmt::TagBySource(Set::SourceNet(Family::V4));

/// The chains that find a packet's class, in their order.
const CHAINS: [ChainId; 3] = [ChainId::Prerouting, ChainId::NatPostrouting, ChainId::Select];

/// The chains whose rules look for ranges after these operations.
fn looking<'a>(ops: impl IntoIterator<Item = &'a Op>) -> Vec<(ChainId, bool)> {
    let ops = ops.into_iter();
    ops.filter_map(|op| match op {
        Op::SetRules(chain, rules) if CHAINS.contains(chain) => {
            Some((*chain, rules.iter().any(|rule| rule.0.first() == Some(&LOOK))))
        }
        _ => None,
    })
    .collect()
}

#[test]
fn the_rules_come_before_the_first_range_and_go_after_the_last() {
    let cluster = cluster_v4("a");
    let with = |sources: &[&str]| policy("p", sources, Some("b"), v4("198.51.100.200"));
    let (host, both) = (with(&["10.244.1.1/32"]), with(&["10.244.1.1/32", "10.244.2.0/24"]));
    let mut egress = Reconciler::new(Sim::new());
    let made = egress.reconcile(&cluster, [&host]).unwrap().changes;
    let mut seen = looking(made.ops());
    seen.sort_unstable();
    assert_eq!(seen, CHAINS.map(|chain| (chain, false)));

    // A packet must find the rule where it finds the range.
    for (policy, phase, before_or_after, look) in [
        (&both, Phase::Chains, Phase::FillSources, true),
        (&host, Phase::EmptyVerdicts, Phase::EmptySources, false),
    ] {
        let changes = egress.reconcile(&cluster, [policy]).unwrap().changes;
        let phases: Vec<_> = changes.steps().iter().map(|step| step.phase).collect();
        let mut expected = [phase, before_or_after];
        expected.sort_unstable();
        assert_eq!(phases, expected, "{changes}");
        let step = changes.steps().iter().find(|step| step.phase == phase).unwrap();
        assert_eq!(looking(&step.ops), CHAINS.map(|chain| (chain, look)), "{changes}");
    }
}
