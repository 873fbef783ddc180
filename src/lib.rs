//! Stable egress IPs for Kubernetes pods: nf_tables, VXLAN and policy routing over netlink.
//!
//! Traffic of selected pods to selected destinations leaves the cluster through a gateway node you
//! choose, with a source IP address you choose. The crate is a library for the node agent of a CNI
//! plugin or of an operator: one process on each node. It plans the kernel state of the node, reads
//! the present state, and applies the difference over netlink, without any external binary. Nodes
//! that must stay with iptables use the backend [`IptablesDatapath`](iptables::IptablesDatapath),
//! which runs the iptables tools. The crate does not watch an API server, choose gateways, announce
//! addresses or run threads.
//!
//! The [guide](mod@guide) has the architecture, the path of a packet, and these chapters:
//!
//! - [`embedding`](guide::embedding): three steps in an empty project, address families, iptables,
//!   own implementations of the traits, tests without root.
//! - [`operation`](guide::operation): the loop of a node agent, the cost of each call, ownership,
//!   two instances, errors.
//! - [`marks`](guide::marks): marks, tables and rule priorities beside Calico, Cilium and others.
//! - [`gateways`](guide::gateways): a gateway dies, drains or moves.
//! - [`upgrades`](guide::upgrades): restart, reboot, upgrade, change of a setting, nodes that come
//!   and go, removal.
//! - [`troubleshooting`](guide::troubleshooting): symptom, cause, command.
//! - [`errors`](guide::errors): errors, findings and preflight problems: all codes, each with the
//!   next step.
//! - [`monitoring`](guide::monitoring): reports, events, counters, preflight problems, names of
//!   spans.
//! - [`json`](guide::json): JSON of input and output, with the schema.
//! - [`limits`](guide::limits): sizes, cost of a packet, results of the tests, kernel versions,
//!   known limits.
//!
//! SECURITY.md, beside the sources, has the threat model: actions of a pod, a neighbour, a peer and
//! a process that the crate prevents, and those that it does not.
//!
//! ```text
//!  policies, cluster        Reconciler::reconcile
//!        │
//!        ▼            observe            compare               apply
//!      plan ──► State ◄────── Datapath ──────────► Changes ──────────► Datapath
//!     (pure)  (wanted)       (kernel, Sim)         (steps in a safe order)
//! ```
//!
//! - [`Policy`]: the trait of an egress policy, which selects traffic and names its gateway and its
//!   egress IP. [`EgressPolicy`] is the plain value.
//! - [`MarkAllocator`] and [`TableAllocator`]: firewall marks and routing tables of the gateways.
//!   [`MarkPool`](alloc::MarkPool) and [`TablePool`](alloc::TablePool) are the implementations.
//! - [`plan`]: computes the wanted [`State`] of a node; pure and deterministic.
//! - [`Changes`]: the difference of two states, as operations in an order that is safe at every
//!   point. `Display` prints the commands that an operator would type.
//! - [`Datapath`]: the trait that reads and applies a state, of a kernel ([`KernelDatapath`],
//!   [`IptablesDatapath`](iptables::IptablesDatapath)) or of a simulator ([`Sim`]).
//! - [`Reconciler`]: plans, observes, compares and applies in one call.
//! - [`explain()`]: traces a packet through a state, with the objects that decided its fate.
//!   [`SimCluster`](sim::SimCluster) forwards packets between simulated nodes.
//! - [`SharedSim`](sim::SharedSim): a simulated kernel for several writers, with fault injection
//!   ([`faults`]).
//! - [`Reconciler::counters`]: packet and byte counters of each policy, enabled by
//!   [`Cluster::policy_counters`].
//! - [`preflight`]: checks the host for settings and software that conflict with the datapath.
//! - [`Watch`]: a file descriptor that is readable when another program has changed objects of this
//!   crate. [`Reconciler::repair`] restores them.
//!
//! # Example
//!
//! The state of a node that is not the gateway. With [`Sim`] the example runs anywhere; with
//! `Reconciler::open` the same calls program the kernel.
//!
//! ```
//! use egress_datapath::{Cluster, EgressIp, EgressPolicy, Node, NodeName, PolicyId, Reconciler};
//! use egress_datapath::Sim;
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
//! let policy = EgressPolicy::new(
//!     PolicyId::new("shop/checkout")?,
//!     vec!["10.244.1.10/32".parse()?],
//!     EgressIp::V4("198.51.100.200".parse()?),
//! )
//! .with_gateway(NodeName::new("node-b")?);
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
//! - `ipset-sys`: writes ipsets through libipset, in a helper process; module `libipset` documents
//!   its requirements.
//! - `serde`: `Serialize` and `Deserialize` for the value types; `Serialize` for reports, errors,
//!   findings, events and problems, each with a short code that never changes.
//! - `tracing`: spans of the calls and their reads and writes; events for refused operations,
//!   repairs and findings.
//! - `mock`: mocks of the four traits; exempt from semantic versioning.
//! - `testing`: fault injection between the datapath and the kernel, a lab of network namespaces,
//!   and the conformance cases of an integration; exempt from semantic versioning.
//! - `unstable-state`: the contents of [`State`] and of the operations, for a datapath that carries
//!   out operations itself; exempt from semantic versioning.
//!
//! # Requirements
//!
//! - Privilege: `CAP_NET_ADMIN` in the user namespace that owns the network namespace. The planner
//!   and the simulator need none.
//! - Kernel: Linux 6.1, 6.12 and 6.18 are tested. [`limits`](guide::limits#kernel-versions) has the
//!   features that depend on the version, and [`preflight`] reports missing ones.
//! - Rust: 1.85 or newer.
//!
//! # Source layout
//!
//! | contents | modules in `src` |
//! |---|---|
//! | values: names, addresses, marks, address ranges | `types`, `mark`, `range` |
//! | connections, counters, events, planned faults | `connection`, `count`, `event`, `faults` |
//! | input of the caller: cluster, policies, allocators | `cluster`, `policy`, `alloc` |
//! | rules of the nf_tables table, and its elements | `rules` |
//! | state of a node | `state` |
//! | planned state of a node | `plan` |
//! | difference of two states, as ordered operations | `diff` |
//! | summary of a state | `summary` |
//! | trait that applies operations, and its errors | `datapath`, `error` |
//! | plan, observe, compare and apply in one call | `reconcile` |
//! | simulated kernel, and `explain` | `sim` |
//! | netlink messages and sockets | `kernel/netlink` |
//! | links, addresses, neighbours, routes, routing rules | `kernel/rtnetlink` |
//! | nf_tables | `kernel/nft` |
//! | conntrack | `kernel/conntrack` |
//! | notifications about changes by other programs | `kernel/monitor` |
//! | iptables backend and its sets | `iptables` |
//! | checks of a node before the first packet | `preflight` |
//! | fault injection, lab and conformance cases for an embedder's tests | `testing` |
//! | guided tour, documentation only | `guide` |

