//! The iptables backend: its text, and that differences of it make what is wanted.

use std::path::Path;

use egress_datapath::state::Variant;
use egress_datapath::{Backend, Changes, Cluster, Destinations, EgressPolicy, Iptables, State};

use crate::{cluster_v4, nets, planned, policy, v4};

fn with(mut cluster: Cluster, iptables: Iptables) -> Cluster {
    cluster.backend = Backend::Iptables(iptables);
    cluster
}

#[track_caller]
fn check(file: &str, text: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/pure/golden").join(file);
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&path, text).unwrap();
    }
    let expected = std::fs::read_to_string(&path).unwrap_or_default();
    for (number, (is, should)) in (1..).zip(text.lines().zip(expected.lines())) {
        assert_eq!(is, should, "{file}:{number}");
    }
    assert_eq!(text.lines().count(), expected.lines().count(), "{file}");
}

fn one() -> EgressPolicy {
    EgressPolicy {
        destinations: Destinations::Nets(nets(&["10.6.105.150/32"])),
        ..policy("uuid", &["172.29.234.173/32"], Some("b"), v4("198.51.100.200"))
    }
}

/// The example of the datapath's ancestors: one policy, one gateway.
fn shell(node: &str, variant: Variant) -> String {
    let iptables = Iptables { accept: true, weave: true, ..Iptables::new(variant) };
    let plan = planned(&with(cluster_v4(node), iptables), [&one()]).unwrap();
    Changes::between(&State::default(), &plan.state).as_shell().to_string()
}

#[test]
fn the_shell_text_of_a_client() {
    check("shell_client.sh", &shell("a", Variant::Legacy));
    assert_eq!(
        shell("a", Variant::Nft),
        shell("a", Variant::Legacy).replace("-legacy", "-nft"),
        "the variants differ in the command alone"
    );
}

#[test]
fn the_shell_text_of_a_gateway() {
    check("shell_gateway.sh", &shell("b", Variant::Legacy));
}
