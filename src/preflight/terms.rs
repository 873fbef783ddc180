//! Vocabulary of problems: severity, kernel part, hook and mark kind.

use std::fmt;

/// Severity of a problem.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Severity {
    /// Possibly intended, or only context for other problems.
    Note,
    /// Some traffic may be dropped or may leave with unexpected properties.
    Risk,
    /// The datapath cannot be programmed, or cannot carry traffic of the family or of any.
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

/// Path by which packets may leave an interface ahead of all nf_tables hooks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum FastPath {
    /// A tc filter redirects packets to another interface (`mirred`).
    Redirect,
    /// The hardware evaluates a tc filter, and the kernel does not (`skip_sw`).
    Hardware,
    /// An eBPF program is attached to tc (clsact or ingress), or the interface is a netkit device.
    TrafficControl,
    /// An XDP program is attached.
    Xdp,
}

impl fmt::Display for FastPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Redirect => "tc filters redirect packets",
            Self::Hardware => "tc filters act on packets in the hardware",
            Self::TrafficControl => "eBPF programs may forward packets",
            Self::Xdp => "XDP programs may forward packets",
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
