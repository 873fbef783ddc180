//! The iptables backend: what its packets do, and what it leaves.

use egress_datapath::state::Variant;
use egress_datapath::{Backend, EgressPolicy, Iptables};

use crate::fleet::{Expect, Fleet, Result, check, dual, expect, have, lab, policy};
use crate::lab::{EIP_B, EIP_C, Lab, NODE_A, OTHER_SERVER, POD_A, POD_B, POD_C, SERVER, STRANGER};

const B: Option<&str> = Some("node-b");
const C: Option<&str> = Some("node-c");

/// A fleet whose nodes have this backend.
fn fleet(lab: &Lab, backend: Backend) -> Result<Fleet> {
    Fleet::with(lab, |cluster| cluster.backend = backend)
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
    let mut fleet = fleet(&lab, backend(variant))?;
    fleet.apply(&policies()?)?;
    check(&expectations(&lab));
    for report in fleet.apply(&policies()?)? {
        assert!(report.changes.is_empty(), "{}", report.changes);
    }
    Ok(())
}
