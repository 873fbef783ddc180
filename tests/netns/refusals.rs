//! Sets and iptables: what the simulator refuses and what the kernel and its tools refuse.

use std::io::{self, Write};

use common::backend::datapath;
use common::fleet::{Result, dual, lab, policy};
use egress_datapath::alloc::{MarkPool, TablePool};
use egress_datapath::datapath::observe;
use egress_datapath::iptables::Iptables;
use egress_datapath::state::{
    Ipset, IpsetContents, Is, Member, Missing, Side, Variant, XtChain, XtMatch, XtName, XtRule,
    XtTable, XtTarget, Xtables,
};
use egress_datapath::testing::lab::{EIP_B, EIP_C, OTHER_SERVER, POD_A, POD_C, hosts};
use egress_datapath::{
    Backend, Changes, Datapath, Destinations, Family, KernelError, Mark, Sim, State, plan,
};

const EIO: i32 = 5;

type Edit = fn(&mut State);
/// What both hold, what they are taken for, and what is wanted, each by what differs from the
/// usual; and the error number, 5 for what a tool refuses without one.
type Case = (&'static str, [Edit; 3], Option<i32>);

const AS_IS: Edit = |_| {};
const ENOENT: Option<i32> = Some(2);
const EBUSY: Option<i32> = Some(16);
const EEXIST: Option<i32> = Some(17);
const REFUSED: Option<i32> = Some(EIO);

const CASES: [Case; 16] = [
    ("all of it is added", [nothing, nothing, AS_IS], None),
    ("all of it is deleted", [AS_IS, AS_IS, nothing], None),
    ("all of it is added again", [AS_IS, nothing, AS_IS], EEXIST),
    ("all of it is deleted again", [nothing, AS_IS, nothing], REFUSED),
    ("a set is there", [more_set, AS_IS, more_set], EEXIST),
    ("a set is not there", [AS_IS, more_set, AS_IS], ENOENT),
    ("a set that rules look into", [AS_IS, AS_IS, no_closed_set], EBUSY),
    ("a member is not there", [AS_IS, more_member, AS_IS], ENOENT),
    ("a member is there", [more_member, AS_IS, more_member], None),
    ("a member has another value", [more_member, more_member, other_member], None),
    ("a chain is there", [more_chain, AS_IS, more_chain], REFUSED),
    ("a chain is not there", [AS_IS, more_chain, AS_IS], REFUSED),
    ("a chain that a rule goes to", [AS_IS, AS_IS, no_here], REFUSED),
    ("a rule looks into a set that is not there", [AS_IS, AS_IS, rule_of_set], REFUSED),
    ("a rule goes to a chain that is not there", [AS_IS, AS_IS, rule_to_chain], REFUSED),
    ("a jump is not there", [no_jump, AS_IS, no_jump], REFUSED),
];

const V4: Family = Family::V4;

fn nothing(state: &mut State) {
    *state = State::default();
}

fn more_set(state: &mut State) {
    state.ipsets.insert(Ipset::Sources(V4, 7), IpsetContents::of([]));
}

fn no_closed_set(state: &mut State) {
    state.ipsets.remove(&Ipset::Denied(V4));
}

fn member(state: &mut State, member: Member) {
    if let (Some(set), Ok(net)) = (state.ipsets.get_mut(&Ipset::Peers(V4)), "192.0.2.77/32".parse())
    {
        set.members.insert(net, member);
    }
}

fn more_member(state: &mut State) {
    member(state, Member::In);
}

fn other_member(state: &mut State) {
    member(state, Member::Not);
}

/// The rules of the one variant that there are.
fn tables(state: &mut State) -> impl Iterator<Item = &mut Xtables> {
    state.xtables.values_mut()
}

fn chain(table: XtTable, name: XtName) -> XtChain {
    XtChain { family: V4, table, name }
}

fn more_chain(state: &mut State) {
    for tables in tables(state) {
        tables.chains.insert(chain(XtTable::Mangle, XtName::To(Mark::new(0x26ff_ff00))), vec![]);
    }
}

fn no_here(state: &mut State) {
    tables(state).for_each(|tables| {
        drop(tables.chains.remove(&chain(XtTable::Mangle, XtName::Local)));
    });
}

fn rule(state: &mut State, matches: &[XtMatch], target: &XtTarget) {
    for tables in tables(state) {
        let rules = tables.chains.entry(chain(XtTable::Mangle, XtName::Guard)).or_default();
        rules.push(XtRule {
            matches: matches.iter().cloned().collect(),
            target: target.clone(),
            comment: "".into(),
        });
    }
}

fn rule_of_set(state: &mut State) {
    let look = XtMatch::Set(Is::So, Ipset::Sources(V4, 9), Side::Src);
    rule(state, &[look], &XtTarget::Drop);
}

fn rule_to_chain(state: &mut State) {
    rule(state, &[], &XtTarget::Goto(XtName::To(Mark::new(0x26ff_fe00))));
}

fn no_jump(state: &mut State) {
    for tables in tables(state) {
        tables.jumps.remove(&chain(XtTable::Nat, XtName::Postrouting));
    }
}

#[test]
fn legacy() -> Result {
    both_refuse_the_same(Variant::Legacy)
}

#[test]
fn nft() -> Result {
    both_refuse_the_same(Variant::Nft)
}

/// The state without what the kernel lacks.
fn objects(state: State) -> State {
    State { missing: Missing::default(), ..state }
}

fn both_refuse_the_same(variant: Variant) -> Result {
    harness::needs(&[variant.command(V4), "ipset"]);
    let lab = lab();
    let usual = usual(&lab.cluster(&lab.node_a)?, variant)?;
    let mut kernel = datapath(&lab.node_a.netns, Backend::Iptables(Iptables::new(variant)))?;
    let mut sim = Sim::new();
    let mut refusals = 0;
    for (case, [holds, taken, wanted], refused) in CASES {
        let what = |error: &dyn std::fmt::Display| format!("{case}: {error}");
        let with = |edit: Edit| {
            let mut state = usual.clone();
            edit(&mut state);
            state
        };
        for both in [&mut sim as &mut dyn Datapath, &mut *kernel] {
            let now = observe(both).map_err(|error| what(&error))?;
            let changes = Changes::between(&now, &with(holds));
            both.apply(&changes).map_err(|error| what(&error))?;
            let found = observe(both).map_err(|error| what(&error))?;
            assert_eq!(objects(found), with(holds), "{case}");
        }
        let changes = Changes::between(&with(taken), &with(wanted));
        let first = |both: &mut dyn Datapath| {
            let error = both.apply(&changes).err()?;
            error.refused.into_iter().next().map(|(_, error)| error)
        };
        let number = |error: &KernelError| error.errno().unwrap_or(EIO);
        let (simulated, real) = (first(&mut sim), first(&mut *kernel));
        assert_eq!(real.as_ref().map(number), refused, "{case}: {real:?}");
        // A tool says why in words.
        let same = |one: &KernelError| refused == REFUSED || Some(number(one)) == refused;
        assert_eq!(simulated.is_some(), refused.is_some(), "{case}: {simulated:?}");
        assert!(simulated.as_ref().is_none_or(same), "{case}: {simulated:?}");
        refusals += usize::from(refused.is_some());
        if refused.is_none() {
            let found = observe(&mut kernel).map_err(|error| what(&error))?;
            let simulated = observe(&mut sim).map_err(|error| what(&error))?;
            assert_eq!(objects(found), objects(simulated), "{case}");
        }
    }
    writeln!(io::stderr(), "{} cases, {refusals} refusals by both", CASES.len())?;
    Ok(())
}

/// Sets and chains of a node that sends to one gateway and closes nothing.
fn usual(cluster: &egress_datapath::Cluster, variant: Variant) -> Result<State> {
    let mut cluster = cluster.clone();
    cluster.backend = Backend::Iptables(Iptables::new(variant));
    let mut listed = policy("listed", &[POD_A, POD_C], Some("node-c"), dual(EIP_C))?;
    listed.destinations = Destinations::Nets(hosts(&[OTHER_SERVER]));
    let mut rest = policy("rest", &[POD_A], Some("node-b"), dual(EIP_B))?;
    rest.priority = 1;
    let (mut marks, mut numbers) = (MarkPool::new(cluster.marks), TablePool::default());
    let state = plan(&cluster, &[listed, rest], &mut marks, &mut numbers)?.state;
    Ok(State { ipsets: state.ipsets, xtables: state.xtables, ..State::default() })
}
