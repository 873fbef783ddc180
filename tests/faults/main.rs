//! One fault at every call to the kernel: an error that says what happened or success, never a
//! panic, and the next call puts everything right.
//!
//! `EGRESS_FAULTS=all` tries every fault at every call, `EGRESS_FAULT_PAIRS=10000` as many pairs.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test says what it expects"
)]

#[macro_use]
extern crate harness;

mod foreign;

use std::collections::{BTreeMap, BTreeSet};
use std::env;
use std::io::{self, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::time::Instant;

use common::fleet::{Result, dual, lab, policy};
use common::numbered;
use egress_datapath::KernelTables;
use egress_datapath::alloc::{MarkPool, TablePool, TableRange};
use egress_datapath::datapath::observe;
use egress_datapath::testing::lab::{
    self, EIP_B, EIP_C, Host, Lab, Netns, OTHER_SERVER, POD_A, POD_B, SERVER, STRANGER, hosts,
};
use egress_datapath::testing::{Call, Fault, Faults, Subsystem};
use egress_datapath::{
    Changes, Cluster, Datapath, Destinations, EgressPolicy, Error, KernelDatapath, Mark,
    Reconciler, Report, State,
};

use foreign::Foreign;

/// In a network namespace of its own where there can be one.
fn main() -> ExitCode {
    harness::main(|| drop(lab::isolate()))
}

/// Error numbers of `asm-generic/errno*.h`, from `EPERM` to `ENOBUFS`.
const ERRNOS: [i32; 9] = [1, 105, 90, 17, 2, 16, 85, 4, 22];

/// Of the faults that can happen to a call one in so many is tried, in turn; all with
/// `EGRESS_FAULTS=all`.
const SELDOM: usize = 12;

/// Calls after which a node must be right again.
const TRIES: usize = 3;

const B: Option<&str> = Some("node-b");
const C: Option<&str> = Some("node-c");

#[test]
fn client_every_fault_at_every_call_converges() -> Result {
    let lab = lab();
    enumerate(&lab.node_a, &lab.pod_a, &lab)
}

#[test]
fn gateway_every_fault_at_every_call_converges() -> Result {
    let lab = lab();
    enumerate(&lab.node_b, &lab.pod_b, &lab)
}

/// What a node should hold.
enum Wanted {
    Policies(Vec<EgressPolicy>),
    Nothing,
}

struct Scenario {
    name: &'static str,
    before: Wanted,
    after: Wanted,
}

/// `p` is the policy that changes; another one is there all the time.
fn scenarios() -> Result<Vec<Scenario>> {
    let p = |sources: &[_], gateway, eip| policy("p", sources, gateway, dual(eip));
    let both = [POD_A, POD_B];
    let old = p(&both, B, EIP_B)?;
    let listed = |name, servers: &[_]| -> Result<_> {
        let destinations = Destinations::Nets(hosts(servers));
        Ok(policy(name, &both, B, dual(EIP_B))?.with_destinations(destinations))
    };
    let other = policy("other", &[STRANGER], C, dual(EIP_C))?;
    let with = |p: EgressPolicy| Wanted::Policies(vec![p, other.clone()]);
    let alone = || Wanted::Policies(vec![other.clone()]);
    let scenario = |name, before, after| Scenario { name, before, after };
    Ok(vec![
        scenario("bootstrap", Wanted::Nothing, with(old.clone())),
        scenario("add policy", alone(), with(old.clone())),
        scenario("change members", with(p(&[POD_A], B, EIP_B)?), with(p(&[POD_B], B, EIP_B)?)),
        scenario(
            "change destinations",
            with(listed("p", &[SERVER])?),
            with(listed("p", &[OTHER_SERVER])?),
        ),
        scenario("move gateway", with(old.clone()), with(p(&both, C, EIP_C)?)),
        scenario("change EIP", with(old.clone()), with(p(&both, B, EIP_C)?)),
        scenario("remove policy", with(old.clone()), alone()),
        scenario("uninstall", with(old), Wanted::Nothing),
    ])
}

/// A fault that can be planned again and again.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Errno(i32),
    Refuse(i32),
    LoseReply,
    AckWithoutCommit,
    TornDump,
    CutReply,
    Foreign(What),
}

/// What somebody else does in the middle.
#[derive(Clone, Copy, Debug)]
enum What {
    /// Makes a table of his own and deletes it.
    Table,
    /// Takes our routes and rules away.
    TakeRouting,
    /// Takes everything of ours away.
    TakeAll,
}

impl Kind {
    /// All that can happen to a call.
    fn of(call: Call) -> Vec<Self> {
        let mut kinds = vec![
            Self::LoseReply,
            Self::CutReply,
            Self::Foreign(What::Table),
            Self::Foreign(What::TakeRouting),
            Self::Foreign(What::TakeAll),
        ];
        kinds.extend((!call.writes).then_some(Self::TornDump));
        kinds.extend(
            (call.writes && call.subsystem == Subsystem::Firewall)
                .then_some(Self::AckWithoutCommit),
        );
        kinds.extend(ERRNOS.map(Self::Errno));
        kinds.extend(ERRNOS.map(Self::Refuse));
        kinds
    }

