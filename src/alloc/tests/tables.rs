use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use proptest::prelude::*;

use super::*;

fn table(id: u32) -> TableId {
    TableId::new(id).unwrap()
}

fn range(start: u32, count: u32) -> TableRange {
    TableRange::new(start, count).unwrap()
}

/// A probe that returns the results of a list in turn, and then always the last one.
struct Answers {
    list: VecDeque<Result<BTreeSet<u32>, KernelError>>,
    asked: Arc<AtomicUsize>,
}

impl TablesInUse for Answers {
    fn tables_in_use(&mut self) -> Result<BTreeSet<u32>, KernelError> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        if self.list.len() > 1 {
            return self.list.pop_front().unwrap();
        }
        self.list.front().cloned().unwrap()
    }
}

#[test]
fn pools_can_move_to_another_thread() {
    fn send<T: Send + fmt::Debug>(_: &T) {}
    send(&TablePool::new(TableRange::default()));
}

#[test]
fn every_start_reaches_the_only_free_table_in_as_many_looks_as_it_is_away() {
    let range = TableRange::default();
    for offset in 0..range.len() {
        for free in range.iter() {
            let mut looks = 0;
            let found = range.ring(offset).find(|table| {
                looks += 1;
                *table == free
            });
            assert_eq!(found, Some(free));
            let away = (free.get() + range.len() - range.start() - offset) % range.len();
            assert_eq!(looks, away + 1);
        }
    }
}

#[test]
fn a_full_range_is_looked_at_exactly_once() {
    for count in 0..=100 {
        let range = range(3000, count);
        for offset in 0..range.len() {
            let mut looked = Vec::new();
            let found = range.ring(offset).find(|table| {
                looked.push(*table);
                false
            });
            assert_eq!(found, None);
            assert_eq!(looked.len(), count as usize + 1);
            looked.sort_unstable();
            assert!(looked.into_iter().eq(range.iter()));
        }
    }
}

#[test]
fn tables_are_given_out_from_the_start_and_after_the_last_comes_the_first() {
    for offset in 0..=100 {
        let mut pool = TablePool::new(TableRange::default()).with_start(offset);
        for n in 0..101 {
            let expected = table(3000 + (offset + n) % 101);
            assert_eq!(pool.allocate(&node(n)), Ok(expected));
        }
        let full = AllocError::Exhausted { node: node("new"), capacity: 101 };
        assert_eq!(pool.allocate(&node("new")), Err(full));
        assert_eq!(pool.release(&node(50)), Ok(table(3000 + (offset + 50) % 101)));
        assert_eq!(pool.allocate(&node("new")), Ok(table(3000 + (offset + 50) % 101)));
    }
}

#[test]
fn a_start_beyond_the_range_wraps_around() {
    let mut pool = TablePool::new(TableRange::default()).with_start(u32::MAX);
    assert_eq!(pool.allocate(&node("a")), Ok(table(3000 + u32::MAX % 101)));
}

#[test]
fn pools_without_a_given_start_begin_at_different_tables() {
    let start = |n: u32| {
        let mut pool = TablePool::new(TableRange::default());
        pool.allocate(&node(n)).unwrap()
    };
    let starts: BTreeSet<_> = (0..200).map(start).collect();
    assert!(starts.len() > 50, "{starts:?}");
}

#[test]
fn the_kernel_is_asked_once_for_a_new_node_and_not_for_a_known_one() {
    let asked = Arc::default();
    let probe =
        Answers { list: [Ok([3000].into()), Ok([3001].into())].into(), asked: Arc::clone(&asked) };
    let mut pool = TablePool::with_probe(range(3000, 2), probe).with_start(0);
    assert_eq!(pool.allocate(&node("a")), Ok(table(3001)));
    assert_eq!(pool.allocate(&node("a")), Ok(table(3001)));
    assert_eq!(asked.load(Ordering::Relaxed), 1);
    assert_eq!(pool.allocate(&node("b")), Ok(table(3000)), "the answer is fresh");
    assert_eq!(asked.load(Ordering::Relaxed), 2);
    pool.reserve(&node("c"), table(3002)).unwrap();
    let full = AllocError::Exhausted { node: node("d"), capacity: 3 };
    assert_eq!(pool.allocate(&node("d")), Err(full), "without asking: all are given out");
    pool.release(&node("c")).unwrap();
    assert_eq!(asked.load(Ordering::Relaxed), 2);
}

