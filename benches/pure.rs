//! What no kernel has a part in: planning, comparing, and handing out marks and tables.
//!
//! `cargo bench --bench pure`; compare figures of one run with each other.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a bench that is set up wrongly should stop"
)]

use std::cell::RefCell;

use common::world::{cluster, name, policies};
use divan::Bencher;
use egress_datapath::alloc::{MarkPool, TablePool, TableRange};
use egress_datapath::{
    Changes, Cluster, EgressPolicy, MarkAllocator, MarkLayout, Plan, TableAllocator, plan,
};

fn main() {
    divan::main();
}

fn planned(cluster: &Cluster, policies: &[EgressPolicy]) -> Plan {
    let mut marks = MarkPool::default();
    let mut tables = TablePool::new(TableRange::default()).with_start(0);
    plan(cluster, policies, &mut marks, &mut tables).unwrap()
}

const SIZES: [(u32, u32); 4] = [(1, 1), (10, 100), (1_000, 10), (1_000, 100)];

#[divan::bench(args = SIZES)]
fn plan_policies_by_sources(bencher: Bencher<'_, '_>, (count, sources): (u32, u32)) {
    let (cluster, policies) = (cluster(), policies(count, sources));
    bencher.bench(|| planned(&cluster, &policies));
}

#[divan::bench(args = SIZES)]
fn compare_with_itself(bencher: Bencher<'_, '_>, (count, sources): (u32, u32)) {
    let state = planned(&cluster(), &policies(count, sources)).state;
    let same = state.clone();
    bencher.bench(|| Changes::between(&state, &same));
}

#[divan::bench(args = SIZES)]
fn compare_after_one_pod_left(bencher: Bencher<'_, '_>, (count, sources): (u32, u32)) {
    let cluster = cluster();
    let mut policies = policies(count, sources.max(2));
    let before = planned(&cluster, &policies).state;
    policies[0].sources.pop();
    let after = planned(&cluster, &policies).state;
    bencher.bench(|| Changes::between(&before, &after));
}

#[divan::bench(args = [0, 1_000, 65_535])]
fn allocate_a_mark_with_so_many_in_use(bencher: Bencher<'_, '_>, used: u32) {
    let mut pool = MarkPool::new(MarkLayout::SEED);
    for index in 0..used {
        pool.allocate(&name(index)).unwrap();
    }
    let node = name(u32::MAX);
    bencher.bench_local(|| {
        let mark = pool.allocate(&node).unwrap();
        pool.release(&node).unwrap();
        mark
    });
}

/// Pools that take turns, so that what is timed is long enough to be timed.
const POOLS: usize = 16;

/// Nothing but the call that gives out a mark; that it is given back is not timed.
#[divan::bench(args = [0, 1_000, 65_535], sample_size = 16)]
fn allocate_alone_with_so_many_in_use(bencher: Bencher<'_, '_>, used: u32) {
    let mut pool = MarkPool::new(MarkLayout::SEED);
    for index in 0..used {
        pool.allocate(&name(index)).unwrap();
    }
    let pools = RefCell::new(vec![pool; POOLS]);
    let node = name(u32::MAX);
    let mut turn = 0;
    let one_is_free = || {
        turn = (turn + 1) % POOLS;
        let _none_at_first = pools.borrow_mut()[turn].release(&node);
        turn
    };
    bencher
        .with_inputs(one_is_free)
        .bench_local_values(|turn| pools.borrow_mut()[turn].allocate(&node).unwrap());
}

#[divan::bench(args = [0, 100])]
fn allocate_a_table_with_so_many_in_use(bencher: Bencher<'_, '_>, used: u32) {
    let mut pool = TablePool::new(TableRange::default());
    for index in 0..used {
        pool.allocate(&name(index)).unwrap();
    }
    let node = name(u32::MAX);
    bencher.bench_local(|| {
        let table = pool.allocate(&node).unwrap();
        pool.release(&node).unwrap();
        table
    });
}
