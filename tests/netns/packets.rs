//! What packets do.

use std::collections::BTreeSet;

use egress_datapath::{Destinations, EgressIp, Mark, MarkLayout};
use ipnet::IpNet;

use crate::fleet::{
    Fleet, Result, check, dual, expect, expect_nothing, have, lab, nft, policy, sources, tool,
};
use crate::lab::{
    EIP_B, EIP_C, NODE_A, NODE_B_OUTSIDE, OTHER_SERVER, POD_A, POD_B, POD_C, Pair, SERVER,
    STRANGER, hosts, net,
};

const B: Option<&str> = Some("node-b");
const C: Option<&str> = Some("node-c");

#[test]
fn the_lab_shows_every_source_as_it_is() -> Result {
    let Some(lab) = lab()? else { return Ok(()) };
    check(&[
        expect(&lab.pod_a, SERVER, POD_A),
        expect(&lab.stranger, OTHER_SERVER, STRANGER),
        expect(&lab.pod_b, SERVER, POD_B),
        expect(&lab.node_a.netns, SERVER, NODE_A),
        expect(&lab.pod_a, POD_C, POD_A),
        expect(&lab.server, POD_A, SERVER),
    ]);
    let all = [POD_A, STRANGER, POD_B, NODE_A].concat();
    assert_eq!(sources(&lab), all.into_iter().collect::<BTreeSet<_>>());
    Ok(())
}
