//! Checks of privilege, kernel parts and sysctl settings.

use std::collections::BTreeSet;

use ipnet::IpNet;

use super::facts::{DeviceKind, Facts};
use super::{KernelPart, Preflight, Problem};
use crate::cluster::{Backend, Steering};
use crate::types::Family;

/// First tested kernel version whose sets find ranges while some of them change.
const STEADY: (u32, u32) = (6, 18);

/// Strict `rp_filter`: packets must arrive on the interface of the route back to their source.
const STRICT: u64 = 1;

impl Preflight<'_> {
    pub(super) fn judge_settings(&self, facts: &Facts, problems: &mut Vec<Problem>) {
        if facts.denied {
            problems.push(Problem::Denied);
        }
        let needed = |part: &&KernelPart| match part {
            KernelPart::EgressHook => self.cluster.steering == Steering::EgressHook,
            KernelPart::Socket | KernelPart::Fib => self.cluster.backend == Backend::Nftables,
            _ => true,
        };
        let missing = facts.missing.iter().filter(needed);
        problems.extend(missing.map(|part| Problem::Missing { part: *part }));
        let is_range = |net: &IpNet| net.prefix_len() < net.max_prefix_len();
        if let Some((major, minor)) = facts.version.filter(|version| *version < STEADY) {
            if self.cluster.backend == Backend::Nftables && self.sources.iter().any(is_range) {
                problems.push(Problem::RangesMissed { major, minor });
            }
        }
        self.judge_forwarding(facts, problems);
        self.judge_forwarding_of_devices(facts, problems);
        self.judge_tunnel_ipv6(facts, problems);
        self.judge_reverse_path(facts, problems);
        for (family, name) in [(Family::V4, "ipv4"), (Family::V6, "ipv6")] {
            if facts.settings.get(&format!("{name}/fwmark_reflect")) == Some(1) {
                problems.push(Problem::MarkReflected { family });
            }
        }
        judge_conntrack(facts, problems);
    }

    fn judge_forwarding(&self, facts: &Facts, problems: &mut Vec<Problem>) {
        for family in &self.families {
            let name = match family {
                Family::V4 => "ipv4/ip_forward",
                Family::V6 => "ipv6/conf/all/forwarding",
            };
            match (facts.settings.get(name), family) {
                (Some(0), _) => problems.push(Problem::NotForwarding { family: *family }),
                (None, Family::V6) => {
                    problems.push(Problem::Missing { part: KernelPart::Ipv6 });
                }
                _ => {}
            }
        }
    }

    /// Judges the interfaces by which replies arrive: those with a node's address or an egress IP.
    fn judge_forwarding_of_devices(&self, facts: &Facts, problems: &mut Vec<Problem>) {
        if !self.families.contains(&Family::V4) || facts.settings.get("ipv4/ip_forward") == Some(0)
        {
            return;
        }
        let own = self.cluster.nodes.iter().filter(|node| node.name == self.cluster.node);
        let mut used = own.flat_map(|node| node.underlay.iter().copied()).collect::<Vec<_>>();
        used.extend(self.egress_ips.keys());
        let found = facts.addresses.iter().filter(|found| used.contains(&found.ip));
        let names: BTreeSet<&str> = found.map(|found| found.device.as_str()).collect();
        let off = facts.devices.iter().filter(|device| {
            device.not_forwarding && device.name != "lo" && names.contains(device.name.as_str())
        });
        let devices: Vec<_> = off.map(|device| device.name.clone()).collect();
        if !devices.is_empty() {
            problems.push(Problem::DeviceNotForwarding { devices });
        }
    }

    fn judge_tunnel_ipv6(&self, facts: &Facts, problems: &mut Vec<Problem>) {
        let off = |device: &str| facts.settings.get(&format!("ipv6/conf/{device}/disable_ipv6"));
        let tunnel = self.cluster.tunnel.device.as_str();
        let device = if off(tunnel).is_some() { tunnel } else { "default" };
        // Without IPv6 in the kernel, which is another problem, there is no such setting.
        if self.families.contains(&Family::V6) && facts.lacks_ipv6 && off(device).is_some() {
            problems.push(Problem::TunnelWithoutIpv6 { device: device.to_owned() });
        }
    }

    fn judge_reverse_path(&self, facts: &Facts, problems: &mut Vec<Problem>) {
        let settings = &facts.settings;
        let all = settings.get("ipv4/conf/all/rp_filter").unwrap_or(0);
        if self.families.contains(&Family::V4) {
            let strict = |own: u32| all.max(u64::from(own)) == STRICT;
            let (ours, others): (Vec<_>, Vec<_>) = facts
                .devices
                .iter()
                .filter(|device| strict(device.rp_filter))
                .partition(|d| d.ours);
            problems
                .extend(ours.into_iter().map(|d| Problem::StrictTunnel { device: d.name.clone() }));
            let devices: Vec<_> = others
                .into_iter()
                .filter(|device| device.kind == DeviceKind::Tunnel)
                .map(|device| device.name.clone())
                .collect();
            if !devices.is_empty() {
                problems.push(Problem::StrictOverlay { devices });
            } else if all == STRICT {
                problems.push(Problem::StrictByDefault);
            }
        }
        // The datapath sets it on its own interface.
        if settings.get("ipv4/conf/all/src_valid_mark") == Some(1) {
            problems.push(Problem::MarkInReversePath { device: "all".to_owned() });
        }
    }
}

fn judge_conntrack(facts: &Facts, problems: &mut Vec<Problem>) {
    let setting = |name: &str| facts.settings.get(&format!("netfilter/nf_conntrack_{name}"));
    if let (Some(count), Some(max)) = (setting("count"), setting("max")) {
        // A limit of 0 means no limit.
        if max > 0 && count.saturating_mul(5) > max.saturating_mul(4) {
            problems.push(Problem::ConntrackFull { count, max });
        }
    }
    if setting("tcp_loose") == Some(0) {
        problems.push(Problem::ConntrackStrict);
    }
}
