//! A simulated kernel in memory, with the kernel's error checks.

mod cluster;
mod datapath;
pub(crate) mod explain;
pub(crate) mod iptables;
mod notify;
mod ops;
pub(crate) mod packet;
pub(crate) mod path;
mod shared;
mod side_effects;
#[cfg(test)]
mod tests;
pub(crate) mod trace;
mod watch;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::connection::Connection;
use crate::count::Counts;
use crate::datapath::{Among, Datapath, Drift, Known, Observed, OnConnection};
use crate::diff::changes::{ApplyError, Changes, Made, Step};
use crate::diff::op::Op;
use crate::error::KernelError;
use crate::event::Component;
use crate::state::{Elements, Missing, Set, State, Stmt};
use crate::types::Family;
use packet::{Frame, Packet};
use path::conntrack::Conntrack;
use path::{HostContext, Walk};
use trace::{Fate, Trace};

pub use cluster::{ClusterTrace, Outcome, SimCluster, SimNode};
pub use datapath::SimDatapath;
use notify::{ChangeSet, Freshness, Notifier, Writer};
use ops::{Errno, make};
pub use shared::SharedSim;
use side_effects::{LinkSnapshot, follow};
pub use watch::SimWatch;

/// A [`Datapath`] in memory that refuses an operation where the kernel would refuse it.
///
/// An added object must not exist, a deleted object must exist, a referenced object cannot be
/// deleted, and an nf_tables transaction is all or nothing. Changes of the VXLAN device have the
/// kernel's side effects. Its deletion removes its addresses, FDB entries, neighbours and routes.
/// Setting it down removes routes, neighbours and IPv6 addresses. A new MAC address removes the
/// neighbours. An MTU too small for IPv6 removes everything of IPv6. Deleting the last IPv4 address
/// removes IPv4 routes and neighbours.
///
/// The simulator also forwards packets: [`send`](Self::send) evaluates the rules of its state for
/// one packet, and tracks connections. No unsolicited replies are simulated, and no ICMP errors
/// (RFC 792, RFC 4443), which the kernel assigns to the connection that they report on. Packets
/// consist of headers only, without options; counters count the bytes of these headers.
///
/// For tests of a program that runs while other programs write, or that dies half-way, pass the
/// simulator to a [`SharedSim`].
///
/// Only objects of this crate are simulated: no other tables, rules, routes or interfaces, no
/// sysctls but `rp_filter`, no underlay. No connection expires, and no packet is lost or delayed.
///
/// ```
/// use egress_datapath::{Cluster, EgressIp, EgressPolicy, Node, NodeName, PolicyId, Reconciler};
/// use egress_datapath::Sim;
///
/// let node = |name, underlay: &str, tunnel: &str| -> Result<Node, Box<dyn std::error::Error>> {
///     Ok(Node::new(NodeName::new(name)?, vec![underlay.parse()?], vec![tunnel.parse()?]))
/// };
/// let cluster = Cluster::new(
///     NodeName::new("a")?,
///     vec![node("a", "10.10.0.11", "172.31.0.11/16")?, node("b", "10.10.0.12", "172.31.0.12/16")?],
///     vec!["10.244.0.0/16".parse()?],
/// );
/// let policy = EgressPolicy::new(
///     PolicyId::new("default/p1")?,
///     vec!["10.244.1.10/32".parse()?],
///     EgressIp::V4("198.51.100.200".parse()?),
/// )
/// .with_gateway(NodeName::new("b")?);
/// let mut egress = Reconciler::new(Sim::new());
/// assert!(egress.reconcile(&cluster, [&policy])?.changes.len() > 0);
/// assert!(egress.reconcile(&cluster, [&policy])?.changes.is_empty());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct Sim {
    state: State,
    /// Number of operations to apply before one fails, and the fault of that one.
    fault: Option<(usize, Fault)>,
    conntrack: Conntrack,
    /// Counter values other than zero; may include counters that no longer exist.
    counts: Counts,
    around: HostContext,
    /// Number of transactions and edits of the nf_tables table.
    generation: u32,
    /// Freshness of the simulator's own datapath in its last read.
    freshness: Freshness,
    notifier: Notifier,
}

impl Sim {
    /// A simulated kernel without objects of this crate.
    pub fn new() -> Self {
        Self::default()
    }

    /// A simulated kernel that holds this state.
    pub fn with_state(state: State) -> Self {
        Self { state, ..Self::default() }
    }

    /// Sets the host addresses around the simulated kernel.
    #[must_use]
    pub fn with_host(self, around: HostContext) -> Self {
        Self { around, ..self }
    }

