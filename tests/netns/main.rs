//! The datapath in the kernel, in network namespaces: real packets, real tools.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test says what it expects"
)]

#[macro_use]
extern crate harness;

mod abuse;
mod answers;
mod claims;
mod closed;
mod conforms;
mod connections;
mod counts;
mod decoys;
mod doctor;
mod explained;
mod flows;
mod flowtables;
mod hook;
mod hosts;
mod odd_flows;
mod overwritten;
mod ownership;
mod packets;
mod path_mtu;
mod process;
mod refusals;
mod replies;
mod restart;
mod roundtrip;
mod saved;
mod stand_ins;
mod underlay;
mod way_back;
mod xtables;

use std::process::ExitCode;

use egress_datapath::testing::lab;

/// In a network namespace of its own where there can be one; a process that a test has started
/// stays in the one of its node.
fn main() -> ExitCode {
    harness::main(|| {
        if process::part().is_none() {
            drop(lab::isolate());
        }
    })
}
