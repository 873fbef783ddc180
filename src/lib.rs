//! Stable egress IPs for pods: selected pods that talk to selected destinations leave through a
//! chosen gateway node, wearing a chosen address.
//!
//! The crate is a library for CNI plugins and operators. It plans what a node's kernel should hold,
//! reads what it does hold, and makes the difference, over netlink and without any external binary;
//! the backend for nodes that must stay with iptables ([`IptablesDatapath`]) runs its tools.
//! It does not watch an API server, choose gateways, announce addresses or run threads.
//!
//! ```text
//!  policies, cluster        Reconciler::reconcile
//!        │
//!        ▼            observe            compare               apply
//!      plan ──► State ◄────── Datapath ──────────► Changes ──────────► Datapath
//!     (pure)  (wanted)       (kernel, Sim)         (steps in a safe order)
//! ```
//!
//! - [`Policy`] says which traffic leaves where; [`EgressPolicy`] is the plain value.
//! - [`MarkAllocator`] and [`TableAllocator`] number the gateways; [`MarkPool`] and [`TablePool`]
//!   are ready-made.
//! - [`plan`] makes a [`State`] of it; pure, and the same for the same input.
//! - [`Changes`] are the difference of two states, in an order that is safe at every point; they
//!   print as the commands an operator would type.
//! - [`Datapath`] holds a state: the kernel ([`KernelDatapath`], [`IptablesDatapath`]) or a stand-in
//!   ([`Sim`]).
//! - [`Reconciler`] does all of this in one call.
//! - [`explain()`] says where a packet goes and which objects decided it; [`SimCluster`] carries
//!   packets between simulated nodes.
//! - [`SharedSim`] is a simulated kernel that others write to, too, and that [`faults`] can be
//!   planned for.
//! - [`Reconciler::counts`] says how much each policy has taken, with [`Cluster::policy_counters`].
//! - [`preflight`] looks beforehand at what on the host may be in the way.
//! - [`Watch`] is readable when somebody else touched what is ours, and [`Reconciler::repair`] puts
//!   it right.
//!
//! # Example
//!
//! On a node that is not the gateway; with [`Sim`] it runs anywhere, with `Reconciler::open` it
//! programs the kernel.
//!
//! ```
//! use egress_datapath::{Cluster, EgressIp, EgressPolicy, Node, NodeName, PolicyId};
//! use egress_datapath::{Reconciler, Sim};
//!
//! let cluster = Cluster::new(
//!     NodeName::new("node-a")?,
//!     vec![
//!         Node::new(
//!             NodeName::new("node-a")?,
//!             vec!["10.10.0.11".parse()?],
//!             vec!["172.31.0.11/16".parse()?],
//!         ),
//!         Node::new(
//!             NodeName::new("node-b")?,
//!             vec!["10.10.0.12".parse()?],
//!             vec!["172.31.0.12/16".parse()?],
//!         ),
//!     ],
//!     vec!["10.244.0.0/16".parse()?],
//! );
//! let policy = EgressPolicy {
//!     gateway: Some(NodeName::new("node-b")?),
//!     ..EgressPolicy::new(
//!         PolicyId::new("shop/checkout")?,
//!         vec!["10.244.1.10/32".parse()?],
//!         EgressIp::V4("198.51.100.200".parse()?),
//!     )
//! };
//!
//! let mut egress = Reconciler::new(Sim::new());
//! let report = egress.reconcile(&cluster, [&policy])?;
//! assert!(report.changes.to_string().contains("ip rule add pref 102 fwmark 0x26000000"));
//!
//! let again = egress.reconcile(&cluster, [&policy])?;
//! assert!(again.changes.is_empty());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Features
//!
//! - `kernel` (default): [`KernelDatapath`] and [`preflight`], on Linux.
//! - `ipset-sys`: sets through libipset, in a process of their own; module `libipset` says what that
//!   needs.
//! - `serde`: `Serialize` and `Deserialize` for the value types.
//! - `mock`: mocks of the four traits; exempt from semantic versioning.
//! - `testing`: faults between the datapath and the kernel, a lab of network namespaces, and the
//!   cases that an integration must pass there; exempt from semantic versioning.
//!
//! # Permissions
//!
//! Programming a kernel needs `CAP_NET_ADMIN` in the user namespace that owns the network
//! namespace. The minimum Rust version is 1.85.

#[cfg(test)]
#[macro_use]
extern crate harness;

mod alloc;
mod cluster;
mod connection;
mod count;
mod datapath;
mod diff;
mod error;
mod event;
pub mod faults;
#[cfg(all(feature = "kernel", target_os = "linux"))]
mod iptables;
#[cfg(all(feature = "kernel", target_os = "linux"))]
mod kernel;
mod mark;
mod plan;
mod policy;
#[cfg(all(feature = "kernel", target_os = "linux"))]
pub mod preflight;
mod range;
mod reconcile;
mod rules;
#[cfg(feature = "serde")]
mod serde_forms;
mod sim;
pub mod state;
#[cfg(all(feature = "testing", target_os = "linux"))]
pub mod testing;
mod types;

pub use alloc::{
    AllocError, MarkAllocator, MarkPool, TableAllocator, TablePool, TableRange, TableRangeError,
    TablesInUse,
};
#[cfg(feature = "mock")]
pub use alloc::{MockMarkAllocator, MockTableAllocator};
pub use cluster::{Backend, Cluster, Iptables, Node, Steering, Tunnel};
pub use connection::Connection;
pub use count::{Count, Counts, PolicyCount};
#[cfg(feature = "mock")]
pub use datapath::MockDatapath;
pub use datapath::{Datapath, Drift};
pub use diff::changes::{ApplyError, Changes, Phase, Step};
pub use diff::op::Op;
pub use error::KernelError;
pub use event::{News, Part, Process};
#[cfg(all(feature = "ipset-sys", target_os = "linux"))]
pub use iptables::libipset;
#[cfg(all(feature = "kernel", target_os = "linux"))]
pub use iptables::{IptablesDatapath, Predecessor};
#[cfg(all(feature = "kernel", target_os = "linux"))]
pub use kernel::{KernelDatapath, KernelTables, Ownership, Protection, Watch};
pub use mark::{LayoutError, MarkLayout};
pub use plan::{Closed, Finding, Plan, PlanError, PolicyError, Update, plan};
#[cfg(feature = "mock")]
pub use policy::MockPolicy;
pub use policy::{Destinations, EgressIp, EgressPolicy, Policy, Unavailable};
pub use range::IpRange;
pub use reconcile::{Error, Reconciler, Report};
pub use sim::explain::{explain, explain_received};
pub use sim::packet::{Frame, Packet};
pub use sim::path::Surroundings;
pub use sim::trace::{Decision, Fate, Reason, Trace};
pub use sim::{Journey, Outcome, SharedSim, Sim, SimCluster, SimDatapath, SimNode, SimWatch};
pub use state::State;
pub use types::{
    DeviceName, Family, MacAddr, Mark, NameError, NodeName, ParseMacError, PolicyId, TableId,
};

/// The README's example, compiled.
#[cfg(all(doctest, feature = "kernel", target_os = "linux"))]
#[doc = include_str!("../README.md")]
struct Readme;

/// The unit tests, in a network namespace of their own where there can be one.
#[cfg(test)]
fn main() -> std::process::ExitCode {
    harness::main(|| {
        #[cfg(target_os = "linux")]
        let _refused = testing::lab::isolate();
    })
}
