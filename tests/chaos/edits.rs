//! What a foreign hand may do to a node.

use std::collections::BTreeSet;

use common::fleet::{Result, nft, tool};
use common::lookalikes;
use egress_datapath::state::RuleAction;
use egress_datapath::testing::lab::Netns;
use egress_datapath::{DeviceName, State};

/// What an edit leaves of what keeps packets inside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Leaves {
    /// Enough: packets are lost at worst.
    Closed,
    /// Not the whole of what selects and guards: until it is back, packets leave as if there were
    /// no policy. Only who owns the table can keep it.
    Open,
}

/// One foreign edit.
#[derive(Clone, Debug)]
pub(crate) struct Edit {
    pub(crate) leaves: Leaves,
    /// Commands; a failed one is no error, since what it is about may be gone already.
    pub(crate) lines: Vec<String>,
    /// Rules for `nft`, after the commands.
    rules: &'static str,
}

impl Edit {
    pub(crate) fn make(&self, netns: &Netns) -> Result {
        for line in &self.lines {
            let _refused = tool(netns, line);
        }
        if !self.rules.is_empty() {
            // In one transaction, so that what is planted there is never seen missing.
            nft(netns, &[], &format!("{}\n{}", self.rules, lookalikes::TABLES))?;
        }
        Ok(())
    }
}

/// All that may be done to a node that is in this state.
pub(crate) fn all(whole: &State, plants: bool) -> Vec<Edit> {
    let device = whole.link.as_ref().map(|link| &link.name).map_or("-", DeviceName::as_str);
    let table = "inet egress_datapath";
    let mut closed: Vec<Vec<String>> = Vec::new();
    for family in ["-4", "-6"] {
        closed.push(vec![format!("ip {family} rule flush protocol 69")]);
        for priority in [101, 102, 103, 104] {
            closed.push(vec![format!("ip {family} rule del pref {priority} protocol 69")]);
        }
        let tables: BTreeSet<_> = whole
            .rules
            .iter()
            .filter_map(|rule| match rule.action {
                RuleAction::Lookup(table) => Some(table),
                RuleAction::Unreachable | RuleAction::Goto(_) => None,
            })
            .collect();
        for number in tables {
            closed.push(vec![format!("ip {family} route flush table {number} proto 69")]);
            closed.push(vec![format!("ip {family} route del default table {number} proto 69")]);
        }
        closed.push(vec![format!("ip {family} addr flush dev {device}")]);
        closed.push(vec![format!("ip {family} neigh flush all dev {device} nud permanent")]);
    }
    closed.push(vec![format!("ip link set {device} down")]);
    closed.push(vec![format!("ip link set {device} down"), format!("ip link set {device} up")]);
    closed.push(vec![format!("ip link set {device} mtu 1200")]);
    closed.push(vec![format!("ip link set {device} mtu 1400")]);
    closed.push(vec![format!("ip link set {device} address 02:00:00:00:00:99")]);
    closed.push(vec![format!("ip link del {device}")]);
    for (mac, node) in &whole.fdb {
        closed.push(vec![format!("bridge fdb del {mac} dev {device} dst {node}")]);
        closed.push(vec![format!("bridge fdb replace {mac} dev {device} dst 192.0.2.9 self")]);
    }
    for chain in ["input", "forward", "nat_postrouting", "guard", "translate4", "translate6"] {
        closed.push(vec![format!("nft flush chain {table} {chain}")]);
    }
    for map in ["steer4", "steer6", "snat4", "snat6", "eip4", "peer6"] {
        closed.push(vec![format!("nft flush map {table} {map}")]);
        closed.push(vec![format!("nft flush set {table} {map}")]);
    }
    closed.push(vec![format!("nft add rule {table} forward counter")]);
    closed.push(vec![format!("nft add chain {table} stray")]);
    let mut open = Vec::new();
    for chain in
        ["prerouting", "select_policy4", "select_policy6", "steer4", "steer6", "local_gateway"]
    {
        open.push(vec![format!("nft flush chain {table} {chain}")]);
    }
    for map in ["source4", "source6", "any4", "any6"] {
        open.push(vec![format!("nft flush map {table} {map}")]);
    }
    open.push(vec![format!("nft add element {table} excluded4 {{ 198.51.100.0/24 }}")]);
    open.push(vec![format!("nft flush table {table}")]);
    open.push(vec![format!("nft delete table {table}")]);
    let edit = |leaves, lines| Edit { leaves, lines, rules: "" };
    let mut edits: Vec<_> = closed.into_iter().map(|lines| edit(Leaves::Closed, lines)).collect();
    edits.extend(open.into_iter().map(|lines| edit(Leaves::Open, lines)));
    if plants {
        let rules = "flush ruleset";
        edits.push(Edit { leaves: Leaves::Open, lines: Vec::new(), rules });
    } else {
        edits.push(edit(Leaves::Open, vec!["nft flush ruleset".to_owned()]));
    }
    edits
}
