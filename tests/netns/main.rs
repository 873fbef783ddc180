//! The datapath in the kernel, in network namespaces: real packets, real tools.

mod fleet;
#[path = "../lab/mod.rs"]
mod lab;
mod packets;
