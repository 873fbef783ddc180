//! Shared helpers of the serialized forms: parsed strings and CIDR prefixes.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::de::{Deserialize, Deserializer, Error};

/// Deserializes a string and parses it; an error quotes the string and names the reason.
pub(crate) fn parsed<'de, D: Deserializer<'de>, T>(
    deserializer: D,
    parse: impl FnOnce(&str) -> Result<T, &'static str>,
) -> Result<T, D::Error> {
    let text = String::deserialize(deserializer)?;
    parse(&text).map_err(|why| D::Error::custom(format_args!("{text:?} {why}")))
}

/// A CIDR prefix without leading zeros, which `ipnet` accepts and other parsers read as octal.
struct Net(IpNet);

impl<'de> Deserialize<'de> for Net {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let is_plain = |(address, length): (&str, &str)| {
            address.parse::<IpAddr>().is_ok() && (length == "0" || !length.starts_with('0'))
        };
        parsed(deserializer, |text| {
            let net = text.parse().ok().filter(|_| text.split_once('/').is_some_and(is_plain));
            net.map(Self).ok_or("is not a prefix such as 10.244.0.0/16, without leading zeros")
        })
    }
}

/// Deserializes a CIDR prefix without leading zeros.
pub(crate) fn net<'de, D: Deserializer<'de>>(deserializer: D) -> Result<IpNet, D::Error> {
    Net::deserialize(deserializer).map(|net| net.0)
}

/// Deserializes CIDR prefixes without leading zeros.
pub(crate) fn nets<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<IpNet>, D::Error> {
    Ok(Vec::<Net>::deserialize(deserializer)?.into_iter().map(|net| net.0).collect())
}

#[cfg(test)]
mod tests {
    use std::fmt::Debug;

    use serde::Serialize;
    use serde::de::DeserializeOwned;
    use serde_json::{Value, from_value, json, to_value};

    use crate::alloc::TableRange;
    use crate::{
        Backend, Cluster, Destinations, EgressIp, EgressPolicy, Mark, MarkLayout, Node, NodeName,
        PolicyId, Tunnel,
    };

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
            json!([v4]),
            "invalid type: sequence, expected \"node\" or an object with v4, v6 or both",
        );
        refused(
            json!("nodes"),
            "invalid value: string \"nodes\", expected \"node\" or an object with v4, v6 or both",
        );
    }

    #[test]
    fn prefixes_are_written_in_one_way() {
        refused::<Destinations>(
            json!("internal"),
            "invalid value: string \"internal\", expected \"external\" or a list of prefixes",
        );
        refused::<Destinations>(
            json!({}),
            "invalid type: map, expected \"external\" or a list of prefixes",
        );
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
             `underlay_only`, `underlay_mtu`, `clamp_mss`",
        );
        refused::<Backend>(
            json!({"iptables": {"variant": "nft", "acept": true}}),
            "unknown field `acept`, expected one of `variant`, `accept`, `weave`",
        );
        let short = json!({"node": "a", "nodes": [], "excluded": []});
        let read: Cluster = from_value(short).unwrap();
        assert_eq!((read.rule_priority, read.marks), (101, MarkLayout::SEED));
    }
}
