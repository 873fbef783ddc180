//! What can be found, each with its facts.

use std::net::IpAddr;

use super::terms::{DropHook, MarkKind, Severity};
use crate::kernel::nft::KernelPart;
use crate::types::{Family, PolicyId};

/// Something on this host that may keep the datapath from working.
///
/// Its `Display` is one sentence with the facts.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Problem {
    /// The kernel refuses changes of this network namespace.
    #[error("the kernel refuses changes of this network namespace: CAP_NET_ADMIN is missing")]
    Denied,
    /// The kernel was built without something, or does not load it.
    #[error("the kernel has no {part}")]
    Missing {
        /// What is missing.
        part: KernelPart,
    },
    /// The kernel misses a range in a set while the range is replaced by another that begins alike,
    /// and 6.1 also while one beside it changes.
    ///
    /// That is so until the commit is over: microseconds, unless the processor is taken away from
    /// it. Seen on 6.1 and 6.12, not on 6.18 (`__nft_rbtree_lookup` in
    /// `net/netfilter/nft_set_rbtree.c`).
    #[error(
        "Linux {major}.{minor} may miss a range of sources while ranges change: a packet of it can \
         leave with the pod's own address then"
    )]
    RangesMissed {
        /// The first number of the kernel's version.
        major: u32,
        /// The second one.
        minor: u32,
    },
    /// The host does not forward packets.
    #[error("this host does not forward {family} packets")]
    NotForwarding {
        /// The family.
        family: Family,
    },
    /// The tunnel device drops what it would not send back the same way, which is everything.
    #[error("reverse path filtering of {device} is strict: it drops every packet that is steered")]
    StrictTunnel {
        /// The tunnel device.
        device: String,
    },
    /// Strict filtering on devices of a network of pods.
    #[error(
        "reverse path filtering is strict on {}: replies from outside that come back over them \
         are dropped", devices.join(", ")
    )]
    StrictOverlay {
        /// Devices that take packets out of others.
        devices: Vec<String>,
    },
    /// Strict filtering by default.
    #[error("reverse path filtering is strict on every device that has no value of its own")]
    StrictByDefault,
    /// The reverse path is looked up with the packet's mark.
    #[error("{device} looks reverse paths up with the packet's mark (src_valid_mark)")]
    MarkInReversePath {
        /// The device, or `all`.
        device: String,
    },
    /// The kernel's own answers carry the mark of what they answer.
    #[error(
        "the kernel's own {family} answers carry the mark of what they answer (fwmark_reflect)"
    )]
    MarkReflected {
        /// The family.
        family: Family,
    },
    /// A routing rule of others tests bits of our marks.
    #[error("{rule} tests bits {bits:#010x} of the mark, of which {shared:#010x} are ours")]
    MarkTestedByRule {
        /// The rule as `ip rule` shows it.
        rule: String,
        /// The bits it tests.
        bits: u32,
        /// Those of them that are ours.
        shared: u32,
    },
    /// Firewall rules of others test or write bits of our marks.
    #[error(
        "{rules} rule(s) of nft table {table}, one in chain {chain}, {} bits {bits:#010x} of the \
         {kind} mark, of which {shared:#010x} are ours", if *writes { "write" } else { "test" }
    )]
    MarkUsedByFirewall {
        /// Family and name of the table.
        table: String,
        /// A chain that has such a rule.
        chain: String,
        /// How many there are.
        rules: usize,
        /// Whose mark it is.
        kind: MarkKind,
        /// Whether they write the bits; otherwise they test them.
        writes: bool,
        /// The bits.
        bits: u32,
        /// Those of them that are ours.
        shared: u32,
    },
    /// A routing rule ahead of ours decides about the packets that we steer.
    #[error("{rule} comes before ours at {priority} and takes the packets that we steer")]
    RuleTakesFirst {
        /// The rule as `ip rule` shows it.
        rule: String,
        /// Priority of ours.
        priority: u32,
    },
    /// A routing rule of others at one of our four priorities.
    #[error(
        "{rule} has a priority of ours: which of them is asked first depends on their age, and \
         packets without our mark may pass it by"
    )]
    PriorityShared {
        /// The rule as `ip rule` shows it.
        rule: String,
    },
    /// The rule for local addresses does not come before ours.
    #[error(
        "no {family} rule looks in the table of local addresses before ours at {priority}: packets \
         to this host are steered away"
    )]
    LocalRuleLate {
        /// The family.
        family: Family,
        /// Priority of ours.
        priority: u32,
    },
    /// A route of somebody else in a table of ours takes packets that we steer.
    #[error("{command} {route} is not ours, and packets that we steer by this table take it")]
    RouteInOurTable {
        /// The command that lists it: `ip route` or `ip -6 route`.
        command: &'static str,
        /// The route as that command takes it.
        route: String,
    },
    /// The tunnel device has no IPv6, or will have none.
    #[error("IPv6 is switched off for {device}: the tunnel can carry none of it")]
    TunnelWithoutIpv6 {
        /// The device, or `default` where there is none yet.
        device: String,
    },
    /// Routing tables that we may give out are in use.
    #[error("{taken} of the routing tables {start} to {end} are in use by others, {free} are free")]
    TablesTaken {
        /// First table of the range.
        start: u32,
        /// Last table of the range.
        end: u32,
        /// How many are in use.
        taken: u32,
        /// How many are not.
        free: u32,
    },
    /// There are fewer routing tables for us than gateways.
    #[error(
        "{gateways} gateways need a routing table each, and {free} of {start} to {end} are free"
    )]
    TablesFew {
        /// First table of the range.
        start: u32,
        /// Last table of the range.
        end: u32,
        /// How many nobody else uses.
        free: u32,
        /// How many gateways the policies name, besides this node.
        gateways: u32,
    },
    /// Another VXLAN device has our VNI and port.
    #[error("VXLAN device {device} has our VNI {vni} and our UDP port {port}")]
    VxlanTaken {
        /// The device.
        device: String,
        /// The VNI.
        vni: u32,
        /// The port.
        port: u16,
    },
    /// Another VXLAN device takes everything that arrives at our port.
    #[error("VXLAN device {device} takes every VNI on our UDP port {port}")]
    PortTaken {
        /// The device.
        device: String,
        /// The port.
        port: u16,
    },
    /// Another VXLAN device has our port and another VNI, which works.
    #[error("VXLAN device {device} uses our UDP port {port} too, with VNI {vni}")]
    PortShared {
        /// The device.
        device: String,
        /// Its VNI.
        vni: u32,
        /// The port.
        port: u16,
    },
    /// The agent of spidernet's egressgateway runs here, or has left its state.
    #[error(
        "{rules} routing rule(s){} are as spidernet's egressgateway makes them",
        device.as_ref().map(|name| format!(" and VXLAN device {name}")).unwrap_or_default()
    )]
    Predecessor {
        /// How many of its routing rules there are.
        rules: usize,
        /// Its tunnel device, if it has its usual name, VNI and port.
        device: Option<String>,
    },
    /// Somebody else's device has the name of our tunnel device.
    #[error("device {device} exists and is not ours")]
    NameTaken {
        /// The name.
        device: String,
    },
    /// A base chain drops what nobody accepts.
    #[error("chain {chain} of nft table {table} drops {hook} packets that no rule of it accepts")]
    DropPolicy {
        /// Family and name of the table.
        table: String,
        /// The chain.
        chain: String,
        /// Which packets.
        hook: DropHook,
        /// UDP port of the tunnel.
        port: u16,
    },
    /// There are rules of legacy iptables, which this check cannot see.
    #[error(
        "legacy iptables has tables ({}), whose rules this check cannot see{}", tables.join(", "),
        if *both { "; iptables-nft is in use as well" } else { "" }
    )]
    LegacyIptables {
        /// Its tables.
        tables: Vec<String>,
        /// Whether iptables-nft has tables as well.
        both: bool,
    },
    /// A NAT chain of others runs before ours, and the first that translates wins.
    #[error("NAT chain {chain} of nft table {table} runs at {priority}, before ours at {ours}")]
    NatFirst {
        /// Family and name of the table.
        table: String,
        /// The chain.
        chain: String,
        /// Its priority.
        priority: i32,
        /// Priority of ours.
        ours: i32,
    },
    /// No device has this node's underlay address.
    #[error("no device has {address}, the underlay address of this node")]
    NoUnderlay {
        /// The address.
        address: IpAddr,
    },
    /// The underlay device has another MTU than the cluster says.
    #[error("device {device} has MTU {found}, and the cluster says {said}")]
    UnderlayMtu {
        /// The device.
        device: String,
        /// What it has, in bytes.
        found: u32,
        /// What the cluster says, in bytes.
        said: u32,
    },
    /// Our tunnel device has another MTU than it should.
    #[error("tunnel device {device} has MTU {found} in place of {wanted}")]
    TunnelMtu {
        /// The device.
        device: String,
        /// What it has, in bytes.
        found: u32,
        /// What it should have, in bytes.
        wanted: u32,
    },
    /// An egress IP of this gateway is on none of its devices.
    #[error("egress IP {address} of policy {policy} is on no device of this gateway")]
    EgressIpAbsent {
        /// The address.
        address: IpAddr,
        /// A policy that wears it.
        policy: PolicyId,
    },
    /// More pods wear an egress IP than it has ports.
    #[error(
        "{pods} pods wear egress IP {address}, and it has ports for {} connections at a time to \
         one destination",
        Self::PORTS
    )]
    PortsFew {
        /// The address.
        address: IpAddr,
        /// Single sources of the policies that wear it on this node.
        pods: usize,
    },
    /// An egress IP is on the loopback device, and the uplink does not answer for it.
    #[error("egress IP {address} is on lo, and {device} does not answer for it")]
    EgressIpSilent {
        /// The address.
        address: IpAddr,
        /// The uplink.
        device: String,
    },
    /// An egress IP is on a node that is not its gateway.
    #[error(
        "egress IP {address} of policy {policy} is on device {device}, but this node is not its \
         gateway"
    )]
    EgressIpElsewhere {
        /// The address.
        address: IpAddr,
        /// A policy that wears it.
        policy: PolicyId,
        /// The device.
        device: String,
    },
    /// The host itself may take an IPv6 egress IP as its source address.
    #[error("egress IP {address} on {device} may become the source of this host's own packets")]
    EgressIpPreferred {
        /// The address.
        address: IpAddr,
        /// The device.
        device: String,
    },
    /// The table of connections is nearly full.
    #[error("{count} of {max} connections are tracked: the next ones will be dropped")]
    ConntrackFull {
        /// Connections tracked.
        count: u64,
        /// How many there can be.
        max: u64,
    },
    /// Connections are not picked up in the middle.
    #[error("TCP connections are not picked up in the middle: one that moves to this gateway ends")]
    ConntrackStrict,
}

