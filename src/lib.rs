//! Stable egress IPs for pods.

mod alloc;
mod changes;
mod cluster;
mod datapath;
mod diff;
mod error;
#[cfg(all(feature = "kernel", target_os = "linux"))]
mod kernel;
mod mark;
mod op;
mod plan;
mod policy;
mod range;
mod reconciler;
#[cfg(feature = "serde")]
mod serde_impls;
mod sim;
pub mod state;
mod types;

pub use alloc::{
    AllocError, Dice, MarkAllocator, MarkPool, TableAllocator, TablePool, TableRange,
    TableRangeError, TablesInUse,
};
#[cfg(feature = "mock")]
pub use alloc::{MockMarkAllocator, MockTableAllocator};
pub use changes::{Changes, Phase, Step};
pub use cluster::{Cluster, Node, Tunnel};
pub use datapath::Datapath;
#[cfg(feature = "mock")]
pub use datapath::MockDatapath;
pub use error::{ApplyError, KernelError};
#[cfg(all(feature = "kernel", target_os = "linux"))]
pub use kernel::{KernelDatapath, KernelTables};
pub use mark::{LayoutError, MarkLayout};
pub use op::Op;
pub use plan::{Closed, Finding, Plan, PlanError, PolicyError, plan};
#[cfg(feature = "mock")]
pub use policy::MockPolicy;
pub use policy::{Destinations, EgressIp, EgressPolicy, Policy};
pub use range::IpRange;
pub use reconciler::{Error, Reconciler, Report};
pub use sim::Sim;
pub use state::State;
pub use types::{
    DeviceName, Family, MacAddr, Mark, NameError, NodeName, ParseMacError, PolicyId, TableId,
};
