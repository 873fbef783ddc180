//! Egress IPs that the gateway adds to an interface of the host.

use std::io::{Write, stderr};
use std::net::{IpAddr, Ipv4Addr};
use std::thread;
use std::time::{Duration, Instant};

use common::backend::backend;
use common::fleet::{Expect, Fleet, Result, check, dual, expect, lab, open, policy, sources, tool};
use egress_datapath::datapath::{Op, observe};
use egress_datapath::event::Component;
use egress_datapath::preflight::{Preflight, Problem};
use egress_datapath::testing::lab::{
    EIP_A, EIP_B, Host, Lab, NODE_B_OUTSIDE, NODE_C_OUTSIDE, POD_A, POD_B, SERVER,
};
use egress_datapath::{
    ApplyError, Backend, Claim, Cluster, DeviceName, EgressIp, EgressPolicy, Error, KernelDatapath,
};

/// Until the server knows that an address has moved.
const PATIENCE: Duration = Duration::from_secs(60);

fn claiming(cluster: &mut Cluster) {
    let device = DeviceName::new("eth1").unwrap();
    let nets = ["198.51.100.0/24", "2001:db8:51::/64"].map(|net| net.parse().unwrap());
    cluster.claims = nets.map(|net| Claim::new(net, device.clone())).to_vec();
}

fn fleet(lab: &Lab) -> Result<Fleet> {
    Fleet::with(lab, claiming)
}

fn via(gateway: &str) -> Result<Vec<EgressPolicy>> {
    Ok(vec![policy("p", &[POD_A, POD_B], Some(gateway), dual(EIP_A))?])
}

/// What node-b refuses of these policies.
fn refused(fleet: &mut Fleet, policies: &[EgressPolicy]) -> Result<ApplyError> {
    let error = fleet.apply_to("node-b", policies).unwrap_err();
    match *error.downcast()? {
        Error::Apply(refused) => Ok(refused),
        other => Err(other.into()),
    }
}

/// Egress IPs that this crate has added to interfaces of a node.
fn claimed(host: &Host) -> Result<Vec<IpAddr>> {
    let state = host.netns.run(|| observe(&mut KernelDatapath::open()?))??;
    Ok(state.claims.into_iter().map(|(address, _)| address).collect())
}

fn listed(host: &Host, address: IpAddr) -> Result<String> {
    let line = tool(&host.netns, &format!("ip -o addr show to {address}"))?;
    Ok(line.split_whitespace().skip(1).collect::<Vec<_>>().join(" "))
}

fn mac(host: &Host, device: &str) -> Result<String> {
    let link = tool(&host.netns, &format!("ip -o link show dev {device}"))?;
    let mut words = link.split_whitespace().skip_while(|word| *word != "link/ether");
    Ok(words.nth(1).ok_or("no MAC address")?.to_owned())
}

/// The MAC address by which the server knows an egress IP.
fn known_as(lab: &Lab, address: IpAddr) -> Result<String> {
    let entry = tool(&lab.server, &format!("ip neigh show to {address}"))?;
    let mut words = entry.split_whitespace().skip_while(|word| *word != "lladdr");
    Ok(words.nth(1).unwrap_or_default().to_owned())
}

#[test]
fn gateway_has_egress_ip_while_policy_names_it() -> Result {
    harness::needs(&["ip"]);
    let lab = lab();
    let mut fleet = fleet(&lab)?;
    fleet.apply(&via("node-b")?)?;
    assert_eq!(claimed(&lab.node_b)?, EIP_A);
    let [v4, v6] = EIP_A;
    let forms = [
        format!("eth1 inet {v4}/32 scope host"),
        format!("eth1 inet6 {v6}/128 scope global nodad deprecated"),
    ];
    for (address, form) in EIP_A.into_iter().zip(forms) {
        let listed = listed(&lab.node_b, address)?;
        assert!(listed.starts_with(&form), "{listed}");
    }
    assert!(claimed(&lab.node_a)?.is_empty() && claimed(&lab.node_c)?.is_empty());
    check(&[expect(&lab.pod_a, SERVER, EIP_A), expect(&lab.pod_b, SERVER, EIP_A)]);
    // The node itself goes by its own address, also where that was added later.
    for length in [24, 64] {
        let own = NODE_B_OUTSIDE[usize::from(length == 64)];
        tool(&lab.node_b.netns, &format!("ip addr del {own}/{length} dev eth1"))?;
        tool(&lab.node_b.netns, &format!("ip addr add {own}/{length} dev eth1"))?;
    }
    // Until duplicate address detection ends.
    thread::sleep(Duration::from_secs(2));
    check(&[expect(&lab.node_b.netns, SERVER, NODE_B_OUTSIDE)]);
    // A process without memory finds the addresses.
    let mut fleet = self::fleet(&lab)?;
    for report in fleet.apply(&via("node-b")?)? {
        assert!(report.changes.is_empty(), "{}", report.changes);
    }
    fleet.apply(&[])?;
    assert!(claimed(&lab.node_b)?.is_empty());
    fleet.apply(&via("node-b")?)?;
    fleet.remove()?;
    assert!(claimed(&lab.node_b)?.is_empty());
    assert!(tool(&lab.node_b.netns, "ip addr show")?.contains(&EIP_B[0].to_string()));
    Ok(())
}

