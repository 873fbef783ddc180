use std::collections::BTreeMap;

use ipnet::IpNet;
use proptest::prelude::*;
use proptest::sample::select;

use super::*;
use crate::alloc::{MarkPool, TablePool, TableRange};
use crate::count::Counts;
use crate::datapath::{Among, Drift, Known, Observed, OnConnection};
use crate::diff::changes::ApplyError;
use crate::error::KernelError;
use crate::plan::{PlanError, plan, with_few_tags};
use crate::state::Set;
use crate::types::Family;
use crate::{
    Destinations, EgressIp, EgressPolicy, MarkBits, MarkLayout, Node, NodeName, PolicyId, Sim,
    Unavailable,
};

fn name(text: &str) -> NodeName {
    NodeName::new(text).unwrap()
}

fn id(text: &str) -> PolicyId {
    PolicyId::new(text).unwrap()
}

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

fn cluster() -> Cluster {
    let node = |text: &str, number: u8| {
        let tunnels = [format!("172.31.0.{number}/16"), format!("fd11::{number}/112")];
        let underlay = IpAddr::from([10, 10, 0, number]);
        Node::new(name(text), vec![underlay], tunnels.iter().map(|text| net(text)).collect())
    };
    let mut nodes = vec![node("a", 11), node("b", 12), node("c", 13), node("d", 14)];
    nodes[3].tunnel.pop();
    // Left out: two that share an address, and one without tunnel address.
    nodes.extend([node("e", 15), node("f", 16), node("g", 17)]);
    nodes[5].underlay = nodes[4].underlay.clone();
    nodes[6].tunnel.clear();
    let cluster = Cluster::new(name("a"), nodes, vec![net("10.244.0.0/16")]);
    Cluster { policy_counters: true, ..cluster }
}

/// The same, with a node that has this node's tunnel address.
fn contradicted() -> Cluster {
    let mut cluster = cluster();
    let tunnel = cluster.nodes[0].tunnel.clone();
    cluster.nodes.push(Node::new(name("z"), vec![[10, 10, 0, 99].into()], tunnel));
    cluster
}

/// A simulated kernel with planned drift, which records the reads.
#[derive(Default)]
struct Recorder {
    sim: Sim,
    drift: Option<Drift>,
    reads: usize,
    listed: Vec<Option<BTreeSet<IpAddr>>>,
    connections: Vec<Connection>,
    /// Number of single-address sources expected at each read; 0 for a read without elements.
    expected: Vec<usize>,
}

impl Datapath for Recorder {
    fn observe(&mut self, known: Known<'_>) -> Result<Observed, KernelError> {
        let drift = self.drift.replace(Drift::None).unwrap_or(Drift::Unknown);
        match (known, drift) {
            (Known::Installed(_), Drift::None) => return Ok(Observed::Unchanged),
            (Known::Installed(state), Drift::Rest) => {
                let firewall = state.firewall.clone();
                return Ok(State { firewall, ..self.sim.state().clone() }.into());
            }
            _ => {}
        }
        self.reads += 1;
        let sources = |elements: &Elements| elements.of(Set::Source(Family::V4)).count();
        let without = matches!(known, Known::WithoutElements).then_some(0);
        self.expected.extend(known.elements().map(sources).or(without));
        Ok(self.sim.state().clone().into())
    }

    fn connections(
        &mut self,
        among: Among<'_>,
        each: &mut OnConnection<'_>,
    ) -> Result<(), KernelError> {
        self.listed.push(match among {
            Among::Sources(sources) | Among::Pods(sources) => Some(sources.clone()),
            Among::All | Among::SourcesOrMarks(..) => None,
        });
        let of = |one: &&Connection| among.has(one);
        self.connections.iter().filter(of).copied().for_each(each);
        Ok(())
    }

    fn counters(&mut self) -> Result<Counts, KernelError> {
        self.sim.counters()
    }

    fn apply(&mut self, changes: &Changes) -> Result<(), ApplyError> {
        let ended: Vec<_> = changes.ops().filter_map(Op::ended).copied().collect();
        self.connections.retain(|one| !ended.contains(one));
        let made = self.sim.apply(changes);
        if made.is_err() {
            self.drift = Some(Drift::Unknown);
        }
        made
    }
}

type Egress = Reconciler<Recorder>;

