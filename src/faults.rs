//! Fault injection: planned faults of a datapath, and the calls at which they happen.
//!
//! It works for a simulated datapath, and with the feature `testing` for the kernel's. A call is
//! one unit of communication with the kernel: a read queries something, a write changes something.
//! For a [`SimDatapath`](crate::sim::SimDatapath) that is each kind of object that is listed, each
//! nf_tables transaction, and each other operation. For a kernel it is one rtnetlink request,
//! though many go in one datagram, one other datagram that a socket of the datapath sends, or one
//! run of an iptables tool. If the kernel does not get a datagram ([`Fault::Errno`]), it gets no
//! request of it.
//!
//! ```
//! use egress_datapath::faults::{Fault, Faults};
//! # use egress_datapath::{Cluster, EgressIp, EgressPolicy, Node, NodeName, PolicyId};
//! use egress_datapath::{Error, Reconciler};
//! use egress_datapath::sim::SharedSim;
//! # let node = Node::new(NodeName::new("a")?, vec!["10.10.0.11".parse()?], vec!["172.31.0.11/16".parse()?]);
//! # let cluster = Cluster::new(NodeName::new("a")?, vec![node], vec!["10.244.0.0/16".parse()?]);
//! # let policy = EgressPolicy::new(
//! #     PolicyId::new("p")?,
//! #     vec!["10.244.1.10/32".parse()?],
//! #     EgressIp::V4("198.51.100.200".parse()?),
//! # )
//! # .with_gateway(NodeName::new("a")?);
//!
//! let kernel = SharedSim::default();
//! let faults = Faults::new().at_write(3, Fault::KillAfter);
//! let mut egress = Reconciler::new(kernel.open().with_faults(&faults));
//! let died = egress.reconcile(&cluster, [&policy]);
//! assert!(matches!(died, Err(Error::Apply(_))));
//! assert_eq!(faults.pending(), 0, "all that was planned has happened");
//!
//! let mut successor = Reconciler::new(kernel.open());
//! successor.reconcile(&cluster, [&policy])?;
//! assert!(successor.reconcile(&cluster, [&policy])?.changes.is_empty());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// A fault that happens at a call.
pub enum Fault {
    /// The system call fails with this error number; the kernel gets nothing.
    Errno(i32),
    /// The kernel refuses the request with this error number, and changes nothing.
    Refuse(i32),
    /// The kernel does what is requested, but the first datagram of its reply is lost (`ENOBUFS`).
    LoseReply,
    /// The kernel acknowledges all operations of a transaction, but commits nothing.
    ///
    /// The end message of the transaction is lost before it reaches the kernel.
    AckWithoutCommit,
    /// Another program changes the objects during a dump.
    ///
    /// One object is missing, and the reply signals it as the kernel does for this kind of object.
    TornDump,
    /// The first datagram of the reply is truncated.
    CutReply,
    /// Another program makes this change right before the call.
    ForeignWrite(Box<dyn FnOnce() + Send>),
    /// The process is killed right before the call.
    ///
    /// After that a simulated datapath does nothing and returns an error: drop it, and
    /// [open](crate::sim::SharedSim::open) another one.
    KillBefore,
    /// The process is killed right after the call.
    KillAfter,
}

impl fmt::Debug for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Errno(errno) => f.debug_tuple("Errno").field(errno).finish(),
            Self::Refuse(errno) => f.debug_tuple("Refuse").field(errno).finish(),
            Self::LoseReply => f.write_str("LoseReply"),
            Self::AckWithoutCommit => f.write_str("AckWithoutCommit"),
            Self::TornDump => f.write_str("TornDump"),
            Self::CutReply => f.write_str("CutReply"),
            Self::ForeignWrite(_) => f.write_str("ForeignWrite"),
            Self::KillBefore => f.write_str("KillBefore"),
            Self::KillAfter => f.write_str("KillAfter"),
        }
    }
}

/// The kernel subsystem or the tool that a call goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Subsystem {
    /// Links, addresses, neighbours, routes and rules (rtnetlink).
    Routing,
    /// The `nf_tables` table.
    Firewall,
    /// Tracked connections (conntrack).
    Connections,
    /// The sets of `ipset`.
    Sets,
    /// A run of `iptables-save` or `iptables-restore`.
    ///
    /// Of all faults only error numbers and kills happen there.
    Iptables,
}

/// A call: one read or write of a subsystem.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Call {
    /// The subsystem.
    pub subsystem: Subsystem,
    /// True for a write, false for a read.
    pub writes: bool,
}

