//! A set of 16-bit numbers that finds its smallest in three steps.

/// The numbers that are free, as one bit each.
///
/// Above the bits are two levels of summaries: a bit there says that the word below is not zero.
/// The fullest and the emptiest set are searched in the same time, and nothing is allocated.
#[derive(Clone)]
pub(super) struct FreeSet {
    bits: Box<[u64; 1024]>,
    words: [u64; 16],
    groups: u64,
}

/// Which word of a level holds this bit, and the bit alone.
const fn place(index: u16) -> (u16, u64) {
    (index >> 6, 1 << (index & 63))
}

/// Index of the lowest bit of the word with this index.
#[expect(clippy::cast_possible_truncation, reason = "a bit's number is below 64")]
const fn lowest(index: u16, word: u64) -> Option<u16> {
    match word {
        0 => None,
        _ => Some(index << 6 | word.trailing_zeros() as u16),
    }
}

impl FreeSet {
    /// The empty set.
    pub(super) fn new() -> Self {
        Self { bits: Box::new([0; 1024]), words: [0; 16], groups: 0 }
    }

    /// Whether the number is in the set.
    pub(super) fn contains(&self, number: u16) -> bool {
        let (word, bit) = place(number);
        let found = self.bits.get(usize::from(word));
        found.is_some_and(|bits| bits & bit != 0)
    }

    /// Adds the number.
    pub(super) fn insert(&mut self, number: u16) {
        let (word, bit) = place(number);
        let (group, word_bit) = place(word);
        let (_, group_bit) = place(group);
        if let Some(bits) = self.bits.get_mut(usize::from(word)) {
            *bits |= bit;
        }
        if let Some(words) = self.words.get_mut(usize::from(group)) {
            *words |= word_bit;
        }
        self.groups |= group_bit;
    }

    /// Takes the number out.
    pub(super) fn remove(&mut self, number: u16) {
        let (word, bit) = place(number);
        let (group, word_bit) = place(word);
        let (_, group_bit) = place(group);
        if clear(self.bits.get_mut(usize::from(word)), bit)
            && clear(self.words.get_mut(usize::from(group)), word_bit)
        {
            self.groups &= !group_bit;
        }
    }

    /// The smallest number in the set.
    pub(super) fn first(&self) -> Option<u16> {
        let group = lowest(0, self.groups)?;
        let word = lowest(group, *self.words.get(usize::from(group))?)?;
        lowest(word, *self.bits.get(usize::from(word))?)
    }

    /// Takes the smallest number out.
    pub(super) fn pop_first(&mut self) -> Option<u16> {
        let number = self.first()?;
        self.remove(number);
        Some(number)
    }
}

/// Clears a bit of a word and says whether the word is zero now.
fn clear(word: Option<&mut u64>, bit: u64) -> bool {
    word.is_some_and(|word| {
        *word &= !bit;
        *word == 0
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn every_number_is_found_alone() {
        let mut set = FreeSet::new();
        assert_eq!(set.first(), None);
        for number in 0..=u16::MAX {
            set.insert(number);
            assert!(set.contains(number));
            assert_eq!(set.first(), Some(number));
            assert_eq!(set.pop_first(), Some(number));
            assert!(!set.contains(number));
            assert_eq!(set.first(), None);
        }
    }

    #[test]
    fn a_full_set_is_emptied_in_ascending_order() {
        let mut set = FreeSet::new();
        (0..=u16::MAX).rev().for_each(|number| set.insert(number));
        for number in 0..=u16::MAX {
            assert_eq!(set.pop_first(), Some(number));
        }
        assert_eq!(set.pop_first(), None);
    }

    proptest! {
        #[test]
        fn behaves_like_a_sorted_set(
            steps in prop::collection::vec((0..3_u8, prop_oneof![0..200_u16, any::<u16>()]), 0..400),
        ) {
            let (mut set, mut model) = (FreeSet::new(), BTreeSet::new());
            for (step, number) in steps {
                match step {
                    0 => {
                        set.insert(number);
                        model.insert(number);
                    }
                    1 => {
                        set.remove(number);
                        model.remove(&number);
                    }
                    _ => prop_assert_eq!(set.pop_first(), model.pop_first()),
                }
                prop_assert_eq!(set.contains(number), model.contains(&number));
                prop_assert_eq!(set.first(), model.first().copied());
            }
        }
    }
}