/// Plans the policies with allocators equal to those of the reconciler.
fn planned(
    egress: &Egress,
    cluster: &Cluster,
    policies: &Policies,
) -> Result<crate::Plan, PlanError> {
    let mut tables = TablePool::new(egress.tables.range()).with_start(0);
    for (node, table) in egress.tables.iter() {
        tables.reserve(node, table).unwrap();
    }
    plan(cluster, policies.values().flatten(), &mut egress.marks.clone(), &mut tables)
}

/// The wanted policies; several of one id contradict each other.
type Policies = BTreeMap<PolicyId, Vec<EgressPolicy>>;

#[derive(Clone, Debug)]
enum Act {
    Update(Vec<Update>),
    Snapshot(Vec<Update>),
    /// Snapshot with one more policy, whatever its id.
    Twice(EgressPolicy),
    RuleLost,
    ElementLost,
    Refused(usize),
}

fn sources() -> impl Strategy<Value = IpNet> {
    let hosts =
        ["10.0.0.1/32", "10.0.0.2/32", "10.0.0.3/32", "10.0.1.1/32", "fd00::1/128", "fd00::2/128"];
    let nets = ["10.0.0.0/24", "10.0.0.0/30", "10.0.0.2/31", "fd00::/64"];
    let invalid =
        ["10.0.0.1/24", "10.0.0.2/31", "10.0.0.3/24", "fd00::1/64", "::ffff:10.0.0.1/128"];
    prop_oneof![
        12 => select(hosts.to_vec()).prop_map(net),
        1 => select(nets.to_vec()).prop_map(net),
        1 => select(invalid.to_vec()).prop_map(net),
    ]
}

fn policies() -> impl Strategy<Value = EgressPolicy> {
    let listed =
        ["0.0.0.0/0", "192.0.2.0/24", "192.0.2.0/25", "198.51.100.7/32", "2001:db8::/32", "::/0"];
    let invalid = ["192.0.2.7/24", "2001:db8::7/32", "::ffff:192.0.2.1/128"];
    let listed = prop_oneof![
        12 => select(listed.to_vec()).prop_map(net),
        1 => select(invalid.to_vec()).prop_map(net),
    ];
    let listed = prop::collection::vec(listed, 0..4);
    let destinations =
        prop_oneof![Just(Destinations::External), listed.prop_map(Destinations::Nets)];
    let eips = select(vec![
        EgressIp::V4([203, 0, 113, 1].into()),
        EgressIp::V4([203, 0, 113, 2].into()),
        EgressIp::Dual([203, 0, 113, 1].into(), "2001:db8:1::1".parse().unwrap()),
        EgressIp::Node,
        EgressIp::Node,
        EgressIp::V4([10, 10, 0, 12].into()),
    ]);
    let sources = prop::collection::vec(sources(), 0..4);
    let treatment = select(vec![Unavailable::Drop, Unavailable::Bypass]);
    let parts = (0..6_u8, 0..3_u32, sources, destinations, gateways(), eips, treatment);
    parts.prop_map(|(number, priority, sources, destinations, gateway, eip, unavailable)| {
        EgressPolicy {
            priority,
            destinations,
            gateway,
            unavailable,
            ..EgressPolicy::new(id(&format!("p{number}")), sources, eip)
        }
    })
}

fn gateways() -> impl Strategy<Value = Option<NodeName>> {
    select(vec![
        None,
        Some("a"),
        Some("a"),
        Some("b"),
        Some("b"),
        Some("c"),
        Some("d"),
        Some("e"),
        Some("nobody"),
    ])
    .prop_map(|gateway| gateway.map(name))
}

fn updates() -> impl Strategy<Value = Update> {
    let of = || (0..6_u8).prop_map(|number| id(&format!("p{number}")));
    let few = || prop::collection::vec(sources(), 0..3);
    prop_oneof![
        3 => policies().prop_map(Update::Upsert),
        1 => of().prop_map(Update::Remove),
        3 => (of(), few()).prop_map(|(policy, sources)| Update::AddSources { policy, sources }),
        3 => (of(), few()).prop_map(|(policy, sources)| Update::RemoveSources { policy, sources }),
        2 => (of(), gateways()).prop_map(|(policy, gateway)| Update::Move { policy, gateway }),
    ]
}

