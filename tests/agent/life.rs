//! A whole life in a network namespace.

use std::process::Command;

use common::in_netns;
use serde_json::{Value, json};

use crate::{File, changed, good, refusal, run};

#[track_caller]
fn ip(arguments: &[&str]) {
    let output = Command::new("ip").args(arguments).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[track_caller]
fn done(arguments: &[&str]) -> String {
    let (code, out, message) = run(arguments);
    assert_eq!((code, message.as_str()), (Some(0), ""), "{arguments:?}");
    out
}

#[test]
fn a_whole_life() {
    in_netns(|| {
        ip(&["link", "add", "eth0", "mtu", "1400", "type", "veth", "peer", "name", "eth1"]);
        ip(&["addr", "add", "10.10.0.11/24", "dev", "eth0"]);
        ip(&["link", "set", "eth0", "up"]);
        ip(&["link", "set", "eth1", "up"]);
        let file = File::new(&good().to_string());
        let options = ["--node", "a", "--cluster", file.path()];
        let plan = [&["plan"][..], &options].concat();
        let apply = [&["apply"][..], &options].concat();

        let planned = done(&plan);
        assert!(planned.contains("nft create table inet egress_datapath\n"), "{planned}");
        let note = "note: policy default/p1 drops its IPv6 traffic: \
                    this node or the gateway has no tunnel address of that family\n";
        assert!(planned.contains(note), "{planned}");
        let (_, count) = planned.trim_end().rsplit_once('\n').unwrap();
        assert!(done(&["show"]).starts_with("link: none\n"), "a plan changes nothing");
        let exit_code = [&plan[..], &["--exit-code"]].concat();
        assert_eq!(run(&exit_code).0, Some(3));
        let json = done(&[&plan[..], &["--json"]].concat());
        let json: Value = serde_json::from_str(&json).unwrap();
        assert_eq!(json["findings"][0]["code"], "policy_denied", "{json}");
        assert!(json["changes"].as_array().is_some_and(|all| !all.is_empty()), "{json}");

        let applied = done(&apply);
        let (_, applied) = applied.trim_end().rsplit_once('\n').unwrap();
        assert_eq!(format!("{applied} planned"), count);
        assert_eq!(done(&apply), format!("{note}0 changes\n"));
        assert_eq!(done(&plan), format!("{note}0 changes planned\n"));
        assert_eq!(run(&exit_code).0, Some(0));

        let shown: Value = serde_json::from_str(&done(&["show", "--json"])).unwrap();
        let gateway = &shown["gateways"][0];
        assert!((3000..=3100).contains(&gateway["table"].as_u64().unwrap()), "{gateway}");
        assert_eq!(
            shown,
            json!({
                "link": {
                    "name": "egress.vxlan", "vni": 100, "port": 7789, "local": "10.10.0.11",
                    "underlay_device": "eth0", "mac": "66:f7:06:23:81:6b", "mtu": 1350,
                    "up": true, "addresses": ["172.31.0.11/16", "fd11::11/112"],
                },
                "gateways": [
                    {"node": "b", "mark": gateway["mark"], "table": gateway["table"]},
                ],
                "policies": [{
                    "id": "default/p1",
                    "ipv4": {"action": "gateway", "gateway": "b", "egress_ip": null},
                    "ipv6": {"action": "deny", "gateway": null, "egress_ip": null},
                }],
                "sources": {
                    "ipv4": {"addresses": 1, "ranges": 0}, "ipv6": {"addresses": 1, "ranges": 0},
                },
            })
        );
        let people = done(&["show"]);
        assert!(people.contains("\npolicy: default/p1 IPv4 gateway b\n"), "{people}");

        explained(file.path());
        let here = File::new(&changed("/policies/0/gateway", json!("a")));
        done(&["apply", "--node", "a", "--cluster", here.path()]);
        let people = done(&["show"]);
        assert!(people.contains("\npolicy: default/p1 IPv4 local as 203.0.113.200\n"), "{people}");

        let counted = File::new(&changed("/policy_counters", json!(true)));
        done(&["apply", "--node", "a", "--cluster", counted.path()]);
        let people = done(&["show"]);
        let line = "\npolicy: default/p1 IPv4 gateway b, 0 packets 0 bytes\n";
        assert!(people.contains(line), "{people}");
        let shown: Value = serde_json::from_str(&done(&["show", "--json"])).unwrap();
        let policy = &shown["policies"][0]["ipv4"];
        assert_eq!((&policy["packets"], &policy["bytes"]), (&json!(0), &json!(0)), "{shown}");

        errors_of_one_policy(&options);

        // Bad input leaves everything where it is.
        let before = done(&["show", "--json"]);
        refusal("a", &changed("/tunnel/vni", json!(0)));
        assert_eq!(done(&["show", "--json"]), before);

        assert!(done(&["remove"]).ends_with(" changes\n"));
        assert_eq!(done(&["remove"]), "0 changes\n");
        assert!(done(&["show"]).starts_with("link: none\n"));
    });
}

#[test]
fn apply_says_that_a_rule_has_come_first() {
    in_netns(|| {
        ip(&["link", "add", "eth0", "type", "veth", "peer", "name", "eth1"]);
        ip(&["addr", "add", "10.10.0.11/24", "dev", "eth0"]);
        ip(&["link", "set", "eth0", "up"]);
        ip(&["link", "set", "eth1", "up"]);
        let file = File::new(&good().to_string());
        let options = ["apply", "--node", "a", "--cluster", file.path()];
        assert!(!done(&options).contains("broken"));
        // As wg-quick does: no priority.
        ip(&["route", "add", "default", "via", "10.10.0.9", "dev", "eth0", "table", "51820"]);
        ip(&["rule", "add", "not", "fwmark", "51820", "lookup", "51820"]);
        let out = done(&options);
        let line = "broken (IPv4): ip rule 100: not fwmark 0xca6c/0xffffffff lookup 51820 precedes the \
                    gateways' rules at 101 and matches steered packets; move the other rule to 105 \
                    or later";
        assert!(out.contains(line), "{out}");
        assert!(out.ends_with("\n0 changes\n"), "{out}");
        let report = done(&[&options[..], &["--json"]].concat());
        let report: Value = serde_json::from_str(&report).unwrap();
        assert_eq!(report["problems"][0]["code"], "rule_takes_first", "{report}");
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
        std::fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1").unwrap();
        let (code, out, message) = run(&[&["doctor"][..], &options[1..]].concat());
        assert_eq!(code, Some(1), "{out}");
        assert!(out.contains(line), "{out}");
        assert_eq!(
            message,
            "agent: 1 problem(s) prevent the datapath from working; IPv6 is ready\n"
        );
        // The remedy.
        ip(&["rule", "del", "pref", "100"]);
        ip(&["rule", "add", "pref", "105", "not", "fwmark", "51820", "lookup", "51820"]);
        assert!(!done(&options).contains("broken"));
    });
}

#[test]
fn doctor_and_apply_agree_about_the_mtu() {
    in_netns(|| {
        ip(&["link", "add", "eth0", "type", "veth", "peer", "name", "eth1"]);
        ip(&["addr", "add", "10.10.0.11/24", "dev", "eth0"]);
        ip(&["link", "set", "eth0", "up"]);
        let problems = |file: &File| {
            let options = ["doctor", "--node", "a", "--cluster", file.path(), "--json"];
            let (_, problems, _) = run(&options);
            let problems: Value = serde_json::from_str(&problems).unwrap();
            let mut mtu = problems.as_array().unwrap().clone();
            mtu.retain(|problem| problem["code"].as_str().unwrap().ends_with("_mtu"));
            mtu
        };
        // MTU of the interface, of the file, and of the tunnel.
        for (interface, said, tunnel) in [
            ("1460", None, 1410),
            ("1500", None, 1450),
            ("9000", None, 1450),
            ("9000", Some(9000), 8950),
            ("9000", Some(1400), 1350),
        ] {
            ip(&["link", "set", "eth0", "mtu", interface]);
            let file = File::new(&changed("/tunnel/underlay_mtu", json!(said)));
            let options = ["apply", "--node", "a", "--cluster", file.path()];
            assert_eq!(problems(&file), Vec::<Value>::new(), "{interface}, {said:?}");
            done(&options);
            let shown: Value = serde_json::from_str(&done(&["show", "--json"])).unwrap();
            assert_eq!(shown["link"]["mtu"], tunnel, "{interface}, {said:?}");
            assert_eq!(problems(&file), Vec::<Value>::new(), "{interface}, {said:?}");
            assert!(done(&options).ends_with("\n0 changes\n"), "{interface}, {said:?}");
            done(&["remove", "--now"]);
        }
        // Other nodes send what this interface does not receive.
        ip(&["link", "set", "eth0", "mtu", "1460"]);
        let file = File::new(&changed("/tunnel/underlay_mtu", json!(1500)));
        for _ in ["before apply", "after it"] {
            let found = problems(&file);
            assert_eq!(found.len(), 1, "{found:?}");
            let remedy = found[0]["remedy"].as_str().unwrap();
            assert!(remedy.contains("underlay MTU to 1460"), "{remedy}");
            done(&["apply", "--node", "a", "--cluster", file.path()]);
        }
        let text = changed("/tunnel/underlay_mtu", json!(1300));
        let sentence = "tunnel: underlay MTU 1300 is too small: the tunnel needs 1330 to carry 1280 \
                        bytes";
        assert_eq!(refusal("a", &text), sentence);
    });
}

/// Applies files with errors in one policy or node: the others are in force, and the status says so.
fn errors_of_one_policy(options: &[&str; 4]) {
    let applied = |file: &Value, more: &[&str]| {
        let file = File::new(&file.to_string());
        let (code, out, message) = run(&[&["apply"], &options[..3], &[file.path()], more].concat());
        assert_eq!(message, "", "{out}");
        (code, out)
    };
    let mut file = good();
    let bad =
        json!({"id": "bad", "sources": ["10.244.1.20/24"], "gateway": "b", "egress_ip": "node"});
    file["policies"].as_array_mut().unwrap().push(bad);
    let (code, out) = applied(&file, &[]);
    assert_eq!(code, Some(3), "{out}");
    let note = "note: policy bad drops its traffic: 10.244.1.20/24 has host bits set; \
                10.244.1.0/24 may be meant\n";
    assert!(out.contains(note), "{out}");
    let people = done(&["show"]);
    assert!(people.contains("\npolicy: default/p1 IPv4 gateway b\n"), "{people}");
    assert!(people.contains("\npolicy: bad IPv4 deny\n"), "{people}");
    assert_eq!(applied(&file, &[]).0, Some(3), "as long as the file has the error");

    // plan says the same, and its status is about changes alone.
    let path = File::new(&file.to_string());
    let plan = [&["plan", "--exit-code"], &options[..3], &[path.path()]].concat();
    let (code, out, _) = run(&plan);
    assert_eq!(code, Some(0), "{out}");
    assert!(out.contains(note), "{out}");

    file["policies"][1] = json!({"id": "bad", "sources": ["10.244.1.20", "x"], "gateway": "b"});
    let (code, out) = applied(&file, &["--json"]);
    assert_eq!(code, Some(3), "{out}");
    let report: Value = serde_json::from_str(&out).unwrap();
    let findings = report["findings"].as_array().unwrap();
    let about: Vec<_> = findings.iter().filter(|one| one.to_string().contains("bad")).collect();
    assert_eq!(about.len(), 1, "{report}");
    assert_eq!(
        (&about[0]["code"], &about[0]["policy"]),
        (&json!("unreadable_policy"), &json!("bad"))
    );
    assert!(about[0]["message"].as_str().unwrap().contains(": policies[1].sources[1]: \"x\":"));

    // A policy of nobody closes nothing.
    file["policies"][1] = json!({"id": "bad", "sources": [], "gateway": "b", "egress_ip": "node"});
    let (code, out) = applied(&file, &[]);
    assert_eq!(code, Some(0), "{out}");
    assert!(out.contains("note: policy bad drops its traffic: sources are empty"), "{out}");

    // A node that is left out, with the policies of its own.
    let mut file = good();
    file["nodes"][1]["tunnel"] = json!([]);
    let (code, out) = applied(&file, &[]);
    assert_eq!(code, Some(3), "{out}");
    assert!(out.contains("note: node b is left out: it has no tunnel address\n"), "{out}");
    assert_eq!(applied(&good(), &[]).0, Some(0));
}

/// Says of one pod's packets where they go, while the kernel holds what the file asks for.
fn explained(file: &str) {
    let explain = |from: &str, to: &str, rest: &[&str]| {
        let options = ["explain", "--node", "a", "--cluster", file, "--from", from, "--to", to];
        done(&[&options, rest].concat())
    };
    let text = explain("10.244.1.10", "198.51.100.7:443/tcp", &["--json"]);
    let json: Value = serde_json::from_str(&text).unwrap();
    let here = &json["here"];
    assert_eq!(here["policy"], "default/p1", "{text}");
    assert_eq!((&here["gateway"], &json["node"]), (&json!("b"), &json!("a")), "{text}");
    assert_eq!(here["fate"], json!({"end": "tunnelled", "to": "10.10.0.12", "source": null}));
    assert_eq!(here["shadowed"], json!([]), "{text}");
    assert!(here["class"].is_string() && here["mark"].is_string() && here["table"].is_u64());
    let objects: Vec<_> =
        here["reasons"].as_array().unwrap().iter().map(|r| r["object"].as_str().unwrap()).collect();
    for object in [
        "element source4 { 10.244.1.10 }",
        "element dest4_24 { 198.51.100.0 . ",
        "rule pref 102 fwmark ",
        "route 0.0.0.0/0 table ",
        "neighbour 172.31.0.12 dev egress.vxlan",
        "fdb 66:",
    ] {
        assert!(objects.iter().any(|known| known.starts_with(object)), "{object} in {text}");
    }
    let gateway = &json["gateway"];
    assert_eq!((&gateway["node"], &json["notes"]), (&json!("b"), &json!([])), "{text}");
    assert_eq!(gateway["trace"]["egress_ip"], "203.0.113.200", "{text}");
    assert_eq!(gateway["trace"]["fate"]["source"], "203.0.113.200", "{text}");

    let text = explain("10.244.1.10", "198.51.100.7", &[]);
    let begin =
        "on a: ICMP type 8 10.244.1.10 to 198.51.100.7\n  element source4 { 10.244.1.10 }: ";
    assert!(text.starts_with(begin), "{text}");
    assert!(text.contains("\non b, by the file: ICMP type 8 "), "{text}");
    assert!(text.contains(" { b49e:c3f0 } \"default/p1\": SNAT to 203.0.113.200\n"), "{text}");
    let end = "\ngoes by the host's own routes as 203.0.113.200\n";
    assert!(text.ends_with(end), "{text}");
    // IPv6 has no tunnel, another destination no policy, another pod no class.
    let text = explain("fd44:1::10", "[2001:db8::1]:53/udp", &[]);
    assert!(!text.contains("policy") && text.ends_with("own routes as fd44:1::10\n"), "{text}");
    let text = explain("10.244.1.10", "198.51.101.7:53/udp", &[]);
    assert!(!text.contains("policy") && text.ends_with("own routes as 10.244.1.10\n"), "{text}");
    let text = explain("10.244.1.11", "198.51.100.7:53/udp", &[]);
    assert_eq!(text.lines().count(), 2, "{text}");

    // What the file says and the kernel does not hold.
    let moved = File::new(&changed("/policies/0/gateway", json!("a")));
    let other = ["explain", "--node", "a", "--cluster", moved.path(), "--from", "10.244.1.10"];
    let text = done(&[&other[..], &["--to", "198.51.100.7:53/udp"]].concat());
    let note = "note: the file requires: policy default/p1, goes by the host's own routes as \
                203.0.113.200; run agent apply\n";
    assert!(text.contains(note), "{text}");

    for (to, sentence) in [
        ("fd44::1", "--from 10.244.1.10 and --to fd44::1 are of different families"),
        ("198.51.100.7:x", "--to \"198.51.100.7:x\": expected an address, or one with port"),
        ("198.51.100.7:7/sctp", "--to \"198.51.100.7:7/sctp\": expected an address, or one"),
    ] {
        let options = ["--node", "a", "--cluster", file, "--from", "10.244.1.10", "--to", to];
        let (code, _, message) = run(&[&["explain"][..], &options].concat());
        assert_eq!(code, Some(2));
        assert!(message.starts_with(&format!("agent: {sentence}")), "{message}");
    }
}

#[test]
fn a_life_with_iptables() {
    for backend in ["iptables-legacy", "iptables-nft"] {
        harness::needs(&[backend, "ipset", "ip", "bridge"]);
        in_netns(move || {
            ip(&["link", "add", "eth0", "type", "veth", "peer", "name", "eth1"]);
            ip(&["addr", "add", "10.10.0.11/24", "dev", "eth0"]);
            ip(&["link", "set", "eth0", "up"]);
            ip(&["link", "set", "eth1", "up"]);
            let file = File::new(&good().to_string());
            let options = ["--node", "a", "--cluster", file.path(), "--backend"];
            let plan = |name| [&["plan"][..], &options, &[name]].concat();
            let apply = |name| [&["apply"][..], &options, &[name]].concat();

            let script = done(&[&plan(backend)[..], &["--as-shell"]].concat());
            assert!(script.starts_with("set -e\n"), "{script}");
            let creates = format!("{backend} -t nat -N EGRESSGATEWAY-SNAT-EIP\n");
            assert!(script.contains(&creates), "{script}");
            assert!(done(&["show"]).starts_with("link: none\n"), "a plan changes nothing");
            let text = Command::new("sh").args(["-c", &script]).output().unwrap();
            assert!(text.status.success(), "{}", String::from_utf8_lossy(&text.stderr));
            assert!(done(&apply(backend)).ends_with("\n0 changes\n"), "the text was the same");
            assert!(done(&["remove"]).ends_with(" changes\n"));

            assert!(done(&apply(backend)).contains(&creates));
            assert!(done(&apply(backend)).ends_with("\n0 changes\n"));
            let people = done(&["show"]);
            assert!(people.contains(&format!("\n{backend}: ")), "{people}");
            // To nf_tables, which takes along what the other backend left, and back.
            assert!(done(&apply("nftables")).contains("ipset destroy egress4-selected\n"));
            let people = done(&["show"]);
            assert!(people.contains("\npolicy: default/p1 IPv4 gateway b\n"), "{people}");
            assert!(!people.contains(backend), "{people}");
            assert!(done(&apply("auto")).ends_with("\n0 changes\n"));
            assert!(done(&apply(backend)).contains("nft delete table inet egress_datapath\n"));

            assert!(done(&["remove"]).ends_with(" changes\n"));
            assert_eq!(done(&["remove"]), "0 changes\n");
        });
    }
}

#[test]
fn a_node_is_taken_over() {
    in_netns(|| {
        ip(&["link", "add", "eth0", "type", "veth", "peer", "name", "eth1"]);
        ip(&["addr", "add", "10.10.0.11/24", "dev", "eth0"]);
        ip(&["link", "set", "eth0", "up"]);
        let (mark, table) = (0x26d9_b723_u32, 0x26d9_b723_u32.to_string());
        let mark = format!("{mark:#x}");
        let theirs = ["pref", "99", "fwmark", &mark, "lookup", &table];
        ip(&[&["rule", "add"][..], &theirs].concat());
        let device = ["egress.vxlan", "type", "vxlan", "id", "100", "dstport", "7789"];
        ip(&[&["link", "add"][..], &device, &["dev", "eth0", "nolearning"]].concat());

        let file = File::new(&good().to_string());
        let options = ["--node", "a", "--cluster", file.path()];
        let (_, found, _) = run(&[&["doctor"][..], &options].concat());
        let (_, as_json, _) = run(&[&["doctor"][..], &options, &["--json"]].concat());
        let problems: Value = serde_json::from_str(&as_json).unwrap();
        for problem in problems.as_array().unwrap() {
            assert!(problem["code"].is_string() && problem["remedy"].is_string(), "{problem}");
        }
        let line = "risk: 1 routing rule(s) and VXLAN device egress.vxlan are as spidernet's";
        assert!(found.contains(line), "{found}");
        let (code, out, message) = run(&[&["takeover"][..], &options].concat());
        assert_eq!((code, out.as_str()), (Some(2), ""), "{message}");
        let why = "tunnel: device egress.vxlan exists and was not created by this crate; set another device name";
        assert!(message.contains(why), "{message}");

        let mut other = good();
        other["tunnel"] = json!({"device": "egress.ours", "vni": 101});
        let file = File::new(&other.to_string());
        let options = ["--node", "a", "--cluster", file.path()];
        let taken = done(&[&["takeover"][..], &options].concat());
        let removal = format!("ip rule del {}\nip link del egress.vxlan\n", theirs.join(" "));
        assert!(taken.ends_with(&format!(" changes\n{removal}2 removed\n")), "{taken}");
        let again = done(&[&["takeover"][..], &options].concat());
        assert!(again.ends_with("\n0 changes\n0 removed\n"), "{again}");
        let (_, found, _) = run(&[&["doctor"][..], &options].concat());
        assert!(!found.contains("spidernet"), "{found}");
    });
}
