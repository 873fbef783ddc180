//! The trace of a packet: its decisions, and the objects that made them.

use std::fmt;
use std::net::IpAddr;

use super::packet::{Frame, Packet};
use crate::state::{Comment, MarkBits, Tag};
use crate::types::{MacAddr, Mark, NodeName, TableId};

/// The path of a packet through one or several nodes, as a list of decisions.
///
/// `Display` writes one line per reason for operators. With the feature `serde` it serializes as
/// one document whose field names are stable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trace {
    /// The packet, as it was sent.
    pub packet: Packet,
    /// The decisions, in order.
    pub reasons: Vec<Reason>,
    /// The fate of the packet.
    pub fate: Fate,
}

/// One decision, and the object that made it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reason {
    /// The node; `None` where only one node was traced.
    pub node: Option<NodeName>,
    /// The object that decided, as the kernel's tools print it.
    pub object: String,
    /// The decision.
    pub decision: Decision,
}

/// The decision of an object about a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Decision {
    /// The source is in this class.
    Class(Tag),
    /// This policy takes the packet.
    ///
    /// The comment gives the policy's id; `None` if no element has one.
    Policy(Tag, Option<Comment>),
    /// This policy of the class also takes the destination, but with lower precedence.
    Shadowed(Tag, Option<Comment>),
    /// The packet is steered to this gateway, named by the comment.
    Gateway(Option<Comment>),
    /// The initiator of the packet's connection is on this node, named by the comment.
    ///
    /// Replies go there.
    Initiator(Option<Comment>),
    /// The packet is translated on this node.
    Local,
    /// The packet is left unchanged.
    Bypass,
    /// The firewall mark is now this.
    Mark(Mark),
    /// The connection mark now has this value in these bits.
    ConnectionMark(MarkBits),
    /// This routing table routes the packet.
    Table(TableId),
    /// The table ends the lookup; the next rule decides.
    Throw,
    /// The packet is sent to this neighbour on the VXLAN device.
    Via(IpAddr),
    /// The neighbour, or the egress hook, gives this MAC address.
    Ethernet(MacAddr),
    /// The FDB entry for the MAC address leads to this node.
    Tunnel(IpAddr),
    /// The packet was received from the tunnel.
    Received,
    /// The source is translated to this address; `None` is the node's own address.
    Snat(Option<IpAddr>),
    /// The source is kept, and no other rule can translate it.
    SourceKept,
    /// The packet belongs to a known connection and is translated as its first packet was.
    Connection,
    /// The packet is dropped.
    Dropped,
    /// The decision is unknown: the rule has an unknown statement, or is in iptables.
    Unknown,
}

/// Fate of a packet on a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fate {
    /// The packet is dropped.
    Dropped,
    /// The packet is sent to another node.
    ///
    /// [`explain_received`](crate::explain::explain_received) continues the trace there.
    Tunnelled(Frame),
    /// The packet is routed by the host's own routes, with this source address.
    ///
    /// `None` is the node's own address on the output interface.
    Routed(Option<IpAddr>),
    /// The packet is delivered to this host.
    Delivered,
}

impl Trace {
    fn find<'a, T>(&'a self, what: impl FnMut(&'a Reason) -> Option<T>) -> Option<T> {
        self.reasons.iter().find_map(what)
    }

    /// The class of the packet's source, if a policy selects it.
    pub fn class(&self) -> Option<Tag> {
        self.find(|reason| match reason.decision {
            Decision::Class(class) => Some(class),
            _ => None,
        })
    }

    /// The id of the policy that took the packet, as in the comment of an element.
    pub fn policy(&self) -> Option<&str> {
        self.find(|reason| match &reason.decision {
            Decision::Policy(_, Some(id)) => Some(id.as_str()),
            _ => None,
        })
    }

    /// The ids of overlapping policies of the class, which would take the packet without that one.
    pub fn shadowed(&self) -> impl Iterator<Item = &str> {
        self.reasons.iter().filter_map(|reason| match &reason.decision {
            Decision::Shadowed(_, Some(id)) => Some(id.as_str()),
            _ => None,
        })
    }

    /// The name of the gateway that the packet is steered to.
    pub fn gateway(&self) -> Option<&str> {
        self.find(|reason| match &reason.decision {
            Decision::Gateway(Some(name)) => Some(name.as_str()),
            _ => None,
        })
    }

    /// The firewall mark that routes the packet.
    pub fn mark(&self) -> Option<Mark> {
        self.find(|reason| match reason.decision {
            Decision::Mark(mark) => Some(mark),
            _ => None,
        })
    }

    /// The routing table that sends the packet to the gateway.
    pub fn table(&self) -> Option<TableId> {
        self.find(|reason| match reason.decision {
            Decision::Table(table) => Some(table),
            _ => None,
        })
    }

    /// The address that the source is translated to.
    pub fn egress_ip(&self) -> Option<IpAddr> {
        self.find(|reason| match reason.decision {
            Decision::Snat(address) => address,
            _ => None,
        })
    }

    /// The decision that dropped the packet, with its object.
    pub fn dropped_by(&self) -> Option<&Reason> {
        self.find(|reason| (reason.decision == Decision::Dropped).then_some(reason))
    }
}

/// Writes ` name`, quoted as a comment; nothing for `None`.
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
            Self::Shadowed(tag, id) => {
                f.write_str("shadowed policy")?;
                named(f, id.as_ref())?;
                write!(f, " ({tag})")
            }
            Self::Gateway(name) => {
                f.write_str("gateway")?;
                named(f, name.as_ref())
            }
            Self::Initiator(name) => {
                f.write_str("initiator on node")?;
                named(f, name.as_ref())
            }
            Self::Local => f.write_str("translated on this node"),
            Self::Bypass => f.write_str("left unchanged"),
            Self::Mark(mark) => write!(f, "mark {mark}"),
            Self::ConnectionMark(MarkBits { mask, value }) => {
                write!(f, "connection mark {value:#010x}/{mask:#010x}")
            }
            Self::Table(table) => write!(f, "table {table}"),
            Self::Throw => f.write_str("the next rule decides"),
            Self::Via(address) => write!(f, "neighbour {address}"),
            Self::Ethernet(mac) => write!(f, "Ethernet address {mac}"),
            Self::Tunnel(node) => write!(f, "through the tunnel to {node}"),
            Self::Received => f.write_str("received from the tunnel"),
            Self::Snat(Some(address)) => write!(f, "SNAT to {address}"),
            Self::Snat(None) => f.write_str("SNAT to the node's own address"),
            Self::SourceKept => f.write_str("source kept: no other SNAT applies"),
            Self::Connection => f.write_str("translated like the first packet of the connection"),
            Self::Dropped => f.write_str("dropped"),
            Self::Unknown => f.write_str("unknown rule, treated as no match"),
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
            fields.serialize_field("shadowed", &self.shadowed().collect::<Vec<_>>())?;
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
