//! Tests of the parser of the agent's file with damaged input.
//!
//! A file is parsed or refused with one sentence; a parsed file is planned or refused.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test says what it expects"
)]

#[macro_use]
extern crate harness;

mod config;

use std::collections::BTreeSet;

use egress_datapath::alloc::{MarkPool, TablePool};
use egress_datapath::{
    Changes, Datapath, Destinations, EgressIp, MarkLayout, NodeName, Sim, State, plan,
};
use harness::mutate::{self, Random};

use config::Config;
use serde_json::{Value, json};

const GOOD: &str = r#"{
  "excluded": ["10.244.0.0/16", "fd44::/16"],
  "tunnel": {"device": "egress.vxlan", "vni": 100, "port": 7789, "underlay_device": "eth0",
    "underlay_mtu": 1500},
  "marks": {"prefix": "0x26000000", "prefix_mask": "0xff000000", "shift": 8, "bits": 16},
  "tables": {"start": 3000, "count": 100},
  "rule_priority": 101,
  "nodes": [
    {"name": "a", "underlay": ["10.10.0.11", "fd10::11"],
     "tunnel": ["172.31.0.11/16", "fd11::11/112"],
     "mac": "66:f7:06:23:81:6b", "mark": "0x26000100"},
    {"name": "b", "underlay": ["10.10.0.12"], "tunnel": ["172.31.0.12/16"]}
  ],
  "policies": [
    {"id": "default/p1", "priority": 0, "sources": ["10.244.1.10", "fd44:1::10/128"],
     "destinations": ["198.51.100.0/24"], "gateway": "b", "unavailable": "bypass",
     "egress_ip": {"v4": "203.0.113.200", "v6": "2001:db8:51::200"}},
    {"id": "p2", "sources": ["10.244.0.0/16"], "gateway": "a", "egress_ip": "node"}
  ]
}"#;

const SHORT: &str = r#"{"excluded":["0.0.0.0/0"],"nodes":[{"name":"a","underlay":["1.2.3.4"],"tunnel":["1.2.3.5/0"]}],"policies":[]}"#;

/// Values that a user or an attacker might write.
const VALUES: [&str; 34] = [
    "null",
    "true",
    "-0",
    "-1",
    "0",
    "1e999",
    "1.5",
    "255",
    "256",
    "65536",
    "4294967295",
    "4294967296",
    "18446744073709551616",
    "[]",
    "{}",
    "[[[[[[]]]]]]",
    "\"\"",
    "\"node\"",
    "\"0.0.0.0/0\"",
    "\"::/0\"",
    "\"10.0.0.0/33\"",
    "\"10.0.0.0/+8\"",
    "\"010.0.0.0/8\"",
    "\"::ffff:1.2.3.4/128\"",
    "\"::ffff:1.2.3.4\"",
    "\"255.255.255.255\"",
    "\"ff02::1\"",
    "\"0xffffffff\"",
    "\"0x\"",
    "\"+1\"",
    "\"\\u0000\\ud83d\\ude00\"",
    "\"\\ud800\"",
    "\"\u{202e}\u{fc}\"",
    "{\"v4\":\"1.2.3.4\",\"v4\":\"1.2.3.4\"}",
];

