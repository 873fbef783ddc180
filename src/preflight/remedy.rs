//! Remedies for problems.

use super::{DropHook, FastPath, KernelPart, Problem};
use crate::types::Family;

impl Problem {
    /// Remedy for the problem, as an imperative or a command.
    pub fn remedy(&self) -> String {
        match self {
            Self::StrictTunnel { device } => loose(device),
            Self::StrictOverlay { devices } => {
                devices.iter().map(|device| loose(device)).collect::<Vec<_>>().join("; ")
            }
            Self::DropPolicy { hook: DropHook::Forward, table, chain, .. } => format!(
                "accept forwarded packets of the policies' pods, both ways, in chain {chain} of \
                 {table}: an accept verdict in one chain does not override a drop verdict in another"
            ),
            Self::DropPolicy { table, chain, port, .. } => format!(
                "accept UDP port {port} between the nodes in chain {chain} of {table}, if no rule \
                 does"
            ),
            Self::ReversePathFilter { table, chain, device, .. } => format!(
                "nft insert rule {table} {chain} iifname {device} accept; where the owner of the \
                 table writes its rules again, exempt {device} or switch the filter off there \
                 (firewalld: IPv6_rpfilter=no)"
            ),
            Self::SavedRules { file, for_iptables: true } => format!(
                "sed -i /EGRESSGATEWAY-/d {file}; and save rules without those of this crate: \
                 iptables-save | grep -v EGRESSGATEWAY-"
            ),
            Self::SavedRules { file, .. } => {
                format!("delete the tables egress_datapath and chains EGRESSGATEWAY-… from {file}")
            }
            Self::RuleTakesFirst { priority, .. } => format!(
                "move the other rule to {} or later, or give the cluster a lower rule priority, still \
                 behind the rule for local addresses; a rule that is added without a priority, as by \
                 wg-quick, lands ahead of any (wg-quick: Table = off, and rules of your own)",
                // The five priorities of the datapath are free of rules of others.
                priority.saturating_add(4)
            ),
            Self::RouteInOurTable { family, route } => {
                format!("{} del {route}", Self::ip_route(*family))
            }
            Self::DeviceNotForwarding { devices } => {
                let one = |device| format!("sysctl -w net/ipv4/conf/{device}/forwarding=1");
                devices.iter().map(one).collect::<Vec<_>>().join("; ")
            }
            Self::TunnelWithoutIpv6 { device } => {
                format!("sysctl -w net/ipv6/conf/{device}/disable_ipv6=0")
            }
            Self::VxlanTaken { device, .. } | Self::PortTaken { device, .. } => {
                format!("remove device {device}, or give the cluster another VNI or UDP port")
            }
            Self::NameTaken { device } => {
                format!("remove device {device}, or give the tunnel device another name")
            }
            Self::NatFirst { ours, .. } => format!(
                "move that chain to 100 or later; what it translates wears its address, although \
                 ours runs at {ours}"
            ),
            Self::NoUnderlay { address } => {
                format!("add {address} to a device, or correct the address of this node")
            }
            Self::UnderlayMtu { device, found, said } => format!(
                "set the cluster's underlay MTU to {found}, or to the smallest among the nodes, on \
                 every node; or ip link set {device} mtu {said}, if the network carries that"
            ),
            Self::EgressIpAbsent { address, .. } => format!(
                "add {address} to the uplink, or see to it that the network routes it to this node"
            ),
            Self::ClaimDevice { device, down: true, .. } => format!("ip link set {device} up"),
            Self::ClaimDevice { device, down: false, .. } => {
                format!("add device {device}, or name another one in the claim")
            }
            Self::EgressIpSilent { address, .. } => {
                format!("move {address} to the uplink, or route it to this node")
            }
            Self::EgressIpElsewhere { address, device, .. } => {
                format!("ip addr del {address} dev {device}, unless the gateway is just moving")
            }
            Self::EgressIpPreferred { address, device } => {
                format!("ip -6 addr change {address}/128 dev {device} preferred_lft 0")
            }
            Self::ConntrackFull { max, .. } => {
                format!("sysctl -w net.netfilter.nf_conntrack_max={}", max.saturating_mul(2))
            }
            Self::Missing { part } => missing(*part),
            other => other.fixed_remedy().to_owned(),
        }
    }

