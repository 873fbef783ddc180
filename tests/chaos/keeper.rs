//! Who keeps a node as it is wanted: the loop that an embedder would have.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use common::fleet::Result;
use egress_datapath::alloc::TableRange;
use egress_datapath::datapath::observe;
use egress_datapath::testing::lab::Host;
use egress_datapath::{
    Cluster, EgressPolicy, KernelDatapath, MarkLayout, Ownership, Protection, Reconciler, State,
    Watch,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// A node with a watch.
pub(crate) struct Keeper {
    node: Reconciler<KernelDatapath>,
    watch: Watch,
}

/// What a keeper had to do.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Kept {
    /// Repairs that wrote something.
    pub(crate) repairs: u32,
    /// Repairs that found nothing to write.
    pub(crate) idle: u32,
    /// Repairs that somebody else came in between.
    pub(crate) refused: u32,
}

impl Keeper {
    pub(crate) fn new(
        host: &Host,
        ownership: Ownership,
        cluster: &Cluster,
        policies: &[EgressPolicy],
    ) -> Result<Self> {
        let range = TableRange::default();
        let open = || Reconciler::open_as(ownership, MarkLayout::SEED, range);
        let mut node = host.netns.run(open)??;
        let watch = node.datapath().watch()?;
        node.reconcile(cluster, policies)?;
        Ok(Self { node, watch })
    }

    /// Whether no edit of the table succeeds, for the kernel refuses all but ours.
    pub(crate) fn is_alone(&mut self) -> bool {
        self.node.datapath().protection() == Protection::Kernel
    }

    /// What the kernel should hold, which it does now.
    pub(crate) fn whole(&mut self) -> Result<State> {
        Ok(observe(self.node.datapath())?)
    }

    pub(crate) fn remove(mut self) -> Result {
        self.node.remove()?;
        Ok(())
    }

    /// Repairs after each event, until it is to stop.
    pub(crate) fn keep(&mut self, stop: &AtomicBool) -> std::result::Result<Kept, String> {
        let mut kept = Kept::default();
        let mut again = false;
        let patience = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };
        while !stop.load(Relaxed) {
            if !again {
                let mut fds = [PollFd::from_borrowed_fd(self.watch.as_fd(), PollFlags::IN)];
                poll(&mut fds, Some(&patience)).map_err(|error| error.to_string())?;
            }
            let events = self.watch.drain().map_err(|error| error.to_string())?;
            if events.is_empty() && !again {
                continue;
            }
            // Refused means that the hand was quicker, between reading and writing.
            again = match self.node.repair() {
                Ok(report) if report.changes.is_empty() => {
                    kept.idle += 1;
                    false
                }
                Ok(_) => {
                    kept.repairs += 1;
                    false
                }
                Err(_) => {
                    kept.refused += 1;
                    true
                }
            };
        }
        Ok(kept)
    }
}
