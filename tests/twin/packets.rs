//! Random packets through simulated nodes and real ones, over changes, drift and restarts.

use std::io;
use std::time::{Duration, Instant};

use egress_datapath::explain::Packet;
use egress_datapath::state::State;
use egress_datapath::{EgressPolicy, MarkLayout, PolicyId};

use crate::drift::drifted;
use crate::fleet::{Fleet, Sent};
use crate::random::Random;
use crate::shrink::{found, shrink};
use crate::{Result, say, seed, times, world};

/// Packets that are sent at least.
const PACKETS: usize = 10_000;
/// Packets between two changes.
const BATCH: usize = 64;
/// How long to look for what a difference needs: some dozen fleets.
const SHRINKING: Duration = Duration::from_secs(120);

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
    let mut fleet = harness::given("network namespaces", Fleet::new(layout, caching));
    let (seed, begun) = (seed()?, Instant::now());
    let mut random = Random::new(seed);
    let mut policies = Vec::new();
    let (mut total, mut steps) = (Sent::default(), Vec::new());
    let mut next: Vec<Step> = (0..3).map(|at| Step::Reconcile(at, policies.clone())).collect();
    while total.packets < times(PACKETS) / 2 {
        for step in next {
            let made = step.make(&mut fleet);
            steps.push(step);
            match made {
                Ok(sent) => total.add(&sent),
                Err(error) => {
                    say(&format!("seed {seed}, step {}: {error}", steps.len() - 1));
                    return Err(shrunk(seed, || Fleet::new(layout, caching), &steps).into());
                }
            }
        }
        next = if matches!(steps.last(), Some(Step::Send(_))) {
            changes(&mut random, &mut policies)
        } else {
            vec![Step::Send(fleet.packets(&mut random, BATCH))]
        };
    }
    let changes = steps.iter().filter(|step| matches!(step, Step::Send(_))).count();
    let Sent { packets, through, translated, explained } = total;
    say(&format!(
        "seed {seed}, marks of {:#x}, caching {caching}: {packets} packets over {changes} changes, {through} got through, \
         {translated} of them with another source, {explained} new connections explained, 0 differences in {:.1} s",
        layout.mask(),
        begun.elapsed().as_secs_f32()
    ));
    assert!(translated > packets / 10 && through < packets * 19 / 20, "the packets say little");
    Ok(())
}

/// Something that is done in both worlds.
#[derive(Clone, Debug)]
enum Step {
    /// Somebody else changes a node; how, a seed decides.
    Edit(usize, u64),
    /// A node's reconciler forgets what it knew; how it begins anew, a seed decides.
    Restart(usize, u64),
    /// Somebody empties a node's table of connections.
    Forget(usize),
    /// A node is made right.
    Reconcile(usize, Vec<EgressPolicy>),
    /// Packets are sent, each by the tap of this number.
    Send(Vec<(usize, Packet)>),
}

impl Step {
    /// Does it, and says what is wrong then.
    fn make(&self, fleet: &mut Fleet) -> Result<Sent> {
        let nothing = Ok(Sent::default());
        match self {
            Self::Edit(at, seed) => {
                let edit = |now: &State| edited(&mut Random::new(*seed), now);
                fleet.edit(*at, edit).and(nothing)
            }
            Self::Restart(at, seed) => {
                fleet.restart(*at, &mut Random::new(*seed))?;
                nothing
            }
            Self::Forget(at) => fleet.forget(*at).and(nothing),
            Self::Reconcile(at, policies) => fleet.reconcile(*at, policies).and(nothing),
            Self::Send(packets) => fleet.send(packets),
        }
    }
}

/// What is left of steps of which the last one failed.
fn shrunk(seed: u64, new: impl Fn() -> io::Result<Fleet>, steps: &[Step]) -> String {
    let difference = |steps: &[Step]| {
        let mut fleet = new().ok()?;
        steps.iter().find_map(|step| step.make(&mut fleet).err())
    };
    found();
    let left = shrink(steps, SHRINKING, |steps| difference(steps).is_some());
    let error = difference(&left)
        .map_or_else(|| "it did not come again".to_owned(), |error| error.to_string());
    let (few, all) = (left.len(), steps.len());
    format!(
        "{few} of {all} steps make the difference:\n{left:#?}\n{error}\n\
         again, all of them: EGRESS_TWIN_SEED={seed} cargo test --test twin packets"
    )
}

/// Changes of something in both worlds.
fn changes(random: &mut Random, policies: &mut Vec<EgressPolicy>) -> Vec<Step> {
    let at = random.below(3);
    match random.below(17) {
        0..=3 => return vec![Step::Edit(at, random.seed())],
        4 | 5 => {
            return vec![Step::Restart(at, random.seed()), Step::Reconcile(at, policies.clone())];
        }
        6 => return vec![Step::Forget(at)],
        // Only one node knows of it, for a while.
        7 | 8 => {
            *policies = changed(random, policies);
            return vec![Step::Reconcile(at, policies.clone())];
        }
        9 | 10 => *policies = world::policies(random, 6),
        _ => *policies = changed(random, policies),
    }
    (0..3).map(|turn| Step::Reconcile((at + turn) % 3, policies.clone())).collect()
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
