//! One fault at every call of simulated nodes: an error that says what happened or success, never a
//! panic; no pod's packet leaves with a wrong source, whatever was done by then; and the next call
//! puts everything right.
//!
//! Of the faults that can happen to a call one in so many is tried, in turn, but every moment to die
//! at; `EGRESS_FAULTS=all cargo test --test pure faults` tries them all.

mod nodes;
mod scenarios;

use std::io::Write;
use std::time::Instant;
use std::{env, io, thread};

use common::numbered;
use egress_datapath::faults::{Call, Fault, Faults, Subsystem};
use egress_datapath::sim::{SharedSim, SimDatapath};
use egress_datapath::{Changes, Error, Reconciler, Report, State};

use nodes::{Nodes, Progress, send_all};
use scenarios::{Scenario, Wanted, scenarios};

/// Of other faults than a death one in so many is tried.
const SELDOM: usize = 8;

/// Calls after which a node must be right again.
const TRIES: usize = 2;

const ENOMEM: i32 = 12;

/// A fault that can be planned again and again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    KillBefore,
    KillAfter,
    Errno,
    Refuse,
    LoseReply,
    CutReply,
    TornDump,
    AckWithoutCommit,
    /// Somebody else takes this away.
    Foreign(What),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    Routing,
    Device,
    Elements,
    Everything,
}

impl Kind {
    /// All that can happen to a call.
    fn of(call: Call) -> Vec<Self> {
        let what = [What::Routing, What::Device, What::Elements, What::Everything];
        let mut kinds = vec![Self::KillBefore, Self::KillAfter];
        kinds.extend([Self::Errno, Self::Refuse, Self::LoseReply, Self::CutReply]);
        kinds.extend((!call.writes).then_some(Self::TornDump));
        let transaction = call.writes && call.subsystem == Subsystem::Firewall;
        kinds.extend(transaction.then_some(Self::AckWithoutCommit));
        kinds.extend(what.map(Self::Foreign));
        kinds
    }

    fn is_death(self) -> bool {
        matches!(self, Self::KillBefore | Self::KillAfter)
    }

    /// Whether what keeps packets from leaving is gone with it.
    fn opens(self) -> bool {
        matches!(self, Self::Foreign(What::Everything | What::Elements))
    }

    fn fault(self, kernel: &SharedSim) -> Fault {
        match self {
            Self::KillBefore => Fault::KillBefore,
            Self::KillAfter => Fault::KillAfter,
            Self::Errno => Fault::Errno(ENOMEM),
            Self::Refuse => Fault::Refuse(ENOMEM),
            Self::LoseReply => Fault::LoseReply,
            Self::CutReply => Fault::CutReply,
            Self::TornDump => Fault::TornDump,
            Self::AckWithoutCommit => Fault::AckWithoutCommit,
            Self::Foreign(what) => {
                let kernel = kernel.clone();
                Fault::ForeignWrite(Box::new(move || kernel.edit(|state| what.goes(state))))
            }
        }
    }
}

impl What {
    fn goes(self, state: &mut State) {
        match self {
            Self::Routing => {
                state.routes.clear();
                state.rules.clear();
            }
            Self::Device => {
                state.link.iter_mut().for_each(|link| link.up = false);
            }
            Self::Elements => {
                state.firewall.iter_mut().for_each(|table| table.elements.retain(|_, _| false));
            }
            Self::Everything => *state = State::default(),
        }
    }
}

type Egress = Reconciler<SimDatapath>;

/// Who makes the change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Process {
    /// One that was just started, and reads everything.
    New,
    /// One that made what is there, and hears what others do.
    Running,
}

/// A change of one node of a scenario, again and again.
struct Bench<'a> {
    scenario: &'a Scenario,
    /// Index in the order of nodes.
    turn: usize,
    process: Process,
    /// All nodes, right before the change.
    begin: &'a Nodes,
}

/// What was seen of the points of one bench.
#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    points: usize,
    packets: usize,
}

