//! Packets while the datapath changes: none may leave with a wrong source, and none may get lost
//! where nothing that it needs is taken away.
//!
//! `EGRESS_FLOOD=full` makes it at least 100 000 packets and 5 000 transactions of each kind of
//! change, a million packets where many sources move, and takes half an hour; another word
//! runs only the kinds that begin with it, and `full,move` does both.
//! `EGRESS_BACKEND=iptables-legacy` and `iptables-nft` flood those.

#[macro_use]
extern crate harness;

mod change;
mod changes;
mod growth;
mod moves;
mod nodes;
mod takeover;

use std::collections::BTreeMap;
use std::env;
use std::io::{self, Write};
use std::net::IpAddr;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use common::backend::backend;
use common::fleet::{self, Result, nft, tool};
use common::stream::{self, Pod, Progress, Tally};
use egress_datapath::datapath::Phase;
use egress_datapath::testing::lab::{self, Lab, POD_A, POD_B, POD_C, SERVER};
use egress_datapath::{Backend, Report};

use change::{Change, Loss, Size, To};
use nodes::Nodes;

/// In a network namespace of its own where there can be one; a test for each kind of change.
fn main() -> ExitCode {
    let kinds = || {
        let wish = env::var("EGRESS_FLOOD").unwrap_or_default();
        let only = wish.trim_start_matches("full").trim_start_matches(',');
        let kinds = changes::ALL.iter().filter(|change| change.name.starts_with(only));
        kinds.map(|change| harness::trial(change.name, || one_kind(change))).collect()
    };
    harness::main_in_turn(|| drop(lab::isolate()), kinds)
}

const SMALL: Size =
    Size { packets: 4_000, per_second: 4_000, commits: 0, at_most: Duration::from_secs(4) };
const LAYOUT: &str = "layout of the marks";

/// No packet leaves with a wrong source while changes of one kind are made.
fn one_kind(change: &Change) -> Result {
    if backend() != Backend::Nftables {
        let other =
            [LAYOUT, changes::COUNTERS, changes::STEERING, changes::REPLIES].contains(&change.name);
        if change.caching || other {
            harness::limit("with iptables this is not changed while it is in use");
        }
        if change.restores() {
            harness::limit("with iptables whoever overwrites the whole mark takes ours away");
        }
    }
    if change.backends {
        harness::needs(&["iptables-legacy", "iptables-nft"]);
    }
    let lab = fleet::lab();
    if change.offloads() {
        fleet::needs_flowtables(&lab);
    }
    let size = if is_full() { &change.in_full } else { &SMALL };
    let wrong = flood(&lab, change, size)?;
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let is_found = !is_missed(change);
    harness::needs_kernel("lookup that finds a range while ranges change (Linux 6.18)", is_found);
    Ok(())
}

/// Whether it is the large run.
fn is_full() -> bool {
    env::var("EGRESS_FLOOD").is_ok_and(|wish| wish.starts_with("full"))
}

/// So few flows that each goes on all the time.
const FEW: u64 = 16;

/// Floods during one kind of change, prints a line, and returns what is wrong.
fn flood(lab: &Lab, change: &Change, size: &Size) -> Result<Vec<String>> {
    if !change.foreign.is_empty() {
        for host in lab.nodes() {
            nft(&host.netns, &[], change.foreign)?;
        }
    }
    // Every reconciliation lists all connections; where each has one packet, let them go. One that
    // was offloaded loses 30 s when its flowtable lets it go, and must be there after that.
    stream::forget_after(lab, if change.lasts() { "120" } else { "0" })?;
    for host in lab.nodes() {
        host.netns.sysctl(&[
            // With its mark, a packet must at no moment seem to come from elsewhere.
            ("ipv4/conf/all/rp_filter", "1"),
            ("ipv4/conf/all/src_valid_mark", "1"),
        ])?;
    }
    let mut nodes = Nodes::open(lab, change)?;
    (change.round)(lab, &mut nodes, 0)?;
    let untracked = untracked(lab)?;
    let [by_client, by_gateway] = change.allowed;
    let pods = [
        Pod { netns: &lab.pod_a, address: POD_A, allowed: by_client },
        Pod { netns: &lab.pod_b, address: POD_B, allowed: by_gateway },
    ];
    let to = match change.to {
        To::Server => (&lab.server, SERVER),
        To::PodC => (&lab.pod_c, POD_C),
    };
    let least = Duration::from_secs(1) * size.packets / size.per_second * 11 / 10;
    let begin = Instant::now();
    let rounds = |progress: &Progress| -> std::result::Result<_, String> {
        let (mut rounds, mut commits) = (Vec::new(), 0);
        let is_enough = |commits| {
            let packets = progress.sent() >= u64::from(size.packets) && begin.elapsed() >= least;
            packets && (commits >= size.commits || change.idle)
        };
        while begin.elapsed() < size.at_most && !is_enough(commits) {
            rounds.push(progress.sent());
            let number = u64::try_from(rounds.len()).unwrap_or_default();
            let made = (change.round)(lab, &mut nodes, number);
            let reports = made.map_err(|error| format!("round {number}: {error}"))?;
            commits += reports.iter().map(transactions).sum::<u64>();
        }
        Ok((rounds, commits))
    };
    let flows = if change.lasts() { FEW } else { stream::MANY };
    let (done, tally) = stream::during(to, &pods, flows, u64::from(size.per_second), rounds)?;
    let took = begin.elapsed();
    let (rounds, commits) = done?;
    let untracked = self::untracked(lab)?.saturating_sub(untracked);
    if untracked > 0 {
        writeln!(io::stderr(), "  {untracked} dropped where connections are tracked")?;
    }
    let held_back = held_back(lab)? + untracked;
    nodes.remove()?;
    for host in lab.nodes() {
        if !change.foreign.is_empty() {
            tool(&host.netns, "nft delete table inet foreign")?;
        }
    }
    Ok(judge(change, &tally, held_back, &rounds, (commits, took))?)
}

