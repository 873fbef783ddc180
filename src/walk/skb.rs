//! A packet on its way, with what the kernel knows of it.

use crate::packet::Packet;
use crate::state::{Direction, Stmt};
use crate::types::{DeviceName, MacAddr};

/// A packet in the kernel (`struct sk_buff`).
#[derive(Clone, Debug)]
pub(super) struct Skb {
    pub(super) packet: Packet,
    pub(super) mark: u32,
    pub(super) priority: u32,
    /// The tunnel device if it came in by it; others are not told apart.
    pub(super) input: Option<DeviceName>,
    /// The tunnel device if it goes out by it.
    pub(super) output: Option<DeviceName>,
    /// Whether it is known by which device it goes out.
    pub(super) routed: bool,
    /// Where the frame goes, once it is one.
    pub(super) ethernet: Option<MacAddr>,
    pub(super) tracking: Tracking,
}

/// What conntrack makes of it.
#[derive(Clone, Copy, Debug)]
pub(super) enum Tracking {
    /// Nothing.
    Invalid,
    /// Nothing, because a rule says so.
    Untracked,
    /// It belongs to a connection.
    Seen(Facts),
}

/// What the rules ask about its connection.
#[derive(Clone, Copy, Debug)]
pub(super) struct Facts {
    pub(super) direction: Direction,
    /// A reply has been seen.
    pub(super) established: bool,
    pub(super) mark: u32,
    /// Its source is translated.
    pub(super) translated: bool,
}

impl Skb {
    pub(super) const fn new(packet: Packet, tracking: Tracking) -> Self {
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

    pub(super) const fn facts_mut(&mut self) -> Option<&mut Facts> {
        match &mut self.tracking {
            Tracking::Invalid | Tracking::Untracked => None,
            Tracking::Seen(facts) => Some(facts),
        }
    }
}

impl Tracking {
    /// Of the first packet of a connection.
    pub(super) const fn fresh() -> Self {
        let direction = Direction::Original;
        Self::Seen(Facts { direction, established: false, mark: 0, translated: false })
    }

    /// The bit of `ct state` that is set.
    pub(super) const fn state(self) -> u32 {
        match self {
            Self::Invalid => Stmt::INVALID,
            Self::Untracked => Stmt::UNTRACKED,
            Self::Seen(Facts { established: false, .. }) => Stmt::NEW,
            // `ct state established` is the second bit.
            Self::Seen(_) => 2,
        }
    }

    pub(super) const fn facts(&self) -> Option<&Facts> {
        match self {
            Self::Invalid | Self::Untracked => None,
            Self::Seen(facts) => Some(facts),
        }
    }
}
