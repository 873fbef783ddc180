//! The few of many steps that a difference needs.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// Whether a difference was found, and is being shrunk.
static FOUND: AtomicBool = AtomicBool::new(false);

/// How long both worlds may take to become the same: longer than a busy machine takes, but so long
/// only once, for shrinking meets the same difference again and again.
pub(crate) fn patience() -> Duration {
    if FOUND.load(Relaxed) { Duration::from_millis(500) } else { Duration::from_secs(120) }
}

/// Has those who wait from now on wait briefly.
pub(crate) fn found() {
    FOUND.store(true, Relaxed);
}

/// The steps without those that the failure does not need, as far as there was time to find out
/// (delta debugging: Zeller and Hildebrandt, "Simplifying and Isolating Failure-Inducing Input").
pub(crate) fn shrink<T: Clone>(
    steps: &[T],
    time: Duration,
    mut fails: impl FnMut(&[T]) -> bool,
) -> Vec<T> {
    let begun = Instant::now();
    let mut left = steps.to_vec();
    let mut parts = 2;
    while left.len() > 1 {
        let size = left.len().div_ceil(parts);
        // The failing step is the last one: from the first on, others are the sooner not needed.
        let smaller = (0..left.len()).step_by(size).find_map(|at| {
            let end = (at + size).min(left.len());
            let rest = [&left[..at], &left[end..]].concat();
            (begun.elapsed() < time && fails(&rest)).then_some(rest)
        });
        match smaller {
            Some(rest) => (left, parts) = (rest, (parts - 1).max(2)),
            None if size == 1 || begun.elapsed() >= time => break,
            None => parts = (parts * 2).min(left.len()),
        }
    }
    left
}

#[test]
fn what_is_not_needed_goes() {
    let steps: Vec<u32> = (0..1000).collect();
    let needed = [3, 17, 40, 999];
    let mut tries = 0;
    let fails = |steps: &[u32]| {
        tries += 1;
        needed.iter().all(|step| steps.contains(step))
    };
    assert_eq!(shrink(&steps, Duration::MAX, fails), needed);
    assert!(tries < 200, "{tries}");
    assert_eq!(shrink(&steps, Duration::ZERO, |_| true), steps, "no time");
    assert_eq!(shrink(&steps, Duration::MAX, |steps| !steps.is_empty()).len(), 1);
}
