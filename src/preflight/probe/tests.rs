//! Tests of the facts that real kernels report, in separate network namespaces.

use std::process::Command;

use crate::alloc::{MarkPool, TablePool, TableRange};
use crate::cluster::{Backend, Cluster, Node, Steering};
use crate::datapath::Known;
use crate::iptables::Variant;
use crate::kernel::rtnetlink::kernel_tests::{in_namespace, sh};
use crate::policy::{EgressIp, EgressPolicy};
use crate::preflight::{DropHook, FastPath, KernelPart, MarkKind, Preflight, Problem, Severity};
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
        let mut egress = Reconciler::open(cluster.marks, TableRange::default()).unwrap();
        egress.reconcile(&cluster, [&policy]).unwrap();
        assert_eq!(problems("echo 1 >/proc/sys/net/ipv4/conf/u0/rp_filter"), []);
        let strict = problems("echo 1 >/proc/sys/net/ipv4/conf/egress.vxlan/rp_filter");
        assert_eq!(strict, [Problem::StrictTunnel { device: "egress.vxlan".to_owned() }]);
        sh(&strict[0].remedy());
        assert_eq!(problems(":"), []);
    });
}

#[test]
fn our_own_chains_in_iptables_are_no_problem() {
    for variant in [Variant::Nft, Variant::Legacy] {
        harness::needs(&[variant.command(Family::V4), variant.command(Family::V6)]);
        in_namespace(move || {
            let backend = Backend::Iptables(crate::iptables::Iptables::new(variant));
            for gateway in ["node-a", "node-b"] {
                let (cluster, policy) =
                    (cluster().with_backend(backend), policy(gateway, EgressIp::Node));
                let before = problems_of(&policy, ":");
                let datapath = crate::iptables::IptablesDatapath::open().unwrap();
                let (marks, tables) = (MarkPool::default(), TablePool::default());
                let mut egress = Reconciler::with_allocators(datapath, marks, tables);
                egress.reconcile(&cluster, [&policy]).unwrap();
                let is_legacy =
                    |problem: &Problem| matches!(problem, Problem::LegacyIptables { .. });
                let of_others = |by: &Cluster, chains: &str| {
                    let mut found = Preflight::new(by, [&policy]).run().unwrap();
                    let legacy = found.iter().any(is_legacy);
                    found.retain(|problem| !is_legacy(problem));
                    assert_eq!(found, before, "{variant:?}, gateway {gateway}, {chains}");
                    legacy
                };
                assert!(!of_others(&cluster, "ours alone"));
                let _same = of_others(&self::cluster(), "seen by another backend");
                if variant == Variant::Legacy {
                    sh("iptables-legacy -A OUTPUT -j ACCEPT");
                    assert!(of_others(&cluster, "with a rule of another program"));
                    sh("iptables-legacy -F OUTPUT; iptables-legacy -P INPUT DROP");
                    assert!(of_others(&cluster, "with a policy of another program"));
                    sh("iptables-legacy -P INPUT ACCEPT");
                }
                egress.remove().unwrap();
            }
        });
    }
}

#[test]
fn saved_chains_keep_the_host_from_its_own_rules_until_the_remedy() {
    for variant in [Variant::Nft, Variant::Legacy] {
        let tool = variant.command(Family::V4);
        harness::needs(&[tool, "ipset", "sed"]);
        in_namespace(move || {
            sh(&format!("{tool} -A INPUT -p tcp --dport 7 -j ACCEPT"));
            let backend = Backend::Iptables(crate::iptables::Iptables::new(variant));
            let (cluster, policy) = (cluster().with_backend(backend), policy("node-a", EIP));
            let datapath = crate::iptables::IptablesDatapath::open().unwrap();
            let (marks, tables) = (MarkPool::default(), TablePool::default());
            let mut egress = Reconciler::with_allocators(datapath, marks, tables);
            egress.reconcile(&cluster, [&policy]).unwrap();
            let root = std::env::temp_dir().join(format!("egress-{tool}-{}", std::process::id()));
            std::fs::create_dir_all(root.join("etc/iptables")).unwrap();
            let file = root.join("etc/iptables/rules.v4").display().to_string();
            sh(&format!("{tool}-save >{file}"));
            egress.remove().unwrap();
            sh(&format!("{tool} -F"));
            // As at boot: the sets are missing.
            let restore = format!("{tool}-restore <{file}");
            let restores = || Command::new("sh").args(["-c", &restore]).output().unwrap();
            assert!(!restores().status.success());
            assert!(!sh(&format!("{tool}-save")).contains("--dport 7"));
            let saved = super::saved::saved(&root);
            assert!(saved.len() == 1 && saved[0].for_iptables, "{saved:?}");
            let problem = Problem::SavedRules { file: file.clone(), for_iptables: true };
            sh(problem.remedy().split_once(';').unwrap().0);
            assert!(restores().status.success(), "{}", sh(&format!("cat {file}")));
            assert!(sh(&format!("{tool}-save")).contains("--dport 7"));
            assert_eq!(super::saved::saved(&root), []);
            std::fs::remove_dir_all(&root).unwrap();
        });
    }
}

