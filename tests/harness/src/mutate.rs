//! Damaged inputs for parsers: many, all different, and the same ones for the same seed.
//!
//! `EGRESS_MUTATE` says how many each parser gets, and `EGRESS_MUTATE_SEED` the seed of the first;
//! the second has the next seed. A failure prints the seed that makes its input the first.

use std::fmt;
use std::fmt::Debug;
use std::io::{Write, stderr};
use std::panic;
use std::panic::AssertUnwindSafe;
use std::time::{Duration, Instant};

/// Inputs of each parser unless told otherwise: seconds in a debug build, all parsers together.
const INPUTS: u64 = 20_000;

/// Bytes of the longest input, as much as the kernel says at once.
const LONGEST: usize = 32 * 1024;

/// Bytes of memory that are not worth counting.
const LITTLE: usize = 512;

/// Numbers and choices that look random and follow from a seed.
pub struct Random(u64);

impl Random {
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Any number (splitmix64, whose neighbouring seeds have nothing in common).
    pub fn any(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below the limit, or 0 if there is none.
    pub fn below(&mut self, limit: usize) -> usize {
        let limit = u64::try_from(limit.max(1)).unwrap();
        usize::try_from(self.any() % limit).unwrap()
    }

    pub fn one_in(&mut self, count: usize) -> bool {
        self.below(count) == 0
    }

    pub fn pick<'a, T: ?Sized>(&mut self, all: &[&'a T]) -> &'a T {
        all[self.below(all.len())]
    }

    /// A number that is often at the edge of something.
    pub fn edge(&mut self) -> u32 {
        let bit = 1_u32 << self.below(32);
        let edges = [0, 1, 2, bit, bit.wrapping_sub(1), bit.wrapping_add(1), !bit, u32::MAX];
        match self.below(edges.len() + 2) {
            at if at < edges.len() => edges[at],
            _ => u32::try_from(self.any() >> 32).unwrap(),
        }
    }

    pub fn byte(&mut self) -> u8 {
        self.edge().to_le_bytes()[0]
    }

    /// One of the corpus, damaged in one place or a few.
    pub fn damaged(&mut self, corpus: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = self.entry(corpus).to_vec();
        let most = self.below(6) + 1;
        for _ in 0..=self.below(most) {
            self.damage(&mut bytes, corpus);
        }
        bytes.truncate(LONGEST);
        bytes
    }

    /// The same for netlink messages: mostly the length in front is right again, and now and then
    /// another message follows.
    pub fn damaged_message(&mut self, corpus: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = self.damaged(corpus);
        let length = u32::try_from(bytes.len()).unwrap();
        if let (Some(field), false) = (bytes.get_mut(..4), self.one_in(4)) {
            field.copy_from_slice(&length.to_ne_bytes());
        }
        while self.one_in(6) && bytes.len() < LONGEST {
            bytes.resize(bytes.len().next_multiple_of(4), 0);
            bytes.extend_from_slice(self.entry(corpus));
        }
        bytes
    }

    /// One of the corpus, mostly of its first half.
    fn entry<'a>(&mut self, corpus: &'a [Vec<u8>]) -> &'a [u8] {
        let from = if self.one_in(8) { corpus.len() } else { corpus.len().div_ceil(2) };
        &corpus[self.below(from)]
    }

    /// A part of the bytes, mostly between multiples of four, as netlink has them.
    fn part(&mut self, length: usize) -> std::ops::Range<usize> {
        let grain = if self.one_in(4) { 1 } else { 4 };
        let start = self.below(length / grain + 1) * grain;
        start..start + self.below((length - start) / grain + 1) * grain
    }

    fn damage(&mut self, bytes: &mut Vec<u8>, corpus: &[Vec<u8>]) {
        let at = self.below(bytes.len());
        match self.below(9) {
            0 => bytes.iter_mut().skip(at).take(1).for_each(|byte| *byte ^= 1 << self.below(8)),
            1 => bytes.iter_mut().skip(at).take(1).for_each(|byte| *byte = self.byte()),
            2 => bytes.truncate(at),
            3 => drop(bytes.drain(self.part(bytes.len()))),
            4 => {
                let other = self.entry(corpus);
                bytes.truncate(self.part(bytes.len()).start);
                bytes.extend_from_slice(&other[self.part(other.len()).start..]);
            }
            5 => {
                let other = self.entry(corpus);
                let part = &other[self.part(other.len())];
                let at = self.part(bytes.len()).start;
                bytes.splice(at..at, part.iter().copied());
            }
            6 => {
                let part = self.part(bytes.len());
                let times = if self.one_in(16) { 256 } else { 3 };
                let repeated = bytes[part.clone()].repeat(1 + self.below(times));
                bytes.splice(part.end..part.end, repeated);
                bytes.truncate(LONGEST);
            }
            7 => self.damage_length(bytes),
            _ => {
                let at = self.part(bytes.len()).start;
                let number = self.edge();
                let number =
                    if self.one_in(2) { number.to_be_bytes() } else { number.to_le_bytes() };
                bytes.iter_mut().skip(at).zip(number).for_each(|(byte, new)| *byte = new);
            }
        }
    }

    /// Damages a number of two bytes that looks like the length of what follows.
    fn damage_length(&mut self, bytes: &mut [u8]) {
        let length = |at: usize| Some(u16::from_ne_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]));
        let looks = |at: &usize| {
            length(*at).is_some_and(|found| (4..=bytes.len() - at).contains(&usize::from(found)))
        };
        let places: Vec<usize> = (0..bytes.len()).step_by(4).filter(looks).collect();
        let Some(at) = places.get(self.below(places.len())).copied() else { return };
        let old = length(at).unwrap_or_default();
        let rest = u16::try_from(bytes.len() - at).unwrap_or(u16::MAX);
        let by = u16::from(self.byte());
        let lengths = [0, 1, 3, 4, 5, old.wrapping_sub(by), old.wrapping_add(by), rest, u16::MAX];
        let new = lengths[self.below(lengths.len())];
        bytes[at..at + 2].copy_from_slice(&new.to_ne_bytes());
    }
}

