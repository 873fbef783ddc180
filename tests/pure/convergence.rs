//! From any state to any other, in one go, and in two if something is refused on the way.

use std::collections::BTreeSet;

use egress_datapath::datapath::{Op, Phase};
use egress_datapath::state::{
    Base, ChainId, ChainType, Firewall, Hook, Key, NftRule, Set, Stmt, Stray, StrayKind,
    StrayRouting, TableFamily,
};
use egress_datapath::{
    Backend, Changes, Datapath, Destinations, DeviceName, Family, Finding, MacAddr, Reconciler,
    Sim, State,
};
use proptest::prelude::*;
use proptest::sample::Index;

use crate::random::{clusters, policies};
use crate::{planned, pools};

const ENOMEM: i32 = 12;

fn states() -> impl Strategy<Value = State> {
    (clusters(), policies())
        .prop_map(|(cluster, policies)| planned(&cluster, policies).unwrap().state)
}

/// What somebody else may have done to our objects, and a kernel allows.
#[derive(Clone, Debug)]
enum Drift {
    LinkDown,
    LinkGone,
    Mac,
    RuleGone(Index),
    RouteGone(Index),
    NeighbourGone(Index),
    AddressGone,
    ElementGone(Index),
    Stray,
    Misshapen,
    OtherBase,
    OtherRules(Index),
    TableGone,
    Asleep,
    LinkTouched,
    StrayRoute,
    StrayRule,
    Hook(HookDrift),
}

/// The same of the table at the device's egress hook.
#[derive(Clone, Copy, Debug)]
enum HookDrift {
    Gone,
    ChainGone,
    ElementGone(Index),
    OtherDevice,
    OtherRules,
    Asleep,
    Stray,
    Misshapen,
}

fn drifts() -> impl Strategy<Value = Drift> {
    #[allow(clippy::enum_glob_use, reason = "all of them are listed")]
    use Drift::*;
    prop_oneof![
        Just(LinkDown),
        Just(LinkGone),
        Just(Mac),
        any::<Index>().prop_map(RuleGone),
        any::<Index>().prop_map(RouteGone),
        any::<Index>().prop_map(NeighbourGone),
        Just(AddressGone),
        any::<Index>().prop_map(ElementGone),
        Just(Stray),
        Just(Misshapen),
        Just(OtherBase),
        any::<Index>().prop_map(OtherRules),
        Just(TableGone),
        Just(Asleep),
        Just(LinkTouched),
        Just(StrayRoute),
        Just(StrayRule),
        hook_drifts().prop_map(Hook),
    ]
}

fn hook_drifts() -> impl Strategy<Value = HookDrift> {
    #[allow(clippy::enum_glob_use, reason = "all of them are listed")]
    use HookDrift::*;
    prop_oneof![
        Just(Gone),
        Just(ChainGone),
        any::<Index>().prop_map(ElementGone),
        Just(OtherDevice),
        Just(OtherRules),
        Just(Asleep),
        Just(Stray),
        Just(Misshapen),
    ]
}

fn drift_hook(hook: &mut Option<Firewall>, drift: HookDrift) {
    let Some(table) = hook else { return };
    match drift {
        HookDrift::Gone => *hook = None,
        HookDrift::ChainGone => table.chains.clear(),
        HookDrift::ElementGone(index) => {
            if let Some(key) = pick(index, table.elements.keys()) {
                table.elements.remove(&key);
            }
        }
        HookDrift::OtherDevice => {
            for (base, _) in table.chains.values_mut() {
                let hook = Hook::Egress(DeviceName::new("eth7").unwrap());
                *base = Some(Base { kind: ChainType::Filter, hook, priority: 0 });
            }
        }
        HookDrift::OtherRules => {
            for (_, rules) in table.chains.values_mut() {
                rules.truncate(1);
            }
        }
        HookDrift::Asleep => table.dormant = true,
        HookDrift::Stray => drop(table.strays.insert(Stray::Chain("debug".into()))),
        HookDrift::Misshapen => {
            table.chains.clear();
            table.strays.insert(Stray::Chain("egress".into()));
        }
    }
}

fn pick<T: Clone>(index: Index, all: impl Iterator<Item = T>) -> Option<T> {
    let all: Vec<T> = all.collect();
    (!all.is_empty()).then(|| index.get(&all).clone())
}

fn stray(kind: StrayKind) -> StrayRouting {
    let (family, text) = (Family::V4, "whatever".to_owned());
    StrayRouting { kind, family, text, message: vec![1] }
}

