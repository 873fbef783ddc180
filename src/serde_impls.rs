//! `Serialize` and `Deserialize` where the derived form would not be what a person writes.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use ipnet::IpNet;
use serde::de;
use serde::de::{MapAccess, SeqAccess, Visitor, value};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::alloc::{TableRange, TableRangeError};
use crate::mark::{LayoutError, MarkLayout};
use crate::policy::{Destinations, EgressIp};
use crate::types::Mark;

/// The text as a value of a type whose own message does not quote it.
fn quoted<T: FromStr, E: de::Error>(text: &str, what: &str) -> Result<T, E> {
    text.parse().map_err(|_| E::custom(format_args!("{text:?} is not {what}")))
}

/// A prefix in the one way to write it: `ipnet` takes leading zeros, octal to other readers.
struct Net(IpNet);

impl<'de> Deserialize<'de> for Net {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let plain = text.split_once('/').is_some_and(|(address, length)| {
            address.parse::<IpAddr>().is_ok() && (length == "0" || !length.starts_with('0'))
        });
        text.parse().ok().filter(|_| plain).map(Self).ok_or_else(|| {
            let what = "is not a prefix such as 10.244.0.0/16, without leading zeros";
            de::Error::custom(format_args!("{text:?} {what}"))
        })
    }
}

/// Prefixes, each in the one way to write it.
pub(crate) fn nets<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<IpNet>, D::Error> {
    let nets = Vec::<Net>::deserialize(deserializer)?;
    Ok(nets.into_iter().map(|net| net.0).collect())
}

impl Serialize for Mark {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Mark {
    /// From text: `0x` and hexadecimal digits, or decimal digits.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let (digits, radix) = match text.strip_prefix("0x") {
            Some(digits) => (digits, 16),
            None => (text.as_str(), 10),
        };
        // `from_str_radix` takes a sign.
        Some(digits)
            .filter(|digits| !digits.starts_with('+'))
            .and_then(|digits| u32::from_str_radix(digits, radix).ok())
            .map(Self::new)
            .ok_or_else(|| {
                let what = "is not a mark: write 0x26000100, or a decimal number, of 32 bits";
                de::Error::custom(format_args!("{text:?} {what}"))
            })
    }
}

#[derive(Serialize, Deserialize)]
#[serde(rename = "MarkLayout", deny_unknown_fields)]
pub(crate) struct LayoutForm {
    prefix: Mark,
    prefix_mask: Mark,
    shift: u8,
    bits: u8,
    #[serde(default = "known_foreign")]
    avoid: Mark,
}

const fn known_foreign() -> Mark {
    Mark::new(MarkLayout::KNOWN_FOREIGN)
}

impl TryFrom<LayoutForm> for MarkLayout {
    type Error = LayoutError;

    fn try_from(form: LayoutForm) -> Result<Self, LayoutError> {
        let (prefix, mask) = (form.prefix.get(), form.prefix_mask.get());
        let layout = Self::new(prefix, mask, form.shift, form.bits)?;
        Ok(layout.with_avoid(form.avoid.get()))
    }
}

impl From<MarkLayout> for LayoutForm {
    fn from(layout: MarkLayout) -> Self {
        Self {
            prefix: Mark::new(layout.prefix()),
            prefix_mask: Mark::new(layout.prefix_mask()),
            shift: layout.shift(),
            bits: layout.bits(),
            avoid: Mark::new(layout.avoid()),
        }
    }
}

#[derive(Serialize, Deserialize)]
#[serde(rename = "TableRange", deny_unknown_fields)]
pub(crate) struct RangeForm {
    start: u32,
    count: u32,
}

impl TryFrom<RangeForm> for TableRange {
    type Error = TableRangeError;

    fn try_from(form: RangeForm) -> Result<Self, TableRangeError> {
        Self::new(form.start, form.count)
    }
}

impl From<TableRange> for RangeForm {
    fn from(range: TableRange) -> Self {
        Self { start: range.start(), count: range.len() - 1 }
    }
}

/// The word that stands for the node's own address.
const NODE: &str = "node";

#[derive(Serialize, Deserialize)]
#[serde(rename = "EgressIp", deny_unknown_fields)]
struct Addresses {
    #[serde(default, deserialize_with = "v4")]
    #[serde(skip_serializing_if = "Option::is_none")]
    v4: Option<Ipv4Addr>,
    #[serde(default, deserialize_with = "v6")]
    #[serde(skip_serializing_if = "Option::is_none")]
    v6: Option<Ipv6Addr>,
}

