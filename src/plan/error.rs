//! Errors of planning: of the whole input, of a node, of a policy.

use std::fmt::Display;
use std::net::IpAddr;

use ipnet::IpNet;

use crate::alloc::AllocError;
use crate::cluster::RulePriorities;
use crate::types::{DeviceName, Family, MacAddr, Mark, NodeName, PolicyId, TableId};

/// An error that leaves nothing to carry out: of this node or of a setting; nothing was changed.
///
/// An error of a single policy or of another node is a [`Finding`](crate::Finding) instead.
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
    /// The entry of this node leaves it without an address that the tunnel needs.
    #[error("node {node}, this one, has no usable addresses: {}", listed(errors))]
    ThisNode {
        /// Name of the node.
        node: NodeName,
        /// The errors in its entry; at least one.
        errors: Vec<NodeError>,
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
    /// Replies by the tunnel were combined with a mark layout without prefix.
    #[error(
        "replies by the tunnel need a layout of marks with a prefix: a connection mark must name \
         the node of the pod"
    )]
    TunnelRepliesPrefix,
    /// Replies by the tunnel were combined with iptables as backend.
    #[error("replies by the tunnel need nf_tables as backend")]
    TunnelRepliesBackend,
    /// Tunnel packets are limited to the underlay device, and none is named.
    #[error("underlay_only needs an underlay_device: name the interface of the underlay")]
    UnderlayOnlyDevice,
    /// Tunnel packets are limited to the underlay device, with iptables as backend.
    #[error("underlay_only needs nf_tables as backend")]
    UnderlayOnlyBackend,
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
    /// The prefix of a claim is invalid.
    #[error("claims: {source}")]
    Claim {
        /// The error in the prefix.
        source: PolicyError,
    },
    /// Egress IPs are to be added to the interface of the tunnel.
    #[error(
        "egress IPs cannot be claimed on {device}, which is the tunnel: name the interface of their \
         network"
    )]
    ClaimDevice {
        /// The interface.
        device: DeviceName,
    },
    /// An update names a policy that is not wanted.
    #[error("policy {policy} is not one of those that are wanted")]
    UnknownPolicy {
        /// Id of the policy.
        policy: PolicyId,
    },
    /// The allocator gave a gateway a mark that is outside the layout, or reserved in it.
    #[error("the allocator gave node {node} mark {mark}: the layout has no such gateway mark")]
    ForeignMark {
        /// The node.
        node: NodeName,
        /// The mark.
        mark: Mark,
    },
    /// The allocator of marks failed, otherwise than because no mark was free.
    #[error("marks: {0}")]
    Mark(AllocError<Mark>),
    /// The allocator of routing tables failed, otherwise than because no table was free.
    #[error("routing tables: {0}")]
    Table(AllocError<TableId>),
}

