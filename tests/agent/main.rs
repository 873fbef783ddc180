//! The agent's command line: what it refuses, with which sentence, and a whole life in a network
//! namespace.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test says what it expects"
)]

#[macro_use]
extern crate harness;

use std::path::PathBuf;
use std::process::{Command, ExitCode, Output};
use std::sync::atomic::{AtomicU32, Ordering};

use egress_datapath::testing::lab;
use serde_json::{Value, json};

mod life;

use common::in_netns;

/// In a network namespace of its own where there can be one.
fn main() -> ExitCode {
    harness::main(|| drop(lab::isolate()))
}

/// The agent beside this test: `target/<profile>/examples/agent`.
fn agent() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let profile = test.ancestors().nth(2).unwrap();
    let agent = profile.join("examples").join("agent");
    assert!(
        agent.exists(),
        "{} is not built: run `cargo build --example agent --features serde`, for this profile",
        agent.display()
    );
    agent
}

fn run(arguments: &[&str]) -> (Option<i32>, String, String) {
    let Output { status, stdout, stderr } = Command::new(agent()).args(arguments).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (status.code(), text(stdout), text(stderr))
}

/// A file that is gone when the test is over.
struct File(PathBuf);

impl File {
    fn new(text: &str) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("egress-agent-{}-{number}.json", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::write(&path, text).unwrap();
        Self(path)
    }

    fn path(&self) -> &str {
        self.0.to_str().unwrap()
    }
}

impl Drop for File {
    fn drop(&mut self) {
        let _gone = std::fs::remove_file(&self.0);
    }
}

fn good() -> Value {
    json!({
        "excluded": ["10.244.0.0/16", "fd44::/16"],
        "tunnel": {"device": "egress.vxlan", "vni": 100, "port": 7789},
        "marks": {
            "prefix": "0x26000000", "prefix_mask": "0xff000000", "shift": 8, "bits": 16,
        },
        "tables": {"start": 3000, "count": 100},
        "rule_priority": 101,
        "nodes": [
            {
                "name": "a", "underlay": ["10.10.0.11", "fd10::11"],
                "tunnel": ["172.31.0.11/16", "fd11::11/112"],
                "mac": "66:f7:06:23:81:6b", "mark": "0x26000100",
            },
            {"name": "b", "underlay": ["10.10.0.12"], "tunnel": ["172.31.0.12/16"]},
        ],
        "policies": [{
            "id": "default/p1", "priority": 0, "sources": ["10.244.1.10", "fd44:1::10/128"],
            "destinations": ["198.51.100.0/24"], "gateway": "b",
            "egress_ip": {"v4": "203.0.113.200", "v6": "2001:db8:51::200"},
        }],
    })
}

/// The sentence about a file, without the place in it.
#[track_caller]
fn refusal(node: &str, text: &str) -> String {
    let file = File::new(text);
    let (code, out, message) = run(&["plan", "--node", node, "--cluster", file.path()]);
    assert_eq!((code, out.as_str()), (Some(2), ""), "{message}");
    assert_eq!(message.lines().count(), 1, "{message}");
    let tail = message.strip_prefix("agent: ").and_then(|m| m.strip_prefix(file.path())).unwrap();
    tail.trim_start_matches(|c: char| c.is_ascii_digit() || c == ':').trim().to_owned()
}

/// The good file with one value changed, or removed if null.
fn changed(pointer: &str, value: Value) -> String {
    let mut file = good();
    let (parent, key) = pointer.rsplit_once('/').unwrap();
    match file.pointer_mut(parent).unwrap() {
        Value::Object(fields) if value.is_null() => drop(fields.remove(key)),
        Value::Object(fields) => drop(fields.insert(key.into(), value)),
        Value::Array(list) => list[key.parse::<usize>().unwrap()] = value,
        other => panic!("{other}"),
    }
    file.to_string()
}

#[track_caller]
fn refused(pointer: &str, value: Value, sentence: &str) {
    assert_eq!(refusal("a", &changed(pointer, value)), sentence);
}

