//! The iptables backend: what its packets do, and what it leaves.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::process::{Command, Stdio};
use std::thread;

use common::backend::datapath;
use common::fleet::{
    Expect, Fleet, Result, assert_same, check, dual, expect, expect_nothing, lab, lost, policy,
    sources, tool,
};
use common::suited;
use egress_datapath::alloc::{MarkPool, TablePool};
use egress_datapath::datapath::observe;
use egress_datapath::iptables::Iptables;
use egress_datapath::state::Variant;
use egress_datapath::testing::lab::{
    EIP_B, EIP_C, Lab, NODE_A, NODE_B_OUTSIDE, Netns, OTHER_SERVER, POD_A, POD_B, POD_C, Proto,
    SERVER, STRANGER, hosts, net, probe,
};
use egress_datapath::{
    ApplyError, Backend, Changes, Destinations, EgressIp, EgressPolicy, Family, MarkLayout, State,
    Unavailable, plan,
};
use rustix::fs::{FlockOperation, flock};
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use rustix::thread::UnshareFlags;

const B: Option<&str> = Some("node-b");
const C: Option<&str> = Some("node-c");

/// A fleet whose nodes have this backend.
fn fleet(lab: &Lab, backend: Backend) -> Result<Fleet> {
    Fleet::with(lab, |cluster| cluster.backend = backend)
}

fn backend(variant: Variant) -> Backend {
    Backend::Iptables(Iptables::new(variant))
}

/// A lab, for the tools of a variant.
fn lab_with(variant: Variant) -> Lab {
    harness::needs(&[variant.command(Family::V4), "ipset"]);
    lab()
}