#[test]
fn saved_tables_are_named_and_the_host_loads_its_own_after_the_remedy() {
    harness::needs(&["nft", "awk"]);
    for steering in [Steering::Tables, Steering::EgressHook] {
        in_namespace(move || {
            sh("nft add table inet host");
            let (cluster, policy) = (cluster().with_steering(steering), policy("node-b", EIP));
            let mut egress = Reconciler::open(cluster.marks, TableRange::default()).unwrap();
            egress.reconcile(&cluster, [&policy]).unwrap();
            let root = std::env::temp_dir().join(format!("egress-nft-{}", std::process::id()));
            std::fs::create_dir_all(root.join("etc")).unwrap();
            let file = root.join("etc/nftables.conf").display().to_string();
            sh(&format!("nft list ruleset >{file}"));
            egress.remove().unwrap();
            sh("nft flush ruleset");
            let restore = format!("nft -f {file}");
            let restores = || Command::new("sh").args(["-c", &restore]).output().unwrap();
            let first = restores().status.success();
            // Where a chain needs a device that is not there yet, older kernels refuse all.
            assert!(first || steering == Steering::EgressHook);
            assert_eq!(sh("nft list ruleset").contains("table inet host"), first);
            let saved = super::saved::saved(&root);
            assert!(saved.len() == 1 && !saved[0].for_iptables, "{saved:?}");
            sh(&format!(
                "awk '/^table (inet|netdev) egress_datapath /{{ours=1}} !ours{{print}} /^}}/{{ours=0}}' \
                 {file} >{file}.new; mv {file}.new {file}; nft flush ruleset"
            ));
            assert!(restores().status.success());
            assert_eq!(sh("nft list tables").trim(), "table inet host");
            assert_eq!(super::saved::saved(&root), []);
            std::fs::remove_dir_all(&root).unwrap();
        });
    }
}

