//! iptables backend: iptables tools, ipset, and the takeover of another program's rules.

pub(crate) mod datapath;
pub(crate) mod ipset;
#[cfg(feature = "ipset-sys")]
pub mod libipset;
pub(crate) mod parse;
pub(crate) mod saved;
pub(crate) mod script;
pub(crate) mod takeover;
pub(crate) mod tool;

pub use datapath::IptablesDatapath;
pub use takeover::Predecessor;
