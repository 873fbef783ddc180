//! What a node may have come to hold instead of what it should.

use egress_datapath::state::{Data, Key, NftRule, Route, State, Stmt, Tag};

use crate::random::Random;

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
        2 => {
            if let Some(rule) = any(random, state.rules.iter().cloned()) {
                state.rules.remove(&rule);
            }
        }
        3 => {
            if let Some(key) = one(random, state.routes.keys()) {
                state.routes.remove(&key);
            }
        }
        4 => {
            if let Some(key) = one(random, state.routes.keys()) {
                state.routes.insert(key, random.of(&[Route::Throw, Route::Unreachable]));
            }
        }
        5 => {
            if let Some(address) = one(random, state.neighbours.keys()) {
                state.neighbours.remove(&address);
            }
        }
        6 => {
            if let Some(mac) = one(random, state.fdb.keys()) {
                state.fdb.remove(&mac);
            }
        }
        7 => {
            if let Some(net) = one(random, state.addresses.iter()) {
                state.addresses.remove(&net);
            }
        }
        _ if state.firewall.is_none() => iptables(random, state),
        _ => firewall(random, state),
    }
}

fn iptables(random: &mut Random, state: &mut State) {
    let Some(tables) = state.xtables.values_mut().next() else { return };
    match random.below(4) {
        0 => {
            let chain = one(random, tables.jumps.keys());
            if let Some(jumps) = chain.and_then(|chain| tables.jumps.get_mut(&chain)) {
                let lost = random.below(jumps.len());
                jumps.remove(lost);
                for (place, _) in jumps.iter_mut().skip(lost) {
                    *place -= 1;
                }
            }
            tables.jumps.retain(|_, jumps| !jumps.is_empty());
        }
        1 | 2 => {
            let chain = one(random, tables.chains.keys());
            let rules = chain.and_then(|chain| tables.chains.get_mut(&chain));
            if let Some(rules) = rules.filter(|rules| !rules.is_empty()) {
                rules.remove(random.below(rules.len()));
            }
        }
        _ => {
            let set = one(random, state.ipsets.keys());
            if let Some(contents) = set.and_then(|set| state.ipsets.get_mut(&set)) {
                if let Some(net) = one(random, contents.members.keys()) {
                    contents.members.remove(&net);
                }
            }
        }
    }
}

fn firewall(random: &mut Random, state: &mut State) {
    let Some(firewall) = &mut state.firewall else { return };
    match random.below(8) {
        0 => state.firewall = None,
        1 => {
            if let Some(set) = one(random, firewall.sets.iter()) {
                firewall.sets.remove(&set);
                firewall.elements.retain(|key: &Key, _| key.set() != set);
            }
        }
        2 => {
            if let Some(chain) = one(random, firewall.chains.keys()) {
                firewall.chains.remove(&chain);
            }
        }
        3 => {
            let chain = one(random, firewall.chains.keys());
            if let Some((_, rules)) = chain.and_then(|chain| firewall.chains.get_mut(&chain)) {
                rules.insert(random.below(rules.len() + 1), NftRule(vec![Stmt::Counter]));
            }
        }
        _ => {
            for _ in 0..=random.below(3) {
                let Some(key) = any(random, firewall.elements.keys()) else { break };
                let value = firewall.elements.get(&key);
                firewall.elements.remove(&key);
                if let (true, Some(mut value)) = (random.once_in(3), value) {
                    if let Data::Tag(tag) = &mut value.data {
                        *tag = Tag::LOCAL;
                    }
                    firewall.elements.insert(key, value);
                }
            }
        }
    }
}

fn one<'a, T: Copy + 'a>(random: &mut Random, all: impl Iterator<Item = &'a T>) -> Option<T> {
    any(random, all.copied())
}

fn any<T: Clone>(random: &mut Random, all: impl Iterator<Item = T>) -> Option<T> {
    let all: Vec<T> = all.collect();
    (!all.is_empty()).then(|| random.of(&all))
}
