//! States that are the same but for the numbers of their tables.

use std::collections::BTreeMap;

use egress_datapath::state::{Firewall, Missing, RouteKey, Rule, RuleAction};
use egress_datapath::{State, TableId};

/// The state with its tables numbered in the order of their rules.
///
/// Which table a gateway has is no matter, and one that was left without a rule and without a way
/// to its gateway cannot be known again.
pub fn numbered(mut state: State) -> State {
    // A false acknowledgement lets the kernel seem to have what it lacks.
    state.missing = Missing::default();
    let mut numbers: BTreeMap<TableId, u32> = BTreeMap::new();
    for rule in &state.rules {
        if let RuleAction::Lookup(table) = rule.action {
            let next = u32::try_from(numbers.len()).unwrap_or(0) + 1;
            numbers.entry(table).or_insert(next);
        }
    }
    let renamed = |table| {
        let number = numbers.get(&table).and_then(|number| TableId::new(*number));
        number.unwrap_or(table)
    };
    let routes = std::mem::take(&mut state.routes).into_iter();
    state.routes =
        routes.map(|(key, route)| (RouteKey { table: renamed(key.table), ..key }, route)).collect();
    let rules = std::mem::take(&mut state.rules).into_iter();
    state.rules = rules
        .map(|rule| match rule.action {
            RuleAction::Lookup(table) => {
                Rule { action: RuleAction::Lookup(renamed(table)), ..rule }
            }
            RuleAction::Unreachable | RuleAction::Goto(_) => rule,
        })
        .collect();
    state
}

/// A planned state without what the node lacks of which this state was found.
pub fn suited(mut planned: State, found: &State) -> State {
    planned.missing.clone_from(&found.missing);
    if found.missing.flowtables {
        planned.firewall.iter_mut().for_each(Firewall::leave_out_flowtable);
    }
    planned
}
