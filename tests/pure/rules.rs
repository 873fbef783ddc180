//! Rules are there only for what policies ask for, and in time.

use std::collections::BTreeSet;

use egress_datapath::datapath::{Op, Phase};
use egress_datapath::explain::{Fate, HostContext, Packet};
use egress_datapath::state::{ChainId, Field, Mask, Missing, Set, Stmt, Target};
use egress_datapath::{
    Changes, EgressPolicy, Family, Finding, Mark, Reconciler, Sim, State, Steering, Update,
};

use crate::{cluster, cluster_v4, dual, policy, v4};

/// The statement that finds the class of a source.
fn by_source(map: Set, family: Family) -> Stmt {
    Field::Source(family).map(map, Target::Priority)
}

fn hosts() -> Stmt {
    by_source(Set::Source(Family::V4), Family::V4)
}

fn hosts6() -> Stmt {
    by_source(Set::Source(Family::V6), Family::V6)
}

fn ranges() -> Stmt {
    by_source(Set::SourceNet(Family::V4), Family::V4)
}

/// The chains that find a packet's class, in their order.
const CHAINS: [ChainId; 3] = [ChainId::Prerouting, ChainId::NatPostrouting, ChainId::Classify];

/// What the chains that find a class look for after these operations, in its order.
fn looking<'a>(ops: impl IntoIterator<Item = &'a Op>) -> Vec<(ChainId, Vec<&'a Stmt>)> {
    let looks =
        |first: &&Stmt| matches!(first, Stmt::Map { map: Set::Source(_) | Set::SourceNet(_), .. });
    let ops = ops.into_iter();
    ops.filter_map(|op| match op {
        Op::SetRules(chain, rules) if CHAINS.contains(chain) => {
            Some((*chain, rules.iter().filter_map(|rule| rule.0.first()).filter(looks).collect()))
        }
        _ => None,
    })
    .collect()
}

/// Makes the changes, which set these rules to look by in these phases and no others.
fn expect(
    egress: &mut Reconciler<Sim>,
    policy: &EgressPolicy,
    rules: &[(Phase, &[&Stmt])],
) -> Changes {
    let cluster = cluster("a");
    let changes = egress.reconcile(&cluster, [policy]).unwrap().changes;
    let steps = changes.steps().iter().filter(|step| !looking(&step.ops).is_empty());
    let found: Vec<_> = steps.map(|step| (step.phase, looking(&step.ops))).collect();
    let expected: Vec<_> = rules
        .iter()
        .map(|(phase, looks)| (*phase, CHAINS.map(|chain| (chain, looks.to_vec())).to_vec()))
        .collect();
    assert_eq!(found, expected, "{changes}");
    changes
}

fn phases(changes: &Changes) -> Vec<Phase> {
    changes.steps().iter().map(|step| step.phase).collect()
}

fn with(sources: &[&str]) -> EgressPolicy {
    policy("p", sources, Some("b"), dual("198.51.100.200", "2001:db8:51::200"))
}

#[test]
fn lookup_rule_added_before_first_source_deleted_after_last() {
    let host = with(&["10.244.1.1/32"]);
    for (more, look) in [("10.244.2.0/24", ranges()), ("fd44:1::1/128", hosts6())] {
        let both = with(&["10.244.1.1/32", more]);
        let mut egress = Reconciler::new(Sim::new());
        let made = egress.reconcile(&cluster("a"), [&host]).unwrap().changes;
        let mut seen = looking(made.ops());
        seen.sort_unstable();
        let hosts_only = hosts();
        assert_eq!(seen, CHAINS.map(|chain| (chain, vec![&hosts_only])));
        // A packet must find the rule where it finds the source.
        let come = expect(&mut egress, &both, &[(Phase::Chains, &[&hosts(), &look])]);
        assert!(phases(&come).contains(&Phase::FillSources), "{come}");
        let go = expect(&mut egress, &host, &[(Phase::EmptyVerdicts, &[&hosts()])]);
        assert!(phases(&go).contains(&Phase::EmptySources), "{go}");
    }
}

#[test]
fn source_becomes_range_always_found() {
    let (host, range) = (with(&["10.244.1.1/32"]), with(&["10.244.1.0/24"]));
    let mut egress = Reconciler::new(Sim::new());
    let _report = egress.reconcile(&cluster("a"), [&host]).unwrap();
    let both: &[&Stmt] = &[&hosts(), &ranges()];
    for (to, only) in [(&range, ranges()), (&host, hosts())] {
        let rules = [(Phase::Chains, both), (Phase::EmptyVerdicts, &[&only][..])];
        let _changes = expect(&mut egress, to, &rules);
    }
}

