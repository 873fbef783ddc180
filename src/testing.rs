//! For tests of programs that embed the crate: faults, a lab, and the cases to pass in it; exempt
//! from semantic versioning.
//!
//! - [`Faults`] let calls to the kernel fail that a test names. A call is one datagram that a
//!   socket of the datapath sends, or one run of a tool of iptables: a read asks for something, a
//!   write changes something.
//! - [`lab`] builds nodes, pods and a server out of network namespaces.
//! - [`conformance`] runs this project's own cases there, against whatever makes nodes carry out
//!   policies.
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

pub use crate::kernel::faults::{Call, Fault, Faults, Subsystem};