fn drift(state: &mut State, drift: &Drift) {
    use egress_datapath::state::Route;
    let with_device = |state: &mut State| {
        state.neighbours.clear();
        state.routes.retain(|_, route| !matches!(route, Route::Via(_)));
    };
    match drift {
        Drift::LinkDown => {
            if let Some(link) = &mut state.link {
                link.up = false;
            }
            with_device(state);
        }
        Drift::LinkGone => {
            state.link = None;
            state.addresses.clear();
            state.fdb.clear();
            with_device(state);
        }
        Drift::Mac => {
            if let Some(link) = &mut state.link {
                link.mac = MacAddr::new([2, 9, 9, 9, 9, 9]);
                state.neighbours.clear();
            }
        }
        Drift::RuleGone(index) => {
            if let Some(rule) = pick(*index, state.rules.iter().cloned()) {
                state.rules.remove(&rule);
            }
        }
        Drift::RouteGone(index) => {
            if let Some(key) = pick(*index, state.routes.keys().copied()) {
                state.routes.remove(&key);
            }
        }
        Drift::NeighbourGone(index) => {
            if let Some(key) = pick(*index, state.neighbours.keys().copied()) {
                state.neighbours.remove(&key);
            }
        }
        Drift::LinkTouched => {
            if let Some(link) = &mut state.link {
                link.intact = false;
            }
        }
        Drift::StrayRoute => drop(state.strays.insert(stray(StrayKind::Route))),
        Drift::StrayRule => drop(state.strays.insert(stray(StrayKind::Rule))),
        Drift::AddressGone => state.addresses.clear(),
        Drift::TableGone => state.firewall = None,
        Drift::Hook(drift) => drift_hook(&mut state.hook, *drift),
        _ => {}
    }
    let Some(firewall) = &mut state.firewall else { return };
    match drift {
        Drift::ElementGone(index) => {
            if let Some(key) = pick(*index, firewall.elements.keys()) {
                firewall.elements.remove(&key);
            }
        }
        Drift::Stray => {
            firewall.strays.insert(Stray::Chain("debug".into()));
            firewall.strays.insert(Stray::Set("blocked".into()));
        }
        Drift::Asleep => firewall.dormant = true,
        Drift::Misshapen => {
            let set = Set::Eip(Family::V4);
            firewall.sets.remove(&set);
            firewall.elements.retain(|key: &Key, _| key.set() != set);
            firewall.strays.insert(Stray::Set(set.name()));
        }
        Drift::OtherBase => {
            if let Some((base, _)) = firewall.chains.get_mut(&ChainId::Forward) {
                let (kind, hook) = (ChainType::Filter, Hook::Forward);
                *base = Some(Base { kind, hook, priority: 7 });
            }
        }
        Drift::OtherRules(index) => {
            if let Some(chain) = pick(*index, firewall.chains.keys().copied()) {
                if let Some((_, rules)) = firewall.chains.get_mut(&chain) {
                    rules.insert(0, NftRule(vec![Stmt::Unknown(7)]));
                }
            }
        }
        _ => {}
    }
}

fn drifted() -> impl Strategy<Value = State> {
    (states(), prop::collection::vec(drifts(), 0..4)).prop_map(|(mut state, all)| {
        for one in &all {
            drift(&mut state, one);
        }
        state
    })
}

fn family() -> impl Strategy<Value = Family> {
    prop_oneof![Just(Family::V4), Just(Family::V6)]
}

fn phase_of(changes: &Changes, place: usize) -> Phase {
    let phases = changes.steps().iter().flat_map(|step| step.ops.iter().map(|_| step.phase));
    phases.collect::<Vec<_>>()[place]
}

