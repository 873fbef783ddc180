//! A foreign hand breaks what it can, the watch tells, and a repair puts it right; meanwhile
//! packets flow, and none may leave with a wrong source.
//!
//! `EGRESS_CHAOS=full` takes a minute; `EGRESS_CHAOS_SEED` repeats the edits of an earlier run.

#[path = "../lab/mod.rs"]
mod lab;

mod edits;
#[path = "../netns/fleet.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod fleet;
mod keeper;
#[path = "../netns/lookalikes.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod lookalikes;
#[path = "../flood/stream.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod stream;

use std::env;
use std::io::{self, Write};
use std::process;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use egress_datapath::{Datapath, KernelDatapath, Ownership, State};

use edits::{Edit, Leaves};
use fleet::{Result, assert_same, check, dual, expect, have, policy, tool};
use keeper::Keeper;
use lab::{EIP_B, Host, Lab, Netns, POD_A, POD_B, SERVER};
use stream::Pod;

const PER_SECOND: u64 = 2_000;
/// How long a repair may take before it counts as none.
const PATIENCE: Duration = Duration::from_secs(3);
/// What a packet may take from the pod to the server.
const UNDER_WAY: Duration = Duration::from_millis(30);

#[test]
fn no_packet_gets_out_wrong_while_a_foreign_hand_is_at_work() -> Result {
    let Some(lab) = fleet::lab()? else { return Ok(()) };
    if !(have("ip")? && have("nft")? && have("bridge")?) {
        return Ok(());
    }
    let full = env::var("EGRESS_CHAOS").is_ok_and(|size| size == "full");
    let time = Duration::from_secs(if full { 30 } else { 4 });
    let seed = match env::var("EGRESS_CHAOS_SEED") {
        Ok(seed) => seed.parse()?,
        Err(_) => u64::from(process::id()),
    };
    let netns = &lab.node_a.netns;
    // Those at our priority would lead the flood astray.
    lookalikes::plant_those(netns, |line| !line.contains("pref 101"))?;
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

/// An edit, and when what it did had been undone.
struct Done {
    edit: Edit,
    begin: Instant,
    /// When the foreign command had ended.
    made: Instant,
    whole: Instant,
    /// Whether that was waited for.
    waited: bool,
}

/// Chaos on the client and on the gateway; returns how long repairs took, in order.
fn chaos(lab: &Lab, ownership: Ownership, seed: u64, time: Duration) -> Result<Vec<Duration>> {
    let policies = [policy("p", &[POD_A, POD_B], Some("node-b"), dual(EIP_B))?];
    let hosts = [&lab.node_a, &lab.node_b];
    let mut keepers = Vec::new();
    let mut wholes = Vec::new();
    for host in hosts {
        let mut keeper = Keeper::new(host, ownership, &lab.cluster(host)?, &policies)?;
        wholes.push(keeper.whole()?);
        keepers.push(keeper);
    }
    let stop = AtomicBool::new(false);
    let wears = [EIP_B];
    let pods = [(&lab.pod_a, POD_A), (&lab.pod_b, POD_B)];
    let pods = pods.map(|(netns, address)| Pod { netns, address, wears: &wears });
    let ((done, kept), tally) = thread::scope(|scope| -> Result<_> {
        let keeping: Vec<_> =
            keepers.iter_mut().map(|keeper| scope.spawn(|| keeper.keep(&stop))).collect();
        let hand = |_: &_| {
            let done = hand(&hosts, &wholes, seed, time).map_err(|error| error.to_string());
            stop.store(true, Relaxed);
            done
        };
        let (done, tally) = stream::during(lab, &pods, PER_SECOND, hand)?;
        let mut kept = Vec::new();
        for keeper in keeping {
            kept.push(keeper.join().map_err(|_| "a keeper panicked")??);
        }
        Ok(((done?, kept), tally))
    })?;
    check(&[expect(&lab.pod_a, SERVER, EIP_B), expect(&lab.pod_b, SERVER, EIP_B)]);
    for keeper in keepers {
        keeper.remove()?;
    }
    let excused = |at: Instant| {
        ownership == Ownership::Shared
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

/// One edit after another, each until it has been undone.
fn hand(hosts: &[&Host; 2], wholes: &[State], seed: u64, time: Duration) -> Result<Vec<Done>> {
    let mut dice = Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let mut observers = Vec::new();
    for host in hosts {
        observers.push(host.netns.run(KernelDatapath::open)??);
    }
    let edits = [edits::all(&wholes[0], true), edits::all(&wholes[1], false)];
    let mut all = Vec::new();
    let end = Instant::now() + time;
    while Instant::now() < end {
        let node = dice.below(2);
        let edit = &edits[node][dice.below(edits[node].len())];
        let begin = Instant::now();
        edit.make(&hosts[node].netns)?;
        let made = Instant::now();
        // Sometimes the next one comes before the last one has been undone.
        let patient = dice.below(4) > 0;
        while patient && observers[node].observe().ok().as_ref() != Some(&wholes[node]) {
            if made.elapsed() > PATIENCE {
                let now = observers[node].observe()?;
                let missing = egress_datapath::Changes::between(&now, &wholes[node]);
                return Err(format!("{:?} was not undone:\n{missing}", edit.lines).into());
            }
        }
        all.push((edit.clone(), node, begin, made, patient.then(Instant::now)));
        sleep(Duration::from_millis(5) + Duration::from_micros(dice.below(45_000) as u64));
    }
    for (observer, whole) in observers.iter_mut().zip(wholes) {
        let last = Instant::now();
        while observer.observe().ok().as_ref() != Some(whole) {
            if last.elapsed() > PATIENCE {
                return Err("what is wanted did not come back".into());
            }
        }
    }
    let now = Instant::now();
    let mut done = Vec::new();
    for (at, (edit, node, begin, made, whole)) in all.iter().enumerate() {
        let waited = whole.is_some();
        // What was not waited for had been undone by when the next was on the same node.
        let later = all.iter().skip(at).filter(|(_, of, ..)| of == node);
        let whole = whole.or_else(|| later.filter_map(|(.., whole)| *whole).next());
        let (begin, made, whole) = (*begin, *made, whole.unwrap_or(now));
        done.push(Done { edit: edit.clone(), begin, made, whole, waited });
    }
    Ok(done)
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

/// Xorshift: the same numbers for the same seed everywhere.
struct Dice(u64);

impl Dice {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        let end = u64::try_from(end).unwrap_or(1).max(1);
        usize::try_from(self.0 % end).unwrap_or_default()
    }
}
