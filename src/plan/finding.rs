//! What is as asked, but perhaps not as meant.

use crate::types::{Family, PolicyId};

/// Something that is as asked, but perhaps not as meant.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Finding {
    /// Two policies take the same packets of some source.
    #[error("policies {winner} and {loser} overlap in {family}: {winner} comes first and wins")]
    Overlap {
        /// The policy that takes them: lower priority number, or the smaller id.
        winner: PolicyId,
        /// The policy that does not.
        loser: PolicyId,
        /// The family.
        family: Family,
    },
    /// Every table of the range is a gateway's.
    #[error(
        "all {capacity} routing tables are gateways': a marked packet that has lost its rule is \
         stopped by the forward chain alone, not by a closing table"
    )]
    NoClosingTable {
        /// Number of tables in the range.
        capacity: usize,
    },
    /// The policy's traffic of a family leaves as if there were no policy, as it asks for.
    #[error("policy {policy} leaves its {family} traffic alone: {why}")]
    Bypassed {
        /// The policy.
        policy: PolicyId,
        /// The family.
        family: Family,
        /// The reason.
        why: Closed,
    },
    /// The policy's traffic of a family is dropped.
    #[error("policy {policy} drops its {family} traffic: {why}")]
    Closed {
        /// The policy.
        policy: PolicyId,
        /// The family.
        family: Family,
        /// The reason.
        why: Closed,
    },
}

/// Why a policy's traffic cannot be sent out as it asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Closed {
    /// No gateway is named.
    #[error("it has no gateway")]
    NoGateway,
    /// There is nothing to wear.
    #[error("it has no egress IP of that family")]
    NoEgressIp,
    /// The tunnel does not carry the family between the two nodes.
    #[error("this node or the gateway has no tunnel address of that family")]
    NoTunnelAddress,
}