#![cfg_attr(docsrs, feature(doc_cfg))]
#![cfg_attr(
    not(feature = "unstable-state"),
    allow(
        dead_code,
        unreachable_pub,
        unused_imports,
        reason = "the module `state` is public with that feature alone"
    )
)]

#[cfg(test)]
#[macro_use]
extern crate harness;

pub mod alloc;
mod cluster;
mod connection;
mod count;
pub mod datapath;
mod diff;
pub mod error;
pub mod event;
pub mod faults;
pub mod guide;
pub mod iptables;
#[cfg(all(feature = "kernel", target_os = "linux"))]
mod kernel;
pub mod mark;
mod plan;
mod policy;
#[cfg(all(feature = "kernel", target_os = "linux"))]
pub mod preflight;
mod range;
mod reconcile;
mod rules;
#[cfg(feature = "serde")]
mod serde_forms;
pub mod sim;
#[cfg(feature = "unstable-state")]
pub mod state;
#[cfg(not(feature = "unstable-state"))]
mod state;
pub mod summary;
#[cfg(all(feature = "testing", target_os = "linux"))]
pub mod testing;
mod types;

/// Trace of a packet through the state of a node: the objects that decided its fate.
pub mod explain {
    pub use crate::rules::element::{Comment, Tag};
    pub use crate::sim::explain::{explain, explain_received};
    pub use crate::sim::packet::{Frame, Packet};
    pub use crate::sim::path::HostContext;
    pub use crate::sim::trace::{Decision, Fate, Reason, Trace};
}

/// Mocks of the four traits, by mockall; exempt from semantic versioning.
#[cfg(feature = "mock")]
pub mod mock {
    pub use crate::alloc::{MockMarkAllocator, MockTableAllocator};
    pub use crate::datapath::MockDatapath;
    pub use crate::policy::MockPolicy;
}

pub use ipnet;

pub use alloc::{MarkAllocator, TableAllocator};
pub use cluster::{Backend, Claim, Cluster, Node, Replies, Steering, Tunnel};
pub use count::{Count, PolicyCount};
pub use datapath::Datapath;
pub use diff::changes::{ApplyError, Changes};
pub use error::KernelError;
pub use event::ChangeEvents;
pub use explain::explain;
#[cfg(all(feature = "kernel", target_os = "linux"))]
pub use kernel::{KernelDatapath, KernelTables, Ownership, Protection, Watch};
pub use mark::MarkLayout;
pub use plan::{
    DenyReason, Finding, NodeError, Plan, PlanError, PolicyError, Update, check_policy, plan,
};
pub use policy::{Destinations, EgressIp, EgressPolicy, Policy, Unavailable};
pub use reconcile::{Durations, Error, Reconciler, Report};
pub use rules::stmt::MarkBits;
pub use sim::Sim;
pub use state::State;
pub use types::{DeviceName, Family, MacAddr, Mark, NodeName, PolicyId, TableId};

/// The README's examples, compiled as doctests.
#[cfg(all(doctest, feature = "kernel", target_os = "linux"))]
#[doc = include_str!("../README.md")]
struct Readme;

/// Runs the unit tests, in a new network namespace where the system allows one.
#[cfg(test)]
fn main() -> std::process::ExitCode {
    harness::main(|| {
        #[cfg(target_os = "linux")]
        let _refused = testing::lab::isolate();
    })
}
