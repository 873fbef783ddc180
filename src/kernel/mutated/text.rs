//! Names and addresses as text.

use std::fmt::Display;
use std::str::FromStr;

use crate::kernel::mutate;
use crate::state::{ChainId, Set};
use crate::types::{DeviceName, MacAddr, NodeName, PolicyId};

/// Damages texts; what is accepted must print as it was written.
fn texts<T>(what: &str, corpus: &[&str], parse: impl Fn(&str) -> Option<(T, String)>) {
    let corpus: Vec<_> = corpus.iter().map(|text| text.as_bytes().to_vec()).collect();
    mutate::bytes(what, 4, &corpus, mutate::Random::damaged, |input| {
        let text = String::from_utf8_lossy(input);
        let (_, printed) = parse(&text)?;
        assert_eq!(printed, text);
        Some(size_of::<T>() + printed.len())
    });
}

fn from_str<T: FromStr + Display>(text: &str) -> Option<(T, String)> {
    text.parse::<T>()
        .ok()
        .map(|value| (value.to_string(), value))
        .map(|(text, value)| (value, text))
}

const NAMES: [&str; 6] =
    ["default/p1", "ip-10-0-0-1.internal", "a", "egress.vxlan", "eth0@if7", "\u{fc}\u{202e}\0\n\""];

#[test]
fn mutated_names() {
    let (longest, long) = ("n".repeat(317), "n".repeat(253));
    let corpus = [&NAMES[..], &[&longest, &long]].concat();
    texts("policy ids", &corpus, from_str::<PolicyId>);
    texts("node names", &corpus, from_str::<NodeName>);
    texts("device names", &corpus, from_str::<DeviceName>);
}

#[test]
fn mutated_ethernet_addresses() {
    let corpus = ["66:f7:06:23:81:6b", "00:00:00:00:00:00", "FF:ff:+1:-1: 1:0x1"];
    texts("Ethernet addresses", &corpus, |text| {
        let mac: MacAddr = text.parse().ok()?;
        assert_eq!(mac.to_string(), text.to_ascii_lowercase());
        Some((mac, text.to_owned()))
    });
}

#[test]
fn mutated_names_of_chains_and_sets() {
    let corpus = [
        "prerouting",
        "to_26000100",
        "select_policy4",
        "snat6",
        "nat_postrouting",
        "guard",
        "bypass",
    ];
    texts("chain names", &corpus, |text| {
        ChainId::from_name(text).map(|chain| (chain, chain.to_string()))
    });
    let corpus = ["dest4_24", "dest6_128", "source_net4", "policy_action", "gateway_mark", "eip6"];
    texts("set names", &corpus, |text| Set::from_name(text).map(|set| (set, set.name())));
}
