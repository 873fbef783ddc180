//! Written, read back, removed; and what other people's tools say about it.

use std::collections::{BTreeMap, BTreeSet};

use common::fleet::{Result, assert_same, dual, lab, nft, open, policy, settled, snapshot, tool};
use egress_datapath::datapath::observe;
use egress_datapath::state::{PROTOCOL, Route, RuleAction, State};
use egress_datapath::testing::lab::{
    EIP_B, EIP_C, Lab, Netns, OTHER_SERVER, POD_A, POD_B, POD_C, STRANGER, hosts,
};
use egress_datapath::{
    Destinations, DeviceName, EgressIp, EgressPolicy, Family, MarkLayout, PolicyId, Reconciler,
};
use ipnet::IpNet;
use serde_json::Value;

#[test]
fn second_reconcile_is_noop() -> Result {
    for layout in [MarkLayout::SEED, MarkLayout::COMPACT] {
        let lab = lab();
        for host in lab.nodes() {
            let mut cluster = lab.cluster(host)?;
            cluster.marks = layout;
            let mut node = open(host, layout)?;
            assert!(!node.reconcile(&cluster, policies()?)?.changes.is_empty());
            let again = node.reconcile(&cluster, policies()?)?.changes;
            assert!(again.is_empty(), "{}: {again}", host.name);
            // Nor does another process, that knows nothing of the first.
            let again = open(host, layout)?.reconcile(&cluster, policies()?)?.changes;
            assert!(again.is_empty(), "{}: {again}", host.name);
        }
    }
    Ok(())
}

#[test]
fn observed_state_equals_planned_state() -> Result {
    let lab = lab();
    let all = policies()?;
    for host in lab.nodes() {
        let cluster = lab.cluster(host)?;
        let mut node = open(host, cluster.marks)?;
        let few: Vec<_> = all.iter().take(2).cloned().collect();
        let last: Vec<_> = all.iter().skip(2).cloned().collect();
        for wanted in [&few, &all, &last, &Vec::new(), &all] {
            node.reconcile(&cluster, wanted)?;
            let again = node.preview(&cluster, wanted)?.changes;
            assert!(again.is_empty(), "{}: {again}", host.name);
        }
    }
    Ok(())
}

#[test]
fn remove_restores_node() -> Result {
    let lab = lab();
    for host in lab.nodes() {
        let before = settled(&host.netns)?;
        let cluster = lab.cluster(host)?;
        let mut node = open(host, cluster.marks)?;
        node.reconcile(&cluster, policies()?)?;
        assert_ne!(snapshot(&host.netns)?, before, "{}", host.name);
        // By another process, that knows nothing of the first.
        open(host, cluster.marks)?.remove()?;
        assert_same(&before, &snapshot(&host.netns)?);
        let again = node.remove()?.changes;
        assert!(again.is_empty(), "{again}");
    }
    Ok(())
}

#[test]
fn nft_listing_accepted_by_nft() -> Result {
    for layout in [MarkLayout::SEED, MarkLayout::COMPACT] {
        let lab = lab();
        harness::needs(&["nft"]);
        for host in lab.nodes() {
            let mut cluster = lab.cluster(host)?;
            cluster.marks = layout;
            cluster.policy_counters = layout == MarkLayout::SEED;
            open(host, layout)?.reconcile(&cluster, policies()?)?;
            let listing = tool(&host.netns, "nft list ruleset")?;
            nft(&host.netns, &["--check"], &listing)?;
            let empty = Netns::new()?;
            nft(&empty, &[], &listing).map_err(|error| format!("{error}\n{listing}"))?;
            let [first, second] = [listing, tool(&empty, "nft list ruleset")?].map(|listing| {
                // Hash tables are listed in an order of their own in every kernel object.
                let words = listing.split(|c: char| c.is_whitespace() || c == ',');
                let mut words: Vec<_> = words.map(str::to_owned).collect();
                words.sort_unstable();
                words
            });
            assert_eq!(first, second, "{}", host.name);
        }
    }
    Ok(())
}

