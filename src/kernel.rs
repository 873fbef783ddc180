//! Kernel backend: programs one network namespace over netlink.

mod conntrack;
mod monitor;
#[cfg(test)]
pub(crate) mod mutated;
pub(crate) mod netlink;
pub(crate) mod nft;
mod ownership;
pub(crate) mod rtnetlink;

use std::collections::BTreeSet;
use std::net::IpAddr;

use crate::alloc::{MarkPool, TablePool, TableRange};
use crate::connection::Connection;
use crate::count::Counts;
use crate::datapath::{Among, Datapath, Drift, Known, Observed, OnConnection};
use crate::diff::changes::{ApplyError, Changes, Made, Step};
use crate::diff::op::Op;
use crate::error::KernelError;
use crate::mark::MarkLayout;
use crate::reconcile::{Error, Reconciler};
use crate::state::{Firewall, Missing, State, TableFamily};
use crate::types::DeviceName;
#[cfg(test)]
pub(crate) use harness::mutate;

use monitor::Monitor;
pub use monitor::Watch;
#[cfg(feature = "testing")]
use netlink::fault_injector::Tap;
use netlink::socket::Socket;
use nft::{Between, Sizes, Terms};
use ownership::Hold;
pub use ownership::{Ownership, Protection};
use rtnetlink::socket::RouteSocket;
pub use rtnetlink::tables::KernelTables;

/// Number of expected elements from which on the kernel is asked for them key by key.
///
/// Below it, a listing of the sets takes no longer.
const MANY: usize = 8192;

/// Datapath of one network namespace of the kernel.
///
/// Its sockets stay bound to the network namespace that the opening thread was in: enter the
/// namespace, open, and move the value to any thread. A call blocks only while the kernel carries
/// out its requests: microseconds for a change, milliseconds for a large table.
///
/// Reading links, routes and rules needs no privilege; everything else needs `CAP_NET_ADMIN` in the
/// user namespace that owns the network namespace.
#[derive(Debug)]
pub struct KernelDatapath {
    pub(crate) routing: RouteSocket,
    pub(crate) netfilter: Socket,
    hold: Hold,
    monitor: Monitor,
    /// Features that the rules can do without and the kernel lacks; `None` until they are known.
    missing: Option<Missing>,
}

impl KernelDatapath {
    /// Opens sockets in the calling thread's network namespace, with shared ownership of the table.
    ///
    /// # Errors
    ///
    /// The kernel feature that is missing.
    pub fn open() -> Result<Self, KernelError> {
        Self::open_as(Ownership::Shared)
    }

    /// Opens sockets in the network namespace of the calling thread.
    ///
    /// # Errors
    ///
    /// The kernel feature that is missing. With exclusive ownership also: another process has
    /// exclusive ownership of the namespace or of the table ([`KernelError::holder`] is that
    /// process), or the table was created by a datapath with shared ownership.
    pub fn open_as(ownership: Ownership) -> Result<Self, KernelError> {
        let (routing, mut netfilter) = (RouteSocket::open()?, nft::open()?);
        let hold = Hold::take(ownership, &mut netfilter)?;
        // Opened last: the port of a process's first netlink socket is its PID, which identifies
        // the owner of the table to other programs.
        let ports = [routing.port(), netfilter.port()];
        let monitor = Monitor::open(&routing, nft::open()?, ports)
            .map_err(|error| KernelError::io("open the listening sockets", &error))?;
        Ok(Self { routing, netfilter, hold, monitor, missing: None })
    }

    /// Protection of the nf_tables table from changes by other programs.
    pub const fn protection(&self) -> Protection {
        self.hold.protection
    }

    /// Starts a watch for changes that other programs make to the datapath's objects.
    ///
    /// It watches the network namespace of this datapath, whatever the calling thread's namespace
    /// is.
    ///
    /// # Errors
    ///
    /// A missing privilege, or `EBUSY` while another watch of this datapath exists.
    pub fn watch(&self) -> Result<Watch, KernelError> {
        self.monitor.watch()
    }

    /// Interface that has this address, and its MTU in bytes; `None` if no interface has it.
    pub fn device_of(&mut self, address: IpAddr) -> Result<Option<(DeviceName, u32)>, KernelError> {
        self.routing.device_of(address)
    }

    /// MTU of an interface in bytes; `None` if no interface has this name.
    pub fn mtu_of(&mut self, device: &DeviceName) -> Result<Option<u32>, KernelError> {
        let found = self.routing.device_named(&format_args!("ip link show {device}"), device)?;
        Ok(found.map(|device| device.mtu))
    }