#[test]
fn values_of_the_wrong_type_name_their_field() {
    refused("/excluded", json!("x"), "excluded: invalid type: string \"x\", expected a sequence");
    refused(
        "/tunnel/port",
        json!(70_000),
        "tunnel.port: invalid value: integer `70000`, expected u16",
    );
    refused("/tunnel/vni", json!(-1), "tunnel.vni: invalid value: integer `-1`, expected u32");
    refused(
        "/nodes/0/mark",
        json!(7),
        "nodes[0].mark: invalid type: integer `7`, expected a string",
    );
}

#[test]
fn fields_that_are_missing_unknown_or_twice() {
    let unknown = "unknown field `x`, expected";
    for (place, path) in [
        ("", "x"),
        ("/tunnel", "tunnel.x"),
        ("/marks", "marks.x"),
        ("/tables", "tables.x"),
        ("/nodes/1", "nodes[1].x"),
    ] {
        let sentence = refusal("a", &changed(&format!("{place}/x"), json!(1)));
        assert!(sentence.starts_with(&format!("{path}: {unknown}")), "{sentence}");
    }
    for (pointer, sentence) in [
        ("/excluded", "missing field `excluded`"),
        ("/nodes", "missing field `nodes`"),
        ("/policies", "missing field `policies`"),
        ("/nodes/1/name", "nodes[1]: missing field `name`"),
        ("/nodes/1/tunnel", "nodes[1]: missing field `tunnel`"),
        ("/marks/bits", "marks: missing field `bits`"),
    ] {
        refused(pointer, Value::Null, sentence);
    }
    let twice = good().to_string().replacen("\"vni\"", "\"port\":1,\"vni\"", 1);
    assert_eq!(refusal("a", &twice), "tunnel: duplicate field `port`");
}

#[test]
fn texts_that_are_not_what_they_should_be() {
    let address = "not an IP address, which has no leading zeros";
    for (pointer, text, why) in [
        ("/excluded/0", "010.0.0.0/8", address),
        ("/excluded/0", "10.0.0.0/08", "\"08\" is not a prefix length of 0 to 32"),
        ("/excluded/0", "10.244.0.0", "a prefix needs a length, such as 10.244.0.0/16"),
        ("/nodes/0/tunnel/0", "172.31.0.11", "a prefix needs a length, such as 10.244.0.0/16"),
        ("/nodes/0/underlay/0", "eth0", "invalid IP address syntax"),
        ("/nodes/0/name", "", "a node name cannot be empty"),
        (
            "/tunnel/device",
            "egress.vxlan.100",
            "a device name has at most 15 bytes, this one has 16",
        ),
    ] {
        let parts = pointer.split('/').skip(1).map(|part| match part.parse::<usize>() {
            Ok(index) => format!("[{index}]"),
            Err(_) => format!(".{part}"),
        });
        let path: Vec<_> = parts.collect();
        let path = path.concat().trim_start_matches('.').to_owned();
        refused(pointer, json!(text), &format!("{path}: {text:?}: {why}"));
    }
    refused(
        "/nodes/0/mac",
        json!("66:f7"),
        "nodes[0].mac: \"66:f7\" is not an Ethernet address such as 66:f7:06:23:81:6b",
    );
    let what = "is not a mark: write 0x26000100, or a decimal number, of 32 bits";
    refused("/nodes/0/mark", json!("0x2g"), &format!("nodes[0].mark: \"0x2g\" {what}"));
    refused("/marks/prefix", json!("-1"), &format!("marks.prefix: \"-1\" {what}"));
}