#[test]
fn elements_match_nft_listing() -> Result {
    let lab = lab();
    harness::needs(&["nft"]);
    for host in lab.nodes() {
        let (_, state) = applied(&lab, host)?;
        let firewall = state.firewall.ok_or("no table")?;
        let mut ours: BTreeMap<String, usize> =
            firewall.sets.iter().map(|set| (set.name(), 0)).collect();
        for key in firewall.elements.keys() {
            *ours.entry(key.set().name()).or_default() += 1;
        }
        let listing = json(&host.netns, "nft -j list table inet egress_datapath")?;
        let objects = listing["nftables"].as_array().ok_or("no list")?;
        let sets = objects.iter().filter_map(|object| object.get("set").or(object.get("map")));
        let theirs: BTreeMap<_, _> = sets
            .map(|set| (text(&set["name"]), set["elem"].as_array().map_or(0, Vec::len)))
            .collect();
        assert_eq!(ours, theirs, "{}", host.name);
        let chains = objects.iter().filter_map(|object| object.get("chain"));
        let theirs: BTreeSet<_> = chains.map(|chain| text(&chain["name"])).collect();
        let ours: BTreeSet<_> = firewall.chains.keys().map(ToString::to_string).collect();
        assert_eq!(ours, theirs, "{}", host.name);
    }
    Ok(())
}

#[test]
fn rules_match_ip_listing() -> Result {
    let lab = lab();
    harness::needs(&["ip"]);
    for host in lab.nodes() {
        let (_, state) = applied(&lab, host)?;
        for (family, line) in
            [(Family::V4, "ip -4 -N -j -d rule"), (Family::V6, "ip -6 -N -j -d rule")]
        {
            let listing = json(&host.netns, line)?;
            let theirs = listing.as_array().ok_or("no list")?.iter();
            let theirs: BTreeSet<_> = theirs
                .filter(|rule| text(&rule["protocol"]) == PROTOCOL.to_string())
                .map(|rule| {
                    assert!(rule.get("unresolved").is_none(), "{rule} leads nowhere");
                    let keys = ["priority", "fwmark", "fwmask", "iif", "table", "action", "goto"];
                    let not = if rule.get("not").is_some() { "not " } else { "" };
                    not.to_owned() + &keys.map(|key| text(&rule[key])).join(" ")
                })
                .collect();
            let ours = state.rules.iter().filter(|rule| rule.family == family).map(|rule| {
                let action = match rule.action {
                    RuleAction::Lookup(table) => format!("{table} null null"),
                    // FR_ACT_UNREACHABLE, as a number by `-N`.
                    RuleAction::Unreachable => "null 7 null".to_owned(),
                    RuleAction::Goto(priority) => format!("null null {priority}"),
                };
                let not = if rule.inverted { "not " } else { "" };
                let mark = format!("{:#x} {:#x}", rule.mark.get(), rule.mask);
                let iif = rule.input.as_ref().map_or("null", DeviceName::as_str);
                format!("{not}{} {mark} {iif} {action}", rule.priority)
            });
            assert_eq!(ours.collect::<BTreeSet<_>>(), theirs, "{}", host.name);
        }
    }
    Ok(())
}

#[test]
fn routes_match_ip_listing() -> Result {
    let lab = lab();
    harness::needs(&["ip"]);
    for host in lab.nodes() {
        let (_, state) = applied(&lab, host)?;
        let mut theirs = BTreeSet::new();
        for family in ["-4", "-6"] {
            let line = format!("ip {family} -N -j -d route show table all");
            let listing = json(&host.netns, &line)?;
            let routes = listing.as_array().ok_or("no list")?.iter();
            theirs.extend(
                routes.filter(|route| text(&route["protocol"]) == PROTOCOL.to_string()).map(
                    |route| {
                        let full = text(&route["dst"]);
                        let dst = match (full.as_str(), family) {
                            ("default", "-4") => "0.0.0.0/0".to_owned(),
                            ("default", _) => "::/0".to_owned(),
                            _ if full.contains('/') => full,
                            (_, "-4") => format!("{full}/32"),
                            _ => format!("{full}/128"),
                        };
                        let metric = route["metric"].as_u64().unwrap_or(0);
                        let kind = match text(&route["type"]).as_str() {
                            "1" | "unicast" => text(&route["gateway"]),
                            "7" | "unreachable" => "unreachable".to_owned(),
                            "9" | "throw" => "throw".to_owned(),
                            other => format!("type {other}"),
                        };
                        format!("{} {dst} {metric} {kind}", text(&route["table"]))
                    },
                ),
            );
        }
        let ours = state.routes.iter().map(|(key, route)| {
            let kind = match route {
                Route::Via(gateway) => gateway.to_string(),
                Route::Unreachable => "unreachable".to_owned(),
                Route::Throw => "throw".to_owned(),
            };
            format!("{} {} {} {kind}", key.table, key.dst, key.metric)
        });
        assert_eq!(ours.collect::<BTreeSet<_>>(), theirs, "{}", host.name);
    }
    Ok(())
}

