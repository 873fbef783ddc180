use super::*;

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

#[test]
fn an_address_that_the_gateway_does_not_have() {
    let problems = judge_for(&cluster(), &policy("node-a", EIP), &facts());
    let policy = "shop/checkout".parse().unwrap();
    assert_eq!(problems, [Problem::EgressIpAbsent { address: ip("198.51.100.7"), policy }]);
}

#[test]
fn an_address_that_the_gateway_adds_to_an_interface() {
    let device = |name: &str| crate::DeviceName::new(name).unwrap();
    let mut cluster = cluster();
    cluster.claims = vec![
        crate::Claim::new("198.51.100.0/24".parse().unwrap(), device("eth8")),
        crate::Claim::new("198.51.100.7/32".parse().unwrap(), device("eth7")),
    ];
    let here = policy("node-a", EIP);
    let mut facts = facts();
    facts.devices.push(Device { name: "eth8".to_owned(), ..Device::default() });
    for down in [false, true] {
        let problems = judge_for(&cluster, &here, &facts);
        let (device, policy) = ("eth7".to_owned(), "shop/checkout".parse().unwrap());
        let address = ip("198.51.100.7");
        assert_eq!(problems, [Problem::ClaimDevice { address, policy, device, down }]);
        assert_eq!(problems[0].severity(), Severity::Broken);
        facts.devices.retain(|device| device.name != "eth7");
        facts.devices.push(Device { name: "eth7".to_owned(), down: !down, ..Device::default() });
    }
    assert_eq!(judge_for(&cluster, &here, &facts), []);
    // Another node is the gateway.
    assert_eq!(judge_for(&cluster, &policy("node-b", EIP), &super::facts()), []);
}

#[test]
fn an_address_on_the_loopback_device_for_which_nobody_answers() {
    let mut facts = facts();
    facts.addresses.push(address("198.51.100.7", "lo"));
    let here = policy("node-a", EIP);
    assert_eq!(judge_for(&cluster(), &here, &facts), []);
    let device = "eth0".to_owned();
    let silent = [Problem::EgressIpSilent { address: ip("198.51.100.7"), device }];
    for device in ["all", "eth0"] {
        let mut facts = facts.clone();
        set(&mut facts, &format!("ipv4/conf/{device}/arp_ignore"), 1);
        assert_eq!(judge_for(&cluster(), &here, &facts), silent);
    }
}

#[test]
fn an_address_that_the_gateway_uses_itself() {
    let mut facts = facts();
    facts.addresses.push(address("198.51.100.7", "eth0"));
    let here = policy("node-a", EIP);
    let uses = ["TCP port 22", "source of routes"].map(String::from);
    facts.uses = uses.clone().map(|what| (ip("198.51.100.7"), what)).into();
    facts.uses.insert((ip("192.0.2.1"), "UDP port 53".to_owned()));
    let problems = judge_for(&cluster(), &here, &facts);
    assert_eq!(
        problems,
        [Problem::EgressIpUsed { address: ip("198.51.100.7"), uses: uses.to_vec() }]
    );
    assert_eq!(
        problems[0].to_string(),
        "egress IP 198.51.100.7 is also used by this node: TCP port 22, source of routes"
    );
    assert_eq!(problems[0].severity(), Severity::Note);
}

#[test]
fn an_address_on_another_node() {
    let mut facts = facts();
    facts.addresses.push(address("198.51.100.7", "eth0"));
    assert_eq!(judge_for(&cluster(), &policy("node-a", EIP), &facts), []);
    let problems = judge(&facts);
    let (device, policy) = ("eth0".to_owned(), "shop/checkout".parse().unwrap());
    let address = ip("198.51.100.7");
    assert_eq!(problems, [Problem::EgressIpElsewhere { address, policy, device }]);
    assert!(problems[0].remedy().starts_with("ip addr del 198.51.100.7 dev eth0"));
}

#[test]
fn a_shared_address_belongs_here_if_one_of_its_gateways_is_here() {
    let mut facts = facts();
    facts.addresses.push(address("198.51.100.7", "eth0"));
    let other = EgressPolicy { id: "shop/a".parse().unwrap(), ..policy("node-a", EIP) };
    for policies in [[policy("node-b", EIP), other.clone()], [other, policy("node-b", EIP)]] {
        assert_eq!(Preflight::new(&cluster(), &policies).judge(&facts), []);
    }
}

#[test]
fn an_ipv6_address_that_the_host_would_use_itself() {
    let mut facts = facts();
    set(&mut facts, "ipv6/conf/all/forwarding", 1);
    facts.addresses.push(address("2001:db8::7", "eth0"));
    let here = policy("node-a", EgressIp::V6("2001:db8::7".parse().unwrap()));
    let address = ip("2001:db8::7");
    let preferred =
        |device: &str| Problem::EgressIpPreferred { address, device: device.to_owned() };
    assert_eq!(judge_for(&cluster(), &here, &facts), [preferred("eth0")]);
    facts.addresses[1].deprecated = true;
    assert_eq!(judge_for(&cluster(), &here, &facts), []);
    facts.addresses[1].device = "lo".to_owned();
    let device = "eth0".to_owned();
    assert_eq!(judge_for(&cluster(), &here, &facts), [Problem::EgressIpSilent { address, device }]);
}

#[test]
fn more_pods_than_an_address_has_ports() {
    let mut facts = facts();
    facts.addresses.push(address("198.51.100.7", "eth0"));
    let of = |id: &str, gateway, first: u32, count: u32| {
        let pods = (first..first + count).map(|n| std::net::Ipv4Addr::from_bits(0x0af4_0000 + n));
        let sources = pods.map(|pod| IpNet::from(IpAddr::from(pod))).collect();
        EgressPolicy { id: id.parse().unwrap(), sources, ..policy(gateway, EIP) }
    };
    let judge = |policies: &[EgressPolicy]| Preflight::new(&cluster(), policies).judge(&facts);
    let (one, other) = (of("one", "node-a", 0, 64_000), of("other", "node-a", 64_000, 512));
    assert_eq!(judge(&[one.clone(), other.clone(), of("far", "node-b", 0, 9)]), []);
    let few = Problem::PortsFew { address: ip("198.51.100.7"), pods: 64_513 };
    assert_eq!(judge(&[one, other, of("last", "node-a", 64_512, 1)]), std::slice::from_ref(&few));
    assert_eq!(few.severity(), Severity::Risk);
    assert!(few.to_string().contains("64512 connections"), "{few}");
}
