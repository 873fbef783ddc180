//! Vocabulary of problems: severity, kernel part, hook and mark kind.

use std::fmt;

/// Severity of a problem.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Severity {
    /// Possibly intended, or only context for other problems.
    Note,
    /// Some traffic may be dropped or may leave with unexpected properties.
    Risk,
    /// The datapath cannot be programmed, or cannot carry traffic.
    Broken,
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Note => "note",
            Self::Risk => "risk",
            Self::Broken => "broken",
        })
    }
}

/// Kernel feature that the datapath needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum KernelPart {
    /// nf_tables as a whole.
    #[error("nf_tables (CONFIG_NF_TABLES)")]
    NfTables,
    /// `inet` family of nf_tables: one table for IPv4 and IPv6.
    #[error("the inet family of nf_tables (CONFIG_NF_TABLES_INET)")]
    InetFamily,
    /// NAT chains.
    #[error("NAT chains of nf_tables (CONFIG_NFT_NAT)")]
    NatChain,
    /// Expressions that match on the conntrack entry.
    #[error("the ct expression of nf_tables (CONFIG_NFT_CT)")]
    Ct,
    /// NAT to a given address.
    #[error("the nat expression of nf_tables (CONFIG_NFT_NAT)")]
    Nat,
    /// Masquerade: source NAT to the address of the outgoing interface.
    #[error("the masq expression of nf_tables (CONFIG_NFT_MASQ)")]
    Masquerade,
    /// Counters in rules.
    #[error("the counter expression of nf_tables (CONFIG_NF_TABLES)")]
    Counter,
    /// Egress hook of an interface, for [`Steering::EgressHook`](crate::Steering::EgressHook).
    #[error("the egress hook of nf_tables (CONFIG_NFT_NETDEV, CONFIG_NETFILTER_EGRESS)")]
    EgressHook,
    /// Table owner whose table persists without it (`NFT_TABLE_F_PERSIST`).
    ///
    /// Only [`Ownership::Exclusive`](crate::Ownership::Exclusive) needs it.
    #[error("owners of nf_tables tables that stay (NFT_TABLE_F_PERSIST)")]
    TableOwner,
    /// VXLAN devices.
    #[error("VXLAN (CONFIG_VXLAN)")]
    Vxlan,
    /// Policy routing: routing rules.
    #[error("policy routing (CONFIG_IP_MULTIPLE_TABLES)")]
    PolicyRouting,
    /// IPv6.
    #[error("IPv6 (CONFIG_IPV6)")]
    Ipv6,
}

impl KernelPart {
    /// Linux version that introduced the feature, if that is newer than nf_tables itself.
    ///
    /// A newer kernel may still have been built without it.
    pub const fn since(self) -> Option<(u8, u8)> {
        match self {
            Self::NatChain | Self::Nat | Self::Masquerade => Some((5, 2)),
            Self::EgressHook => Some((5, 16)),
            Self::TableOwner => Some((6, 9)),
            Self::NfTables
            | Self::InetFamily
            | Self::Ct
            | Self::Counter
            | Self::Vxlan
            | Self::PolicyRouting
            | Self::Ipv6 => None,
        }
    }

    /// Returns true if there is an alternative for every use of the feature.
    pub(super) const fn can_be_done_without(self) -> bool {
        matches!(self, Self::TableOwner)
    }
}

/// Hook of a base chain with policy drop.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DropHook {
    /// Packets to this host, which includes packets that arrive in the tunnel.
    Input,
    /// Packets routed through this host, which includes the packets of the pods.
    Forward,
    /// Packets from this host, which includes packets sent into the tunnel.
    Output,
}

impl fmt::Display for DropHook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Input => "input",
            Self::Forward => "forward",
            Self::Output => "output",
        })
    }
}

/// Kind of mark.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum MarkKind {
    /// Firewall mark of a packet, `meta mark`.
    Packet,
    /// Connection mark, `ct mark`.
    Connection,
}

impl fmt::Display for MarkKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Packet => "packet",
            Self::Connection => "connection",
        })
    }
}
