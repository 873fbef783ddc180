//! What a packet costs a node: nanoseconds from one end of a forwarding path to the other.
//!
//! `cargo bench --bench packets`, as root and with nft, iptables, ipset and iproute2 installed;
//! `-- --quick` is the short form, `-- --iptables` measures the iptables backend and little else.
//! With `-- --instructions` a nanosecond is taken for an instruction, which it is in a machine whose
//! clock counts them: `benches/instructions` has one, and the figures are the same in every run.
//! Every variant has three network namespaces of its own, and all are there at once: a sender, a
//! router and a receiver. A veth device hands a packet on within the system call that sends it, so
//! that the time of the call is that of the whole path. All variants take turns for some rounds, in
//! each of which they send a packet of every flow, which is the cold figure, and then some more of
//! each; the figure is the least of the medians. Where in memory the kernel puts what belongs to a
//! router makes some hundredths, so that there are three of each kind that a ratio is made of, and
//! the middle one counts. Compare figures of one run only.

use std::error::Error;
use std::hint::black_box;
use std::path::Path;
use std::time::{Duration, Instant};

use egress_datapath::Replies;
use egress_datapath::testing::lab;
use rustix::thread::{CpuSet, sched_setaffinity};

use report::Report;
use variant::Variant;

mod frame;
mod iptables;
mod ours;
mod path;
mod plot;
mod port;
mod report;
mod seed;
mod variant;

type Result<T = ()> = std::result::Result<T, Box<dyn Error>>;

/// How much is measured.
struct Extent {
    rounds: usize,
    /// The most that a turn of the flows may take, once it has packets enough for a median.
    turn: Duration,
    /// How many there are of each kind that a ratio is made of.
    routers: usize,
    /// Numbers of policies, of ours and of the seed's.
    ours: &'static [u32],
    /// Those of ours where the first packet of a connection decides for all.
    cached: &'static [u32],
    seed: &'static [u32],
    /// Numbers of gateways that 100 policies are shared out among.
    gateways: &'static [u32],
    /// Numbers of policies without destinations, with either variant of iptables.
    iptables: &'static [u32],
    /// Numbers of policies of a gateway that translates.
    gateway: &'static [u32],
    /// Numbers of gateways that are found by the egress hook.
    hook: &'static [u32],
}

/// Where time is short: of what is slow, fewer packets.
const TURN: Duration = Duration::from_millis(20);

const FULL: Extent = Extent {
    rounds: 25,
    turn: TURN,
    routers: 3,
    ours: &[1, 10, 100, 1_000, 10_000],
    cached: &[1, 10_000],
    seed: &[1, 10, 100, 1_000],
    gateways: &[1, 100],
    iptables: &[1_000],
    gateway: &[10, 10_000],
    hook: &[1, 1_000],
};
const QUICK: Extent = Extent {
    rounds: 9,
    turn: TURN,
    routers: 1,
    ours: &[1, 100],
    cached: &[1],
    seed: &[1, 10],
    gateways: &[1, 100],
    iptables: &[1_000],
    gateway: &[10, 100],
    hook: &[1, 1_000],
};
/// Both variants of iptables, and what they are compared with.
const IPTABLES: Extent = Extent {
    rounds: 25,
    turn: TURN,
    routers: 3,
    ours: &[1_000],
    cached: &[],
    seed: &[],
    gateways: &[1, 100],
    iptables: &[1_000],
    gateway: &[],
    hook: &[],
};
/// Everything once. A turn has a packet of each flow, however long that takes: neither chance nor
/// memory is part of the figure, so that a second round or router would show the same.
const INSTRUCTIONS: Extent = Extent {
    rounds: 1,
    turn: Duration::MAX,
    routers: 1,
    cached: &[1, 1_000, 10_000],
    gateway: &[10, 1_000, 10_000],
    ..FULL
};
/// Of that, what the ratios are made of that are kept in the tree.
const CHIEF: Extent = Extent {
    ours: &[1, 1_000],
    cached: &[1, 1_000],
    seed: &[],
    gateways: &[],
    iptables: &[],
    gateway: &[10, 1_000],
    hook: &[],
    ..INSTRUCTIONS
};

