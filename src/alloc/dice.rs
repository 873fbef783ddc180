//! Where random numbers come from.

use std::hash::{BuildHasher, Hasher, RandomState};

/// A source of random numbers.
///
/// Any `FnMut(u32) -> u32` is one, so that a test can say what comes next.
pub trait Dice: Send {
    /// A number from 0 to `sides` - 1; `sides` is not 0.
    fn roll(&mut self, sides: u32) -> u32;
}

impl<F: FnMut(u32) -> u32 + Send> Dice for F {
    fn roll(&mut self, sides: u32) -> u32 {
        self(sides)
    }
}

/// Rolls with the keys that the standard library gives to a new hash map.
///
/// They come from the system's random source and differ in every process and in every call; good
/// enough to spread starting points, not for secrets.
pub(super) fn system(sides: u32) -> u32 {
    let random = RandomState::new().build_hasher().finish() >> 32;
    ((random * u64::from(sides)) >> 32) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rolls_reach_every_side_and_no_other() {
        let mut seen = [0_u32; 101];
        for _ in 0..20_000 {
            seen[system(101) as usize] += 1;
        }
        assert!(seen.iter().all(|count| *count > 0), "{seen:?}");
        assert_eq!(system(1), 0);
        assert!(system(u32::MAX) < u32::MAX);
    }
}
