//! Recovers the marks and routing tables of gateways that a previous run left in the kernel.

use std::net::IpAddr;

use crate::alloc::{MarkAllocator, TableAllocator};
use crate::cluster::{Cluster, Node, Steering};
use crate::state::{
    ChainId, Comment, Data, KeyValue, Route, Rule, RuleAction, Set, State, Verdict,
};
use crate::types::{Mark, NodeName, TableId};

/// Recovers the mark and table of each gateway that a previous run left in the kernel.
///
/// The map element of a gateway's action has the node's name as comment and goes to the chain that
/// sets the gateway's mark. The element with the MAC address of a mark has the node's name as
/// comment, too, and a routing rule gives the table of a mark. Where the nf_tables table is lost,
/// the default route of a routing table identifies its gateway. Marks and tables that cannot be
/// adopted, because the range or the layout has changed, are allocated again and the old ones
/// removed.
pub(crate) fn adopt(
    cluster: &Cluster,
    observed: &State,
    marks: &mut dyn MarkAllocator,
    tables: &mut dyn TableAllocator,
) {
    let layout = cluster.marks;
    let closing =
        |rule: &&Rule| (rule.mark.get(), rule.mask) == (layout.prefix(), layout.prefix_mask());
    for rule in observed.rules.iter().filter(closing) {
        if let (RuleAction::Lookup(table), None) = (rule.action, tables.get(&cluster.node)) {
            let _refused = tables.reserve(&cluster.node, table);
        }
    }
    let mut found: Vec<(&NodeName, Mark, Option<TableId>)> = Vec::new();
    found.extend(
        marks_of(cluster, observed).map(|(node, mark)| (node, mark, table_of(observed, mark))),
    );
    for (node, table) in tables_of(cluster, observed) {
        let rules = observed.rules.iter();
        let to = rules.filter(|rule| rule.action == RuleAction::Lookup(table));
        found.extend(to.map(|rule| (node, rule.mark, Some(table))));
    }
    for (node, mark, table) in found {
        // A table shared by all gateways is this node's.
        let table = table.filter(|_| cluster.steering == Steering::Tables);
        if let (Some(table), None) = (table, tables.get(node)) {
            let _refused = tables.reserve(node, table);
        }
        if marks.get(node).is_none() {
            let _refused = marks.reserve(node, mark);
        }
    }
}

fn marks_of<'a>(
    cluster: &'a Cluster,
    observed: &'a State,
) -> impl Iterator<Item = (&'a NodeName, Mark)> {
    let tables = [&observed.firewall, &observed.hook].into_iter().flatten();
    let elements = tables.flat_map(|table| table.elements.rest());
    elements.filter_map(|(key, value)| {
        let ((.., Data::Verdict(Verdict::Goto(ChainId::To(mark))))
        | (Set::NextHop, KeyValue::Mark(mark), _)) = (key.set(), key.value(), value.data)
        else {
            return None;
        };
        let comment = value.comment.as_ref()?;
        let named = |node: &&Node| Comment::of_name(node.name.as_str()) == *comment;
        cluster.nodes.iter().find(named).map(|node| (&node.name, mark))
    })
}

fn table_of(observed: &State, mark: Mark) -> Option<TableId> {
    observed.rules.iter().find_map(|rule| match rule.action {
        RuleAction::Lookup(table) if rule.mark == mark => Some(table),
        _ => None,
    })
}

fn tables_of<'a>(
    cluster: &'a Cluster,
    observed: &'a State,
) -> impl Iterator<Item = (&'a NodeName, TableId)> {
    let owner = |gateway: IpAddr| {
        cluster.nodes.iter().find(|node| node.tunnel.iter().any(|net| net.addr() == gateway))
    };
    observed.routes.iter().filter_map(move |(key, route)| match route {
        Route::Via(gateway) if key.dst.prefix_len() == 0 => {
            owner(*gateway).map(|node| (&node.name, key.table))
        }
        _ => None,
    })
}
