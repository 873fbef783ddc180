//! What a watch tells.

use std::collections::BTreeSet;
use std::fmt;

/// What others may have changed since the news was last taken out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[must_use]
#[non_exhaustive]
pub struct News {
    /// What was changed.
    pub changed: BTreeSet<Part>,
    /// More happened than could be kept: everything may have changed.
    pub lost: bool,
    /// Who changed the nf_tables table; of the other parts the kernel does not say it.
    pub writers: BTreeSet<Process>,
}

impl News {
    /// Whether nothing of ours was touched.
    pub fn is_empty(&self) -> bool {
        self.changed.is_empty() && !self.lost
    }
}

impl fmt::Display for News {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return f.write_str("no news");
        }
        let mut between = "changed by others: ";
        for part in &self.changed {
            write!(f, "{between}{part}")?;
            between = ", ";
        }
        if self.lost {
            f.write_str(if self.changed.is_empty() { "" } else { "; " })?;
            f.write_str("news was lost, everything may have changed")?;
        }
        let mut between = " (nf_tables by ";
        for writer in &self.writers {
            write!(f, "{between}{writer}")?;
            between = ", ";
        }
        f.write_str(if self.writers.is_empty() { "" } else { ")" })
    }
}

/// A part of a [`State`](crate::State).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Part {
    /// The tunnel device.
    Link,
    /// Addresses of the tunnel device.
    Address,
    /// Forwarding entries of the tunnel device.
    Fdb,
    /// Neighbours on the tunnel device.
    Neighbour,
    /// Routes in the gateways' tables.
    Route,
    /// Routing rules.
    Rule,
    /// The nf_tables table.
    Firewall,
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Link => "device",
            Self::Address => "addresses",
            Self::Fdb => "forwarding entries",
            Self::Neighbour => "neighbours",
            Self::Route => "routes",
            Self::Rule => "rules",
            Self::Firewall => "nf_tables table",
        })
    }
}

/// Who wrote.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Process {
    /// Number of the thread in the kernel's first pid namespace.
    pub pid: u32,
    /// Its name, of at most 15 bytes.
    pub name: String,
}

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}[{}]", self.name, self.pid)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn news_is_a_sentence() {
        let mut news = News::default();
        assert_eq!(news.to_string(), "no news");
        news.lost = true;
        assert_eq!(news.to_string(), "news was lost, everything may have changed");
        news.changed = [Part::Firewall, Part::Link].into();
        news.writers = [Process { pid: 7, name: "nft".into() }].into();
        assert_eq!(
            news.to_string(),
            "changed by others: device, nf_tables table; news was lost, everything may have \
             changed (nf_tables by nft[7])"
        );
        news.lost = false;
        assert!(!news.is_empty());
    }
}
