use super::*;

fn vxlan(name: &str, vni: u32, port: u16, external: bool) -> Device {
    let vxlan = Some(Vxlan { vni, port, external });
    Device { name: name.to_owned(), mtu: 1450, vxlan, ..Device::default() }
}

fn with(device: Device) -> Vec<Problem> {
    let mut facts = facts();
    facts.devices.push(device);
    judge(&facts)
}

#[test]
fn other_vxlan_devices() {
    let device = || "other".to_owned();
    let taken = Problem::VxlanTaken { device: device(), vni: 100, port: 7789 };
    assert_eq!(with(vxlan("other", 100, 7789, false)), [taken]);
    let shared = Problem::PortShared { device: device(), vni: 101, port: 7789 };
    assert_eq!(with(vxlan("other", 101, 7789, false)), std::slice::from_ref(&shared));
    assert_eq!(shared.severity(), Severity::Note);
    let external = Problem::PortTaken { device: device(), port: 7789 };
    assert_eq!(with(vxlan("other", 0, 7789, true)), [external]);
    assert_eq!(with(vxlan("other", 100, 4789, false)), []);
    assert_eq!(with(Device { ours: true, ..vxlan("other", 100, 7789, false) }), []);
}

#[test]
fn the_name_is_taken() {
    let taken = Problem::NameTaken { device: "egress.vxlan".to_owned() };
    assert_eq!(with(vxlan("egress.vxlan", 5, 4789, false)), [taken]);
}

#[test]
fn the_underlay_address_is_nowhere() {
    let mut facts = facts();
    facts.addresses.clear();
    let problems = judge(&facts);
    assert_eq!(problems, [Problem::NoUnderlay { address: [192, 0, 2, 1].into() }]);
}

#[test]
fn sizes() {
    let mut facts = facts();
    facts.devices[0].mtu = 1400;
    let problem = |found| Problem::UnderlayMtu { device: "eth0".to_owned(), found, said: 1500 };
    assert_eq!(judge(&facts), [problem(1400)]);
    assert_eq!(problem(1400).severity(), Severity::Risk);
    facts.devices[0].mtu = 9000;
    assert_eq!(judge(&facts), [], "the path to a node is smaller");

    let ours = |mtu| Device { ours: true, mtu, ..vxlan("egress.vxlan", 100, 7789, false) };
    for (found, severity) in [(1400, Severity::Note), (8950, Severity::Risk)] {
        let problem = Problem::TunnelMtu { device: "egress.vxlan".to_owned(), found, wanted: 1450 };
        assert_eq!(problem.severity(), severity);
        assert_eq!(with(ours(found)), [problem]);
    }
}

#[test]
fn the_smallest_underlay_on_every_node_is_no_problem() {
    let tunnel = Tunnel::default().with_underlay_mtu(1460);
    let (cluster, policy) = (cluster().with_tunnel(tunnel), policy("node-b", EIP));
    for mtu in [1460, 1500, 9000] {
        let mut facts = facts();
        facts.devices[0].mtu = mtu;
        assert_eq!(judge_for(&cluster, &policy, &facts), [], "before the first call");
        let ours = Device { ours: true, ..vxlan("egress.vxlan", 100, 7789, false) };
        facts.devices.push(Device { mtu: 1410, ..ours });
        assert_eq!(judge_for(&cluster, &policy, &facts), [], "after it");
    }
}

#[test]
fn a_tunnel_that_the_kernel_limits_to_the_underlay_is_one_problem() {
    let mut facts = facts();
    facts.devices[0].mtu = 1460;
    let ours = Device { ours: true, ..vxlan("egress.vxlan", 100, 7789, false) };
    facts.devices.push(Device { mtu: 1410, ..ours });
    let device = "eth0".to_owned();
    let problem = Problem::UnderlayMtu { device, found: 1460, said: 1500 };
    assert_eq!(judge(&facts), std::slice::from_ref(&problem));
    assert!(problem.remedy().contains("underlay MTU to 1460"), "{}", problem.remedy());
}

#[test]
fn the_underlay_device_that_the_cluster_names_is_the_one() {
    let tunnel = Tunnel { underlay_device: Some("bond0".parse().unwrap()), ..Tunnel::default() };
    let cluster = Cluster { tunnel, ..cluster() };
    let mut facts = facts();
    facts.devices.push(Device { name: "bond0".to_owned(), mtu: 1280, ..Device::default() });
    let problems = judge_for(&cluster, &policy("node-b", EIP), &facts);
    let device = "bond0".to_owned();
    assert_eq!(problems, [Problem::UnderlayMtu { device, found: 1280, said: 1500 }]);
}

#[test]
fn what_spidernet_leaves() {
    let theirs = Rule {
        family: Family::V4,
        priority: 99,
        mark: Some((0x26d9_b723, u32::MAX)),
        source: None,
        selects: false,
        inverted: false,
        action: Action::Lookup { table: 0x26d9_b723, without_default: false },
    };
    let found = |rules: Vec<Rule>, devices: Vec<Device>| {
        let mut facts = facts();
        facts.rules.extend(rules);
        facts.devices.extend(devices);
        judge(&facts).into_iter().find(|problem| matches!(problem, Problem::Predecessor { .. }))
    };
    let problem = found(vec![theirs.clone()], vec![vxlan("egress.vxlan", 100, 7789, false)]);
    let device = Some("egress.vxlan".to_owned());
    assert_eq!(problem, Some(Problem::Predecessor { rules: 1, device }));
    let none = vec![
        Rule { priority: 98, ..theirs.clone() },
        Rule { mark: Some((0x26d9_b723, 0xff00_0000)), ..theirs.clone() },
        Rule { mark: Some((0x2600_0000, u32::MAX)), ..theirs.clone() },
        Rule { action: Action::Lookup { table: 7, without_default: false }, ..theirs },
    ];
    let ours = Device { ours: true, ..vxlan("egress.vxlan", 100, 7789, false) };
    assert_eq!(found(none, vec![ours, vxlan("egress.vxlan", 7, 7789, false)]), None);
}
