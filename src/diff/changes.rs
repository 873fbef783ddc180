//! The difference of two states: steps in an order that is safe at every point.

use std::collections::BTreeSet;
use std::fmt;

use super::op::Op;
use crate::connection::Connection;
use crate::error::KernelError;
use crate::state::{Firewall, MarkBits};
use crate::types::Family;

/// A phase of a change; the order of the variants is the order of the steps.
///
/// A pod's packet must never be steered by an incomplete configuration, whichever step was the last
/// one made:
///
/// - Objects that the packet path uses late are created early and deleted late. The guard rules
///   come before everything, and the routes before the marks that use them. The maps are filled in
///   the order from verdict to source, and emptied in the order from source to verdict.
/// - A move between two sets takes two transactions; the element is first added to the new set. One
///   nf_tables commit is atomic for its reader, but a packet makes several lookups, and may make
///   the first before the commit and the second after it.
/// - Within a step the order is that of the operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Phase {
    /// Clears the dormant flag of a table, in a transaction of its own.
    ///
    /// The kernel accepts no new chains in that transaction.
    Wake,
    /// Creates the table, sets and guard chains, with empty maps.
    Skeleton,
    /// Creates the VXLAN device, its addresses, FDB entries and neighbours.
    Tunnel,
    /// Creates the chain at the egress hook, and the gateways' MAC addresses that it looks up.
    ///
    /// From then on packets that enter the tunnel keep their mark.
    Hook,
    /// Changes routes.
    ///
    /// Routes that this crate did not create are deleted first, then `unreachable` and `throw`
    /// routes are added, then routes via a gateway.
    Routes,
    /// Changes routing rules.
    ///
    /// Rules that this crate did not create are deleted first. Then the fallback rule is added,
    /// then the guard rules, which skip to it past the gateways' rules, and the gateways' rules
    /// last.
    Rules,
    /// Adds sets, policy actions, peers, egress IPs and exclusions.
    FillVerdicts,
    /// Changes rules of chains that look up the sets, now that the sets are visible to packets.
    Chains,
    /// Adds policies: their action and their SNAT address.
    FillPolicies,
    /// Adds classes: the policy of each destination.
    FillClasses,
    /// Adds sources: the class of each pod.
    FillSources,
    /// Adds egress IPs to interfaces of the host, now that packets to them are translated back.
    Claim,
    /// Deletes sources.
    EmptySources,
    /// Deletes classes.
    EmptyClasses,
    /// Deletes policies.
    EmptyPolicies,
    /// Deletes chains and rules that look up sets which are about to be deleted.
    EmptyVerdicts,
    /// Deletes egress IPs from interfaces of the host, now that no packet leaves with them.
    Release,
    /// Deletes the VXLAN device when everything is removed.
    ///
    /// This comes before routes and rules, so that no packet enters or leaves the tunnel.
    DeleteTunnel,
    /// Deletes routing rules, in the reverse order of their creation.
    DeleteRules,
    /// Deletes routes, those via a gateway before `unreachable` and `throw` routes.
    DeleteRoutes,
    /// Deletes marks that the guard rules match or the hook looks up.
    ///
    /// No packet that a routing rule had to match is in flight any more. If the egress hook is
    /// removed, packets that enter the tunnel lose their mark from here on.
    EmptyGuards,
    /// Deletes the table at the egress hook, which no packet needs any more.
    DeleteHook,
    /// Deletes neighbours, FDB entries and addresses.
    DeletePeers,
    /// Sets the marks of connections that are steered to another gateway.
    MarkConnections,
    /// Blocks replies to connections that are about to end.
    BlockReplies,
    /// Ends stale connections, which the table would now treat differently.
    EndConnections,
    /// Deletes guard rules for marks that are no longer set.
    ///
    /// No packet or connection has such a mark any more. This happens where the bits of the marks
    /// were changed, or the meaning of connection marks.
    RetireGuards,
    /// Deletes the table, last of all.
    ///
    /// Its guard rules are in force until everything else is removed.
    DeleteTable,
}

/// A step: operations of one phase that are made together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// The phase of the step.
    pub phase: Phase,
    /// The operations, in order: one nf_tables transaction, or single requests one after another.
    pub ops: Vec<Op>,
}

/// The result of a step: the number of operations made, and the refused ones.
pub(crate) type Made = (usize, Vec<(Op, KernelError)>);

/// Operations that must not be made, because others were refused.
#[derive(Debug, Default)]
struct Blocked {
    /// True if any operation was refused.
    any: bool,
    /// True if an operation was refused that all later ones depend on.
    all: bool,
    /// Families of refused iptables and ipset operations.
    families: BTreeSet<Family>,
}

impl Blocked {
    /// Adds a refused operation.
    ///
    /// The tunnel, the egress hook, routes and rules block nothing but the end of the guard rules: a
    /// packet that is steered without them is dropped by the guard rules, where a packet that is
    /// not classified would leave with another source.
    fn add(&mut self, phase: Phase, op: &Op) {
        self.any = true;
        let hook = matches!(phase, Phase::Hook | Phase::DeleteHook);
        match op.xtables_family() {
            Some(family) => drop(self.families.insert(family)),
            None => self.all |= op.is_conntrack() || op.is_nft() && !hook,
        }
    }

    /// Returns whether an operation must not be made after a refusal.
    fn holds_back(&self, phase: Phase, op: &Op) -> bool {
        if self.all || phase >= Phase::RetireGuards {
            return true;
        }
        match op.xtables_family() {
            Some(family) => self.families.contains(&family),
            // The nf_tables tables are of both families, and what is deleted may be in use.
            None => !self.families.is_empty() && (op.is_nft() || phase >= Phase::EmptySources),
        }
    }
}

