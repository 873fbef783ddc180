//! Random packets through simulated nodes and real ones, over changes, drift and restarts.

use std::time::Instant;

use egress_datapath::state::State;
use egress_datapath::{EgressPolicy, MarkLayout, PolicyId};

use crate::drift::drifted;
use crate::fleet::{Fleet, Sent};
use crate::random::Random;
use crate::{Result, given, say, seed, times, world};

/// Packets that are sent at least.
const PACKETS: usize = 10_000;
/// Packets between two changes.
const BATCH: usize = 64;

#[test]
fn packets_fare_alike() -> Result {
    run(MarkLayout::SEED, false)
}

#[test]
fn packets_fare_alike_where_the_first_of_a_connection_decides() -> Result {
    run(MarkLayout::SEED, true)
}

#[test]
fn packets_fare_alike_with_marks_without_prefix() -> Result {
    run(MarkLayout::COMPACT, false)
}

fn run(layout: MarkLayout, caching: bool) -> Result {
    let Some(mut fleet) = given(Fleet::new(layout, caching))? else { return Ok(()) };
    let (seed, begun) = (seed()?, Instant::now());
    let mut random = Random::new(seed);
    let mut policies = Vec::new();
    let (mut total, mut steps) = (Sent::default(), 0);
    for at in 0..3 {
        fleet.reconcile(at, &policies)?;
    }
    while total.packets < times(PACKETS) / 2 {
        let what = step(&mut fleet, &mut random, &mut policies)
            .map_err(|error| format!("seed {seed}, step {steps}: {error}"))?;
        let sent = fleet.send(&mut random, BATCH)?;
        if let Some(wrong) = sent.wrong.first() {
            let count = sent.wrong.len();
            let what = format!("seed {seed}, step {steps}, {what}: {count} packets, {policies:#?}");
            return Err(format!("{what}\n{wrong}").into());
        }
        steps += 1;
        total.packets += sent.packets;
        total.through += sent.through;
        total.translated += sent.translated;
        total.explained += sent.explained;
    }
    let Sent { packets, through, translated, explained, .. } = total;
    say(&format!(
        "seed {seed}, marks of {:#x}, caching {caching}: {packets} packets over {steps} changes, {through} got through, \
         {translated} of them with another source, {explained} new connections explained, 0 differences in {:.1} s",
        layout.mask(),
        begun.elapsed().as_secs_f32()
    ));
    assert!(translated > packets / 10 && through < packets * 19 / 20, "the packets say little");
    Ok(())
}

/// Changes something in both worlds, and says what.
fn step(
    fleet: &mut Fleet,
    random: &mut Random,
    policies: &mut Vec<EgressPolicy>,
) -> Result<String> {
    let at = random.below(3);
    match random.below(8) {
        0 | 1 => {
            let changes = fleet.edit(at, |now| edited(random, now))?;
            return Ok(format!("node {at} edited: {changes}"));
        }
        2 => {
            fleet.restart(at, random)?;
            fleet.reconcile(at, policies)?;
            return Ok(format!("node {at} restarted"));
        }
        // Only one node knows of it, for a while.
        3 => {
            *policies = changed(random, policies);
            fleet.reconcile(at, policies)?;
            return Ok(format!("node {at} is ahead"));
        }
        4 => *policies = world::policies(random, 6),
        _ => *policies = changed(random, policies),
    }
    for turn in 0..3 {
        fleet.reconcile((at + turn) % 3, policies)?;
    }
    Ok("all nodes reconciled".into())
}

/// Policies of which one has come, gone, moved or got other members.
fn changed(random: &mut Random, policies: &[EgressPolicy]) -> Vec<EgressPolicy> {
    let mut policies = policies.to_vec();
    let at = random.below(policies.len() + 1);
    let other = world::policy(random, at);
    match policies.get_mut(at) {
        None => policies.push(other),
        Some(policy) => match random.below(5) {
            0 => drop(policies.remove(at)),
            1 => (policy.gateway, policy.egress_ip) = (other.gateway, other.egress_ip),
            2 => policy.sources = other.sources,
            3 => policy.destinations = other.destinations,
            _ => policy.priority = other.priority,
        },
    }
    // By their number.
    for (number, policy) in policies.iter_mut().enumerate() {
        policy.id = PolicyId::new(format!("p{number}")).unwrap();
    }
    policies
}

/// What somebody else may do. Neighbours stay: a packet that waits for one is not lost yet.
fn edited(random: &mut Random, now: &State) -> State {
    let mut state = drifted(random, now);
    state.neighbours.clone_from(&now.neighbours);
    if state.firewall.is_none() {
        state.firewall.clone_from(&now.firewall);
    }
    state
}
