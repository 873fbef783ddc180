//! What several of the crate's tests and benches share, and no user of the crate needs; what a user
//! needs is in `egress_datapath::testing`.

pub mod backend;
pub mod fleet;
pub mod lookalikes;
mod numbered;
pub mod stream;
pub mod world;

use egress_datapath::testing::lab::Netns;

pub use numbered::{numbered, suited};

/// Runs a test in a network namespace of its own, which the processes that it starts share.
pub fn in_netns<T: Send>(test: impl FnOnce() -> T + Send) -> T {
    let netns = harness::given("network namespace", Netns::new());
    harness::given("way into a network namespace", netns.run(test))
}