/// The planned faults of one datapath, and a record of the calls it has made.
///
/// Clones share the plan. A fault happens once. A fault at a call that is never made, or that does
/// not fit its call, stays [pending](Self::pending).
#[derive(Clone, Debug, Default)]
pub struct Faults(Arc<Mutex<Plan>>);

#[derive(Debug, Default)]
struct Plan {
    calls: Vec<Call>,
    writes: usize,
    sending: HashMap<Subsystem, Duration>,
    planned: Vec<(At, Fault)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    Call(usize),
    Read(usize),
    Write(usize),
}

impl Faults {
    /// Creates a plan without faults, which only counts calls.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a fault at the call with this number, counted from 0.
    #[must_use]
    pub fn at_call(self, number: usize, fault: Fault) -> Self {
        self.add(At::Call(number), fault)
    }

    /// Adds a fault at the read with this number, counted from 0.
    #[must_use]
    pub fn at_read(self, number: usize, fault: Fault) -> Self {
        self.add(At::Read(number), fault)
    }

    /// Adds a fault at the write with this number, counted from 0.
    #[must_use]
    pub fn at_write(self, number: usize, fault: Fault) -> Self {
        self.add(At::Write(number), fault)
    }

    /// Returns all calls so far, in order.
    pub fn calls(&self) -> Vec<Call> {
        self.plan().calls.clone()
    }

    /// Returns the number of writes among the calls so far.
    pub fn writes(&self) -> usize {
        self.plan().writes
    }

    /// Returns the total time that the kernel took to accept the writes.
    ///
    /// It is what the writes would cost a caller who has them ready, because the kernel carries a
    /// write out before it returns to the sender.
    pub fn sending(&self) -> Duration {
        self.plan().sending.values().sum()
    }

    /// Returns the share of [`sending`](Self::sending) that went to one subsystem.
    pub fn sending_to(&self, subsystem: Subsystem) -> Duration {
        self.plan().sending.get(&subsystem).copied().unwrap_or_default()
    }

    /// Returns the number of faults that have not happened.
    pub fn pending(&self) -> usize {
        self.plan().planned.len()
    }

    #[cfg(feature = "testing")]
    pub(crate) fn sent(&self, call: Call, took: Duration) {
        if call.writes {
            *self.plan().sending.entry(call.subsystem).or_default() += took;
        }
    }

    fn add(self, at: At, fault: Fault) -> Self {
        self.plan().planned.push((at, fault));
        self
    }

    fn plan(&self) -> MutexGuard<'_, Plan> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a call, and returns the fault that happens at it.
    pub(crate) fn next(&self, call: Call) -> Option<Fault> {
        let mut plan = self.plan();
        let (number, writes) = (plan.calls.len(), plan.writes);
        plan.calls.push(call);
        plan.writes += usize::from(call.writes);
        let kind = if call.writes { At::Write(writes) } else { At::Read(number - writes) };
        let due = |(at, fault): &(At, Fault)| {
            (*at == At::Call(number) || *at == kind) && fits(fault, call)
        };
        let found = plan.planned.iter().position(due)?;
        Some(plan.planned.remove(found).1)
    }
}

const fn fits(fault: &Fault, call: Call) -> bool {
    match fault {
        Fault::LoseReply | Fault::CutReply => !matches!(call.subsystem, Subsystem::Iptables),
        Fault::TornDump if matches!(call.subsystem, Subsystem::Iptables) => false,
        Fault::AckWithoutCommit => call.writes && matches!(call.subsystem, Subsystem::Firewall),
        Fault::TornDump => !call.writes,
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_happens_once_and_only_where_it_fits() {
        let read = Call { subsystem: Subsystem::Firewall, writes: false };
        let write = Call { writes: true, ..read };
        let faults = Faults::new()
            .at_write(1, Fault::LoseReply)
            .at_call(0, Fault::TornDump)
            .at_read(1, Fault::AckWithoutCommit);
        assert!(matches!(faults.next(read), Some(Fault::TornDump)));
        assert!(faults.next(write).is_none());
        assert!(faults.next(read).is_none());
        assert!(matches!(faults.next(write), Some(Fault::LoseReply)));
        assert!(faults.next(write).is_none());
        assert_eq!(faults.calls(), [read, write, read, write, write]);
        assert_eq!((faults.writes(), faults.pending()), (3, 1));
    }
}
