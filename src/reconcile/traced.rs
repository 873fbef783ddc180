//! Calls of the datapath, timed, with spans and events of the feature `tracing`.

use std::time::Instant;

use super::{Error, Reconciler};
use crate::datapath::{Among, Datapath, Known, Observed, OnConnection};
use crate::diff::changes::Changes;
use crate::plan::Finding;

/// Opens a span of the feature `tracing`, until the end of the block.
macro_rules! span {
    ($name:literal $(, $($field:tt)*)?) => {
        #[cfg(feature = "tracing")]
        let _span = tracing::info_span!($name $(, $($field)*)?).entered();
    };
}
pub(super) use span;

impl<D: Datapath, M, T> Reconciler<D, M, T> {
    pub(super) fn observe_datapath(&mut self, known: Known<'_>) -> Result<Observed, Error> {
        span!("observe");
        let start = Instant::now();
        let observed = self.datapath.observe(known);
        self.clock.spent.observe += start.elapsed();
        observed.map_err(Error::Observe)
    }

    /// Lists connections.
    pub(super) fn list_connections(
        &mut self,
        among: Among<'_>,
        each: &mut OnConnection<'_>,
    ) -> Result<(), Error> {
        span!("connections");
        let start = Instant::now();
        let listed = self.datapath.connections(among, each);
        self.clock.spent.connections += start.elapsed();
        listed.map_err(Error::Observe)
    }

    /// Applies changes, with one event for each refused operation.
    pub(super) fn apply_changes(&mut self, changes: &Changes) -> Result<(), Error> {
        span!("apply", operations = changes.len());
        let start = Instant::now();
        let made = self.datapath.apply(changes);
        self.clock.spent.apply += start.elapsed();
        #[cfg(feature = "tracing")]
        if let Err(error) = &made {
            for (operation, error) in &error.refused {
                tracing::error!(%operation, %error, "operation refused");
            }
        }
        made.map_err(Error::from)
    }
}

/// Emits an event for each finding.
#[cfg_attr(not(feature = "tracing"), expect(unused_variables, reason = "for the events alone"))]
pub(super) fn report_findings(findings: &[Finding]) {
    #[cfg(feature = "tracing")]
    for finding in findings {
        tracing::warn!(%finding, "finding");
    }
}

/// Emits an event if a repair has changed something.
#[cfg_attr(not(feature = "tracing"), expect(unused_variables, reason = "for the event alone"))]
pub(super) fn report_repair(changes: &Changes) {
    #[cfg(feature = "tracing")]
    if !changes.is_empty() {
        tracing::warn!(operations = changes.len(), "changes of other programs undone");
    }
}
