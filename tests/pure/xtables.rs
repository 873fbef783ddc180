//! The iptables backend: its text, and that differences of it make what is wanted.

use egress_datapath::explain::{Fate, Packet};
use egress_datapath::iptables::Iptables;
use egress_datapath::state::{Ipset, IpsetContents, Variant, XtRule, XtTarget};
use egress_datapath::{
    Backend, Changes, Cluster, Datapath, Destinations, EgressPolicy, Plan, Replies, Sim, State,
    Steering, explain,
};
use proptest::prelude::*;
use proptest::sample::Index;

use crate::golden::check;
use crate::random::{clusters, policies};
use crate::{cluster_v4, nets, planned, policy, v4};

fn with(mut cluster: Cluster, iptables: Iptables) -> Cluster {
    cluster.backend = Backend::Iptables(iptables);
    cluster.policy_counters = false;
    cluster
}

fn one() -> EgressPolicy {
    policy("uuid", &["172.29.234.173/32"], Some("b"), v4("198.51.100.200"))
        .with_destinations(Destinations::Nets(nets(&["10.6.105.150/32"])))
}

/// The example of the datapath's ancestors: one policy, one gateway.
fn planned_by(variant: Variant, node: &str) -> Plan {
    let iptables = Iptables::new(variant).with_accept(true).with_weave(true);
    planned(&with(cluster_v4(node), iptables), [&one()]).unwrap()
}

#[test]
fn client_commands() {
    let legacy = planned_by(Variant::Legacy, "a");
    check("iptables_client.txt", &legacy, &State::default());
    let nft = planned_by(Variant::Nft, "a");
    let [legacy, nft] =
        [legacy, nft].map(|plan| Changes::between(&State::default(), &plan.state).to_string());
    let why = "the variants differ in the command alone";
    assert_eq!(nft, legacy.replace("-legacy", "-nft"), "{why}");
}

#[test]
fn gateway_commands() {
    let plan = planned_by(Variant::Legacy, "b");
    check("iptables_gateway.txt", &plan, &State::default());
}

#[test]
fn explain_reads_iptables_rules() {
    let packet = Packet::udp([172, 29, 234, 173].into(), 40_000, [10, 6, 105, 150].into(), 53);
    let iptables = with(cluster_v4("a"), Iptables::new(Variant::Legacy));
    let trace = explain(&planned(&iptables, [&one()]).unwrap().state, &packet);
    assert_eq!(trace.gateway(), Some("b"), "{trace}");
    assert!(matches!(trace.fate, Fate::Tunnelled(_)), "{trace}");
}

fn backends() -> impl Strategy<Value = Backend> {
    let iptables = |variant| {
        (any::<bool>(), any::<bool>()).prop_map(move |(accept, weave)| {
            Backend::Iptables(Iptables::new(variant).with_accept(accept).with_weave(weave))
        })
    };
    prop_oneof![
        1 => Just(Backend::Nftables),
        2 => iptables(Variant::Legacy),
        2 => iptables(Variant::Nft),
    ]
}

fn states() -> impl Strategy<Value = State> {
    (clusters(), policies(), backends()).prop_map(|(mut cluster, policies, backend)| {
        cluster.backend = backend;
        cluster.policy_counters &= backend == Backend::Nftables;
        if backend != Backend::Nftables {
            cluster.steering = Steering::Tables;
            cluster.replies = Replies::Direct;
            cluster.tunnel.underlay_only = false;
        }
        planned(&cluster, policies).unwrap().state
    })
}

/// What somebody else may have done.
fn drift(state: &mut State, kind: u8, index: Index) {
    let strange = XtRule {
        matches: std::collections::BTreeSet::new(),
        target: XtTarget::Unknown("-s 10.0.0.0/8 -j DROP".into()),
        comment: "".into(),
    };
    if !state.ipsets.is_empty() {
        let at = index.index(state.ipsets.len());
        let (set, contents) = state.ipsets.iter_mut().nth(at).unwrap();
        match kind {
            0 => drop(contents.members.pop_first()),
            1 if contents.members.len() < 64 => contents.capacity = 64,
            2 => {
                let temporary = Ipset::Temporary(set.family());
                state.ipsets.insert(temporary, IpsetContents::of([]));
            }
            _ => {}
        }
    }
    for tables in state.xtables.values_mut() {
        let at = index.index(tables.chains.len());
        let rules = tables.chains.values_mut().nth(at).unwrap();
        match kind {
            3 => rules.clear(),
            4 => rules.insert(0, strange.clone()),
            5 => rules.reverse(),
            6 => drop(tables.jumps.pop_first()),
            7 => {
                for (place, _) in tables.jumps.values_mut().flatten() {
                    *place += 2;
                }
            }
            _ => {}
        }
    }
}

fn drifted() -> impl Strategy<Value = State> {
    (states(), proptest::collection::vec((0..8_u8, any::<Index>()), 0..4)).prop_map(
        |(mut state, all)| {
            for (kind, index) in all {
                drift(&mut state, kind, index);
            }
            state
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..<_>::default() })]

    #[test]
    fn changes_between_states_of_any_backend_converge(
        from in prop_oneof![1 => Just(State::default()), 6 => drifted()],
        to in prop_oneof![1 => Just(State::default()), 6 => states()],
    ) {
        let mut kernel = Sim::with_state(from.clone());
        let changes = Changes::between(&from, &to);
        if let Err(error) = kernel.apply(&changes) {
            prop_assert!(false, "{error}\nof\n{changes}");
        }
        let mut found = kernel.state().clone();
        // A set that was larger than it need be may stay so.
        for (set, contents) in &mut found.ipsets {
            contents.capacity = contents.capacity.min(to.ipsets[set].capacity);
        }
        prop_assert_eq!(&found, &to);
        prop_assert!(Changes::between(kernel.state(), &to).is_empty());
    }

    #[test]
    fn refused_operation_made_up_by_next_apply(
        from in prop_oneof![1 => Just(State::default()), 2 => drifted()],
        to in prop_oneof![1 => Just(State::default()), 6 => states()],
        place in any::<Index>(),
    ) {
        let changes = Changes::between(&from, &to);
        if !changes.is_empty() {
            let mut kernel = Sim::with_state(from.clone());
            kernel.refuse(place.index(changes.len()), 12);
            kernel.apply(&changes).unwrap_err();
            let rest = Changes::between(kernel.state(), &to);
            if let Err(error) = kernel.apply(&rest) {
                prop_assert!(false, "{error}\nof\n{rest}");
            }
            prop_assert!(Changes::between(kernel.state(), &to).is_empty());
        }
    }
}
