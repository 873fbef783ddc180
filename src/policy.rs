//! Egress policies: which traffic leaves the cluster, by which gateway node, with which source.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ipnet::IpNet;

use crate::types::{Family, NodeName, PolicyId};

/// An egress policy: the selected traffic, its gateway node and its egress IP.
///
/// Implement the trait for a type of your own to plan from it without copying; [`EgressPolicy`] is
/// the plain data type that implements it. The guide has [an
/// example](crate::guide::embedding#own-implementations-of-the-traits). [`plan`](crate::plan())
/// validates the values that an implementation returns, and an invalid value
/// [closes](crate::guide::errors#one-invalid-policy) that policy alone.
#[cfg_attr(feature = "mock", mockall::automock)]
pub trait Policy: Send + Sync {
    /// Returns the stable identity, which is also the comment on the policy's kernel objects.
    fn id(&self) -> &PolicyId;

    /// Returns the rank among policies that select the same packet.
    ///
    /// The lower number wins, then the smaller id.
    fn priority(&self) -> u32;

    /// Returns the pod prefixes whose traffic the policy selects.
    ///
    /// They are of either family, and host bits are zero. The order has no effect.
    fn sources(&self) -> &[IpNet];

    /// Returns the destinations whose traffic the policy selects.
    fn destinations(&self) -> &Destinations;

    /// Returns the gateway node; with `None` the selected traffic is dropped.
    #[expect(clippy::needless_lifetimes, reason = "the mock needs the lifetime to have a name")]
    fn gateway<'a>(&'a self) -> Option<&'a NodeName>;

    /// Returns the source address of the traffic outside the cluster.
    fn egress_ip(&self) -> EgressIp;

    /// Returns the treatment of traffic for which the policy cannot be carried out.
    fn unavailable(&self) -> Unavailable {
        Unavailable::Drop
    }
}

/// Treatment of a policy's traffic of one family if the policy cannot be carried out.
///
/// This applies where the policy has an error, no gateway, no egress IP of the family, or no tunnel
/// address of the family on one of the two nodes, and where no mark or routing table is left for
/// its gateway. It depends on the input only: traffic that is steered while its gateway, tunnel or
/// route is missing is dropped in any case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "lowercase"))]
#[non_exhaustive]
pub enum Unavailable {
    /// The traffic is dropped.
    #[default]
    Drop,
    /// The traffic leaves as if there were no policy, with whatever source address results.
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

/// The destinations whose traffic a policy selects.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub enum Destinations {
    /// All destinations except the excluded prefixes.
    #[default]
    External,
    /// These prefixes, minus the excluded ones; at least one, with zero host bits.
    Nets(Vec<IpNet>),
}

/// The stable source address of a policy's traffic outside the cluster.
///
/// For a family without an address the policy is [closed](crate::guide#words).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum EgressIp {
    /// An IPv4 address.
    V4(Ipv4Addr),
    /// An IPv6 address.
    V6(Ipv6Addr),
    /// An address of each family.
    Dual(Ipv4Addr, Ipv6Addr),
    /// Masquerade: the address of the gateway node on the interface by which the packet leaves.
    Node,
}

impl EgressIp {
    /// Returns the address of a family; `None` if there is none, and for [`EgressIp::Node`].
    pub const fn address(self, family: Family) -> Option<IpAddr> {
        match (self, family) {
            (Self::V4(v4) | Self::Dual(v4, _), Family::V4) => Some(IpAddr::V4(v4)),
            (Self::V6(v6) | Self::Dual(_, v6), Family::V6) => Some(IpAddr::V6(v6)),
            _ => None,
        }
    }

    /// Returns whether traffic of a family has a source address to use.
    pub const fn serves(self, family: Family) -> bool {
        matches!(self, Self::Node) || self.address(family).is_some()
    }

    /// Returns the addresses, IPv4 first.
    pub fn addresses(self) -> impl Iterator<Item = IpAddr> {
        Family::BOTH.into_iter().filter_map(move |family| self.address(family))
    }
}

/// An egress policy as plain data.
///
/// ```
/// use egress_datapath::{Destinations, EgressIp, EgressPolicy, NodeName, PolicyId};
///
/// let policy = EgressPolicy::new(
///     PolicyId::new("shop/checkout")?,
///     vec!["10.244.1.10/32".parse()?],
///     EgressIp::V4("203.0.113.7".parse()?),
/// )
/// .with_gateway(NodeName::new("node-b")?)
/// .with_destinations(Destinations::Nets(vec!["198.51.100.0/24".parse()?]));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
#[non_exhaustive]
pub struct EgressPolicy {
    /// Stable identity.
    pub id: PolicyId,
    /// Rank among policies that select the same packet: the lower number wins, then the smaller id.
    #[cfg_attr(feature = "serde", serde(default))]
    pub priority: u32,
    /// Pod prefixes whose traffic the policy selects.
    #[cfg_attr(feature = "serde", serde(deserialize_with = "crate::serde_forms::nets"))]
    pub sources: Vec<IpNet>,
    /// Destinations whose traffic the policy selects.
    #[cfg_attr(feature = "serde", serde(default))]
    pub destinations: Destinations,
    /// Gateway node that sends the traffic out of the cluster; with `None` the traffic is dropped.
    #[cfg_attr(feature = "serde", serde(default))]
    pub gateway: Option<NodeName>,
    /// Source address of the traffic outside the cluster.
    pub egress_ip: EgressIp,
    /// Treatment of traffic for which the policy cannot be carried out.
    #[cfg_attr(feature = "serde", serde(default))]
    pub unavailable: Unavailable,
}

impl EgressPolicy {
    /// Creates a policy of priority 0 for all external destinations, without gateway.
    ///
    /// Its traffic is dropped until it gets a gateway.
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

    /// Sets the rank among policies that select the same packet.
    #[must_use]
    pub const fn with_priority(mut self, priority: u32) -> Self {
        self.priority = priority;
        self
    }

    /// Sets the pod prefixes whose traffic the policy selects.
    #[must_use]
    pub fn with_sources(mut self, sources: Vec<IpNet>) -> Self {
        self.sources = sources;
        self
    }

    /// Sets the destinations whose traffic the policy selects.
    #[must_use]
    pub fn with_destinations(mut self, destinations: Destinations) -> Self {
        self.destinations = destinations;
        self
    }

    /// Sets the gateway node; with `None` the traffic is dropped.
    #[must_use]
    pub fn with_gateway(mut self, gateway: impl Into<Option<NodeName>>) -> Self {
        self.gateway = gateway.into();
        self
    }

    /// Sets the source address of the traffic outside the cluster.
    #[must_use]
    pub const fn with_egress_ip(mut self, egress_ip: EgressIp) -> Self {
        self.egress_ip = egress_ip;
        self
    }

    /// Sets the treatment of traffic for which the policy cannot be carried out.
    #[must_use]
    pub const fn with_unavailable(mut self, unavailable: Unavailable) -> Self {
        self.unavailable = unavailable;
        self
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
