//! The JSON Schema of the guide, held to what the crate reads and writes.
//!
//! Where the schema is open for fields that are added later, it is closed here, so that a field
//! without a description is a failure.

use std::collections::{BTreeMap, BTreeSet};

use egress_datapath::alloc::{MarkPool, TablePool, TableRange};
use egress_datapath::datapath::Counts;
use egress_datapath::event::{Component, Process};
use egress_datapath::explain::{Fate, Packet, explain_received};
use egress_datapath::iptables::{Iptables, Variant};
use egress_datapath::preflight::Problem;
use egress_datapath::sim::SharedSim;
use egress_datapath::{
    Backend, ChangeEvents, Claim, Cluster, Count, Datapath, EgressIp, EgressPolicy, Error, Family,
    KernelError, MarkLayout, Node, NodeName, PolicyCount, Reconciler, Sim, Tunnel, Unavailable,
    explain, plan,
};
use jsonschema::Validator;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, from_str, from_value, json, to_value};

const SCHEMA: &str = include_str!("../../../src/guide/schema.json");
const GUIDE: &str = include_str!("../../../src/guide/json.md");
const TROUBLESHOOTING: &str = include_str!("../../../src/guide/troubleshooting.md");

/// The types that are whole documents.
const DOCUMENTS: [&str; 14] = [
    "AgentFile",
    "ChangeEvents",
    "Changes",
    "Cluster",
    "EgressPolicy",
    "Error",
    "Finding",
    "KernelError",
    "PolicyCount",
    "Problem",
    "Report",
    "Summary",
    "TableRange",
    "Trace",
];

fn definitions() -> Value {
    from_str::<Value>(SCHEMA).unwrap()["$defs"].take()
}

/// Calls a function with each subschema and its place.
fn each(schema: &mut Value, place: &str, call: &mut impl FnMut(&mut Value, &str)) {
    call(schema, place);
    match schema {
        Value::Object(fields) => {
            for (name, field) in fields {
                each(field, &format!("{place}/{name}"), call);
            }
        }
        Value::Array(items) => items.iter_mut().for_each(|item| each(item, place, call)),
        _ => {}
    }
}

/// Returns the validator of a type, without room for further fields.
fn validator(name: &str) -> Validator {
    let mut definitions = definitions();
    assert!(definitions[name].is_object(), "the schema has no {name}");
    each(&mut definitions, "", &mut |schema, _| {
        if schema["type"] == "object" && schema["properties"].is_object() {
            schema["additionalProperties"] = json!(false);
        }
    });
    let schema = json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$ref": format!("#/$defs/{name}"), "$defs": definitions,
    });
    jsonschema::options().should_validate_formats(true).build(&schema).unwrap()
}

/// Serializes a value and checks it against the schema of its type.
#[track_caller]
fn written(name: &str, value: &impl Serialize) -> Value {
    let value = to_value(value).unwrap();
    valid(name, &value);
    value
}

#[track_caller]
fn valid(name: &str, value: &Value) {
    if let Err(error) = validator(name).validate(value) {
        panic!("{name}: {} at {:?} in {value:#}", error, error.instance_path().to_string());
    }
}

/// Returns the sample below the heading of a type.
fn sample(name: &str) -> Value {
    let section = GUIDE.split(&format!("\n## `{name}`\n")).nth(1).unwrap();
    from_str(block(section)).unwrap()
}

/// Returns the first block of JSON.
fn block(text: &str) -> &str {
    text.split("```json\n").nth(1).unwrap().split("```").next().unwrap()
}

fn name(text: &str) -> NodeName {
    NodeName::new(text).unwrap()
}

/// A cluster of two nodes with both families, seen by one of them.
fn cluster(here: &str) -> Cluster {
    let node = |at: u8| {
        let underlay = vec![format!("10.10.0.{at}").parse().unwrap()];
        let tunnel = ["172.31.0.{}/16", "fd00:172::{}/64"]
            .map(|net| net.replace("{}", &at.to_string()).parse().unwrap());
        Node::new(name(&format!("node-{at}")), underlay, tunnel.to_vec())
    };
    let excluded = ["10.244.0.0/16", "fd00:10:244::/48"].map(|net| net.parse().unwrap());
    Cluster::new(name(here), vec![node(1), node(2)], excluded.to_vec())
}

