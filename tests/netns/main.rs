//! The datapath in the kernel, in network namespaces: real packets, real tools.

#[path = "../lab/mod.rs"]
mod lab;

mod decoys;
mod fleet;
mod packets;
mod roundtrip;