/// Operations that turn one state into another, in an order that is safe at every point.
///
/// `Display` prints one command per line, quoted for a shell. The output is meant for reading, not
/// for execution as a whole: one transaction of the library is thousands of commands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[must_use]
pub struct Changes {
    steps: Vec<Step>,
}

impl Changes {
    pub(crate) fn new(steps: Vec<Step>) -> Self {
        Self { steps }
    }

    /// Ends connections, and blocks replies to them where the table has the sets for that.
    ///
    /// Connections that only need another mark get it, and are not ended. A reply that is in flight
    /// when its connection ends would open it in the reverse direction, and the client's packets
    /// would then leave as replies to it: with the client's own address.
    pub(crate) fn end(
        connections: &BTreeSet<Connection>,
        table: Option<&Firewall>,
        due_mark: impl Fn(&Connection) -> Option<MarkBits>,
    ) -> Self {
        let has = |set| table.is_some_and(|table| table.sets.contains(&set));
        // Its packets to the pod come through the tunnel, and the pod's answers go back there.
        let returned =
            |one: &Connection| table.is_some_and(|table| table.is_returned_mark(one.mark));
        let mut marked = Vec::new();
        let mut connections = connections.clone();
        connections.retain(|connection| {
            let bits = due_mark(connection);
            marked.extend(bits.map(|bits| Op::MarkConnection(*connection, bits)));
            bits.is_none()
        });
        let held = connections
            .iter()
            .filter(|one| one.can_be_reopened_by_reply() && !returned(one))
            .filter(|one| has(one.blocked_replies()));
        // Sorted by set, because elements of one set share netlink messages.
        let mut held: Vec<_> = held.copied().collect();
        held.sort_by_key(Connection::blocked_replies);
        let held: Vec<_> = held.into_iter().map(Op::BlockReplies).collect();
        let ended: Vec<_> = connections.iter().copied().map(Op::EndConnection).collect();
        let steps = [
            (Phase::MarkConnections, marked),
            (Phase::BlockReplies, held),
            (Phase::EndConnections, ended),
        ];
        let steps = steps.into_iter().filter(|(_, ops)| !ops.is_empty());
        Self { steps: steps.map(|(phase, ops)| Step { phase, ops }).collect() }
    }

    /// Runs the steps in order; after a refusal, those that do not depend on what was refused.
    pub(crate) fn make(&self, mut step: impl FnMut(&Step) -> Made) -> Result<(), ApplyError> {
        let (mut applied, mut all, mut blocked) = (0, Vec::new(), Blocked::default());
        for part in &self.steps {
            let phase = part.phase;
            let (made, refused) = if blocked.any {
                let goes = part.ops.iter().filter(|op| !blocked.holds_back(phase, op));
                let ops: Vec<_> = goes.cloned().collect();
                if ops.is_empty() {
                    continue;
                }
                step(&Step { phase, ops })
            } else {
                step(part)
            };
            applied += made;
            for (op, _) in &refused {
                blocked.add(phase, op);
            }
            all.extend(refused);
        }
        if all.is_empty() {
            return Ok(());
        }
        let skipped = self.len() - applied - all.len();
        Err(ApplyError { applied, refused: all, skipped })
    }

    /// Splits off the last steps, which delete guard rules that may still be needed.
    pub(crate) fn before_guards_go(mut self) -> (Self, Self) {
        let at = self.steps.partition_point(|step| step.phase < Phase::RetireGuards);
        let last = self.steps.split_off(at);
        (self, Self { steps: last })
    }

    /// Appends other changes, which were or are to be made after these.
    pub fn extend(&mut self, other: Self) {
        self.steps.extend(other.steps);
    }

    /// Returns the steps, in order; none is empty.
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// Returns all operations, in order.
    pub fn ops(&self) -> impl Iterator<Item = &Op> {
        self.steps.iter().flat_map(|step| &step.ops)
    }

    /// Returns the number of operations.
    pub fn len(&self) -> usize {
        self.steps.iter().map(|step| step.ops.len()).sum()
    }

    /// Returns whether there are no operations.
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }
}

impl fmt::Display for Changes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.ops().try_for_each(|op| writeln!(f, "{op}"))
    }
}

/// An error of [`Datapath::apply`](crate::Datapath::apply): not all changes were made.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ApplyError {
    /// Number of operations done.
    pub applied: usize,
    /// Refused operations, each with the kernel's error.
    ///
    /// An nf_tables transaction that is refused changes nothing. Its other operations are not done
    /// either, and count as skipped.
    pub refused: Vec<(Op, KernelError)>,
    /// Number of operations not done: of the same transaction or of later steps.
    pub skipped: usize,
}

impl ApplyError {
    /// Returns whether everything was made except parts of the tunnel, routes and rules.
    ///
    /// Packets of the policies concerned are dropped; all others are treated as wanted.
    pub(crate) fn is_about_routing_alone(&self) -> bool {
        let routing = |op: &Op| !op.is_nft() && !op.is_xtables() && !op.is_conntrack();
        self.skipped == 0 && self.refused.iter().all(|(op, _)| routing(op))
    }

    /// Creates an error of these operations.
    pub const fn new(applied: usize, refused: Vec<(Op, KernelError)>, skipped: usize) -> Self {
        Self { applied, refused, skipped }
    }
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
