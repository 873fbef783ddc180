//! nf_tables part of the kernel backend: writes the table in transactions, and reads it as a state.

pub(crate) mod batch;
pub(crate) mod chain;
mod commit;
mod element;
pub(crate) mod expr;
mod flowtable;
mod generation;
pub(crate) mod kind;
mod observe;
mod probe;
mod range;
mod resize;
mod set;
mod stmt;
mod table;
mod terms;
#[cfg(test)]
pub(crate) mod tests;

pub(super) use batch::number as family_number;
#[cfg(test)]
pub(super) use commit::commit;
pub(super) use commit::{Between, Refused, commit_as};
pub(crate) use generation::{generation, is_absent, open};
#[cfg(test)]
pub(super) use observe::observe;
pub(super) use observe::{counts, observe_at, observe_hook, observe_objects};
pub use probe::KernelPart;
pub(crate) use probe::{has_flowtable, missing, missing_of_rules};
pub(crate) use resize::{enlarge, full};
pub(super) use table::{LASTING, adopt, flags_and_owner, has_owners, lock, locked_by};
pub(crate) use terms::{Sizes, Terms};