/// Replaces values of a file, and sometimes also damages bytes.
fn damaged(random: &mut Random, corpus: &[Vec<u8>]) -> Vec<u8> {
    if random.one_in(3) {
        return random.damaged(corpus);
    }
    let mut text = corpus[random.below(corpus.len())].clone();
    for _ in 0..=random.below(3) {
        if random.one_in(2) {
            let digits: Vec<usize> =
                (0..text.len()).filter(|at| text[*at].is_ascii_hexdigit()).collect();
            if let Some(at) = digits.get(random.below(digits.len())) {
                text[*at] = b"0123456789af:."[random.below(14)];
            }
            continue;
        }
        // A value is between two of these bytes; so is a key, or a part of a list.
        let is_edge = |byte: &u8| b",:[]{}".contains(byte);
        let edges: Vec<usize> =
            (0..text.len()).filter(|at| text.get(*at).is_some_and(is_edge)).collect();
        let Some(start) = edges.get(random.below(edges.len())).map(|at| at + 1) else { break };
        let ends = edges.iter().copied().filter(|end| *end >= start);
        let end = ends.take(1 + random.below(3)).last().unwrap_or(start);
        let value = random.pick(&VALUES);
        let number = random.edge().to_string();
        let value = if random.one_in(4) { number.as_str() } else { value };
        let times = if random.one_in(32) { 200 } else { 1 };
        text.splice(start..end, vec![value; times].join(",").into_bytes());
    }
    if random.one_in(8) { random.damaged(&[text]) } else { text }
}

#[test]
fn mutated_files_of_the_agent() {
    let corpus = [GOOD, SHORT].map(|text| text.as_bytes().to_vec());
    let marks = MarkPool::new(MarkLayout::SEED);
    mutate::bytes("agent's file", 64, &corpus, damaged, |input| {
        let text = String::from_utf8_lossy(input);
        let config = match Config::parse(NodeName::new("a").unwrap(), "file", &text) {
            Ok(config) => config,
            Err(sentence) => {
                assert!(sentence.starts_with("file:"), "{sentence}");
                assert!(!sentence.chars().any(char::is_control), "{sentence:?}");
                return None;
            }
        };
        for one in &config.unreadable {
            assert!(config.policies.iter().any(|policy| policy.id == one.policy), "{one}");
            assert!(!one.to_string().chars().any(char::is_control), "{one}");
        }
        assert!(config.underlay().is_none_or(|(_, field)| field.starts_with("nodes[")));
        let mut tables = TablePool::new(config.tables).with_start(u32::MAX);
        match plan(&config.cluster, &config.policies, &mut marks.clone(), &mut tables) {
            Ok(planned) => {
                let mut kernel = Sim::new();
                kernel.apply(&Changes::between(&State::default(), &planned.state)).unwrap();
                assert_eq!(kernel.state(), &planned.state);
            }
            Err(error) => {
                assert!(!Config::field_of(&error).is_empty());
                assert!(!error.to_string().is_empty());
            }
        }
        Some(held(&config))
    });
}

fn parse(file: &Value) -> Config {
    Config::parse(NodeName::new("a").unwrap(), "file", &file.to_string()).unwrap()
}

/// The good file with one value changed, added, or removed if null.
fn changed(pointer: &str, value: Value) -> Value {
    let mut file: Value = serde_json::from_str(GOOD).unwrap();
    let (parent, key) = pointer.rsplit_once('/').unwrap();
    match file.pointer_mut(parent).unwrap() {
        Value::Object(fields) if value.is_null() => drop(fields.remove(key)),
        Value::Object(fields) => drop(fields.insert(key.into(), value)),
        Value::Array(list) => list[key.parse::<usize>().unwrap()] = value,
        other => panic!("{other}"),
    }
    file
}

/// Checks the sentence about the first policy, changed; the second one is as it was.
#[track_caller]
fn unreadable(pointer: &str, value: Value, sentence: &str) {
    let config = parse(&changed(pointer, value));
    let [one] = config.unreadable.as_slice() else { panic!("{:?}", config.unreadable) };
    let (policy, told) = (one.policy.as_str(), one.to_string());
    let named = if pointer.ends_with("/id") { "policies/0" } else { "default/p1" };
    assert_eq!(policy, named);
    let told = told.strip_prefix(&format!("policy {policy} leaves its traffic unchanged: file:1:"));
    let told = told.unwrap().trim_start_matches(|c: char| c.is_ascii_digit());
    assert!(told.starts_with(&format!(": policies[0]{sentence}")), "{told}");
    let mut ids: Vec<_> = config.policies.iter().map(|policy| policy.id.as_str()).collect();
    ids.sort_unstable();
    assert_eq!(ids, if named == "default/p1" { [named, "p2"] } else { ["p2", named] });
}

