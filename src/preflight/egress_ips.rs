//! Checks of the egress IPs among the addresses of this host.

use std::net::IpAddr;

use super::facts::{Address, Device, Facts};
use super::{Preflight, Problem, Wearer};

impl Preflight<'_> {
    pub(super) fn judge_egress_ips(&self, facts: &Facts, problems: &mut Vec<Problem>) {
        for (ip, wearer) in &self.egress_ips {
            if wearer.pods > Problem::PORTS {
                problems.push(Problem::PortsFew { address: *ip, pods: wearer.pods });
            }
            match (facts.addresses.iter().find(|found| found.ip == *ip), wearer.here) {
                (Some(found), true) => problems.extend(self.judge_own(facts, found, wearer)),
                (Some(found), false) => problems.push(elsewhere(found, wearer)),
                (None, true) => problems.extend(self.judge_absent(facts, *ip, wearer)),
                (None, false) => {}
            }
        }
    }

    /// Judges an egress IP that is not on this node, its gateway.
    fn judge_absent(&self, facts: &Facts, address: IpAddr, wearer: &Wearer) -> Option<Problem> {
        let policy = wearer.policy.clone();
        let Some(claim) = self.cluster.claim_of(address) else {
            return Some(Problem::EgressIpAbsent { address, policy });
        };
        // The first reconciliation adds it, if it can.
        let device = claim.device.as_str().to_owned();
        let found = facts.devices.iter().find(|found| found.name == device);
        let down = found.map(|found| found.down);
        (down != Some(false)).then(|| {
            let down = down.is_some();
            Problem::ClaimDevice { address, policy, device, down }
        })
    }

    /// Judges an egress IP that is on this node, its gateway.
    fn judge_own(&self, facts: &Facts, found: &Address, wearer: &Wearer) -> Vec<Problem> {
        let (address, device) = (found.ip, found.device.clone());
        let mut problems = Vec::new();
        // The kernel keeps an IPv4 address on an interface that goes down.
        let claimed = self.cluster.claim_of(address).is_some_and(|it| it.device.as_str() == device);
        let is_down = |other: &Device| other.name == device && other.down;
        if claimed && facts.devices.iter().any(is_down) {
            let policy = wearer.policy.clone();
            let device = device.clone();
            problems.push(Problem::ClaimDevice { address, policy, device, down: true });
        }
        if device == "lo" {
            problems.extend(
                self.silent_uplink(facts, address)
                    .map(|device| Problem::EgressIpSilent { address, device }),
            );
        }
        if address.is_ipv6() && !found.deprecated {
            problems.push(Problem::EgressIpPreferred { address, device });
        }
        let uses = facts.uses.iter().filter(|(ip, _)| *ip == address);
        let uses: Vec<_> = uses.map(|(_, what)| what.clone()).collect();
        if !uses.is_empty() {
            problems.push(Problem::EgressIpUsed { address, uses });
        }
        problems
    }

    /// Returns the underlay interface, if it does not answer ARP or NDP for an address of `lo`.
    fn silent_uplink(&self, facts: &Facts, address: IpAddr) -> Option<String> {
        let underlay = self.underlay()?;
        let uplink = facts.addresses.iter().find(|found| found.ip == underlay)?;
        // Neighbour discovery never does; ARP does, unless arp_ignore is 1 or more.
        let silent = address.is_ipv6() || facts.settings.larger("arp_ignore", &uplink.device) > 0;
        silent.then(|| uplink.device.clone())
    }
}

fn elsewhere(found: &Address, wearer: &Wearer) -> Problem {
    Problem::EgressIpElsewhere {
        address: found.ip,
        policy: wearer.policy.clone(),
        device: found.device.clone(),
    }
}