    fn fault(self, netns: &Netns) -> Result<Fault> {
        Ok(match self {
            Self::Errno(errno) => Fault::Errno(errno),
            Self::Refuse(errno) => Fault::Refuse(errno),
            Self::LoseReply => Fault::LoseReply,
            Self::AckWithoutCommit => Fault::AckWithoutCommit,
            Self::TornDump => Fault::TornDump,
            Self::CutReply => Fault::CutReply,
            Self::Foreign(What::Table) => {
                let mut foreign = netns.run(Foreign::open)??;
                Fault::ForeignWrite(Box::new(move || foreign.add_and_delete_a_table()))
            }
            Self::Foreign(what) => {
                let mut other = netns.run(KernelDatapath::open)??;
                Fault::ForeignWrite(Box::new(move || take_away(&mut other, what)))
            }
        })
    }
}

fn take_away(datapath: &mut KernelDatapath, what: What) {
    let Ok(found) = observe(datapath) else { return };
    let left = match what {
        What::TakeRouting => {
            State { routes: BTreeMap::new(), rules: BTreeSet::new(), ..found.clone() }
        }
        _ => State::default(),
    };
    // Whether he may is not what is asked here.
    let _either_way = datapath.apply(&Changes::between(&found, &left));
}

type Node = Reconciler<KernelDatapath, MarkPool, TablePool>;

/// What happens when nothing goes wrong.
struct Rehearsed {
    before: State,
    calls: Vec<Call>,
    after: State,
}

/// A node on which the same change is made again and again.
struct Bench<'a> {
    host: &'a Host,
    cluster: Cluster,
    /// Sockets of a pod of this node, one for each family.
    pod: Vec<UdpSocket>,
}

impl Bench<'_> {
    /// A reconciler that knows nothing, with the same numbers every time.
    fn open(&self, faults: &Faults) -> Result<Node> {
        let open = || Ok((KernelDatapath::open()?.with_faults(faults), KernelTables::open()?));
        let opened: std::result::Result<_, egress_datapath::KernelError> =
            self.host.netns.run(open)?;
        let (datapath, in_use) = opened?;
        let tables = TablePool::with_probe(TableRange::default(), in_use).with_start(0);
        Ok(Reconciler::with_allocators(datapath, MarkPool::new(self.cluster.marks), tables))
    }

    fn make(&self, node: &mut Node, wanted: &Wanted) -> std::result::Result<Report, Error> {
        match wanted {
            Wanted::Policies(policies) => node.reconcile(&self.cluster, policies),
            Wanted::Nothing => node.remove(),
        }
    }

    /// What the next call writes; or would write, which is known sooner, since connections are
    /// not looked through.
    fn again(
        &self,
        node: &mut Node,
        scenario: &Scenario,
        planned: &[(usize, Kind)],
    ) -> Result<Changes> {
        let in_turn = planned.iter().map(|(call, _)| call).sum::<usize>() % 8;
        let again = match &scenario.after {
            Wanted::Policies(policies) if in_turn != 0 => node.preview(&self.cluster, policies),
            after => self.make(node, after),
        };
        Ok(again?.changes)
    }

    /// Lets the pod open connections, or use those that it has.
    fn talk(&self) {
        for socket in &self.pod {
            // A policy may have refused the last one, which is said to the next, unsent.
            if socket.send(b"?").is_err() {
                let _either_way = socket.send(b"?");
            }
        }
    }

    /// Where a scenario begins: with connections of the pod.
    fn begin(&self, rehearsed: &Rehearsed) -> Result {
        let mut datapath = self.host.netns.run(KernelDatapath::open)??;
        let found = observe(&mut datapath)?;
        datapath.apply(&Changes::between(&found, &rehearsed.before))?;
        self.talk();
        Ok(())
    }

    /// A scenario in which nothing goes wrong.
    fn rehearse(&self, scenario: &Scenario) -> Result<Rehearsed> {
        let mut node = self.open(&Faults::new())?;
        self.make(&mut node, &scenario.before)?;
        let before = observe(node.datapath())?;
        self.talk();
        let faults = Faults::new();
        let mut node = self.open(&faults)?;
        self.make(&mut node, &scenario.after)?;
        let calls = faults.calls();
        Ok(Rehearsed { before, calls, after: numbered(observe(node.datapath())?) })
    }

    /// One run with faults; the number of calls after which all was right.
    fn survive(
        &self,
        scenario: &Scenario,
        rehearsed: &Rehearsed,
        planned: &[(usize, Kind)],
    ) -> Result<usize> {
        self.begin(rehearsed)?;
        let mut faults = Faults::new();
        for (call, kind) in planned {
            faults = faults.at_call(*call, kind.fault(&self.host.netns)?);
        }
        let mut node = self.open(&faults)?;
        let first = catch_unwind(AssertUnwindSafe(|| self.make(&mut node, &scenario.after)));
        let first = first.map_err(|_| "it panicked")?;
        if let (1, pending @ 1..) = (planned.len(), faults.pending()) {
            return Err(format!("{pending} faults did not happen").into());
        }
        // Somebody who remembers, and somebody who does not, in turn.
        if planned.iter().map(|(call, _)| call).sum::<usize>() % 2 == 1 {
            drop(node);
            node = self.open(&faults)?;
        }
        let mut tries = usize::from(first.is_ok());
        let mut last = first;
        while tries <= TRIES {
            if last.is_ok() && numbered(observe(node.datapath())?) == rehearsed.after {
                let again = self.again(&mut node, scenario, planned)?;
                if again.is_empty() {
                    return Ok(tries);
                }
                return Err(format!("it wrote again: {again}").into());
            }
            tries += 1;
            last = self.make(&mut node, &scenario.after);
        }
        last?;
        let found = numbered(observe(node.datapath())?);
        let wrong = Changes::between(&found, &rehearsed.after);
        Err(format!("it ends where this is still to do:\n{wrong}").into())
    }
}