impl Bench<'_> {
    fn node(&self) -> usize {
        self.scenario.order[self.turn]
    }

    fn open(&self, kernel: &SharedSim, faults: &Faults) -> Egress {
        self.begin.egress(kernel.open().with_faults(faults))
    }

    fn make(&self, egress: &mut Egress, wanted: &Wanted) -> Result<Report, Error> {
        wanted.make(self.begin.cluster(self.node()), egress)
    }

    /// A kernel where the change is about to be made, and who makes it.
    fn start(&self, faults: &Faults) -> (SharedSim, Egress) {
        let kernel = SharedSim::new(self.begin.sim(self.node()).clone());
        let mut egress = self.open(&kernel, faults);
        if self.process == Process::Running {
            let before = &self.scenario.before[self.node()];
            let changes = self.make(&mut egress, before).unwrap().changes;
            assert!(changes.is_empty(), "{}", self.scenario.name);
        }
        (kernel, egress)
    }

    /// The calls that the change takes when nothing goes wrong, those before it, and what is there
    /// then.
    fn rehearse(&self) -> (Vec<Call>, usize, State) {
        let faults = Faults::new();
        let (kernel, mut egress) = self.start(&faults);
        let begun = faults.calls().len();
        let _report = self.make(&mut egress, &self.scenario.after[self.node()]).unwrap();
        (faults.calls(), begun, numbered(kernel.state()))
    }

    /// All points, or what was wrong at the first that was.
    fn all_points(&self) -> Result<Counts, String> {
        let (calls, begun, after) = self.rehearse();
        let all = env::var_os("EGRESS_FAULTS").is_some_and(|value| value == "all");
        let mut counts = Counts::default();
        for (at, call) in calls.iter().enumerate().skip(begun) {
            for (number, kind) in Kind::of(*call).into_iter().enumerate() {
                let death = kind.is_death() && self.process == Process::New;
                if all || death || (at + number + self.turn) % SELDOM == 0 {
                    counts.points += 1;
                    let packets = self.point(at, *call, kind, &after).map_err(|error| {
                        let Self { scenario, turn, process, .. } = self;
                        let name = scenario.name;
                        format!(
                            "{name}, turn {turn}, {process:?}: {kind:?} at {call:?} {at}: {error}"
                        )
                    });
                    counts.packets += packets?;
                }
            }
        }
        Ok(counts)
    }

    /// A change with a fault: how many packets were sent meanwhile, and what was wrong.
    fn point(&self, at: usize, call: Call, kind: Kind, after: &State) -> Result<usize, String> {
        let faults = Faults::new();
        let (kernel, mut egress) = self.start(&faults);
        let faults = faults.at_call(at, kind.fault(&kernel));
        let wanted = &self.scenario.after[self.node()];
        let mut last = self.make(&mut egress, wanted);
        if faults.pending() > 0 {
            return Err("the fault did not happen".into());
        }
        let kept = kind == Kind::TornDump
            || matches!(kind, Kind::Foreign(_))
            || kind == Kind::LoseReply && call.subsystem == Subsystem::Routing && !call.writes;
        if !kept && last.is_ok() && !is_heard_of(call) {
            return Err("it was not noticed".into());
        }
        if let Err(Error::Plan(error)) = &last {
            return Err(format!("a fault is no contradiction: {error}"));
        }
        let mut packets = 0;
        if !kind.opens() {
            let sims = self.begin.sims(Some((self.node(), &kernel)));
            packets += send_all(sims, self.scenario, self.turn, Progress::Under(&kernel))?;
        }
        if kind.is_death() || at % 2 == 1 {
            egress = self.open(&kernel, &faults);
            last = self.make(&mut egress, wanted);
        }
        let mut tries = 0;
        while last.is_err() || numbered(kernel.state()) != *after {
            tries += 1;
            if tries > TRIES {
                let wrong = Changes::between(&numbered(kernel.state()), after);
                return Err(format!("{last:?}; still to do:\n{wrong}"));
            }
            last = self.make(&mut egress, wanted);
        }
        let again = self.make(&mut egress, wanted).map_err(|error| error.to_string())?.changes;
        if !again.is_empty() {
            return Err(format!("it wrote again:\n{again}"));
        }
        let sims = self.begin.sims(Some((self.node(), &kernel)));
        let remembered = kind != Kind::Foreign(What::Everything);
        Ok(packets + send_all(sims, self.scenario, self.turn, Progress::Done { remembered })?)
    }
}

/// Whether an error is an answer to this: then all is read.
const fn is_heard_of(call: Call) -> bool {
    !call.writes && matches!(call.subsystem, Subsystem::Firewall)
}

/// All of a scenario, turn by turn.
fn run(scenario: &Scenario, caching: bool) -> Result<Counts, String> {
    let mut sum = Counts::default();
    let mut nodes = Nodes::new(scenario, caching);
    for turn in 0..scenario.order.len() {
        for process in [Process::New, Process::Running] {
            let found = Bench { scenario, turn, process, begin: &nodes }.all_points()?;
            sum =
                Counts { points: sum.points + found.points, packets: sum.packets + found.packets };
        }
        nodes.make(scenario, turn);
    }
    nodes.check_the_end(scenario)?;
    Ok(sum)
}

#[test]
fn every_fault_at_every_call_converges() {
    let begun = Instant::now();
    let scenarios = scenarios();
    let all: Vec<_> = thread::scope(|scope| {
        let start = |(number, scenario)| scope.spawn(move || run(scenario, number % 2 == 1));
        let running: Vec<_> = scenarios.iter().enumerate().map(start).collect();
        running.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let wrong: Vec<_> = all.iter().filter_map(|one| one.as_ref().err()).cloned().collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n\n"));
    let all: Vec<_> = all.into_iter().flatten().collect();
    let points: usize = all.iter().map(|counts| counts.points).sum();
    let packets: usize = all.iter().map(|counts| counts.packets).sum();
    assert!(all.iter().all(|counts| counts.points > 50 && counts.packets > 1000), "{all:?}");
    let _unheard = writeln!(
        io::stderr(),
        "{} changes of simulated nodes, {points} faults, {packets} packets, none with a wrong \
         source; {:.1?}",
        scenarios.len(),
        begun.elapsed()
    );
}

#[test]
fn wrong_source_detected() {
    for scenario in scenarios().iter().filter(|one| one.name.starts_with("change the egress")) {
        let nodes = Nodes::new(scenario, false);
        let kernel = SharedSim::new(nodes.sim(0).clone());
        kernel.edit(|state| What::Routing.goes(state));
        let sent = |kernel: &SharedSim| {
            let sims = nodes.sims(Some((0, kernel)));
            send_all(sims, scenario, 1, Progress::Under(kernel))
        };
        assert_eq!(sent(&kernel), Ok(16), "the guards hold them");
        kernel.edit(|state| What::Everything.goes(state));
        assert!(sent(&kernel).unwrap_err().contains("left as 10.244.1.1"));
    }
}
