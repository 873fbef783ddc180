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
