//! Tests of the facts that real kernels report, in separate network namespaces.

use std::process::Command;

use crate::cluster::{Cluster, Node};
use crate::kernel::rtnetlink::kernel_tests::{in_namespace, sh};
use crate::policy::{EgressIp, EgressPolicy};
use crate::preflight::{DropHook, KernelPart, MarkKind, Preflight, Problem, Severity};
use crate::reconcile::Reconciler;
use crate::types::Family;

fn cluster() -> Cluster {
    let node = |name: &str, number: u8| {
        Node::new(
            name.parse().unwrap(),
            vec![[192, 0, 2, number].into()],
            vec![format!("172.31.0.{number}/16").parse().unwrap()],
        )
    };
    let nodes = vec![node("node-a", 1), node("node-b", 2)];
    Cluster::new("node-a".parse().unwrap(), nodes, vec!["10.244.0.0/16".parse().unwrap()])
}

fn policy(gateway: &str, egress_ip: EgressIp) -> EgressPolicy {
    let sources = ["10.244.1.0/24", "fd00:1::/64"].map(|net| net.parse().unwrap());
    EgressPolicy {
        gateway: Some(gateway.parse().unwrap()),
        ..EgressPolicy::new("shop/checkout".parse().unwrap(), sources.to_vec(), egress_ip)
    }
}

const EIP: EgressIp = EgressIp::V4(std::net::Ipv4Addr::new(198, 51, 100, 7));

/// Problems that a script causes on a host that had none.
#[track_caller]
fn problems(script: &str) -> Vec<Problem> {
    problems_of(&policy("node-b", EIP), script)
}

