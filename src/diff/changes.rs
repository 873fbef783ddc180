//! A difference of two states, cut into steps in an order that is safe at every point.

mod shell;

use std::collections::BTreeSet;
use std::fmt;

use super::op::Op;
use crate::connection::Connection;
use crate::error::KernelError;
use crate::state::{Firewall, MarkBits};

/// A part of a change; the order of the variants is the order of the steps.
///
/// A pod's packet must never find a half-built path, whichever step was the last one made:
///
/// - What a packet meets late is made early and taken away late. The guards come before
///   everything, the routes before the marks that use them, and the maps are filled from the
///   verdict back to the source and emptied from the source on.
/// - What must move between two sets takes two transactions, the new place first. One commit of
///   nf_tables is all or nothing for its reader, but a packet makes several lookups and may make
///   the first before and the second after it.
/// - Within a step the order is that of the operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    /// A table that was put to sleep, in a transaction of its own: the kernel takes no new chains
    /// in that one.
    Wake,
    /// Table, sets and guarding chains, with nothing in the maps yet.
    Skeleton,
    /// The tunnel device, its addresses, forwarding entries and neighbours.
    Tunnel,
    /// The chain at the device's egress hook, and the gateways' Ethernet addresses that it looks
    /// up; what enters the tunnel keeps its mark from then on.
    Hook,
    /// Routes: those that are not of our making go, then the ones that refuse come, then the ones
    /// that send.
    Routes,
    /// Rules: those that are not of our making go, then the one that refuses comes, then those that
    /// lead to it past the ones that send, and these last.
    Rules,
    /// New sets, ways out, peers, egress IPs, exclusions.
    FillVerdicts,
    /// Rules of chains that look into the sets, now that those are visible to packets.
    Chains,
    /// Policies: their way out and the address they wear.
    FillPolicies,
    /// Classes: which policy a destination has.
    FillClasses,
    /// Sources: which class a pod has.
    FillSources,
    /// Sources that left.
    EmptySources,
    /// Classes that left.
    EmptyClasses,
    /// Policies that left.
    EmptyPolicies,
    /// Chains and rules of chains that look into sets which are about to go.
    EmptyVerdicts,
    /// On removal of everything, the device first: nothing comes in or goes out by the tunnel.
    DeleteTunnel,
    /// Rules that left, the other way round.
    DeleteRules,
    /// Routes that left, the ones that send before the ones that refuse.
    DeleteRoutes,
    /// Marks that the guards hold back or the hook looks up, now that no packet is under way that a
    /// rule had to catch; if there is to be no hook, what enters the tunnel loses its mark.
    EmptyGuards,
    /// The table at the device's egress hook, now that nothing comes by that needs it.
    DeleteHook,
    /// Neighbours, forwarding entries and addresses that left.
    DeletePeers,
    /// Connections that go on to another gateway.
    MarkConnections,
    /// Answers to connections that are about to end.
    HoldAnswers,
    /// Connections that the table would now treat otherwise.
    EndConnections,
    /// Guards that hold marks of packets and connections back which are made no more, now that
    /// there are none left: the bits of the marks were changed, or what connections' marks say.
    RetireGuards,
    /// The table, last of all: its guards hold until nothing is left to guard.
    DeleteTable,
}

/// Operations that are made together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// Which part of the change it is.
    pub phase: Phase,
    /// The operations, in order: one nf_tables transaction, or requests one after another.
    pub ops: Vec<Op>,
}

/// What became of a step: how many operations were made, and which were refused.
pub(crate) type Made = (usize, Vec<(Op, KernelError)>);

/// Operations that turn one state into another, in an order that is safe at every point.
///
/// `Display` writes a line per command, as an operator would type them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[must_use]
pub struct Changes {
    steps: Vec<Step>,
}

impl Changes {
    pub(crate) fn new(steps: Vec<Step>) -> Self {
        Self { steps }
    }

    /// Ends connections, and holds answers to them back where the table has the sets for that;
    /// those that need no more than another mark get it and go on.
    ///
    /// An answer that is under way when its connection ends would open it the other way round,
    /// and the opener's packets would then leave as answers to that: with its own address.
    pub(crate) fn end(
        connections: &BTreeSet<Connection>,
        table: Option<&Firewall>,
        due_mark: impl Fn(&Connection) -> Option<MarkBits>,
    ) -> Self {
        let has = |set| table.is_some_and(|table| table.sets.contains(&set));
        let mut marked = Vec::new();
        let mut connections = connections.clone();
        connections.retain(|connection| {
            let bits = due_mark(connection);
            marked.extend(bits.map(|bits| Op::MarkConnection(*connection, bits)));
            bits.is_none()
        });
        let held = connections.iter().filter(|one| one.can_turn_around() && has(one.answers()));
        // Elements of one set share messages.
        let mut held: Vec<_> = held.copied().collect();
        held.sort_by_key(Connection::answers);
        let held: Vec<_> = held.into_iter().map(Op::HoldAnswers).collect();
        let ended: Vec<_> = connections.iter().copied().map(Op::EndConnection).collect();
        let steps = [
            (Phase::MarkConnections, marked),
            (Phase::HoldAnswers, held),
            (Phase::EndConnections, ended),
        ];
        let steps = steps.into_iter().filter(|(_, ops)| !ops.is_empty());
        Self { steps: steps.map(|(phase, ops)| Step { phase, ops }).collect() }
    }

    /// Makes step after step, until one is refused something.
    pub(crate) fn make(&self, mut step: impl FnMut(&Step) -> Made) -> Result<(), ApplyError> {
        let mut applied = 0;
        for part in &self.steps {
            let (made, refused) = step(part);
            applied += made;
            if !refused.is_empty() {
                let skipped = self.len() - applied - refused.len();
                return Err(ApplyError { applied, refused, skipped });
            }
        }
        Ok(())
    }

    /// Parts the changes before guards go that may still be needed.
    pub(crate) fn before_guards_go(mut self) -> (Self, Self) {
        let at = self.steps.partition_point(|step| step.phase < Phase::RetireGuards);
        let last = self.steps.split_off(at);
        (self, Self { steps: last })
    }

    /// Appends other changes, that were or are to be made after these.
    pub fn extend(&mut self, other: Self) {
        self.steps.extend(other.steps);
    }

    /// The steps, in order; none is empty.
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// All operations, in order.
    pub fn ops(&self) -> impl Iterator<Item = &Op> {
        self.steps.iter().flat_map(|step| &step.ops)
    }

    /// Number of operations.
    pub fn len(&self) -> usize {
        self.steps.iter().map(|step| step.ops.len()).sum()
    }

    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }
}

impl fmt::Display for Changes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.ops().try_for_each(|op| writeln!(f, "{op}"))
    }
}

/// Changes that were not all made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApplyError {
    /// Operations done.
    pub applied: usize,
    /// Operations refused, all of one step, each with the kernel's error.
    ///
    /// Of an nf_tables transaction that was refused nothing is done, also of its other
    /// operations; those count as skipped.
    pub refused: Vec<(Op, KernelError)>,
    /// Operations of the same transaction or of later steps, not tried or undone.
    pub skipped: usize,
}

impl fmt::Display for ApplyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { applied, refused, skipped } = self;
        write!(f, "{applied} changes made, {} refused, {skipped} not tried", refused.len())?;
        match refused.first() {
            Some((_, error)) => write!(f, "; first refusal: {error}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for ApplyError {}
