//! What a kind of change is.

use std::time::Duration;

use common::fleet::Result;
use egress_datapath::testing::lab::{Lab, Pair};
use egress_datapath::{MarkLayout, Report};

use crate::nodes::Nodes;

/// How much of a kind.
pub(crate) struct Size {
    pub(crate) packets: u32,
    pub(crate) per_second: u32,
    pub(crate) commits: u64,
    pub(crate) at_most: Duration,
}

/// Whether packets may get lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Loss {
    /// Not one.
    None,
    /// One now and then, that was between two hooks when its policy came or left this node: what
    /// the two lookups found does not fit together, and a rule holds it back. None is lost
    /// otherwise.
    Few,
    /// No more than that of the pod on the client; the other's connections are translated on its
    /// node, and have to be ended before they can go to another.
    OnGateway,
    /// What they need is taken away for a while.
    Any,
}

impl Loss {
    /// Whether each packet that is lost must be one that a rule held back.
    pub(crate) const fn is_by_rule(self) -> bool {
        matches!(self, Self::Few | Self::OnGateway)
    }
}

/// What a node reads of what it has ahead of a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reads {
    /// All of it.
    Everything,
    /// What may have drifted, which mostly is nothing.
    Drift,
}

/// Where the packets go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum To {
    /// Outside.
    Server,
    /// Inside, where no policy has a say.
    PodC,
}

/// A kind of change.
pub(crate) struct Change {
    /// What changes.
    pub(crate) name: &'static str,
    /// The sources that are right for the pod on the client and for the one on the gateway.
    pub(crate) allowed: [&'static [Pair]; 2],
    /// The bits of the marks.
    pub(crate) marks: MarkLayout,
    /// Where the packets go.
    pub(crate) to: To,
    /// Whether packets may get lost.
    pub(crate) loss: Loss,
    /// How much of it there is in a full run.
    pub(crate) in_full: Size,
    /// Whether nothing is to be written.
    pub(crate) idle: bool,
    /// Rules of other software on every node, in a table `foreign`.
    pub(crate) foreign: &'static str,
    /// Whether the nodes go from one backend to another.
    pub(crate) backends: bool,
    /// Whether the first packet of a connection decides for all, and connections go on.
    pub(crate) caching: bool,
    /// What the nodes read ahead of every change.
    pub(crate) reads: Reads,
    /// Makes the change for the so-manieth time; round 0 is what it starts from.
    pub(crate) round: fn(&Lab, &mut Nodes, u64) -> Result<Vec<Report>>,
}

impl Change {
    /// Whether other software offloads connections.
    pub(crate) fn offloads(&self) -> bool {
        self.foreign.contains("flowtable")
    }

    /// Whether other software copies the mark of the connection to its packets.
    pub(crate) fn restores(&self) -> bool {
        self.foreign.contains("meta mark set ct mark")
    }

    /// Whether connections go on all the time: their first packet or a flowtable decides for all.
    pub(crate) fn lasts(&self) -> bool {
        self.caching || self.offloads()
    }
}
