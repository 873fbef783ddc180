//! Warnings about a plan, and the errors of policies and nodes that it left out.

use std::net::IpAddr;

use ipnet::IpNet;

use super::error::{NodeError, PolicyError, listed};
use crate::policy::Unavailable;
use crate::types::{Family, NodeName, PolicyId};

/// A warning about a plan: a policy or node with an error, or what may not be intended.
///
/// Policies without a finding are in force as requested, whatever the findings about others.
///
/// The guide has the [next step](crate::guide::errors#findings) for each finding.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Finding {
    /// A node has an error, and is neither gateway nor peer of the tunnel.
    ///
    /// This node itself goes on to steer the traffic of its pods.
    #[error("node {node} is left out: {}", listed(errors))]
    InvalidNode {
        /// The node.
        node: NodeName,
        /// The errors; at least one.
        errors: Vec<NodeError>,
    },
    /// A policy has an error, and cannot be carried out.
    ///
    /// Traffic of its valid sources and destinations is dropped, or bypasses the policy.
    #[error("policy {policy} {}: {}", treated(*unavailable), listed(errors))]
    InvalidPolicy {
        /// The policy.
        policy: PolicyId,
        /// Treatment of the traffic.
        unavailable: Unavailable,
        /// The errors; at least one.
        errors: Vec<PolicyError>,
    },
    /// Two policies select the same packets of a common source.
    ///
    /// Of the policies that precede a policy for a source only the first is named.
    #[error("policies {winner} and {loser} overlap in {family}: {winner} comes first and wins")]
    Overlap {
        /// The policy that takes the packets: the lower priority number, or the smaller id.
        winner: PolicyId,
        /// The policy that does not take them.
        loser: PolicyId,
        /// The family.
        family: Family,
    },
    /// The network stack of this node lacks the family, which is left out; the other is in force.
    ///
    /// The kernel was started without IPv6 or has no module for it, or IPv6 is disabled on the
    /// tunnel interface and this process may not enable it. When the family comes back, the next
    /// call that reads the interfaces, such as an audit, installs its part.
    #[error(
        "this node has no {family}: packets of policies are dropped in {family}, and the rest is in \
         force"
    )]
    FamilyUnavailable {
        /// The family.
        family: Family,
    },
    /// Policies use an egress IP on several gateways.
    ///
    /// Replies reach one of them only, unless something else distributes them by connection.
    #[error("egress IP {address} is used on several gateways: {}", names(gateways))]
    EgressIpOnGateways {
        /// The egress IP.
        address: IpAddr,
        /// The gateways, sorted; at least two.
        gateways: Vec<NodeName>,
    },
    /// A policy selects addresses of nodes, whose own packets are not steered.
    ///
    /// The packets of a node's processes, and of pods in its network namespace, leave with the
    /// node's address. Only packets that another node forwards are steered or dropped.
    #[error(
        "policy {policy} selects addresses of nodes ({}): packets that a node or a pod in its \
         network namespace sends are not steered, and keep that source",
        nets(sources)
    )]
    SourcesOfNodes {
        /// The policy.
        policy: PolicyId,
        /// The sources that contain an underlay or tunnel address of a node, sorted.
        sources: Vec<IpNet>,
    },
    /// The kernel of this node has no match for sockets, which the rules about egress IPs need.
    ///
    /// A late UDP datagram to an egress IP, which no process of this node expects, is answered with
    /// an ICMP error. TCP segments are dropped in that case, but also those of a connection of this
    /// node that conntrack has forgotten, until the node sends one.
    #[error(
        "this kernel has no match for sockets (CONFIG_NFT_SOCKET, or for iptables \
         CONFIG_NETFILTER_XT_MATCH_SOCKET): late UDP replies to an egress IP of this gateway are \
         answered with an ICMP error"
    )]
    SocketsUnavailable,
    /// The kernel of this node has no match for the type of an address.
    #[error(
        "this kernel has no fib expression of nf_tables (CONFIG_NFT_FIB_INET): policies also take \
         packets to those addresses of this node that are not in the cluster's list of nodes"
    )]
    AddressTypesUnavailable,
    /// More policies overlap than are listed.
    #[error("{count} more overlaps of policies are not listed")]
    MoreOverlaps {
        /// Number of overlaps that are not listed.
        count: usize,
    },
    /// Every table of the range is used by a gateway, so that none is left for the fallback rule.
    #[error(
        "all {capacity} routing tables are gateways': a marked packet that has lost its rule is \
         stopped by the forward chain alone, not by a closing table"
    )]
    NoClosingTable {
        /// Number of tables in the range.
        capacity: usize,
    },
    /// No mark or routing table is left for the replies to some nodes.
    ///
    /// This node is a gateway with replies by the tunnel. Replies to pods on these nodes take the
    /// host's own routes, as with [`Replies::Direct`](crate::Replies::Direct).
    #[error(
        "no mark or no routing table is left for replies by the tunnel to {}: replies to pods there \
         take this host's own routes",
        names(nodes)
    )]
    TooManyNodes {
        /// The nodes, sorted.
        nodes: Vec<NodeName>,
    },
    /// No routing table is left for the reverse path of packets from the tunnel.
    ///
    /// Replies by the tunnel pass loose reverse path filters of a node with a default route only.
    #[error(
        "no routing table is left for the reverse path of replies by the tunnel: reverse path \
         filters may drop packets from the tunnel"
    )]
    NoReversePathTable,
    /// The policy's traffic of a family bypasses the policy, as its `unavailable` says.
    #[error("policy {policy} leaves its {family} traffic unchanged: {reason}")]
    Bypassed {
        /// The policy.
        policy: PolicyId,
        /// The family.
        family: Family,
        /// The reason.
        reason: DenyReason,
    },
    /// The policy's traffic of a family is dropped.
    #[error("policy {policy} drops its {family} traffic: {reason}")]
    Denied {
        /// The policy.
        policy: PolicyId,
        /// The family.
        family: Family,
        /// The reason.
        reason: DenyReason,
    },
}

