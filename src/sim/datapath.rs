//! A datapath to a simulated kernel that several programs use.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::sync::Arc;

use super::notify::{Freshness, Listener, Writer};
use super::{LOST, SharedSim, Sim, SimWatch};
use crate::count::Counts;
use crate::datapath::{Among, Datapath, Drift, Known, Observed, OnConnection};
use crate::diff::changes::{ApplyError, Changes, Made, Step};
use crate::diff::op::Op;
use crate::error::{KernelError, errno};
use crate::faults::{Call, Fault, Faults, Subsystem};
use crate::state::{Firewall, NFT_TABLE, State, StrayKind};

/// Number of attempts to read objects that change meanwhile, as in the kernel's datapath.
const ATTEMPTS: usize = 5;

const DEAD: &str = "the process was killed by a fault";
const CUT: &str = "the answer ends in the middle";

/// A [`Datapath`] to a simulated kernel that other programs may write to, too.
///
/// [`SharedSim::open`] makes it. As the kernel's datapath does, it reads one kind of object after
/// the other, receives notifications of changes by other programs meanwhile, repeats a read of the
/// nf_tables table during which the generation changed, and skips reads of unchanged objects.
#[derive(Debug)]
pub struct SimDatapath {
    kernel: SharedSim,
    faults: Faults,
    writer: Writer,
    listener: Arc<Listener>,
    freshness: Freshness,
    dead: bool,
}

/// Result of a read call.
enum Answer<T> {
    Whole(T),
    /// The listed objects changed meanwhile, or part of the reply was lost.
    Torn,
}

impl SimDatapath {
    pub(super) fn new(kernel: SharedSim) -> Self {
        let mut sim = kernel.lock();
        let writer = sim.notifier.writer();
        let listener = Listener::new(writer, None);
        sim.notifier.add(&listener);
        drop(sim);
        let (faults, freshness) = (Faults::new(), Freshness::default());
        Self { kernel, faults, writer, listener, freshness, dead: false }
    }

    /// The same datapath, with faults from its next call on.
    #[must_use]
    pub fn with_faults(mut self, faults: &Faults) -> Self {
        self.faults = faults.clone();
        self
    }

    /// Starts a watch for changes that other programs make.
    ///
    /// # Errors
    ///
    /// `EBUSY` while another watch of this datapath exists, or the error of creating a file
    /// descriptor.
    pub fn watch(&self) -> Result<SimWatch, KernelError> {
        let what = "watch the simulated kernel";
        let mut sim = self.kernel.lock();
        if sim.notifier.has_watch(self.writer) {
            return Err(KernelError::refused(what, errno::EBUSY));
        }
        let made = SimWatch::of(self.writer).map_err(|error| match error.raw_os_error() {
            Some(errno) => KernelError::refused(what, errno),
            None => KernelError::answer(what, "no descriptor could be made"),
        });
        let (watch, listener) = made?;
        sim.notifier.add(&listener);
        Ok(watch)
    }

    /// The fault of the next call, before the call is made; an error if the call is not made.
    fn fault(&mut self, call: Call, what: &dyn Display) -> Result<Option<Fault>, KernelError> {
        if self.dead {
            return Err(KernelError::answer(what, DEAD));
        }
        match self.faults.next(call) {
            Some(Fault::Errno(errno) | Fault::Refuse(errno)) => {
                Err(KernelError::refused(what, errno))
            }
            Some(Fault::AckWithoutCommit) => Err(KernelError::answer(what, LOST)),
            Some(Fault::KillBefore) => {
                self.dead = true;
                Err(KernelError::answer(what, DEAD))
            }
            Some(Fault::ForeignWrite(write)) => {
                write();
                Ok(None)
            }
            other => Ok(other),
        }
    }

    /// Applies a fault to the reply of a call, where the request cannot be repeated.
    fn after(&mut self, fault: Option<&Fault>, what: &dyn Display) -> Result<(), KernelError> {
        match fault {
            Some(Fault::LoseReply) => {
                Err(KernelError::refused(what, errno::ENOBUFS)
                    .with_remedy("read whether it was made"))
            }
            Some(Fault::CutReply) => Err(KernelError::answer(what, CUT)),
            Some(Fault::KillAfter) => {
                self.dead = true;
                Err(KernelError::answer(what, DEAD))
            }
            _ => Ok(()),
        }
    }

