//! Errors of planning: contradictory or invalid input.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::alloc::AllocError;
use crate::cluster::RulePriorities;
use crate::types::{DeviceName, Family, MacAddr, Mark, NodeName, PolicyId, TableId};

/// An error in the input, which contradicts itself or the kernel's limits; nothing was changed.
///
/// The guide has the [next step](crate::guide::errors#errors-of-the-plan) for each error.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// The node of the plan is not in the list of nodes.
    #[error("node {node} is not in the cluster's list of nodes")]
    UnknownNode {
        /// Name of the node.
        node: NodeName,
    },
    /// The name of the tunnel interface has characters that iptables interprets otherwise.
    #[error(
        "iptables cannot name the tunnel device {device}: use letters, digits and . _ - @ only"
    )]
    IptablesDevice {
        /// The tunnel interface.
        device: DeviceName,
    },
    /// Steering by the egress hook was combined with a mark layout without prefix.
    #[error(
        "steering by the egress hook needs a layout of marks with a prefix: one routing rule must \
         tell them all"
    )]
    EgressHookPrefix,
    /// Steering by the egress hook was combined with iptables as backend.
    #[error("steering by the egress hook needs nf_tables as backend: iptables has no such hook")]
    EgressHookBackend,
    /// A node name occurs twice.
    #[error("node {node} is listed twice")]
    DuplicateNode {
        /// The name.
        node: NodeName,
    },
    /// An underlay or tunnel address is not a unicast address of a host.
    #[error("node {node} cannot have address {address}: it is not a unicast address")]
    NodeAddress {
        /// The node.
        node: NodeName,
        /// The address.
        address: IpAddr,
    },
    /// An IPv4 address of a node is written as an IPv4-mapped IPv6 address.
    #[error("node {node} has address {address}: write IPv4 addresses as IPv4")]
    NodeMapped {
        /// The node.
        node: NodeName,
        /// The address.
        address: IpAddr,
    },
    /// A node has more than one underlay or tunnel address of a family.
    #[error("node {node} has more than one {family} underlay or tunnel address")]
    NodeFamily {
        /// The node.
        node: NodeName,
        /// The family.
        family: Family,
    },
    /// This node has no underlay address.
    #[error("node {node} has no underlay address")]
    NoUnderlay {
        /// The node.
        node: NodeName,
    },
    /// A node has no underlay address of the family of this node's outer packets.
    #[error("node {node} has no {family} underlay address, which the tunnel of this node uses")]
    UnderlayFamily {
        /// The node.
        node: NodeName,
        /// The family of this node's outer packets.
        family: Family,
    },
    /// A node has no tunnel address.
    #[error("node {node} has no tunnel address")]
    NoTunnel {
        /// The node.
        node: NodeName,
    },
    /// The MAC address of a node is zero or a group address.
    #[error("node {node} cannot have Ethernet address {mac}: it is zero or a group address")]
    Mac {
        /// The node.
        node: NodeName,
        /// The address.
        mac: MacAddr,
    },
    /// The mark of a node is outside the layout, or reserved in it.
    #[error("node {node} cannot have mark {mark}: the layout has no such gateway mark")]
    ForeignMark {
        /// The node.
        node: NodeName,
        /// The mark.
        mark: Mark,
    },
    /// Two nodes have the same address, MAC address or mark.
    #[error("nodes {one} and {other} both have {what}")]
    Shared {
        /// The shared address or mark.
        what: String,
        /// The first node.
        one: NodeName,
        /// The second node.
        other: NodeName,
    },
    /// The VXLAN network identifier is zero or longer than 24 bits.
    #[error("VXLAN network identifier {vni} is not between 1 and 16777215")]
    Vni {
        /// The identifier.
        vni: u32,
    },
    /// The UDP port of the tunnel is 0.
    #[error("the tunnel needs a UDP port other than 0")]
    Port,
    /// The underlay MTU is too small for IPv6 packets of minimum size in the tunnel.
    #[error("underlay MTU {mtu} is too small: the tunnel needs {needed} to carry 1280 bytes")]
    Mtu {
        /// The underlay MTU in bytes.
        mtu: u32,
        /// The MTU needed, in bytes.
        needed: u32,
    },
    /// The rule priority is not between the kernel's own rules.
    #[error("rule priority {priority} is not between 1 and {}", RulePriorities::LAST)]
    RulePriority {
        /// The priority.
        priority: u32,
    },
    /// Policy counters were combined with connection caching.
    ///
    /// Packets that are steered by their connection mark match no policy that could count them.
    #[error(
        "policy_counters and connection_caching cannot both be on: cached packets are not counted"
    )]
    CachedCounters,
    /// Policy counters were combined with iptables, where not every policy has a rule of its own.
    #[error("policy_counters need nf_tables: with iptables packets are not counted")]
    IptablesCounters,
    /// No prefix is excluded, so that every destination would be external, other pods included.
    #[error("no excluded prefix is given: name at least the prefix of the pods")]
    NothingExcluded,
    /// An excluded prefix is invalid.
    #[error("excluded prefixes: {source}")]
    Excluded {
        /// The error in the prefix.
        source: PolicyError,
    },
    /// Two policies have the same id.
    #[error("policy {policy} is given twice")]
    DuplicatePolicy {
        /// The id.
        policy: PolicyId,
    },
    /// A policy contradicts itself or the cluster.
    #[error("policy {policy}: {source}")]
    Policy {
        /// Id of the policy.
        policy: PolicyId,
        /// The error in the policy.
        source: PolicyError,
    },
    /// An update names a policy that is not wanted.
    #[error("policy {policy} is not one of those that are wanted")]
    UnknownPolicy {
        /// Id of the policy.
        policy: PolicyId,
    },
    /// No mark could be allocated for a gateway.
    #[error("marks: {0}")]
    Mark(AllocError<Mark>),
    /// No routing table could be allocated for a gateway.
    #[error("routing tables: {0}")]
    Table(AllocError<TableId>),
}

