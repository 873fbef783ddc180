//! Test support for programs that embed the crate: fault injection, a lab and conformance cases.
//!
//! The module is exempt from semantic versioning.
//!
//! - [`Faults`] makes calls to the kernel fail that a test selects. The
//!   [fault plans](crate::faults) are the same as for a simulated datapath.
//! - [`lab`] builds nodes, pods and a server from network namespaces.
//! - [`conformance`] runs this project's own test cases in a lab, against any program that applies
//!   policies to nodes.
//!
//! ```no_run
//! use egress_datapath::testing::{Fault, Faults};
//! use egress_datapath::{KernelDatapath, Reconciler};
//!
//! let faults = Faults::new().at_write(2, Fault::LoseReply);
//! let egress = Reconciler::new(KernelDatapath::open()?.with_faults(&faults));
//! // … reconcile, see what becomes of it …
//! assert_eq!(faults.pending(), 0);
//! # Ok::<(), egress_datapath::KernelError>(())
//! ```

pub mod conformance;
pub mod lab;

pub use crate::faults::{Call, Fault, Faults, Subsystem};
