//! The lab of the feature `testing`, compiled in so that the tests need no feature, and what only
//! they need.

#![allow(dead_code, unused_imports, reason = "no includer needs all of it")]

pub(crate) mod inside;
#[allow(unreachable_pub, reason = "in the library it is public")]
#[path = "../../src/testing/lab/mod.rs"]
mod kit;
mod numbered;

pub(crate) use kit::*;
pub(crate) use numbered::numbered;
