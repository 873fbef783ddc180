use super::*;
use crate::preflight::facts::DeviceKind;

#[test]
fn a_missing_privilege_and_missing_parts() {
    let mut facts = facts();
    facts.denied = true;
    facts.missing = vec![KernelPart::Vxlan];
    let problems = judge(&facts);
    assert_eq!(problems, [Problem::Denied, Problem::Missing { part: KernelPart::Vxlan }]);
    assert_eq!(problems[1].to_string(), "the kernel has no VXLAN (CONFIG_VXLAN)");
    assert!(problems[0].remedy().contains("CAP_NET_ADMIN"));
}

#[test]
fn the_egress_hook_is_missed_where_it_is_asked_for() {
    let mut facts = facts();
    facts.missing = vec![KernelPart::EgressHook];
    assert_eq!(judge(&facts), []);
    let steering = crate::Steering::EgressHook;
    let cluster = Cluster { steering, ..cluster() };
    let problems = judge_for(&cluster, &policy("node-b", EIP), &facts);
    assert_eq!(problems, [Problem::Missing { part: KernelPart::EgressHook }]);
    assert!(problems[0].to_string().contains("CONFIG_NETFILTER_EGRESS"), "{}", problems[0]);
    assert!(problems[0].remedy().contains("5.16"));
}

#[test]
fn forwarding_of_each_family_in_use() {
    let mut facts = facts();
    set(&mut facts, "ipv4/ip_forward", 0);
    let problems = judge(&facts);
    assert_eq!(problems, [Problem::NotForwarding { family: Family::V4 }]);
    assert_eq!(problems[0].remedy(), "sysctl -w net.ipv4.ip_forward=1");

    let dual = policy("node-b", EgressIp::Node);
    set(&mut facts, "ipv4/ip_forward", 1);
    let problems = judge_for(&cluster(), &dual, &facts);
    assert_eq!(problems, [Problem::Missing { part: KernelPart::Ipv6 }]);
    set(&mut facts, "ipv6/conf/all/forwarding", 0);
    let problems = judge_for(&cluster(), &dual, &facts);
    assert_eq!(problems, [Problem::NotForwarding { family: Family::V6 }]);
    assert_eq!(problems[0].remedy(), "sysctl -w net.ipv6.conf.all.forwarding=1");
}

#[test]
fn a_device_with_the_underlay_address_that_does_not_forward() {
    let mut facts = facts();
    let beside = Device { name: "mgmt0".to_owned(), not_forwarding: true, ..Device::default() };
    facts.devices.push(beside);
    facts.addresses.push(address("203.0.113.1", "mgmt0"));
    assert_eq!(judge(&facts), [], "no reply arrives there");
    facts.devices[0].not_forwarding = true;
    let problem = Problem::DeviceNotForwarding { devices: vec!["eth0".to_owned()] };
    assert_eq!(judge(&facts), std::slice::from_ref(&problem));
    assert_eq!(problem.remedy(), "sysctl -w net/ipv4/conf/eth0/forwarding=1");
    set(&mut facts, "ipv4/ip_forward", 0);
    assert_eq!(judge(&facts), [Problem::NotForwarding { family: Family::V4 }]);
}

#[test]
fn the_larger_of_two_filters_is_what_counts() {
    let device = |rp_filter, ours, tunnel| Device {
        name: if ours { "egress.vxlan" } else { "cni0" }.to_owned(),
        mtu: 1450,
        rp_filter,
        ours,
        kind: if tunnel { DeviceKind::Tunnel } else { DeviceKind::Other },
        ..Device::default()
    };
    let problems = |all, device| {
        let mut facts = facts();
        set(&mut facts, "ipv4/conf/all/rp_filter", all);
        facts.devices.push(device);
        judge(&facts)
    };
    let strict = Problem::StrictTunnel { device: "egress.vxlan".to_owned() };
    assert_eq!(problems(1, device(0, true, true)), [strict.clone(), Problem::StrictByDefault]);
    assert_eq!(problems(0, device(1, true, true)), [strict]);
    assert_eq!(problems(1, device(2, true, true)), [Problem::StrictByDefault]);
    assert_eq!(problems(2, device(1, true, true)), []);
    let overlay = Problem::StrictOverlay { devices: vec!["cni0".to_owned()] };
    assert_eq!(problems(1, device(0, false, true)), std::slice::from_ref(&overlay));
    assert_eq!(problems(0, device(1, false, true)), [overlay]);
    assert_eq!(problems(0, device(1, false, false)), []);
}

