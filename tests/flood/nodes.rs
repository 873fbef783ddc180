//! A reconciler on each node, as fast as commits can be.

use common::backend::{backend, datapath, replies, steering, underlay};
use common::fleet::Result;
use egress_datapath::KernelTables;
use egress_datapath::alloc::{MarkPool, TablePool, TableRange};
use egress_datapath::datapath::{Among, Counts, Known, Observed, OnConnection};
use egress_datapath::iptables::Iptables;
use egress_datapath::state::Variant;
use egress_datapath::testing::lab::{Host, Lab};
use egress_datapath::{
    ApplyError, Backend, Changes, Cluster, Datapath, EgressPolicy, KernelError, Reconciler, Report,
    Update,
};

use crate::change::{Change, Reads};
use crate::changes::beside;

/// The kernel, whose connections are listed now and then only.
///
/// To list connections, the kernel looks into every bucket that those of any namespace may be in,
/// which takes longer than all else. Connections of one packet are never stale; those that go on
/// are listed every time.
pub(crate) struct Hasty {
    kernel: Box<dyn Datapath>,
    /// Every so-manieth time.
    every: u32,
    asked: u32,
    /// Whether everything is read, whatever is known.
    reads: Reads,
}

impl Datapath for Hasty {
    fn observe(&mut self, known: Known<'_>) -> std::result::Result<Observed, KernelError> {
        match self.reads {
            Reads::Drift => self.kernel.observe(known),
            Reads::Everything => self.kernel.observe(Known::Nothing),
        }
    }

    fn connections(
        &mut self,
        among: Among<'_>,
        each: &mut OnConnection<'_>,
    ) -> std::result::Result<(), KernelError> {
        self.asked += 1;
        if self.asked % self.every == 0 { self.kernel.connections(among, each) } else { Ok(()) }
    }

    fn counters(&mut self) -> std::result::Result<Counts, KernelError> {
        self.kernel.counters()
    }

    fn apply(&mut self, changes: &Changes) -> std::result::Result<(), ApplyError> {
        self.kernel.apply(changes)
    }
}

type Node = (Cluster, Reconciler<Hasty>);

/// The nodes of a lab.
pub(crate) struct Nodes {
    all: Vec<Node>,
    /// How often connections are listed.
    every: u32,
    /// Policies that are there all the time, and both gateways have one: with the last of them the
    /// rules would go that count what they hold back.
    beside: Vec<EgressPolicy>,
}

impl Nodes {
    pub(crate) fn open(lab: &Lab, change: &Change) -> Result<Self> {
        let Change { marks, backends, caching, reads, .. } = *change;
        let every = if change.lasts() { 1 } else { 16 };
        let open = |host: &&Host| {
            let cluster = underlay(lab.cluster(host)?)
                .with_marks(marks)
                .with_backend(backend())
                .with_steering(steering(&marks))
                .with_replies(replies(&marks, backend()))
                .with_connection_caching(caching);
            let both = Backend::Iptables(Iptables::new(Variant::Nft));
            let backend = if backends { both } else { backend() };
            let hasty = hasty(host, (&cluster, backend), reads, every)?;
            Ok((cluster, hasty))
        };
        let all = lab.nodes().iter().map(open).collect::<Result<_>>()?;
        let beside = if change.loss.is_by_rule() { beside()?.into() } else { Vec::new() };
        Ok(Self { all, every, beside })
    }

    /// Gives every node a new reconciler, which remembers nothing.
    pub(crate) fn restart(&mut self, lab: &Lab) -> Result {
        for (host, (cluster, reconciler)) in lab.nodes().into_iter().zip(&mut self.all) {
            *reconciler = hasty(host, (cluster, cluster.backend), Reads::Everything, self.every)?;
        }
        Ok(())
    }

    pub(crate) fn apply_to(&mut self, name: &str, policies: &[EgressPolicy]) -> Result<Report> {
        let policies = [policies, &self.beside].concat();
        let (cluster, reconciler) = self.node(name)?;
        Ok(reconciler.reconcile(cluster, &policies)?)
    }

    /// Changes what is wanted of a node, and ends the connections that this leaves behind.
    pub(crate) fn update(&mut self, name: &str, update: Update) -> Result<Report> {
        let (_, reconciler) = self.node(name)?;
        let mut report = reconciler.update([update])?;
        report.changes.extend(reconciler.settle()?.changes);
        Ok(report)
    }

    /// A node's cluster and its reconciler.
    pub(crate) fn node(&mut self, name: &str) -> Result<&mut Node> {
        let named = self.all.iter_mut().find(|(cluster, _)| cluster.node.as_str() == name);
        Ok(named.ok_or("no such node")?)
    }

    pub(crate) fn remove(&mut self) -> Result {
        for (_, reconciler) in &mut self.all {
            reconciler.remove()?;
        }
        Ok(())
    }
}

fn hasty(
    host: &Host,
    (cluster, backend): (&Cluster, Backend),
    reads: Reads,
    every: u32,
) -> Result<Reconciler<Hasty>> {
    let kernel = datapath(&host.netns, backend)?;
    let in_use = host.netns.run(KernelTables::open)??;
    let tables = TablePool::with_probe(TableRange::default(), in_use);
    let hasty = Hasty { kernel, every, asked: 0, reads };
    Ok(Reconciler::with_allocators(hasty, MarkPool::new(cluster.marks), tables))
}
