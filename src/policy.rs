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
    #[cfg_attr(feature = "serde", serde(deserialize_with = "crate::serde_forms::nets"))]
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

#[cfg(feature = "serde")]
mod form {
    use std::fmt;
    use std::net::{Ipv4Addr, Ipv6Addr};

    use serde::de::{self, MapAccess, SeqAccess, Visitor, value};
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use super::{Destinations, EgressIp};
    use crate::serde_forms::{nets, parsed};
    use crate::types::Family;

    /// The word that stands for the node's own address.
    const NODE: &str = "node";
    /// The word that stands for every destination that is not excluded.
    const EXTERNAL: &str = "external";

    impl Serialize for EgressIp {
        /// The text `node`, or an object of `v4`, `v6` or both.
        fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            let key = |family| if family == Family::V4 { "v4" } else { "v6" };
            match self {
                Self::Node => serializer.serialize_str(NODE),
                _ => serializer.collect_map(self.addresses().map(|ip| (key(Family::of(ip)), ip))),
            }
        }
    }

    #[derive(Deserialize)]
    #[serde(rename = "EgressIp", deny_unknown_fields)]
    struct Addresses {
        v4: Option<V4>,
        v6: Option<V6>,
    }

    struct V4(Ipv4Addr);

    impl<'de> Deserialize<'de> for V4 {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            let parse = |text: &str| text.parse().map_err(|_| "is not an IPv4 address");
            parsed(deserializer, parse).map(Self)
        }
    }

    struct V6(Ipv6Addr);

    impl<'de> Deserialize<'de> for V6 {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            parsed(deserializer, |text| match text.parse::<Ipv6Addr>() {
                Err(_) => Err("is not an IPv6 address"),
                Ok(address) if address.to_ipv4_mapped().is_some() => {
                    Err("is an IPv4-mapped IPv6 address; write IPv4 addresses as v4")
                }
                Ok(address) => Ok(Self(address)),
            })
        }
    }

    impl<'de> Deserialize<'de> for EgressIp {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            struct Form;

            impl<'de> Visitor<'de> for Form {
                type Value = EgressIp;

                fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                    write!(f, "{NODE:?} or an object with v4, v6 or both")
                }

                fn visit_str<E: de::Error>(self, text: &str) -> Result<EgressIp, E> {
                    let other = || E::invalid_value(de::Unexpected::Str(text), &self);
                    (text == NODE).then_some(EgressIp::Node).ok_or_else(other)
                }

                fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<EgressIp, A::Error> {
                    let form = value::MapAccessDeserializer::new(map);
                    let Addresses { v4, v6 } = Addresses::deserialize(form)?;
                    match (v4, v6) {
                        (Some(V4(v4)), Some(V6(v6))) => Ok(EgressIp::Dual(v4, v6)),
                        (Some(V4(v4)), None) => Ok(EgressIp::V4(v4)),
                        (None, Some(V6(v6))) => Ok(EgressIp::V6(v6)),
                        (None, None) => Err(de::Error::custom(
                            "an egress IP needs v4, v6 or both; none is given",
                        )),
                    }
                }
            }

            deserializer.deserialize_any(Form)
        }
    }

    impl Serialize for Destinations {
        /// The text `external`, or a list of prefixes.
        fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            match self {
                Self::External => serializer.serialize_str(EXTERNAL),
                Self::Nets(nets) => nets.serialize(serializer),
            }
        }
    }

    impl<'de> Deserialize<'de> for Destinations {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            struct Form;

            impl<'de> Visitor<'de> for Form {
                type Value = Destinations;

                fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                    write!(f, "{EXTERNAL:?} or a list of prefixes")
                }

                fn visit_str<E: de::Error>(self, text: &str) -> Result<Destinations, E> {
                    let other = || E::invalid_value(de::Unexpected::Str(text), &self);
                    (text == EXTERNAL).then_some(Destinations::External).ok_or_else(other)
                }

                fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<Destinations, A::Error> {
                    nets(value::SeqAccessDeserializer::new(list)).map(Destinations::Nets)
                }
            }

            deserializer.deserialize_any(Form)
        }
    }
}