fn acts() -> impl Strategy<Value = Act> {
    let list = || prop::collection::vec(updates(), 1..4);
    prop_oneof![
        10 => list().prop_map(Act::Update),
        3 => list().prop_map(Act::Snapshot),
        1 => policies().prop_map(Act::Twice),
        1 => Just(Act::RuleLost),
        1 => Just(Act::ElementLost),
        1 => (0..6_usize).prop_map(Act::Refused),
    ]
}

/// Applies an update to the policies; `None` if it names an unknown one.
fn apply(policies: &mut Policies, update: &Update) -> Option<()> {
    match update {
        Update::Upsert(policy) => {
            policies.insert(policy.id.clone(), vec![policy.clone()]);
        }
        Update::Remove(id) => {
            policies.remove(id);
        }
        Update::AddSources { policy, sources } => {
            policies.get_mut(policy)?.iter_mut().for_each(|one| one.sources.extend(sources));
        }
        Update::RemoveSources { policy, sources } => {
            let all = policies.get_mut(policy)?.iter_mut();
            all.for_each(|one| one.sources.retain(|net| !sources.contains(net)));
        }
        Update::Move { policy, gateway } => {
            policies.get_mut(policy)?.iter_mut().for_each(|one| one.gateway.clone_from(gateway));
        }
    }
    Some(())
}

/// Returns the policies after all updates; `None` if one contradicts those before it.
fn after(policies: &Policies, updates: &[Update]) -> Option<Policies> {
    let mut after = policies.clone();
    updates.iter().try_for_each(|update| apply(&mut after, update))?;
    Some(after)
}

fn check(egress: &mut Egress, cluster: &Cluster, policies: &Policies) {
    let plan = planned(egress, cluster, policies).unwrap();
    let wanted = egress.wanted.as_ref().unwrap();
    assert_eq!(wanted, &plan.state);
    assert_eq!(egress.datapath.sim.state(), &plan.state);
    let index = egress.index.as_ref().unwrap();
    assert_eq!(index.findings(), plan.findings);
    assert_eq!(index.gateways(), plan.gateways);
    for node in &cluster.nodes {
        let holds = egress.marks.get(&node.name).is_some();
        assert_eq!(holds, plan.gateways.contains_key(&node.name), "{}", node.name);
    }
}

fn run(cluster: &Cluster, acts: Vec<Act>, tables: u32) {
    let range = TableRange::new(3000, tables).unwrap();
    let tables = TablePool::new(range).with_start(0);
    let mut egress =
        Reconciler::with_allocators(Recorder::default(), MarkPool::new(cluster.marks), tables);
    let mut policies = Policies::new();
    egress.reconcile(cluster, policies.values().flatten()).unwrap();
    for act in acts {
        match act {
            Act::Update(updates) => {
                let after = after(&policies, &updates);
                let before = egress.datapath.sim.state().clone();
                let made = egress.update(updates.clone());
                assert_eq!(made.is_ok(), after.is_some(), "{made:?} of {updates:?}");
                if let Ok(report) = made {
                    // In the same order as from a comparison of the whole states.
                    let whole = Changes::between(&before, egress.datapath.sim.state());
                    assert_eq!(report.changes.to_string(), whole.to_string());
                }
                policies = after.unwrap_or(policies);
            }
            Act::Snapshot(updates) => {
                let Some(after) = after(&policies, &updates) else { continue };
                snapshot(&mut egress, cluster, &after);
                policies = after;
            }
            Act::Twice(policy) => {
                policies.entry(policy.id.clone()).or_default().push(policy);
                snapshot(&mut egress, cluster, &policies);
            }
            Act::RuleLost => {
                egress.datapath.sim.state_mut().rules.pop_first();
                egress.datapath.drift = Some(Drift::Rest);
                if policies.len() % 2 == 0 {
                    egress.repair().unwrap();
                } else {
                    egress.update([] as [Update; 0]).unwrap();
                }
            }
            Act::ElementLost => {
                let firewall = egress.datapath.sim.state_mut().firewall.as_mut().unwrap();
                let key = firewall.elements.keys().find(|key| key.set() != Set::PolicyAction);
                firewall.elements.remove(&key.unwrap());
                egress.datapath.drift = Some(Drift::Unknown);
                if policies.len() % 2 == 0 {
                    egress.update([] as [Update; 0]).unwrap();
                } else {
                    egress.repair().unwrap();
                }
            }
            Act::Refused(place) => {
                egress.datapath.sim.refuse(place, 12);
                let policy = EgressPolicy {
                    gateway: Some(name("b")),
                    ..EgressPolicy::new(id("p9"), vec![net("10.9.9.9/32")], EgressIp::Node)
                };
                let update = Update::Upsert(policy.clone());
                apply(&mut policies, &update).unwrap();
                let _refused_or_nothing_to_do = egress.update([update]);
                egress.datapath.sim.refuse(usize::MAX, 12);
                egress.repair().unwrap();
            }
        }
        check(&mut egress, cluster, &policies);
    }
}