/// The sample policy of the guide, by the second node.
fn policy() -> EgressPolicy {
    from_value::<EgressPolicy>(sample("EgressPolicy")).unwrap().with_gateway(name("node-2"))
}

fn packet() -> Packet {
    Packet::tcp("10.244.1.10".parse().unwrap(), 40_000, "198.51.100.7".parse().unwrap(), 443)
}

#[test]
fn every_type_and_field_has_a_sentence_and_every_number_a_range() {
    let mut definitions = definitions();
    for (name, schema) in definitions.as_object().unwrap() {
        assert!(schema["description"].is_string(), "{name} has no description");
    }
    each(&mut definitions, "", &mut |schema, place| {
        if let Some(fields) = schema["properties"].as_object() {
            for (name, field) in fields.iter().filter(|_| schema["type"] == "object") {
                let sentence = field["description"].as_str().unwrap_or_default();
                let one = sentence.ends_with('.') && !sentence.contains(". ");
                let conditional = ["/anyOf", "/not"].iter().any(|part| place.contains(part));
                assert!(one || conditional, "{place}/{name}: {sentence:?}");
            }
        }
        let number = |kind: &Value| {
            let kinds = kind.as_array().map_or(std::slice::from_ref(kind), Vec::as_slice);
            kinds.contains(&json!("integer"))
        };
        if number(&schema["type"]) {
            let range = schema["minimum"].is_number() && schema["maximum"].is_number();
            assert!(range, "{place} has no range");
        }
    });
    assert_eq!(definitions["Code"]["pattern"], "^[a-z0-9_]+$");
    assert!(definitions["Code"]["enum"].is_null(), "codes are added");
}

#[test]
fn every_type_belongs_to_a_document() {
    let mut definitions = definitions();
    let mut open = Vec::from(DOCUMENTS.map(String::from));
    let mut reached = BTreeSet::new();
    while let Some(name) = open.pop() {
        let mut used = Vec::new();
        each(&mut definitions[&name], "", &mut |schema, _| {
            let to = schema["$ref"].as_str().and_then(|to| to.strip_prefix("#/$defs/"));
            used.extend(to.map(String::from));
        });
        if reached.insert(name) {
            open.extend(used);
        }
    }
    let all: BTreeSet<String> = definitions.as_object().unwrap().keys().cloned().collect();
    assert_eq!(reached, all);
}

#[test]
fn samples_are_valid_and_read_back() {
    let names: Vec<_> =
        GUIDE.split("\n## `").skip(1).map(|s| s.split('`').next().unwrap()).collect();
    assert_eq!(names.len(), GUIDE.matches("```json\n").count(), "a sample for each heading");
    for name in names {
        valid(name, &sample(name));
    }
    valid("AgentFile", &from_str(block(TROUBLESHOOTING)).unwrap());

    fn back<T: DeserializeOwned + Serialize>(name: &str) {
        let read: T = from_value(sample(name)).unwrap();
        let mut written = written(name, &read);
        // Null where the sample leaves it out.
        if let Some(first) = written.pointer_mut("/nodes/0").and_then(Value::as_object_mut) {
            first.retain(|_, value| !value.is_null());
        }
        assert_eq!(written, sample(name));
    }
    back::<Cluster>("Cluster");
    back::<Backend>("Backend");
    back::<Claim>("Claim");
    back::<EgressPolicy>("EgressPolicy");
    back::<TableRange>("TableRange");
    back::<PolicyCount>("PolicyCount");
}

/// The fields that the code knows, as its error about an unknown one lists them.
fn fields<T: DeserializeOwned>(at: impl Fn(Value) -> Value) -> BTreeSet<String> {
    let error = from_value::<T>(at(json!({"?": 0}))).err().unwrap().to_string();
    let known = error.strip_prefix("unknown field `?`, expected ").unwrap();
    known.split('`').skip(1).step_by(2).map(String::from).collect()
}