    /// Sets the families that the simulated network stack lacks, and removes their objects.
    pub fn set_missing_families(&mut self, families: &BTreeSet<Family>) {
        self.edit(|state| {
            let missing = Missing { families: families.clone(), ..state.missing.clone() };
            state.leave_out(&missing);
        });
    }

    /// Sets whether the simulated kernel has flowtables, and removes the flowtable if it has none.
    ///
    /// The simulated kernel offloads no connection.
    pub fn set_flowtables(&mut self, present: bool) {
        self.edit(|state| {
            let missing = Missing { flowtables: !present, ..state.missing.clone() };
            state.leave_out(&missing);
        });
    }

    /// Sends a packet that comes from a pod of this node, or from the network.
    ///
    /// Its connection is tracked, so that later packets take the same path and [`Packet::reply`] is
    /// translated back.
    pub fn send(&mut self, packet: Packet) -> Trace {
        self.walk(packet, |walk| walk.arrive(packet)).0
    }

    /// Sends a packet with conntrack state `INVALID`, such as a TCP segment outside its window.
    ///
    /// Such a packet belongs to no connection and cannot open one.
    pub fn send_invalid(&mut self, packet: Packet) -> Trace {
        self.walk(packet, |walk| walk.arrive_invalid(packet)).0
    }

    /// Receives a tunnel frame of another node.
    pub fn receive(&mut self, frame: &Frame) -> Trace {
        self.walk(frame.packet, |walk| walk.receive(frame)).0
    }

    /// The values of the counters that the tables have.
    fn counted(&self) -> Counts {
        let elements = self.state.elements().into_iter().flat_map(Elements::rest);
        let counted = elements.filter_map(|(key, _)| key.counted());
        let stands = |one| self.counts.policies.get(&one).copied().unwrap_or_default();
        let policies = counted.map(|one| (one, stands(one))).collect();
        let mut drops = BTreeMap::new();
        for (chain, (_, rules)) in self.state.tables().flat_map(|table| &table.chains) {
            if rules.iter().any(|rule| rule.0.contains(&Stmt::Counter)) {
                let name = chain.to_string();
                let count = self.counts.drops.get(&name).copied().unwrap_or_default();
                drops.insert(name, count);
            }
        }
        Counts { policies, drops }
    }

    /// The connections among some that this node forwards.
    fn forwarded(&self, among: Among<'_>) -> Vec<Connection> {
        let wanted =
            |found: &Connection| !self.around.local.contains(&found.peer) && among.has(found);
        self.conntrack.connections().filter(wanted).collect()
    }

    /// Deletes all conntrack entries, as `conntrack -F` does.
    pub fn forget_connections(&mut self) {
        self.conntrack.clear();
    }

    /// Advances the time, which expires elements with a timeout: the blocked replies.
    pub fn pass(&mut self, time: Duration) {
        self.conntrack.held.pass(time);
    }

    /// Walks a packet through this node; returns its trace, and the packet as forwarded.
    fn walk(
        &mut self,
        packet: Packet,
        go: impl FnOnce(&mut Walk<'_>) -> (Fate, Packet),
    ) -> (Trace, Packet) {
        let mut walk = Walk {
            state: &self.state,
            conntrack: &mut self.conntrack,
            counts: &mut self.counts,
            around: &self.around,
            reasons: Vec::new(),
        };
        let (fate, after) = go(&mut walk);
        (Trace { packet, reasons: walk.reasons, fate }, after)
    }

    /// The state that the simulated kernel holds.
    pub const fn state(&self) -> &State {
        &self.state
    }

    /// Mutable access to the state, without the kernel's side effects and without notifications.
    ///
    /// Listeners are told that notifications were lost. [`edit`](Self::edit) makes a change as
    /// another program would.
    pub fn state_mut(&mut self) -> &mut State {
        self.generation = self.generation.wrapping_add(1);
        self.tell(
            Writer::Stranger,
            &ChangeSet { anything: true, unnotified: true, ..ChangeSet::default() },
        );
        &mut self.state
    }

    /// Edits the state as another program would, with the kernel's side effects.
    ///
    /// An interface that goes down loses its routes, for example.
    ///
    /// ```
    /// use egress_datapath::{Datapath, Sim};
    /// use egress_datapath::datapath::{Known, Observed, observe};
    /// # use egress_datapath::state::Vxlan;
    /// # let link = Vxlan {
    /// #     name: "egress.vxlan".parse()?, vni: 100, port: 7789, local: "10.10.0.11".parse()?,
    /// #     underlay: None, mac: "66:00:00:00:00:01".parse()?, mtu: 1450, rp_filter: 2, up: true,
    /// #     intact: true,
    /// # };
    /// # let mut held = egress_datapath::State { link: Some(link), ..Default::default() };
    /// # held.addresses = ["172.31.0.11/16".parse()?, "fd11::11/112".parse()?].into();
    /// let mut kernel = Sim::with_state(held);
    /// let before = observe(&mut kernel)?;
    /// assert_eq!(kernel.observe(Known::Installed(&before))?, Observed::Unchanged);
    /// // `ip link set egress.vxlan down`
    /// kernel.edit(|state| state.link.iter_mut().for_each(|link| link.up = false));
    /// let Observed::Installed(now) = kernel.observe(Known::Installed(&before))? else { panic!() };
    /// assert_eq!(now.addresses.len(), 1, "the kernel removed the IPv6 address");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn edit(&mut self, edit: impl FnOnce(&mut State)) {
        let before = self.state.clone();
        edit(&mut self.state);
        follow(&LinkSnapshot::of(&before), &mut self.state);
        let mut written = ChangeSet::between(&before, &self.state);
        if (&before.firewall, &before.hook) != (&self.state.firewall, &self.state.hook) {
            self.generation = self.generation.wrapping_add(1);
            self.keep_held();
            written.parts.insert(Component::Firewall);
        }
        written.unnotified =
            before.ipsets != self.state.ipsets || before.xtables != self.state.xtables;
        self.tell(Writer::Stranger, &written);
    }