fn enumerate(host: &Host, pod: &Netns, lab: &Lab) -> Result {
    let connect = |server: IpAddr| {
        let any: IpAddr = match server {
            IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let socket = UdpSocket::bind((any, 0))?;
        socket.connect((server, 7000))?;
        Ok(socket)
    };
    let pod = pod.run(|| SERVER.into_iter().map(connect).collect::<io::Result<_>>())??;
    let mut cluster = lab.cluster(host)?;
    for (node, mark) in cluster.nodes.iter_mut().zip([0x2600_0000, 0x2600_0100, 0x2600_0200]) {
        // Given, since after a loss of everything nobody can know which it was.
        node.mark = Some(Mark::new(mark));
    }
    let bench = Bench { host, cluster, pod };
    let all = env::var_os("EGRESS_FAULTS").is_some_and(|value| value == "all");
    let pairs = env::var("EGRESS_FAULT_PAIRS").ok().map_or(Ok(0), |number| number.parse())?;
    let mut dice = Dice(0x9e37_79b9_7f4a_7c15);
    let start = Instant::now();
    let (mut points, mut faults, mut calls, mut most) = (0, 0, 0, 0);
    let scenarios = scenarios()?;
    for (turn, scenario) in scenarios.iter().enumerate() {
        let rehearsed = bench.rehearse(scenario)?;
        let mut plans = Vec::new();
        for (at, call) in rehearsed.calls.iter().enumerate() {
            for (number, kind) in Kind::of(*call).into_iter().enumerate() {
                if all || (at + number + turn) % SELDOM == 0 {
                    plans.push(vec![(at, kind)]);
                }
            }
        }
        for _ in 0..pairs / scenarios.len() {
            let mut one = || {
                let at = dice.roll(rehearsed.calls.len());
                let kinds = rehearsed.calls.get(at).map(|call| Kind::of(*call)).unwrap_or_default();
                let kind = kinds.get(dice.roll(kinds.len())).copied();
                kind.map(|kind| (at, kind))
            };
            plans.push(one().into_iter().chain(one()).collect());
        }
        for plan in &plans {
            let tries = bench.survive(scenario, &rehearsed, plan).map_err(|error| {
                let calls: Vec<_> = plan.iter().map(|(at, _)| rehearsed.calls.get(*at)).collect();
                format!("{}: {}: {plan:?}, {calls:?}: {error}", host.name, scenario.name)
            })?;
            most = most.max(tries);
            faults += plan.len();
        }
        points += plans.len();
        calls += rehearsed.calls.len();
    }
    writeln!(
        io::stderr(),
        "{}: {} scenarios, {calls} calls, {points} points, {faults} faults; all right after {most} \
         calls at most; {:.1?}",
        host.name,
        scenarios.len(),
        start.elapsed()
    )?;
    Ok(())
}

/// Numbers that are the same in every run.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 33).unwrap_or(0) % sides.max(1)
    }
}

#[test]
fn remove_after_failed_apply_deletes_device() -> Result {
    let lab = lab();
    let host = &lab.node_a;
    let bench = Bench { host, cluster: lab.cluster(host)?, pod: Vec::new() };
    let wanted = Wanted::Policies(vec![policy("p", &[POD_A], B, dual(EIP_B))?]);
    let device = bench.cluster.tunnel.device.clone();
    let mut left = 0;
    for write in 0..8 {
        // A second refusal keeps it from tidying up after itself.
        let [first, second] = [Fault::Errno(105), Fault::Errno(105)];
        let faults = Faults::new().at_write(write, first).at_write(write + 1, second);
        let made = bench.make(&mut bench.open(&faults)?, &wanted);
        assert!(made.is_err(), "write {write}");
        let mut node = bench.open(&Faults::new())?;
        left += usize::from(node.datapath().mtu_of(&device)?.is_some());
        node.remove()?;
        assert_eq!(node.datapath().mtu_of(&device)?, None, "write {write}");
    }
    assert!(left > 0);
    Ok(())
}