#[test]
fn egress_ip_that_a_host_has_is_refused_with_its_mac() -> Result {
    harness::needs(&["ip"]);
    let lab = lab();
    for (address, length) in EIP_A.into_iter().zip([32, 128]) {
        tool(&lab.node_c.netns, &format!("ip addr add {address}/{length} dev eth1 nodad"))?;
    }
    let mut fleet = fleet(&lab)?;
    let begin = Instant::now();
    let source = refused(&mut fleet, &via("node-b")?)?;
    writeln!(stderr(), "refused after {:?}", begin.elapsed())?;
    let holder = mac(&lab.node_c, "eth1")?;
    let found: Vec<_> = source.refused.iter().map(|(op, error)| (op, error.duplicate())).collect();
    assert_eq!((found.len(), source.skipped), (2, 0));
    for (op, mac) in found {
        assert!(matches!(op, Op::ClaimAddress(..)), "{op}");
        assert_eq!(mac.map(|mac| mac.to_string()), Some(holder.clone()));
    }
    assert!(claimed(&lab.node_b)?.is_empty());
    // Everything else is in force: the host with the address gets the replies.
    assert!(sources(&lab).is_empty());
    for (address, length) in EIP_A.into_iter().zip([32, 128]) {
        tool(&lab.node_c.netns, &format!("ip addr del {address}/{length} dev eth1"))?;
    }
    // A permanent neighbour is not deleted.
    let entry = format!("{} lladdr {holder} dev eth1", EIP_A[0]);
    tool(&lab.node_b.netns, &format!("ip neigh replace {entry} nud permanent"))?;
    let source = refused(&mut fleet, &via("node-b")?)?;
    assert_eq!((source.refused.len(), claimed(&lab.node_b)?), (1, vec![EIP_A[1]]));
    tool(&lab.node_b.netns, &format!("ip neigh del {entry}"))?;
    fleet.apply(&via("node-b")?)?;
    check(&[expect(&lab.pod_a, SERVER, EIP_A)]);
    Ok(())
}

#[test]
fn neighbours_follow_egress_ip_to_another_gateway() -> Result {
    harness::needs(&["ip"]);
    let lab = lab();
    let mut fleet = fleet(&lab)?;
    fleet.apply(&via("node-b")?)?;
    for (gateway, host) in
        [("node-c", &lab.node_c), ("node-b", &lab.node_b), ("node-c", &lab.node_c)]
    {
        check(&[expect(&lab.pod_a, SERVER, EIP_A)]);
        let old = if gateway == "node-c" { "node-b" } else { "node-c" };
        let policies = via(gateway)?;
        fleet.apply_to(old, &policies)?;
        fleet.apply_to(gateway, &policies)?;
        let begin = Instant::now();
        let wanted = mac(host, "eth1")?;
        for address in EIP_A {
            while known_as(&lab, address)? != wanted {
                assert!(begin.elapsed() < PATIENCE, "{address}: {}", known_as(&lab, address)?);
            }
        }
        writeln!(stderr(), "the server knows of {gateway} {:?} after the commit", begin.elapsed())?;
        fleet.apply(&policies)?;
    }
    check(&[expect(&lab.pod_a, SERVER, EIP_A), expect(&lab.node_c.netns, SERVER, NODE_C_OUTSIDE)]);
    Ok(())
}

#[test]
fn network_is_asked_for_many_egress_ips_at_the_same_time() -> Result {
    let lab = lab();
    let addresses = (100..164).map(|last| Ipv4Addr::new(198, 51, 100, last));
    let policies: Vec<_> = addresses
        .map(|address| {
            policy(&address.to_string(), &[POD_A], Some("node-b"), EgressIp::V4(address))
        })
        .collect::<std::result::Result<_, _>>()?;
    let mut fleet = fleet(&lab)?;
    let begin = Instant::now();
    fleet.apply_to("node-b", &policies)?;
    let took = begin.elapsed();
    assert!(took < Claim::PROBE_TIME * 64 / 4, "{took:?}");
    assert_eq!(claimed(&lab.node_b)?.len(), 64);
    Ok(())
}

