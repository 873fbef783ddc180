//! A foreign hand breaks what it can, the watch tells, and a repair puts it right; meanwhile
//! packets flow, and none may leave with a wrong source.
//!
//! `EGRESS_CHAOS=full` takes a minute; `EGRESS_CHAOS_SEED` repeats the edits of an earlier run.

#[macro_use]
extern crate harness;

mod edits;
mod hand;
mod keeper;

use std::env;
use std::io::{self, Write};
use std::process::{self, ExitCode};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use common::fleet::{self, Result, assert_same, check, dual, expect, policy, tool};
use common::lookalikes;
use common::stream::{self, Pod};
use egress_datapath::Ownership;
use egress_datapath::testing::lab::{self, EIP_B, Lab, Netns, POD_A, POD_B, SERVER};

use edits::Leaves;
use hand::Victim;
use keeper::Keeper;

/// In a network namespace of its own where there can be one.
fn main() -> ExitCode {
    harness::main(|| drop(lab::isolate()))
}

const PER_SECOND: u64 = 2_000;
/// What a packet may take from the pod to the server.
const UNDER_WAY: Duration = Duration::from_millis(30);

#[test]
fn no_packet_gets_out_wrong_while_a_foreign_hand_is_at_work() -> Result {
    let lab = fleet::lab();
    let full = env::var("EGRESS_CHAOS").is_ok_and(|size| size == "full");
    let time = Duration::from_secs(if full { 30 } else { 4 });
    let seed = match env::var("EGRESS_CHAOS_SEED") {
        Ok(seed) => seed.parse()?,
        Err(_) => u64::from(process::id()),
    };
    let netns = &lab.node_a.netns;
    // Those at our priority would lead the flood astray.
    lookalikes::plant_those(netns, |line| !line.contains("pref 102"))?;
    let before = foreign(netns)?;
    for ownership in [Ownership::Shared, Ownership::Exclusive] {
        let latencies = chaos(&lab, ownership, seed, time)?;
        assert_same(&before, &foreign(netns)?);
        if full {
            let p99 = percentile(&latencies, 99);
            assert!(p99 < Duration::from_millis(100), "99 of 100 repairs take up to {p99:?}");
        }
    }
    Ok(())
}

/// Chaos on the client and on the gateway; returns how long repairs took, in order.
fn chaos(lab: &Lab, ownership: Ownership, seed: u64, time: Duration) -> Result<Vec<Duration>> {
    let policies = [policy("p", &[POD_A, POD_B], Some("node-b"), dual(EIP_B))?];
    let (mut keepers, mut victims) = (Vec::new(), Vec::new());
    for (host, plants) in [(&lab.node_a, true), (&lab.node_b, false)] {
        let mut keeper = Keeper::new(host, ownership, &lab.cluster(host)?, &policies)?;
        victims.push(Victim::new(host, keeper.whole()?, plants)?);
        keepers.push(keeper);
    }
    let alone = keepers.iter_mut().all(Keeper::is_alone);
    if ownership == Ownership::Exclusive && !alone {
        // What is open meanwhile then is as it is where the table is shared.
        writeln!(io::stderr(), "the kernel has no owners of tables that stay (Linux 6.9)")?;
    }
    // Every repair lists all connections, and those of the flood never come again.
    stream::forget_after(lab, "0")?;
    let stop = AtomicBool::new(false);
    let allowed = [EIP_B];
    let pods = [(&lab.pod_a, POD_A), (&lab.pod_b, POD_B)];
    let pods = pods.map(|(netns, address)| Pod { netns, address, allowed: &allowed });
    let ((done, kept), tally) = thread::scope(|scope| -> Result<_> {
        let keeping: Vec<_> =
            keepers.iter_mut().map(|keeper| scope.spawn(|| keeper.keep(&stop))).collect();
        let hand = |_: &_| {
            let done = hand::work(&mut victims, seed, time).map_err(|error| error.to_string());
            stop.store(true, Relaxed);
            done
        };
        let (done, tally) =
            stream::during((&lab.server, SERVER), &pods, stream::MANY, PER_SECOND, hand)?;
        let mut kept = Vec::new();
        for keeper in keeping {
            kept.push(keeper.join().map_err(|_| "a keeper panicked")??);
        }
        Ok(((done?, kept), tally))
    })?;
    stream::forget_after(lab, "30")?;
    check(&[expect(&lab.pod_a, SERVER, EIP_B), expect(&lab.pod_b, SERVER, EIP_B)]);
    for keeper in keepers {
        keeper.remove()?;
    }
    let excused = |at: Instant| {
        !alone
            && done.iter().any(|done| {
                done.edit.leaves == Leaves::Open && done.begin <= at && at <= done.whole + UNDER_WAY
            })
    };
    let (open, leaked): (Vec<_>, Vec<_>) = tally.leaked.iter().partition(|(_, at)| excused(*at));
    let mut latencies: Vec<_> =
        done.iter().filter(|done| done.waited).map(|done| done.whole - done.made).collect();
    latencies.sort_unstable();
    let (p50, p99) = (percentile(&latencies, 50), percentile(&latencies, 99));
    let opened = done.iter().filter(|done| done.edit.leaves == Leaves::Open).count();
    writeln!(
        io::stderr(),
        "chaos {ownership:?}, seed {seed}: {} edits ({opened} opened), {} packets, {} leaked, \
         {} leaked while open, {} lost ({} by the server), repaired p50 {p50:?} p99 {p99:?}, {kept:?}",
        done.len(),
        tally.sent,
        leaked.len(),
        open.len(),
        tally.lost.len(),
        tally.overflowed,
    )?;
    let slowest = done.iter().filter(|done| done.waited).max_by_key(|done| done.whole - done.made);
    let slowest = slowest.map(|done| (done.edit.lines.join("; "), done.whole - done.made));
    writeln!(io::stderr(), "slowest: {slowest:?}")?;
    for (source, at) in &leaked {
        let last = done.iter().rev().find(|done| done.begin <= *at);
        let what = last.map(|done| (&done.edit.lines, *at - done.made, done.whole - done.made));
        writeln!(io::stderr(), "leaked as {source} after {what:?}")?;
    }
    assert!(leaked.is_empty(), "seed {seed}");
    assert!(!done.is_empty() && tally.sent > 0);
    Ok(latencies)
}

/// What others have on a node, but for the neighbours that packets bring about.
fn foreign(netns: &Netns) -> Result<String> {
    let lines = [
        "nft -s list ruleset",
        "ip -4 rule",
        "ip -6 rule",
        "ip -4 -d route show table all",
        "ip -6 -d route show table all",
        "ip -d link",
        "ip -d addr",
        "ip neigh show nud permanent",
        "bridge -d fdb",
    ];
    let list = lines.into_iter().map(|line| Ok(format!("# {line}\n{}", tool(netns, line)?)));
    list.collect()
}

fn percentile(sorted: &[Duration], percent: usize) -> Duration {
    let at = sorted.len().saturating_sub(1) * percent / 100;
    sorted.get(at).copied().unwrap_or_default()
}
