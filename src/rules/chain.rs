//! The nf_tables tables and chains, and the hooks of the base chains.

use std::fmt;

use crate::types::{DeviceName, Family, Mark};

/// Address family of one of our two nf_tables tables.
///
/// Both tables have the same name; nf_tables distinguishes them by their family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TableFamily {
    /// `inet`: IPv4 and IPv6 packets that pass through the host.
    Inet,
    /// `netdev`: frames on an interface.
    Netdev,
}

impl TableFamily {
    /// Both families.
    pub const BOTH: [Self; 2] = [Self::Inet, Self::Netdev];
}

impl fmt::Display for TableFamily {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Inet => "inet",
            Self::Netdev => "netdev",
        })
    }
}

/// A chain of our tables; its name follows from the variant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ChainId {
    /// Prerouting base chain: marks a pod's packet, after destination NAT and before routing.
    Prerouting,
    /// Input base chain: drops tunnel packets of unknown senders.
    Input,
    /// Packets to an egress IP: drops those that neither a connection nor a socket expects.
    EgressIp,
    /// Output base chain: exempts the tunnel's outer packets from connection tracking.
    Output,
    /// Forward base chain: dispatches marked and tracked packets.
    Forward,
    /// Source NAT base chain at postrouting: translates before every other masquerade.
    NatPostrouting,
    /// Postrouting base chain after source NAT: checks the translation that a packet really got.
    Guard,
    /// Postrouting base chain: drops tunnel packets that leave by another interface than the
    /// underlay's.
    Underlay,
    /// Packets with a gateway's mark: clears it before encapsulation, drops packets not tunnelled.
    Marked,
    /// Packets of our tracked connections: drops those that are not steered or translated any more.
    Tracked,
    /// Segments with the SYN flag of connections that use the tunnel: lowers their MSS.
    ClampMss,
    /// Packets that imitate a tunnel packet of this node: drops them.
    SpoofedVxlan,
    /// Packets received from the tunnel.
    FromTunnel,
    /// Packets received from the node with this mark: writes its value into the connection mark.
    FromNode(Mark),
    /// Packets that a gateway returned through the tunnel: drops those not for a selected pod.
    ReturnCheck,
    /// Packets to a selected pod: drops those that this node should have translated.
    SourceCheck(Family),
    /// First packet of a connection that a gateway returned through the tunnel: keeps its source.
    Returned,
    /// Class lookup by source, for packets whose mark does not give the class.
    Classify,
    /// Segments of a TCP connection whose opening segment conntrack has not seen.
    MidStream,
    /// Mid-connection TCP segments: drops those from a destination that a policy selects.
    ReplyCheck(Family),
    /// Packets of a selected pod: excludes those that no policy may take.
    Exclude(Family),
    /// Policy lookup by class and destination.
    SelectPolicy(Family),
    /// Action lookup by policy.
    Steer(Family),
    /// Action: translate the packet on this node.
    LocalGateway,
    /// Action: leave the packet unchanged.
    Bypass,
    /// Action: steer the packet to the gateway with this mark.
    To(Mark),
    /// Action for a connection whose packets go to the node with this mark.
    Via(Mark),
    /// Policy lookup by class and destination, on the gateway node.
    Translate(Family),
    /// Egress IP lookup by policy: translates the source address.
    Snat(Family),
    /// Egress hook base chain: sets a frame's MAC address to its gateway's and clears the mark.
    Egress,
}

impl ChainId {
    /// The table that the chain is in.
    pub const fn table(self) -> TableFamily {
        match self {
            Self::Egress => TableFamily::Netdev,
            _ => TableFamily::Inet,
        }
    }

