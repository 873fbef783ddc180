use super::*;
use crate::cluster::Backend;
use crate::iptables::{Iptables, Variant};
use crate::preflight::facts::Flowtable;

#[test]
fn a_flowtable_is_a_risk_where_nothing_keeps_connections_out() {
    let (table, name) = ("inet kube".to_owned(), "fast".to_owned());
    let found = Flowtable { table, name, devices: vec!["veth1".to_owned()], hardware: true };
    let firewall = Firewall { flowtables: vec![found], ..Firewall::default() };
    let facts = Facts { firewall, ..facts() };
    let iptables = Backend::Iptables(Iptables::new(Variant::Nft));
    for (backend, severity) in [(Backend::Nftables, Severity::Note), (iptables, Severity::Risk)] {
        let cluster = cluster().with_backend(backend);
        let problems = judge_for(&cluster, &policy("node-b", EIP), &facts);
        assert_eq!(problems.len(), 1);
        assert_eq!(problems[0].severity(), severity);
        assert_eq!(
            problems[0].to_string(),
            "flowtable fast of nft table inet kube forwards packets of open connections on veth1 \
             and in the hardware, ahead of all hooks"
        );
        assert_eq!(problems[0].remedy().starts_with("nothing"), severity == Severity::Note);
    }
}

#[test]
fn fast_paths_of_interfaces() {
    for (path, severity) in [
        (FastPath::Redirect, Severity::Risk),
        (FastPath::Hardware, Severity::Risk),
        (FastPath::TrafficControl, Severity::Note),
        (FastPath::Xdp, Severity::Note),
    ] {
        let mut facts = facts();
        facts.fast_paths.insert(path, ["veth1", "veth2"].map(str::to_owned).into());
        let problems = judge(&facts);
        let devices = vec!["veth1".to_owned(), "veth2".to_owned()];
        assert_eq!(problems, [Problem::FastPath { path, devices }]);
        assert_eq!(problems[0].severity(), severity);
        assert!(problems[0].to_string().ends_with(" on veth1, veth2, ahead of all hooks"));
    }
}