fn snapshot(egress: &mut Egress, cluster: &Cluster, policies: &Policies) {
    let report = egress.reconcile(cluster, policies.values().flatten()).unwrap();
    assert_eq!(report.findings, planned(egress, cluster, policies).unwrap().findings);
    assert!(report.settled);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 192, failure_persistence: None, ..<_>::default() })]

    #[test]
    fn updates_come_to_what_a_plan_of_everything_does(acts in prop::collection::vec(acts(), 1..12)) {
        run(&cluster(), acts, 100);
    }

    #[test]
    fn also_where_tags_are_disputed(acts in prop::collection::vec(acts(), 1..12)) {
        with_few_tags(|| run(&cluster(), acts, 100));
    }

    #[test]
    fn also_where_gateways_find_no_table(acts in prop::collection::vec(acts(), 1..12)) {
        run(&cluster(), acts, 0);
    }

    #[test]
    fn also_where_gateways_find_no_mark(acts in prop::collection::vec(acts(), 1..12)) {
        let marks = MarkLayout::new(0x2600_0000, 0xff00_0000, 8, 1).unwrap();
        run(&Cluster { marks, ..cluster() }, acts, 100);
    }

    #[test]
    fn also_where_a_node_contradicts_this_one(acts in prop::collection::vec(acts(), 1..12)) {
        run(&contradicted(), acts, 100);
    }
}

fn one_policy() -> EgressPolicy {
    EgressPolicy {
        gateway: Some(name("b")),
        ..EgressPolicy::new(
            id("p"),
            vec![net("10.0.0.1/32")],
            EgressIp::V4([203, 0, 113, 1].into()),
        )
    }
}

fn add(source: &str) -> [Update; 1] {
    [Update::AddSources { policy: id("p"), sources: vec![net(source)] }]
}

fn connection(source: &str) -> Connection {
    let (source, peer) = (source.parse().unwrap(), "198.51.100.9".parse().unwrap());
    Connection {
        protocol: 6,
        source,
        source_port: 40_000,
        destination: peer,
        destination_port: 443,
        peer,
        reply_source_port: 443,
        snat_address: source,
        snat_port: 40_000,
        mark: 0,
        zone: 0,
        reply_zone: 0,
        id: 7,
    }
}

#[test]
fn what_is_known_is_not_read_again() {
    let mut egress = Reconciler::new(Recorder::default());
    assert!(matches!(egress.update(add("10.0.0.2/32")), Err(Error::NothingWanted)));
    egress.reconcile(&cluster(), [one_policy()]).unwrap();
    let report = egress.update(add("10.0.0.2/32")).unwrap();
    assert_eq!(report.changes.len(), 1, "{}", report.changes);
    assert!(!report.settled);
    assert!(egress.update(add("10.0.0.2/32")).unwrap().changes.is_empty());
    assert!(egress.repair().unwrap().changes.is_empty());
    let mut both = one_policy();
    both.sources.push(net("10.0.0.2/32"));
    assert!(egress.reconcile(&cluster(), [both]).unwrap().changes.is_empty());
    assert_eq!(egress.datapath.reads, 1);
    assert!(egress.audit().unwrap().changes.is_empty());
    assert_eq!(egress.datapath.reads, 2);
    let _handed_out = egress.datapath();
    assert!(egress.repair().unwrap().changes.is_empty());
    assert_eq!(egress.datapath.reads, 3);
}

#[test]
fn what_a_preview_found_as_wanted_is_not_read_again() {
    let mut egress = Reconciler::new(Recorder::default());
    egress.reconcile(&cluster(), [one_policy()]).unwrap();
    assert!(egress.preview(&cluster(), [one_policy()]).unwrap().changes.is_empty());
    assert_eq!(egress.datapath.reads, 2);
    assert!(egress.repair().unwrap().changes.is_empty());
    assert_eq!(egress.datapath.reads, 2);
}