#[test]
fn nothing_is_given_out_when_the_kernel_cannot_be_asked() {
    let refused = KernelError::refused("ip route show table all", 1);
    let probe =
        Answers { list: [Err(refused.clone()), Ok(BTreeSet::new())].into(), asked: Arc::default() };
    let mut pool = TablePool::with_probe(TableRange::default(), probe);
    assert_eq!(pool.allocate(&node("a")), Err(AllocError::Kernel(refused)));
    assert!(pool.is_empty());
    assert!(pool.allocate(&node("a")).is_ok());
}

#[test]
fn tables_of_an_earlier_run_go_back_to_their_nodes() {
    let in_use: BTreeSet<u32> = (3000..=3009).collect();
    let mut pool = TablePool::with_probe(range(3000, 10), in_use);
    for n in 0..10 {
        pool.reserve(&node(n), table(3000 + n)).unwrap();
    }
    for n in 0..10 {
        assert_eq!(pool.allocate(&node(n)), Ok(table(3000 + n)));
    }
    assert_eq!(pool.allocate(&node("new")), Ok(table(3010)));
}

#[test]
fn a_released_table_waits_until_the_kernel_has_it_no_longer() {
    let probe = Answers {
        list: [Ok([].into()), Ok([3000].into()), Ok([].into())].into(),
        asked: Arc::default(),
    };
    let mut pool = TablePool::with_probe(range(3000, 0), probe);
    assert_eq!(pool.allocate(&node("a")), Ok(table(3000)));
    assert_eq!(pool.release(&node("a")), Ok(table(3000)));
    let full = AllocError::Exhausted { node: node("b"), capacity: 1 };
    assert_eq!(pool.allocate(&node("b")), Err(full));
    assert_eq!(pool.allocate(&node("b")), Ok(table(3000)));
}

#[test]
fn refusals_are_typed_and_change_nothing() {
    let mut pool = TablePool::new(TableRange::default());
    let (a, b) = (node("a"), node("b"));
    pool.reserve(&a, table(3000)).unwrap();
    pool.reserve(&a, table(3000)).unwrap();
    let taken = AllocError::Taken { id: table(3000), node: b.clone(), holder: a.clone() };
    assert_eq!(pool.reserve(&b, table(3000)), Err(taken));
    let holds = AllocError::Holds { node: a.clone(), held: table(3000), id: table(3001) };
    assert_eq!(pool.reserve(&a, table(3001)), Err(holds));
    for id in [2999, 3101, 1, u32::MAX] {
        let foreign = AllocError::Foreign { id: table(id) };
        assert_eq!(pool.reserve(&b, table(id)), Err(foreign));
    }
    assert!(pool.iter().eq([(&a, table(3000))]));

    assert_eq!(pool.release(&a), Ok(table(3000)));
    let unknown = AllocError::Unknown { node: a.clone() };
    assert_eq!(pool.release(&a), Err(unknown));
    assert_eq!((pool.get(&a), pool.len()), (None, 0));
}

proptest! {
    #[test]
    fn exactly_the_free_tables_are_given_out_in_ring_order(
        start in prop_oneof![256..4000_u32, u32::MAX - 90..u32::MAX - 40],
        count in 0..40_u32,
        offset in any::<u32>(),
        used in prop::collection::btree_set(0..41_u32, 0..41),
        reserved in prop::collection::btree_set(0..41_u32, 0..20),
    ) {
        let range = range(start, count);
        let used: BTreeSet<u32> = used.into_iter().map(|n| start + n).collect();
        let mut pool = TablePool::with_probe(range, used.clone()).with_start(offset);
        let mut blocked = used;
        for n in reserved.into_iter().filter(|n| *n <= count) {
            pool.reserve(&node(format_args!("old-{n}")), table(start + n)).unwrap();
            blocked.insert(start + n);
        }
        let first = offset % range.len();
        let ring = (0..range.len()).map(|n| start + (first + n) % range.len());
        let free: Vec<_> = ring.filter(|id| !blocked.contains(id)).collect();
        for (n, id) in free.iter().enumerate() {
            prop_assert_eq!(pool.allocate(&node(n)), Ok(table(*id)));
        }
        let full = AllocError::Exhausted { node: node("new"), capacity: count as usize + 1 };
        prop_assert_eq!(pool.allocate(&node("new")), Err(full));
        if let Some(id) = free.last() {
            prop_assert_eq!(pool.release(&node(free.len() - 1)), Ok(table(*id)));
            prop_assert_eq!(pool.allocate(&node("new")), Ok(table(*id)));
        }
    }
}

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
