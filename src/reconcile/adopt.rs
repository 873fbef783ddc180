//! Recovers the marks and routing tables of gateways that a previous run left in the kernel.

use std::collections::HashMap;
use std::net::IpAddr;

use crate::alloc::{MarkAllocator, TableAllocator};
use crate::cluster::{Cluster, Steering};
use crate::plan::reverse_path;
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
    let reverse = reverse_path();
    let back = |rule: &&Rule| {
        (rule.mark, rule.mask, &rule.input) == (layout.tunnel(), layout.prefix_mask(), &None)
    };
    for rule in observed.rules.iter().filter(back) {
        if let (RuleAction::Lookup(table), None) = (rule.action, tables.get(&reverse)) {
            let _refused = tables.reserve(&reverse, table);
        }
    }
    if let Some(mark) = own_mark(cluster, observed).filter(|_| marks.get(&cluster.node).is_none()) {
        let _refused = marks.reserve(&cluster.node, mark);
    }
    // Gateways and nodes may be thousands each: everything is found by its key.
    let (mut table_of, mut marks_to) = (HashMap::new(), HashMap::<_, Vec<_>>::new());
    for rule in &observed.rules {
        if let RuleAction::Lookup(table) = rule.action {
            table_of.entry(rule.mark).or_insert(table);
            marks_to.entry(table).or_default().push(rule.mark);
        }
    }
    let mut found: Vec<(&NodeName, Mark, Option<TableId>)> = Vec::new();
    found.extend(
        marks_of(cluster, observed).map(|(node, mark)| (node, mark, table_of.get(&mark).copied())),
    );
    for (node, table) in tables_of(cluster, observed) {
        let marks = marks_to.get(&table).into_iter().flatten();
        found.extend(marks.map(|mark| (node, *mark, Some(table))));
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

/// The mark of this node's own connections, with replies by the tunnel.
fn own_mark(cluster: &Cluster, observed: &State) -> Option<Mark> {
    let (layout, bound) = (cluster.marks, observed.bound_mark()?);
    let values = bound.mask & !layout.connection().mask;
    // The rules may be those of another layout, or of direct replies.
    let ours = layout.connection().are_in(bound.value) && values != 0;
    ours.then(|| Mark::new(layout.prefix() | bound.value & values))
}

fn marks_of<'a>(
    cluster: &'a Cluster,
    observed: &'a State,
) -> impl Iterator<Item = (&'a NodeName, Mark)> {
    let tables = [&observed.firewall, &observed.hook].into_iter().flatten();
    let elements = tables.flat_map(|table| table.elements.rest());
    // Of two names with one comment the first node's is meant.
    let nodes = cluster.nodes.iter().rev();
    let named: HashMap<_, _> =
        nodes.map(|node| (Comment::of_name(node.name.as_str()), &node.name)).collect();
    elements.filter_map(move |(key, value)| {
        let ((.., Data::Verdict(Verdict::Goto(ChainId::To(mark))))
        | (Set::NextHop, KeyValue::Mark(mark), _)) = (key.set(), key.value(), value.data)
        else {
            return None;
        };
        named.get(value.comment.as_ref()?).map(|node| (*node, mark))
    })
}

fn tables_of<'a>(
    cluster: &'a Cluster,
    observed: &'a State,
) -> impl Iterator<Item = (&'a NodeName, TableId)> {
    let nodes = cluster.nodes.iter().rev();
    let owners: HashMap<IpAddr, _> =
        nodes.flat_map(|node| node.tunnel.iter().map(|net| (net.addr(), &node.name))).collect();
    observed.routes.iter().filter_map(move |(key, route)| match route {
        Route::Via(gateway) if key.dst.prefix_len() == 0 => {
            owners.get(gateway).map(|node| (*node, key.table))
        }
        _ => None,
    })
}