    /// Remedy for a problem whose facts make no difference to it.
    const fn fixed_remedy(&self) -> &'static str {
        match self {
            Self::Denied => {
                "run with CAP_NET_ADMIN in the user namespace that owns the network namespace"
            }
            Self::RangesMissed { .. } => {
                "name single addresses as sources, or use a kernel from 6.18 on"
            }
            Self::NotForwarding { family: Family::V4 } => "sysctl -w net.ipv4.ip_forward=1",
            Self::NotForwarding { family: Family::V6 } => {
                "sysctl -w net.ipv6.conf.all.forwarding=1"
            }
            Self::StrictByDefault => {
                "set rp_filter to 2 on devices where replies come in that the host would not \
                 route back the same way; the tunnel device gets it by itself"
            }
            Self::MarkInReversePath { .. } | Self::MarkReflected { .. } => {
                "nothing: packets to the excluded prefixes are routed as ever; check that these \
                 contain the pods and the nodes"
            }
            Self::MarkTestedByRule { .. } | Self::MarkUsedByFirewall { .. } => {
                "choose a mark layout without these bits, or move the other program's bits"
            }
            Self::PriorityShared { .. } => {
                "give the cluster another rule priority: it and the next three must be free"
            }
            Self::LocalRuleLate { .. } => {
                "move the rule for the local table ahead, or give the cluster a higher priority"
            }
            Self::TablesFew { .. } => "choose a larger range of routing tables",
            Self::PortsFew { .. } => "give some of these policies another egress IP",
            Self::TablesTaken { free: 0, .. } => "choose another range of routing tables",
            Self::TablesTaken { .. } => "nothing, if enough are free for the gateways in use",
            Self::Predecessor { .. } => {
                "stop its agent, then take the node over: IptablesDatapath::predecessor, or agent \
                 takeover"
            }
            Self::PortShared { .. } => "nothing: VXLAN devices share a port",
            Self::Flowtable { kept_out: true, .. } => {
                "nothing: the datapath keeps connections of policies out of flowtables"
            }
            Self::Flowtable { .. } => {
                "switch the flowtable off in the program that makes it, or use the nf_tables backend, \
                 which keeps connections of policies out of flowtables"
            }
            Self::FastPath { path: FastPath::Redirect | FastPath::Hardware, .. } => {
                "exempt packets of the policies' pods from these filters: tc filter show dev … ingress"
            }
            Self::FastPath { .. } => {
                "make sure that the programs leave packets of the policies' pods, and packets of the \
                 tunnel, to the kernel's network stack (Cilium: bpf.hostLegacyRouting=true)"
            }
            Self::LegacyIptables { both: true, .. } => {
                "let one variant of iptables do everything on this host, and list the rules of \
                 the other with iptables-legacy-save"
            }
            Self::LegacyIptables { .. } => "look at iptables-legacy-save for drops and marks",
            Self::TunnelMtu { .. } => "reconcile, which sets it",
            Self::EgressIpUsed { .. } => {
                "nothing, if pods may have an address in common with this node; else give the \
                 policies another one"
            }
            Self::ConntrackStrict => "sysctl -w net.netfilter.nf_conntrack_tcp_loose=1",
            _ => "",
        }
    }
}

/// Remedy for a missing kernel feature.
fn missing(part: KernelPart) -> String {
    let kernel = match part.since() {
        Some((major, minor)) => format!("use a kernel from {major}.{minor} on"),
        None => "use a kernel".to_owned(),
    };
    match part {
        KernelPart::Ipv6 => {
            "boot without ipv6.disable=1, or leave IPv6 out of the policies".to_owned()
        }
        KernelPart::EgressHook => {
            format!("steer by tables, or {kernel} that was built with it")
        }
        KernelPart::TableOwner => format!(
            "nothing, unless a datapath is to be alone in charge: it keeps other datapaths out, but \
             not other programs; {kernel} for that"
        ),
        _ => format!("load the module, or {kernel} that was built with it"),
    }
}

fn loose(device: &str) -> String {
    // Slashes separate the name's parts: a dot in an interface name would be taken for a separator.
    format!("sysctl -w net/ipv4/conf/{device}/rp_filter=2")
}
