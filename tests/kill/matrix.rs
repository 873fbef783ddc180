//! One scenario, and a death before and after every write of it.

use std::collections::BTreeSet;
use std::fmt;

use common::backend::{backend, datapath};
use common::fleet::feed;
use common::numbered;
use egress_datapath::datapath::observe;
use egress_datapath::testing::Faults;
use egress_datapath::testing::lab::{Host, Lab, Netns};
use egress_datapath::{Backend, Changes, Datapath, Family, Ownership, State};

use crate::Result;
use crate::allowed::{At, Cni, Progress, allowed};
use crate::child::{Done, Moment, make, open, open_kernel, run};
use crate::scenarios::{Marks, Pod, Scenario, Source, Talk, Wanted};
use crate::wire::{Flow, Wire, by_port, take_answers};

const MASQUERADE: &str = "table inet cni {
    chain postrouting {
        type nat hook postrouting priority 100;
        ip saddr 10.244.0.0/16 ip daddr != 10.244.0.0/16 masquerade
        ip6 saddr fd44::/16 ip6 daddr != fd44::/16 masquerade
    }
}";

/// What was counted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Counts {
    pub(crate) writes: usize,
    pub(crate) points: usize,
    pub(crate) sent: usize,
    pub(crate) arrived: usize,
    pub(crate) leaked: usize,
    pub(crate) lost: usize,
}

impl Counts {
    pub(crate) const NONE: Self =
        Self { writes: 0, points: 0, sent: 0, arrived: 0, leaked: 0, lost: 0 };

    pub(crate) const fn add(&mut self, other: Self) {
        self.writes += other.writes;
        self.points += other.points;
        self.sent += other.sent;
        self.arrived += other.arrived;
        self.leaked += other.leaked;
        self.lost += other.lost;
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { writes, points, sent, arrived, leaked, lost } = self;
        write!(f, "{writes} writes, {points} points, {sent} packets, {arrived} arrived, ")?;
        write!(f, "{leaked} leaked, {lost} lost")
    }
}

pub(crate) struct Matrix<'a> {
    scenario: &'a Scenario,
    number: usize,
    /// Of all moments to die at, one of so many.
    every: usize,
    cni: Cni,
    lab: Lab,
    wire: Wire,
    before: Vec<State>,
    after: Vec<State>,
    pub(crate) counts: Counts,
    /// What went wrong, in words.
    pub(crate) wrong: Vec<String>,
}

impl<'a> Matrix<'a> {
    pub(crate) fn new(
        lab: Lab,
        scenario: &'a Scenario,
        number: usize,
        every: usize,
        cni: Cni,
    ) -> Result<Self> {
        let wire = Wire::open(&lab)?;
        let mut matrix = Self {
            scenario,
            number,
            every,
            cni,
            lab,
            wire,
            before: Vec::new(),
            after: Vec::new(),
            counts: Counts::NONE,
            wrong: Vec::new(),
        };
        if cni == Cni::Masquerades {
            for host in matrix.lab.nodes() {
                masquerade(&host.netns)?;
            }
        }
        let [before, after] = scenario.marks;
        matrix.before = matrix.rehearse(&scenario.before, before)?;
        matrix.after = matrix.rehearse(&scenario.after, after)?;
        Ok(matrix)
    }

    fn rehearse(&self, wanted: &[Wanted], marks: Marks) -> Result<Vec<State>> {
        let hosts = self.lab.nodes().into_iter().zip(wanted);
        hosts.map(|(host, wanted)| self.bring(host, wanted, marks)).collect()
    }

    /// Brings a node to hold what it should, and says what that is.
    fn bring(&self, host: &Host, wanted: &Wanted, marks: Marks) -> Result<State> {
        let cluster = marks.of(self.lab.cluster(host)?);
        let brought = host.netns.run(|| {
            let brought = || -> Result<State> {
                let mut node = open(&cluster, self.scenario.ownership, &Faults::new())?;
                make(&mut node, &cluster, wanted)?;
                Ok(observe(node.datapath())?)
            };
            brought().map_err(|error| error.to_string())
        })?;
        Ok(brought?)
    }

