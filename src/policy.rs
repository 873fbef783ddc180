//! What a caller wants: which traffic leaves where, wearing what.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ipnet::IpNet;

use crate::types::{Family, NodeName, PolicyId};

/// One egress policy: which traffic leaves through which node, wearing which address.
///
/// Implement it for a type of your own to plan from it without copying; [`EgressPolicy`] is the
/// plain value for everybody else. Whatever the implementation returns is checked by
/// [`plan`](crate::plan).
#[cfg_attr(feature = "mock", mockall::automock)]
pub trait Policy: Send + Sync {
    /// Stable identity; the comment on the kernel objects made for the policy.
    fn id(&self) -> &PolicyId;

    /// Rank among policies that take the same packet: lower wins, then the smaller id.
    fn priority(&self) -> u32;

    /// Pod prefixes whose traffic the policy takes, without host bits; order never matters.
    fn sources(&self) -> &[IpNet];

    /// Where that traffic must be headed.
    fn destinations(&self) -> &Destinations;

    /// Node that sends the traffic out of the cluster; with `None` the traffic is dropped.
    #[expect(clippy::needless_lifetimes, reason = "the mock needs the lifetime to have a name")]
    fn gateway<'a>(&'a self) -> Option<&'a NodeName>;

    /// Source address the traffic wears outside.
    fn egress_ip(&self) -> EgressIp;

    /// What becomes of the traffic where the policy cannot be carried out.
    fn unavailable(&self) -> Unavailable {
        Unavailable::Drop
    }
}

/// What becomes of a policy's traffic of a family that has no gateway, no egress IP, or no way
/// through the tunnel.
///
/// It is about what the policy says. Traffic that is steered and finds its gateway, tunnel or route
/// gone is dropped in any case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "lowercase"))]
pub enum Unavailable {
    /// It is dropped.
    #[default]
    Drop,
    /// It leaves as if there were no policy, with whatever address that gives.
    Bypass,
}

macro_rules! delegate {
    ($($pointer:ty),*) => {$(
        impl<P: Policy + ?Sized> Policy for $pointer {
            fn id(&self) -> &PolicyId {
                (**self).id()
            }

            fn priority(&self) -> u32 {
                (**self).priority()
            }

            fn sources(&self) -> &[IpNet] {
                (**self).sources()
            }

            fn destinations(&self) -> &Destinations {
                (**self).destinations()
            }

            fn gateway(&self) -> Option<&NodeName> {
                (**self).gateway()
            }

            fn egress_ip(&self) -> EgressIp {
                (**self).egress_ip()
            }

            fn unavailable(&self) -> Unavailable {
                (**self).unavailable()
            }
        }
    )*};
}

delegate!(&P, Box<P>, Arc<P>);

/// Where a policy's traffic must be headed.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub enum Destinations {
    /// Anywhere but the excluded prefixes.
    #[default]
    External,
    /// These prefixes, excluded ones apart; at least one, without host bits.
    Nets(Vec<IpNet>),
}

/// The stable source address that traffic wears outside.
///
/// A family without an address is closed: the policy's traffic of that family is dropped, not
/// leaked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EgressIp {
    /// An IPv4 address.
    V4(Ipv4Addr),
    /// An IPv6 address.
    V6(Ipv6Addr),
    /// One of each.
    Dual(Ipv4Addr, Ipv6Addr),
    /// Whatever address the gateway node has on the device the packet leaves by.
    Node,
}

impl EgressIp {
    /// The address of a family; `None` if there is none, and for [`EgressIp::Node`].
    pub const fn address(self, family: Family) -> Option<IpAddr> {
        match (self, family) {
            (Self::V4(v4) | Self::Dual(v4, _), Family::V4) => Some(IpAddr::V4(v4)),
            (Self::V6(v6) | Self::Dual(_, v6), Family::V6) => Some(IpAddr::V6(v6)),
            _ => None,
        }
    }

    /// Whether traffic of a family has something to wear.
    pub const fn serves(self, family: Family) -> bool {
        matches!(self, Self::Node) || self.address(family).is_some()
    }

    /// The addresses, IPv4 first.
    pub fn addresses(self) -> impl Iterator<Item = IpAddr> {
        Family::BOTH.into_iter().filter_map(move |family| self.address(family))
    }
}

/// An egress policy as plain data.
///
/// ```
/// use egress_datapath::{Destinations, EgressIp, EgressPolicy, NodeName, PolicyId};
///
/// let policy = EgressPolicy {
///     gateway: Some(NodeName::new("node-b")?),
///     destinations: Destinations::Nets(vec!["198.51.100.0/24".parse()?]),
///     ..EgressPolicy::new(
///         PolicyId::new("shop/checkout")?,
///         vec!["10.244.1.10/32".parse()?],
///         EgressIp::V4("203.0.113.7".parse()?),
///     )
/// };
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct EgressPolicy {
    /// Stable identity.
    pub id: PolicyId,
    /// Rank among policies that take the same packet: lower wins, then the smaller id.
    #[cfg_attr(feature = "serde", serde(default))]
    pub priority: u32,
    /// Pod prefixes whose traffic the policy takes.
    #[cfg_attr(feature = "serde", serde(deserialize_with = "crate::serde_impls::nets"))]
    pub sources: Vec<IpNet>,
    /// Where that traffic must be headed.
    #[cfg_attr(feature = "serde", serde(default))]
    pub destinations: Destinations,
    /// Node that sends the traffic out of the cluster; with `None` the traffic is dropped.
    #[cfg_attr(feature = "serde", serde(default))]
    pub gateway: Option<NodeName>,
    /// Source address the traffic wears outside.
    pub egress_ip: EgressIp,
    /// What becomes of the traffic where the policy cannot be carried out.
    #[cfg_attr(feature = "serde", serde(default))]
    pub unavailable: Unavailable,
}

impl EgressPolicy {
    /// A policy of priority 0 for everything external, closed until it gets a gateway.
    pub const fn new(id: PolicyId, sources: Vec<IpNet>, egress_ip: EgressIp) -> Self {
        Self {
            id,
            priority: 0,
            sources,
            destinations: Destinations::External,
            gateway: None,
            egress_ip,
            unavailable: Unavailable::Drop,
        }
    }
}

impl Policy for EgressPolicy {
    fn id(&self) -> &PolicyId {
        &self.id
    }

    fn priority(&self) -> u32 {
        self.priority
    }

    fn sources(&self) -> &[IpNet] {
        &self.sources
    }

    fn destinations(&self) -> &Destinations {
        &self.destinations
    }

    fn gateway(&self) -> Option<&NodeName> {
        self.gateway.as_ref()
    }

    fn egress_ip(&self) -> EgressIp {
        self.egress_ip
    }

    fn unavailable(&self) -> Unavailable {
        self.unavailable
    }
}
