//! Problems that the preflight check finds, and packets before and after their remedy.

use std::process::Command;

use common::backend::{backend, replies};
use common::fleet::{Fleet, Result, check, dual, expect, expect_nothing, lab, nft, policy};
use egress_datapath::preflight::{Preflight, Problem};
use egress_datapath::testing::lab::{EIP_B, Host, Lab, POD_A, SERVER};
use egress_datapath::{EgressPolicy, Family, MarkLayout, Replies};

const B: Option<&str> = Some("node-b");

/// Reverse path filters that the check finds on a node.
fn filters(lab: &Lab, host: &Host, policy: &EgressPolicy) -> Result<Vec<Problem>> {
    let cluster = lab.cluster(host)?.with_replies(replies(&MarkLayout::SEED, backend()));
    let mut found = host.netns.run(|| Preflight::new(&cluster, [policy]).run())??;
    found.retain(|problem| matches!(problem, Problem::ReversePathFilter { .. }));
    Ok(found)
}

#[test]
fn reverse_path_filter_reported_where_it_drops_and_remedy_true() -> Result {
    let lab = lab();
    harness::needs(&["nft"]);
    let mut fleet = Fleet::open(&lab)?;
    let policy = policy("p", &[POD_A], B, dual(EIP_B))?;
    fleet.apply(std::slice::from_ref(&policy))?;
    let [works, fails] = [expect(&lab.pod_a, SERVER, EIP_B), expect_nothing(&lab.pod_a, SERVER)];
    for (rule, drops) in [
        ("iifname \"eth0\" fib saddr . iif oif missing drop", false),
        ("fib saddr oif missing drop", false),
        ("fib saddr . iif oif missing drop", true),
    ] {
        let table = format!(
            "table inet host\ndelete table inet host\ntable inet host {{\n\
             chain pre {{\ntype filter hook prerouting priority 10\n{rule}\n}}\n}}\n"
        );
        // The pod's node passes nothing of the tunnel on: the same rule drops nothing there.
        for host in [&lab.node_a, &lab.node_b] {
            nft(&host.netns, &[], &table)?;
        }
        check(std::slice::from_ref(if drops { &fails } else { &works }));
        // With replies by the tunnel it drops these.
        let tunnel = replies(&MarkLayout::SEED, backend()) == Replies::Tunnel;
        for host in [&lab.node_a, &lab.node_b] {
            let found = filters(&lab, host, &policy)?;
            let families: Vec<_> = found.iter().filter_map(Problem::family).collect();
            let here = drops && (tunnel || host.name == "node-b");
            assert_eq!(families, if here { &Family::BOTH[..] } else { &[] }, "{rule}");
            let Some(problem) = found.first() else { continue };
            let remedy = problem.remedy();
            let command = remedy.split_once(';').map_or(&*remedy, |(command, _)| command);
            let done = host.netns.run(|| Command::new("sh").args(["-c", command]).status())??;
            assert!(done.success(), "{command}");
            assert_eq!(filters(&lab, host, &policy)?, [], "{command}");
        }
        if drops {
            check(std::slice::from_ref(&works));
        }
    }
    Ok(())
}
