//! Trace of a pod's packet: on this node by the kernel's state, on the gateway by the file.
//!
//! The field names of the JSON document are stable: fields may be added, but none is changed.

use std::io::{self, Write};
use std::net::{IpAddr, SocketAddr};

use egress_datapath::alloc::{MarkPool, TablePool};
use egress_datapath::explain::{Fate, Frame, Packet, Trace, explain_received};
use egress_datapath::{Finding, Node, NodeName, Plan, explain, plan};
use serde::Serialize;

use super::command::Explain;
use super::config::Config;
use super::{Failure, failure, json, observe, read};

/// Source port of the packet; steering does not depend on it.
const SOURCE_PORT: u16 = 40_000;

/// The JSON document.
#[derive(Serialize)]
struct Document {
    node: NodeName,
    /// Trace through the kernel's state on this node.
    here: Trace,
    /// Trace through the planned state of the gateway; null if the packet is sent to no gateway.
    gateway: Option<Gateway>,
    /// Differences between the kernel and the file, and overlapping policies.
    notes: Vec<String>,
}

#[derive(Serialize)]
struct Gateway {
    node: NodeName,
    trace: Trace,
}

/// Explains the packet that the options describe.
pub(crate) fn run(options: &Explain) -> Result<(), Failure> {
    let packet = packet(&options.from, &options.to).map_err(Failure::Input)?;
    let (file, config) = read(&options.of)?;
    let document = document(&file, config, &packet)?;
    if options.json {
        return json(&document);
    }
    let mut out = io::stdout().lock();
    write!(out, "on {}: {}", document.node, document.here)?;
    if let Some(Gateway { node, trace }) = &document.gateway {
        write!(out, "on {node}, by the file: {trace}")?;
    }
    for note in &document.notes {
        writeln!(out, "note: {note}")?;
    }
    Ok(())
}

fn document(file: &str, mut config: Config, packet: &Packet) -> Result<Document, Failure> {
    let node = config.cluster.node.clone();
    let here = explain(&observe()?, packet);
    let planned = planned(file, &config)?;
    let mut notes = Vec::new();
    let wanted = explain(&planned.state, packet);
    let summary = |trace: &Trace| {
        let policy = trace.policy().map_or("no policy".into(), |id| format!("policy {id}"));
        format!("{policy}, {}", trace.fate)
    };
    if summary(&here) != summary(&wanted) {
        notes.push(format!("the file requires: {}; run agent apply", summary(&wanted)));
    }
    notes.extend(overlaps(&planned, here.policy()));
    let gateway = match here.fate {
        Fate::Tunnelled(frame) => gateway(file, &mut config, &frame, &mut notes)?,
        _ => None,
    };
    Ok(Document { node, here, gateway, notes })
}

/// Traces a frame on the node that receives it, if the file lists that node.
fn gateway(
    file: &str,
    config: &mut Config,
    frame: &Frame,
    notes: &mut Vec<String>,
) -> Result<Option<Gateway>, Failure> {
    let has = |node: &&Node| node.underlay.contains(&frame.to);
    let Some(node) = config.cluster.nodes.iter().find(has) else {
        notes.push(format!("no node of the file has the address {}", frame.to));
        return Ok(None);
    };
    config.cluster.node = node.name.clone();
    let trace = explain_received(&planned(file, config)?.state, frame);
    Ok(Some(Gateway { node: config.cluster.node.clone(), trace }))
}

fn planned(file: &str, config: &Config) -> Result<Plan, Failure> {
    let Config { cluster, policies, tables, .. } = config;
    plan(cluster, policies, &mut MarkPool::new(cluster.marks), &mut TablePool::new(*tables))
        .map_err(|error| failure(file, error.into()))
}

/// Returns the findings of the plan about policies that overlap this one.
fn overlaps(plan: &Plan, policy: Option<&str>) -> Vec<String> {
    let is_about = |finding: &&Finding| match finding {
        Finding::Overlap { winner, loser, .. } => {
            [winner, loser].into_iter().any(|id| Some(id.as_str()) == policy)
        }
        _ => false,
    };
    plan.findings.iter().filter(is_about).map(ToString::to_string).collect()
}

/// Parses the packet from one address to another; without a port it is an ICMP echo request.
fn packet(from: &str, to: &str) -> Result<Packet, String> {
    let source: IpAddr = from.parse().map_err(|_| format!("--from {from:?}: not an IP address"))?;
    let packet = if let Ok(destination) = to.parse() {
        Packet::echo(source, destination, 1)
    } else {
        let what = "expected an address, or one with port and protocol: 192.0.2.1:443/tcp, \
                    [2001:db8::1]:53/udp";
        let error = || format!("--to {to:?}: {what}");
        let (end, protocol) = to.rsplit_once('/').unwrap_or((to, "tcp"));
        let end: SocketAddr = end.parse().map_err(|_| error())?;
        match protocol {
            "tcp" => Packet::tcp(source, SOURCE_PORT, end.ip(), end.port()),
            "udp" => Packet::udp(source, SOURCE_PORT, end.ip(), end.port()),
            _ => return Err(error()),
        }
    };
    if packet.source.is_ipv4() != packet.destination.is_ipv4() {
        return Err(format!("--from {from} and --to {to} are of different families"));
    }
    Ok(packet)
}