#[test]
fn input_has_the_fields_that_the_code_reads() {
    let definitions = definitions();
    let described = |schema: &Value| -> BTreeSet<String> {
        schema["properties"].as_object().unwrap().keys().cloned().collect()
    };
    let whole = |form| form;
    let iptables = |form| json!({"iptables": form});
    let types = [
        ("Cluster", fields::<Cluster>(whole)),
        ("Node", fields::<Node>(whole)),
        ("Tunnel", fields::<Tunnel>(whole)),
        ("Claim", fields::<Claim>(whole)),
        ("MarkLayout", fields::<MarkLayout>(whole)),
        ("TableRange", fields::<TableRange>(whole)),
        ("EgressPolicy", fields::<EgressPolicy>(whole)),
        ("Iptables", fields::<Backend>(iptables)),
    ];
    for (name, known) in types {
        assert_eq!(described(&definitions[name]), known, "{name}");
    }
    let egress_ip = fields::<EgressIp>(whole);
    assert_eq!(described(&definitions["EgressIp"]["oneOf"][1]), egress_ip);
}

/// What the code makes of an input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Accepted,
    /// Accepted, with an error of a policy or node.
    Reported,
    Refused,
    /// Refused for a relation between values, which a schema cannot express.
    Unrelated,
}

fn planned(cluster: &Cluster, policy: &EgressPolicy) -> Verdict {
    let marks = &mut MarkPool::new(cluster.marks);
    match plan(cluster, [policy], marks, &mut TablePool::default()) {
        Ok(plan) if plan.findings.is_empty() => Verdict::Accepted,
        Ok(_) => Verdict::Reported,
        Err(error) if error.code() == "unknown_node" => Verdict::Unrelated,
        Err(_) => Verdict::Refused,
    }
}

fn of_cluster(form: Value) -> Verdict {
    let v4 = EgressIp::V4("203.0.113.7".parse().unwrap());
    let policy = policy().with_gateway(name("node-b")).with_egress_ip(v4);
    let policy = policy.with_sources(vec!["10.244.1.10/32".parse().unwrap()]);
    from_value(form).map_or(Verdict::Refused, |cluster| planned(&cluster, &policy))
}

fn of_policy(form: Value) -> Verdict {
    from_value(form).map_or(Verdict::Refused, |policy| planned(&cluster("node-1"), &policy))
}

fn of_tables(form: Value) -> Verdict {
    from_value::<TableRange>(form).map_or(Verdict::Refused, |_| Verdict::Accepted)
}

/// Returns the value with one change each: a field removed or added, a value replaced.
fn mutants(value: &Value) -> Vec<(String, Value)> {
    let texts = [
        "",
        "x y",
        "z",
        "010.0.0.0/8",
        "10.0.0.0/08",
        "10.0.0.0/+8",
        "10.0.0.0",
        "10.0.0.0/33",
        "::/129",
        "0x",
        "0x100000000",
        "+1",
        "-1",
        "26g",
        "::ffff:198.51.100.200",
        "198.51.100.200",
        "2001:db8::1",
        "66:f7:06:23:81",
        "67:f7:06:23:81:6b",
        "a*",
        "sixteen-bytes-ab",
        "external",
        "node",
        "iptables",
    ];
    let numbers = [-1_i64, 0, 300, 40_000, 65_536, 1 << 24, 1 << 32];
    let others = [json!(null), json!(true), json!(1.5), json!([]), json!({}), json!([null])];
    let others = others.into_iter().chain(numbers.map(Value::from)).chain(texts.map(Value::from));
    let others: Vec<_> = others.collect();
    let mut places = vec![String::new()];
    let mut mutants = Vec::new();
    while let Some(place) = places.pop() {
        let mut put = |what: String, change: &dyn Fn(&mut Value)| {
            let mut mutant = value.clone();
            change(mutant.pointer_mut(&place).unwrap());
            mutants.push((format!("{place}: {what}"), mutant));
        };
        for other in &others {
            put(other.to_string(), &|found| *found = other.clone());
        }
        match value.pointer(&place).unwrap() {
            Value::Object(fields) => {
                put("unknown field".into(), &|found| found["unknown"] = json!(0));
                for field in fields.keys() {
                    let remove = |found: &mut Value| {
                        found.as_object_mut().unwrap().remove(field);
                    };
                    put(format!("no {field}"), &remove);
                }
                places.extend(fields.keys().map(|field| format!("{place}/{field}")));
            }
            Value::Array(items) => {
                places.extend((0..items.len()).map(|at| format!("{place}/{at}")))
            }
            _ => {}
        }
    }
    mutants
}

