//! What has been counted.

use std::collections::BTreeMap;

use crate::state::Tag;
use crate::types::{Family, PolicyId};

/// Packets, and their bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Count {
    /// Number of packets.
    pub packets: u64,
    /// Number of their bytes, from the IP header on.
    pub bytes: u64,
}

/// What the counters of policies stand at, by what the kernel's maps know each policy by.
pub type Counts = BTreeMap<(Family, Tag), Count>;

/// What a policy's counter stands at on this node.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct PolicyCount {
    /// The policy.
    pub policy: PolicyId,
    /// The family of the packets.
    pub family: Family,
    /// What was counted.
    #[cfg_attr(feature = "serde", serde(flatten))]
    pub count: Count,
}
