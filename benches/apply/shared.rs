//! Pods that are each in several policies with destination lists: a class for every combination.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};

use common::world::{cluster, name};
use egress_datapath::alloc::{MarkPool, TablePool, TableRange};
use egress_datapath::testing::{Faults, Subsystem};
use egress_datapath::{
    Changes, Destinations, EgressIp, EgressPolicy, KernelDatapath, PolicyId, Reconciler, State,
    Update, plan,
};
use ipnet::IpNet;

use crate::{line, median, timed};

const PODS: u32 = 200;
const POLICIES: u32 = 20;
/// Policies of a pod.
const EACH: usize = 5;
/// Destinations of a policy, of no other one.
const DESTINATIONS: u32 = 800;
const ROUNDS: usize = 3;

fn address(bits: u32) -> IpNet {
    IpAddr::from(Ipv4Addr::from_bits(bits)).into()
}

fn policies() -> Vec<EgressPolicy> {
    let mut sources = vec![Vec::new(); POLICIES as usize];
    let mut state = 1_u32;
    for pod in 0..PODS {
        let mut chosen = BTreeSet::new();
        while chosen.len() < EACH {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            chosen.insert((state >> 16) % POLICIES);
        }
        for policy in chosen {
            sources[policy as usize].push(address(0x0b00_0000 + pod));
        }
    }
    let policy = |(index, sources): (u32, Vec<IpNet>)| {
        let destinations = (0..DESTINATIONS).map(|n| address(0xc800_0000 + index * 4_096 + n));
        let eip = EgressIp::V4(Ipv4Addr::from_bits(0xc633_6400 + index));
        EgressPolicy::new(PolicyId::new(format!("bench/shared-{index}")).unwrap(), sources, eip)
            .with_destinations(Destinations::Nets(destinations.collect()))
            .with_gateway(name(index + 1))
    };
    (0..).zip(sources).map(policy).collect()
}

pub(crate) fn shared() {
    println!("{PODS} pods, each in {EACH} of {POLICIES} policies of {DESTINATIONS} destinations");
    let (cluster, policies) = (cluster(), policies());
    let (mut plans, mut compares, mut colds, mut floors) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let (mut removes, mut pods, mut restarts) = (Vec::new(), Vec::new(), Vec::new());
    let mut elements = 0;
    for _ in 0..ROUNDS {
        let mut tables = TablePool::new(TableRange::default());
        let (took, planned) =
            timed(|| plan(&cluster, &policies, &mut MarkPool::default(), &mut tables).unwrap());
        plans.push(took);
        let (took, changes) = timed(|| Changes::between(&State::default(), &planned.state));
        compares.push(took);
        elements = changes.len();
        drop((changes, planned));
        let faults = Faults::new();
        let mut egress = Reconciler::new(KernelDatapath::open().unwrap().with_faults(&faults));
        colds.push(timed(|| egress.reconcile(&cluster, &policies).unwrap()).0);
        floors.push(faults.sending_to(Subsystem::Firewall));
        let (policy, sources) = (policies[0].id.clone(), vec![address(0x0b00_0000 + PODS)]);
        let added: Update = Update::AddSources { policy: policy.clone(), sources: sources.clone() };
        pods.push(timed(|| egress.update([added]).unwrap()).0);
        // A restart that finds elements which are not expected lists the whole map.
        let undo: Update = Update::RemoveSources { policy, sources };
        egress.update([undo]).unwrap();
        let mut fresh = Reconciler::new(KernelDatapath::open().unwrap());
        restarts.push(timed(|| fresh.reconcile(&cluster, &policies).unwrap()).0);
        removes.push(timed(|| fresh.remove().unwrap()).0);
    }
    println!("  {elements} operations");
    let floor = median(floors);
    line("floor: the kernel's time for the messages", floor, None);
    line("cold apply", median(colds), Some(floor));
    line("of it the plan", median(plans), Some(floor));
    line("of it the difference", median(compares), Some(floor));
    line("update, one pod of a new class", median(pods), None);
    line("reconcile after a restart", median(restarts), None);
    line("remove", median(removes), None);
}