fn judge(
    change: &Change,
    tally: &Tally,
    held_back: u64,
    rounds: &[u64],
    (commits, took): (u64, Duration),
) -> io::Result<Vec<String>> {
    let mut leaked: BTreeMap<IpAddr, u64> = BTreeMap::new();
    for (source, _) in &tally.leaked {
        *leaked.entry(*source).or_default() += 1;
    }
    let leaks = tally.leaked.len();
    let (name, sent, lost) = (change.name, tally.sent, tally.lost.len());
    writeln!(
        io::stderr(),
        "flood {name:<32} {sent:>7} packets {:>6} rounds {commits:>6} commits \
         {leaks:>3} leaked {lost:>5} lost, {held_back:>5} held back {:>5.1} s",
        rounds.len(),
        took.as_secs_f64(),
    )?;
    let mut wrong = Vec::new();
    let missed = is_missed(change);
    if leaks > 0 && !missed {
        wrong.push(format!("{name}: leaked {leaked:?}"));
    }
    let round = |number: u64| rounds.partition_point(|begin| *begin <= number);
    // A masquerade in a table of nf_tables comes before iptables: its packets are dropped.
    let limited = backend() != Backend::Nftables && !change.foreign.is_empty();
    let of_client = |number: &&u64| **number / 2 % 2 == 0;
    let counted = match change.loss {
        Loss::OnGateway => tally.lost.iter().filter(of_client).count(),
        _ => lost,
    };
    let excused = match change.loss {
        _ if limited || missed => u64::MAX,
        Loss::None => 0,
        // A packet that was under way when its policy came is not let out by what it met before.
        Loss::Few | Loss::OnGateway => 5 + tally.sent / 2_000,
        Loss::Any => u64::MAX,
    };
    let counted = u64::try_from(counted.saturating_sub(tally.overflowed)).unwrap_or(u64::MAX);
    if counted > excused {
        let lost: Vec<_> = tally.lost.iter().map(|number| (number, round(*number))).collect();
        wrong.push(format!("{name}: lost packets, each with the round it was sent in: {lost:?}"));
    }
    let silently = lost.saturating_sub(tally.overflowed + usize::try_from(held_back).unwrap_or(0));
    if change.loss.is_by_rule() && silently > 0 && !missed && backend() == Backend::Nftables {
        wrong.push(format!("{name}: {silently} packets lost that no rule has held back"));
    }
    if sent == 0 || commits == 0 && !change.idle {
        wrong.push(format!("{name}: nothing happened"));
    }
    Ok(wrong)
}

/// Kinds of changes of ranges in a set.
const RANGES: [&str; 3] = ["ranges of sources", "address or prefix", "excluded prefixes"];

/// Whether the change is one of ranges, on a kernel that may miss a range meanwhile, as the
/// preflight says ([`egress_datapath::preflight::Problem::RangesMissed`]).
fn is_missed(change: &Change) -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers = release.split(|other: char| !other.is_ascii_digit());
    let mut number = || numbers.next().and_then(|number| number.parse::<u32>().ok());
    let is_old = (number(), number()) < (Some(6), Some(18));
    is_old && RANGES.iter().any(|ranges| change.name.ends_with(ranges))
}

/// The nf_tables transactions among the changes.
fn transactions(report: &Report) -> u64 {
    let mut count = 0;
    for step in report.changes.steps() {
        match step.phase {
            Phase::Tunnel
            | Phase::Routes
            | Phase::Rules
            | Phase::DeleteTunnel
            | Phase::DeleteRules
            | Phase::DeleteRoutes
            | Phase::DeletePeers
            | Phase::MarkConnections
            | Phase::EndConnections => {}
            _ => count += 1,
        }
    }
    count
}

/// Packets that our rules on all nodes have dropped since they were put there; prints which.
fn held_back(lab: &Lab) -> Result<u64> {
    let mut count = 0;
    for host in lab.nodes() {
        // Some kinds of changes end without a table, or with rules of another backend.
        let list =
            |family| tool(&host.netns, &format!("nft --terse list table {family} egress_datapath"));
        let rules = ["inet", "netdev"].map(|family| list(family).unwrap_or_default()).concat();
        let mut chain = "";
        for line in rules.lines().map(str::trim) {
            let mut words = line.split_whitespace();
            chain = line.strip_prefix("chain ").map_or(chain, |name| name.trim_end_matches(" {"));
            if words.any(|word| word == "packets") {
                let packets = words.next().ok_or("no number of packets")?.parse::<u64>()?;
                count += packets;
                if packets > 0 {
                    writeln!(io::stderr(), "  held back on {}, {chain}: {line}", host.name)?;
                }
            }
        }
    }
    Ok(count)
}

/// Packets that the kernel has dropped on all nodes because it could not track their connections,
/// as those of one that was ended while its first packet was on its way (`insert_failed`).
fn untracked(lab: &Lab) -> Result<u64> {
    let mut count = 0;
    for host in lab.nodes() {
        let file = "/proc/thread-self/net/stat/nf_conntrack";
        let table = host.netns.run(|| std::fs::read_to_string(file))?.unwrap_or_default();
        let mut lines = table.lines().map(str::split_whitespace);
        let names = lines.next().into_iter().flatten();
        let Some(column) = names.into_iter().position(|name| name == "insert_failed") else {
            continue;
        };
        for failed in lines.filter_map(|mut line| line.nth(column)) {
            count += u64::from_str_radix(failed, 16)?;
        }
    }
    Ok(count)
}
