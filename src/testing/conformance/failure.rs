//! The failure of a conformance case.

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::net::IpAddr;

use crate::error::NameError;
use crate::{KernelError, NodeName, State};

use super::super::lab::Proto;
use super::BoxError;

/// The reason why a conformance case failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Failure {
    /// The program under test returned an error.
    #[error("on {node}, to {doing} failed: {error}")]
    Integration {
        /// The node.
        node: NodeName,
        /// The requested action: start, apply or remove.
        doing: &'static str,
        /// The error of the program under test.
        error: BoxError,
    },
    /// Probes arrived with a wrong source, did not arrive, or should not have arrived.
    #[error("{}", Lines(.0))]
    Astray(Vec<Astray>),
    /// The server outside received packets from other sources than expected.
    #[error("the server saw {seen:?}; expected was {expected:?}")]
    Seen {
        /// All sources that the server saw.
        seen: BTreeSet<IpAddr>,
        /// The allowed or required sources.
        expected: BTreeSet<IpAddr>,
    },
    /// A connection was ended that should continue, or continues with a wrong source.
    #[error("{what}: {error}")]
    Connection {
        /// The connection, and the moment in the case.
        what: String,
        /// The error of its socket.
        error: io::Error,
    },
    /// Objects of this crate remain in the kernel after everything was removed.
    #[error("{node} still holds {state:?}")]
    Remains {
        /// The node.
        node: NodeName,
        /// The remaining objects.
        state: Box<State>,
    },
    /// The lab itself failed.
    #[error("the lab fails: {0}")]
    Lab(#[from] io::Error),
    /// The kernel state could not be read, or could not be damaged for the case.
    #[error("the kernel fails: {0}")]
    Kernel(#[from] KernelError),
    /// A name in the case is invalid.
    #[error(transparent)]
    Name(#[from] NameError),
}

/// A probe that did not have the expected result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Astray {
    /// The sender: the name of a pod, a node or the server.
    pub from: &'static str,
    /// The transport protocol.
    pub proto: Proto,
    /// The destination.
    pub to: IpAddr,
    /// The expected source; `None` if the probe should not arrive.
    pub expected: Option<IpAddr>,
    /// The source that the server saw; `None` if there was no reply.
    pub seen: Option<IpAddr>,
}

impl fmt::Display for Astray {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { from, proto, to, expected, seen } = self;
        write!(f, "{proto} from {from} to {to} ")?;
        match seen {
            Some(seen) => write!(f, "arrived as {seen}, ")?,
            None => f.write_str("was not answered, ")?,
        }
        match expected {
            Some(expected) => write!(f, "expected was {expected}"),
            None => f.write_str("expected was nothing"),
        }
    }
}

struct Lines<'a>(&'a [Astray]);

impl fmt::Display for Lines<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, astray) in self.0.iter().enumerate() {
            write!(f, "{}{astray}", if number > 0 { "; " } else { "" })?;
        }
        Ok(())
    }
}
