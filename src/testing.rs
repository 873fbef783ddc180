//! Faults between the datapath and the kernel, for tests; exempt from semantic versioning.
//!
//! A call is one datagram that a socket of the datapath sends, or one run of a tool of iptables: a
//! read asks for something, a write changes something. [`Faults`] counts them and lets those fail that a test
//! names.
//!
//! ```no_run
//! use egress_datapath::testing::{Fault, Faults};
//! use egress_datapath::{KernelDatapath, Reconciler};
//!
//! let faults = Faults::new().at_write(2, Fault::LoseReply);
//! let egress = Reconciler::new(KernelDatapath::open_with_faults(&faults)?);
//! // … reconcile, see what becomes of it …
//! assert_eq!(faults.pending(), 0);
//! # Ok::<(), egress_datapath::KernelError>(())
//! ```

pub use crate::kernel::faults::{Call, Fault, Faults, Subsystem};
