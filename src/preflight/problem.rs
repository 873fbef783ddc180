//! Problems that the preflight check can find, each with its facts.

use std::net::IpAddr;

use super::terms::{DropHook, FastPath, MarkKind, Severity};
use crate::kernel::nft::KernelPart;
use crate::types::{Family, PolicyId};

/// Condition on this host that may keep the datapath from working.
///
/// Its `Display` is one sentence with the facts.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Problem {
    /// The kernel refuses changes of this network namespace: `CAP_NET_ADMIN` is missing.
    #[error("the kernel refuses changes of this network namespace: CAP_NET_ADMIN is missing")]
    Denied,
    /// The kernel was built without a feature that the datapath needs, or does not load it.
    #[error("the kernel has no {part}")]
    Missing {
        /// Missing feature.
        part: KernelPart,
    },
    /// The kernel may miss a range in an nf_tables set while ranges of the set change.
    ///
    /// A lookup misses a range while the range is replaced by another one with the same start, and
    /// on 6.1 also while an adjacent range changes. This lasts until the commit is over:
    /// microseconds, unless the CPU is preempted. Seen on 6.1 and 6.12, not on 6.18
    /// (`__nft_rbtree_lookup` in `net/netfilter/nft_set_rbtree.c`).
    #[error(
        "Linux {major}.{minor} may miss a range of sources while ranges change: a packet of it can \
         leave with the pod's own address then"
    )]
    RangesMissed {
        /// Major version of the kernel.
        major: u32,
        /// Minor version of the kernel.
        minor: u32,
    },
    /// The host does not forward packets of a family (sysctl `forwarding`).
    #[error("this host does not forward {family} packets")]
    NotForwarding {
        /// Address family.
        family: Family,
    },
    /// Interfaces by which replies arrive do not forward IPv4 packets, although the host does.
    ///
    /// They have an underlay address of this node or an egress IP. The tunnel device is not among
    /// them: its setting is the datapath's.
    #[error("{} does not forward IPv4 packets that arrive there, although the host does", devices.join(", "))]
    DeviceNotForwarding {
        /// Interfaces.
        devices: Vec<String>,
    },
    /// Strict reverse path filtering on the tunnel device drops every steered packet.
    ///
    /// Strict filtering drops packets that the host would not send back over the same interface;
    /// for the tunnel device that is every packet.
    #[error("reverse path filtering of {device} is strict: it drops every steered packet")]
    StrictTunnel {
        /// Tunnel device.
        device: String,
    },
    /// Strict reverse path filtering on the interfaces of an overlay network of pods.
    #[error(
        "reverse path filtering is strict on {}: replies from outside that arrive there \
         are dropped", devices.join(", ")
    )]
    StrictOverlay {
        /// Interfaces that decapsulate packets.
        devices: Vec<String>,
    },
    /// Strict reverse path filtering on every interface without a value of its own.
    #[error("reverse path filtering is strict on every device that has no value of its own")]
    StrictByDefault,
    /// The reverse path lookup uses the packet's firewall mark (`src_valid_mark`).
    #[error("{device} uses the packet's mark in reverse path lookups (src_valid_mark)")]
    MarkInReversePath {
        /// Interface, or `all`.
        device: String,
    },
    /// Kernel-generated replies carry the mark of the packet they reply to (`fwmark_reflect`).
    #[error(
        "the kernel's own {family} replies carry the mark of the packet they reply to (fwmark_reflect)"
    )]
    MarkReflected {
        /// Address family.
        family: Family,
    },
    /// A routing rule of another program tests bits of the datapath's marks.
    #[error(
        "{rule} tests bits {bits:#010x} of the mark, of which {shared:#010x} are in the mark layout"
    )]
    MarkTestedByRule {
        /// Rule as `ip rule` shows it.
        rule: String,
        /// Bits of the mark that the rule tests.
        bits: u32,
        /// Bits among them that belong to the datapath.
        shared: u32,
    },
    /// nf_tables rules of another program test or write bits of the datapath's marks.
    #[error(
        "{rules} rule(s) of nft table {table}, one in chain {chain}, {} bits {bits:#010x} of the \
         {kind} mark, of which {shared:#010x} are in the mark layout", if *writes { "write" } else { "test" }
    )]
    MarkUsedByFirewall {
        /// Family and name of the table.
        table: String,
        /// Chain with such a rule.
        chain: String,
        /// Number of such rules.
        rules: usize,
        /// Kind of mark: firewall mark or connection mark.
        kind: MarkKind,
        /// Set if the rules write the bits; otherwise they test them.
        writes: bool,
        /// Bits of the mark that the rules use.
        bits: u32,
        /// Bits among them that belong to the datapath.
        shared: u32,
    },
    /// A routing rule before the datapath's rules decides the route of steered packets.
    #[error("{rule} precedes the gateways' rules at {priority} and matches steered packets")]
    RuleTakesFirst {
        /// Rule as `ip rule` shows it.
        rule: String,
        /// Address family of the rule.
        family: Family,
        /// Priority of the datapath's first rule.
        priority: u32,
    },
    /// A routing rule of another program at one of the datapath's five rule priorities.
    #[error(
        "{rule} has a priority of ours: which of them is asked first depends on their age, and \
         packets without our mark may pass it by"
    )]
    PriorityShared {
        /// Rule as `ip rule` shows it.
        rule: String,
    },
    /// The rule for the `local` table does not come before the datapath's rules.
    #[error(
        "no {family} rule looks in the table of local addresses before ours at {priority}: packets \
         to this host are steered away"
    )]
    LocalRuleLate {
        /// Address family.
        family: Family,
        /// Priority of the datapath's first rule.
        priority: u32,
    },
    /// A route of another program in a table of the datapath takes steered packets.
    #[error(
        "{} {route} is of another program, and steered packets of this table match it",
        Self::ip_route(*family)
    )]
    RouteInOurTable {
        /// Address family of the route.
        family: Family,
        /// Route in the syntax of `ip route`.
        route: String,
    },
    /// IPv6 is disabled on the tunnel device, or will be on a new device.
    ///
    /// The datapath enables IPv6 on its device where it can: here `/proc/sys` is read-only, or not
    /// that of this network namespace.
    #[error("IPv6 is disabled on {device} and cannot be enabled: the tunnel can carry none of it")]
    TunnelWithoutIpv6 {
        /// Tunnel device, or `default` while it does not exist.
        device: String,
    },
    /// Routing tables of the datapath's range are in use by other programs.
    #[error(
        "{taken} of the routing tables {start} to {end} are in use by other programs, {free} are free"
    )]
    TablesTaken {
        /// First table of the range.
        start: u32,
        /// Last table of the range.
        end: u32,
        /// Number of tables in use.
        taken: u32,
        /// Number of free tables.
        free: u32,
    },
    /// The range has fewer free routing tables than there are gateway nodes.
    #[error(
        "{gateways} gateways need a routing table each, and {free} of {start} to {end} are free"
    )]
    TablesFew {
        /// First table of the range.
        start: u32,
        /// Last table of the range.
        end: u32,
        /// Number of tables that no other program uses.
        free: u32,
        /// Number of gateway nodes that the policies name, without this node.
        gateways: u32,
    },
    /// Another VXLAN device has the VNI and the UDP port of the tunnel.
    #[error("VXLAN device {device} has the tunnel's VNI {vni} and UDP port {port}")]
    VxlanTaken {
        /// VXLAN device.
        device: String,
        /// VNI.
        vni: u32,
        /// UDP port.
        port: u16,
    },
    /// Another VXLAN device takes every VNI on the UDP port of the tunnel.
    #[error("VXLAN device {device} receives every VNI on the tunnel's UDP port {port}")]
    PortTaken {
        /// VXLAN device.
        device: String,
        /// UDP port.
        port: u16,
    },
    /// Another VXLAN device has the UDP port of the tunnel and another VNI, which works.
    #[error("VXLAN device {device} also uses the tunnel's UDP port {port}, with VNI {vni}")]
    PortShared {
        /// VXLAN device.
        device: String,
        /// VNI of the other device.
        vni: u32,
        /// UDP port.
        port: u16,
    },
    /// The agent of spidernet's egressgateway runs on this node, or has left its state.
    #[error(
        "{rules} routing rule(s){} are as spidernet's egressgateway makes them",
        device.as_ref().map(|name| format!(" and VXLAN device {name}")).unwrap_or_default()
    )]
    Predecessor {
        /// Number of routing rules of that agent.
        rules: usize,
        /// Tunnel device of that agent, if it has its usual name, VNI and port.
        device: Option<String>,
    },
    /// A device of another program has the name of the tunnel device.
    #[error("device {device} exists and was not created by this crate")]
    NameTaken {
        /// Name of the device.
        device: String,
    },
    /// A base chain with policy drop drops packets that no rule of it accepts.
    #[error(
        "chain {chain} of nft table {table} drops {hook} packets that none of its rules accepts"
    )]
    DropPolicy {
        /// Family and name of the table.
        table: String,
        /// Base chain.
        chain: String,
        /// Hook of the chain, and so the packets affected.
        hook: DropHook,
        /// UDP port of the tunnel.
        port: u16,
    },
    /// An nf_tables rule drops packets from the tunnel device as a reverse path filter.
    ///
    /// The rule looks for a route to the source by the interface of the packet (`fib saddr . iif
    /// oif missing`, `-m rpfilter --invert`). The pod of another node is behind another interface.
    #[error(
        "chain {chain} of nft table {table} drops {family} packets that come out of {device}, by {}: \
         a reverse path filter", Self::rule_or_policy(*rule)
    )]
    ReversePathFilter {
        /// Family and name of the table.
        table: String,
        /// Chain that drops the packets.
        chain: String,
        /// Handle of the rule; `None` if the chain's policy drops what its rules do not accept.
        rule: Option<u64>,
        /// Tunnel device.
        device: String,
        /// Address family of the packets.
        family: Family,
        /// Set if the rules drop every such packet; otherwise they depend on more than the check
        /// evaluates.
        certain: bool,
    },
    /// A flowtable of another program forwards packets of open connections ahead of all hooks.
    #[error(
        "flowtable {name} of nft table {table} forwards packets of open connections on {}{}, ahead \
         of all hooks", devices.join(", "), if *hardware { " and in the hardware" } else { "" }
    )]
    Flowtable {
        /// Family and name of the table.
        table: String,
        /// Flowtable.
        name: String,
        /// Interfaces of the flowtable.
        devices: Vec<String>,
        /// Set if connections are offloaded to the hardware.
        hardware: bool,
        /// Set if the datapath keeps connections of policies out of flowtables: with nf_tables.
        kept_out: bool,
    },
    /// Packets may leave an interface ahead of all hooks of nf_tables.
    #[error("{path} on {}, ahead of all hooks", devices.join(", "))]
    FastPath {
        /// Path of the packets.
        path: FastPath,
        /// Interfaces.
        devices: Vec<String>,
    },
    /// A file from which the host restores its firewall has rules of this crate.
    ///
    /// `iptables-restore` refuses the whole file while a set is missing, as it is at boot: the
    /// host's own rules are missing then as well. With a table of `nft` old policies come back, or
    /// `nft -f` fails as a whole while the table has an owner.
    #[error(
        "{file} has rules of this crate: {}",
        if *for_iptables {
            "none of its rules can be restored at boot, when the sets of this crate are missing"
        } else {
            "at boot they are in force before the policies are read, and a reload may fail"
        }
    )]
    SavedRules {
        /// File.
        file: String,
        /// Set if the file is one of `iptables-restore`; otherwise one of `nft`.
        for_iptables: bool,
    },
    /// Legacy iptables has rules, which this check cannot see.
    #[error(
        "legacy iptables has tables ({}), whose rules this check cannot see{}", tables.join(", "),
        if *both { "; iptables-nft is in use as well" } else { "" }
    )]
    LegacyIptables {
        /// Tables of legacy iptables.
        tables: Vec<String>,
        /// Set if iptables-nft has tables as well.
        both: bool,
    },
    /// A NAT chain of another program runs before the datapath's chain.
    ///
    /// The first chain that translates a connection wins.
    #[error(
        "NAT chain {chain} of nft table {table} runs at {priority}, before this crate's chain at {ours}"
    )]
    NatFirst {
        /// Family and name of the table.
        table: String,
        /// NAT chain.
        chain: String,
        /// Priority of the chain.
        priority: i32,
        /// Priority of the datapath's chain.
        ours: i32,
    },
    /// No interface has this node's underlay address.
    #[error("no device has {address}, the underlay address of this node")]
    NoUnderlay {
        /// Underlay address.
        address: IpAddr,
    },
    /// The MTU of the underlay interface is smaller than the one in the cluster configuration.
    #[error(
        "device {device} has MTU {found}, and the cluster is configured with {said}: larger packets \
         from other nodes are lost here"
    )]
    UnderlayMtu {
        /// Underlay interface.
        device: String,
        /// MTU of the interface, in bytes.
        found: u32,
        /// MTU in the cluster configuration, in bytes.
        said: u32,
    },
    /// The MTU of the datapath's tunnel device is wrong.
    #[error("tunnel device {device} has MTU {found} in place of {wanted}")]
    TunnelMtu {
        /// Tunnel device.
        device: String,
        /// MTU of the device, in bytes.
        found: u32,
        /// MTU that the device should have, in bytes.
        wanted: u32,
    },
    /// An egress IP of this gateway node is on none of its interfaces.
    #[error("egress IP {address} of policy {policy} is on no device of this gateway")]
    EgressIpAbsent {
        /// Egress IP.
        address: IpAddr,
        /// Policy that uses the egress IP.
        policy: PolicyId,
    },
    /// The interface to which this node adds an egress IP is down or does not exist.
    #[error(
        "egress IP {address} of policy {policy} is to be added to device {device}, which {}",
        if *.down { "is down" } else { "does not exist" }
    )]
    ClaimDevice {
        /// Egress IP.
        address: IpAddr,
        /// Policy that uses the egress IP.
        policy: PolicyId,
        /// Interface of the [`Claim`](crate::Claim).
        device: String,
        /// Set if the interface is down; otherwise there is none.
        down: bool,
    },
    /// More pods use an egress IP than it has ports.
    #[error(
        "{pods} pods use egress IP {address}, which has ports for {} connections at a time to \
         one destination",
        Self::PORTS
    )]
    PortsFew {
        /// Egress IP.
        address: IpAddr,
        /// Single-address sources of the policies that use the egress IP on this node.
        pods: usize,
    },
    /// An egress IP is on `lo`, and the uplink does not answer ARP or NDP for it.
    #[error("egress IP {address} is on lo, and {device} does not answer for it")]
    EgressIpSilent {
        /// Egress IP.
        address: IpAddr,
        /// Uplink interface.
        device: String,
    },
    /// An egress IP is on a node that is not its gateway.
    #[error(
        "egress IP {address} of policy {policy} is on device {device}, but this node is not its \
         gateway"
    )]
    EgressIpElsewhere {
        /// Egress IP.
        address: IpAddr,
        /// Policy that uses the egress IP.
        policy: PolicyId,
        /// Interface with the egress IP.
        device: String,
    },
    /// The host may select an IPv6 egress IP as the source address of its own packets.
    #[error("egress IP {address} on {device} may become the source of this host's own packets")]
    EgressIpPreferred {
        /// Egress IP.
        address: IpAddr,
        /// Interface with the egress IP.
        device: String,
    },
    /// This node itself uses an egress IP that policies give to pods.
    ///
    /// Both uses work, and share the ports of the address. Sockets that are bound to no address are
    /// not named, although they are reached at the egress IP, too.
    #[error("egress IP {address} is also used by this node: {}", uses.join(", "))]
    EgressIpUsed {
        /// Egress IP.
        address: IpAddr,
        /// The uses: routes that name the address as source, and sockets bound to it.
        uses: Vec<String>,
    },
    /// The conntrack table is nearly full.
    #[error("{count} of {max} connections are tracked: the next ones will be dropped")]
    ConntrackFull {
        /// Number of conntrack entries.
        count: u64,
        /// Maximum number of conntrack entries.
        max: u64,
    },
    /// Conntrack does not pick up established TCP connections (`nf_conntrack_tcp_loose=0`).
    #[error("TCP connections are not picked up mid-stream: one that moves to this gateway ends")]
    ConntrackStrict,
}

