//! Random changes, good ones and such that take the kernel for something else than it is.

use std::time::Instant;

use egress_datapath::Changes;
use egress_datapath::state::State;

use crate::drift::drifted;
use crate::random::Random;
use crate::world::{cluster, planned, policies};
use crate::{Result, Twins, given, say, seed, times};

/// Operations that are made at least.
const OPERATIONS: usize = 100_000;

#[test]
fn the_same_changes_have_the_same_end() -> Result {
    let Some(mut twins) = given(Twins::new())? else { return Ok(()) };
    let seed = seed()?;
    let mut random = Random::new(seed);
    let (begun, wanted) = (Instant::now(), times(OPERATIONS));
    let (mut steps, mut tried, mut made, mut refused) = (0, 0, 0, 0);
    let mut now = State::default();
    while tried < wanted {
        let (taken, desired) = change(&mut random, &now);
        let changes = Changes::between(&taken, &desired);
        let at = |error| format!("seed {seed}, step {steps}: {error}");
        let outcome = twins.apply(&changes).map_err(at)?;
        now = twins.observe().map_err(|error| {
            let at = at(error);
            format!("{at}\nafter\n{changes}\n{outcome:?}")
        })?;
        steps += 1;
        tried += changes.len();
        match outcome {
            None => made += changes.len(),
            Some(outcome) => {
                made += outcome.applied;
                refused += outcome.refused.len();
            }
        }
    }
    say(&format!(
        "seed {seed}: {tried} operations in {steps} changes on the simulator and the kernel, \
         {made} made, {refused} refused, 0 differences in {:.1} s",
        begun.elapsed().as_secs_f32()
    ));
    assert!(made > tried / 3 && refused > steps / 10, "the changes are not worth making");
    Ok(())
}

/// What the kernel is taken for, and what is wanted of it.
fn change(random: &mut Random, now: &State) -> (State, State) {
    match random.below(8) {
        0 | 1 => (now.clone(), fresh(random)),
        2 => (now.clone(), State::default()),
        3 => (now.clone(), drifted(random, now)),
        // Added again, deleted again.
        4 => (State { link: now.link.clone(), ..State::default() }, now.clone()),
        5 => {
            let mut less = drifted(random, now);
            less.link.clone_from(&now.link);
            (now.clone(), less)
        }
        _ => (drifted(random, now), drifted(random, now)),
    }
}

fn fresh(random: &mut Random) -> State {
    let cluster = cluster(random, "node-a");
    let policies = policies(random, 6);
    planned(&cluster, &policies)
}
