//! Conformance cases of basic policy semantics: sources, destinations, gateways and egress IPs.

use crate::{Destinations, EgressIp};
use ipnet::IpNet;

use super::super::lab::{
    EIP_B, EIP_C, NODE_A, NODE_B_OUTSIDE, OTHER_SERVER, POD_A, POD_B, POD_C, Pair, SERVER,
    STRANGER, hosts, net,
};
use super::expect::{Expect, check};
use super::trial::{Result, Trial, dual, policy};

const B: Option<&str> = Some("node-b");
const C: Option<&str> = Some("node-c");

pub(super) fn lab(trial: &mut Trial<'_>) -> Result {
    trial.apply(&[])?;
    check(&[
        Expect::source(trial.pod_a(), SERVER, POD_A),
        Expect::source(trial.stranger(), OTHER_SERVER, STRANGER),
        Expect::source(trial.pod_b(), SERVER, POD_B),
        Expect::source(trial.node_a(), SERVER, NODE_A),
        Expect::source(trial.pod_a(), POD_C, POD_A),
        Expect::source(trial.server(), POD_A, SERVER),
    ])?;
    trial.saw(&[POD_A, STRANGER, POD_B, NODE_A])
}

pub(super) fn selected_pod(trial: &mut Trial<'_>) -> Result {
    trial.apply(&[policy("p", &[POD_A], B, dual(EIP_B))?])?;
    check(&[
        Expect::source(trial.pod_a(), SERVER, EIP_B),
        Expect::source(trial.pod_a(), OTHER_SERVER, EIP_B),
        Expect::source(trial.stranger(), SERVER, STRANGER),
        Expect::source(trial.pod_b(), SERVER, POD_B),
        Expect::source(trial.node_a(), SERVER, NODE_A),
        Expect::source(trial.pod_a(), POD_C, POD_A),
        Expect::source(trial.pod_a(), POD_B, POD_A),
    ])?;
    trial.saw(&[EIP_B, STRANGER, POD_B, NODE_A])
}

pub(super) fn destination_list(trial: &mut Trial<'_>) -> Result {
    let mut policy = policy("p", &[POD_A], B, dual(EIP_B))?;
    policy.destinations = Destinations::Nets(hosts(&[OTHER_SERVER]));
    trial.apply(&[policy])?;
    check(&[
        Expect::source(trial.pod_a(), OTHER_SERVER, EIP_B),
        Expect::source(trial.pod_a(), SERVER, POD_A),
    ])
}

pub(super) fn narrow_in_wide(trial: &mut Trial<'_>) -> Result {
    let mut wide = policy("wide", &[POD_A], B, dual(EIP_B))?;
    wide.priority = 1;
    wide.destinations = Destinations::Nets(around(SERVER, [24, 64]));
    let mut narrow = policy("narrow", &[POD_A], C, dual(EIP_C))?;
    narrow.destinations = Destinations::Nets(around(OTHER_SERVER, [30, 126]));
    trial.apply(&[wide, narrow])?;
    check(&[
        Expect::source(trial.pod_a(), OTHER_SERVER, EIP_C),
        Expect::source(trial.pod_a(), SERVER, EIP_B),
    ])
}

pub(super) fn source_prefix(trial: &mut Trial<'_>) -> Result {
    let mut policy = policy("p", &[POD_A], B, dual(EIP_B))?;
    policy.sources = around(POD_A, [24, 64]);
    trial.apply(&[policy])?;
    check(&[
        Expect::source(trial.pod_a(), SERVER, EIP_B),
        Expect::source(trial.stranger(), SERVER, EIP_B),
        Expect::source(trial.pod_b(), SERVER, POD_B),
    ])
}

pub(super) fn pod_on_gateway(trial: &mut Trial<'_>) -> Result {
    trial.apply(&[policy("p", &[POD_A, POD_B], B, dual(EIP_B))?])?;
    check(&[
        Expect::source(trial.pod_b(), SERVER, EIP_B),
        Expect::source(trial.pod_a(), SERVER, EIP_B),
        Expect::source(trial.pod_b(), POD_A, POD_B),
    ])
}