#[test]
fn policies_that_cannot_be_read() {
    let address = "not an IP address, which has no leading zeros";
    let length = |text: &str| format!("{text:?} is not a prefix length of 0 to 32");
    for (source, why) in [
        ("010.0.0.0/8", address.to_owned()),
        ("10.0.0.0.0", address.to_owned()),
        ("", address.to_owned()),
        ("10.0.0.0/08", length("08")),
        ("10.0.0.0/+8", length("+8")),
        ("10.0.0.0/", length("")),
        ("10.0.0.0/33", length("33")),
    ] {
        let sentence = format!(".sources[0]: {source:?}: {why}");
        unreadable("/policies/0/sources/0", json!(source), &sentence);
    }
    let no_string = ".sources[1]: invalid type: integer `5`, expected a string";
    unreadable("/policies/0/sources/1", json!(5), no_string);
    unreadable(
        "/policies/0/destinations/0",
        json!("::/129"),
        ".destinations[0]: \"::/129\": \"129\" is not a prefix length of 0 to 128",
    );
    unreadable(
        "/policies/0/gateway",
        json!("b c"),
        ".gateway: \"b c\": a node name cannot contain ' ' (at byte 1)",
    );
    let id = ".id: \"p;q\": a policy id cannot contain ';' (at byte 1)";
    unreadable("/policies/0/id", json!("p;q"), id);
    unreadable("/policies/0/id", Value::Null, ": missing field `id`");
    unreadable("/policies/0/x", json!(1), ".x: unknown field `x`, expected");
    let eip = "/policies/0/egress_ip";
    unreadable(eip, Value::Null, ": missing field `egress_ip`");
    unreadable(&format!("{eip}/x"), json!(1), ".egress_ip.x: unknown field `x`, expected");
    let none = ".egress_ip: an egress IP needs v4, v6 or both; none is given";
    unreadable(eip, json!({}), none);
    unreadable(
        eip,
        json!("nodes"),
        ".egress_ip: invalid value: string \"nodes\", \
         expected \"node\" or an object with v4, v6 or both",
    );
    for (form, why) in [
        (json!({"v6": "203.0.113.200"}), "v6: \"203.0.113.200\" is not an IPv6 address"),
        (json!({"v4": "2001:db8::1"}), "v4: \"2001:db8::1\" is not an IPv4 address"),
        (
            json!({"v6": "::ffff:203.0.113.200"}),
            "v6: \"::ffff:203.0.113.200\" is an IPv4-mapped IPv6 address; \
             write IPv4 addresses as v4",
        ),
    ] {
        unreadable(eip, form, &format!(".egress_ip.{why}"));
    }
}

