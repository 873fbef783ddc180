//! A packet on its way, with what the kernel knows of it.

use crate::sim::packet::Packet;
use crate::state::{Direction, Stmt};
use crate::types::{DeviceName, MacAddr};

/// A packet in the kernel (`struct sk_buff`).
#[derive(Clone, Debug)]
pub(crate) struct Skb {
    pub(crate) packet: Packet,
    pub(crate) mark: u32,
    pub(crate) priority: u32,
    /// The tunnel device if it came in by it; others are not told apart.
    pub(crate) input: Option<DeviceName>,
    /// The tunnel device if it goes out by it.
    pub(crate) output: Option<DeviceName>,
    /// Whether it is known by which device it goes out.
    pub(crate) routed: bool,
    /// Where the frame goes, once it is one.
    pub(crate) ethernet: Option<MacAddr>,
    pub(crate) tracking: Tracking,
}

/// What conntrack makes of it.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Tracking {
    /// Nothing.
    Invalid,
    /// Nothing, because a rule says so.
    Untracked,
    /// It belongs to a connection.
    Seen(Facts),
}

/// What the rules ask about its connection.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Facts {
    pub(crate) direction: Direction,
    /// A reply has been seen.
    pub(crate) established: bool,
    pub(crate) mark: u32,
    /// Its source is translated.
    pub(crate) translated: bool,
}

impl Skb {
    pub(crate) const fn new(packet: Packet, tracking: Tracking) -> Self {
        Self {
            packet,
            mark: 0,
            priority: 0,
            input: None,
            output: None,
            routed: false,
            ethernet: None,
            tracking,
        }
    }

    pub(crate) const fn facts_mut(&mut self) -> Option<&mut Facts> {
        match &mut self.tracking {
            Tracking::Invalid | Tracking::Untracked => None,
            Tracking::Seen(facts) => Some(facts),
        }
    }
}

impl Tracking {
    /// Of the first packet of a connection.
    pub(crate) const fn fresh() -> Self {
        let direction = Direction::Original;
        Self::Seen(Facts { direction, established: false, mark: 0, translated: false })
    }

    /// The bit of `ct state` that is set.
    pub(crate) const fn state(self) -> u32 {
        match self {
            Self::Invalid => Stmt::INVALID,
            Self::Untracked => Stmt::UNTRACKED,
            Self::Seen(Facts { established: false, .. }) => Stmt::NEW,
            // `ct state established` is the second bit.
            Self::Seen(_) => 2,
        }
    }

    pub(crate) const fn facts(&self) -> Option<&Facts> {
        match self {
            Self::Invalid | Self::Untracked => None,
            Self::Seen(facts) => Some(facts),
        }
    }
}