/// Makes a test for each variant.
macro_rules! of_both {
    ($($name:ident)*) => {
        mod legacy {
            $(#[test] fn $name() -> super::Result { super::$name(super::Variant::Legacy) })*
        }
        mod nft {
            $(#[test] fn $name() -> super::Result { super::$name(super::Variant::Nft) })*
        }
    };
}

of_both! {
    packets_have_egress_ip_of_policy
    source_prefix_with_exceptions
    remove_leaves_only_foreign_objects
    restart_is_noop
    objects_changed_by_others_restored
    refused_change_leaves_table_unchanged
    printed_commands_give_same_state
    documented_limits_hold
    drained_node_mark_layout_change
    chains_of_our_names_taken_over
}

/// Policies of every kind at once.
fn policies() -> Result<Vec<EgressPolicy>> {
    let mut listed = policy("listed", &[POD_A, POD_C], C, dual(EIP_C))?;
    listed.destinations = Destinations::Nets(hosts(&[OTHER_SERVER]));
    let mut rest = policy("rest", &[POD_A, POD_B], B, dual(EIP_B))?;
    rest.priority = 1;
    Ok(vec![listed, rest])
}

fn expectations(lab: &Lab) -> Vec<Expect<'_>> {
    vec![
        expect(&lab.pod_a, SERVER, EIP_B),
        expect(&lab.pod_a, OTHER_SERVER, EIP_C),
        expect(&lab.pod_b, SERVER, EIP_B),
        expect(&lab.pod_c, OTHER_SERVER, EIP_C),
        expect(&lab.pod_c, SERVER, POD_C),
        expect(&lab.stranger, SERVER, STRANGER),
        expect(&lab.node_a.netns, SERVER, NODE_A),
        expect(&lab.pod_a, POD_C, POD_A),
        expect(&lab.pod_a, POD_B, POD_A),
        expect(&lab.server, POD_A, SERVER),
    ]
}

fn packets_have_egress_ip_of_policy(variant: Variant) -> Result {
    let lab = lab_with(variant);
    let mut fleet = fleet(&lab, backend(variant))?;
    fleet.apply(&policies()?)?;
    check(&expectations(&lab));
    for report in fleet.apply(&policies()?)? {
        assert!(report.changes.is_empty(), "{}", report.changes);
    }
    Ok(())
}

fn source_prefix_with_exceptions(variant: Variant) -> Result {
    let lab = lab_with(variant);
    // One set says of the whole node where it goes, and of one pod in it otherwise.
    let mut whole = policy("whole", &[], B, dual(EIP_B))?;
    whole.priority = 1;
    whole.sources = POD_A.into_iter().zip([24, 64]).map(|(ip, len)| net(ip, len).trunc()).collect();
    for (mut own, translated) in [
        (policy("own", &[STRANGER], C, dual(EIP_C))?, Some(EIP_C)),
        (policy("own", &[STRANGER], B, EgressIp::Node)?, Some(NODE_B_OUTSIDE)),
        (policy("own", &[STRANGER], None, dual(EIP_C))?, None),
        (
            policy("own", &[STRANGER], None, dual(EIP_C))?.with_unavailable(Unavailable::Bypass),
            Some(STRANGER),
        ),
    ] {
        let own_source = |to| match translated {
            Some(translated) => expect(&lab.stranger, to, translated),
            None => expect_nothing(&lab.stranger, to),
        };
        let mut fleet = fleet(&lab, backend(variant))?;
        fleet.apply(&[whole.clone(), own.clone()])?;
        check(&[expect(&lab.pod_a, SERVER, EIP_B), own_source(SERVER)]);
        own.destinations = Destinations::Nets(hosts(&[OTHER_SERVER]));
        fleet.apply(&[whole.clone(), own.clone()])?;
        check(&[
            expect(&lab.pod_a, SERVER, EIP_B),
            expect(&lab.stranger, SERVER, EIP_B),
            own_source(OTHER_SERVER),
        ]);
        fleet.apply(&[whole.clone()])?;
        check(&[expect(&lab.stranger, SERVER, EIP_B)]);
    }
    Ok(())
}

/// Rules, chains and sets of others, some with names almost like ours.
const OTHERS: [&str; 9] = [
    "ipset create egress-src-v4-6d6b7c1c6a8e5f hash:net",
    "ipset add egress-src-v4-6d6b7c1c6a8e5f 10.244.9.9",
    "ipset create egress4-stray hash:ip",
    "IPTABLES -t mangle -N EGRESSGATEWAY-OTHER",
    "IPTABLES -t mangle -A EGRESSGATEWAY-OTHER -j RETURN",
    "IPTABLES -t mangle -A PREROUTING -s 203.0.113.77/32 -j EGRESSGATEWAY-OTHER",
    "IPTABLES -t nat -A POSTROUTING -s 203.0.113.77/32 -j MASQUERADE",
    "IPTABLES -t filter -A FORWARD -s 203.0.113.77/32 -j DROP",
    "IPTABLES -t mangle -A POSTROUTING -m mark --mark 0x26000000/0xff000000 -j RETURN",
];

/// All that the tools tell of iptables and sets, but for counters and dates.
fn listing(netns: &Netns) -> Result<String> {
    let mut text = String::new();
    for line in ["iptables-legacy-save", "ip6tables-legacy-save", "iptables-nft-save", "ipset save"]
    {
        let said = tool(netns, line)?;
        text.extend(["# ", line, "\n"]);
        // A table that was looked at is there from then on.
        let is_content = |line: &&str| !line.starts_with(['#', ':', '*']) && *line != "COMMIT";
        for line in said.lines().filter(is_content) {
            text += line;
            text.push('\n');
        }
    }
    Ok(text)
}

fn remove_leaves_only_foreign_objects(variant: Variant) -> Result {
    let lab = lab_with(variant);
    let netns = &lab.node_b.netns;
    for line in OTHERS {
        tool(netns, &line.replace("IPTABLES", variant.command(Family::V4)))?;
    }
    let before = listing(netns)?;
    let mut fleet = fleet(&lab, backend(variant))?;
    fleet.apply(&policies()?)?;
    assert_eq!(lost(&before, &listing(netns)?), "", "after it was applied");
    fleet.apply(&[policy("p", &[POD_A, POD_B], C, dual(EIP_C))?])?;
    assert_eq!(lost(&before, &listing(netns)?), "", "after it was changed");
    fleet.remove()?;
    assert_same(&before, &listing(netns)?);
    Ok(())
}

fn restart_is_noop(variant: Variant) -> Result {
    let lab = lab_with(variant);
    fleet(&lab, backend(variant))?.apply(&policies()?)?;
    for _ in 0..5 {
        for report in fleet(&lab, backend(variant))?.apply(&policies()?)? {
            assert!(report.changes.is_empty(), "{}", report.changes);
        }
    }
    check(&expectations(&lab));
    Ok(())
}

fn objects_changed_by_others_restored(variant: Variant) -> Result {
    let lab = lab_with(variant);
    let mut fleet = fleet(&lab, backend(variant))?;
    fleet.apply(&policies()?)?;
    for damage in [
        "IPTABLES -t mangle -F",
        "IPTABLES -t nat -F",
        "IPTABLES -t mangle -F EGRESSGATEWAY-MARK-REQUEST",
        "IPTABLES -t nat -D EGRESSGATEWAY-SNAT-EIP 1",
        "IPTABLES -t nat -I POSTROUTING -s 10.244.1.10 -d 198.51.100.0/24 -j MASQUERADE",
        "IPTABLES -t mangle -I PREROUTING -j ACCEPT",
        "IPTABLES -t mangle -A FORWARD -j EGRESSGATEWAY-LOCAL",
        "IPTABLES -t mangle -I EGRESSGATEWAY-LOCAL -j RETURN",
        "IPTABLES -t mangle -N EGRESSGATEWAY-TO-26ffff00",
        "ipset flush egress4-selected",
        "ipset flush egress4-marks",
        "ipset add egress4-selected 10.244.1.99",
        "ipset add egress4-denied 10.244.1.10",
        "ipset create egress4-temporary hash:net",
        "ipset create egress4-src-0000000000000007 hash:net",
        "ipset del egress4-ignore 10.244.0.0/16",
    ] {
        for host in lab.nodes() {
            tool(&host.netns, &damage.replace("IPTABLES", variant.command(Family::V4)))?;
        }
        let mended = fleet.apply(&policies()?).map_err(|error| format!("{damage}: {error}"))?;
        assert!(mended.iter().all(|report| !report.changes.is_empty()), "after {damage}");
        for report in fleet.apply(&policies()?)? {
            assert!(report.changes.is_empty(), "after {damage}: {}", report.changes);
        }
        check(&expectations(&lab));
    }
    Ok(())
}

fn refused_change_leaves_table_unchanged(variant: Variant) -> Result {
    let lab = lab_with(variant);
    let netns = &lab.node_a.netns;
    let mut kernel = datapath(netns, backend(variant))?;
    let mut fleet = fleet(&lab, backend(variant))?;
    fleet.apply(&policies()?)?;
    let found = observe(&mut kernel)?;
    // Somebody has deleted what is about to be deleted.
    let iptables = variant.command(Family::V4);
    let tables = found.xtables.get(&variant).ok_or("no chains")?;
    let chain = tables.chains.keys().map(|chain| chain.name.to_string());
    let to = chain.filter(|name| name.contains("-TO-")).min().ok_or("no gateway")?;
    tool(netns, &format!("{iptables} -t mangle -F EGRESSGATEWAY-MARK-REQUEST"))?;
    tool(netns, &format!("{iptables} -t mangle -F {to}"))?;
    tool(netns, &format!("{iptables} -t mangle -X {to}"))?;
    let save = format!("{iptables}-save -t mangle");
    let rules = || -> Result<Vec<String>> {
        let said = tool(netns, &save)?;
        Ok(said.lines().filter(|line| line.starts_with("-A")).map(str::to_owned).collect())
    };
    let before = rules()?;
    let away = Changes::between(&found, &State { xtables: BTreeMap::new(), ..found.clone() });
    let ApplyError { refused, .. } = kernel.apply(&away).err().ok_or("nothing was refused")?;
    let (_, error) = refused.first().ok_or("nothing was refused")?;
    let said = error.to_string();
    assert!(said.contains(&format!("{iptables}-restore --noflush (table mangle)")), "{said}");
    assert!(error.words().is_some_and(|words| words.contains("line")), "{said}");
    assert_eq!(rules()?, before);
    fleet.apply(&policies()?)?;
    check(&expectations(&lab));
    Ok(())
}

fn printed_commands_give_same_state(variant: Variant) -> Result {
    let lab = lab_with(variant);
    for host in lab.nodes() {
        let mut cluster = lab.cluster(host)?;
        cluster.backend =
            Backend::Iptables(Iptables::new(variant).with_accept(true).with_weave(true));
        let (mut marks, mut tables) = (MarkPool::new(cluster.marks), TablePool::default());
        let plan = plan(&cluster, &policies()?, &mut marks, &mut tables)?;
        let text = Changes::between(&State::default(), &plan.state).to_string();
        let mut kernel = datapath(&host.netns, cluster.backend)?;
        shell(&host.netns, &text)?;
        let by_shell = observe(&mut kernel)?;
        kernel.apply(&Changes::between(&by_shell, &State::default()))?;
        assert!(observe(&mut kernel)?.is_empty());
        kernel.apply(&Changes::between(&State::default(), &plan.state))?;
        assert_eq!(observe(&mut kernel)?, by_shell, "{}", host.name);
        assert_eq!(by_shell, suited(plan.state, &by_shell), "{}", host.name);
    }
    check(&expectations(&lab));
    Ok(())
}

#[test]
fn nftables_printed_commands_give_same_state() -> Result {
    let lab = lab();
    harness::needs(&["nft", "ip", "bridge"]);
    let cluster = lab.cluster(&lab.node_b)?;
    let (mut marks, mut tables) = (MarkPool::new(cluster.marks), TablePool::default());
    let plan = plan(&cluster, &policies()?, &mut marks, &mut tables)?;
    let mut kernel = datapath(&lab.node_b.netns, Backend::Nftables)?;
    let planned = suited(plan.state, &observe(&mut kernel)?);
    let text = Changes::between(&State::default(), &planned).to_string();
    shell(&lab.node_b.netns, &text)?;
    assert_eq!(observe(&mut kernel)?, planned);
    Ok(())
}

/// Feeds a script to a shell in a namespace.
fn shell(netns: &Netns, script: &str) -> Result {
    let output = netns.run(|| {
        let mut shell = Command::new("sh")
            .arg("-e")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()?;
        if let Some(mut stdin) = shell.stdin.take() {
            stdin.write_all(script.as_bytes())?;
        }
        shell.wait_with_output()
    })??;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("sh: {}", String::from_utf8_lossy(&output.stderr)).into())
}

