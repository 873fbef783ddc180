//! What became of a packet, and which objects decided it.

use std::fmt;
use std::net::IpAddr;

use super::packet::{Frame, Packet};
use crate::state::{Comment, MarkBits, Tag};
use crate::types::{MacAddr, Mark, NodeName, TableId};

/// What became of a packet, reason by reason.
///
/// `Display` writes a line per reason for people; with the feature `serde` it serializes as one
/// document whose field names are stable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trace {
    /// The packet, as it was sent.
    pub packet: Packet,
    /// What was decided, in order.
    pub reasons: Vec<Reason>,
    /// How it ended.
    pub fate: Fate,
}

/// One object's say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reason {
    /// The node; `None` where only one was asked.
    pub node: Option<NodeName>,
    /// The object that decided, as the kernel's tools print it.
    pub object: String,
    /// What it decided.
    pub decision: Decision,
}

/// What an object decides about a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Decision {
    /// The source is in this class.
    Class(Tag),
    /// This policy takes the packet; its id as the comment has it, `None` if nothing names it.
    Policy(Tag, Option<Comment>),
    /// This policy of the class takes the destination, too, and comes later.
    Overlapped(Tag, Option<Comment>),
    /// It goes to this gateway, named by the comment.
    Gateway(Option<Comment>),
    /// It is translated on this node.
    Here,
    /// It is left alone.
    LeftAlone,
    /// Its mark is now this.
    Mark(Mark),
    /// Its connection's mark has these bits now.
    ConnectionMark(MarkBits),
    /// This table routes it.
    Table(TableId),
    /// The table ends the lookup; the next rule decides.
    Throw,
    /// It is sent to this neighbour on the tunnel device.
    Via(IpAddr),
    /// The neighbour has this Ethernet address.
    Ethernet(MacAddr),
    /// Frames for the address go to this node.
    Tunnel(IpAddr),
    /// It came out of the tunnel.
    Received,
    /// Its source becomes this address; `None` is the node's own.
    Wears(Option<IpAddr>),
    /// Its source stays, and nobody else may change it.
    Bound,
    /// It is an earlier packet's connection, which keeps its translation.
    Connection,
    /// It is dropped.
    Dropped,
    /// It cannot be said: the rule has a statement that is not ours, or is in iptables.
    Unknown,
}

/// How the way of a packet ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It is dropped.
    Dropped,
    /// It is sent to another node; [`explain_received`](crate::explain_received) goes on there.
    Tunnelled(Frame),
    /// It goes where the host's own routes lead it, with this source; `None` is the node's own
    /// address, on the device it leaves by.
    Routed(Option<IpAddr>),
    /// It is delivered to this host.
    Delivered,
}

impl Trace {
    fn find<'a, T>(&'a self, what: impl FnMut(&'a Reason) -> Option<T>) -> Option<T> {
        self.reasons.iter().find_map(what)
    }

    /// The class of its source, where it is selected.
    pub fn class(&self) -> Option<Tag> {
        self.find(|reason| match reason.decision {
            Decision::Class(class) => Some(class),
            _ => None,
        })
    }

    /// The id of the policy that took it, as a comment has it.
    pub fn policy(&self) -> Option<&str> {
        self.find(|reason| match &reason.decision {
            Decision::Policy(_, Some(id)) => Some(id.as_str()),
            _ => None,
        })
    }

    /// The ids of policies of its class that would take it if that one did not.
    pub fn overlapped(&self) -> impl Iterator<Item = &str> {
        self.reasons.iter().filter_map(|reason| match &reason.decision {
            Decision::Overlapped(_, Some(id)) => Some(id.as_str()),
            _ => None,
        })
    }

    /// The name of the gateway it is sent to.
    pub fn gateway(&self) -> Option<&str> {
        self.find(|reason| match &reason.decision {
            Decision::Gateway(Some(name)) => Some(name.as_str()),
            _ => None,
        })
    }

    /// The mark it is routed by.
    pub fn mark(&self) -> Option<Mark> {
        self.find(|reason| match reason.decision {
            Decision::Mark(mark) => Some(mark),
            _ => None,
        })
    }

    /// The table that sends it to the gateway.
    pub fn table(&self) -> Option<TableId> {
        self.find(|reason| match reason.decision {
            Decision::Table(table) => Some(table),
            _ => None,
        })
    }

    /// The address that it is translated to.
    pub fn egress_ip(&self) -> Option<IpAddr> {
        self.find(|reason| match reason.decision {
            Decision::Wears(address) => address,
            _ => None,
        })
    }

    /// The object that dropped it.
    pub fn dropped_by(&self) -> Option<&Reason> {
        self.find(|reason| (reason.decision == Decision::Dropped).then_some(reason))
    }
}

/// Writes ` name`, quoted as a comment, or nothing.
fn named(f: &mut fmt::Formatter<'_>, name: Option<&Comment>) -> fmt::Result {
    name.map_or(Ok(()), |name| write!(f, " \"{}\"", name.as_str().escape_default()))
}