    pub(crate) fn run(&mut self) -> Result {
        for step in 0..self.scenario.order.len() {
            let Some(done) = self.point(step, None, None)? else {
                return Err("a process that nobody killed was killed".into());
            };
            self.counts.writes += done.writes;
            let moments =
                (0..done.writes).flat_map(|write| [Moment::Before(write), Moment::After(write)]);
            // Scenarios and nodes begin at different ones.
            for moment in moments.skip((self.number + step) % self.every).step_by(self.every) {
                self.point(step, Some(moment), done.end)?;
            }
        }
        Ok(())
    }

    /// Begins anew, comes to a node and lets its process die, or not; what it did if not.
    fn point(
        &mut self,
        step: usize,
        moment: Option<Moment>,
        end: Option<usize>,
    ) -> Result<Option<Done>> {
        self.reset()?;
        let [established, first, second] = self.flows()?;
        self.wire.establish(established.iter())?;
        let order = self.scenario.order.clone();
        let node = *order.get(step).ok_or("no such step")?;
        for earlier in order.get(..step).unwrap_or_default() {
            let host = self.host(*earlier)?;
            let [_, marks] = self.scenario.marks;
            self.bring(host, self.scenario.after.get(*earlier).ok_or("no such node")?, marks)?;
        }
        self.counts.points += 1;
        let mut done = run(self.host(node)?, self.number, node, moment)?;
        let killed = done.is_none();
        if killed {
            let ended = match (moment, end) {
                (Some(Moment::Before(write)), Some(end)) => write > end,
                (Some(Moment::After(write)), Some(end)) => write >= end,
                _ => false,
            };
            let at = At { step, progress: Progress::Killed { ended } };
            self.probe(&both(&established, &first), at, moment)?;
            done = run(self.host(node)?, self.number, node, None)?;
        }
        match done {
            Some(Done { changes: [_, 0], .. }) => {}
            other => self.say(step, moment, &format!("it has not converged: {other:?}")),
        }
        let at = At { step, progress: Progress::Done };
        self.probe(&both(&established, &second), at, moment)?;
        self.compare(step, node, moment)?;
        self.wire.forget();
        Ok(if killed { None } else { done })
    }

    /// All nodes as they were before, whatever they are.
    fn reset(&self) -> Result {
        let claims = self.before.iter().chain(&self.after).any(|state| !state.claims.is_empty());
        for host in self.lab.nodes().into_iter().filter(|_| claims) {
            // Where another node is to add them.
            let mut datapath = self.datapath(host)?;
            let found = observe(&mut datapath)?;
            let released = State { claims: BTreeSet::new(), ..found.clone() };
            datapath.apply(&Changes::between(&found, &released))?;
        }
        for (host, before) in self.lab.nodes().into_iter().zip(&self.before) {
            let mut datapath = self.datapath(host)?;
            let found = observe(&mut datapath)?;
            datapath.apply(&Changes::between(&found, before))?;
        }
        Ok(())
    }

    fn datapath(&self, host: &Host) -> Result<Box<dyn Datapath>> {
        if self.scenario.ownership == Ownership::Exclusive {
            let opened = host.netns.run(|| open_kernel(Ownership::Exclusive))??;
            return Ok(Box::new(opened));
        }
        Ok(datapath(&host.netns, backend())?)
    }

    /// Flows that are there before the change, and two times new ones.
    fn flows(&mut self) -> Result<[Vec<Flow>; 3]> {
        let (mut established, mut new) = (Vec::new(), [Vec::new(), Vec::new()]);
        for (number, talk) in self.scenario.talks.iter().enumerate() {
            let pod = pod(&self.lab, talk.pod);
            let speaks = talk.before != Source::Nothing;
            let kinds = if speaks { &[true, false, false][..] } else { &[false, false] };
            let mut flows = self.wire.flows(pod, number, talk.to, kinds)?.into_iter();
            if speaks {
                established.extend(flows.by_ref().take(4));
            }
            let [first, second] = &mut new;
            first.extend(flows.by_ref().take(4));
            second.extend(flows);
        }
        let [first, second] = new;
        Ok([established, first, second])
    }

