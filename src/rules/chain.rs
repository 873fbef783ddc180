//! Tables and chains, and where the kernel calls them.

use std::fmt;

use crate::types::{DeviceName, Family, Mark};

/// Which of our two tables something is in: they have the same name, and nf_tables tells them
/// apart by their family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TableFamily {
    /// `inet`: IPv4 and IPv6 on their way through the host.
    Inet,
    /// `netdev`: frames on a device.
    Netdev,
}

impl TableFamily {
    /// Both.
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

/// A chain of our tables; its name follows from which one it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ChainId {
    /// Puts a pod's packet on its way, after destination NAT and before routing.
    Prerouting,
    /// Keeps strangers out of the tunnel and services off the egress IPs.
    Input,
    /// Keeps the tunnel's own packets out of the tracking of connections.
    Output,
    /// Finds what is on a way of ours, or should be.
    Forward,
    /// Translates, ahead of every other masquerade.
    NatPostrouting,
    /// Looks at what was really translated.
    Guard,
    /// Has a gateway's mark: takes it off before encapsulation, and stops what is not tunnelled.
    Marked,
    /// Belongs to a connection of ours: stops what is on no way of ours any more.
    Bound,
    /// What is made to look like a tunnel packet of this node.
    Injected,
    /// What came out of the tunnel.
    Arrived,
    /// Finds a packet's class, where its mark does not tell.
    Select,
    /// What belongs to a TCP connection whose beginning nobody saw.
    Midway,
    /// Whether it would answer what a policy takes.
    Answering(Family),
    /// Which packets of a selected pod a policy may take.
    Admit(Family),
    /// From a class to a policy, by destination.
    Pick(Family),
    /// From a policy to its way out.
    Steer(Family),
    /// Way out: translate it here.
    Here,
    /// Way out: leave it alone.
    Bypass,
    /// Way out: the gateway with this mark.
    To(Mark),
    /// Way out of a connection that is on its way to the gateway with this mark.
    Via(Mark),
    /// From a class to a policy, by destination, on the gateway.
    Translate(Family),
    /// From a policy to the address it wears.
    Wear(Family),
    /// Gives a frame the Ethernet address of its gateway, and takes the mark off.
    Egress,
}

impl ChainId {
    /// The table it is in.
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
            "output" => Self::Output,
            "forward" => Self::Forward,
            "nat_postrouting" => Self::NatPostrouting,
            "guard" => Self::Guard,
            "marked" => Self::Marked,
            "bound" => Self::Bound,
            "injected" => Self::Injected,
            "arrived" => Self::Arrived,
            "select" => Self::Select,
            "midway" => Self::Midway,
            "answering4" => Self::Answering(V4),
            "answering6" => Self::Answering(V6),
            "admit4" => Self::Admit(V4),
            "admit6" => Self::Admit(V6),
            "pick4" => Self::Pick(V4),
            "pick6" => Self::Pick(V6),
            "steer4" => Self::Steer(V4),
            "steer6" => Self::Steer(V6),
            "here" => Self::Here,
            "bypass" => Self::Bypass,
            "translate4" => Self::Translate(V4),
            "translate6" => Self::Translate(V6),
            "wear4" => Self::Wear(V4),
            "wear6" => Self::Wear(V6),
            "egress" => Self::Egress,
            _ => {
                let (way, digits) = name.split_once('_')?;
                let mark = Mark::new(u32::from_str_radix(digits, 16).ok()?);
                let chain = match way {
                    "to" => Self::To(mark),
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
            Self::Output => f.write_str("output"),
            Self::Forward => f.write_str("forward"),
            Self::NatPostrouting => f.write_str("nat_postrouting"),
            Self::Guard => f.write_str("guard"),
            Self::Marked => f.write_str("marked"),
            Self::Bound => f.write_str("bound"),
            Self::Injected => f.write_str("injected"),
            Self::Arrived => f.write_str("arrived"),
            Self::Select => f.write_str("select"),
            Self::Midway => f.write_str("midway"),
            Self::Answering(family) => write!(f, "answering{}", family.digit()),
            Self::Admit(family) => write!(f, "admit{}", family.digit()),
            Self::Pick(family) => write!(f, "pick{}", family.digit()),
            Self::Steer(family) => write!(f, "steer{}", family.digit()),
            Self::Here => f.write_str("here"),
            Self::Bypass => f.write_str("bypass"),
            Self::To(mark) => write!(f, "to_{:08x}", mark.get()),
            Self::Via(mark) => write!(f, "via_{:08x}", mark.get()),
            Self::Translate(family) => write!(f, "translate{}", family.digit()),
            Self::Wear(family) => write!(f, "wear{}", family.digit()),
            Self::Egress => f.write_str("egress"),
        }
    }
}

/// Where the kernel calls a base chain; its policy is always `accept`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Base {
    /// Filter or NAT.
    pub kind: ChainType,
    /// The hook.
    pub hook: Hook,
    /// Its place among the chains of the hook; lower runs first.
    pub priority: i32,
}

/// Type of a base chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ChainType {
    /// Sees every packet.
    Filter,
    /// Sees the first packet of a connection.
    Nat,
}

/// A netfilter hook (`include/uapi/linux/netfilter.h`, `enum nf_inet_hooks` and
/// `enum nf_dev_hooks`).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Hook {
    /// Before routing.
    Prerouting,
    /// Delivered to this host.
    Input,
    /// Routed through this host.
    Forward,
    /// Sent by this host.
    Output,
    /// On the way out.
    Postrouting,
    /// Handed to this device to be sent; Linux 5.16.
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