#[test]
fn connections_are_left_to_be_settled_and_never_forgotten() {
    let settlers: [fn(&mut Egress) -> Report; 4] = [
        |egress| egress.settle().unwrap(),
        |egress| egress.repair().unwrap(),
        |egress| egress.audit().unwrap(),
        |egress| {
            let mut policy = one_policy();
            policy.sources.extend([net("10.0.0.2/32"), net("10.0.0.3/32")]);
            egress.reconcile(&cluster(), [policy]).unwrap()
        },
    ];
    for settle in settlers {
        let mut egress = Reconciler::new(Recorder::default());
        egress.reconcile(&cluster(), [one_policy()]).unwrap();
        // A connection opened before the pod was added to the policy, and one of an unselected pod.
        let (stale, other) = (connection("10.0.0.2"), connection("10.0.7.7"));
        egress.datapath.connections = vec![stale, other];
        assert!(!egress.update(add("10.0.0.2/32")).unwrap().settled);
        assert!(!egress.update(add("10.0.0.3/32")).unwrap().settled);
        let report = settle(&mut egress);
        assert!(report.settled);
        assert_eq!(report.changes.ops().filter_map(Op::ended).collect::<Vec<_>>(), [&stale]);
        assert_eq!(egress.datapath.connections, [other]);
        // The first reconciliation lists them all.
        let sources = ["10.0.0.2", "10.0.0.3"].map(|source| source.parse().unwrap());
        assert_eq!(egress.datapath.listed, [None, Some(sources.into())]);
        assert!(settle(&mut egress).changes.is_empty());
    }
}

#[test]
fn connection_with_removed_egress_ip_ended() {
    let mut egress = Reconciler::new(Recorder::default());
    let policy = EgressPolicy { gateway: Some(name("a")), ..one_policy() };
    egress.reconcile(&cluster(), [&policy]).unwrap();
    let firewall = egress.wanted.as_ref().and_then(|wanted| wanted.firewall.as_ref()).unwrap();
    let mark = firewall.connection_mark().unwrap().value;
    let translated = |address: [u8; 4]| Connection {
        mark,
        snat_address: address.into(),
        ..connection("10.0.0.1")
    };
    let (eip, own) = (translated([203, 0, 113, 1]), translated([10, 10, 0, 11]));
    egress.datapath.connections = vec![eip, own];
    let masquerade = EgressPolicy { egress_ip: EgressIp::Node, ..policy };
    assert!(!egress.update([Update::Upsert(masquerade)]).unwrap().settled);
    assert_eq!(egress.settle().unwrap().changes.ops().filter_map(Op::ended).count(), 1);
    assert_eq!(egress.datapath.connections, [own]);
}

#[test]
fn a_closed_policy_keeps_its_connections_as_long_as_their_egress_ip_is_known() {
    let mut egress = Reconciler::new(Recorder::default());
    let policy = EgressPolicy { gateway: Some(name("a")), ..one_policy() };
    let other = EgressPolicy { id: id("q"), sources: vec![net("10.0.0.2/32")], ..policy.clone() };
    egress.reconcile(&cluster(), [&policy, &other]).unwrap();
    let firewall = egress.wanted.as_ref().and_then(|wanted| wanted.firewall.as_ref()).unwrap();
    let mark = firewall.connection_mark().unwrap().value;
    let eip = Connection { mark, snat_address: [203, 0, 113, 1].into(), ..connection("10.0.0.1") };
    egress.datapath.connections = vec![eip];
    let settled = |egress: &mut Egress, update: Update| {
        let _report = egress.update([update]).unwrap();
        let ended = egress.settle().unwrap().changes;
        ended.ops().filter_map(Op::ended).count()
    };
    assert_eq!(settled(&mut egress, Update::Move { policy: policy.id, gateway: None }), 0);
    assert_eq!(settled(&mut egress, Update::Remove(other.id)), 1);
}

#[test]
fn a_contradiction_changes_nothing() {
    let mut egress = Reconciler::new(Recorder::default());
    egress.reconcile(&cluster(), [one_policy()]).unwrap();
    let before = egress.datapath.sim.state().clone();
    let move_ = Update::Move { policy: id("p"), gateway: Some(name("c")) };
    let unknown: Update = Update::Move { policy: id("q"), gateway: None };
    let error = egress.update([move_, unknown]).unwrap_err();
    assert!(matches!(error, Error::Plan(PlanError::UnknownPolicy { .. })), "{error}");
    assert_eq!(error.to_string(), "policy q is not one of those that are wanted");
    assert!(egress.repair().unwrap().changes.is_empty());
    assert_eq!(egress.datapath.sim.state(), &before);
    check(&mut egress, &cluster(), &[(id("p"), vec![one_policy()])].into());
}