/// What iptables cannot do, as [`Iptables`] says; that it is so is tested, too.
fn documented_limits_hold(variant: Variant) -> Result {
    let lab = lab_with(variant);
    // A masquerade in a table of somebody's own comes first: on the client what is tunnelled then
    // has no policy at the gateway, and is dropped there.
    let masquerade = "table ip foreign { chain post {
        type nat hook postrouting priority 99
        ip saddr 10.244.0.0/16 masquerade
    }
    }";
    for host in [&lab.node_a, &lab.node_b] {
        common::fleet::nft(&host.netns, &[], masquerade)?;
    }
    let mut fleet = fleet(&lab, backend(variant))?;
    fleet.apply(&[policy("p", &[POD_A, POD_B], B, dual(EIP_B))?])?;
    sources(&lab);
    let seen = probe(&lab.pod_a, Proto::Udp, SERVER[0]);
    assert!(seen.is_err(), "{seen:?}");
    assert!(sources(&lab).is_empty());
    // On the gateway the first packet of its own pod gets out as what it was translated to, and
    // no later one does.
    let datagram = probe(&lab.pod_b, Proto::Udp, SERVER[0])?;
    assert_eq!(datagram, NODE_B_OUTSIDE[0]);
    let connection = probe(&lab.pod_b, Proto::Tcp, SERVER[0]);
    assert!(connection.is_err(), "{connection:?}");
    assert!(sources(&lab).into_iter().all(|source| source == NODE_B_OUTSIDE[0]));
    Ok(())
}