/// Compares code and schema on every mutant; returns how many both refuse.
fn compare(name: &str, value: &Value, judge: impl Fn(Value) -> Verdict) -> usize {
    let schema = validator(name);
    assert_eq!((judge(value.clone()), schema.is_valid(value)), (Verdict::Accepted, true), "{name}");
    let mut refused = 0;
    for (what, mutant) in mutants(value) {
        let (verdict, valid) = (judge(mutant.clone()), schema.is_valid(&mutant));
        // The code also reads a struct of defaults from an empty list.
        let listed = what.ends_with(": []");
        match verdict {
            Verdict::Refused => assert!(!valid, "{name}{what}: refused by the code alone"),
            Verdict::Accepted => {
                assert!(valid || listed, "{name}{what}: refused by the schema alone")
            }
            Verdict::Reported | Verdict::Unrelated => {}
        }
        refused += usize::from(verdict == Verdict::Refused);
    }
    refused
}

#[test]
fn input_is_refused_by_code_and_schema_alike() {
    let mut cluster = sample("Cluster");
    assert!(compare("Cluster", &cluster, of_cluster) > 500);
    cluster["backend"] = sample("Backend");
    assert!(compare("Cluster", &cluster, of_cluster) > 500);
    let policy = to_value(policy()).unwrap();
    assert!(compare("EgressPolicy", &policy, of_policy) > 200);
    assert!(compare("TableRange", &sample("TableRange"), of_tables) > 50);
}

#[test]
fn options_that_exclude_each_other_are_refused() {
    let refused = |changes: Value| {
        let mut form = sample("Cluster");
        form.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        (of_cluster(form.clone()) == Verdict::Refused, !validator("Cluster").is_valid(&form))
    };
    let backend = sample("Backend");
    assert_eq!(refused(json!({"policy_counters": true})), (false, false));
    assert_eq!(refused(json!({"steering": "egress-hook"})), (false, false));
    assert_eq!(refused(json!({"replies": "tunnel"})), (false, false));
    assert_eq!(refused(json!({"excluded": [], "pods": ["10.244.0.0/16"]})), (false, false));
    for changes in [
        json!({"policy_counters": true, "connection_caching": true}),
        json!({"policy_counters": true, "backend": backend}),
        json!({"steering": "egress-hook", "backend": backend}),
        json!({"replies": "tunnel", "backend": backend}),
        json!({"excluded": [], "pods": []}),
    ] {
        assert_eq!(refused(changes.clone()), (true, true), "{changes}");
    }
}

#[test]
fn reports_and_findings_are_as_described() {
    let mut cluster = cluster("node-1");
    cluster.nodes.push(Node::new(name("node-3"), vec!["10.10.0.3".parse().unwrap()], Vec::new()));
    let policies = [policy().with_gateway(None), policy().with_gateway(name("node-3"))];
    let mut egress = Reconciler::new(Sim::new());
    let report = egress.reconcile(&cluster, &policies[1..]).unwrap();
    let json = written("Report", &report);
    let has =
        |field: &str| json["findings"].as_array().unwrap().iter().any(|f| f[field].is_string());
    assert!(has("policy") && has("node"), "{json:#}");
    assert!(!json["changes"].as_array().unwrap().is_empty());

    let mut closed = |unavailable| {
        let policy = policies[0].clone().with_unavailable(unavailable);
        let report = egress.reconcile(&cluster, [policy]).unwrap();
        let mut written = report.findings.iter().map(|finding| written("Finding", finding));
        written.find(|json| json["reason"] == "no_gateway").unwrap()
    };
    let denied = closed(Unavailable::Drop);
    assert_eq!((&denied["code"], &denied["family"]), (&json!("policy_denied"), &json!("V4")));
    assert_eq!(closed(Unavailable::Bypass)["code"], "policy_bypassed");
    // What an alert reads must be there.
    for field in ["policy", "family", "reason"] {
        let mut without = denied.clone();
        without.as_object_mut().unwrap().remove(field).unwrap();
        assert!(!validator("Finding").is_valid(&without), "{field}");
    }
    written("Changes", &egress.remove().unwrap().changes);
}

#[test]
fn errors_are_as_described() {
    let mut egress = Reconciler::new(Sim::new());
    egress.datapath().refuse(3, 12);
    let json = written("Error", &egress.reconcile(&cluster("node-1"), [policy()]).unwrap_err());
    assert_eq!(json["refused"][0]["error"]["errno"], 12);
    let unknown = egress.reconcile(&cluster("node-9"), [policy()]).unwrap_err();
    assert_eq!(written("Error", &unknown)["code"], "unknown_node");
    written("Error", &Error::NothingWanted);

    let error = KernelError::refused("ip link show", 1).with_remedy("run it as root");
    written("KernelError", &error);
    written("KernelError", &KernelError::answer("ip link show", "the reply was cut"));
    assert!(written("Error", &Error::Observe(error))["kernel"].is_object());
}