impl fmt::Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Class(class) => write!(f, "class {class}"),
            Self::Policy(tag, id) => {
                f.write_str("policy")?;
                named(f, id.as_ref())?;
                write!(f, " ({tag})")
            }
            Self::Overlapped(tag, id) => {
                f.write_str("comes after it: policy")?;
                named(f, id.as_ref())?;
                write!(f, " ({tag})")
            }
            Self::Gateway(name) => {
                f.write_str("gateway")?;
                named(f, name.as_ref())
            }
            Self::Here => f.write_str("leaves from this node"),
            Self::LeftAlone => f.write_str("left alone"),
            Self::Mark(mark) => write!(f, "mark {mark}"),
            Self::ConnectionMark(MarkBits { mask, value }) => {
                write!(f, "connection mark {value:#010x}/{mask:#010x}")
            }
            Self::Table(table) => write!(f, "table {table}"),
            Self::Throw => f.write_str("the next rule decides"),
            Self::Via(address) => write!(f, "neighbour {address}"),
            Self::Ethernet(mac) => write!(f, "Ethernet address {mac}"),
            Self::Tunnel(node) => write!(f, "through the tunnel to {node}"),
            Self::Received => f.write_str("came out of the tunnel"),
            Self::Wears(Some(address)) => write!(f, "wears {address}"),
            Self::Wears(None) => f.write_str("wears the node's own address"),
            Self::Bound => f.write_str("keeps its source, whoever else would change it"),
            Self::Connection => f.write_str("translated as the connection began"),
            Self::Dropped => f.write_str("dropped"),
            Self::Unknown => f.write_str("not understood, taken not to match"),
        }
    }
}

impl fmt::Display for Fate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dropped => f.write_str("dropped"),
            Self::Tunnelled(frame) => write!(f, "sent through the tunnel to {}", frame.to),
            Self::Routed(Some(source)) => {
                write!(f, "goes by the host's own routes as {source}")
            }
            Self::Routed(None) => {
                f.write_str("goes by the host's own routes with the node's own address")
            }
            Self::Delivered => f.write_str("delivered to this host"),
        }
    }
}

impl fmt::Display for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.packet)?;
        let mut node = None;
        for reason in &self.reasons {
            if reason.node.as_ref() != node {
                node = reason.node.as_ref();
                if let Some(node) = node {
                    writeln!(f, "on {node}:")?;
                }
            }
            writeln!(f, "  {}: {}", reason.object, reason.decision)?;
        }
        writeln!(f, "{}", self.fate)
    }
}

#[cfg(feature = "serde")]
mod serialize {
    use serde::ser::SerializeStruct;
    use serde::{Serialize, Serializer};

    use super::{Fate, Packet, Reason, Trace};

    impl Serialize for Packet {
        fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            let mut fields = serializer.serialize_struct("Packet", 5)?;
            fields.serialize_field("protocol", &self.protocol)?;
            fields.serialize_field("source", &self.source)?;
            fields.serialize_field("source_port", &self.source_port)?;
            fields.serialize_field("destination", &self.destination)?;
            fields.serialize_field("destination_port", &self.destination_port)?;
            fields.end()
        }
    }

    impl Serialize for Reason {
        fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            let mut fields = serializer.serialize_struct("Reason", 3)?;
            fields.serialize_field("node", &self.node)?;
            fields.serialize_field("object", &self.object)?;
            fields.serialize_field("decision", &self.decision.to_string())?;
            fields.end()
        }
    }

    impl Serialize for Fate {
        fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            let (end, to, source) = match self {
                Self::Dropped => ("dropped", None, None),
                Self::Tunnelled(frame) => ("tunnelled", Some(frame.to), None),
                Self::Routed(source) => ("routed", None, Some(*source)),
                Self::Delivered => ("delivered", None, None),
            };
            let mut fields = serializer.serialize_struct("Fate", 3)?;
            fields.serialize_field("end", end)?;
            fields.serialize_field("to", &to)?;
            match source {
                Some(None) => fields.serialize_field("source", "node")?,
                source => fields.serialize_field("source", &source.flatten())?,
            }
            fields.end()
        }
    }

    impl Serialize for Trace {
        fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            let mut fields = serializer.serialize_struct("Trace", 10)?;
            fields.serialize_field("packet", &self.packet)?;
            fields.serialize_field("class", &self.class().map(|class| class.to_string()))?;
            fields.serialize_field("policy", &self.policy())?;
            fields.serialize_field("overlapped", &self.overlapped().collect::<Vec<_>>())?;
            fields.serialize_field("gateway", &self.gateway())?;
            fields.serialize_field("mark", &self.mark())?;
            fields.serialize_field("table", &self.table().map(crate::types::TableId::get))?;
            fields.serialize_field("egress_ip", &self.egress_ip())?;
            fields.serialize_field("fate", &self.fate)?;
            fields.serialize_field("reasons", &self.reasons)?;
            fields.end()
        }
    }
}
