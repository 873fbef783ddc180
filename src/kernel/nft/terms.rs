//! Options of a transaction, and sizes of hash sets.
//!
//! A set with a size has a hash table of fixed length (`nft_hash_type`). Lookups and inserts are
//! faster there than in a resizable one (`nft_rhash_type`).

use std::collections::{BTreeMap, BTreeSet};

use crate::diff::op::Op;
use crate::state::{Set, TableFamily};

/// Smallest size of a hash set: its table takes a few kilobytes.
const LEAST: usize = 512;

/// Largest size of a hash set.
///
/// Larger sets are resizable: recreating them would take long, and a size would save next to
/// nothing.
const MOST: usize = 131_072;

/// Options of a transaction.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Terms<'a> {
    /// Flags of a table that is created.
    pub(crate) table_flags: u32,
    /// Sizes of sets that are created; by default sets are resizable.
    pub(crate) sizes: Option<&'a Sizes>,
    /// Only ruleset generation at which to commit; any by default.
    pub(crate) only_at: Option<u32>,
}

/// Sets that are created, and the number of elements about to be added to each set.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Sizes {
    made: BTreeSet<Set>,
    coming: BTreeMap<Set, usize>,
}

impl Sizes {
    /// Sizes for these operations.
    pub(crate) fn of<'a>(ops: impl IntoIterator<Item = &'a Op>) -> Self {
        let mut sizes = Self::default();
        // Elements of one set come in a row, and there may be a million of them.
        let mut run: Option<(Set, usize)> = None;
        for op in ops {
            match op {
                Op::AddElement(key, _) => {
                    let set = key.set();
                    match &mut run {
                        Some((of, count)) if *of == set => *count += 1,
                        _ => {
                            sizes.come(run);
                            run = Some((set, 1));
                        }
                    }
                }
                Op::AddSet(set) => {
                    sizes.made.insert(*set);
                }
                _ => {}
            }
        }
        sizes.come(run);
        sizes
    }

    pub(super) fn come(&mut self, run: Option<(Set, usize)>) {
        if let Some((set, count)) = run {
            *self.coming.entry(set).or_default() += count;
        }
    }

    pub(super) fn coming(&self, set: Set) -> usize {
        self.coming.get(&set).copied().unwrap_or(0)
    }

    /// Size to create a set with; `None` for a resizable set.
    pub(super) fn of_set(&self, set: Set) -> Option<u32> {
        self.made.contains(&set).then(|| size(set, self.coming(set)))?
    }
}

/// Size of a set with room for this many elements and a quarter more.
fn size(set: Set, count: usize) -> Option<u32> {
    // The map of the egress hook gets no size: it is in a table of its own.
    let is_hash = !set.is_interval() && !set.is_fleeting() && !set.is_counting();
    if !is_hash || set.table() != TableFamily::Inet {
        return None;
    }
    let size = count.saturating_add(count / 4).max(LEAST).checked_next_power_of_two()?;
    u32::try_from(size).ok().filter(|_| size <= MOST)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::{Data, Key, Tag, Value};
    use crate::types::Family;

    const SOURCES: Set = Set::Source(Family::V4);
    const OTHERS: Set = Set::Peer(Family::V4);

    #[test]
    fn a_size_leaves_room_and_large_sets_have_none() {
        let sizes = [0, 1, 410, 411, 100_000, 104_858, 104_859, 1_000_000, usize::MAX];
        let expected =
            [512, 512, 512, 1024, 131_072, 131_072].map(Some).into_iter().chain([None; 3]);
        assert!(sizes.map(|count| size(SOURCES, count)).into_iter().eq(expected));
        for set in [
            Set::Excluded(Family::V4),
            Set::BlockedReply(Family::V6),
            Set::Count(Family::V4),
            Set::NextHop,
        ] {
            assert_eq!(size(set, 1), None, "{set}");
        }
    }

    #[test]
    fn what_comes_is_counted_for_every_set() {
        let value = Value::plain(Data::Tag(Tag::LOCAL));
        let source =
            |number: u8| Op::AddElement(Key::source([10, 0, 0, number].into()), value.clone());
        let other = Value::plain(Data::None);
        let mut ops = vec![Op::AddSet(SOURCES), Op::AddSet(OTHERS)];
        ops.extend((0..3).map(source));
        ops.push(Op::AddElement(Key::peer([192, 0, 2, 1].into()), other));
        ops.extend((3..5).map(source));
        let sizes = Sizes::of(&ops);
        assert_eq!(sizes.coming, [(SOURCES, 5), (OTHERS, 1)].into());
        assert_eq!(sizes.of_set(SOURCES), Some(512));
        // The set exists already.
        assert_eq!(Sizes::of(&ops[2..3]).of_set(OTHERS), None);
    }
}