pub(super) fn gateway_as_client(trial: &mut Trial<'_>) -> Result {
    trial.apply(&[
        policy("by-b", &[POD_A, POD_C], B, dual(EIP_B))?,
        policy("by-c", &[POD_B], C, dual(EIP_C))?,
    ])?;
    check(&[
        Expect::source(trial.pod_a(), SERVER, EIP_B),
        Expect::source(trial.pod_b(), SERVER, EIP_C),
        Expect::source(trial.pod_c(), SERVER, EIP_B),
    ])
}

pub(super) fn specific_first(trial: &mut Trial<'_>) -> Result {
    let mut specific = policy("specific", &[POD_A, POD_B], C, dual(EIP_C))?;
    specific.destinations = Destinations::Nets(hosts(&[OTHER_SERVER]));
    let mut rest = policy("rest", &[POD_A, POD_B], B, dual(EIP_B))?;
    rest.priority = 1;
    trial.apply(&[rest, specific])?;
    check(&[
        Expect::source(trial.pod_a(), OTHER_SERVER, EIP_C),
        Expect::source(trial.pod_a(), SERVER, EIP_B),
        Expect::source(trial.pod_b(), OTHER_SERVER, EIP_C),
        Expect::source(trial.pod_b(), SERVER, EIP_B),
    ])
}

pub(super) fn default_route(trial: &mut Trial<'_>) -> Result {
    let mut policy = policy("p", &[POD_A], B, dual(EIP_B))?;
    policy.destinations = Destinations::Nets(around(SERVER, [0, 0]));
    trial.apply(&[policy])?;
    check(&[
        Expect::source(trial.pod_a(), SERVER, EIP_B),
        Expect::source(trial.pod_a(), POD_B, POD_A),
        Expect::source(trial.pod_a(), POD_C, POD_A),
    ])
}

pub(super) fn node_address(trial: &mut Trial<'_>) -> Result {
    trial.apply(&[policy("p", &[POD_A, POD_B], B, EgressIp::Node)?])?;
    check(&[
        Expect::source(trial.pod_a(), SERVER, NODE_B_OUTSIDE),
        Expect::source(trial.pod_b(), SERVER, NODE_B_OUTSIDE),
    ])
}

pub(super) fn called_from_outside(trial: &mut Trial<'_>) -> Result {
    trial.apply(&[policy("p", &[POD_A, POD_B], B, dual(EIP_B))?])?;
    check(&[
        Expect::source(trial.server(), POD_A, SERVER),
        Expect::source(trial.stranger(), POD_A, STRANGER),
        Expect::source(trial.pod_c(), POD_A, POD_C),
    ])
}

pub(super) fn node_itself(trial: &mut Trial<'_>) -> Result {
    let mut everybody = policy("p", &[POD_A], B, dual(EIP_B))?;
    everybody.sources = around(POD_A, [0, 0]);
    trial.apply(&[everybody])?;
    check(&[
        Expect::source(trial.node_a(), SERVER, NODE_A),
        Expect::source(trial.node_b(), SERVER, NODE_B_OUTSIDE),
        Expect::source(trial.pod_a(), SERVER, EIP_B),
        Expect::source(trial.pod_b(), SERVER, EIP_B),
    ])
}

pub(super) fn move_and_end(trial: &mut Trial<'_>) -> Result {
    trial.apply(&[policy("p", &[POD_A, POD_B], B, dual(EIP_B))?])?;
    both(trial, EIP_B, EIP_B)?;
    trial.apply(&[policy("p", &[POD_A, POD_B], C, dual(EIP_C))?])?;
    both(trial, EIP_C, EIP_C)?;
    trial.apply(&[policy("p", &[POD_B], C, dual(EIP_C))?])?;
    both(trial, POD_A, EIP_C)?;
    trial.remove()?;
    both(trial, POD_A, POD_B)
}

/// Checks the source addresses with which packets of pod-a and pod-b arrive at the server.
fn both(trial: &Trial<'_>, a: Pair, b: Pair) -> Result {
    check(&[Expect::source(trial.pod_a(), SERVER, a), Expect::source(trial.pod_b(), SERVER, b)])
}

/// Returns the prefixes of these lengths that contain the addresses.
fn around(pair: Pair, lengths: [u8; 2]) -> Vec<IpNet> {
    pair.into_iter().zip(lengths).map(|(ip, length)| net(ip, length).trunc()).collect()
}
