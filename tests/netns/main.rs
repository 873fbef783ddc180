//! The datapath in the kernel, in network namespaces: real packets, real tools.

#[path = "../lab/mod.rs"]
mod lab;

mod answers;
mod closed;
mod connections;
mod decoys;
#[cfg(feature = "testing")]
mod faults;
mod fleet;
mod flows;
#[cfg(feature = "testing")]
mod foreign;
mod lookalikes;
mod odd_flows;
mod overwritten;
mod ownership;
mod packets;
mod process;
mod refusals;
mod restart;
mod roundtrip;
mod xtables;
