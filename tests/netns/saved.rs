//! Rules that the host saved with its own and loads at boot, before a process of the datapath runs.

use common::fleet::{
    Fleet, Result, check, dual, expect, expect_nothing, lab, nft, open, policy, sources, tool,
    unless_beyond,
};
use egress_datapath::testing::lab::{EIP_B, NODE_A, POD_A, SERVER};
use egress_datapath::{MarkLayout, Steering};

use crate::flows::masquerade;

const HOST: &str = "table inet host {
    chain input {
        type filter hook input priority 0;
        tcp dport 7 accept
    }
}";

/// Without routing rules the saved table drops what it marks; without the table nothing is loaded.
#[test]
fn saved_rules_loaded_at_boot_leak_nothing_and_are_taken_over() -> Result {
    harness::needs(&["nft"]);
    unless_beyond("saved rules do not load: their sets are missing");
    for steering in [Steering::Tables, Steering::EgressHook] {
        let lab = lab();
        masquerade(&lab)?;
        let node = &lab.node_a.netns;
        nft(node, &[], HOST)?;
        let policies = [policy("p", &[POD_A], Some("node-b"), dual(EIP_B))?];
        let mut fleet = Fleet::with(&lab, |cluster| cluster.steering = steering)?;
        fleet.apply(&policies)?;
        check(&[expect(&lab.pod_a, SERVER, EIP_B)]);
        let saved = tool(node, "nft list ruleset")?;

        // As after a reboot: neither device nor routes nor rules.
        open(&lab.node_a, MarkLayout::SEED)?.remove()?;
        tool(node, "nft flush ruleset")?;
        sources(&lab);
        let loaded = nft(node, &[], &saved);
        note!(
            "{steering:?}: {}",
            loaded.as_ref().map_or_else(ToString::to_string, |()| "loaded".into())
        );
        if loaded.is_ok() {
            check(&[expect(&lab.stranger, SERVER, NODE_A), expect_nothing(&lab.pod_a, SERVER)]);
            assert_eq!(sources(&lab), NODE_A.into_iter().collect());
        } else {
            // A chain at a hook of a device that is not there yet: older kernels refuse the file.
            assert_eq!(steering, Steering::EgressHook);
            nft(node, &[], HOST)?;
        }
        fleet.audit()?;
        check(&[expect(&lab.pod_a, SERVER, EIP_B)]);
        assert_eq!(sources(&lab), EIP_B.into_iter().collect());
        assert!(tool(node, "nft list ruleset")?.contains("tcp dport 7 accept"));
        assert!(fleet.apply(&policies)?.iter().all(|report| report.changes.is_empty()));
    }
    Ok(())
}
