//! Packet and byte counters of policies, and of packets that were dropped.

use std::collections::BTreeMap;
use std::ops::AddAssign;

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

impl AddAssign for Count {
    fn add_assign(&mut self, other: Self) {
        self.packets = self.packets.wrapping_add(other.packets);
        self.bytes = self.bytes.wrapping_add(other.bytes);
    }
}

/// Counters of a datapath.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Counts {
    /// Packets of each policy, keyed by the family and the tag of the policy in the kernel's maps.
    ///
    /// Empty without [`Cluster::policy_counters`](crate::Cluster::policy_counters).
    pub policies: BTreeMap<(Family, Tag), Count>,
    /// Packets dropped by the rules of each chain, keyed by the name of the chain.
    ///
    /// A counter starts at zero when the rules of its chain are replaced.
    pub drops: BTreeMap<String, Count>,
}

impl Counts {
    /// Creates counters without values.
    pub const fn new() -> Self {
        Self { policies: BTreeMap::new(), drops: BTreeMap::new() }
    }
}

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
