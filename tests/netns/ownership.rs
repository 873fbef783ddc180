//! Alone in charge: a second one is refused, the next one takes over, others cannot touch it.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::fleet::{Result, check, dual, expect, lab, needs_owners, policy, sources, tool};
use egress_datapath::KernelTables;
use egress_datapath::alloc::{MarkPool, TablePool, TableRange};
use egress_datapath::testing::lab::{EIP_B, Host, Lab, POD_A, Proto, SERVER, probe};
use egress_datapath::{
    EgressPolicy, Error, KernelDatapath, KernelError, MarkLayout, Ownership, Reconciler,
};

use crate::process::{Process, part, say, wait};

/// How long answers may take that must come.
const PATIENCE: Duration = Duration::from_secs(120);

/// Started by the tests below in a namespace of the lab.
#[test]
fn exclusive_owner_process() -> Result {
    let Some(node) = part() else { return Ok(()) };
    let mut egress = exclusive()?;
    let report = egress.reconcile(&egress_datapath::testing::lab::cluster(&node)?, policies()?)?;
    say(&format!("{} changes", report.changes.len()))?;
    wait()
}

fn policies() -> Result<Vec<EgressPolicy>> {
    Ok(vec![policy("p", &[POD_A], Some("node-b"), dual(EIP_B))?])
}

/// An exclusive reconciler of the namespace of the calling thread.
fn exclusive() -> std::result::Result<Reconciler<KernelDatapath>, KernelError> {
    let datapath = KernelDatapath::open_as(Ownership::Exclusive)?;
    let tables = TablePool::with_probe(TableRange::default(), KernelTables::open()?);
    Ok(Reconciler::with_allocators(datapath, MarkPool::new(MarkLayout::SEED), tables))
}

fn start(host: &Host) -> Result<(Process, String)> {
    let test = "ownership::exclusive_owner_process";
    let mut process = Process::start(&host.netns, test, host.name)?;
    let said = process.listen()?;
    Ok((process, said))
}

/// The client and the gateway, each in the charge of a process; gateways before their clients.
fn in_charge(lab: &Lab) -> Result<[Process; 2]> {
    let gateway = start(&lab.node_b)?.0;
    Ok([start(&lab.node_a)?.0, gateway])
}

#[test]
fn exclusive_second_open_refused_with_holder_pid() -> Result {
    let lab = lab();
    let processes = in_charge(&lab)?;
    for (host, first) in [&lab.node_a, &lab.node_b].into_iter().zip(&processes) {
        let begin = Instant::now();
        let error = host.netns.run(exclusive)?.err().ok_or("a second one was let in")?;
        let elapsed = begin.elapsed();
        note!("{}: refused within {elapsed:?}: {error}", host.name);
        assert_eq!(error.holder(), Some(first.id()));
        assert!(error.to_string().contains(&first.id().to_string()), "{error}");
        // One that shares may look, but not change anything.
        let datapath = host.netns.run(KernelDatapath::open)??;
        let mut shared = Reconciler::new(datapath);
        let refused = shared.reconcile(&lab.cluster(host)?, &policies()?[..0]).map(drop);
        let Err(Error::Apply(error)) = refused else { return Err("it was let in".into()) };
        let (_, error) = error.refused.first().ok_or("nothing was refused")?;
        assert!(error.is_denied(), "{error}");
        assert_eq!(error.holder(), Some(first.id()));
    }
    check(&[expect(&lab.pod_a, SERVER, EIP_B)]);
    Ok(())
}

#[test]
fn exclusive_takeover_after_kill_is_noop() -> Result {
    let lab = lab();
    let [client, gateway] = in_charge(&lab)?;
    let _before = sources(&lab);
    let (stop, asked) = (AtomicBool::new(false), AtomicU32::new(0));
    thread::scope(|scope| -> Result {
        for (place, server) in SERVER.into_iter().enumerate() {
            let (stop, asked, lab) = (&stop, &asked, &lab);
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    for proto in Proto::BOTH {
                        // Who saw it and as whom is judged at the end, by the server.
                        if probe(&lab.pod_a, proto, server).ok() == Some(EIP_B[place]) {
                            asked.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                }
            });
        }
        let over = take_over(&lab, &asked, [(&lab.node_a, client), (&lab.node_b, gateway)]);
        stop.store(true, Ordering::Relaxed);
        over
    })?;
    let asked = asked.into_inner();
    note!("{asked} questions were answered meanwhile, all as the egress IP");
    assert!(asked > 0);
    assert_eq!(sources(&lab), EIP_B.into(), "everything the server saw wore the egress IP");
    check(&[expect(&lab.pod_a, SERVER, EIP_B)]);
    Ok(())
}

/// Kills each process some times and lets another one take over; before each, packets get through.
fn take_over(lab: &Lab, asked: &AtomicU32, all: [(&Host, Process); 2]) -> Result {
    for (host, mut process) in all {
        for round in 0..5 {
            let (before, begin) = (asked.load(Ordering::Relaxed), Instant::now());
            while asked.load(Ordering::Relaxed) == before {
                if begin.elapsed() > PATIENCE {
                    return Err(format!("{}, round {round}: no answers", host.name).into());
                }
                thread::sleep(Duration::from_millis(1));
            }
            process.kill()?;
            let begin = Instant::now();
            let mut next = host.netns.run(exclusive)??;
            let opened = begin.elapsed();
            let changes = next.reconcile(&lab.cluster(host)?, policies()?)?.changes;
            let elapsed = begin.elapsed();
            note!("{}: taken over within {opened:?}, right after {elapsed:?}", host.name);
            assert!(changes.is_empty(), "{}, round {round}: {changes}", host.name);
            drop(next);
            let (another, said) = start(host)?;
            assert_eq!(said, "0 changes");
            process = another;
        }
    }
    Ok(())
}

#[test]
fn exclusive_table_protected_from_nft_and_iptables() -> Result {
    let lab = lab();
    harness::needs(&["nft", "iptables"]);
    needs_owners(&lab)?;
    let _processes = in_charge(&lab)?;
    for host in [&lab.node_a, &lab.node_b] {
        let listing = || tool(&host.netns, "nft -s list table inet egress_datapath");
        let before = listing()?;
        for denied in [
            "nft delete table inet egress_datapath",
            "nft flush table inet egress_datapath",
            "nft flush chain inet egress_datapath guard",
            "nft delete chain inet egress_datapath guard",
            "nft flush map inet egress_datapath policy_action",
            "nft insert rule inet egress_datapath forward accept",
        ] {
            let error = tool(&host.netns, denied).err().ok_or(denied)?.to_string();
            assert!(error.contains("Operation not permitted"), "{error}");
        }
        tool(&host.netns, "nft flush ruleset")?;
        for flush in ["iptables -F", "iptables -t nat -F", "iptables -X", "ip6tables -t nat -F"] {
            tool(&host.netns, flush)?;
        }
        assert_eq!(listing()?, before, "{}", host.name);
    }
    check(&[expect(&lab.pod_a, SERVER, EIP_B)]);
    Ok(())
}