/// The family of an iptables or ipset operation.
fn family_of(changes: &Changes, place: usize) -> Option<Family> {
    match changes.ops().nth(place)? {
        Op::AddXtChain(_, chain) | Op::EditXtChain(_, chain, _) => Some(chain.family),
        Op::AddIpset(set, _) | Op::PutIpset(set, _) | Op::PutMember(set, ..) => Some(set.family()),
        _ => None,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..<_>::default() })]

    #[test]
    fn changes_between_any_states_converge(
        from in prop_oneof![1 => Just(State::default()), 6 => drifted()],
        to in prop_oneof![1 => Just(State::default()), 6 => states()],
    ) {
        let mut kernel = Sim::with_state(from.clone());
        let changes = Changes::between(&from, &to);
        if let Err(error) = kernel.apply(&changes) {
            prop_assert!(false, "{error}\nof\n{changes}");
        }
        prop_assert_eq!(kernel.state(), &to);
        prop_assert!(Changes::between(kernel.state(), &to).is_empty());
    }

    #[test]
    fn refused_operation_made_up_by_next_apply(
        from in prop_oneof![1 => Just(State::default()), 2 => drifted()],
        to in prop_oneof![1 => Just(State::default()), 6 => states()],
    ) {
        let changes = Changes::between(&from, &to);
        for refused in 0..changes.len() {
            let mut kernel = Sim::with_state(from.clone());
            kernel.refuse(refused, ENOMEM);
            let error = kernel.apply(&changes).unwrap_err();
            prop_assert!(error.refused.iter().any(|(_, why)| why.errno() == Some(ENOMEM)));
            let total = error.applied + error.refused.len() + error.skipped;
            prop_assert_eq!(total, changes.len());
            let path = [Phase::Tunnel, Phase::Routes, Phase::Rules];
            if from.is_empty() && path.contains(&phase_of(&changes, refused)) {
                // No policy is open for want of a part of its way.
                prop_assert_eq!(&kernel.state().firewall, &to.firewall);
                prop_assert_eq!(&kernel.state().xtables, &to.xtables);
                prop_assert_eq!(&kernel.state().ipsets, &to.ipsets);
            }
            if let (true, Some(family)) = (from.is_empty(), family_of(&changes, refused)) {
                let of_others = |state: &State| -> Vec<_> {
                    let chains = state.xtables.values().flat_map(|tables| tables.chains.clone());
                    chains.filter(|(chain, _)| chain.family != family).collect()
                };
                prop_assert_eq!(of_others(kernel.state()), of_others(&to));
            }
            let rest = Changes::between(kernel.state(), &to);
            if let Err(error) = kernel.apply(&rest) {
                let op = changes.ops().nth(refused).unwrap();
                prop_assert!(false, "{error}\nafter {op} was refused, of\n{rest}");
            }
            prop_assert_eq!(kernel.state(), &to);
        }
    }

    #[test]
    fn missing_family_left_out_and_taken_in_again(
        cluster in clusters(), before in policies(), after in policies(), family in family(),
    ) {
        let (marks, tables) = pools(&cluster);
        let mut sim = Sim::new();
        let missing = BTreeSet::from([family]);
        sim.set_missing_families(&missing);
        let mut egress = Reconciler::with_allocators(sim, marks, tables);
        for policies in [&before, &after, &before] {
            let report = egress.reconcile(&cluster, policies).unwrap();
            let here = cluster.nodes.iter().find(|node| node.name == cluster.node).unwrap();
            let has_tunnel = here.tunnel.iter().any(|net| Family::of(net.addr()) == family);
            let told = report.findings.contains(&Finding::FamilyUnavailable { family });
            prop_assert_eq!(told, has_tunnel);
            let state = egress.datapath().state();
            prop_assert!(state.rules.iter().all(|rule| rule.family != family));
            prop_assert!(state.addresses.iter().all(|net| Family::of(net.addr()) != family));
        }
        egress.datapath().set_missing_families(&BTreeSet::new());
        egress.audit().unwrap();
        let whole = planned(&cluster, &before).unwrap().state;
        // Marks and tables may be others than those of a plan without a past.
        let state = egress.datapath().state().clone();
        prop_assert_eq!(state.rules.len(), whole.rules.len());
        prop_assert_eq!(state.routes.len(), whole.routes.len());
        prop_assert_eq!(&state.addresses, &whole.addresses);
        prop_assert_eq!(&state.neighbours, &whole.neighbours);
        prop_assert!(egress.reconcile(&cluster, &before).unwrap().changes.is_empty());
        // The family is lost again, between an update and the next.
        egress.datapath().set_missing_families(&missing);
        egress.reconcile(&cluster, &after).unwrap();
        prop_assert!(egress.repair().unwrap().changes.is_empty());
        prop_assert!(egress.datapath().state().rules.iter().all(|rule| rule.family != family));
        egress.remove().unwrap();
        prop_assert!(egress.datapath().state().is_empty());
    }

    #[test]
    fn flowtable_left_out_and_taken_in_again(
        cluster in clusters(), before in policies(), after in policies(),
    ) {
        let (marks, tables) = pools(&cluster);
        let mut sim = Sim::new();
        sim.set_flowtables(false);
        let mut egress = Reconciler::with_allocators(sim, marks, tables);
        let offloads = |state: &State| {
            let mut chains = state.firewall.iter().flat_map(|table| table.chains.values());
            chains.any(|(_, rules)| rules.iter().any(|rule| rule.0.contains(&Stmt::NoOffload)))
        };
        let has = |state: &State| state.firewall.as_ref().is_some_and(|table| table.flowtable);
        for policies in [&before, &after, &before] {
            egress.reconcile(&cluster, policies).unwrap();
            let state = egress.datapath().state();
            prop_assert!(!offloads(state) && !has(state));
        }
        egress.datapath().set_flowtables(true);
        egress.audit().unwrap();
        let is_nft = cluster.backend == Backend::Nftables;
        let state = egress.datapath().state();
        prop_assert_eq!((offloads(state), has(state)), (is_nft, is_nft));
        prop_assert!(egress.reconcile(&cluster, &before).unwrap().changes.is_empty());
        egress.reconcile(&cluster, &after).unwrap();
        prop_assert_eq!(has(egress.datapath().state()), is_nft);
        egress.remove().unwrap();
        prop_assert!(egress.datapath().state().is_empty());
    }

    #[test]
    fn new_reconciler_takes_over_state(
        cluster in clusters(), before in policies(), after in policies(), stop in any::<Index>(),
    ) {
        let first = |sim| {
            let (marks, tables) = pools(&cluster);
            Reconciler::with_allocators(sim, marks, tables)
        };
        let mut egress = first(Sim::new());
        egress.reconcile(&cluster, &before).unwrap();
        let planned = egress.preview(&cluster, &after).unwrap().changes;
        if !planned.is_empty() {
            egress.datapath().refuse(stop.index(planned.len()), ENOMEM);
            prop_assert!(egress.reconcile(&cluster, &after).is_err());
        }
        let mut kernel = egress.datapath().clone();
        // Another table than before, unless it is recovered.
        let (marks, tables) = pools(&cluster);
        let tables = tables.with_start(50);
        let mut successor = Reconciler::with_allocators(&mut kernel, marks, tables);
        successor.reconcile(&cluster, &after).unwrap();
        prop_assert!(successor.reconcile(&cluster, &after).unwrap().changes.is_empty());
        successor.remove().unwrap();
        prop_assert!(kernel.state().is_empty());
    }

    #[test]
    fn drain_by_new_process_flushes_the_sets(cluster in clusters(), policies in policies()) {
        let start = |sim| {
            let (marks, tables) = pools(&cluster);
            Reconciler::with_allocators(sim, marks, tables)
        };
        let mut first = start(Sim::new());
        first.reconcile(&cluster, &policies).unwrap();
        let mut second = start(first.datapath().clone());
        // The first has been given its datapath back, and knows the elements.
        first.repair().unwrap();
        let known = first.drain().unwrap().changes;
        let unknown = second.drain().unwrap().changes;
        let state = second.datapath().state().clone();
        prop_assert_eq!(first.datapath().state(), &state);
        let elements = |op: &Op| match op {
            Op::DeleteElement(key, _) => key.set().table() == TableFamily::Inet,
            _ => false,
        };
        let flushes = |op: &Op| matches!(op, Op::FlushSet(_));
        prop_assert!(!unknown.ops().any(elements) && !known.ops().any(flushes));
        let other = |changes: &Changes, but: &dyn Fn(&Op) -> bool| {
            changes.ops().filter(|op| !but(op)).cloned().collect::<Vec<_>>()
        };
        prop_assert_eq!(other(&known, &elements), other(&unknown, &flushes));
        let sets = state.firewall.iter().flat_map(|table| &table.sets).count();
        prop_assert!(unknown.ops().filter(|op| flushes(op)).count() <= sets);
        prop_assert!(second.remove().is_ok() && second.datapath().state().is_empty());
    }

    #[test]
    fn plan_independent_of_input_order(
        cluster in clusters(),
        (ordered, shuffled) in policies().prop_flat_map(|policies| {
            let shuffled = Just(policies.clone()).prop_shuffle();
            (Just(policies), shuffled)
        }),
        turn in any::<Index>(),
    ) {
        let mut other = cluster.clone();
        other.nodes.reverse();
        other.excluded.reverse();
        let mut shuffled = shuffled;
        for policy in &mut shuffled {
            let by = turn.index(policy.sources.len());
            policy.sources.rotate_left(by);
            if let Destinations::Nets(nets) = &mut policy.destinations {
                nets.reverse();
                nets.push(nets[0]);
            }
        }
        let one = planned(&cluster, ordered).unwrap();
        prop_assert_eq!(one, planned(&other, shuffled).unwrap());
    }
}