    /// Adds the owner of the table to errors that deny permission.
    fn name_the_owner(&mut self, refused: nft::Refused) -> nft::Refused {
        if !refused.iter().any(|(_, error)| error.is_denied()) {
            return refused;
        }
        let Ok(Some((_, Some(owner)))) =
            nft::flags_and_owner(&mut self.netfilter, TableFamily::Inet)
        else {
            return refused;
        };
        // The port is the owner's PID only if this is the first netlink socket of that process; an
        // owner of this crate has the lock, too, which has its PID.
        let owner = nft::locked_by(&mut self.netfilter).ok().flatten().unwrap_or(owner);
        refused.into_iter().map(|(index, error)| (index, error.with_holder(owner))).collect()
    }

    /// Reads the whole state.
    pub(crate) fn read(&mut self, known: Known<'_>) -> Result<State, KernelError> {
        self.monitor.lock().begin();
        let mut state = self.read_rest()?;
        let expected = known.elements().filter(|elements| elements.len() >= MANY);
        let (firewall, generation) = match known {
            Known::WithoutElements => nft::observe_objects(&mut self.netfilter)?,
            _ => nft::observe_at(&mut self.netfilter, expected)?,
        };
        let families = state.missing.families;
        state.missing = Missing { families, ..self.missing_of_rules(firewall.as_ref())? };
        self.monitor.lock().table_known(generation);
        state.firewall = firewall;
        Ok(state)
    }

    /// Returns the features that the rules can do without and the kernel lacks.
    ///
    /// Features that the table has are not looked for.
    fn missing_of_rules(&mut self, table: Option<&Firewall>) -> Result<Missing, KernelError> {
        if let Some(known) = self.missing.as_ref() {
            // A module may have been installed since: it is noticed by the first flowtable.
            if !known.flowtables || !nft::has_flowtable(&mut self.netfilter)? {
                return Ok(known.clone());
            }
        }
        let missing = if table.is_some_and(Firewall::has_all_optional) {
            Missing::default()
        } else {
            nft::missing_of_rules(&mut self.netfilter)?
        };
        Ok(self.missing.insert(missing).clone())
    }

    /// Reads everything except the nf_tables table of family `inet`.
    fn read_rest(&mut self) -> Result<State, KernelError> {
        self.monitor.lock().begin_routing();
        let missing = self.missing.clone().unwrap_or_default();
        let mut state = State { missing, ..State::default() };
        self.routing.observe(&mut state)?;
        state.hook = nft::observe_hook(&mut self.netfilter)?;
        self.monitor.lock().routing_known();
        Ok(state)
    }

    /// Parts that may have changed since the last read, apart from changes by this datapath.
    pub(crate) fn drift(&mut self) -> Drift {
        let current = nft::generation(&mut self.netfilter).ok();
        self.monitor.lock().drift(current)
    }

    /// Applies one step; after a refusal the state has to be read again.
    pub(crate) fn step(&mut self, step: &Step, sizes: &Sizes) -> Made {
        let made = self.attempt(step, sizes);
        if !made.1.is_empty() {
            self.monitor.lock().end();
            // The kernel may lack what it seemed to have.
            self.missing = None;
        }
        made
    }

    /// Commits one transaction; recreates sets that are too small for it with a larger size first.
    fn commit(&mut self, ops: &[Op], sizes: &Sizes) -> Result<(), nft::Refused> {
        let table_flags = self.hold.table_flags;
        let terms = Terms { table_flags, sizes: Some(sizes), only_at: None };
        self.monitor.lock().will_commit(ops.len());
        let made = nft::commit_as(&mut self.netfilter, ops, &terms).or_else(|refused| {
            let full = nft::full(ops, &refused);
            if full.is_empty() {
                return Err(refused);
            }
            // The transaction may be small, but the sets that are recreated may be large.
            self.monitor.lock().will_commit(usize::MAX);
            let first = nft::enlarge(&mut self.netfilter, &full, sizes, refused)?;
            let next = nft::commit_as(&mut self.netfilter, ops, &terms)?;
            Ok(next.and_then(|next| first.and_then(next)))
        });
        self.committed(made.as_ref().ok().copied().flatten());
        made.map(drop)
    }

    fn committed(&mut self, between: Option<Between>) {
        if self.monitor.lock().committed(between) {
            let current = nft::generation(&mut self.netfilter).ok();
            self.monitor.lock().resumed(current);
        }
    }

