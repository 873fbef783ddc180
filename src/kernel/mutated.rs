//! What is made of damaged messages and texts; the parsers' own modules have more of it.

mod corpus;
mod routing;
mod text;

pub(crate) use corpus::{answers, answers_after, golden_acks, golden_table, notifications};
pub(crate) use routing::{ADDRESSES, LINKS, ROUTES, RULES, dumps};

use super::mutate::Random;

#[test]
fn a_seed_damages_alike_and_the_next_one_otherwise() {
    let corpus = golden_table();
    let damaged = |seed| Random::new(seed).damaged_message(&corpus);
    let same = (0..1000).filter(|seed| damaged(*seed) == damaged(seed + 1)).count();
    assert!(same < 10, "{same} of 1000 are like their neighbours");
    assert!((0..1000).all(|seed| damaged(seed) == damaged(seed)));
    let whole = (0..1000).filter(|seed| corpus.contains(&damaged(*seed))).count();
    assert!(whole < 100, "{whole} of 1000 are not damaged");
}
