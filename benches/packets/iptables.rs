//! What this crate programs with iptables: policies that take every destination.

use egress_datapath::alloc::{MarkPool, TablePool};
use egress_datapath::iptables::{Iptables, IptablesDatapath};
use egress_datapath::state::Variant;
use egress_datapath::{Backend, EgressIp, EgressPolicy, MarkLayout, PolicyId, Reconciler};
use ipnet::{IpNet, Ipv4Net};

use crate::Result;
use crate::ours::{SOURCES, cluster, egress_ip, name_of_gateway, pod};
use crate::path::Path;

/// Programs a router as a client of one gateway.
pub(crate) fn program(path: &Path, policies: u32, variant: Variant) -> Result {
    let mut cluster = cluster(1)?;
    cluster.backend = Backend::Iptables(Iptables::new(variant));
    let policy = |number: u32| -> Result<EgressPolicy> {
        let sources = (0..SOURCES).map(|n| IpNet::from(Ipv4Net::from(pod(number * SOURCES + n))));
        let id = PolicyId::new(format!("bench/policy-{number}"))?;
        let mut policy = EgressPolicy::new(id, sources.collect(), EgressIp::V4(egress_ip(number)));
        policy.gateway = Some(name_of_gateway(0)?);
        Ok(policy)
    };
    let policies = (0..policies).map(policy).collect::<Result<Vec<_>>>()?;
    let made = path.router.run(|| {
        let (marks, tables) = (MarkPool::new(MarkLayout::SEED), TablePool::default());
        let datapath = IptablesDatapath::open().map_err(|error| error.to_string())?;
        let mut egress = Reconciler::with_allocators(datapath, marks, tables);
        egress.reconcile(&cluster, &policies).map(drop).map_err(|error| error.to_string())
    })?;
    Ok(made?)
}