/// An error in a node, which is then no gateway and no peer of the tunnel.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NodeError {
    /// An underlay or tunnel address is not a unicast address of a host.
    #[error("{address} is not a unicast address")]
    Address {
        /// The address.
        address: IpAddr,
    },
    /// An IPv4 address is written as an IPv4-mapped IPv6 address.
    #[error("{address} is an IPv4-mapped IPv6 address; write IPv4 addresses as IPv4")]
    Mapped {
        /// The address.
        address: IpAddr,
    },
    /// There is more than one underlay or tunnel address of a family.
    #[error("it has more than one {family} underlay or tunnel address")]
    Family {
        /// The family.
        family: Family,
    },
    /// An address is both on the underlay and in the tunnel.
    #[error("{address} is both its underlay and its tunnel address")]
    Twofold {
        /// The address.
        address: IpAddr,
    },
    /// A tunnel address lies in a prefix of pods.
    ///
    /// The tunnel interface would get a route to pods.
    #[error("its tunnel address {address} lies in {net}, a prefix of pods")]
    TunnelOfPods {
        /// The address.
        address: IpAddr,
        /// The prefix.
        net: IpNet,
    },
    /// There is no underlay address.
    #[error("it has no underlay address")]
    NoUnderlay,
    /// There is no underlay address of the family of this node's outer packets.
    #[error("it has no {family} underlay address, which the tunnel of this node uses")]
    UnderlayFamily {
        /// The family of this node's outer packets.
        family: Family,
    },
    /// There is no tunnel address.
    #[error("it has no tunnel address")]
    NoTunnel,
    /// The MAC address is zero or a group address.
    #[error("Ethernet address {mac} is zero or a group address")]
    Mac {
        /// The address.
        mac: MacAddr,
    },
    /// The mark is outside the layout, or reserved in it.
    #[error("mark {mark} is no gateway mark of the layout")]
    ForeignMark {
        /// The mark.
        mark: Mark,
    },
    /// The name occurs twice.
    #[error("it is listed twice")]
    Duplicate,
    /// Another node has the same address, MAC address or mark.
    #[error("node {other} has {what} too")]
    Shared {
        /// The shared address or mark.
        what: String,
        /// The other node; of several the one with the smallest name.
        other: NodeName,
    },
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
    /// The id is given to more than one policy.
    #[error("the id is given to more than one policy")]
    Duplicate,
    /// The policy has no source, so that it has no effect.
    #[error("sources are empty: the policy selects nothing")]
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
    /// The gateway is a node that is left out, because of an error in it.
    #[error("gateway {gateway} is left out of the cluster's nodes")]
    GatewayLeftOut {
        /// Name of the gateway.
        gateway: NodeName,
    },
    /// The egress IP is not a unicast address that one host can use beyond its link.
    #[error("egress IP {address} is not a unicast address that can leave the link")]
    EgressIpNotUnicast {
        /// The address.
        address: IpAddr,
    },
    /// The egress IP lies in a prefix of pods.
    #[error("egress IP {address} lies in {net}, a prefix of pods; choose an address of no pod")]
    EgressIpOfPods {
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
    ///
    /// An error of this node has the code of its first [`NodeError`].
    pub fn code(&self) -> &'static str {
        match self {
            Self::UnknownNode { .. } => "unknown_node",
            Self::ThisNode { errors, .. } => errors.first().map_or("this_node", NodeError::code),
            Self::IptablesDevice { .. } => "iptables_device",
            Self::EgressHookPrefix { .. } => "egress_hook_prefix",
            Self::EgressHookBackend { .. } => "egress_hook_backend",
            Self::TunnelRepliesPrefix { .. } => "tunnel_replies_prefix",
            Self::TunnelRepliesBackend { .. } => "tunnel_replies_backend",
            Self::UnderlayOnlyDevice { .. } => "underlay_only_device",
            Self::UnderlayOnlyBackend { .. } => "underlay_only_backend",
            Self::ForeignMark { .. } => "foreign_mark",
            Self::Vni { .. } => "vni",
            Self::Port { .. } => "port",
            Self::Mtu { .. } => "mtu",
            Self::RulePriority { .. } => "rule_priority",
            Self::CachedCounters { .. } => "cached_counters",
            Self::IptablesCounters { .. } => "iptables_counters",
            Self::NothingExcluded { .. } => "nothing_excluded",
            Self::Excluded { .. } => "excluded_prefix",
            Self::Claim { .. } => "claim_prefix",
            Self::ClaimDevice { .. } => "claim_device",
            Self::UnknownPolicy { .. } => "unknown_policy",
            Self::Mark { .. } => "mark_allocator",
            Self::Table { .. } => "table_allocator",
        }
    }
}

impl NodeError {
    /// Short code of the error, which never changes: for alerts and for programs.
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Address { .. } => "node_address",
            Self::Mapped { .. } => "node_mapped",
            Self::Family { .. } => "node_family",
            Self::Twofold { .. } => "node_address_twofold",
            Self::NoUnderlay => "no_underlay",
            Self::UnderlayFamily { .. } => "underlay_family",
            Self::NoTunnel => "no_tunnel",
            Self::TunnelOfPods { .. } => "tunnel_of_pods",
            Self::Mac { .. } => "node_mac",
            Self::ForeignMark { .. } => "node_mark",
            Self::Duplicate => "duplicate_node",
            Self::Shared { .. } => "shared_by_nodes",
        }
    }
}

impl PolicyError {
    /// Short code of the error, which never changes: for alerts and for programs.
    pub const fn code(&self) -> &'static str {
        match self {
            Self::HostBits { .. } => "host_bits",
            Self::Mapped { .. } => "mapped",
            Self::Duplicate => "duplicate_policy",
            Self::NoSources { .. } => "no_sources",
            Self::NoDestinations { .. } => "no_destinations",
            Self::UnknownGateway { .. } => "unknown_gateway",
            Self::GatewayLeftOut { .. } => "gateway_left_out",
            Self::EgressIpNotUnicast { .. } => "egress_ip_not_unicast",
            Self::EgressIpOfPods { .. } => "egress_ip_of_pods",
            Self::EgressIpOfNode { .. } => "egress_ip_of_node",
        }
    }

    /// Returns the gateway that the error is about.
    pub(super) const fn gateway(&self) -> Option<&NodeName> {
        match self {
            Self::UnknownGateway { gateway } | Self::GatewayLeftOut { gateway } => Some(gateway),
            _ => None,
        }
    }
}

/// Returns the sentences of several errors as one.
pub(super) fn listed(errors: &[impl Display]) -> String {
    errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}
