//! iptables backend: its options, iptables tools, ipset, and the takeover of another program's
//! rules.

#[cfg(all(feature = "kernel", target_os = "linux"))]
pub(crate) mod datapath;
#[cfg(all(feature = "kernel", target_os = "linux"))]
pub(crate) mod ipset;
#[cfg(all(feature = "ipset-sys", target_os = "linux"))]
pub mod libipset;
#[cfg(all(feature = "kernel", target_os = "linux"))]
pub(crate) mod parse;
#[cfg(all(feature = "kernel", target_os = "linux"))]
pub(crate) mod saved;
#[cfg(all(feature = "kernel", target_os = "linux"))]
pub(crate) mod script;
#[cfg(all(feature = "kernel", target_os = "linux"))]
pub(crate) mod takeover;
#[cfg(all(feature = "kernel", target_os = "linux"))]
pub(crate) mod tool;

pub use crate::cluster::Iptables;
pub use crate::rules::iptables::Variant;
#[cfg(all(feature = "kernel", target_os = "linux"))]
pub use datapath::IptablesDatapath;
#[cfg(all(feature = "kernel", target_os = "linux"))]
pub use takeover::Predecessor;
