//! Moves to another gateway, and to another egress IP.

use std::net::Ipv4Addr;
use std::thread::sleep;
use std::time::Duration;

use common::fleet::{Result, dual};
use egress_datapath::testing::lab::{EIP_B, EIP_C, Lab, net};
use egress_datapath::{NodeName, Report, Update};

use crate::changes::{GATEWAY_FIRST, beside, make, p};
use crate::nodes::Nodes;

/// The new gateway, who sends to it, and the old one.
const fn order(round: u64) -> (&'static str, &'static [&'static str]) {
    if round % 2 == 0 {
        ("node-b", &["node-b", "node-a", "node-c"])
    } else {
        ("node-c", &["node-c", "node-a", "node-b"])
    }
}

pub(crate) fn moved(_: &Lab, nodes: &mut Nodes, round: u64) -> Result<Vec<Report>> {
    let (gateway, order) = order(round);
    let p = p()?.with_gateway(NodeName::new(gateway)?);
    make(nodes, round, order, &[p])
}

/// For so long the old gateway goes on after nothing more is sent to it: what is under way by then
/// has arrived.
const UNDER_WAY: Duration = Duration::from_millis(20);

/// The policy has many sources more, and both gateways have others, so that nothing changes but
/// where it leads.
pub(crate) fn moved_with_many(_: &Lab, nodes: &mut Nodes, round: u64) -> Result<Vec<Report>> {
    let (gateway, order) = order(round);
    let p = p()?;
    if round == 0 {
        let count = if crate::is_full() { 100_000 } else { 2_000 };
        let many =
            (0..count).map(|number| net(Ipv4Addr::from_bits(0x0b00_0000 + number).into(), 32));
        let mut p = p;
        p.sources.extend(many);
        let [b, c] = beside()?;
        return make(nodes, round, order, &[p, b, c]);
    }
    let mut reports = Vec::new();
    for name in order {
        if order.last() == Some(name) {
            sleep(UNDER_WAY);
        }
        let gateway = Some(NodeName::new(gateway)?);
        reports.push(nodes.update(name, Update::Move { policy: p.id.clone(), gateway })?);
    }
    Ok(reports)
}

pub(crate) fn moved_otherwise(_: &Lab, nodes: &mut Nodes, round: u64) -> Result<Vec<Report>> {
    let (gateway, order) = order(round);
    let egress_ip = dual(if round % 2 == 0 { EIP_B } else { EIP_C });
    let p = p()?.with_gateway(NodeName::new(gateway)?).with_egress_ip(egress_ip);
    make(nodes, round, order, &[p])
}

pub(crate) fn egress_ip(_: &Lab, nodes: &mut Nodes, round: u64) -> Result<Vec<Report>> {
    let egress_ip = dual(if round % 2 == 0 { EIP_B } else { EIP_C });
    make(nodes, round, GATEWAY_FIRST, &[p()?.with_egress_ip(egress_ip)])
}