    /// Applies one step: one nf_tables transaction, or its requests one by one.
    fn attempt(&mut self, step: &Step, sizes: &Sizes) -> Made {
        if step.ops.first().is_some_and(Op::is_nft) {
            return match self.commit(&step.ops, sizes) {
                Ok(()) => (step.ops.len(), Vec::new()),
                Err(refused) => {
                    let refused = self.name_the_owner(refused).into_iter();
                    let op = |index: usize| step.ops.get(index).or(step.ops.first()).cloned();
                    (0, refused.filter_map(|(index, error)| Some((op(index)?, error))).collect())
                }
            };
        }
        let refused = if step.ops.first().is_some_and(Op::is_conntrack) {
            conntrack::make(&mut self.netfilter, &step.ops)
        } else {
            self.routing.make(&step.ops)
        };
        let refused: Vec<_> = refused
            .into_iter()
            .filter_map(|(index, error)| Some((step.ops.get(index)?.clone(), error)))
            .collect();
        (step.ops.len() - refused.len(), refused)
    }
}

#[cfg(feature = "testing")]
impl KernelDatapath {
    /// Adds fault injection to the datapath, from its next call on.
    #[must_use]
    pub fn with_faults(mut self, faults: &crate::faults::Faults) -> Self {
        self.tap(faults);
        self
    }

    pub(crate) fn tap(&mut self, faults: &crate::faults::Faults) {
        self.routing.socket().set_tap(Tap::of_routing(faults.clone()));
        self.netfilter.set_tap(Tap::of_netfilter(faults.clone()));
    }
}

impl Reconciler<KernelDatapath> {
    /// Opens a reconciler for the network namespace of the calling thread.
    ///
    /// Ownership of the nf_tables table is shared, so other programs may change it;
    /// [`open_as`](Self::open_as) can prevent that. Routing tables are allocated from the range,
    /// without those that a rule or route in this namespace uses.
    ///
    /// # Errors
    ///
    /// A missing privilege, or a missing kernel feature.
    pub fn open(marks: MarkLayout, tables: TableRange) -> Result<Self, Error> {
        Self::open_as(Ownership::Shared, marks, tables)
    }

    /// Opens a reconciler with exclusive or shared ownership of the nf_tables table.
    ///
    /// # Errors
    ///
    /// [`Error::Observe`] if a privilege or a part of the kernel is missing, or if another process
    /// has exclusive ownership; the error names that process.
    pub fn open_as(
        ownership: Ownership,
        marks: MarkLayout,
        tables: TableRange,
    ) -> Result<Self, Error> {
        let datapath = KernelDatapath::open_as(ownership).map_err(Error::Observe)?;
        let in_use = KernelTables::open().map_err(Error::Observe)?;
        let tables = TablePool::with_probe(tables, in_use);
        Ok(Self::with_allocators(datapath, MarkPool::new(marks), tables))
    }
}

impl Datapath for KernelDatapath {
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
        self.read(known).map(Observed::from)
    }

    fn connections(
        &mut self,
        among: Among<'_>,
        each: &mut OnConnection<'_>,
    ) -> Result<(), KernelError> {
        let (routing, mut local) = (&mut self.routing, None);
        conntrack::connections(&mut self.netfilter, among, &mut |connection| {
            // Where nothing is tracked, the addresses are not read.
            let local = local.get_or_insert_with(|| routing.local_addresses());
            if local.as_ref().is_ok_and(|local| is_forwarded(&connection, local)) {
                each(connection);
            }
        })?;
        local.transpose().map(drop)
    }

    fn counters(&mut self) -> Result<Counts, KernelError> {
        nft::counts(&mut self.netfilter)
    }

    fn announce(&mut self) -> Result<(), KernelError> {
        self.routing.announce_claims()
    }

    fn apply(&mut self, changes: &Changes) -> Result<(), ApplyError> {
        if let Some(first) = changes.ops().next() {
            self.hold.may_change(&mut self.netfilter).map_err(|error| ApplyError {
                applied: 0,
                refused: vec![(first.clone(), error)],
                skipped: changes.len().saturating_sub(1),
            })?;
        }
        let sizes = Sizes::of(changes.ops());
        changes.make(|step| self.step(step, &sizes))
    }
}

/// Whether this node forwards the connection.
///
/// Packets of connections that start or end on the node pass no hook that would steer them.
fn is_forwarded(connection: &Connection, local: &BTreeSet<IpAddr>) -> bool {
    !local.contains(&connection.peer) && !local.contains(&connection.source)
}
