//! Policy routing: rules and routes.

#[cfg(test)]
mod tests;

use std::cmp::Reverse;
use std::net::IpAddr;

use super::Walk;
use crate::sim::trace::Decision;
use crate::state::{Route, RouteKey, RuleAction, Vxlan};
use crate::types::{Family, TableId};

/// Result of a route lookup.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Routed<'a> {
    /// To a neighbour on the VXLAN device.
    Via(&'a Vxlan, IpAddr),
    /// Rejected.
    Refused,
    /// Routed by the host's own routes.
    Own,
}

impl<'a> Walk<'a> {
    /// Evaluates the routing rules in order, and the tables that they look up.
    ///
    /// `input` is the packet's input interface, if it is one that our rules may name.
    pub(crate) fn route(
        &mut self,
        destination: IpAddr,
        mark: u32,
        input: Option<&str>,
    ) -> Routed<'a> {
        let state = self.state;
        let family = Family::of(destination);
        let mut rules: Vec<_> = state.rules.iter().filter(|rule| rule.family == family).collect();
        rules.sort_by_key(|rule| rule.priority);
        let mut rules = rules.as_slice();
        while let [rule, rest @ ..] = rules {
            rules = rest;
            let of_device = rule.input.as_ref().is_none_or(|it| Some(it.as_str()) == input);
            if (of_device && mark & rule.mask == rule.mark.get()) == rule.inverted {
                continue;
            }
            let table = match rule.action {
                RuleAction::Unreachable => {
                    self.say(format!("rule {rule}"), Decision::Dropped);
                    return Routed::Refused;
                }
                RuleAction::Goto(priority) => {
                    if let Some(at) = rest.iter().position(|rule| rule.priority == priority) {
                        rules = rest.get(at..).unwrap_or_default();
                    }
                    continue;
                }
                RuleAction::Lookup(table) => table,
            };
            let Some((key, route)) = self.look_up(table, destination) else { continue };
            self.say(format!("rule {rule}"), Decision::Table(table));
            let shown = format!("route {} table {table} metric {}", key.dst, key.metric);
            match (route, &state.link) {
                (Route::Throw, _) => self.say(format!("throw {shown}"), Decision::Throw),
                (Route::Via(via), Some(link)) => {
                    self.say(shown, Decision::Via(via));
                    return Routed::Via(link, via);
                }
                (Route::Unreachable | Route::Via(_), _) => {
                    self.say(format!("unreachable {shown}"), Decision::Dropped);
                    return Routed::Refused;
                }
            }
        }
        Routed::Own
    }

    /// The best route of a table: the longest prefix, then the lowest metric.
    fn look_up(&self, table: TableId, destination: IpAddr) -> Option<(RouteKey, Route)> {
        let up = self.state.link.as_ref().is_some_and(|link| link.up);
        let leads = |route: &Route| up || !matches!(route, Route::Via(_));
        let routes = self.state.routes.iter().filter(|(key, route)| {
            key.table == table && key.dst.contains(&destination) && leads(route)
        });
        let best = routes.max_by_key(|(key, _)| (key.dst.prefix_len(), Reverse(key.metric)));
        best.map(|(key, route)| (*key, *route))
    }
}