    /// Reports lost notifications to all listeners, as a kernel does whose socket buffers overflow.
    pub fn lose_events(&mut self) {
        self.tell(Writer::Stranger, &ChangeSet { anything: true, ..ChangeSet::default() });
    }

    /// Runs a write and notifies all listeners but the writer.
    fn write_as(&mut self, writer: Writer, write: impl FnOnce(&mut Self) -> Made) -> Made {
        if !self.notifier.is_read() && writer == Writer::Own {
            return write(self);
        }
        let (before, generation) = (self.state.routing(), self.generation);
        let made = write(self);
        let mut written = ChangeSet::between(&before, &self.state);
        if generation != self.generation {
            written.parts.insert(Component::Firewall);
        }
        written.unnotified = self.has_iptables();
        self.tell(writer, &written);
        made
    }

    fn tell(&mut self, writer: Writer, written: &ChangeSet) {
        if writer != Writer::Own {
            self.freshness.hear(written);
        }
        self.notifier.tell(writer, written);
    }

    fn has_iptables(&self) -> bool {
        !self.state.ipsets.is_empty() || !self.state.xtables.is_empty()
    }

    /// Possible drift for a listener with this freshness; changes of iptables produce no
    /// notification.
    fn drift_by(&self, freshness: Freshness) -> Drift {
        if self.has_iptables() { Drift::Unknown } else { freshness.drift() }
    }

    /// Refuses one operation with an error number (positive), even if the operation is valid.
    ///
    /// `after` is the number of operations from now on that are applied before it.
    ///
    /// ```
    /// use egress_datapath::{Changes, Datapath, Sim, State};
    /// # let wanted = State { firewall: Some(Default::default()), ..State::default() };
    /// let mut kernel = Sim::new();
    /// kernel.refuse(0, 12);
    /// let changes = Changes::between(kernel.state(), &wanted);
    /// assert!(kernel.apply(&changes).is_err(), "out of memory");
    /// assert!(kernel.apply(&changes).is_ok(), "once is enough");
    /// ```
    pub const fn refuse(&mut self, after: usize, errno: i32) {
        self.fault = Some((after, Fault::Refuse(errno)));
    }

    /// Applies one operation and reports failure, as if the acknowledgement were lost.
    ///
    /// The other operations of the same transaction are applied, too.
    ///
    /// ```
    /// use egress_datapath::{Changes, Datapath, Sim, State};
    /// # let wanted = State { firewall: Some(Default::default()), ..State::default() };
    /// let mut kernel = Sim::new();
    /// kernel.lose_ack(0);
    /// let changes = Changes::between(kernel.state(), &wanted);
    /// assert!(kernel.apply(&changes).is_err());
    /// assert_eq!(kernel.state(), &wanted, "it was made");
    /// ```
    pub const fn lose_ack(&mut self, after: usize) {
        self.fault = Some((after, Fault::LoseAck));
    }

    /// The fault of the current operation, if one is due.
    const fn met(&mut self) -> Option<Fault> {
        match &mut self.fault {
            Some((0, fault)) => {
                let fault = *fault;
                self.fault = None;
                Some(fault)
            }
            Some((after, _)) => {
                *after -= 1;
                None
            }
            None => None,
        }
    }