#[test]
fn tunnel_matches_ip_and_bridge_listing() -> Result {
    let lab = lab();
    harness::needs(&["ip", "bridge"]);
    for host in lab.nodes() {
        let (cluster, state) = applied(&lab, host)?;
        let link = state.link.ok_or("no tunnel")?;
        let theirs = json(&host.netns, "ip -j -d addr show dev egress.vxlan")?;
        let info = &theirs[0]["linkinfo"]["info_data"];
        assert_eq!(text(&theirs[0]["address"]), link.mac.to_string());
        assert_eq!(theirs[0]["mtu"].as_u64(), Some(link.mtu.into()));
        assert_eq!(text(&info["id"]), cluster.tunnel.vni.to_string());
        assert_eq!(text(&info["port"]), cluster.tunnel.port.to_string());
        assert_eq!(text(&info["local"]), link.local.to_string());
        assert_eq!(text(&info["link"]), "eth0");
        assert_eq!(info["learning"], Value::Bool(false));
        let addresses = theirs[0]["addr_info"].as_array().ok_or("no addresses")?.iter();
        let addresses = addresses.map(|address| {
            Ok(format!("{}/{}", text(&address["local"]), address["prefixlen"]).parse()?)
        });
        assert_eq!(addresses.collect::<Result<BTreeSet<IpNet>>>()?, state.addresses);

        let fdb = json(&host.netns, "bridge -j fdb show dev egress.vxlan")?;
        let fdb = fdb.as_array().ok_or("no list")?.iter();
        let fdb: BTreeSet<_> =
            fdb.map(|entry| format!("{} {}", text(&entry["mac"]), text(&entry["dst"]))).collect();
        let ours: BTreeSet<_> =
            state.fdb.iter().map(|(mac, node)| format!("{mac} {node}")).collect();
        assert_eq!(ours, fdb);

        let neighbours = json(&host.netns, "ip -j neigh show dev egress.vxlan nud permanent")?;
        let neighbours = neighbours.as_array().ok_or("no list")?.iter();
        let neighbours: BTreeSet<_> = neighbours
            .map(|entry| format!("{} {}", text(&entry["dst"]), text(&entry["lladdr"])))
            .collect();
        let ours: BTreeSet<_> =
            state.neighbours.iter().map(|(ip, mac)| format!("{ip} {mac}")).collect();
        assert_eq!(ours, neighbours);
    }
    Ok(())
}

/// One of everything: lists of destinations, prefixes of sources, closed ones, odd names.
fn policies() -> Result<Vec<EgressPolicy>> {
    let list = policy("list", &[POD_A, POD_B, POD_C], Some("node-c"), dual(EIP_C))?
        .with_priority(3)
        .with_destinations(Destinations::Nets(
            [hosts(&[OTHER_SERVER]), vec!["203.0.113.0/24".parse()?, "2001:db8:99::/48".parse()?]]
                .concat(),
        ));
    let whole_nodes =
        policy("whole-nodes", &[], Some("node-b"), EgressIp::Node)?.with_priority(9).with_sources(
            vec!["10.244.1.0/24".parse()?, "fd44:1::/64".parse()?, "10.244.3.0/25".parse()?],
        );
    let odd = PolicyId::new("odd/-_.:@+=,~#%")?;
    let mut closed = policy("x", &[STRANGER], None, dual(EIP_B))?;
    closed.id = odd;
    // The longest ids, which differ in their last byte.
    let long = |last: u8| {
        let destinations = Destinations::Nets(vec![format!("203.0.113.{last}/32").parse()?]);
        let id = format!("{}/{}{last}", "n".repeat(63), "p".repeat(252));
        let plain = policy(&id, &[POD_A], Some("node-b"), dual(EIP_B))?;
        Ok::<_, Box<dyn std::error::Error>>(plain.with_destinations(destinations))
    };
    Ok(vec![
        long(1)?,
        long(2)?,
        policy("plain", &[POD_A, POD_B], Some("node-b"), dual(EIP_B))?,
        list,
        whole_nodes,
        closed,
        policy("one-family", &[POD_C], Some("node-b"), EgressIp::V4([198, 51, 100, 210].into()))?,
    ])
}

fn applied(
    lab: &Lab,
    host: &egress_datapath::testing::lab::Host,
) -> Result<(egress_datapath::Cluster, State)> {
    let mut cluster = lab.cluster(host)?;
    cluster.policy_counters = true;
    let mut node: Reconciler<_> = open(host, cluster.marks)?;
    node.reconcile(&cluster, policies()?)?;
    let state = observe(node.datapath())?;
    Ok((cluster, state))
}

fn json(netns: &Netns, line: &str) -> Result<Value> {
    Ok(serde_json::from_str(&tool(netns, line)?)?)
}

/// A string without its quotes, a number as it is.
fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}