fn main() -> Result {
    let asked = |form| std::env::args().any(|argument| argument == form);
    let (instructions, quick) = (asked("--instructions"), asked("--quick"));
    let (extent, is_whole) = match (instructions, quick, asked("--iptables")) {
        (true, true, _) => (CHIEF, false),
        (true, ..) => (INSTRUCTIONS, false),
        (_, true, _) => (QUICK, false),
        (.., true) => (IPTABLES, false),
        _ => (FULL, true),
    };
    if instructions {
        clock_counts_instructions()?;
    }
    lab::isolate()?;
    let mut variants = variants(&extent)?;
    // The receiving half of the path runs where the sending one does.
    let mut here = CpuSet::new();
    here.set(rustix::thread::sched_getcpu());
    sched_setaffinity(None, &here)?;
    for variant in &mut variants {
        variant.verify()?;
    }
    for _ in 0..extent.rounds {
        for variant in &mut variants {
            variant.measure(extent.turn)?;
        }
    }
    let report = Report::new(&variants);
    if instructions {
        print!("{}", report.instructions());
    } else {
        print!("{report}");
    }
    if is_whole {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/packets.svg");
        std::fs::write(file, plot::svg(&report)?)?;
    }
    Ok(())
}

/// Refuses a clock whose nanosecond is not one instruction. Each pass of a loop takes a whole number
/// of instructions, and all passes the same one; no processor is as exact, though some are steady.
fn clock_counts_instructions() -> Result {
    const PASSES: u32 = 10_000;
    let mut times = [[0; 15]; 2];
    for (times, passes) in times.iter_mut().zip([PASSES, 2 * PASSES]) {
        for time in times.iter_mut() {
            let start = Instant::now();
            for number in 0..passes {
                black_box(number);
            }
            *time = start.elapsed().as_nanos();
        }
        times.sort_unstable();
    }
    // Some are interrupted, and each tick corrects the frequency by some ppm.
    let [[once, ..], [twice, ..]] = times;
    let alike = |time: &&u128| time.abs_diff(once) <= 20;
    let steady = times[0].iter().filter(alike).count() > times[0].len() / 2;
    // The kernel measures the clock's frequency when it boots, within 500 ppm
    // (`quick_pit_calibrate` in arch/x86/kernel/tsc.c). What reading the clock takes cancels out.
    let (took, passes) = (twice.saturating_sub(once), u128::from(PASSES));
    let count = (took + passes / 2) / passes;
    if steady && count > 0 && took.abs_diff(count * passes) <= 20 + took / 2_000 {
        return Ok(());
    }
    Err(format!(
        "the clock does not count instructions, as that of benches/instructions does: \
         {PASSES} and twice as many passes of one loop took {times:?} ns"
    )
    .into())
}

fn variants(extent: &Extent) -> Result<Vec<Variant>> {
    let mut variants = vec![Variant::sending()?];
    for number in 0..extent.routers {
        // Those between the least and the most are for the plot.
        let counts = |all: &'static [u32]| {
            let ends = [all.first(), all.last()];
            all.iter().copied().filter(move |count| number == 0 || ends.contains(&Some(count)))
        };
        variants.extend([Variant::plain()?, Variant::conntrack()?]);
        variants.extend([Variant::bound()?, Variant::least()?]);
        for policies in counts(extent.ours) {
            variants.extend(Variant::ours(policies, 1, false)?);
        }
        for policies in extent.cached {
            variants.extend(Variant::ours(*policies, 1, true)?);
        }
        // One of the policies is there for each gateway.
        for gateways in extent.gateways {
            variants.extend(Variant::ours(100, *gateways, false)?);
        }
        for gateways in extent.hook {
            variants.extend(Variant::hook(*gateways)?);
            variants.push(Variant::spread(*gateways)?);
        }
        for policies in extent.gateway {
            variants.push(Variant::gateway(*policies)?);
        }
        if let [policies, ..] = extent.gateway {
            variants.extend(Variant::replies()?);
            for replies in [Replies::Direct, Replies::Tunnel] {
                variants.extend(Variant::established(*policies, replies)?);
            }
        }
        for policies in counts(extent.seed) {
            variants.extend(Variant::seed(policies)?);
        }
        for policies in extent.iptables {
            for variant in egress_datapath::state::Variant::BOTH {
                variants.extend(Variant::iptables(*policies, variant)?);
            }
        }
    }
    Ok(variants)
}
