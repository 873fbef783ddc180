//! A hash for maps of node names.

use std::hash::{BuildHasher, Hasher, RandomState};

/// Starts every hash of one map with the same random number.
#[derive(Clone)]
pub(super) struct NameHash(u64);

impl Default for NameHash {
    fn default() -> Self {
        Self(RandomState::new().build_hasher().finish())
    }
}

impl BuildHasher for NameHash {
    type Hasher = NameHasher;

    fn build_hasher(&self) -> NameHasher {
        NameHasher(self.0)
    }
}

/// Takes eight bytes per multiplication; the standard hash would take half of an allocation.
///
/// Names come from the cluster's own list of nodes, so that nobody chooses them to collide.
pub(super) struct NameHasher(u64);

impl NameHasher {
    #[expect(clippy::cast_possible_truncation, reason = "both halves are used")]
    fn mix(&mut self, word: u64) {
        let product = u128::from(self.0 ^ word) * 0x9e37_79b9_7f4a_7c15;
        self.0 = (product >> 64) as u64 ^ product as u64;
    }
}

impl Hasher for NameHasher {
    fn write(&mut self, mut bytes: &[u8]) {
        while let Some((word, rest)) = bytes.split_first_chunk() {
            self.mix(u64::from_le_bytes(*word));
            bytes = rest;
        }
        self.mix(bytes.iter().fold(1, |word, byte| word << 8 | u64::from(*byte)));
    }

    fn write_u8(&mut self, byte: u8) {
        self.mix(u64::from(byte));
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn numbered_names_spread_over_the_low_and_the_high_bits() {
        for seed in [0, 1, 0x0123_4567_89ab_cdef, u64::MAX, NameHash::default().0] {
            let hash = NameHash(seed);
            let (mut low, mut high) = (vec![0_u32; 1 << 16], vec![0_u32; 1 << 7]);
            for n in 0..1 << 16 {
                let hashed = hash.hash_one(format!("ip-10-0-{}-{}.internal", n >> 8, n & 255));
                low[(hashed & 0xffff) as usize] += 1;
                high[(hashed >> 57) as usize] += 1;
            }
            let longest = low.iter().max().unwrap();
            assert!(*longest <= 16, "{longest} of 65536 names in one place, seed {seed:#x}");
            assert!(high.iter().all(|count| (256..1024).contains(count)), "seed {seed:#x}");
        }
    }

    #[test]
    fn names_that_begin_alike_differ() {
        let hash = NameHash::default();
        let name = "a".repeat(253);
        let hashes: BTreeSet<_> = (0..=253).map(|len| hash.hash_one(&name[..len])).collect();
        assert_eq!(hashes.len(), 254);
    }

    #[test]
    fn every_map_starts_elsewhere() {
        assert_ne!(NameHash::default().0, NameHash::default().0);
    }
}
