//! Times that a call of the reconciler takes.

use std::time::{Duration, Instant};

/// Times that a call of the [`Reconciler`](crate::Reconciler) took.
///
/// The rest of the total is spent on the plan and on the comparison of states.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Durations {
    /// The whole call.
    pub total: Duration,
    /// Reads of the installed state.
    pub observe: Duration,
    /// Writes, those that end connections included.
    pub apply: Duration,
    /// Listings of tracked connections.
    pub connections: Duration,
}

/// A clock of the call in progress.
#[derive(Debug)]
pub(super) struct Clock {
    /// The beginning of the call; `None` before the first one.
    start: Option<Instant>,
    pub(super) spent: Durations,
}

impl Clock {
    pub(super) const fn new() -> Self {
        const ZERO: Duration = Duration::ZERO;
        let spent = Durations { total: ZERO, observe: ZERO, apply: ZERO, connections: ZERO };
        Self { start: None, spent }
    }

    /// Begins a call.
    pub(super) fn start(&mut self) {
        *self = Self { start: Some(Instant::now()), spent: Durations::default() };
    }

    /// Returns the times of the call.
    pub(super) fn stop(&self) -> Durations {
        let total = self.start.map(|start| start.elapsed()).unwrap_or_default();
        Durations { total, ..self.spent }
    }
}
