//! Netlink sockets and messages.

pub(crate) mod bpf;
pub(crate) mod exchange;
#[cfg(feature = "testing")]
pub(crate) mod fault_injector;
pub(crate) mod message;
pub(crate) mod nfnetlink;
pub(crate) mod socket;
