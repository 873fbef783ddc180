//! Checks of the tunnel device, its UDP port and the underlay interface.

use super::facts::{Action, Device, Facts, Rule};
use super::{Preflight, Problem};
use crate::cluster::Tunnel;
use crate::iptables::{Predecessor, takeover};
use crate::types::Family;

impl Preflight<'_> {
    pub(super) fn judge_devices(&self, facts: &Facts, problems: &mut Vec<Problem>) {
        problems.extend(predecessor(facts));
        let tunnel = &self.cluster.tunnel;
        for device in facts.devices.iter().filter(|device| !device.ours) {
            if device.name == tunnel.device.as_str() {
                problems.push(Problem::NameTaken { device: device.name.clone() });
            }
            problems.extend(self.shares_port(device));
        }
        let Some(address) = self.underlay() else { return };
        let said = tunnel.underlay_mtu;
        match facts.addresses.iter().find(|found| found.ip == address) {
            None => problems.push(Problem::NoUnderlay { address }),
            Some(found) => {
                let name = tunnel.underlay_device.as_ref().map_or(&*found.device, |d| d.as_str());
                let small = facts.devices.iter().find(|device| device.name == name);
                if let Some(device) = small.filter(|device| device.mtu < said) {
                    let (device, found) = (device.name.clone(), device.mtu);
                    problems.push(Problem::UnderlayMtu { device, found, said });
                    // The kernel may limit the tunnel device to what this interface carries.
                    return;
                }
            }
        }
        let wanted = said.saturating_sub(match Family::of(address) {
            // Outer Ethernet, IP, UDP and VXLAN headers (RFC 7348, section 5).
            Family::V4 => 50,
            Family::V6 => 70,
        });
        for device in facts.devices.iter().filter(|device| device.ours && device.mtu != wanted) {
            let (device, found) = (device.name.clone(), device.mtu);
            problems.push(Problem::TunnelMtu { device, found, wanted });
        }
    }

    fn shares_port(&self, device: &Device) -> Option<Problem> {
        let vxlan = device.vxlan?;
        let (vni, port) = (vxlan.vni, self.cluster.tunnel.port);
        if vxlan.port != port {
            return None;
        }
        let device = device.name.clone();
        Some(if vxlan.external {
            Problem::PortTaken { device, port }
        } else if vni == self.cluster.tunnel.vni {
            Problem::VxlanTaken { device, vni, port }
        } else {
            Problem::PortShared { device, vni, port }
        })
    }
}

/// Detects state of spidernet's egressgateway, as far as these facts show it.
fn predecessor(facts: &Facts) -> Option<Problem> {
    let is_rule = |rule: &&Rule| match (rule.mark, rule.action) {
        (Some((mark, u32::MAX)), Action::Lookup { table, .. }) => {
            rule.priority == takeover::PRIORITY && table == mark && takeover::is_mark(mark)
        }
        _ => false,
    };
    let is_device = |device: &&Device| {
        let usual = |vxlan: super::facts::Vxlan| {
            (device.name.as_str(), vxlan.vni, vxlan.port) == takeover::DEVICE
        };
        !device.ours && device.vxlan.is_some_and(usual)
    };
    let rules = facts.rules.iter().filter(is_rule).count();
    let device = facts.devices.iter().find(is_device).map(|device| device.name.clone());
    (rules > 0 || device.is_some()).then_some(Problem::Predecessor { rules, device })
}

impl Predecessor {
    /// Conflict of a tunnel with the agent's device: equal name, or equal VNI and UDP port.
    ///
    /// A tunnel with such a conflict cannot be created while the agent's device exists. That device
    /// must stay until the datapath works, so the remedy is another name and another VNI.
    pub fn in_the_way(&self, tunnel: &Tunnel) -> Option<Problem> {
        let found = self.device.as_ref()?;
        let device = found.name.clone();
        if device == tunnel.device.as_str() {
            return Some(Problem::NameTaken { device });
        }
        let (vni, port) = (tunnel.vni, tunnel.port);
        let same = found.tunnel.is_some_and(|theirs| (theirs.vni, theirs.port) == (vni, port));
        same.then_some(Problem::VxlanTaken { device, vni, port })
    }
}