#[test]
fn a_policy_becomes_invalid_and_valid_again() {
    let mut egress = Reconciler::new(Recorder::default());
    egress.reconcile(&cluster(), [one_policy()]).unwrap();
    let sound = egress.datapath.sim.state().clone();
    let bits = || vec![net("10.0.0.1/24")];
    for (there, back, code) in [
        (
            Update::AddSources { policy: id("p"), sources: bits() },
            Update::RemoveSources { policy: id("p"), sources: bits() },
            "host_bits",
        ),
        (
            Update::RemoveSources { policy: id("p"), sources: vec![net("10.0.0.1/32")] },
            Update::AddSources { policy: id("p"), sources: vec![net("10.0.0.1/32")] },
            "no_sources",
        ),
        (
            Update::Move { policy: id("p"), gateway: Some(name("e")) },
            Update::Move { policy: id("p"), gateway: Some(name("b")) },
            "gateway_left_out",
        ),
        (
            Update::Upsert(EgressPolicy {
                destinations: Destinations::Nets(bits()),
                ..one_policy()
            }),
            Update::Upsert(one_policy()),
            "host_bits",
        ),
    ] {
        let report = egress.update([there]).unwrap();
        assert_eq!(report.findings.iter().map(Finding::code).collect::<Vec<_>>(), [code]);
        assert!(!report.changes.is_empty());
        let report = egress.update([back]).unwrap();
        assert!(report.findings.is_empty());
        assert_eq!(egress.datapath.sim.state(), &sound);
    }
    // An unchanged snapshot with contradicting policies is not read and not written again.
    let both = [one_policy(), one_policy()];
    let report = egress.reconcile(&cluster(), &both).unwrap();
    assert!(report.findings.iter().any(|finding| finding.code() == "duplicate_policy"));
    let index = egress.index.as_ref().unwrap();
    assert_eq!(index.differences(&both).unwrap().len(), 1, "all of one id at once");
    let reads = egress.datapath.reads;
    assert!(egress.reconcile(&cluster(), &both).unwrap().changes.is_empty());
    assert_eq!(egress.datapath.reads, reads);
    egress.reconcile(&cluster(), [one_policy()]).unwrap();
    assert_eq!(egress.datapath.sim.state(), &sound);
}

#[test]
fn of_a_policy_that_becomes_invalid_all_connections_are_looked_at() {
    let mut egress = Reconciler::new(Recorder::default());
    let other = EgressPolicy { id: id("q"), sources: vec![net("10.0.0.9/32")], ..one_policy() };
    egress.reconcile(&cluster(), [one_policy(), other]).unwrap();
    egress.update(add("10.0.0.1/24")).unwrap();
    egress.settle().unwrap();
    // Its other sources are closed, too, and the update names none of them.
    assert_eq!(egress.datapath.listed, [None, None]);
}

#[test]
fn first_reconciliation_left_unsettled_is_settled_by_any_later_call() {
    let settlers: [fn(&mut Egress) -> Report; 5] = [
        |egress| egress.settle().unwrap(),
        |egress| egress.repair().unwrap(),
        |egress| egress.audit().unwrap(),
        |egress| egress.reconcile(&cluster(), [one_policy()]).unwrap(),
        |egress| {
            egress.datapath.drift = Some(Drift::Rest);
            egress.settle().unwrap()
        },
    ];
    for settle in settlers {
        let mut egress = Reconciler::new(Recorder::default());
        let (stale, other) = (connection("10.0.0.1"), connection("10.0.7.7"));
        egress.datapath.connections = vec![stale, other];
        let report = egress.reconcile_unsettled(&cluster(), [one_policy()]).unwrap();
        assert!(!report.settled && egress.datapath.listed.is_empty());
        let installed = egress.datapath.sim.state().clone();
        assert_eq!(Some(&installed), egress.wanted.as_ref());
        assert!(!egress.update(add("10.0.0.2/32")).unwrap().settled);
        assert_eq!(egress.datapath.connections, [stale, other]);
        let report = settle(&mut egress);
        assert!(report.settled);
        assert_eq!(egress.datapath.connections, [other]);
        assert!(settle(&mut egress).changes.is_empty());
    }
}

