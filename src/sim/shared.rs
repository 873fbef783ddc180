//! A simulated kernel that several programs use.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Sim, SimDatapath};
use crate::state::State;

/// A [`Sim`] that several programs have open, as they would a kernel.
///
/// Examples are the program under test, its successor, and other programs that write to objects of
/// this crate. A clone refers to the same kernel. A test of a program that repairs changes of other
/// programs:
///
/// ```
/// # use egress_datapath::{Cluster, EgressIp, EgressPolicy, Node, NodeName, PolicyId};
/// use egress_datapath::Reconciler;
/// use egress_datapath::event::Component;
/// use egress_datapath::sim::SharedSim;
/// # let node = Node::new(NodeName::new("a")?, vec!["10.10.0.11".parse()?], vec!["172.31.0.11/16".parse()?]);
/// # let cluster = Cluster::new(NodeName::new("a")?, vec![node], vec!["10.244.0.0/16".parse()?]);
/// # let policy = EgressPolicy::new(
/// #     PolicyId::new("p")?,
/// #     vec!["10.244.1.10/32".parse()?],
/// #     EgressIp::V4("198.51.100.200".parse()?),
/// # );
///
/// let kernel = SharedSim::default();
/// let mut egress = Reconciler::new(kernel.open());
/// let mut watch = egress.datapath().watch()?;
/// egress.reconcile(&cluster, [&policy])?;
/// assert!(watch.drain()?.is_empty(), "nobody else has written");
///
/// kernel.edit(|state| state.firewall = None); // as `nft flush ruleset` does
/// let events = watch.drain()?; // a loop waits for `watch.as_fd()` before
/// assert_eq!(events.changed, [Component::Firewall].into());
/// assert!(!egress.repair()?.changes.is_empty());
/// assert!(watch.drain()?.is_empty());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// [`faults`](crate::faults) has an example of a process that dies.
#[derive(Clone, Debug, Default)]
pub struct SharedSim(Arc<Mutex<Sim>>);

impl SharedSim {
    /// A shared kernel that holds the simulator's state.
    pub fn new(sim: Sim) -> Self {
        Self(Arc::new(Mutex::new(sim)))
    }

    /// Opens a datapath, as a process opens the kernel that it runs on.
    pub fn open(&self) -> SimDatapath {
        SimDatapath::new(self.clone())
    }

    /// Edits the state as another program: [`Sim::edit`].
    pub fn edit(&self, edit: impl FnOnce(&mut State)) {
        self.lock().edit(edit);
    }

    /// The current state.
    pub fn state(&self) -> State {
        self.lock().state().clone()
    }

    /// Locks the simulator, for example to send packets; all datapaths wait meanwhile.
    pub fn lock(&self) -> MutexGuard<'_, Sim> {
        // A state that a panicking test left unfinished is no worse than one that a fault leaves.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
