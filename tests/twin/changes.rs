//! Random changes, good ones and such that take the kernel for something else than it is.

use std::time::Instant;

use egress_datapath::Changes;
use egress_datapath::state::{ChainId, Data, Key, NftRule, Route, State, Stmt};

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
        5 => (now.clone(), {
            let mut less = drifted(random, now);
            less.link.clone_from(&now.link);
            less
        }),
        _ => (drifted(random, now), drifted(random, now)),
    }
}

fn fresh(random: &mut Random) -> State {
    let cluster = cluster(random, "node-a");
    let policies = policies(random, 6);
    planned(&cluster, &policies)
}

/// The state with something missing that it has, or there that it does not have.
pub(crate) fn drifted(random: &mut Random, now: &State) -> State {
    let mut state = now.clone();
    for _ in 0..=random.below(4) {
        drift(random, &mut state);
    }
    state
}

fn drift(random: &mut Random, state: &mut State) {
    match random.below(12) {
        0 => {
            if let Some(link) = &mut state.link {
                link.up = !link.up;
            }
        }
        1 => {
            if let Some(link) = &mut state.link {
                link.mtu = random.of(&[1300, 1400]);
                link.rp_filter = random.of(&[0, 1, 2]);
            }
        }
        2 => drop(
            pop(random, &mut state.rules.iter().copied().collect::<Vec<_>>())
                .map(|rule| state.rules.remove(&rule)),
        ),
        3 => {
            let mut all = state.routes.keys().copied().collect();
            let gone = pop(random, &mut all);
            gone.map(|key| state.routes.remove(&key));
        }
        4 => {
            let mut all = state.routes.keys().copied().collect();
            if let Some(key) = pop(random, &mut all) {
                state.routes.insert(key, random.of(&[Route::Throw, Route::Unreachable]));
            }
        }
        5 => {
            let mut all = state.neighbours.keys().copied().collect();
            let gone = pop(random, &mut all);
            gone.map(|key| state.neighbours.remove(&key));
        }
        6 => {
            let mut all = state.fdb.keys().copied().collect();
            let gone = pop(random, &mut all);
            gone.map(|key| state.fdb.remove(&key));
        }
        7 => {
            let mut all: Vec<_> = state.addresses.iter().copied().collect();
            let gone = pop(random, &mut all);
            gone.map(|net| state.addresses.remove(&net));
        }
        _ => firewall(random, state),
    }
}

fn firewall(random: &mut Random, state: &mut State) {
    let Some(firewall) = &mut state.firewall else { return };
    match random.below(8) {
        0 => state.firewall = None,
        1 => {
            let mut all: Vec<_> = firewall.sets.iter().copied().collect();
            if let Some(set) = pop(random, &mut all) {
                firewall.sets.remove(&set);
                firewall.elements.retain(|key: &Key, _| key.set() != set);
            }
        }
        2 => {
            let mut all: Vec<_> = firewall.chains.keys().copied().collect();
            let gone = pop(random, &mut all);
            gone.map(|chain| firewall.chains.remove(&chain));
        }
        3 => {
            let mut all: Vec<ChainId> = firewall.chains.keys().copied().collect();
            let chain = pop(random, &mut all);
            if let Some((_, rules)) = chain.and_then(|chain| firewall.chains.get_mut(&chain)) {
                rules.insert(random.below(rules.len() + 1), NftRule(vec![Stmt::Counter]));
            }
        }
        _ => {
            let mut all: Vec<_> = firewall.elements.keys().copied().collect();
            for _ in 0..=random.below(3) {
                let Some(key) = pop(random, &mut all) else { break };
                let other = firewall.elements.get(&key).cloned();
                firewall.elements.remove(&key);
                if let (true, Some(mut value)) = (random.once_in(3), other) {
                    if let Data::Tag(tag) = &mut value.data {
                        *tag = egress_datapath::state::Tag::HERE;
                    }
                    firewall.elements.insert(key, value);
                }
            }
        }
    }
}

fn pop<T>(random: &mut Random, all: &mut Vec<T>) -> Option<T> {
    if all.is_empty() { None } else { Some(all.swap_remove(random.below(all.len()))) }
}