#[test]
fn marks_that_the_kernel_uses_by_itself() {
    let mut facts = facts();
    set(&mut facts, "ipv4/conf/all/src_valid_mark", 1);
    set(&mut facts, "ipv4/fwmark_reflect", 1);
    set(&mut facts, "ipv6/fwmark_reflect", 0);
    let problems = judge(&facts);
    let wanted = [
        Problem::MarkInReversePath { device: "all".to_owned() },
        Problem::MarkReflected { family: Family::V4 },
    ];
    assert_eq!(problems, wanted);
    assert!(problems.iter().all(|problem| problem.severity() == Severity::Note));
}

#[test]
fn connections() {
    let mut facts = facts();
    set(&mut facts, "netfilter/nf_conntrack_max", 100);
    set(&mut facts, "netfilter/nf_conntrack_count", 80);
    assert_eq!(judge(&facts), []);
    set(&mut facts, "netfilter/nf_conntrack_count", 81);
    let full = Problem::ConntrackFull { count: 81, max: 100 };
    assert_eq!(judge(&facts), std::slice::from_ref(&full));
    assert_eq!(full.remedy(), "sysctl -w net.netfilter.nf_conntrack_max=200");
    set(&mut facts, "netfilter/nf_conntrack_tcp_loose", 0);
    assert_eq!(judge(&facts), [full, Problem::ConntrackStrict]);
}

#[test]
fn a_tunnel_without_ipv6() {
    let dual = policy("node-b", EgressIp::Node);
    let mut facts = facts();
    set(&mut facts, "ipv6/conf/all/forwarding", 1);
    set(&mut facts, "ipv6/conf/default/disable_ipv6", 1);
    assert_eq!(judge_for(&cluster(), &dual, &facts), [], "the datapath enables it on its device");
    facts.lacks_ipv6 = true;
    let problem = |device: &str| Problem::TunnelWithoutIpv6 { device: device.to_owned() };
    assert_eq!(judge_for(&cluster(), &dual, &facts), [problem("default")]);
    assert_eq!(judge(&facts), [], "nobody asks for IPv6");
    set(&mut facts, "ipv6/conf/egress.vxlan/disable_ipv6", 1);
    let problems = judge_for(&cluster(), &dual, &facts);
    assert_eq!(problems, [problem("egress.vxlan")]);
    assert_eq!(problems[0].remedy(), "sysctl -w net/ipv6/conf/egress.vxlan/disable_ipv6=0");
}

#[test]
fn what_can_be_done_without_is_a_note_with_the_version_that_brings_it() {
    let mut facts = facts();
    facts.missing = vec![KernelPart::TableOwner, KernelPart::NatChain];
    let problems = judge(&facts);
    let missing = |part| Problem::Missing { part };
    assert_eq!(problems, [missing(KernelPart::NatChain), missing(KernelPart::TableOwner)]);
    assert_eq!(problems[0].severity(), Severity::Broken);
    assert!(problems[0].remedy().contains("5.2"), "{}", problems[0].remedy());
    assert_eq!(problems[1].severity(), Severity::Note);
    let remedy = problems[1].remedy();
    assert!(remedy.contains("6.9") && remedy.contains("nothing, unless"), "{remedy}");
}

#[test]
fn ranges_of_sources_are_a_risk_on_a_kernel_that_misses_them() {
    let mut facts = facts();
    facts.version = Some((6, 1));
    let missed = Problem::RangesMissed { major: 6, minor: 1 };
    assert_eq!(judge(&facts), std::slice::from_ref(&missed));
    assert_eq!(missed.severity(), Severity::Risk);
    let single =
        EgressPolicy { sources: vec!["10.244.1.9/32".parse().unwrap()], ..policy("node-b", EIP) };
    assert_eq!(judge_for(&cluster(), &single, &facts), []);
    for version in [None, Some((6, 18)), Some((7, 0))] {
        facts.version = version;
        assert_eq!(judge(&facts), []);
    }
}
