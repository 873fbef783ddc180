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
