//! What is made of damaged messages and texts; the parsers' own modules have more of it.

mod corpus;
mod routing;
mod text;

pub(super) use corpus::{answers, golden_acks, golden_table, notifications};
pub(super) use routing::{ADDRESSES, LINKS, ROUTES, RULES, dumps};
