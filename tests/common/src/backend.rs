//! The backend, the steering, the path of replies and the underlay that a run of the tests is about.

use std::env;
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};

use egress_datapath::datapath::{Among, Counts, Known, Observed, OnConnection};
use egress_datapath::iptables::{Iptables, IptablesDatapath};
use egress_datapath::state::Variant;
use egress_datapath::testing::lab::{Netns, inside};
use egress_datapath::{
    ApplyError, Backend, Changes, Cluster, Datapath, KernelDatapath, KernelError, MarkLayout,
    Replies, Steering,
};

/// The backend that `EGRESS_BACKEND` names as the agent does; without it nf_tables.
pub fn backend() -> Backend {
    match env::var("EGRESS_BACKEND").as_deref() {
        Ok("iptables-legacy") => Backend::Iptables(Iptables::new(Variant::Legacy)),
        Ok("iptables-nft") => Backend::Iptables(Iptables::new(Variant::Nft)),
        _ => Backend::Nftables,
    }
}

/// The steering that `EGRESS_STEERING` names as the agent does, where the layout of the marks
/// allows it; without it by tables.
pub fn steering(marks: &MarkLayout) -> Steering {
    match env::var("EGRESS_STEERING").as_deref() {
        Ok("egress-hook") if marks.prefix_mask() != 0 => Steering::EgressHook,
        _ => Steering::Tables,
    }
}

/// The path of replies that `EGRESS_REPLIES` names as the agent does, where marks and backend allow
/// it; without it the hosts' own routes.
pub fn replies(marks: &MarkLayout, backend: Backend) -> Replies {
    let allowed = marks.prefix_mask() != 0 && backend == Backend::Nftables;
    match env::var("EGRESS_REPLIES").as_deref() {
        Ok("tunnel") if allowed => Replies::Tunnel,
        _ => Replies::Direct,
    }
}

/// The place of the family of the tunnel packets in a pair of addresses.
pub fn outer() -> usize {
    usize::from(env::var("EGRESS_UNDERLAY").as_deref() == Ok("ipv6"))
}

/// The cluster with an underlay of the family that `EGRESS_UNDERLAY` names, such as `ipv6`; without
/// it all nodes have addresses of both.
pub fn underlay(mut cluster: Cluster) -> Cluster {
    if outer() == 1 {
        for node in &mut cluster.nodes {
            node.underlay.retain(IpAddr::is_ipv6);
        }
    }
    cluster
}

/// The datapath of a namespace for a backend.
pub fn datapath(netns: &Netns, backend: Backend) -> Result<Box<dyn Datapath>, KernelError> {
    let failed = |_| KernelError::answer("enter a network namespace", "it failed");
    match backend {
        Backend::Iptables(_) => {
            let inner = netns.run(IptablesDatapath::open).map_err(failed)??;
            let namespace = netns.as_fd().try_clone_to_owned().map_err(failed)?;
            Ok(Box::new(Inside { namespace, inner }))
        }
        _ => Ok(Box::new(netns.run(KernelDatapath::open).map_err(failed)??)),
    }
}

/// A datapath that runs tools, each time in its namespace.
#[derive(Debug)]
pub struct Inside<D> {
    namespace: OwnedFd,
    inner: D,
}

fn lost(what: &str) -> KernelError {
    KernelError::answer(what, "the namespace cannot be entered")
}

impl<D: Datapath> Datapath for Inside<D> {
    fn observe(&mut self, known: Known<'_>) -> Result<Observed, KernelError> {
        let Self { namespace, inner } = self;
        inside(namespace.as_fd(), || inner.observe(known)).map_err(|_| lost("observe"))?
    }

    fn connections(
        &mut self,
        among: Among<'_>,
        each: &mut OnConnection<'_>,
    ) -> Result<(), KernelError> {
        self.inner.connections(among, each)
    }

    fn announce(&mut self) -> Result<(), KernelError> {
        self.inner.announce()
    }

    fn counters(&mut self) -> Result<Counts, KernelError> {
        self.inner.counters()
    }

    fn apply(&mut self, changes: &Changes) -> Result<(), ApplyError> {
        let Self { namespace, inner } = self;
        inside(namespace.as_fd(), || inner.apply(changes)).unwrap_or_else(|_| {
            let refused = changes.ops().take(1).map(|op| (op.clone(), lost("apply"))).collect();
            Err(ApplyError::new(0, refused, changes.len().saturating_sub(1)))
        })
    }
}
