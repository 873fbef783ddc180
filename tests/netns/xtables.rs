//! The iptables backend: what its packets do, and what it leaves.

use egress_datapath::state::{State, Variant};
use egress_datapath::{
    Backend, Cluster, Datapath, EgressIp, EgressPolicy, Error, Iptables, IptablesDatapath,
    MarkPool, Reconciler, Report, TablePool, TableRange,
};

use crate::fleet::{Expect, Result, check, dual, expect, expect_nothing, have, lab, policy, tool};
use crate::lab::{
    EIP_B, EIP_C, Host, Lab, NODE_A, NODE_B_OUTSIDE, OTHER_SERVER, POD_A, POD_B, POD_C, SERVER,
    STRANGER,
};

const B: Option<&str> = Some("node-b");
const C: Option<&str> = Some("node-c");

/// A reconciler on each node, each called in its namespace, where the tools must run.
struct Fleet<'a> {
    nodes: Vec<(&'a Host, Cluster, Reconciler<IptablesDatapath>)>,
}

impl<'a> Fleet<'a> {
    fn open(lab: &'a Lab, backend: Backend) -> Result<Self> {
        let open = |host: &'a Host| -> Result<_> {
            let mut cluster = lab.cluster(host)?;
            cluster.backend = backend;
            Ok((host, cluster.clone(), open(host, &cluster)?))
        };
        Ok(Self { nodes: lab.nodes().into_iter().map(open).collect::<Result<_>>()? })
    }

    /// Makes every node right, gateways before their clients.
    fn apply(&mut self, policies: &[EgressPolicy]) -> Result<Vec<Report>> {
        let mut reports = Vec::new();
        for (host, cluster, reconciler) in self.nodes.iter_mut().rev() {
            let report = host.netns.run(|| reconciler.reconcile(cluster, policies))?;
            reports.push(report.map_err(|error| format!("{}: {error}", cluster.node))?);
        }
        Ok(reports)
    }

    fn set(&mut self, backend: Backend) {
        for (_, cluster, _) in &mut self.nodes {
            cluster.backend = backend;
        }
    }

    fn remove(&mut self) -> Result {
        for (host, cluster, reconciler) in &mut self.nodes {
            let report = host.netns.run(|| reconciler.remove())?;
            report.map_err(|error| format!("{}: {error}", cluster.node))?;
        }
        Ok(())
    }
}

fn open(host: &Host, cluster: &Cluster) -> Result<Reconciler<IptablesDatapath>> {
    let datapath = host.netns.run(IptablesDatapath::open)??;
    let tables = TablePool::new(TableRange::default());
    Ok(Reconciler::with_allocators(datapath, MarkPool::new(cluster.marks), tables))
}

fn backend(variant: Variant) -> Backend {
    Backend::Iptables(Iptables::new(variant))
}

/// A lab, if there are the tools of a variant.
fn lab_with(variant: Variant) -> Result<Option<Lab>> {
    if have(variant.command(egress_datapath::Family::V4))? && have("ipset")? {
        lab()
    } else {
        Ok(None)
    }
}

/// Makes a test for each variant.
macro_rules! of_both {
    ($($name:ident)*) => {
        mod legacy {
            $(#[test] fn $name() -> super::Result { super::$name(super::Variant::Legacy) })*
        }
        mod nft {
            $(#[test] fn $name() -> super::Result { super::$name(super::Variant::Nft) })*
        }
    };
}

of_both! {
    packets_wear_what_their_policies_say
}

/// Policies of every kind at once.
fn policies() -> Result<Vec<EgressPolicy>> {
    let mut listed = policy("listed", &[POD_A, POD_C], C, dual(EIP_C))?;
    listed.destinations = egress_datapath::Destinations::Nets(crate::lab::hosts(&[OTHER_SERVER]));
    let mut rest = policy("rest", &[POD_A, POD_B], B, dual(EIP_B))?;
    rest.priority = 1;
    Ok(vec![listed, rest])
}

fn expectations(lab: &Lab) -> Vec<Expect<'_>> {
    vec![
        expect(&lab.pod_a, SERVER, EIP_B),
        expect(&lab.pod_a, OTHER_SERVER, EIP_C),
        expect(&lab.pod_b, SERVER, EIP_B),
        expect(&lab.pod_c, OTHER_SERVER, EIP_C),
        expect(&lab.pod_c, SERVER, POD_C),
        expect(&lab.stranger, SERVER, STRANGER),
        expect(&lab.node_a.netns, SERVER, NODE_A),
        expect(&lab.pod_a, POD_C, POD_A),
        expect(&lab.pod_a, POD_B, POD_A),
        expect(&lab.server, POD_A, SERVER),
    ]
}

fn packets_wear_what_their_policies_say(variant: Variant) -> Result {
    let Some(lab) = lab_with(variant)? else { return Ok(()) };
    let mut fleet = Fleet::open(&lab, backend(variant))?;
    fleet.apply(&policies()?)?;
    check(&expectations(&lab));
    for report in fleet.apply(&policies()?)? {
        assert!(report.changes.is_empty(), "{}", report.changes);
    }
    Ok(())
}
