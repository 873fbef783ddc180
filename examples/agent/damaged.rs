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

use egress_datapath::{
    Changes, Datapath, MarkLayout, MarkPool, NodeName, Sim, State, TablePool, plan,
};
use harness::mutate::{self, Random};

use config::Config;

const GOOD: &str = r#"{
  "excluded": ["10.244.0.0/16", "fd44::/16"],
  "tunnel": {"device": "egress.vxlan", "vni": 100, "port": 7789, "underlay_device": "eth0"},
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
        assert!(config.underlay().is_none_or(|(_, field)| field.starts_with("nodes[")));
        let mut tables = TablePool::new(config.tables).with_start(u32::MAX);
        match plan(&config.cluster, &config.policies, &mut marks.clone(), &mut tables) {
            Ok(planned) => {
                let mut kernel = Sim::new();
                kernel.apply(&Changes::between(&State::default(), &planned.state)).unwrap();
                assert_eq!(kernel.state(), &planned.state);
            }
            Err(error) => {
                assert!(!config.field_of(&error).is_empty());
                assert!(!error.to_string().is_empty());
            }
        }
        Some(held(&config))
    });
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
