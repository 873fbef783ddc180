//! Packet and byte counters of policies.

use std::collections::BTreeMap;

use crate::state::Tag;
use crate::types::{Family, PolicyId};

/// A counter value: packets and their bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Count {
    /// Number of packets.
    pub packets: u64,
    /// Number of bytes of these packets, from the IP header on.
    pub bytes: u64,
}

/// Counter values of all policies, keyed by the tag of each policy in the kernel's maps.
pub type Counts = BTreeMap<(Family, Tag), Count>;

/// Counter value of one policy on this node.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct PolicyCount {
    /// The policy.
    pub policy: PolicyId,
    /// The family of the packets.
    pub family: Family,
    /// Packets and bytes counted.
    #[cfg_attr(feature = "serde", serde(flatten))]
    pub count: Count,
}