#[test]
fn problems_are_as_described() {
    for problem in [
        Problem::Denied,
        Problem::NotForwarding { family: Family::V6 },
        Problem::ConntrackFull { count: 9, max: 10 },
    ] {
        written("Problem", &problem);
    }
}

#[test]
fn events_are_as_described() {
    let kernel = SharedSim::default();
    let mut egress = Reconciler::new(kernel.open());
    let mut watch = egress.datapath().watch().unwrap();
    egress.reconcile(&cluster("node-1"), [policy()]).unwrap();
    kernel.edit(|state| *state = Default::default());
    let events = written("ChangeEvents", &watch.drain().unwrap());
    assert!(events["changed"].as_array().unwrap().len() > 1, "{events}");

    use Component::{Address, Fdb, Firewall, Link, Neighbour, Route, Rule};
    let mut events = ChangeEvents::default();
    events.changed = [Link, Address, Fdb, Neighbour, Route, Rule, Firewall].into();
    events.writers = [Process { pid: 7, name: "nft".into() }].into();
    written("ChangeEvents", &events);
}

/// Returns a simulated node with both families that counts its packets, one of them sent.
fn counted(here: &str) -> Reconciler<Sim> {
    let mut egress = Reconciler::new(Sim::new());
    let cluster = cluster(here).with_policy_counters(true);
    egress.reconcile(&cluster, [policy()]).unwrap();
    egress.datapath().send(packet());
    egress
}

#[test]
fn counters_and_summaries_are_as_described() {
    for (here, action) in [("node-1", "gateway"), ("node-2", "local")] {
        let mut egress = counted(here);
        let counters = egress.counters().unwrap();
        assert_eq!(counters.len(), 2);
        for counter in counters {
            let json = written("PolicyCount", &counter);
            assert_eq!(from_value::<PolicyCount>(json).unwrap(), counter);
        }
        let mut counts = egress.datapath().counters().unwrap();
        counts.drops = BTreeMap::from([("forward".into(), Count { packets: 1, bytes: 60 })]);
        let json = written("Summary", &egress.datapath().state().summary(&counts));
        for family in ["ipv4", "ipv6"] {
            let treatment = &json["policies"][0][family];
            assert_eq!(treatment["action"], action, "{json:#}");
            assert!(treatment["packets"].is_u64(), "{json:#}");
        }
        assert!(json["link"].is_object() && json["drops"].is_object(), "{json:#}");
    }
    written("Summary", &Sim::new().state().summary(&Counts::new()));

    let mut egress = Reconciler::new(Sim::new());
    let backend = Backend::Iptables(Iptables::new(Variant::Nft));
    egress.reconcile(&cluster("node-1").with_backend(backend), [policy()]).unwrap();
    let json = written("Summary", &egress.datapath().state().summary(&Counts::new()));
    assert_eq!(json["iptables"].as_array().map(Vec::len), Some(1), "{json:#}");
}

#[test]
fn traces_are_as_described() {
    let mut sender = counted("node-1");
    let sent = explain(sender.datapath().state(), &packet());
    written("Trace", &sent);
    let Fate::Tunnelled(frame) = sent.fate else { panic!("{sent}") };
    let mut gateway = counted("node-2");
    let left = written("Trace", &explain_received(gateway.datapath().state(), &frame));
    assert_eq!(left["fate"]["source"], "203.0.113.7", "{left:#}");

    let node = policy().with_egress_ip(EgressIp::Node);
    gateway.reconcile(&cluster("node-2"), [node]).unwrap();
    let left = written("Trace", &explain_received(gateway.datapath().state(), &frame));
    assert_eq!(left["fate"]["source"], "node", "{left:#}");

    sender.reconcile(&cluster("node-1"), [policy().with_gateway(None)]).unwrap();
    let dropped = written("Trace", &explain(sender.datapath().state(), &packet()));
    assert_eq!(dropped["fate"]["end"], "dropped", "{dropped:#}");
}