/// An error in a policy or a prefix.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PolicyError {
    /// A prefix has host bits set.
    #[error("{net} has host bits set; {meant} may be meant")]
    HostBits {
        /// The prefix.
        net: IpNet,
        /// The prefix without host bits.
        meant: IpNet,
    },
    /// An IPv4 prefix is written as IPv4-mapped IPv6, which would never match a packet.
    #[error("{net} is an IPv4-mapped IPv6 prefix; write IPv4 prefixes as IPv4")]
    Mapped {
        /// The prefix.
        net: IpNet,
    },
    /// The policy has no source, so that it would have no effect.
    #[error("sources are empty; a policy needs at least one")]
    NoSources,
    /// The list of destinations is empty, which must not be mistaken for all destinations.
    #[error("destinations are an empty list; say external, or name a prefix")]
    NoDestinations,
    /// The gateway is not a node of the cluster.
    #[error("gateway {gateway} is not a node of the cluster")]
    UnknownGateway {
        /// Name of the gateway.
        gateway: NodeName,
    },
    /// The egress IP is not a unicast address that one host can use beyond its link.
    #[error("egress IP {address} is not a unicast address that can leave the link")]
    EgressIpNotUnicast {
        /// The address.
        address: IpAddr,
    },
    /// The egress IP lies in an excluded prefix.
    #[error("egress IP {address} lies in the excluded prefix {net}")]
    EgressIpExcluded {
        /// The address.
        address: IpAddr,
        /// The prefix.
        net: IpNet,
    },
    /// The egress IP is a node's own address, whose services would become unreachable.
    #[error("egress IP {address} is an address of node {node}; ask for the node's own instead")]
    EgressIpOfNode {
        /// The address.
        address: IpAddr,
        /// The node.
        node: NodeName,
    },
}

impl PlanError {
    /// Short code of the error, which never changes: for alerts and for programs.
    pub const fn code(&self) -> &'static str {
        match self {
            Self::UnknownNode { .. } => "unknown_node",
            Self::IptablesDevice { .. } => "iptables_device",
            Self::EgressHookPrefix { .. } => "egress_hook_prefix",
            Self::EgressHookBackend { .. } => "egress_hook_backend",
            Self::DuplicateNode { .. } => "duplicate_node",
            Self::NodeAddress { .. } => "node_address",
            Self::NodeMapped { .. } => "node_mapped",
            Self::NodeFamily { .. } => "node_family",
            Self::NoUnderlay { .. } => "no_underlay",
            Self::UnderlayFamily { .. } => "underlay_family",
            Self::NoTunnel { .. } => "no_tunnel",
            Self::Mac { .. } => "node_mac",
            Self::ForeignMark { .. } => "foreign_mark",
            Self::Shared { .. } => "shared_by_nodes",
            Self::Vni { .. } => "vni",
            Self::Port { .. } => "port",
            Self::Mtu { .. } => "mtu",
            Self::RulePriority { .. } => "rule_priority",
            Self::CachedCounters { .. } => "cached_counters",
            Self::IptablesCounters { .. } => "iptables_counters",
            Self::NothingExcluded { .. } => "nothing_excluded",
            Self::Excluded { .. } => "excluded_prefix",
            Self::DuplicatePolicy { .. } => "duplicate_policy",
            Self::Policy { source, .. } => source.code(),
            Self::UnknownPolicy { .. } => "unknown_policy",
            Self::Mark { .. } => "mark_allocator",
            Self::Table { .. } => "table_allocator",
        }
    }
}

impl PolicyError {
    /// Short code of the error, which never changes: for alerts and for programs.
    pub const fn code(&self) -> &'static str {
        match self {
            Self::HostBits { .. } => "host_bits",
            Self::Mapped { .. } => "mapped",
            Self::NoSources { .. } => "no_sources",
            Self::NoDestinations { .. } => "no_destinations",
            Self::UnknownGateway { .. } => "unknown_gateway",
            Self::EgressIpNotUnicast { .. } => "egress_ip_not_unicast",
            Self::EgressIpExcluded { .. } => "egress_ip_excluded",
            Self::EgressIpOfNode { .. } => "egress_ip_of_node",
        }
    }
}
