//! Sets that come to hold more than they were made for.

use std::net::Ipv4Addr;

use common::fleet::{Result, dual, policy};
use egress_datapath::testing::lab::{EIP_C, Lab, net};
use egress_datapath::{Destinations, Report};
use ipnet::IpNet;

use crate::changes::{GATEWAY_FIRST, make, p};
use crate::nodes::Nodes;

/// Destinations of another policy: a set that is made for some, gets more twice, and goes.
const DESTINATIONS: [u32; 4] = [0, 300, 900, 3_000];

/// Both a set that comes and goes, and that of the sources, which stays and has some more each
/// round.
pub(crate) fn outgrown(_: &Lab, nodes: &mut Nodes, round: u64) -> Result<Vec<Report>> {
    let round = u32::try_from(round)?;
    let many = |first: u32, count: u32, length| -> Vec<IpNet> {
        let one = |number| net(Ipv4Addr::from_bits(first + number * 4).into(), length);
        (0..count).map(one).collect()
    };
    let mut policies = vec![p()?];
    let count = DESTINATIONS.into_iter().cycle().nth(round as usize);
    if let Some(count) = count.filter(|count| *count > 0) {
        let other = policy("other", &[], Some("node-c"), dual(EIP_C))?;
        let sources = many(0x0b00_0000, (round * 100).min(5_000), 32);
        let destinations = Destinations::Nets(many(0x1400_0000, count, 30));
        policies.push(other.with_sources(sources).with_destinations(destinations));
    }
    make(nodes, round.into(), GATEWAY_FIRST, &policies)
}