    fn ask<T>(
        &mut self,
        subsystem: Subsystem,
        what: &dyn Display,
        take: impl FnOnce(&Sim) -> T,
    ) -> Result<Answer<T>, KernelError> {
        let fault = self.fault(Call { subsystem, writes: false }, what)?;
        let taken = take(&self.kernel.lock());
        match fault {
            Some(Fault::TornDump) => Ok(Answer::Torn),
            // The rtnetlink client repeats a dump whose reply was lost.
            Some(Fault::LoseReply) if subsystem == Subsystem::Routing => Ok(Answer::Torn),
            fault => self.after(fault.as_ref(), what).map(|()| Answer::Whole(taken)),
        }
    }

    /// Lists objects of one kind, and repeats a listing during which they changed.
    fn list<T>(
        &mut self,
        subsystem: Subsystem,
        what: &str,
        mut take: impl FnMut(&Sim) -> T,
    ) -> Result<T, KernelError> {
        for _ in 0..ATTEMPTS {
            if let Answer::Whole(taken) = self.ask(subsystem, &what, &mut take)? {
                return Ok(taken);
            }
        }
        Err(KernelError::refused(what, errno::EAGAIN)
            .with_words(Some("the objects changed while they were read".to_owned())))
    }

    fn routing<T>(&mut self, what: &str, take: fn(&State) -> T) -> Result<T, KernelError> {
        self.list(Subsystem::Routing, what, |sim| take(sim.state()))
    }

    fn read_rest(&mut self) -> Result<State, KernelError> {
        let (link, missing) =
            self.routing("ip link show", |all| (all.link.clone(), all.missing.clone()))?;
        let mut state = State { link, missing, ..State::default() };
        if state.link.is_some() {
            state.addresses = self.routing("ip address show", |all| all.addresses.clone())?;
            state.fdb = self.routing("bridge fdb show", |all| all.fdb.clone())?;
            state.neighbours = self.routing("ip neighbour show", |all| all.neighbours.clone())?;
        }
        state.claims = self.routing("ip address show proto 69", |all| all.claims.clone())?;
        let strays = |all: &State, kind| {
            all.strays.iter().filter(|stray| stray.kind == kind).cloned().collect::<BTreeSet<_>>()
        };
        (state.routes, state.strays) = self.list(Subsystem::Routing, "ip route show", |sim| {
            (sim.state.routes.clone(), strays(&sim.state, StrayKind::Route))
        })?;
        let (rules, more) = self.list(Subsystem::Routing, "ip rule show", |sim| {
            (sim.state.rules.clone(), strays(&sim.state, StrayKind::Rule))
        })?;
        state.rules = rules;
        state.strays.extend(more);
        let what = format!("nft list table netdev {NFT_TABLE}");
        state.hook = self.list(Subsystem::Firewall, &what, |sim| sim.state.hook.clone())?;
        self.freshness.rest = true;
        Ok(state)
    }

    fn generation(&mut self) -> Result<u32, KernelError> {
        self.list(Subsystem::Firewall, "nft list ruleset", |sim| sim.generation)
    }

    /// Reads the nf_tables table under one generation; repeats the read if the generation changed.
    fn read_table(&mut self) -> Result<Option<Firewall>, KernelError> {
        let what = format!("nft list table inet {NFT_TABLE}");
        for _ in 0..ATTEMPTS {
            let before = self.generation()?;
            let chains = self.ask(Subsystem::Firewall, &what, |sim| {
                sim.state.firewall.as_ref().map(|table| Firewall {
                    chains: table.chains.clone(),
                    flowtable: table.flowtable,
                    strays: table.strays.clone(),
                    dormant: table.dormant,
                    ..Firewall::default()
                })
            })?;
            let sets = self.ask(Subsystem::Firewall, &what, |sim| {
                let table = sim.state.firewall.as_ref();
                table.map(|table| (table.sets.clone(), table.elements.clone()))
            })?;
            let (Answer::Whole(table), Answer::Whole(sets)) = (chains, sets) else { continue };
            if self.generation()? == before {
                let whole = table.zip(sets);
                return Ok(whole.map(|(rules, (sets, elements))| Firewall {
                    sets,
                    elements,
                    ..rules
                }));
            }
        }
        Err(KernelError::answer(what, "other programs change nf_tables faster than it can be read"))
    }

