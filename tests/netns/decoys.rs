//! Objects that look like ours and are not.

use common::fleet::{Result, assert_same, dual, lab, lost, open, policy, settled, snapshot, tool};
use common::lookalikes;
use egress_datapath::testing::lab::{EIP_B, EIP_C, POD_A, POD_B};

#[test]
fn foreign_objects_unchanged_by_apply_and_remove() -> Result {
    let lab = lab();
    let netns = &lab.node_a.netns;
    lookalikes::plant(netns)?;
    let before = settled(netns)?;

    let cluster = lab.cluster(&lab.node_a)?;
    let mut node = open(&lab.node_a, cluster.marks)?;
    node.reconcile(&cluster, [policy("p", &[POD_A], Some("node-b"), dual(EIP_B))?])?;
    assert_eq!(lost(&before, &snapshot(netns)?), "", "after it was applied");
    let moved = policy("p", &[POD_A, POD_B], Some("node-c"), dual(EIP_C))?;
    node.reconcile(&cluster, [moved])?;
    assert_eq!(lost(&before, &snapshot(netns)?), "", "after it was changed");
    node.remove()?;
    assert_same(&before, &snapshot(netns)?);
    Ok(())
}

#[test]
fn foreign_device_of_our_name_reported_and_unchanged() -> Result {
    let lab = lab();
    let netns = &lab.node_a.netns;
    tool(netns, "ip link add egress.vxlan type bridge")?;
    let before = tool(netns, "ip -d link")?;
    let cluster = lab.cluster(&lab.node_a)?;
    let mut node = open(&lab.node_a, cluster.marks)?;
    let refused = node.reconcile(&cluster, [policy("p", &[POD_A], Some("node-b"), dual(EIP_B))?]);
    assert!(refused.is_err(), "{refused:?}");
    assert_eq!(tool(netns, "ip -d link")?, before);
    node.remove()?;
    assert_eq!(tool(netns, "ip -d link")?, before);
    Ok(())
}
