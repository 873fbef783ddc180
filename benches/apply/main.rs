//! What it costs to change a node's kernel: ours, the tools, and the kernel's own floor.
//!
//! `cargo bench --bench apply -- --quick`, as root; compare figures of one run with each other;
//! `-- gateways`, `-- moves`, `-- sets`, `-- shared`, `-- tracked` and `-- watch` are those rows
//! alone. Everything is made in a network namespace that ends with the process.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a bench that is set up wrongly should stop"
)]

mod gateways;
mod sets;
mod shared;
mod tools;
mod tracked;
mod watch;

use std::time::{Duration, Instant};

use common::world::{self, cluster, policies};
use egress_datapath::testing::Faults;
use egress_datapath::testing::lab;
use egress_datapath::{EgressPolicy, KernelDatapath, Reconciler, Update};

#[global_allocator]
static MEMORY: memory::Counting = memory::Counting;

const SIZES: [(u32, u32); 6] =
    [(1, 1), (10, 100), (1_000, 10), (1_000, 100), (10_000, 10), (10_000, 100)];

fn main() {
    let given = |option: &str| std::env::args().any(|argument| argument == option);
    let (quick, restore) = (given("--quick"), !given("--no-restore"));
    // While there is one thread.
    lab::isolate().unwrap();
    let named: Vec<_> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let sizes = SIZES.iter().enumerate().filter(|(place, (count, sources))| {
        let size = format!("{count}x{sources}");
        if named.is_empty() { !quick || *place < 4 } else { named.contains(&size) }
    });
    println!("policies x sources; medians; floor: the same messages, only sent\n");
    for (_, (count, sources)) in sizes {
        size(*count, *sources, restore && !(quick && count * sources > 10_000));
    }
    let parts: [(&str, fn()); 6] = [
        ("gateways", gateways::gateways),
        ("moves", gateways::moving),
        ("sets", sets::sets),
        ("shared", shared::shared),
        ("tracked", tracked::tracked),
        ("watch", watch::watch),
    ];
    for (name, part) in parts {
        if named.is_empty() || named.iter().any(|one| one == name) {
            part();
        }
    }
}

/// Prints a figure, with how many times the floor it is.
fn line(what: &str, took: Duration, floor: Option<Duration>) {
    let ratio = floor.map(|floor| took.as_secs_f64() / floor.as_secs_f64());
    let ratio = ratio.map(|ratio| format!("{ratio:>9.2} x floor")).unwrap_or_default();
    println!("  {what:<44} {:>12} {ratio}", figure(took));
}

fn figure(took: Duration) -> String {
    let us = took.as_secs_f64() * 1e6;
    if us < 1_000.0 { format!("{us:.1} us") } else { format!("{:.2} ms", us / 1e3) }
}

fn median(mut all: Vec<Duration>) -> Duration {
    all.sort_unstable();
    all[all.len() / 2]
}

fn timed<T>(work: impl FnOnce() -> T) -> (Duration, T) {
    let begin = Instant::now();
    let made = work();
    (begin.elapsed(), made)
}

fn size(count: u32, sources: u32, restore: bool) {
    println!("{count} x {sources}");
    let cluster = cluster();
    let mut policies = policies(count, sources);
    let large = count * sources > 100_000;
    let cold_rounds = if large { 3 } else { 5 };

    let (mut colds, mut floors, mut nfts) = (Vec::new(), Vec::new(), Vec::new());
    let mut peak = 0.0;
    for _ in 0..cold_rounds {
        let faults = Faults::new();
        let mut egress = Reconciler::new(KernelDatapath::open().unwrap().with_faults(&faults));
        memory::begin();
        let (took, report) = timed(|| egress.reconcile(&cluster, &policies).unwrap());
        peak = memory::peak().max(peak);
        colds.push(took);
        floors.push(faults.sending());
        let file = (nfts.is_empty() || !large).then(|| tools::nft_file(&report.changes));
        drop(report);
        egress.remove().unwrap();
        nfts.extend(file.map(|file| tools::nft(&file)));
    }
    let (cold, floor) = (median(colds), median(floors));
    line("floor", floor, None);
    line("cold apply", cold, Some(floor));
    line("nft -f, the table alone", median(nfts), Some(floor));
    if restore {
        let (ipset, iptables) = tools::restore(count, sources);
        line("ipset restore + iptables-legacy-restore", ipset + iptables, Some(floor));
    }

    let mut egress = Reconciler::new(KernelDatapath::open().unwrap());
    memory::begin();
    egress.reconcile(&cluster, &policies).unwrap();
    println!(
        "  {:<44} {:>9.1} MB held, {:.1} MB at most",
        "memory of the library",
        memory::held(),
        peak
    );
    steady(&mut egress, &cluster, &mut policies, if large { 31 } else { 51 });
    egress.remove().unwrap();
    println!();
}

