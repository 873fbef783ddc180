//! Allocates the tags that identify policies and classes in the kernel's maps.

use std::collections::BTreeSet;

use crate::state::Tag;
use crate::types::{PolicyId, fnv1a};

/// A tag allocator by hash: equal input gives equal tags after a restart without stored state.
#[derive(Debug, Default)]
pub(super) struct Numbers {
    taken: BTreeSet<Tag>,
    /// Tags with a hash collision: their assignment depends on all ids that hash to them.
    disputed: BTreeSet<Tag>,
}

impl Numbers {
    /// Assigns a tag to every item by its policy ids, and by nothing else.
    pub(super) fn of_all<'a, N, I>(all: &mut [(N, &mut Tag)], ids: impl Fn(&N) -> I) -> Self
    where
        I: Iterator<Item = &'a PolicyId>,
    {
        let mut numbers = Self::default();
        let undisputed = all.iter_mut().all(|(named, tag)| {
            let own = numbers.take_alone(ids(named));
            **tag = own.unwrap_or(**tag);
            own.is_some()
        });
        if !undisputed {
            // On a hash collision the order of the ids decides which item gets the tag.
            numbers = Self::default();
            all.sort_by_cached_key(|(named, _)| ids(named).collect::<Vec<_>>());
            for (named, tag) in all {
                **tag = numbers.take(ids(named));
            }
        }
        numbers
    }

    /// Allocates a tag for these ids; items must come in the order of their ids to get stable tags.
    fn take<'a>(&mut self, ids: impl IntoIterator<Item = &'a PolicyId>) -> Tag {
        let mut text = text(ids);
        loop {
            let tag = first(&mut text);
            if self.taken.insert(tag) {
                return tag;
            }
            self.disputed.insert(tag);
            text.push(1);
        }
    }

    /// Allocates a tag for ids in any order; `None` on a hash collision.
    pub(super) fn take_alone<'a>(
        &mut self,
        ids: impl IntoIterator<Item = &'a PolicyId>,
    ) -> Option<Tag> {
        let tag = first(&mut text(ids));
        self.taken.insert(tag).then_some(tag)
    }

    /// Frees a tag, and returns whether the other tags are still valid (no collision involved it).
    pub(super) fn give_back(&mut self, tag: Tag) -> bool {
        self.taken.remove(&tag);
        !self.disputed.contains(&tag)
    }
}

fn text<'a>(ids: impl IntoIterator<Item = &'a PolicyId>) -> Vec<u8> {
    let mut text = Vec::with_capacity(64);
    for id in ids {
        text.extend_from_slice(id.as_str().as_bytes());
        text.push(0);
    }
    text
}

/// Returns the first valid tag of a text, which is extended until its hash gives one.
fn first(text: &mut Vec<u8>) -> Tag {
    loop {
        if let Some(tag) = hashed(fnv1a(text)) {
            return tag;
        }
        text.push(1);
    }
}

/// Converts a hash to a tag; high halves below 16 are reserved for policy actions.
fn hashed(hash: u64) -> Option<Tag> {
    let folded = u32::try_from((hash >> 32) ^ (hash & 0xffff_ffff)).ok()?;
    #[cfg(test)]
    let folded = tests::narrowed(folded);
    Tag::new(folded).filter(|tag| tag.get() >> 16 >= 16)
}

#[cfg(test)]
pub(crate) mod tests {
    use std::cell::Cell;

    use super::*;

    thread_local! {
        static NARROW: Cell<bool> = const { Cell::new(false) };
    }

    /// Runs `work` with so few possible tags that most of them collide.
    pub(crate) fn with_few<T>(work: impl FnOnce() -> T) -> T {
        NARROW.set(true);
        let done = work();
        NARROW.set(false);
        done
    }

    pub(super) fn narrowed(folded: u32) -> u32 {
        // The low half stays wide enough for every item to get a tag in the end.
        if NARROW.get() { 0x0010_0000 | folded & 0x3f } else { folded }
    }

    #[test]
    fn who_has_a_tag_that_others_wanted_is_told() {
        let ids: Vec<_> = (0..40).map(|n| PolicyId::new(format!("p{n}")).unwrap()).collect();
        let mut numbers = Numbers::default();
        let tags: Vec<_> = with_few(|| ids.iter().map(|id| numbers.take([id])).collect());
        assert_eq!(tags.iter().collect::<BTreeSet<_>>().len(), 40);
        assert!(!numbers.disputed.is_empty());
        let disputed = *numbers.disputed.first().unwrap();
        assert!(!numbers.give_back(disputed));
        let holder = &ids[tags.iter().position(|tag| *tag != disputed).unwrap()];
        assert_eq!(with_few(|| numbers.take_alone([holder])), None);
    }
}