/// It is not changed with policies in force.
fn drained_node_mark_layout_change(variant: Variant) -> Result {
    let lab = lab_with(variant);
    let policies = policies()?;
    let with = |marks| {
        Fleet::with(&lab, move |cluster| {
            (cluster.backend, cluster.marks) = (backend(variant), marks);
        })
    };
    for marks in [MarkLayout::SEED, MarkLayout::COMPACT, MarkLayout::SEED] {
        let mut fleet = with(marks)?;
        fleet.apply(&policies)?;
        for report in fleet.apply(&policies)? {
            assert!(report.changes.is_empty(), "{marks:?}: {}", report.changes);
        }
        check(&expectations(&lab));
        fleet.drain()?;
    }
    Ok(())
}

/// Gives this thread, and what it starts, a `/run` of its own.
fn own_run() -> Result {
    #[expect(deprecated, reason = "deprecated because of CLONE_FILES, which is not used here")]
    rustix::thread::unshare(UnshareFlags::NEWNS)?;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    mount("none", "/run", "tmpfs", MountFlags::empty(), None)?;
    Ok(())
}

#[test]
fn xtables_lock_held_waited_for_and_named() -> Result {
    // The lock is a file, the same for all network namespaces.
    let locked = || -> std::result::Result<(), String> {
        let text = |error: &dyn std::fmt::Display| error.to_string();
        let lab = lab_with(Variant::Legacy);
        own_run().map_err(|error| text(&error))?;
        let mut fleet = fleet(&lab, backend(Variant::Legacy)).map_err(|error| text(&error))?;
        let policies = policies().map_err(|error| text(&error))?;
        fleet.apply(&policies[..1]).map_err(|error| text(&error))?;
        let file = File::create("/run/xtables.lock").map_err(|error| text(&error))?;
        flock(&file, FlockOperation::LockExclusive).map_err(|error| text(&error))?;
        let error = fleet.apply(&policies).map(drop).map_err(|error| text(&error));
        let error = error.err().ok_or("nothing waited for the lock")?;
        assert!(error.contains("another program holds /run/xtables.lock"), "{error}");
        flock(&file, FlockOperation::Unlock).map_err(|error| text(&error))?;
        fleet.apply(&policies).map_err(|error| text(&error))?;
        check(&expectations(&lab));
        Ok(())
    };
    let ended = thread::spawn(locked).join();
    Ok(ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?)
}