impl Problem {
    /// Ports of an egress IP for one remote address, remote port and protocol.
    ///
    /// Source NAT uses ports from 1024 on (`nf_nat_l4proto_unique_tuple` in
    /// `net/netfilter/nf_nat_core.c`).
    pub const PORTS: usize = 64_512;

    pub(super) const fn ip_route(family: Family) -> &'static str {
        match family {
            Family::V4 => "ip route",
            Family::V6 => "ip -6 route",
        }
    }

    fn rule_or_policy(rule: Option<u64>) -> String {
        rule.map_or("its policy".to_owned(), |handle| format!("the rule with handle {handle}"))
    }

    /// Short code of the problem, which never changes: for alerts and for programs.
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Denied { .. } => "privilege_missing",
            Self::Missing { .. } => "kernel_feature_missing",
            Self::RangesMissed { .. } => "ranges_missed",
            Self::NotForwarding { .. } => "not_forwarding",
            Self::DeviceNotForwarding { .. } => "device_not_forwarding",
            Self::StrictTunnel { .. } => "strict_tunnel",
            Self::StrictOverlay { .. } => "strict_overlay",
            Self::StrictByDefault { .. } => "strict_by_default",
            Self::MarkInReversePath { .. } => "mark_in_reverse_path",
            Self::MarkReflected { .. } => "mark_reflected",
            Self::MarkTestedByRule { .. } => "mark_tested_by_rule",
            Self::MarkUsedByFirewall { .. } => "mark_used_by_firewall",
            Self::RuleTakesFirst { .. } => "rule_takes_first",
            Self::PriorityShared { .. } => "priority_shared",
            Self::LocalRuleLate { .. } => "local_rule_late",
            Self::RouteInOurTable { .. } => "route_in_our_table",
            Self::TunnelWithoutIpv6 { .. } => "tunnel_without_ipv6",
            Self::TablesTaken { .. } => "tables_taken",
            Self::TablesFew { .. } => "tables_few",
            Self::VxlanTaken { .. } => "vxlan_taken",
            Self::PortTaken { .. } => "port_taken",
            Self::PortShared { .. } => "port_shared",
            Self::Predecessor { .. } => "spidernet_present",
            Self::NameTaken { .. } => "name_taken",
            Self::DropPolicy { .. } => "drop_policy",
            Self::ReversePathFilter { .. } => "reverse_path_filter",
            Self::Flowtable { .. } => "flowtable",
            Self::FastPath { .. } => "fast_path",
            Self::SavedRules { .. } => "saved_rules",
            Self::LegacyIptables { .. } => "legacy_iptables",
            Self::NatFirst { .. } => "nat_first",
            Self::NoUnderlay { .. } => "no_underlay",
            Self::UnderlayMtu { .. } => "underlay_mtu",
            Self::TunnelMtu { .. } => "tunnel_mtu",
            Self::EgressIpAbsent { .. } => "egress_ip_absent",
            Self::ClaimDevice { .. } => "claim_device",
            Self::PortsFew { .. } => "ports_few",
            Self::EgressIpSilent { .. } => "egress_ip_silent",
            Self::EgressIpElsewhere { .. } => "egress_ip_elsewhere",
            Self::EgressIpPreferred { .. } => "egress_ip_preferred",
            Self::EgressIpUsed { .. } => "egress_ip_used",
            Self::ConntrackFull { .. } => "conntrack_full",
            Self::ConntrackStrict { .. } => "conntrack_strict",
        }
    }

    /// Address family that the problem is about; `None` if it may concern both.
    pub const fn family(&self) -> Option<Family> {
        match self {
            Self::Missing { part: KernelPart::Ipv6 } | Self::TunnelWithoutIpv6 { .. } => {
                Some(Family::V6)
            }
            // Settings of IPv4 alone.
            Self::DeviceNotForwarding { .. }
            | Self::StrictTunnel { .. }
            | Self::StrictOverlay { .. }
            | Self::StrictByDefault
            | Self::MarkInReversePath { .. } => Some(Family::V4),
            Self::NotForwarding { family }
            | Self::MarkReflected { family }
            | Self::RuleTakesFirst { family, .. }
            | Self::LocalRuleLate { family, .. }
            | Self::RouteInOurTable { family, .. }
            | Self::ReversePathFilter { family, .. } => Some(*family),
            Self::EgressIpAbsent { address, .. }
            | Self::ClaimDevice { address, .. }
            | Self::PortsFew { address, .. }
            | Self::EgressIpSilent { address, .. }
            | Self::EgressIpElsewhere { address, .. }
            | Self::EgressIpPreferred { address, .. } => Some(Family::of(*address)),
            _ => None,
        }
    }

    /// Severity of the problem.
    pub fn severity(&self) -> Severity {
        match self {
            Self::Missing { part } if part.can_be_done_without() => Severity::Note,
            Self::Denied
            | Self::Missing { .. }
            | Self::NotForwarding { .. }
            | Self::DeviceNotForwarding { .. }
            | Self::StrictTunnel { .. }
            | Self::RuleTakesFirst { .. }
            | Self::RouteInOurTable { .. }
            | Self::TunnelWithoutIpv6 { .. }
            | Self::LocalRuleLate { .. }
            | Self::VxlanTaken { .. }
            | Self::PortTaken { .. }
            | Self::NameTaken { .. }
            | Self::NoUnderlay { .. }
            | Self::ClaimDevice { .. }
            | Self::ReversePathFilter { certain: true, .. }
            | Self::TablesFew { .. }
            | Self::TablesTaken { free: 0, .. } => Severity::Broken,
            Self::StrictOverlay { .. }
            | Self::RangesMissed { .. }
            | Self::MarkTestedByRule { .. }
            | Self::MarkUsedByFirewall { .. }
            | Self::PriorityShared { .. }
            | Self::DropPolicy { .. }
            | Self::NatFirst { .. }
            | Self::Predecessor { .. }
            | Self::SavedRules { .. }
            | Self::ReversePathFilter { .. }
            | Self::Flowtable { kept_out: false, .. }
            | Self::FastPath { path: FastPath::Redirect | FastPath::Hardware, .. }
            | Self::LegacyIptables { both: true, .. }
            | Self::EgressIpElsewhere { .. }
            | Self::EgressIpPreferred { .. }
            | Self::PortsFew { .. }
            | Self::UnderlayMtu { .. }
            | Self::ConntrackFull { .. } => Severity::Risk,
            Self::TunnelMtu { found, wanted, .. } if found > wanted => Severity::Risk,
            Self::StrictByDefault
            | Self::MarkInReversePath { .. }
            | Self::MarkReflected { .. }
            | Self::TablesTaken { .. }
            | Self::Flowtable { .. }
            | Self::FastPath { .. }
            | Self::PortShared { .. }
            | Self::LegacyIptables { .. }
            | Self::TunnelMtu { .. }
            | Self::EgressIpAbsent { .. }
            | Self::EgressIpSilent { .. }
            | Self::EgressIpUsed { .. }
            | Self::ConntrackStrict => Severity::Note,
        }
    }
}
