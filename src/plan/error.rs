//! What contradicts itself.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::alloc::AllocError;
use crate::cluster::RulePriorities;
use crate::types::{DeviceName, Family, MacAddr, Mark, NodeName, PolicyId, TableId};

/// Input that contradicts itself or the kernel's limits; nothing was touched.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// The node planned for is not in the list.
    #[error("node {node} is not in the cluster's list of nodes")]
    UnknownNode {
        /// Its name.
        node: NodeName,
    },
    /// The name of the tunnel device has characters that iptables takes for something else.
    #[error(
        "iptables cannot name the tunnel device {device}: use letters, digits and . _ - @ only"
    )]
    IptablesDevice {
        /// The device.
        device: DeviceName,
    },
    /// Steering by the egress hook, in a layout of marks without prefix.
    #[error(
        "steering by the egress hook needs a layout of marks with a prefix: one routing rule must \
         tell them all"
    )]
    EgressHookPrefix,
    /// Steering by the egress hook, and iptables as backend.
    #[error("steering by the egress hook needs nf_tables as backend: iptables has no such hook")]
    EgressHookBackend,
    /// A name occurs twice.
    #[error("node {node} is listed twice")]
    DuplicateNode {
        /// The name.
        node: NodeName,
    },
    /// An underlay or tunnel address that no host can have.
    #[error("node {node} cannot have address {address}: it is not a unicast address")]
    NodeAddress {
        /// The node.
        node: NodeName,
        /// The address.
        address: IpAddr,
    },
    /// An IPv4 address written as IPv6.
    #[error("node {node} has address {address}: write IPv4 addresses as IPv4")]
    NodeMapped {
        /// The node.
        node: NodeName,
        /// The address.
        address: IpAddr,
    },
    /// More than one underlay or tunnel address of a family.
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
    /// A node cannot be reached by outer packets of the family that this node uses.
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
    /// An Ethernet address that no device can have.
    #[error("node {node} cannot have Ethernet address {mac}: it is zero or a group address")]
    Mac {
        /// The node.
        node: NodeName,
        /// The address.
        mac: MacAddr,
    },
    /// A mark outside the layout, or set aside in it.
    #[error("node {node} cannot have mark {mark}: the layout has no such gateway mark")]
    ForeignMark {
        /// The node.
        node: NodeName,
        /// The mark.
        mark: Mark,
    },
    /// Two nodes have the same address, Ethernet address or mark.
    #[error("nodes {one} and {other} both have {what}")]
    Shared {
        /// What they share.
        what: String,
        /// The first of them.
        one: NodeName,
        /// The other.
        other: NodeName,
    },
    /// A VXLAN network identifier that is zero or longer than 24 bits.
    #[error("VXLAN network identifier {vni} is not between 1 and 16777215")]
    Vni {
        /// The identifier.
        vni: u32,
    },
    /// UDP port 0.
    #[error("the tunnel needs a UDP port other than 0")]
    Port,
    /// The underlay cannot carry IPv6 packets of minimum size in the tunnel.
    #[error("underlay MTU {mtu} is too small: the tunnel needs {needed} to carry 1280 bytes")]
    Mtu {
        /// The underlay's MTU in bytes.
        mtu: u32,
        /// What is needed.
        needed: u32,
    },
    /// A priority that is not between the kernel's own rules.
    #[error("rule priority {priority} is not between 1 and {}", RulePriorities::LAST)]
    RulePriority {
        /// The priority.
        priority: u32,
    },
    /// Packets that are led by their connection's mark come by no policy that could count them.
    #[error(
        "policy_counters and connection_caching cannot both be on: cached packets are not counted"
    )]
    CachedCounters,
    /// In iptables no rule stands for a policy.
    #[error("policy_counters need nf_tables: with iptables packets are not counted")]
    IptablesCounters,
    /// No excluded prefix: everything would be external, also other pods.
    #[error("no excluded prefix is given: name at least the prefix of the pods")]
    NothingExcluded,
    /// An excluded prefix that is none.
    #[error("excluded prefixes: {source}")]
    Excluded {
        /// What is wrong with it.
        source: PolicyError,
    },
    /// Two policies have one id.
    #[error("policy {policy} is given twice")]
    DuplicatePolicy {
        /// The id.
        policy: PolicyId,
    },
    /// A policy that contradicts itself or the cluster.
    #[error("policy {policy}: {source}")]
    Policy {
        /// Its id.
        policy: PolicyId,
        /// What is wrong with it.
        source: PolicyError,
    },
    /// A change of a policy that is not there.
    #[error("policy {policy} is not one of those that are wanted")]
    UnknownPolicy {
        /// Its id.
        policy: PolicyId,
    },
    /// A gateway could not be given a mark.
    #[error("marks: {0}")]
    Mark(AllocError<Mark>),
    /// A gateway could not be given a routing table.
    #[error("routing tables: {0}")]
    Table(AllocError<TableId>),
}

/// What is wrong with a policy or a prefix.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PolicyError {
    /// A prefix with bits set behind its length.
    #[error("{net} has host bits set; {meant} may be meant")]
    HostBits {
        /// The prefix.
        net: IpNet,
        /// The same without them.
        meant: IpNet,
    },
    /// An IPv4 prefix written as IPv6: it would never match a packet.
    #[error("{net} is an IPv4-mapped IPv6 prefix; write IPv4 prefixes as IPv4")]
    Mapped {
        /// The prefix.
        net: IpNet,
    },
    /// No source: the policy would do nothing.
    #[error("sources are empty; a policy needs at least one")]
    NoSources,
    /// An empty list of destinations, which must not be mistaken for all of them.
    #[error("destinations are an empty list; say external, or name a prefix")]
    NoDestinations,
    /// A gateway that is not a node of the cluster.
    #[error("gateway {gateway} is not a node of the cluster")]
    UnknownGateway {
        /// The name.
        gateway: NodeName,
    },
    /// An egress IP that one host cannot have or speak with.
    #[error("egress IP {address} is not a unicast address that can leave the link")]
    EgressIpNotUnicast {
        /// The address.
        address: IpAddr,
    },
    /// An egress IP that stays inside.
    #[error("egress IP {address} lies in the excluded prefix {net}")]
    EgressIpExcluded {
        /// The address.
        address: IpAddr,
        /// The prefix.
        net: IpNet,
    },
    /// An egress IP that is a node's own address, which would be cut off from its services.
    #[error("egress IP {address} is an address of node {node}; ask for the node's own instead")]
    EgressIpOfNode {
        /// The address.
        address: IpAddr,
        /// The node.
        node: NodeName,
    },
}