#[test]
fn what_others_have_put_into_our_tables() {
    in_namespace(|| {
        let (cluster, policy) = (cluster(), policy("node-b", EIP));
        let mut egress = Reconciler::open(cluster.marks, TableRange::default()).unwrap();
        egress.reconcile(&cluster, [&policy]).unwrap();
        let state = egress.datapath().read(Known::Nothing).unwrap();
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
fn filters_of_tc() {
    harness::needs(&["tc", "ip"]);
    in_namespace(|| {
        let found = |script: &str| -> Vec<_> {
            let found = problems(script).into_iter();
            let paths = found.map(|problem| match problem {
                Problem::FastPath { path, devices } => (path, devices.join(" ")),
                other => panic!("{other:?}"),
            });
            paths.collect()
        };
        let redirect = |from: &str, to: &str, how: &str| {
            format!(
                "tc filter add dev {from} ingress protocol ip u32 match u32 0 0 action mirred {how} \
                 dev {to}\n"
            )
        };
        let qdiscs = "ip link add p0 type veth peer name p1
            ip link add p2 type veth peer name p3
            tc qdisc add dev p0 clsact; tc qdisc add dev p1 ingress; tc qdisc add dev p2 clsact\n";
        assert_eq!(found(qdiscs), []);
        assert_eq!(found(&redirect("p0", "p2", "egress mirror")), []);
        let at = |path, devices: &str| (path, devices.to_owned());
        let one = redirect("p0", "p2", "egress redirect");
        assert_eq!(found(&one), [at(FastPath::Redirect, "p0")]);
        let more = redirect("p1", "p2", "ingress redirect");
        assert_eq!(found(&more), [at(FastPath::Redirect, "p0 p1")]);
        let program = "tc filter add dev p2 egress bpf bytecode '1,6 0 0 4294967295' flowid 1:1";
        let wanted = [at(FastPath::Redirect, "p0 p1"), at(FastPath::TrafficControl, "p2")];
        assert_eq!(found(program), wanted);
    });
}

/// Reverse path filters that a script makes, on a gateway: family, chain and certainty.
fn filters(script: &str) -> Vec<(Family, String, bool)> {
    let dual = policy("node-a", EgressIp::Node);
    let found = problems_of(&dual, script).into_iter();
    let found = found.filter_map(|problem| match problem {
        Problem::ReversePathFilter { family, table, chain, certain, .. } => {
            Some((family, format!("{table} {chain}"), certain))
        }
        _ => None,
    });
    found.collect()
}

#[test]
fn reverse_path_filters_of_nft() {
    harness::needs(&["nft"]);
    in_namespace(|| {
        let chain = "nft add table inet h
            nft 'add chain inet h pre { type filter hook prerouting priority 10; }'\n";
        let add =
            |rule: &str| format!("nft flush chain inet h pre\nnft 'add rule inet h pre {rule}'");
        let both = [Family::V4, Family::V6];
        for (rule, families) in [
            ("fib saddr . iif oif missing drop", &both[..]),
            ("fib saddr . mark . iif oif missing counter log drop", &both),
            ("meta nfproto ipv6 fib saddr . mark . iif oif missing drop", &both[1..]),
            ("iifname != \"lo\" fib saddr . iif oif missing drop", &both),
            ("iif != lo fib saddr . iif oif 0 drop", &both),
            ("iifname \"u*\" fib saddr . iif oif missing drop", &[]),
            ("iif u0 fib saddr . iif oif missing drop", &[]),
            ("iifname u0 fib saddr . iif oif missing drop", &[]),
            ("meta mark & 0xff == 7 fib saddr . iif oif missing drop", &[]),
            ("fib saddr oif missing drop", &[]),
            ("fib saddr . iif oif exists accept", &[]),
            ("fib daddr . iif type != local drop", &[]),
        ] {
            let found = filters(&format!("{chain}{}", add(rule)));
            let wanted = |family: &Family| (*family, "inet h pre".to_owned(), true);
            assert_eq!(found, families.iter().map(wanted).collect::<Vec<_>>(), "{rule}");
        }
        let found = filters(&add("ct state new fib saddr . iif oif missing drop"));
        assert_eq!(found.first().map(|(.., certain)| *certain), Some(false), "{found:?}");
        let dual = policy("node-a", EgressIp::Node);
        let found = problems_of(&dual, &add("fib saddr . iif oif missing drop"));
        let remedy = found[0].remedy();
        sh(remedy.split_once(';').unwrap().0);
        assert_eq!(filters(":"), []);
    });
}

#[test]
fn reverse_path_filters_of_iptables() {
    harness::needs(&["iptables-nft", "ip6tables-nft"]);
    in_namespace(|| {
        let six = (Family::V6, "ip6 mangle PREROUTING".to_owned(), true);
        let found = filters(
            "ip6tables-nft -t mangle -A PREROUTING -i lo -m rpfilter --invert -j DROP
             ip6tables-nft -t mangle -A PREROUTING -m rpfilter --loose --invert -j DROP
             ip6tables-nft -t mangle -A PREROUTING -m comment --comment x -m rpfilter --validmark \
                --invert -j DROP",
        );
        assert_eq!(found, std::slice::from_ref(&six));
        let four = (Family::V4, "ip mangle nixos-fw-rpfilter".to_owned(), true);
        let found = filters(
            "iptables-nft -t mangle -N nixos-fw-rpfilter
             iptables-nft -t mangle -A nixos-fw-rpfilter -m rpfilter --validmark -j RETURN
             iptables-nft -t mangle -A nixos-fw-rpfilter -p udp --sport 67 --dport 68 -j RETURN
             iptables-nft -t mangle -A nixos-fw-rpfilter -j DROP
             iptables-nft -t mangle -A PREROUTING -j nixos-fw-rpfilter",
        );
        assert_eq!(found, [four, six]);
        // Calico's, of packets from its own interfaces.
        let found = filters(
            "iptables-nft -t mangle -F; ip6tables-nft -t mangle -F
             iptables-nft -t raw -A PREROUTING -i cali+ -j MARK --set-xmark 0x40000/0x40000
             iptables-nft -t raw -A PREROUTING -m mark --mark 0x40000/0x40000 -m rpfilter \
                --validmark --invert -j DROP",
        );
        assert_eq!(found, []);
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
