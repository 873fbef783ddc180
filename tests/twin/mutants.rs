//! Deliberate faults in what is planned, and which check notices each.

use egress_datapath::state::{
    ChainId, Direction, Field, Interface, Key, MarkOf, NftRule, Route, Rule, Set, State, Stmt, Tag,
};
use egress_datapath::{Changes, Family, Mark};

use crate::checks::{CHECKS, Mutate, World, every_point, gateways};
use crate::{Result, say};

/// The rules of a chain, if the node has it.
fn rules(state: &mut State, chain: ChainId) -> Option<&mut Vec<NftRule>> {
    let firewall = state.firewall.as_mut().unwrap();
    firewall.chains.get_mut(&chain).map(|(_, rules)| rules)
}

/// Whether a statement compares a field.
fn compares(statement: &Stmt, field: Field) -> bool {
    matches!(statement, Stmt::Match { of, .. } if of.field == field)
}

/// Removes the rules of a chain that have a statement.
fn forget(state: &mut State, chain: ChainId, has: impl Fn(&Stmt) -> bool) {
    let rules = rules(state, chain).into_iter();
    rules.for_each(|rules| rules.retain(|rule| !rule.0.iter().any(&has)));
}

/// Removes a statement from the rules of a chain.
fn skip(state: &mut State, chain: ChainId, is: impl Fn(&Stmt) -> bool) {
    for rule in rules(state, chain).into_iter().flatten() {
        rule.0.retain(|statement| !is(statement));
    }
}

/// The rules of each chain that has a rule beginning so.
fn each(
    state: &mut State,
    begins: impl Fn(&Stmt) -> bool,
    work: impl Fn(&mut Vec<NftRule>, usize),
) {
    for (_, rules) in state.firewall.as_mut().unwrap().chains.values_mut() {
        let at = rules.iter().position(|rule| rule.0.first().is_some_and(&begins));
        if let Some(at) = at {
            work(rules, at);
        }
    }
}

