//! The value of an element of a set or a map, and the tags that link one map to the next.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use super::chain::ChainId;
use crate::types::{MacAddr, PolicyId, fnv1a};

/// A value that a packet carries from one map to the next in `meta priority`.
///
/// Neither half is ever zero, so that `nft` prints it as `a:b` and can parse it again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tag(u32);

impl Tag {
    /// Action: drop the packet.
    pub const DENY: Self = Self(0x0001_0001);
    /// Action: translate the packet on this node.
    pub const LOCAL: Self = Self(0x0001_0002);
    /// Action: leave the packet unchanged.
    pub const BYPASS: Self = Self(0x0001_0003);

    /// The tag with this number; `None` if one of its halves is zero or all bits are one.
    pub const fn new(number: u32) -> Option<Self> {
        if number >> 16 == 0 || number.trailing_zeros() >= 16 || number == u32::MAX {
            return None;
        }
        Some(Self(number))
    }

    /// The number.
    pub const fn get(self) -> u32 {
        self.0
    }

    /// Action: steer the packet to the gateway whose mark has this value.
    pub const fn gateway(value: u16) -> Self {
        let value = value as u32;
        Self((0x0002 + (value >> 15)) << 16 | ((value & 0x7fff) + 1))
    }
}

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}:{:x}", self.0 >> 16, self.0 & 0xffff)
    }
}

/// Value of a map element.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Data {
    /// No value: the element of a set.
    None,
    /// A class, a policy or an action.
    Tag(Tag),
    /// An egress IP.
    Address(IpAddr),
    /// MAC address of a gateway's tunnel device.
    Ethernet(MacAddr),
    /// A verdict on the packet.
    Verdict(Verdict),
}

/// Verdict at the end of the map lookups.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Verdict {
    /// Drop the packet.
    Drop,
    /// Continue in this chain.
    Goto(ChainId),
}

/// The value of an element: the map's data, and a comment for the operator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Value {
    /// The data of the map.
    pub data: Data,
    /// Comment that names the policy or node of the element.
    pub comment: Option<Comment>,
}

impl Value {
    /// A value without comment.
    pub const fn plain(data: Data) -> Self {
        Self { data, comment: None }
    }
}

/// The comment of an element: at most 120 bytes that `nft` can print and parse again.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Comment(Arc<str>);

impl Comment {
    /// Maximum length in bytes; `nft` allows 128 including the terminating NUL.
    pub const MAX: usize = 120;

    /// The comment for a policy: its id; of a long id the beginning, and a hash of the whole id.
    pub fn of_policy(id: &PolicyId) -> Self {
        Self::of_name(id.as_str())
    }

    pub(crate) fn of_name(name: &str) -> Self {
        if name.len() <= Self::MAX {
            return Self(name.into());
        }
        let head: String = name.chars().take(Self::MAX - 17).collect();
        Self(format!("{head}~{:016x}", fnv1a(name.as_bytes())).into())
    }

    /// A comment as found in the kernel, with any text.
    #[cfg(all(feature = "kernel", target_os = "linux"))]
    pub(crate) fn found(text: &str) -> Self {
        Self(text.into())
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Value {
    /// The part of the element after its key: ` comment "…" : data`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(comment) = &self.comment {
            write!(f, " comment \"{}\"", comment.as_str().escape_default())?;
        }
        match self.data {
            Data::None => Ok(()),
            Data::Tag(tag) => write!(f, " : {tag}"),
            Data::Address(address) => write!(f, " : {address}"),
            Data::Ethernet(mac) => write!(f, " : {mac}"),
            Data::Verdict(Verdict::Drop) => f.write_str(" : drop"),
            Data::Verdict(Verdict::Goto(chain)) => write!(f, " : goto {chain}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn the_ways_out_of_all_gateways_are_distinct_tags() {
        let tags: BTreeSet<_> = (0..=u16::MAX).map(Tag::gateway).collect();
        assert_eq!(tags.len(), 65_536);
        for tag in tags.into_iter().chain([Tag::DENY, Tag::LOCAL, Tag::BYPASS]) {
            assert_eq!(Tag::new(tag.get()), Some(tag));
        }
    }

    #[test]
    fn long_ids_keep_their_beginning_and_differ() {
        let id = |tail: &str| PolicyId::new(format!("{}{tail}", "n".repeat(200))).unwrap();
        let (a, b) = (Comment::of_policy(&id("a")), Comment::of_policy(&id("b")));
        assert_ne!(a, b);
        assert_eq!(a.as_str().len(), Comment::MAX);
    }
}