/// Changes of a node that is set up, each undone before the next.
fn steady(
    egress: &mut Reconciler<KernelDatapath>,
    cluster: &egress_datapath::Cluster,
    policies: &mut [EgressPolicy],
    rounds: usize,
) {
    let mut each = |what: &str, work: &mut dyn FnMut(&mut Reconciler<KernelDatapath>, usize)| {
        let all = (0..rounds).map(|round| timed(|| work(egress, round)).0).collect();
        line(what, median(all), None);
    };
    each("repair, nothing changed", &mut |egress, _| {
        assert!(egress.repair().unwrap().changes.is_empty());
    });
    each("reconcile with the same snapshot", &mut |egress, _| {
        assert!(egress.reconcile(cluster, &*policies).unwrap().changes.is_empty());
    });
    let id = policies[0].id.clone();
    let sources = vec!["172.20.0.1/32".parse().unwrap()];
    let (mut settles, mut moves) = (Vec::new(), Vec::new());
    each("update, one pod in or out", &mut |egress, round| {
        let (policy, sources) = (id.clone(), sources.clone());
        let update: Update = match round % 2 {
            0 => Update::AddSources { policy, sources },
            _ => Update::RemoveSources { policy, sources },
        };
        assert_eq!(egress.update([update]).unwrap().changes.len(), 1);
    });
    each("update, a policy moved", &mut |egress, round| {
        let gateway = Some(world::name(u32::try_from(round % 2).unwrap() + 2));
        let update: Update = Update::Move { policy: id.clone(), gateway };
        assert!(!egress.update([update]).unwrap().changes.is_empty());
    });
    // Those that were left for later.
    for round in 0..rounds {
        let (policy, sources) = (id.clone(), sources.clone());
        let update: Update = match round % 2 {
            0 => Update::AddSources { policy, sources },
            _ => Update::RemoveSources { policy, sources },
        };
        egress.update([update]).unwrap();
        settles.push(timed(|| egress.settle().unwrap()).0);
        let gateway = Some(world::name(u32::try_from(round % 2).unwrap() + 2));
        egress.update([Update::<EgressPolicy>::Move { policy: id.clone(), gateway }]).unwrap();
        moves.push(timed(|| egress.settle().unwrap()).0);
    }
    line("settle after one pod", median(settles), None);
    line("settle after a move", median(moves), None);
    let mut each = |what: &str, work: &mut dyn FnMut(&mut Reconciler<KernelDatapath>, usize)| {
        let all = (0..rounds).map(|round| timed(|| work(egress, round)).0).collect();
        line(what, median(all), None);
    };
    each("reconcile, one pod in or out", &mut |egress, round| {
        let sources = &mut policies[0].sources;
        if round % 2 == 0 {
            sources.push("172.20.0.1/32".parse().unwrap());
        } else {
            sources.pop();
        }
        assert!(!egress.reconcile(cluster, &*policies).unwrap().changes.is_empty());
    });
    each("reconcile, a policy moved", &mut |egress, round| {
        policies[0].gateway = Some(world::name(u32::try_from(round % 2).unwrap() + 4));
        assert!(!egress.reconcile(cluster, &*policies).unwrap().changes.is_empty());
    });
    let audits = (0..3).map(|_| timed(|| assert!(egress.audit().unwrap().changes.is_empty())).0);
    line("audit, everything read and compared", median(audits.collect()), None);
    // Whoever knows nothing has the plan to go by.
    let mut fresh = Reconciler::new(KernelDatapath::open().unwrap());
    let (took, report) = timed(|| fresh.reconcile(cluster, &*policies).unwrap());
    assert!(report.changes.is_empty());
    line("reconcile after a restart", took, None);
    let mut last = Reconciler::new(KernelDatapath::open().unwrap());
    line("drain by a new process", timed(|| last.drain().unwrap()).0, None);
    line("remove after it", timed(|| last.remove().unwrap()).0, None);
}