impl Problem {
    /// Ports that an egress IP has for one address, port and protocol outside: from 1024 on
    /// (`nf_nat_l4proto_unique_tuple` in `net/netfilter/nf_nat_core.c`).
    pub const PORTS: usize = 64_512;

    /// How bad it is.
    pub fn severity(&self) -> Severity {
        match self {
            Self::Missing { part } if part.can_be_done_without() => Severity::Note,
            Self::Denied
            | Self::Missing { .. }
            | Self::NotForwarding { .. }
            | Self::StrictTunnel { .. }
            | Self::RuleTakesFirst { .. }
            | Self::RouteInOurTable { .. }
            | Self::TunnelWithoutIpv6 { .. }
            | Self::LocalRuleLate { .. }
            | Self::VxlanTaken { .. }
            | Self::PortTaken { .. }
            | Self::NameTaken { .. }
            | Self::NoUnderlay { .. }
            | Self::TablesFew { .. }
            | Self::TablesTaken { free: 0, .. } => Severity::Broken,
            Self::UnderlayMtu { found, said, .. } if found < said => Severity::Broken,
            Self::StrictOverlay { .. }
            | Self::RangesMissed { .. }
            | Self::MarkTestedByRule { .. }
            | Self::MarkUsedByFirewall { .. }
            | Self::PriorityShared { .. }
            | Self::DropPolicy { .. }
            | Self::NatFirst { .. }
            | Self::Predecessor { .. }
            | Self::LegacyIptables { both: true, .. }
            | Self::EgressIpElsewhere { .. }
            | Self::EgressIpPreferred { .. }
            | Self::PortsFew { .. }
            | Self::ConntrackFull { .. } => Severity::Risk,
            Self::StrictByDefault
            | Self::MarkInReversePath { .. }
            | Self::MarkReflected { .. }
            | Self::TablesTaken { .. }
            | Self::PortShared { .. }
            | Self::LegacyIptables { .. }
            | Self::UnderlayMtu { .. }
            | Self::TunnelMtu { .. }
            | Self::EgressIpAbsent { .. }
            | Self::EgressIpSilent { .. }
            | Self::ConntrackStrict => Severity::Note,
        }
    }
}