fn v4<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Ipv4Addr>, D::Error> {
    Option::<String>::deserialize(deserializer)?
        .map(|text| quoted(&text, "an IPv4 address"))
        .transpose()
}

fn v6<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Ipv6Addr>, D::Error> {
    let Some(text) = Option::<String>::deserialize(deserializer)? else {
        return Ok(None);
    };
    let address: Ipv6Addr = quoted(&text, "an IPv6 address")?;
    match address.to_ipv4_mapped() {
        Some(_) => Err(de::Error::custom(format_args!(
            "{text:?} is an IPv4-mapped IPv6 address; write IPv4 addresses as v4"
        ))),
        None => Ok(Some(address)),
    }
}

impl Serialize for EgressIp {
    /// The text `node`, or an object of `v4`, `v6` or both.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let (v4, v6) = match *self {
            Self::Node => return serializer.serialize_str(NODE),
            Self::V4(v4) => (Some(v4), None),
            Self::V6(v6) => (None, Some(v6)),
            Self::Dual(v4, v6) => (Some(v4), Some(v6)),
        };
        Addresses { v4, v6 }.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for EgressIp {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Form;

        impl<'de> Visitor<'de> for Form {
            type Value = EgressIp;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("\"node\" or an object with v4, v6 or both")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<EgressIp, E> {
                match text {
                    NODE => Ok(EgressIp::Node),
                    other => Err(E::invalid_value(de::Unexpected::Str(other), &self)),
                }
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<EgressIp, A::Error> {
                let form = value::MapAccessDeserializer::new(map);
                match Addresses::deserialize(form)? {
                    Addresses { v4: Some(v4), v6: Some(v6) } => Ok(EgressIp::Dual(v4, v6)),
                    Addresses { v4: Some(v4), .. } => Ok(EgressIp::V4(v4)),
                    Addresses { v6: Some(v6), .. } => Ok(EgressIp::V6(v6)),
                    Addresses { .. } => {
                        Err(de::Error::custom("an egress IP needs v4, v6 or both; none is given"))
                    }
                }
            }
        }

        deserializer.deserialize_any(Form)
    }
}

/// The word that stands for every destination that is not excluded.
const EXTERNAL: &str = "external";

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
                f.write_str("\"external\" or a list of prefixes")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Destinations, E> {
                match text {
                    EXTERNAL => Ok(Destinations::External),
                    other => Err(E::invalid_value(de::Unexpected::Str(other), &self)),
                }
            }

            fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<Destinations, A::Error> {
                let form = value::SeqAccessDeserializer::new(list);
                nets(form).map(Destinations::Nets)
            }
        }

        deserializer.deserialize_any(Form)
    }
}

#[cfg(test)]
mod tests {
    use std::fmt::Debug;

    use serde::de::DeserializeOwned;
    use serde_json::{Value, from_value, json, to_value};

    use super::*;
    use crate::{Cluster, EgressPolicy, Node, NodeName, PolicyId, Tunnel};

    #[track_caller]
    fn round_trip<T: Serialize + DeserializeOwned + PartialEq + Debug>(value: &T, form: &Value) {
        assert_eq!(to_value(value).unwrap(), *form);
        assert_eq!(from_value::<T>(form.clone()).unwrap(), *value);
    }

    #[track_caller]
    fn refused<T: DeserializeOwned + Debug>(form: Value, sentence: &str) {
        let error = from_value::<T>(form).unwrap_err().to_string();
        assert_eq!(error, sentence);
    }

    #[test]
    fn marks_are_text() {
        round_trip(&Mark::new(0x2600_0100), &json!("0x26000100"));
        assert_eq!(from_value::<Mark>(json!("256")).unwrap(), Mark::new(256));
        for text in ["", "0x", "+1", "0x+1", "-1", "26g", "0x100000000", "4294967296", " 1"] {
            let what = "is not a mark: write 0x26000100, or a decimal number, of 32 bits";
            refused::<Mark>(json!(text), &format!("{text:?} {what}"));
        }
    }

    #[test]
    fn layouts_and_ranges_are_checked() {
        let seed = json!({
            "prefix": "0x26000000", "prefix_mask": "0xff000000", "shift": 8, "bits": 16,
            "avoid": "0x0000efff",
        });
        round_trip(&MarkLayout::SEED, &seed);
        round_trip(
            &MarkLayout::COMPACT.with_avoid(0),
            &json!({
                "prefix": "0x00000000", "prefix_mask": "0x00000000", "shift": 22, "bits": 8,
                "avoid": "0x00000000",
            }),
        );
        refused::<MarkLayout>(
            json!({"prefix": "0", "prefix_mask": "0", "shift": 30, "bits": 8}),
            "8 value bits at bit 30 do not fit: a layout has 1 to 16 of them below bit 32",
        );
        round_trip(&TableRange::default(), &json!({"start": 3000, "count": 100}));
        refused::<TableRange>(
            json!({"start": 200, "count": 100}),
            "tables 200 to 300 include 253, which is the kernel's",
        );
    }