/// Chains of another egress gateway that have the names of ours, as its agent leaves them.
const ANCESTOR: [&str; 9] = [
    "-t mangle -N EGRESSGATEWAY-MARK-REQUEST",
    "-t mangle -A EGRESSGATEWAY-MARK-REQUEST -s 10.244.1.10/32 -m comment --comment egw:1 -j MARK \
     --set-xmark 0x26ab0000/0xffffffff",
    "-t mangle -I PREROUTING -m comment --comment egw:2 -j EGRESSGATEWAY-MARK-REQUEST",
    "-t mangle -N EGRESSGATEWAY-RESET-MARK",
    "-t mangle -I FORWARD -m comment --comment egw:3 -j EGRESSGATEWAY-RESET-MARK",
    "-t nat -N EGRESSGATEWAY-NO-SNAT",
    "-t nat -A EGRESSGATEWAY-NO-SNAT -m mark --mark 0x26000000/0xff000000 -j ACCEPT",
    "-t nat -I POSTROUTING -j EGRESSGATEWAY-NO-SNAT",
    "-t nat -N EGRESSGATEWAY-SNAT-EIP",
];

fn chains_of_our_names_taken_over(variant: Variant) -> Result {
    let lab = lab_with(variant);
    for line in ANCESTOR {
        for host in lab.nodes() {
            tool(&host.netns, &format!("{} {line}", variant.command(Family::V4)))?;
        }
    }
    let mut fleet = fleet(&lab, backend(variant))?;
    fleet.apply(&policies()?)?;
    check(&expectations(&lab));
    let left = listing(&lab.node_a.netns)?;
    assert!(!left.contains("egw:") && !left.contains("0x26ab0000"), "{left}");
    fleet.remove()?;
    let left = listing(&lab.node_a.netns)?;
    assert!(!left.contains("EGRESSGATEWAY"), "{left}");
    Ok(())
}
