//! Events that `Watch` reports.

use std::collections::BTreeSet;
use std::fmt;

/// Changes by other programs since the last time the events were drained.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[must_use]
#[non_exhaustive]
pub struct ChangeEvents {
    /// The changed parts.
    pub changed: BTreeSet<Component>,
    /// Notifications were lost: everything may have changed.
    pub lost: bool,
    /// Processes that changed the nf_tables table; for the other parts the kernel names no process.
    pub writers: BTreeSet<Process>,
}

impl ChangeEvents {
    /// Returns whether no object of this crate was changed.
    pub fn is_empty(&self) -> bool {
        self.changed.is_empty() && !self.lost
    }
}

impl fmt::Display for ChangeEvents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return f.write_str("no events");
        }
        let mut between = "changed by other programs: ";
        for part in &self.changed {
            write!(f, "{between}{part}")?;
            between = ", ";
        }
        if self.lost {
            f.write_str(if self.changed.is_empty() { "" } else { "; " })?;
            f.write_str("events were lost, everything may have changed")?;
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
#[cfg_attr(feature = "serde", derive(serde::Serialize), serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum Component {
    /// The tunnel interface (VXLAN device).
    Link,
    /// Addresses of the tunnel interface.
    Address,
    /// FDB entries (forwarding entries) of the tunnel interface.
    Fdb,
    /// Neighbours on the tunnel interface.
    Neighbour,
    /// Routes in the gateways' tables.
    Route,
    /// Routing rules.
    Rule,
    /// The nf_tables table.
    Firewall,
}

impl fmt::Display for Component {
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

/// A process that changed the nf_tables table.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct Process {
    /// Thread id in the kernel's initial PID namespace.
    pub pid: u32,
    /// Name of the thread, of at most 15 bytes.
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
    fn events_display_as_sentence() {
        let mut events = ChangeEvents::default();
        assert_eq!(events.to_string(), "no events");
        events.lost = true;
        assert_eq!(events.to_string(), "events were lost, everything may have changed");
        events.changed = [Component::Firewall, Component::Link].into();
        events.writers = [Process { pid: 7, name: "nft".into() }].into();
        assert_eq!(
            events.to_string(),
            "changed by other programs: device, nf_tables table; events were lost, everything may have \
             changed (nf_tables by nft[7])"
        );
        events.lost = false;
        assert!(!events.is_empty());
    }
}
