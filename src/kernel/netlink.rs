//! Netlink sockets and messages.

pub(crate) mod bpf;
#[cfg(feature = "testing")]
pub(crate) mod fault_injector;
pub(crate) mod message;
pub(crate) mod socket;