    /// Applies an operation, or refuses it.
    fn op(&mut self, op: &Op) -> Result<(), Errno> {
        match op {
            Op::MarkConnection(connection, bits) => {
                self.conntrack.mark(connection, *bits);
                Ok(())
            }
            Op::EndConnection(connection) => {
                self.conntrack.end(connection);
                Ok(())
            }
            Op::BlockReplies(connection) if self.has(connection.blocked_replies()) => {
                self.conntrack.held.hold(connection);
                Ok(())
            }
            op if op.is_xtables() => iptables::make(&mut self.state, op),
            op => {
                let made = make(&mut self.state, op);
                if let Op::DeleteTable(_) | Op::DeleteSet(_) = op {
                    self.keep_held();
                }
                if let (Op::AddElement(key, _), Ok(())) = (op, made) {
                    // The element is new, and starts at zero whatever the counter was before.
                    key.counted().and_then(|one| self.counts.policies.remove(&one));
                }
                if let (Op::SetRules(chain, _), Ok(())) = (op, made) {
                    self.counts.drops.remove(&chain.to_string());
                }
                made
            }
        }
    }

    /// Removes the elements with timeouts of sets that no longer exist.
    fn keep_held(&mut self) {
        let firewall = self.state.firewall.as_ref();
        let sets = |set| firewall.is_some_and(|table| table.sets.contains(&set));
        self.conntrack.held.keep(sets);
    }

    fn has(&self, set: Set) -> bool {
        self.state.firewall.as_ref().is_some_and(|firewall| firewall.sets.contains(&set))
    }

    /// Applies a step: a transaction all or nothing, of other requests those that are accepted.
    fn step(&mut self, step: &Step) -> Made {
        let transaction = step.ops.first().is_some_and(Op::is_nft);
        let now = || (self.state.clone(), self.conntrack.held.clone(), self.counts.clone());
        let before = transaction.then(now);
        let (mut refused, mut lost) = (Vec::new(), None);
        let mut ended = None;
        for op in &step.ops {
            // Elements of one set are one message, which ends with the first refused element.
            let message = elements(op);
            if message.is_some() && message == ended {
                continue;
            }
            ended = None;
            let made = match self.met() {
                Some(Fault::Refuse(errno)) => Err(errno),
                Some(Fault::LoseAck) => {
                    lost = Some((op.clone(), KernelError::answer(op, LOST)));
                    self.op(op)
                }
                None => self.op(op),
            };
            if let Err(errno) = made {
                ended = message;
                refused.push((op.clone(), KernelError::refused(op, errno)));
            }
        }
        if transaction && refused.is_empty() {
            self.generation = self.generation.wrapping_add(1);
        }
        if let (true, Some(lost)) = (refused.is_empty(), lost) {
            let known = if transaction { 0 } else { step.ops.len() - 1 };
            return (known, vec![lost]);
        }
        match before {
            Some(before) if !refused.is_empty() => {
                (self.state, self.conntrack.held, self.counts) = before;
                (0, refused)
            }
            _ => (step.ops.len() - refused.len(), refused),
        }
    }
}

/// Fault of an operation.
#[derive(Clone, Copy, Debug)]
enum Fault {
    Refuse(Errno),
    LoseAck,
}

const LOST: &str = "the kernel's answer was lost: whether the changes were made must be read";

/// The set whose elements an operation adds (`true`) or deletes (`false`).
fn elements(op: &Op) -> Option<(Set, bool)> {
    match op {
        Op::AddElement(key, _) => Some((key.set(), true)),
        Op::DeleteElement(key, _) => Some((key.set(), false)),
        Op::BlockReplies(connection) => Some((connection.blocked_replies(), true)),
        _ => None,
    }
}

impl Datapath for Sim {
    fn observe(&mut self, known: Known<'_>) -> Result<Observed, KernelError> {
        if let Known::Installed(state) = known {
            match self.drift_by(self.freshness) {
                Drift::None => return Ok(Observed::Unchanged),
                Drift::Rest => {
                    self.freshness.rest = true;
                    let firewall = state.firewall.clone();
                    return Ok(State { firewall, ..self.state.routing() }.into());
                }
                Drift::Unknown => {}
            }
        }
        self.freshness = Freshness { table: true, rest: true };
        Ok(self.state.clone().into())
    }

    fn connections(
        &mut self,
        among: Among<'_>,
        each: &mut OnConnection<'_>,
    ) -> Result<(), KernelError> {
        self.forwarded(among).into_iter().for_each(each);
        Ok(())
    }

    fn counters(&mut self) -> Result<Counts, KernelError> {
        Ok(self.counted())
    }

    fn apply(&mut self, changes: &Changes) -> Result<(), ApplyError> {
        let made = changes.make(|step| self.write_as(Writer::Own, |sim| sim.step(step)));
        if made.is_err() {
            self.freshness = Freshness::default();
        }
        made
    }
}