    #[test]
    fn egress_ips_are_node_or_addresses() {
        let (v4, v6) = ("198.51.100.200", "2001:db8:51::200");
        let parsed = (v4.parse().unwrap(), v6.parse().unwrap());
        round_trip(&EgressIp::Node, &json!("node"));
        round_trip(&EgressIp::V4(parsed.0), &json!({"v4": v4}));
        round_trip(&EgressIp::V6(parsed.1), &json!({"v6": v6}));
        round_trip(&EgressIp::Dual(parsed.0, parsed.1), &json!({"v4": v4, "v6": v6}));
        let refused = |form, sentence| refused::<EgressIp>(form, sentence);
        refused(json!({}), "an egress IP needs v4, v6 or both; none is given");
        refused(json!({"v4": null}), "an egress IP needs v4, v6 or both; none is given");
        refused(json!({"v6": v4}), "\"198.51.100.200\" is not an IPv6 address");
        refused(json!({"v4": v6}), "\"2001:db8:51::200\" is not an IPv4 address");
        refused(
            json!({"v6": "::ffff:198.51.100.200"}),
            "\"::ffff:198.51.100.200\" is an IPv4-mapped IPv6 address; \
             write IPv4 addresses as v4",
        );
        refused(json!({"v5": v4}), "unknown field `v5`, expected `v4` or `v6`");
        refused(
            json!("nodes"),
            "invalid value: string \"nodes\", expected \"node\" or an object with v4, v6 or both",
        );
    }

    #[test]
    fn prefixes_are_written_in_one_way() {
        let nets = Destinations::Nets(vec!["0.0.0.0/0".parse().unwrap(), "::/0".parse().unwrap()]);
        round_trip(&nets, &json!(["0.0.0.0/0", "::/0"]));
        for text in ["010.0.0.0/8", "10.0.0.0/08", "10.0.0.0/+8", "10.0.0.0", "10.0.0.0/33", ""] {
            let what = "is not a prefix such as 10.244.0.0/16, without leading zeros";
            refused::<Destinations>(json!([text]), &format!("{text:?} {what}"));
        }
    }

    #[test]
    fn policies_and_clusters_read_back() {
        let policy = EgressPolicy {
            gateway: Some(NodeName::new("b").unwrap()),
            destinations: Destinations::Nets(vec!["198.51.100.0/24".parse().unwrap()]),
            ..EgressPolicy::new(
                PolicyId::new("default/p1").unwrap(),
                vec!["10.244.1.10/32".parse().unwrap()],
                EgressIp::Node,
            )
        };
        round_trip(
            &policy,
            &json!({
                "id": "default/p1", "priority": 0, "sources": ["10.244.1.10/32"],
                "destinations": ["198.51.100.0/24"], "gateway": "b", "egress_ip": "node", "unavailable": "drop",
            }),
        );
        let short = json!({"id": "p", "sources": ["10.244.1.10/32"], "egress_ip": "node"});
        let read: EgressPolicy = from_value(short).unwrap();
        assert_eq!(read.destinations, Destinations::External);
        assert_eq!((read.priority, read.gateway), (0, None));
        round_trip(&Destinations::External, &json!("external"));

        let node = Node {
            mark: Some(Mark::new(0x2600_0100)),
            ..Node::new(
                NodeName::new("a").unwrap(),
                vec!["10.10.0.11".parse().unwrap()],
                vec!["172.31.0.11/16".parse().unwrap()],
            )
        };
        let excluded = vec!["10.244.0.0/16".parse().unwrap()];
        let cluster = Cluster::new(node.name.clone(), vec![node], excluded);
        let form = to_value(&cluster).unwrap();
        assert_eq!(from_value::<Cluster>(form).unwrap(), cluster);
        assert_eq!(from_value::<Tunnel>(json!({})).unwrap(), Tunnel::default());
        refused::<Tunnel>(
            json!({"vnid": 7}),
            "unknown field `vnid`, expected one of `device`, `vni`, `port`, `underlay_device`, \
             `underlay_mtu`",
        );
        let short = json!({"node": "a", "nodes": [], "excluded": []});
        let read: Cluster = from_value(short).unwrap();
        assert_eq!((read.rule_priority, read.marks), (101, MarkLayout::SEED));
    }
}