#[test]
fn of_an_unreadable_policy_what_can_be_read_is_closed() {
    let closed = |text: &str| {
        let list =
            format!("[{{\"id\": \"p2\", \"sources\": [], \"egress_ip\": \"node\"}},\n  {text}]");
        let mut file: Value = serde_json::from_str(GOOD).unwrap();
        file["policies"] = Value::Null;
        let text = file.to_string().replace("\"policies\":null", &format!("\"policies\":{list}"));
        let config = Config::parse(NodeName::new("a").unwrap(), "file", &text).unwrap();
        assert_eq!(config.unreadable.len(), 1);
        assert!(config.unreadable[0].to_string().contains(": file:2:"), "{:?}", config.unreadable);
        let policy = config.policies.last().unwrap().clone();
        assert_eq!((policy.gateway, policy.egress_ip), (None, EgressIp::Node));
        let sources: Vec<_> = policy.sources.iter().map(ToString::to_string).collect();
        (policy.id.to_string(), policy.priority, sources.join(" "), policy.destinations)
    };
    let list = Destinations::Nets(vec!["192.0.2.0/24".parse().unwrap()]);
    let all = Destinations::External;
    for (text, id, priority, sources, destinations) in [
        (
            r#"{"id":"q","priority":7,"sources":["10.0.0.1",5,"x","10.0.0.0/24"],"destinations":["192.0.2.0/24"]}"#,
            "q",
            7,
            "10.0.0.1/32 10.0.0.0/24",
            &list,
        ),
        // What occurs twice may be either of the two.
        (
            r#"{"id":"q","sources":["10.0.0.1"],"priority":7,"priority":8,"sources":"10.0.0.2"}"#,
            "q",
            0,
            "10.0.0.1/32 10.0.0.2/32",
            &all,
        ),
        (r#"{"id":"q","id":"r","sources":["10.0.0.1"]}"#, "policies/1", 0, "10.0.0.1/32", &all),
        (r#"{"destinations":["192.0.2.0/24","y"]}"#, "policies/1", 0, "", &all),
        (r#"{"id":"q","sources":["10.0.0.1"],"destinations":[]}"#, "q", 0, "10.0.0.1/32", &all),
        ("5", "policies/1", 0, "", &all),
        ("null", "policies/1", 0, "", &all),
    ] {
        let (id, sources) = (id.to_owned(), sources.to_owned());
        assert_eq!(closed(text), (id, priority, sources, destinations.clone()), "{text}");
    }
    // A name made from the place is no other policy's.
    let mut file: Value = serde_json::from_str(GOOD).unwrap();
    file["policies"][0]["id"] = json!("policies/1");
    file["policies"][1]["id"] = json!(5);
    let ids: Vec<_> = parse(&file).policies.iter().map(|policy| policy.id.to_string()).collect();
    assert_eq!(ids, ["policies/1", "policies/1#"]);
}

#[test]
fn underlay_mtu_is_that_of_the_file_or_the_default() {
    for (value, said, planned) in [(json!(9000), Some(9000), 9000), (json!(null), None, 1500)] {
        let config = parse(&changed("/tunnel/underlay_mtu", value));
        let planned_mtu = config.cluster.tunnel.underlay_mtu;
        assert_eq!((config.underlay_mtu, planned_mtu), (said, planned));
    }
}

#[test]
fn schema_has_the_fields_of_the_file() {
    let schema: Value = serde_json::from_str(include_str!("../../src/guide/schema.json")).unwrap();
    for (name, place) in [
        ("AgentFile", ""),
        ("AgentTunnel", "/tunnel"),
        ("Node", "/nodes/0"),
        ("AgentPolicy", "/policies/0"),
    ] {
        let file = changed(&format!("{place}/?"), json!(0)).to_string();
        let error = match Config::parse(NodeName::new("a").unwrap(), "file", &file) {
            Ok(config) => config.unreadable[0].to_string(),
            Err(sentence) => sentence,
        };
        let (_, known) = error.split_once("unknown field `?`, expected one of ").unwrap();
        let known: BTreeSet<_> = known.split('`').skip(1).step_by(2).collect();
        let described = schema["$defs"][name]["properties"].as_object().unwrap();
        assert_eq!(known, described.keys().map(String::as_str).collect(), "{name}");
    }
}

/// Returns the bytes of memory that the lists of a file take.
fn held(config: &Config) -> usize {
    let nodes = config.cluster.nodes.iter();
    let nodes =
        nodes.map(|node| size_of_val(node) + 33 * (node.underlay.len() + node.tunnel.len()));
    let policies = config.policies.iter();
    let policies = policies.map(|policy| {
        size_of_val(policy) + size_of_val(policy.sources.as_slice()) + policy.id.as_str().len()
    });
    nodes.sum::<usize>() + policies.sum::<usize>()
}

fn main() -> std::process::ExitCode {
    harness::main(|| ())
}