    fn read(&mut self) -> Result<State, KernelError> {
        // Earlier changes by other programs are covered by the read that follows.
        let _heard = self.listener.take();
        self.freshness = Freshness::default();
        let mut state = self.read_rest()?;
        state.firewall = self.read_table()?;
        if self.kernel.lock().has_iptables() {
            let what = "ipset list";
            state.ipsets = self.list(Subsystem::Sets, what, |sim| sim.state.ipsets.clone())?;
            let what = "iptables-save";
            state.xtables =
                self.list(Subsystem::Iptables, what, |sim| sim.state.xtables.clone())?;
        }
        self.freshness.table = true;
        Ok(state)
    }

    pub(super) fn drift(&mut self) -> Drift {
        if self.freshness.table && self.generation().is_err() {
            self.freshness.table = false;
        }
        // A change before the generation reply has its notification queued before that reply.
        self.freshness.hear(&self.listener.take());
        self.kernel.lock().drift_by(self.freshness)
    }

    /// Applies a step: one transaction, or one request after the other.
    fn step(&mut self, step: &Step) -> Made {
        let made = match step.ops.first() {
            Some(first) if first.is_nft() => self.write(Subsystem::Firewall, first, step),
            _ => {
                let mut refused = Vec::new();
                for op in &step.ops {
                    let alone = Step { phase: step.phase, ops: vec![op.clone()] };
                    refused.extend(self.write(subsystem(op), op, &alone).1);
                }
                (step.ops.len() - refused.len(), refused)
            }
        };
        if !made.1.is_empty() {
            self.freshness = Freshness::default();
        }
        made
    }

    /// One write call; an error of the whole call is reported for the operation `first`.
    fn write(&mut self, subsystem: Subsystem, first: &Op, step: &Step) -> Made {
        let fault = match self.fault(Call { subsystem, writes: true }, first) {
            Ok(fault) => fault,
            Err(error) => return (0, vec![(first.clone(), error)]),
        };
        let made = self.kernel.lock().write_as(self.writer, |sim| sim.step(step));
        match self.after(fault.as_ref(), first) {
            Err(error) if made.1.is_empty() => (0, vec![(first.clone(), error)]),
            _ => made,
        }
    }
}

const fn subsystem(op: &Op) -> Subsystem {
    match op {
        Op::MarkConnection(..) | Op::EndConnection(_) => Subsystem::Connections,
        Op::AddXtChain(..) | Op::DeleteXtChain(..) | Op::EditXtChain(..) => Subsystem::Iptables,
        op if op.is_xtables() => Subsystem::Sets,
        op if op.is_nft() => Subsystem::Firewall,
        _ => Subsystem::Routing,
    }
}

impl Datapath for SimDatapath {
    fn observe(&mut self, known: Known<'_>) -> Result<Observed, KernelError> {
        if let Known::Installed(state) = known {
            match self.drift() {
                Drift::None => return Ok(Observed::Unchanged),
                Drift::Rest => {
                    let firewall = state.firewall.clone();
                    return Ok(State { firewall, ..self.read_rest()? }.into());
                }
                Drift::Unknown => {}
            }
        }
        self.read().map(Observed::from)
    }

    fn connections(
        &mut self,
        among: Among<'_>,
        each: &mut OnConnection<'_>,
    ) -> Result<(), KernelError> {
        let what = "conntrack -L";
        let found = self.list(Subsystem::Connections, what, |sim| sim.forwarded(among))?;
        found.into_iter().for_each(each);
        Ok(())
    }

    fn counters(&mut self) -> Result<Counts, KernelError> {
        self.list(Subsystem::Firewall, "nft list sets", Sim::counted)
    }

    fn apply(&mut self, changes: &Changes) -> Result<(), ApplyError> {
        changes.make(|step| self.step(step))
    }
}