    /// The chain with this name.
    pub fn from_name(name: &str) -> Option<Self> {
        use Family::{V4, V6};
        Some(match name {
            "prerouting" => Self::Prerouting,
            "input" => Self::Input,
            "egress_ip" => Self::EgressIp,
            "output" => Self::Output,
            "forward" => Self::Forward,
            "nat_postrouting" => Self::NatPostrouting,
            "guard" => Self::Guard,
            "underlay" => Self::Underlay,
            "marked" => Self::Marked,
            "tracked" => Self::Tracked,
            "clamp_mss" => Self::ClampMss,
            "spoofed_vxlan" => Self::SpoofedVxlan,
            "from_tunnel" => Self::FromTunnel,
            "return_check" => Self::ReturnCheck,
            "source_check4" => Self::SourceCheck(V4),
            "source_check6" => Self::SourceCheck(V6),
            "returned" => Self::Returned,
            "classify" => Self::Classify,
            "mid_stream" => Self::MidStream,
            "reply_check4" => Self::ReplyCheck(V4),
            "reply_check6" => Self::ReplyCheck(V6),
            "exclude4" => Self::Exclude(V4),
            "exclude6" => Self::Exclude(V6),
            "select_policy4" => Self::SelectPolicy(V4),
            "select_policy6" => Self::SelectPolicy(V6),
            "steer4" => Self::Steer(V4),
            "steer6" => Self::Steer(V6),
            "local_gateway" => Self::LocalGateway,
            "bypass" => Self::Bypass,
            "translate4" => Self::Translate(V4),
            "translate6" => Self::Translate(V6),
            "snat4" => Self::Snat(V4),
            "snat6" => Self::Snat(V6),
            "egress" => Self::Egress,
            _ => {
                let (way, digits) = name.split_once('_')?;
                let mark = Mark::new(u32::from_str_radix(digits, 16).ok()?);
                let chain = match way {
                    "to" => Self::To(mark),
                    "from" => Self::FromNode(mark),
                    _ => Self::Via(mark),
                };
                return (chain.to_string() == name).then_some(chain);
            }
        })
    }
}

impl fmt::Display for ChainId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Prerouting => f.write_str("prerouting"),
            Self::Input => f.write_str("input"),
            Self::EgressIp => f.write_str("egress_ip"),
            Self::Output => f.write_str("output"),
            Self::Forward => f.write_str("forward"),
            Self::NatPostrouting => f.write_str("nat_postrouting"),
            Self::Guard => f.write_str("guard"),
            Self::Underlay => f.write_str("underlay"),
            Self::Marked => f.write_str("marked"),
            Self::Tracked => f.write_str("tracked"),
            Self::ClampMss => f.write_str("clamp_mss"),
            Self::SpoofedVxlan => f.write_str("spoofed_vxlan"),
            Self::FromTunnel => f.write_str("from_tunnel"),
            Self::FromNode(mark) => write!(f, "from_{:08x}", mark.get()),
            Self::ReturnCheck => f.write_str("return_check"),
            Self::SourceCheck(family) => write!(f, "source_check{}", family.digit()),
            Self::Returned => f.write_str("returned"),
            Self::Classify => f.write_str("classify"),
            Self::MidStream => f.write_str("mid_stream"),
            Self::ReplyCheck(family) => write!(f, "reply_check{}", family.digit()),
            Self::Exclude(family) => write!(f, "exclude{}", family.digit()),
            Self::SelectPolicy(family) => write!(f, "select_policy{}", family.digit()),
            Self::Steer(family) => write!(f, "steer{}", family.digit()),
            Self::LocalGateway => f.write_str("local_gateway"),
            Self::Bypass => f.write_str("bypass"),
            Self::To(mark) => write!(f, "to_{:08x}", mark.get()),
            Self::Via(mark) => write!(f, "via_{:08x}", mark.get()),
            Self::Translate(family) => write!(f, "translate{}", family.digit()),
            Self::Snat(family) => write!(f, "snat{}", family.digit()),
            Self::Egress => f.write_str("egress"),
        }
    }
}

/// Hook, type and priority of a base chain; its policy is always `accept`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Base {
    /// Filter or NAT.
    pub kind: ChainType,
    /// The hook that calls the chain.
    pub hook: Hook,
    /// Order among the chains of the hook; lower runs first.
    pub priority: i32,
}

/// Type of a base chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ChainType {
    /// A chain that sees every packet.
    Filter,
    /// A chain that sees the first packet of a connection.
    Nat,
}

/// A netfilter hook.
///
/// Constants in `include/uapi/linux/netfilter.h`: `enum nf_inet_hooks` and `enum nf_dev_hooks`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Hook {
    /// Packets before routing.
    Prerouting,
    /// Packets delivered to this host.
    Input,
    /// Packets routed through this host.
    Forward,
    /// Packets sent by this host.
    Output,
    /// Packets about to leave this host.
    Postrouting,
    /// Packets handed to this interface to be sent; Linux 5.16.
    Egress(DeviceName),
}

impl fmt::Display for Base {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            ChainType::Filter => "filter",
            ChainType::Nat => "nat",
        };
        write!(f, "type {kind} hook ")?;
        match &self.hook {
            Hook::Prerouting => f.write_str("prerouting")?,
            Hook::Input => f.write_str("input")?,
            Hook::Forward => f.write_str("forward")?,
            Hook::Output => f.write_str("output")?,
            Hook::Postrouting => f.write_str("postrouting")?,
            Hook::Egress(device) => write!(f, "egress device \"{device}\"")?,
        }
        write!(f, " priority {}; policy accept;", self.priority)
    }
}