#[track_caller]
fn problems_of(policy: &EgressPolicy, script: &str) -> Vec<Problem> {
    sh("echo 1 >/proc/sys/net/ipv4/ip_forward
        echo 1 >/proc/sys/net/ipv6/conf/all/forwarding
        echo 0 >/proc/sys/net/ipv4/conf/all/rp_filter
        for d in u0 foreign; do echo 0 >/proc/sys/net/ipv4/conf/$d/rp_filter; done");
    sh(script);
    let mut found = Preflight::new(&cluster(), [policy]).run().unwrap();
    // The kernel may have legacy iptables in every namespace.
    found.retain(|problem| !matches!(problem, Problem::LegacyIptables { both: false, .. }));
    // A feature that the kernel lacks is missing in every namespace.
    let of_kernel = |problem: &Problem| {
        let missing = Problem::Missing { part: KernelPart::TableOwner };
        *problem == missing || matches!(problem, Problem::RangesMissed { .. })
    };
    found.retain(|problem| !of_kernel(problem));
    found
}

#[test]
fn a_fresh_host_has_no_problem_and_keeps_no_trace() {
    in_namespace(|| {
        let all = "ip -d link; ip addr; ip rule; ip -6 rule; ip route show table all";
        assert_eq!(problems(":"), []);
        let before = sh(all);
        assert_eq!(problems(":"), []);
        assert_eq!(sh(all), before);
    });
}

#[test]
fn our_own_objects_are_no_problem() {
    in_namespace(|| {
        let (cluster, policy) = (cluster(), policy("node-b", EIP));
        let mut egress =
            Reconciler::open(cluster.marks, crate::alloc::TableRange::default()).unwrap();
        egress.reconcile(&cluster, [&policy]).unwrap();
        assert_eq!(problems("echo 1 >/proc/sys/net/ipv4/conf/u0/rp_filter"), []);
        let strict = problems("echo 1 >/proc/sys/net/ipv4/conf/egress.vxlan/rp_filter");
        assert_eq!(strict, [Problem::StrictTunnel { device: "egress.vxlan".to_owned() }]);
        sh(&strict[0].remedy());
        assert_eq!(problems(":"), []);
    });
}

#[test]
fn what_others_have_put_into_our_tables() {
    in_namespace(|| {
        let (cluster, policy) = (cluster(), policy("node-b", EIP));
        let mut egress =
            Reconciler::open(cluster.marks, crate::alloc::TableRange::default()).unwrap();
        egress.reconcile(&cluster, [&policy]).unwrap();
        let state = egress.datapath().read(None).unwrap();
        let table = state.routes.keys().next().unwrap().table;
        let script = format!("ip route add 203.0.113.0/24 via 192.0.2.9 table {table}");
        let found = problems(&script);
        let text = found[0].to_string();
        assert!(text.starts_with("ip route 203.0.113.0/24 via 192.0.2.9 table 3"), "{text}");
        assert!(egress.reconcile(&cluster, [&policy]).unwrap().changes.is_empty(), "not ours");
        sh(&found[0].remedy());
        assert_eq!(problems(":"), []);
    });
}

#[test]
fn settings_are_those_of_the_namespace() {
    in_namespace(|| {
        let found = problems(
            "echo 0 >/proc/sys/net/ipv4/ip_forward
             echo 1 >/proc/sys/net/ipv4/conf/all/rp_filter
             echo 1 >/proc/sys/net/ipv4/conf/all/src_valid_mark
             echo 1 >/proc/sys/net/ipv4/fwmark_reflect",
        );
        let wanted = [
            Problem::NotForwarding { family: Family::V4 },
            Problem::StrictOverlay { devices: vec!["foreign".to_owned()] },
            Problem::MarkInReversePath { device: "all".to_owned() },
            Problem::MarkReflected { family: Family::V4 },
        ];
        assert_eq!(found, wanted);
    });
}

#[test]
fn without_the_privilege_it_says_so() {
    in_namespace(|| {
        use rustix::thread::{CapabilitySet, capabilities, set_capabilities};
        sh("echo 1 >/proc/sys/net/ipv4/ip_forward");
        let mut ours = capabilities(None).unwrap();
        ours.effective.remove(CapabilitySet::NET_ADMIN);
        set_capabilities(None, ours).unwrap();
        let found = Preflight::new(&cluster(), [policy("node-b", EIP)]).run().unwrap();
        assert_eq!(found[0], Problem::Denied);
        assert!(found[1..].iter().all(|problem| problem.severity() < Severity::Broken));
    });
}

#[test]
fn rules_and_tables_of_others() {
    in_namespace(|| {
        let found = problems(
            "ip rule del pref 0 && ip rule add pref 150 lookup local
             ip route add default via 192.0.2.9 && ip rule add pref 40 lookup main
             ip rule add pref 50 lookup main suppress_prefixlength 0
             ip rule add pref 102 iif u0 lookup 7
             ip rule add pref 5210 fwmark 0x80000/0xff0000 lookup 52
             ip route add 203.0.113.0/24 dev u0 table 3005",
        );
        let text: Vec<_> = found.iter().map(ToString::to_string).collect();
        assert_eq!(
            text,
            [
                "no IPv4 rule looks in the table of local addresses before ours at 101: packets \
                 to this host are steered away",
                "ip rule 40: lookup 254 precedes the gateways' rules at 101 and matches steered \
                 packets",
                "ip rule 102: lookup 7 has a priority of ours: which of them is asked first \
                 depends on their age, and packets without our mark may pass it by",
                "ip rule 5210: fwmark 0x80000/0xff0000 lookup 52 tests bits 0x00ff0000 of the \
                 mark, of which 0x00ff0000 are in the mark layout",
                "1 of the routing tables 3000 to 3100 are in use by other programs, 100 are free",
            ]
        );
    });
}

#[test]
fn devices_of_others() {
    in_namespace(|| {
        let found = problems(
            "ip link set u0 mtu 1400
             ip link add egress.vxlan type veth peer name v0
             ip link add v1 type vxlan id 5 dstport 7789 local 192.0.2.1
             ip link add v2 type vxlan id 100 dstport 7789 local 192.0.2.1",
        );
        let device = |name: &str| name.to_owned();
        let wanted = [
            Problem::NameTaken { device: device("egress.vxlan") },
            Problem::VxlanTaken { device: device("v2"), vni: 100, port: 7789 },
            Problem::UnderlayMtu { device: device("u0"), found: 1400, said: 1500 },
            Problem::PortShared { device: device("v1"), vni: 5, port: 7789 },
        ];
        assert_eq!(found, wanted);
        sh("ip link del v1; ip link del v2; ip link del egress.vxlan; ip link set u0 mtu 1500
            ip link add v3 type vxlan external dstport 7789");
        let taken = Problem::PortTaken { device: device("v3"), port: 7789 };
        assert_eq!(problems("ip addr flush dev u0")[0], taken);
        let address = [192, 0, 2, 1].into();
        assert!(problems(":").contains(&Problem::NoUnderlay { address }));
    });
}

#[test]
fn egress_ips() {
    in_namespace(|| {
        let address = [198, 51, 100, 7].into();
        let (here, id) = (policy("node-a", EIP), "shop/checkout".parse().unwrap());
        let absent = Problem::EgressIpAbsent { address, policy: id };
        assert_eq!(problems_of(&here, ":"), [absent]);
        let script = "ip addr add 198.51.100.7/32 dev lo
                      echo 1 >/proc/sys/net/ipv4/conf/u0/arp_ignore";
        let silent = Problem::EgressIpSilent { address, device: "u0".to_owned() };
        assert_eq!(problems_of(&here, script), [silent]);
        let found = problems(":");
        assert!(matches!(&found[..], [Problem::EgressIpElsewhere { .. }]), "{found:?}");

        sh("ip addr add 198.51.100.7/24 dev u0");
        let listener = std::net::TcpListener::bind("198.51.100.7:22").unwrap();
        let connection = std::net::TcpStream::connect("198.51.100.7:22").unwrap();
        let socket = std::net::UdpSocket::bind("198.51.100.7:53").unwrap();
        let uses = ["TCP port 22", "UDP port 53", "source of routes"].map(String::from);
        let noted = Problem::EgressIpUsed { address, uses: uses.to_vec() };
        assert!(problems_of(&here, ":").contains(&noted));
        drop((listener, connection, socket));
        sh("ip addr del 198.51.100.7/24 dev u0");

        let six = policy("node-a", EgressIp::V6("2001:db8::7".parse().unwrap()));
        let found = problems_of(&six, "ip addr add 2001:db8::7/128 dev u0 nodad");
        assert!(matches!(&found[..], [Problem::EgressIpPreferred { .. }]), "{found:?}");
        sh(&found[0].remedy());
        assert_eq!(problems_of(&six, ":"), []);
    });
}

#[test]
fn firewalls_of_others() {
    harness::needs(&["iptables-nft"]);
    in_namespace(|| {
        let found = problems(
            "iptables-nft -P INPUT DROP; iptables-nft -P FORWARD DROP
             iptables-nft -t mangle -A PREROUTING -m mark --mark 0x20000/0x20000 -j ACCEPT
             iptables-nft -t mangle -A PREROUTING -j MARK --set-xmark 0x10000/0x10000
             iptables-nft -t mangle -A PREROUTING -j CONNMARK --restore-mark --nfmask 0xff000000 \
                --ctmask 0xff000000
             iptables-nft -t mangle -A PREROUTING -j MARK --set-xmark 0x4000/0x4000",
        );
        let drop = |chain: &str, hook| Problem::DropPolicy {
            table: "ip filter".to_owned(),
            chain: chain.to_owned(),
            hook,
            port: 7789,
        };
        let used = |bits, writes| Problem::MarkUsedByFirewall {
            table: "ip mangle".to_owned(),
            chain: "PREROUTING".to_owned(),
            rules: 1,
            kind: MarkKind::Packet,
            writes,
            bits,
            shared: bits,
        };
        let wanted = [
            drop("INPUT", DropHook::Input),
            drop("FORWARD", DropHook::Forward),
            used(0x2_0000, false),
            used(0x1_0000, true),
            used(0xff00_0000, true),
        ];
        for problem in &wanted {
            assert!(found.contains(problem), "{problem:?} in {found:#?}");
        }
        let both = |problem: &Problem| matches!(problem, Problem::LegacyIptables { .. });
        assert_eq!(
            found.iter().filter(|problem| !both(problem)).count(),
            wanted.len(),
            "{found:#?}"
        );
    });
}

#[test]
fn both_variants_of_iptables() {
    harness::needs(&["iptables-legacy", "iptables-nft"]);
    in_namespace(|| {
        let listed = Command::new("iptables-legacy").args(["-t", "filter", "-L"]).output().unwrap();
        if !listed.status.success() {
            harness::unmet("no legacy iptables in this kernel");
        }
        let found = problems("iptables-nft -A INPUT -j ACCEPT");
        let tables = vec!["filter".to_owned()];
        assert_eq!(found, [Problem::LegacyIptables { tables, both: true }]);
    });
}
