//! The words that problems are told in.

use std::fmt;

/// How bad a problem is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Severity {
    /// It may be as meant, or belongs to the picture.
    Note,
    /// Some traffic may not get through, or may not look as it should.
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

/// A part of the kernel that the datapath needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum KernelPart {
    /// nf_tables as a whole.
    #[error("nf_tables (CONFIG_NF_TABLES)")]
    NfTables,
    /// nf_tables for both IP versions at once.
    #[error("the inet family of nf_tables (CONFIG_NF_TABLES_INET)")]
    InetFamily,
    /// Chains that translate addresses.
    #[error("NAT chains of nf_tables (CONFIG_NFT_NAT)")]
    NatChain,
    /// Tests of the connection.
    #[error("the ct expression of nf_tables (CONFIG_NFT_CT)")]
    Ct,
    /// Translation to a given address.
    #[error("the nat expression of nf_tables (CONFIG_NFT_NAT)")]
    Nat,
    /// Translation to the device's address.
    #[error("the masq expression of nf_tables (CONFIG_NFT_MASQ)")]
    Masquerade,
    /// Counters in rules.
    #[error("the counter expression of nf_tables (CONFIG_NF_TABLES)")]
    Counter,
    /// Chains where a device sends, for [`Steering::EgressHook`](crate::Steering::EgressHook).
    #[error("the egress hook of nf_tables (CONFIG_NFT_NETDEV, CONFIG_NETFILTER_EGRESS)")]
    EgressHook,
    /// Owners of tables that stay without them, for
    /// [`Ownership::Exclusive`](crate::Ownership::Exclusive); nothing else needs it.
    #[error("owners of nf_tables tables that stay (NFT_TABLE_F_PERSIST)")]
    TableOwner,
    /// VXLAN devices.
    #[error("VXLAN (CONFIG_VXLAN)")]
    Vxlan,
    /// Routing rules.
    #[error("policy routing (CONFIG_IP_MULTIPLE_TABLES)")]
    PolicyRouting,
    /// IPv6.
    #[error("IPv6 (CONFIG_IPV6)")]
    Ipv6,
}

impl KernelPart {
    /// The version of Linux that brings it, where that is younger than nf_tables; a kernel may have
    /// been built without it.
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

    /// Whether there is another way to do everything that it is for.
    pub(super) const fn can_be_done_without(self) -> bool {
        matches!(self, Self::TableOwner)
    }
}

/// Which packets a base chain drops unless a rule accepts them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DropHook {
    /// Those to this host, and so what arrives in the tunnel.
    Input,
    /// Those routed through this host: the pods' own.
    Forward,
    /// Those from this host, and so what it sends into the tunnel.
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

/// Whose mark it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum MarkKind {
    /// A packet's, `meta mark`.
    Packet,
    /// A connection's, `ct mark`.
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
