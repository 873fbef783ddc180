//! On what terms a transaction is made, and how many elements a hash is made for.
//!
//! A set that is told a size has a table of fixed length (`nft_hash_type`), which is looked into
//! and filled faster than one that grows by itself (`nft_rhash_type`).

use std::collections::{BTreeMap, BTreeSet};

use crate::diff::op::Op;
use crate::state::{Set, TableFamily};

/// Elements that every hash has room for: its table takes a few kilobytes.
const LEAST: usize = 512;

/// The largest size. A larger hash grows by itself: to make it anew would take long, and there a
/// size saves next to nothing.
const MOST: usize = 131_072;

/// On what terms a transaction is made.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Terms<'a> {
    /// Flags of a table that is made.
    pub(crate) table_flags: u32,
    /// What sets are made for; by default they grow by themselves.
    pub(crate) sizes: Option<&'a Sizes>,
    /// The only generation of the rules that will do; any by default.
    pub(crate) only_at: Option<u32>,
}

/// What sets are made for, and how many elements are on their way into each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Sizes {
    made: BTreeSet<Set>,
    coming: BTreeMap<Set, usize>,
}

impl Sizes {
    /// Those that suit these operations.
    pub(crate) fn of<'a>(ops: impl IntoIterator<Item = &'a Op>) -> Self {
        let mut sizes = Self::default();
        // Elements of one set come one after the other, and there may be a million of them.
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

    /// The size that a set is made with; `None` for one that grows by itself.
    pub(super) fn of_set(&self, set: Set) -> Option<u32> {
        self.made.contains(&set).then(|| size(set, self.coming(set)))?
    }
}

/// The size of a set for so many elements and some more.
fn size(set: Set, count: usize) -> Option<u32> {
    // The egress hook's only map is left as it is: it is in a table of its own.
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
            Set::Answer(Family::V6),
            Set::Count(Family::V4),
            Set::NextHop,
        ] {
            assert_eq!(size(set, 1), None, "{set}");
        }
    }

    #[test]
    fn what_comes_is_counted_for_every_set() {
        let value = Value::plain(Data::Tag(Tag::HERE));
        let source =
            |number: u8| Op::AddElement(Key::Source([10, 0, 0, number].into()), value.clone());
        let other = Value::plain(Data::None);
        let mut ops = vec![Op::AddSet(SOURCES), Op::AddSet(OTHERS)];
        ops.extend((0..3).map(source));
        ops.push(Op::AddElement(Key::Peer([192, 0, 2, 1].into()), other));
        ops.extend((3..5).map(source));
        let sizes = Sizes::of(&ops);
        assert_eq!(sizes.coming, [(SOURCES, 5), (OTHERS, 1)].into());
        assert_eq!(sizes.of_set(SOURCES), Some(512));
        // It is there already.
        assert_eq!(Sizes::of(&ops[2..3]).of_set(OTHERS), None);
    }
}