#[test]
fn values_that_contradict_each_other_or_the_kernel() {
    for (pointer, value, sentence) in [
        (
            "/marks/bits",
            json!(17),
            "marks: 17 value bits at bit 8 do not fit: a layout has 1 to 16 of them below bit 32"
                .to_owned(),
        ),
        (
            "/marks/prefix",
            json!("0"),
            "marks: a prefix of zero under mask 0xff000000 is what unmarked packets carry".into(),
        ),
        (
            "/tables/start",
            json!(200),
            "tables: tables 200 to 300 include 253, which is the kernel's".into(),
        ),
        (
            "/tunnel/vni",
            json!(0),
            "tunnel.vni: VXLAN network identifier 0 is not between 1 and 16777215".into(),
        ),
        ("/tunnel/port", json!(0), "tunnel.port: the tunnel needs a UDP port other than 0".into()),
        (
            "/rule_priority",
            json!(32_766),
            "rule_priority: rule priority 32766 is not between 1 and 32761".into(),
        ),
        (
            "/excluded",
            json!([]),
            "excluded: no excluded prefix is given: name at least the prefix of the pods".into(),
        ),
        (
            "/nodes/0/tunnel",
            json!([]),
            "nodes: node a, this one, has no usable addresses: it has no tunnel address".into(),
        ),
    ] {
        refused(pointer, value, &sentence);
    }
    assert_eq!(
        refusal("z", &good().to_string()),
        "--node: node z is not in the cluster's list of nodes"
    );
}

#[test]
fn texts_that_are_no_json() {
    assert_eq!(refusal("a", "{\"excluded\": [}"), "expected value");
    assert_eq!(refusal("a", ""), "EOF while parsing a value");
    assert_eq!(refusal("a", &format!("{}}}", good())), "trailing characters");
    let (code, _, message) = run(&["apply", "--node", "a", "--cluster", "/nowhere.json"]);
    assert_eq!(code, Some(2));
    assert_eq!(message, "agent: --cluster /nowhere.json: No such file or directory (os error 2)\n");
}

#[test]
fn a_file_with_only_what_it_needs_passes_the_checks() {
    // Nothing is left to refuse but that no device has the address.
    let minimal = json!({
        "excluded": ["10.244.0.0/16"],
        "nodes": [{"name": "a", "underlay": ["192.0.2.77"], "tunnel": ["172.31.0.11/16"]}],
        "policies": [
            {"id": "p", "sources": ["10.244.1.10"], "gateway": null, "egress_ip": "node"},
            {"id": "q", "sources": ["0.0.0.0/0"], "destinations": [], "egress_ip": {"v6": "2001:db8::1"}},
        ],
    });
    in_netns(move || {
        let no_device = "nodes[0].underlay[0]: no interface has the address 192.0.2.77";
        assert_eq!(refusal("a", &minimal.to_string()), no_device);
        let mut other = minimal.clone();
        other["tunnel"] = json!({"underlay_device": "eth9"});
        let unknown = "tunnel.underlay_device: no interface is named \"eth9\"";
        assert_eq!(refusal("a", &other.to_string()), unknown);
    });
}

#[test]
fn command_lines_that_cannot_be_meant() {
    for (arguments, sentence) in [
        (&[][..], "Usage: agent <COMMAND>"),
        (&["aply"], "unrecognized subcommand 'aply'"),
        (&["plan"], "--node <NAME>"),
        (&["plan", "--node", "a"], "--cluster <FILE.json>"),
        (&["plan", "--node"], "a value is required for '--node <NAME>'"),
        (&["plan", "--node", "a", "--node", "b"], "cannot be used multiple times"),
        (&["apply", "--force"], "unexpected argument '--force' found"),
        (&["plan", "--backend", "ebtables"], "expected nftables, iptables-legacy, iptables-nft or"),
        (&["plan", "--as-shell", "--json"], "cannot be used with"),
        (&["show", "--yaml"], "unexpected argument '--yaml' found"),
        (&["remove", "all"], "unexpected argument 'all' found"),
        (&["explain", "--node", "a", "--cluster", "x", "--from", "10.0.0.1"], "--to <ADDRESS"),
        (&["plan", "--node", "a b"], "a node name cannot contain ' ' (at byte 1)"),
    ] {
        let (code, out, message) = run(arguments);
        assert_eq!((code, out.as_str()), (Some(2), ""), "{arguments:?}");
        assert!(message.contains(sentence), "{message}");
    }
    let (code, out, _) = run(&["--help"]);
    assert_eq!(code, Some(0));
    for part in ["apply", "takeover", "Exit status: 0", "CAP_NET_ADMIN", "--version"] {
        assert!(out.contains(part), "{part} in {out}");
    }
    let (code, out, _) = run(&["--version"]);
    assert_eq!((code, out), (Some(0), format!("agent {}\n", env!("CARGO_PKG_VERSION"))));
}
