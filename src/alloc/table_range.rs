//! Which routing tables may be given out.

#[cfg(feature = "serde")]
use crate::serde_impls::RangeForm;
use crate::types::TableId;

/// The closed interval [start, start + count] of routing tables: `count` + 1 of them.
///
/// The default is 3000 to 3100, 101 tables. The kernel's own tables are never part of a range.
///
/// ```
/// use egress_datapath::{TableRange, TableRangeError};
/// let range = TableRange::default();
/// assert_eq!((range.start(), range.end(), range.len()), (3000, 3100, 101));
/// assert_eq!(TableRange::new(3000, 0)?.len(), 1);
///
/// let refused = TableRange::new(200, 100).unwrap_err();
/// assert_eq!(refused.to_string(), "tables 200 to 300 include 253, which is the kernel's");
/// # Ok::<(), TableRangeError>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(try_from = "RangeForm", into = "RangeForm"))]
pub struct TableRange {
    start: u32,
    count: u32,
}

/// Why a range of tables was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TableRangeError {
    /// The last table is beyond the highest number a table can have.
    #[error("{count} tables after {start} go beyond table 4294967295, the highest there is")]
    Overflow {
        /// First table.
        start: u32,
        /// How many follow it.
        count: u32,
    },
    /// One of the kernel's own tables is among them: 0, 253, 254 or 255.
    #[error("tables {start} to {end} include {table}, which is the kernel's")]
    Kernel {
        /// First table.
        start: u32,
        /// Last table.
        end: u32,
        /// The lowest one that is the kernel's.
        table: u32,
    },
}

#[expect(clippy::len_without_is_empty, reason = "a range has at least one table")]
impl TableRange {
    /// The range that starts with this table and has `count` more.
    pub fn new(start: u32, count: u32) -> Result<Self, TableRangeError> {
        let end = start.checked_add(count);
        let end = end.ok_or(TableRangeError::Overflow { start, count })?;
        let mut kernels = [0, 253, 254, 255].into_iter();
        match kernels.find(|table| (start..=end).contains(table)) {
            Some(table) => Err(TableRangeError::Kernel { start, end, table }),
            None => Ok(Self { start, count }),
        }
    }

    /// The first table.
    pub const fn start(&self) -> u32 {
        self.start
    }

    /// The last table.
    pub const fn end(&self) -> u32 {
        self.start + self.count
    }

    /// How many tables there are.
    pub const fn len(&self) -> u32 {
        // Table 0 is in no range, so that the number fits.
        self.count + 1
    }

    /// Whether the table is one of these.
    pub fn contains(&self, table: TableId) -> bool {
        (self.start..=self.end()).contains(&table.get())
    }

    /// All tables, ascending.
    pub fn iter(&self) -> impl Iterator<Item = TableId> + use<> {
        (self.start..=self.end()).filter_map(TableId::new)
    }

    /// All tables, ascending from the one at `offset` to the last and on from the first.
    pub(super) fn ring(self, offset: u32) -> impl Iterator<Item = TableId> + use<> {
        let from = self.start + offset % self.len();
        (from..=self.end()).chain(self.start..from).filter_map(TableId::new)
    }
}

impl Default for TableRange {
    fn default() -> Self {
        Self { start: 3000, count: 100 }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_kernels_tables_are_refused_wherever_they_lie() {
        for table in [0, 253, 254, 255] {
            for below in 0..=table.min(3) {
                for above in 0..=3 {
                    let refused = TableRange::new(table - below, below + above);
                    assert!(
                        matches!(refused, Err(TableRangeError::Kernel { .. })),
                        "{table} {below} {above}"
                    );
                }
            }
        }
        for (start, count) in [(1, 251), (252, 0), (256, 0), (256, u32::MAX - 256)] {
            assert!(TableRange::new(start, count).is_ok(), "{start} {count}");
        }
        assert!(TableRange::new(0, u32::MAX).is_err());
        assert!(TableRange::new(1, u32::MAX - 1).is_err());
    }

    #[test]
    fn ranges_beyond_the_last_table_are_refused() {
        assert!(TableRange::new(u32::MAX, 0).is_ok());
        for (start, count) in [(u32::MAX, 1), (3000, u32::MAX), (u32::MAX, u32::MAX)] {
            let refused = TableRange::new(start, count).unwrap_err();
            assert_eq!(refused, TableRangeError::Overflow { start, count });
        }
    }

    #[test]
    fn the_end_belongs_to_the_range() {
        let range = TableRange::default();
        let holds = |id| range.contains(TableId::new(id).unwrap());
        assert_eq!([2999, 3000, 3100, 3101].map(holds), [false, true, true, false]);
        let last = TableRange::new(u32::MAX - 1, 1).unwrap();
        assert!(last.iter().map(TableId::get).eq([u32::MAX - 1, u32::MAX]));
    }

    proptest! {
        #[test]
        fn a_ring_has_every_table_once_in_order(
            start in prop_oneof![256..5000_u32, u32::MAX - 700..u32::MAX - 300],
            count in 0..300_u32,
            offset in any::<u32>(),
        ) {
            let range = TableRange::new(start, count).unwrap();
            let ring: Vec<_> = range.ring(offset).collect();
            prop_assert_eq!(ring.len(), count as usize + 1);
            prop_assert_eq!(ring[0].get(), start + offset % (count + 1));
            let distinct: BTreeSet<_> = ring.iter().copied().collect();
            prop_assert!(distinct.into_iter().eq(range.iter()));
            for pair in ring.windows(2) {
                let next = if pair[0].get() == range.end() { start } else { pair[0].get() + 1 };
                prop_assert_eq!(pair[1].get(), next);
            }
        }
    }
}