/// Gives a parser whole netlink messages and damaged ones; see [`bytes`].
pub fn messages(
    parser: &str,
    multiple: usize,
    corpus: &[Vec<u8>],
    parse: impl FnMut(&[u8]) -> Option<usize>,
) {
    bytes(parser, multiple, corpus, Random::damaged_message, parse);
}

/// Gives a parser damaged bytes.
///
/// It says how many bytes of memory hold what it made of them, and nothing if it refused them;
/// they may be so many times the bytes it was given. Of the corpus itself it must accept some.
pub fn bytes(
    parser: &str,
    multiple: usize,
    corpus: &[Vec<u8>],
    damage: fn(&mut Random, &[Vec<u8>]) -> Vec<u8>,
    mut parse: impl FnMut(&[u8]) -> Option<usize>,
) {
    let (mut corpus, rest): (Vec<_>, Vec<_>) =
        corpus.iter().cloned().partition(|whole| parse(whole).is_some());
    assert!(!corpus.is_empty(), "{parser} accepts nothing whole");
    // What it accepts comes first and is half of all.
    corpus = corpus.iter().cycle().take(corpus.len().max(rest.len())).cloned().collect();
    corpus.extend(rest);
    let mut most = 0;
    let counted = inputs(
        parser,
        |random| Printable(damage(random, &corpus)),
        |Printable(input)| {
            let size = parse(input)?;
            let room = input.len() * multiple + LITTLE;
            assert!(size <= room, "{size} bytes of memory for an input of {} bytes", input.len());
            most = most.max(size * 10 / input.len().max(LITTLE));
            Some(())
        },
    );
    say(&format!("{counted}, {}.{} bytes of memory for each at most", most / 10, most % 10));
}

/// Bytes that print as a literal of the language.
struct Printable(Vec<u8>);

impl Debug for Printable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "b\"{}\"", self.0.escape_ascii())
    }
}

/// Gives a function inputs made for it; it says whether it accepted them.
pub fn anything<I: Debug>(
    what: &str,
    make: impl FnMut(&mut Random) -> I,
    mut accepts: impl FnMut(&I) -> bool,
) {
    say(&inputs(what, make, |input| accepts(input).then_some(())));
}

fn inputs<I: Debug>(
    what: &str,
    mut make: impl FnMut(&mut Random) -> I,
    mut accepts: impl FnMut(&I) -> Option<()>,
) -> String {
    let first = told("EGRESS_MUTATE_SEED").unwrap_or(0);
    let count = told("EGRESS_MUTATE").unwrap_or(INPUTS);
    let (mut accepted, mut slowest, begin) = (0_u64, (Duration::ZERO, 0), Instant::now());
    for seed in (0..count).map(|number| first.wrapping_add(number)) {
        let input = make(&mut Random::new(seed));
        let given = Instant::now();
        match panic::catch_unwind(AssertUnwindSafe(|| accepts(&input))) {
            Ok(answer) => accepted += u64::from(answer.is_some()),
            Err(panic) => {
                let input: String = format!("{input:?}").chars().take(20_000).collect();
                let _said =
                    writeln!(stderr(), "{what}: EGRESS_MUTATE_SEED={seed} makes it first: {input}");
                panic::resume_unwind(panic);
            }
        }
        slowest = slowest.max((given.elapsed(), seed));
    }
    let (elapsed, (longest, seed)) = (begin.elapsed(), slowest);
    format!(
        "{what}: {count} inputs, {accepted} accepted, {elapsed:.1?}, slowest {longest:.1?} (seed {seed})"
    )
}

fn told(name: &str) -> Option<u64> {
    let value = std::env::var(name).ok()?;
    Some(value.parse().unwrap_or_else(|_| panic!("{name}={value} is not a number")))
}

/// A long run says on the terminal what it did, whatever the test harness hides.
fn say(line: &str) {
    if told("EGRESS_MUTATE").is_some() {
        let _said = writeln!(stderr(), "{line}");
    } else {
        crate::note!("{line}");
    }
}