/// Connections of some pods, as their node, a gateway or nobody has translated and marked them.
fn connections() -> impl Strategy<Value = Vec<Connection>> {
    let MarkBits { value, .. } = MarkLayout::SEED.connection();
    let one = (
        select(vec!["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.1.1", "10.0.9.9"]),
        select(vec![None, Some([203, 0, 113, 1]), Some([203, 0, 113, 2]), Some([10, 10, 0, 11])]),
        select(vec![0, value, value | 1, 0x2600_0000, 0x2600_0100]),
        0..4_u32,
    );
    let one = one.prop_map(|(source, snat, mark, id)| {
        let found = connection(source);
        let snat_address = snat.map_or(found.snat_address, IpAddr::from);
        Connection { snat_address, mark, id, ..found }
    });
    prop::collection::vec(one, 0..24)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 192, failure_persistence: None, ..<_>::default() })]

    /// Nothing is forgotten: what a reconciliation would have ended ends with the next call.
    #[test]
    fn settled_later_is_settled_all_the_same(
        rounds in prop::collection::vec(
            (any::<bool>(), prop::collection::vec(policies(), 0..4), connections(), 0..3_usize), 1..5,
        ),
    ) {
        let start = || {
            let tables = TablePool::new(TableRange::default()).with_start(0);
            Reconciler::with_allocators(Recorder::default(), MarkPool::default(), tables)
        };
        let (mut at_once, mut later) = (start(), start());
        for (caching, policies, connections, by) in rounds {
            let cluster =
 Cluster { connection_caching: caching, policy_counters: !caching, ..cluster() };
            at_once.datapath.connections.clone_from(&connections);
            later.datapath.connections = connections;
            at_once.reconcile(&cluster, &policies).unwrap();
            later.reconcile_unsettled(&cluster, &policies).unwrap();
            let report = match by {
                0 => later.settle(),
                1 => later.audit(),
                _ => later.reconcile(&cluster, &policies),
            };
            prop_assert!(report.unwrap().settled);
            prop_assert_eq!(&later.datapath.connections, &at_once.datapath.connections);
            prop_assert_eq!(later.datapath.sim.state(), at_once.datapath.sim.state());
            prop_assert_eq!(&later.wanted, &at_once.wanted);
        }
    }
}

#[test]
fn a_node_that_is_left_out_keeps_no_mark() {
    let mut egress = Reconciler::new(Recorder::default());
    let mut cluster = cluster();
    cluster.nodes[2].mark = cluster.marks.mark(5);
    egress.reconcile(&cluster, [one_policy()]).unwrap();
    assert_eq!(egress.marks.get(&name("c")), cluster.nodes[2].mark);
    cluster.nodes[2].tunnel.clear();
    egress.reconcile(&cluster, [one_policy()]).unwrap();
    assert_eq!(egress.marks.get(&name("c")), None);
}

#[test]
fn of_a_large_table_what_was_wanted_is_expected_or_after_a_restart_what_the_plan_says() {
    let policy = |count: u32| {
        let address = |n: u32| IpAddr::from((0x0af4_0000 + n).to_be_bytes());
        let sources = (0..count).map(|n| IpNet::from(address(n))).collect();
        let eip = EgressIp::V4([198, 51, 100, 1].into());
        let id = PolicyId::new("p").unwrap();
        EgressPolicy { gateway: Some(name("b")), ..EgressPolicy::new(id, sources, eip) }
    };
    let mut egress = Reconciler::new(Recorder::default());
    let _report = egress.reconcile(&cluster(), [policy(9000)]).unwrap();
    assert_eq!(egress.datapath().expected, [9000]);
    let _report = egress.reconcile(&cluster(), [policy(9001)]).unwrap();
    assert_eq!(egress.datapath().expected, [9000, 9000]);
    assert!(egress.audit().unwrap().changes.is_empty());
    assert_eq!(egress.datapath().expected, [9000, 9000, 9001]);
    let _report = egress.remove().unwrap();
    assert_eq!(egress.datapath().expected, [9000, 9000, 9001, 0]);
    let _report = egress.reconcile(&cluster(), [policy(9)]).unwrap();
    assert_eq!(egress.datapath().expected, [9000, 9000, 9001, 0, 9]);
}