    /// Sends, and looks at every source that the server saw.
    fn probe(&mut self, flows: &[&Flow], at: At, moment: Option<Moment>) -> Result {
        let (scenario, over) = (self.scenario, at.is_over(self.scenario));
        let must = |flow: &Flow| {
            let arrives = |talk: &Talk| {
                let opens = over && !flow.established && talk.after != Source::Nothing;
                let is_killed = matches!(at.progress, Progress::Killed { .. });
                opens || scenario.must_arrive(talk, flow.established, is_killed)
            };
            scenario.talks.get(flow.talk).is_some_and(arrives)
        };
        let seen = self.wire.probe(flows, must)?;
        let ports = by_port(&seen);
        take_answers(flows.iter().filter(|flow| ports.contains_key(&flow.port)))?;
        let (mut leaks, mut lost) = (Vec::new(), Vec::new());
        for flow in flows {
            let Some(talk) = scenario.talks.get(flow.talk) else { continue };
            let allowed = allowed(scenario, self.cni, flow, at);
            let came = ports.get(&flow.port).map_or(&[][..], Vec::as_slice);
            self.counts.arrived += usize::from(!came.is_empty());
            leaks.extend(came.iter().filter(|source| !allowed.contains(source)).map(|source| {
                let established = if flow.established { "established" } else { "new" };
                format!("leak: {established} {} flow of {talk:?} came as {source}", flow.proto)
            }));
            if came.is_empty() && must(flow) {
                lost.push(format!(
                    "lost: {} {talk:?} to {}, established {}",
                    flow.proto, flow.to, flow.established
                ));
            }
        }
        self.counts.sent += flows.len();
        self.counts.leaked += leaks.len();
        self.counts.lost += lost.len();
        for sentence in leaks.into_iter().chain(lost) {
            self.say(at.step, moment, &format!("{:?}: {sentence}", at.progress));
        }
        Ok(())
    }

    /// Whether the node holds what it should and nothing else of ours.
    fn compare(&mut self, step: usize, node: usize, moment: Option<Moment>) -> Result {
        let mut datapath = self.datapath(self.host(node)?)?;
        let found = numbered(observe(&mut datapath)?);
        let wanted = numbered(self.after.get(node).cloned().unwrap_or_default());
        if found != wanted {
            let left = Changes::between(&found, &wanted);
            self.say(step, moment, &format!("there is something left to do:\n{left}"));
        }
        Ok(())
    }

    fn say(&mut self, step: usize, moment: Option<Moment>, what: &str) {
        let node = self.scenario.order.get(step);
        let name = self.scenario.name;
        self.wrong.push(format!("{name}, node {node:?}, killed {moment:?}: {what}"));
    }

    fn host(&self, node: usize) -> Result<&Host> {
        Ok(self.lab.nodes().get(node).copied().ok_or("no such node")?)
    }
}

/// Has a node translate what pods send, in the way of the backend: what others have at the place
/// of source NAT in a table of their own, iptables cannot be ahead of.
fn masquerade(netns: &Netns) -> Result {
    let Backend::Iptables(iptables) = backend() else {
        return feed(netns, "nft", &["-f", "-"], MASQUERADE);
    };
    for (family, pods) in [(Family::V4, "10.244.0.0/16"), (Family::V6, "fd44::/16")] {
        let rule = format!("*nat\n-A POSTROUTING -s {pods} ! -d {pods} -j MASQUERADE\nCOMMIT\n");
        let restore = format!("{}-restore", iptables.variant.command(family));
        feed(netns, &restore, &["--noflush", "-w"], &rule)?;
    }
    Ok(())
}

fn both<'a>(established: &'a [Flow], new: &'a [Flow]) -> Vec<&'a Flow> {
    established.iter().chain(new).collect()
}

fn pod(lab: &Lab, pod: Pod) -> &Netns {
    match pod {
        Pod::A => &lab.pod_a,
        Pod::Stranger => &lab.stranger,
        Pod::B => &lab.pod_b,
        Pod::C => &lab.pod_c,
    }
}
