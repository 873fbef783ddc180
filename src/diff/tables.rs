//! The two nf_tables tables, and the mark that the one leaves to the other.

use super::{Steps, firewall};
use crate::changes::Phase;
use crate::op::Op;
use crate::state::{ChainId, Firewall, NftRule, State, Stmt, TableFamily};

/// Brings one of the two nf_tables tables about.
pub(super) fn table(family: TableFamily, observed: &State, desired: &State, steps: &mut Steps) {
    match (observed.table(family), desired.table(family)) {
        (None, None) => {}
        (Some(_), None) => {
            let phase = match family {
                TableFamily::Inet => Phase::DeleteTable,
                TableFamily::Netdev => Phase::DeleteHook,
            };
            steps.add(phase, Op::DeleteTable(family));
        }
        (None, Some(desired)) => {
            steps.add(Phase::Skeleton, Op::AddTable(family));
            firewall(family, &Firewall::default(), desired, steps);
        }
        (Some(found), Some(wanted)) if family == TableFamily::Netdev => {
            // A device that goes takes the chains at its hooks along, before Linux 6.16: they are
            // made anew.
            let mut found = found.clone();
            if steps.has(Phase::Tunnel, |op| matches!(op, Op::DeleteLink(_))) {
                for (chain, _) in std::mem::take(&mut found.chains) {
                    steps.add(Phase::Skeleton, Op::DeleteChain(chain));
                }
            }
            firewall(family, &found, wanted, steps);
        }
        (Some(found), Some(wanted)) => firewall(family, found, wanted, steps),
    }
}

/// When the rules of a chain change, and when to the last of what they are to be.
pub(super) fn phases(chain: ChainId, found: &[NftRule], wanted: &[NftRule]) -> (Phase, Phase) {
    match (chain, keeps_mark(found), keeps_mark(wanted)) {
        // The hook must be there, and routes that need it are not yet.
        (ChainId::Forward, false, true) => (Phase::Hook, Phase::EmptyVerdicts),
        // The routes that need the hook must have gone.
        (ChainId::Forward, true, false) => (Phase::Chains, Phase::EmptyGuards),
        _ => (Phase::Chains, Phase::EmptyVerdicts),
    }
}

/// Whether a chain lets what enters the tunnel pass with its mark.
pub(super) fn keeps_mark(rules: &[NftRule]) -> bool {
    let enters = rules.first().map(|NftRule(rule)| rule.as_slice());
    matches!(enters, Some([Stmt::OutputDevice(_), Stmt::Return]))
}
