//! Random changes, good ones and such that take the kernel for something else than it is.

use std::time::{Duration, Instant};
use std::{env, io, iter};

use egress_datapath::state::State;
use egress_datapath::{Changes, Datapath, Sim};

use crate::drift::drifted;
use crate::random::Random;
use crate::shrink::shrink;
use crate::world::{self, cluster, planned, policies};
use crate::{Outcome, Result, Twins, say, seed, times};

/// Operations that are made at least.
const OPERATIONS: usize = 100_000;
/// How long to look for what a difference needs.
const SHRINKING: Duration = Duration::from_secs(60);

#[test]
fn the_same_changes_have_the_same_end() -> Result {
    let mut twins = harness::given("network namespaces", Twins::new());
    let seed = seed()?;
    if let Ok(steps) = env::var("EGRESS_TWIN_STEPS") {
        return replay(seed, &steps);
    }
    let (begun, wanted) = (Instant::now(), times(OPERATIONS));
    let (mut steps, mut tried, mut made, mut refused) = (0, 0, 0, 0);
    for step in Steps::of(seed) {
        if tried >= wanted {
            break;
        }
        let outcome = match twins.step(&step) {
            Ok(outcome) => outcome,
            Err(error) => {
                say(&format!("seed {seed}, step {steps}: {error}"));
                let left = shrunk(seed, steps, Twins::new);
                return Err(told(seed, &left, Twins::new).into());
            }
        };
        steps += 1;
        let count = step.changes().len();
        tried += count;
        match outcome {
            None => made += count,
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
#[derive(Clone)]
struct Step {
    taken: State,
    desired: State,
}

impl Step {
    fn changes(&self) -> Changes {
        Changes::between(&self.taken, &self.desired)
    }
}

/// The steps of a seed, one after another; each depends on what those before it have left.
struct Steps {
    random: Random,
    sim: Sim,
}

impl Steps {
    fn of(seed: u64) -> Self {
        Self { random: Random::new(seed), sim: world::sim() }
    }
}

impl Iterator for Steps {
    type Item = Step;

    fn next(&mut self) -> Option<Step> {
        let (taken, desired) = change(&mut self.random, self.sim.state());
        let step = Step { taken, desired };
        let _refused = self.sim.apply(&step.changes());
        Some(step)
    }
}

impl Twins {
    /// Makes changes on both, and compares what they hold then.
    fn step(&mut self, step: &Step) -> Result<Option<Outcome>> {
        let outcome = self.apply(&step.changes())?;
        self.observe().map_err(|error| format!("{error}\nafter {outcome:?}"))?;
        Ok(outcome)
    }
}

/// Steps and their numbers.
type Numbered = Vec<(usize, Step)>;

/// The first difference in some steps, with twins that have just been born.
fn difference(steps: &[(usize, Step)], twins: fn() -> io::Result<Twins>) -> Option<String> {
    let mut twins = twins().ok()?;
    steps.iter().find_map(|(number, step)| {
        let error = twins.step(step).err()?;
        Some(format!("step {number}: {error}"))
    })
}

/// The parts of a state that a step can leave as they are.
const PARTS: [fn(&mut Step); 8] = [
    |step| step.desired.firewall.clone_from(&step.taken.firewall),
    |step| {
        if let (Some(taken), Some(desired)) = (&step.taken.firewall, &mut step.desired.firewall) {
            desired.elements.clone_from(&taken.elements);
        }
    },
    |step| step.desired.rules.clone_from(&step.taken.rules),
    |step| step.desired.routes.clone_from(&step.taken.routes),
    |step| step.desired.neighbours.clone_from(&step.taken.neighbours),
    |step| step.desired.fdb.clone_from(&step.taken.fdb),
    |step| step.desired.addresses.clone_from(&step.taken.addresses),
    |step| step.desired.link.clone_from(&step.taken.link),
];

/// What is left of the steps up to a failing one, and of each of these.
fn shrunk(seed: u64, failing: usize, twins: fn() -> io::Result<Twins>) -> Numbered {
    let all: Numbered = Steps::of(seed).enumerate().take(failing + 1).collect();
    let fails = |steps: &[(usize, Step)]| difference(steps, twins).is_some();
    let begun = Instant::now();
    let mut left = shrink(&all, SHRINKING, fails);
    // A part of all steps at once, because what one has made another may need; then of each.
    let one_by_one = (0..left.len()).map(|at| at..at + 1);
    for which in iter::once(0..left.len()).chain(one_by_one) {
        for part in PARTS {
            let mut less = left.clone();
            less[which.clone()].iter_mut().for_each(|(_, step)| part(step));
            if begun.elapsed() < 2 * SHRINKING && fails(&less) {
                left = less;
            }
        }
    }
    left
}

/// What makes a difference, and how to try it again.
fn told(seed: u64, steps: &Numbered, twins: fn() -> io::Result<Twins>) -> String {
    let numbers: Vec<String> = steps.iter().map(|(number, _)| number.to_string()).collect();
    let numbers = numbers.join(",");
    let changes = steps.iter().map(|(at, step)| format!("of step {at}:\n{}", step.changes()));
    let changes = changes.collect::<Vec<_>>().concat();
    let error = difference(steps, twins).unwrap_or_default();
    format!(
        "{changes}{error}\nagain, these steps as a whole: \
         EGRESS_TWIN_SEED={seed} EGRESS_TWIN_STEPS={numbers} cargo test --test twin changes"
    )
}

/// Tries some steps of a seed again.
fn replay(seed: u64, numbers: &str) -> Result {
    let numbers = numbers.split(',').map(str::parse);
    let numbers: Vec<usize> = numbers.collect::<std::result::Result<_, _>>()?;
    let last = numbers.iter().max().copied().unwrap_or_default();
    let steps = Steps::of(seed).enumerate().take(last + 1);
    let steps: Numbered = steps.filter(|(number, _)| numbers.contains(number)).collect();
    if let Some(error) = difference(&steps, Twins::new) {
        return Err(error.into());
    }
    say(&format!("seed {seed}: no difference in steps {numbers:?}"));
    Ok(())
}

/// Of the steps in which a wrong simulator is found out.
const SEED: u64 = 1;

#[test]
fn a_difference_is_shrunk_to_what_it_needs() -> Result {
    // A simulator that forgets its addresses whenever it loses the last of its rules.
    let wrong = || {
        let mut twins = Twins::new()?;
        twins.spoil = |before, sim| {
            if !before.rules.is_empty() && sim.state().rules.is_empty() {
                sim.state_mut().addresses.clear();
            }
        };
        Ok(twins)
    };
    let mut twins = harness::given("network namespaces", wrong());
    let failing = Steps::of(SEED).take(1000).position(|step| twins.step(&step).is_err());
    let failing = failing.ok_or("nothing notices")?;
    let left = shrunk(SEED, failing, wrong);
    let told = told(SEED, &left, wrong);
    assert!(left.len() * 4 < failing, "{} of {failing}: {told}", left.len());
    let ops: usize = left.iter().map(|(_, step)| step.changes().len()).sum();
    let all: usize = Steps::of(SEED).take(failing + 1).map(|step| step.changes().len()).sum();
    say(&format!(
        "a difference shrunk from {} steps to {}, {all} operations to {ops}",
        failing + 1,
        left.len()
    ));
    assert!(ops * 10 < all, "{told}");
    assert!(told.contains("only the kernel has:") && told.contains("EGRESS_TWIN_STEPS="), "{told}");
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