#[test]
fn interface_that_is_missing_or_down_closes_nothing_else() -> Result {
    let lab = lab();
    let missing = |cluster: &mut Cluster| {
        claiming(cluster);
        cluster.claims[1].device = DeviceName::new("eth7").unwrap();
    };
    let mut fleet = Fleet::with(&lab, missing)?;
    let mut cluster = lab.cluster(&lab.node_b)?;
    missing(&mut cluster);
    // What the check says beforehand: the interface, and whether it is down.
    let foretold = || -> Result<Vec<_>> {
        let policies = via("node-b")?;
        let found = lab.node_b.netns.run(|| Preflight::new(&cluster, &policies).run())??;
        let claims = found.into_iter().filter_map(|problem| match problem {
            Problem::ClaimDevice { device, down, .. } => Some((device, down)),
            _ => None,
        });
        Ok(claims.collect())
    };
    assert_eq!(foretold()?, [("eth7".to_owned(), false)]);
    let reasons = |fleet: &mut Fleet| -> Result<Vec<_>> {
        let source = refused(fleet, &via("node-b")?)?;
        assert_eq!(source.skipped, 0, "{source}");
        Ok(source.refused.iter().map(|(_, error)| (error.errno(), error.remedy())).collect())
    };
    let absent = (Some(19), Some("create the interface first or name another one"));
    assert_eq!(reasons(&mut fleet)?, [absent]);
    assert_eq!(claimed(&lab.node_b)?, EIP_A[..1]);
    fleet.apply_to("node-a", &via("node-b")?)?;
    check(&[Expect { from: &lab.pod_a, to: SERVER, source: [Some(EIP_A[0]), None] }]);
    tool(&lab.node_b.netns, "ip link set eth1 down")?;
    let both = [("eth1".to_owned(), true), ("eth7".to_owned(), false)];
    assert_eq!(foretold()?, both);
    tool(&lab.node_b.netns, &format!("ip addr del {}/32 dev eth1", EIP_A[0]))?;
    assert_eq!(foretold()?, both);
    let down = (Some(100), Some("set the interface up first or name another one"));
    assert_eq!(reasons(&mut fleet)?, [down, absent]);
    Ok(())
}

#[test]
fn address_of_another_program_is_left_alone() -> Result {
    harness::needs(&["ip"]);
    let lab = lab();
    let mut fleet = fleet(&lab)?;
    let policies = [policy("p", &[POD_A], Some("node-b"), dual(EIP_B))?];
    let source = refused(&mut fleet, &policies)?;
    for (_, error) in &source.refused {
        assert_eq!(error.words(), Some("another program has added the address to eth1"));
    }
    assert_eq!((source.refused.len(), source.skipped), (2, 0));
    // The policy is in force, with the address of the other program.
    fleet.apply_to("node-a", &policies)?;
    check(&[expect(&lab.pod_a, SERVER, EIP_B)]);
    fleet.remove()?;
    for address in EIP_B {
        assert!(!listed(&lab.node_b, address)?.is_empty());
    }
    Ok(())
}

#[test]
fn deleted_egress_ip_is_reported_and_added_again() -> Result {
    if backend() != Backend::Nftables {
        harness::limit("with iptables there are no notifications");
    }
    let lab = lab();
    let mut cluster = lab.cluster(&lab.node_b)?;
    claiming(&mut cluster);
    let mut egress = open(&lab.node_b, cluster.marks)?;
    let mut watch = egress.datapath().watch()?;
    egress.reconcile(&cluster, &via("node-b")?)?;
    // The kernel names no writer of some of these changes.
    let _ = watch.drain()?;
    for (address, length) in EIP_A.into_iter().zip([32, 128]) {
        tool(&lab.node_b.netns, &format!("ip addr del {address}/{length} dev eth1"))?;
        assert_eq!(watch.drain()?.changed, [Component::Address].into());
        egress.repair()?;
        assert_eq!(claimed(&lab.node_b)?, EIP_A);
        // Addresses of other programs on that interface are no news.
        tool(&lab.node_b.netns, &format!("ip addr add 192.0.2.{length}/32 dev eth1"))?;
        assert!(watch.drain()?.changed.is_empty());
    }
    Ok(())
}
