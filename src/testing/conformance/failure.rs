//! Why a case was not passed.

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::net::IpAddr;

use crate::{KernelError, NameError, NodeName, State};

use super::super::lab::Proto;
use super::BoxError;

/// Why a case was not passed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Failure {
    /// What is tested said so.
    #[error("on {node}, to {doing} failed: {error}")]
    Integration {
        /// On this node.
        node: NodeName,
        /// What it was asked for.
        doing: &'static str,
        /// Its words.
        error: BoxError,
    },
    /// Packets did not do what they should.
    #[error("{}", Lines(.0))]
    Astray(Vec<Astray>),
    /// The server outside saw packets from somebody else than it should.
    #[error("the server saw {seen:?}; expected was {expected:?}")]
    Seen {
        /// All sources of packets.
        seen: BTreeSet<IpAddr>,
        /// Those that there may be, or must be.
        expected: BTreeSet<IpAddr>,
    },
    /// A connection was cut that should go on, or goes on in another way than it should.
    #[error("{what}: {error}")]
    Connection {
        /// Which, and when.
        what: String,
        /// What its socket said.
        error: io::Error,
    },
    /// Something of ours is still there after everything was removed.
    #[error("{node} still holds {state:?}")]
    Remains {
        /// On this node.
        node: NodeName,
        /// What is left.
        state: Box<State>,
    },
    /// The lab itself does not do what the case needs.
    #[error("the lab fails: {0}")]
    Lab(#[from] io::Error),
    /// The kernel could not be read or damaged.
    #[error("the kernel fails: {0}")]
    Kernel(#[from] KernelError),
    /// A name of the case is none.
    #[error(transparent)]
    Name(#[from] NameError),
}

/// A question that was not answered as it should.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Astray {
    /// Who asked: an address of the pod or node.
    pub from: &'static str,
    /// By which protocol.
    pub proto: Proto,
    /// Whom it was sent to.
    pub to: IpAddr,
    /// The source it should have arrived with; `None` if it should not arrive.
    pub expected: Option<IpAddr>,
    /// The source it arrived with; `None` if there was no answer.
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