const MUTANTS: [(&str, Mutate); 25] = [
    ("wrong mask: a rule compares bits that the mark does not have", |state| {
        let rules = std::mem::take(&mut state.rules).into_iter();
        state.rules = rules
            .map(|mut rule| {
                rule.mask = 0x2600_0000 & rule.mask | 1;
                rule
            })
            .map(|mut rule| {
                rule.mark = Mark::new(rule.mark.get() | 1);
                rule
            })
            .collect();
    }),
    ("wrong mask: the gateways' marks overwrite only their prefix", |state| {
        let firewall = state.firewall.as_mut().unwrap();
        for (id, (_, rules)) in &mut firewall.chains {
            for statement in rules.iter_mut().flat_map(|rule| &mut rule.0) {
                if let (ChainId::To(_), Stmt::SetMark(MarkOf::Packet, bits)) = (id, statement) {
                    bits.value &= 0x00ff_ffff;
                }
            }
        }
    }),
    ("missing guard: marked packets may go anywhere", |state| {
        forget(state, ChainId::Marked, |statement| *statement == Stmt::Drop);
    }),
    ("missing guard: connections go on without their policy", |state| {
        forget(state, ChainId::Tracked, |statement| *statement == Stmt::Drop);
    }),
    ("missing guard: what comes out of the tunnel may leave untranslated", |state| {
        forget(state, ChainId::Guard, |_| true);
        rules(state, ChainId::NatPostrouting).unwrap().pop();
    }),
    ("missing guard: anybody may speak VXLAN", |state| {
        forget(state, ChainId::Input, |statement| compares(statement, Field::UdpDestinationPort));
    }),
    ("missing guard: the node answers on egress IPs", |state| {
        forget(state, ChainId::Input, |statement| {
            matches!(statement, Stmt::Lookup { set: Set::Eip(_), .. })
        });
    }),
    ("swapped order: exclusions are asked last", |state| {
        let excludes =
            |statement: &Stmt| matches!(statement, Stmt::Lookup { set: Set::Excluded(_), .. });
        each(state, excludes, |rules, at| {
            let rule = rules.remove(at);
            rules.push(rule);
        });
    }),
    ("swapped order: shorter prefixes are asked first", |state| {
        let by_destination =
            |statement: &Stmt| matches!(statement, Stmt::Map { map: Set::Destination(..), .. });
        each(state, by_destination, |rules, at| rules.swap(at, at + 1));
    }),
    ("swapped order: replies are steered", |state| {
        let replies = |statement: &Stmt| *statement == Stmt::direction(Direction::Reply);
        each(state, replies, |rules, at| drop(rules.remove(at)));
    }),
    ("invalid packets are steered", |state| {
        let invalid = |statement: &Stmt| *statement == Stmt::state(Stmt::INVALID);
        each(state, invalid, |rules, at| drop(rules.remove(at)));
    }),
    ("forgotten family: IPv6 sources are not looked up", |state| {
        forget(state, ChainId::Prerouting, |statement| {
            matches!(statement, Stmt::Map { map: Set::Source(Family::V6), .. })
        });
    }),
    ("forgotten family: IPv6 has no rules", |state| {
        state.rules.retain(|rule| rule.family == Family::V4);
    }),
    ("forgotten family: IPv6 has no neighbours", |state| {
        state.neighbours.retain(|address, _| address.is_ipv4());
    }),
    ("wrong priority: the guard runs ahead of translation", |state| {
        let firewall = state.firewall.as_mut().unwrap();
        if let Some((base, _)) = firewall.chains.get_mut(&ChainId::Guard) {
            base.as_mut().unwrap().priority = 99;
        }
    }),
    ("wrong priority: the closing rule is asked first", |state| {
        let gateways = gateways(state);
        let place = |wanted: bool| {
            let mut of = state.rules.iter().filter(|rule| wanted == gateways.contains(rule));
            of.next_back().map(|rule| rule.priority)
        };
        let (Some(closing), Some(gateway)) = (place(false), place(true)) else { return };
        let swapped = |mut rule: Rule| {
            if rule.priority == closing {
                rule.priority = gateway;
            } else if rule.priority == gateway {
                rule.priority = closing;
            }
            rule
        };
        state.rules = std::mem::take(&mut state.rules).into_iter().map(swapped).collect();
    }),
    ("no reset of the mark ahead of the tunnel", |state| {
        skip(state, ChainId::Marked, |statement| {
            matches!(statement, Stmt::SetMark(MarkOf::Packet, _))
        });
    }),
    ("no reset of the mark behind the guard", |state| {
        forget(state, ChainId::Guard, |statement| {
            matches!(statement, Stmt::SetMark(MarkOf::Packet, _))
        });
    }),
    ("no mark on what comes out of the tunnel", |state| {
        forget(state, ChainId::Prerouting, |statement| {
            matches!(statement, Stmt::Interface(Interface::Input, _))
        });
    }),
    ("nothing leads what came out of the tunnel past the gateways' rules", |state| {
        state.rules.retain(|rule| rule.input.is_none());
    }),
    ("no binding of what enters the tunnel", |state| {
        forget(state, ChainId::NatPostrouting, |statement| {
            matches!(statement, Stmt::KeepSource(_))
        });
    }),
    ("no backstop: a table ends without refusing", |state| {
        state.routes.retain(|_, route| *route != Route::Unreachable);
    }),
    ("open where it should be closed", |state| {
        let firewall = state.firewall.as_mut().unwrap();
        let bypass = firewall.elements.get(&Key::policy_action(Tag::BYPASS));
        let bypass = bypass.unwrap();
        firewall.elements.insert(Key::policy_action(Tag::DENY), bypass);
    }),
    ("strict filtering of the tunnel's sources", |state| {
        state.link.as_mut().unwrap().rp_filter = 1;
    }),
    ("frames for one node go to another", |state| {
        let nodes: Vec<_> = state.fdb.values().rev().copied().collect();
        state.fdb.values_mut().zip(nodes).for_each(|(node, other)| *node = other);
    }),
];

#[test]
fn faults_are_noticed() -> Result {
    let sound = World { mutate: |_| {} };
    for (check, run) in CHECKS {
        run(&sound).map_err(|error| format!("{check}: {error}"))?;
    }
    let mut lines = Vec::new();
    for (fault, mutate) in MUTANTS {
        let world = World { mutate };
        let caught = CHECKS.iter().find(|(_, run)| run(&world).is_err());
        let (check, _) = caught.ok_or_else(|| format!("nothing notices: {fault}"))?;
        lines.push(format!("  {fault}: caught by \"{check}\""));
    }
    // A change in the wrong order: what was there first, what is to come last.
    let removed_first = |now: &State, new: &State| {
        let nothing = State::default();
        vec![Changes::between(now, &nothing), Changes::between(&nothing, new)]
    };
    assert!(every_point(&sound, removed_first).is_err(), "nothing notices: removed first");
    let (check, _) = CHECKS[CHECKS.len() - 1];
    lines.push(format!("  wrong order: all is removed, then added: caught by \"{check}\""));
    say(&format!("{} faults, each noticed:\n{}", lines.len(), lines.join("\n")));
    Ok(())
}
