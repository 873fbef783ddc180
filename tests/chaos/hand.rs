//! The foreign hand: one edit after another, and whether each is undone.

use std::thread::sleep;
use std::time::{Duration, Instant};

use common::fleet::Result;
use egress_datapath::datapath::observe;
use egress_datapath::testing::lab::Host;
use egress_datapath::{Changes, KernelDatapath, State};

use crate::edits::{self, Edit};

/// How long a repair may take before it counts as none.
const PATIENCE: Duration = Duration::from_secs(30);

/// A node that is edited.
pub(crate) struct Victim<'a> {
    host: &'a Host,
    whole: State,
    kernel: KernelDatapath,
    edits: Vec<Edit>,
}

/// An edit, and when what it did had been undone.
pub(crate) struct Done {
    pub(crate) edit: Edit,
    pub(crate) begin: Instant,
    /// When the foreign command had ended.
    pub(crate) made: Instant,
    pub(crate) whole: Instant,
    /// Whether that was waited for.
    pub(crate) waited: bool,
}

impl<'a> Victim<'a> {
    /// A node that is whole now; `plants` says whether it has the lookalikes.
    pub(crate) fn new(host: &'a Host, whole: State, plants: bool) -> Result<Self> {
        let kernel = host.netns.run(KernelDatapath::open)??;
        Ok(Self { host, kernel, edits: edits::all(&whole, plants), whole })
    }

    /// Waits until what is wanted is there.
    fn wait(&mut self, after: &Edit) -> Result<Instant> {
        let begin = Instant::now();
        loop {
            let now = observe(&mut self.kernel);
            if now.as_ref().is_ok_and(|now| *now == self.whole) {
                return Ok(Instant::now());
            }
            if begin.elapsed() > PATIENCE {
                let missing = Changes::between(&now?, &self.whole);
                return Err(format!("{:?} was not undone:\n{missing}", after.lines).into());
            }
        }
    }
}

/// Edits for so long.
pub(crate) fn work(victims: &mut [Victim<'_>], seed: u64, time: Duration) -> Result<Vec<Done>> {
    let mut dice = Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let mut all = Vec::new();
    let end = Instant::now() + time;
    while Instant::now() < end {
        let node = dice.below(victims.len());
        let Some(victim) = victims.get_mut(node) else { break };
        let Some(edit) = victim.edits.get(dice.below(victim.edits.len())).cloned() else { break };
        let begin = Instant::now();
        edit.make(&victim.host.netns)?;
        let made = Instant::now();
        // Sometimes the next one comes before the last one has been undone.
        let whole = if dice.below(4) > 0 { Some(victim.wait(&edit)?) } else { None };
        all.push((edit, node, begin, made, whole));
        sleep(Duration::from_millis(5 + u64::try_from(dice.below(45))?));
    }
    for (node, victim) in victims.iter_mut().enumerate() {
        if let Some((edit, ..)) = all.iter().rfind(|(_, of, ..)| *of == node) {
            victim.wait(edit)?;
        }
    }
    let now = Instant::now();
    let mut done = Vec::new();
    for (at, (edit, node, begin, made, whole)) in all.iter().enumerate() {
        // What was not waited for had been undone when the next one on the node was.
        let mut later = all.iter().skip(at).filter(|(_, of, ..)| of == node);
        let undone = later.find_map(|(.., whole)| *whole).unwrap_or(now);
        let (begin, made, waited) = (*begin, *made, whole.is_some());
        done.push(Done { edit: edit.clone(), begin, made, whole: undone, waited });
    }
    Ok(done)
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