impl Finding {
    /// Short code of the finding, which never changes: for alerts and for programs.
    ///
    /// A policy or node with errors has the code of its first error.
    pub fn code(&self) -> &'static str {
        match self {
            Self::InvalidNode { errors, .. } => {
                errors.first().map_or("invalid_node", NodeError::code)
            }
            Self::InvalidPolicy { errors, .. } => {
                errors.first().map_or("invalid_policy", PolicyError::code)
            }
            Self::Overlap { .. } => "policies_overlap",
            Self::FamilyUnavailable { .. } => "family_unavailable",
            Self::MoreOverlaps { .. } => "more_overlaps",
            Self::EgressIpOnGateways { .. } => "egress_ip_on_gateways",
            Self::SourcesOfNodes { .. } => "sources_of_nodes",
            Self::SocketsUnavailable { .. } => "sockets_unavailable",
            Self::AddressTypesUnavailable { .. } => "address_types_unavailable",
            Self::NoClosingTable { .. } => "no_closing_table",
            Self::TooManyNodes { .. } => "too_many_nodes",
            Self::NoReversePathTable => "no_reverse_path_table",
            Self::Bypassed { .. } => "policy_bypassed",
            Self::Denied { .. } => "policy_denied",
        }
    }
}

fn nets(nets: &[IpNet]) -> String {
    let shown = nets.iter().map(|net| {
        let single = net.prefix_len() == net.max_prefix_len();
        if single { net.addr().to_string() } else { net.to_string() }
    });
    shown.collect::<Vec<_>>().join(", ")
}

fn names(nodes: &[NodeName]) -> String {
    nodes.iter().map(NodeName::as_str).collect::<Vec<_>>().join(", ")
}

const fn treated(unavailable: Unavailable) -> &'static str {
    match unavailable {
        Unavailable::Drop => "drops its traffic",
        Unavailable::Bypass => "leaves its traffic unchanged",
    }
}

/// The reason why a policy's traffic cannot be sent to its gateway or out of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DenyReason {
    /// The policy has no gateway.
    #[error("it has no gateway")]
    NoGateway,
    /// The policy has no egress IP of the family.
    #[error("it has no egress IP of that family")]
    NoEgressIp,
    /// The tunnel does not carry the family between this node and the gateway.
    #[error("this node or the gateway has no tunnel address of that family")]
    NoTunnelAddress,
    /// There are more gateways than marks or routing tables.
    #[error("no mark or no routing table is left for its gateway")]
    TooManyGateways,
}

impl DenyReason {
    /// Short code of the reason, which never changes: for alerts and for programs.
    pub const fn code(self) -> &'static str {
        match self {
            Self::NoGateway => "no_gateway",
            Self::NoEgressIp => "no_egress_ip",
            Self::NoTunnelAddress => "no_tunnel_address",
            Self::TooManyGateways => "too_many_gateways",
        }
    }
}