#[test]
fn guard_present_while_anything_is_translated() {
    let cluster = cluster_v4("a");
    let by = |gateway| policy("p", &["10.244.1.1/32"], Some(gateway), v4("198.51.100.200"));
    let mut egress = Reconciler::new(Sim::new());
    let made = egress.reconcile(&cluster, [by("b")]).unwrap().changes;
    let guards =
        |op: &Op| matches!(op, Op::AddChain(ChainId::Guard, _) | Op::DeleteChain(ChainId::Guard));
    assert!(!made.ops().any(guards), "{made}");
    let forwards = |op: &Op| matches!(op, Op::SetRules(ChainId::Forward, _));
    let when = |changes: &Changes, is: &dyn Fn(&Op) -> bool| -> Vec<Phase> {
        let steps = changes.steps().iter().filter(|step| step.ops.iter().any(is));
        steps.map(|step| step.phase).collect()
    };
    // What comes out of the tunnel is forwarded from then on.
    let come = egress.reconcile(&cluster, [by("a")]).unwrap().changes;
    assert_eq!(when(&come, &guards), [Phase::Skeleton], "{come}");
    assert_eq!(when(&come, &forwards), [Phase::Chains], "{come}");
    let go = egress.reconcile(&cluster, [by("b")]).unwrap().changes;
    assert_eq!(when(&go, &forwards), [Phase::EmptyVerdicts], "{go}");
    assert_eq!(when(&go, &guards), [Phase::RetireGuards], "{go}");
}

#[test]
fn next_hop_found_by_old_mark_during_change() {
    let mut cluster = cluster("a").with_steering(Steering::EgressHook);
    for (node, mark) in cluster.nodes.iter_mut().skip(1).zip([0x2600_0100, 0x2600_4100]) {
        node.mark = Some(Mark::new(mark));
    }
    let by = |id, pod, gateway| policy(id, &[pod], Some(gateway), v4("198.51.100.200"));
    let all = [by("p", "10.244.1.1/32", "b"), by("q", "10.244.1.2/32", "c")];
    let mut egress = Reconciler::new(Sim::new());
    let _report = egress.reconcile(&cluster, &all[..1]).unwrap();
    let changes = egress.reconcile(&cluster, &all).unwrap().changes;
    let looks = changes.steps().iter().flat_map(|step| {
        let rules = step.ops.iter().filter_map(|op| match op {
            Op::SetRules(ChainId::Egress, rules) => Some(rules),
            _ => None,
        });
        rules.map(|rules| {
            let masks = rules.iter().filter_map(|rule| match rule.0.first() {
                Some(Stmt::Map { key, map: Set::NextHop, .. }) => match key[0].mask {
                    Mask::Bits(mask) => Some(mask & 0x4000 != 0),
                    other => panic!("{other:?}"),
                },
                _ => None,
            });
            (step.phase, masks.collect::<Vec<_>>())
        })
    });
    let expected = [(Phase::Chains, vec![true, false]), (Phase::EmptyVerdicts, vec![true])];
    assert_eq!(looks.collect::<Vec<_>>(), expected, "{changes}");
}

#[test]
fn rules_about_fields_that_the_kernel_lacks_left_out_and_reported() {
    let gateway = policy("p", &["10.244.1.1/32"], Some("a"), v4("198.51.100.200"));
    let told = [
        (Field::SocketWildcard, "sockets_unavailable"),
        (Field::DestinationType, "address_types_unavailable"),
    ];
    let tested = |state: &State| {
        let chains = state.firewall.as_ref().unwrap().chains.values();
        let statements = chains.flat_map(|(_, rules)| rules).flat_map(|rule| &rule.0);
        let fields = statements.filter_map(|statement| match statement {
            Stmt::Match { of, .. } => Some(of.field),
            _ => None,
        });
        fields.collect::<BTreeSet<_>>()
    };
    for lacking in [vec![], vec![told[0]], vec![told[1]], told.to_vec()] {
        let missing_fields: BTreeSet<_> = lacking.iter().map(|(field, _)| *field).collect();
        let missing = Missing { fields: missing_fields.clone(), ..Missing::default() };
        let state = State { missing, ..State::default() };
        let local = vec!["198.51.100.200".parse().unwrap()];
        let sim = Sim::with_state(state).with_host(HostContext::new(local));
        let mut egress = Reconciler::new(sim);
        // The refusal of a rule would be an error.
        let previewed = egress.preview(&cluster("a"), [&gateway]).unwrap();
        let report = egress.reconcile(&cluster("a"), [&gateway]).unwrap();
        assert_eq!(previewed.findings, report.findings);
        let codes: Vec<_> = report.findings.iter().map(Finding::code).collect();
        assert_eq!(codes, lacking.iter().map(|(_, code)| *code).collect::<Vec<_>>());
        for update in [Update::Upsert(with(&["10.244.1.7/32"])), Update::Upsert(gateway.clone())] {
            egress.update([update]).unwrap();
        }
        assert!(egress.audit().unwrap().changes.is_empty());
        for (field, _) in told {
            let has = tested(egress.datapath().state()).contains(&field);
            assert_eq!(has, !missing_fields.contains(&field), "{field}");
        }
        // An answer that nobody expects is dropped if it can be told from one that somebody does.
        let (server, eip) = ("192.0.2.1".parse().unwrap(), "198.51.100.200".parse().unwrap());
        let fate = egress.datapath().send(Packet::udp(server, 53, eip, 40_000)).fate;
        let known = !missing_fields.contains(&Field::SocketWildcard);
        assert_eq!(fate, if known { Fate::Dropped } else { Fate::Delivered });
        egress.remove().unwrap();
        assert!(egress.datapath().state().is_empty());
    }
}
