//! Detection and removal of the state of spidernet's egressgateway agent on a node.
//!
//! An object is recognised as the agent's by these criteria:
//!
//! | object | belongs to the agent if |
//! |---|---|
//! | iptables rule | it has the comment `egw:` and a hash of 16 characters, by which the agent itself recognises it |
//! | chain | it has one of the agent's three chain names, a rule of the agent leads to it or is in it, and no other rule does |
//! | set | it is a `hash:net` with a name of the agent: a prefix and hex digits, 31 bytes in all, or one of two fixed names |
//! | routing rule | its priority is 99, and it looks up the table whose number is its whole mark, 0x26000001 to 0x26fffffe |
//! | VXLAN device | it does not learn and is not the datapath's; a route of such a table leaves by it, or name, VNI and port are the agent's defaults |
//!
//! Addresses, FDB entries, neighbours and routes are removed with the device.

mod saved;

use std::collections::BTreeSet;
use std::fmt;

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::LinkMessage;
use netlink_packet_route::route::{RouteAttribute, RouteMessage};
use netlink_packet_route::rule::{
    RuleAction as KernelAction, RuleAttribute, RuleFlags, RuleMessage,
};

use super::datapath::IptablesDatapath;
use super::ipset;
use crate::error::KernelError;
use crate::kernel::rtnetlink::link::Device;
use crate::kernel::rtnetlink::socket::RouteSocket;
use crate::kernel::rtnetlink::{link, route, rule};
use crate::state::{PROTOCOL, Rule, RuleAction, Variant, XtTable};
use crate::types::Family;

use saved::Lines;

/// Priority of the agent's routing rules.
pub(crate) const PRIORITY: u32 = 99;

/// Default name, VNI and UDP port of the agent's VXLAN device.
pub(crate) const DEVICE: (&str, u32, u16) = ("egress.vxlan", 100, 7789);

/// Set names of the agent that do not depend on a policy, with the address family.
const FIXED_SETS: [(&str, Family); 2] =
    [("egress-cluster-cidr-ipv4", Family::V4), ("egress-cluster-cidr-ipv6", Family::V6)];

/// Prefixes of the agent's set names that depend on a policy, with the address family.
const SET_PREFIXES: [(&str, Family); 4] = [
    ("egress-src-v4-", Family::V4),
    ("egress-dst-v4-", Family::V4),
    ("egress-src-v6-", Family::V6),
    ("egress-dst-v6-", Family::V6),
];

/// Length of the policy-dependent set names: the maximum that the kernel accepts.
const SET_NAME: usize = 31;

/// Returns true for a mark in the range that the agent gives to nodes.
pub(crate) fn is_mark(mark: u32) -> bool {
    (0x2600_0001..=0x26ff_fffe).contains(&mark)
}

/// Returns the address family of the agent's set with this name.
fn family_of_set(name: &str) -> Option<Family> {
    let fixed = FIXED_SETS.into_iter().find(|(fixed, _)| *fixed == name);
    let hashed = || {
        SET_PREFIXES.into_iter().find(|(prefix, _)| {
            let hex = |rest: &str| rest.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
            name.len() == SET_NAME && name.strip_prefix(prefix).is_some_and(hex)
        })
    };
    fixed.or_else(hashed).map(|(_, family)| family)
}

/// State that the agent of spidernet's egressgateway left in a network namespace.
///
/// Only objects that provably belong to that agent are included. Its `Display` is the commands that
/// remove them, one a line.
///
/// Stop that agent first: it restores what is missing. Then [set its chains
/// aside](IptablesDatapath::set_predecessor_aside), make this datapath's state complete, and only
/// then [remove](IptablesDatapath::remove_predecessor) the agent's state: no packet leaves with a
/// pod's address meanwhile. While the state of both is installed packets may be dropped: the rules
/// of each take the marks of the other for marks of packets that missed their routing rule.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[must_use]
pub struct Predecessor {
    pub(crate) device: Option<Device>,
    rules: Vec<(Family, u32, RuleMessage)>,
    tables: Vec<Leftover>,
    sets: Vec<String>,
}

/// Objects of the agent in one iptables table.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Leftover {
    variant: Variant,
    family: Family,
    table: XtTable,
    lines: Lines,
}

impl Predecessor {
    /// Returns true if no object of the agent was found.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Name of the agent's tunnel device.
    pub fn device(&self) -> Option<&str> {
        self.device.as_ref().map(|device| device.name.as_str())
    }

    /// Returns true if a routing rule of the agent takes packets that `ours` is meant for.
    ///
    /// The agent's rules come first, and compare all bits of a mark, of which the datapath writes
    /// only some. Such a packet would go to a gateway node of the agent. Give the gateway another
    /// mark ([`Node::mark`](crate::Node::mark)) before anything is programmed.
    pub fn takes(&self, ours: &Rule) -> bool {
        let steers = matches!(ours.action, RuleAction::Lookup(_)) && ours.mask != 0;
        let (family, mark) = (ours.family, ours.mark.get());
        steers
            && self.rules.iter().any(|(of, theirs, _)| *of == family && theirs & ours.mask == mark)
    }
}

impl fmt::Display for Predecessor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for Leftover { variant, family, table, lines } in &self.tables {
            for line in &lines.remove {
                writeln!(f, "{} -t {} {line}", variant.command(*family), table.name())?;
            }
        }
        for (family, mark, _) in &self.rules {
            let ip = if *family == Family::V4 { "ip" } else { "ip -6" };
            writeln!(f, "{ip} rule del pref {PRIORITY} fwmark {mark:#x} lookup {mark}")?;
        }
        if let Some(device) = self.device() {
            writeln!(f, "ip link del {device}")?;
        }
        self.sets.iter().try_for_each(|set| writeln!(f, "ipset destroy {set}"))
    }
}

impl IptablesDatapath {
    /// Finds the state of spidernet's egressgateway agent in this namespace; changes nothing.
    ///
    /// # Errors
    ///
    /// The request that the kernel or a tool refused.
    pub fn predecessor(&mut self) -> Result<Predecessor, KernelError> {
        let mut tables = Vec::new();
        for variant in self.variants().collect::<Vec<_>>() {
            for family in Family::BOTH {
                let text = self.saved(variant, family)?;
                let found = saved::read(&text).into_iter();
                tables.extend(found.map(|(table, lines)| Leftover {
                    variant,
                    family,
                    table,
                    lines,
                }));
            }
        }
        // The mangle table, which sets marks, comes first, then the tables that translate and
        // accept.
        tables.sort_by_key(|left| std::cmp::Reverse(left.table));
        let kernel = self.kernel();
        let rules = kernel.routing.their_rules()?;
        let device = kernel.routing.their_device(&rules)?;
        let sets = ipset::foreign(&mut kernel.netfilter, family_of_set)?;
        Ok(Predecessor { device, rules, tables, sets })
    }

    /// Renames the agent's chains that have the name of a datapath chain; returns the new state.
    ///
    /// The datapath's chains can then be created beside them. The renamed chains keep working.
    ///
    /// # Errors
    ///
    /// The first request that was refused.
    pub fn set_predecessor_aside(
        &mut self,
        found: &Predecessor,
    ) -> Result<Predecessor, KernelError> {
        for Leftover { variant, family, table, lines } in &found.tables {
            if !lines.aside.is_empty() {
                self.restored(*variant, *family, &script(*table, &lines.aside))?;
            }
        }
        self.predecessor()
    }

    /// Removes the agent's state that was found.
    ///
    /// The order is: iptables rules and their chains, one transaction for each table; routing
    /// rules; the device; sets.
    ///
    /// Call it when the datapath's own state is in force, as after a
    /// [`reconcile`](crate::Reconciler::reconcile): packets that the agent steered and that no
    /// policy selects leave with their own source address from then on.
    ///
    /// # Errors
    ///
    /// The first request that was refused. A set that a rule of another program looks up is left,
    /// and the rest is removed all the same.
    pub fn remove_predecessor(&mut self, found: &Predecessor) -> Result<(), KernelError> {
        for Leftover { variant, family, table, lines } in &found.tables {
            self.restored(*variant, *family, &script(*table, &lines.remove))?;
        }
        let kernel = self.kernel();
        for (_, mark, message) in &found.rules {
            let what = format!("ip rule del pref {PRIORITY} fwmark {mark:#x}");
            kernel.routing.request(&what, RouteNetlinkMessage::DelRule(message.clone()), 0)?;
        }
        if let Some(device) = &found.device {
            let mut message = LinkMessage::default();
            message.header.index = device.index;
            let what = format!("ip link del {}", device.name);
            kernel.routing.request(&what, RouteNetlinkMessage::DelLink(message), 0)?;
        }
        let mut refused = None;
        for set in &found.sets {
            let destroyed = ipset::destroy_foreign(&mut kernel.netfilter, set);
            refused = refused.or(destroyed.err());
        }
        refused.map_or(Ok(()), Err)
    }
}

/// Script with changes to one table, as one transaction.
fn script(table: XtTable, lines: &[String]) -> String {
    let mut text = format!("*{}\n", table.name());
    text.extend(lines.iter().flat_map(|line| [line, "\n"]));
    text.push_str("COMMIT\n");
    text
}

impl RouteSocket {
    fn their_rules(&mut self) -> Result<Vec<(Family, u32, RuleMessage)>, KernelError> {
        let mut found = Vec::new();
        for family in Family::BOTH {
            let pick = |rule: &RuleMessage| Some((family, their_mark(rule)?, rule.clone()));
            found.extend(self.dump_rules(family, pick)?);
        }
        Ok(found)
    }

    fn their_device(
        &mut self,
        rules: &[(Family, u32, RuleMessage)],
    ) -> Result<Option<Device>, KernelError> {
        let mut message = LinkMessage::default();
        message.attributes = vec![link::without_statistics()];
        let message = RouteNetlinkMessage::GetLink(message);
        let devices = self.dump(&"ip -d link show", &message, |message| match message {
            RouteNetlinkMessage::NewLink(link) => Some(Device::parse(link)),
            _ => None,
        })?;
        let leads_out = self.devices_of_tables(rules)?;
        Ok(devices.into_iter().find(|device| {
            let Some(tunnel) = device.tunnel.filter(|tunnel| !tunnel.learning) else {
                return false;
            };
            let usual = (device.name.as_str(), tunnel.vni, tunnel.port) == DEVICE;
            // An alias, a group or a master shows that another program uses the device.
            let unnamed = device.alias.is_none() && device.group == 0 && device.master == 0;
            unnamed && !device.is_ours() && (usual || leads_out.contains(&device.index))
        }))
    }

    /// Returns the interfaces of the default routes in the agent's routing tables.
    fn devices_of_tables(
        &mut self,
        rules: &[(Family, u32, RuleMessage)],
    ) -> Result<BTreeSet<u32>, KernelError> {
        let mut found = BTreeSet::new();
        for family in Family::BOTH {
            let tables: BTreeSet<u32> =
                rules.iter().filter(|(of, ..)| *of == family).map(|(_, mark, _)| *mark).collect();
            if tables.is_empty() {
                continue;
            }
            let what = "ip route show table all";
            found.extend(self.dump_routes(&what, RouteMessage::default(), family, |message| {
                let theirs = tables.contains(&route::table(message))
                    && message.header.destination_prefix_length == 0;
                message.attributes.iter().find_map(|attribute| match attribute {
                    RouteAttribute::Oif(index) if theirs => Some(*index),
                    _ => None,
                })
            })?);
        }
        Ok(found)
    }
}

/// Returns the mark of a routing rule of the agent, which is also its table number.
fn their_mark(message: &RuleMessage) -> Option<u32> {
    let header = &message.header;
    let selects = (header.src_len, header.dst_len, header.tos) != (0, 0, 0);
    if selects || header.flags.contains(RuleFlags::Invert) || header.action != KernelAction::ToTable
    {
        return None;
    }
    let (mut priority, mut mark, mut compared) = (0, 0, 0);
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Priority(number) => priority = *number,
            RuleAttribute::FwMark(number) => mark = *number,
            RuleAttribute::FwMask(number) => compared = *number,
            RuleAttribute::Protocol(number) if u8::from(*number) == PROTOCOL => return None,
            RuleAttribute::Protocol(_)
            | RuleAttribute::Table(_)
            | RuleAttribute::SuppressPrefixLen(u32::MAX) => {}
            // A selector or an option that the agent never uses.
            _ => return None,
        }
    }
    let theirs = priority == PRIORITY && compared == u32::MAX && rule::table(message) == mark;
    (theirs && is_mark(mark)).then_some(mark)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{Mark, TableId};

    #[test]
    fn only_their_names_of_sets_are_theirs() {
        for (name, family) in [
            ("egress-cluster-cidr-ipv4", Some(Family::V4)),
            ("egress-cluster-cidr-ipv6", Some(Family::V6)),
            ("egress-src-v4-0123456789abcdef0", Some(Family::V4)),
            ("egress-dst-v6-0123456789abcdef0", Some(Family::V6)),
            ("egress-src-v4-0123456789abcdef", None),
            ("egress-src-v4-0123456789abcdefg", None),
            ("egress-src-v4-0123456789ABCDEF0", None),
            ("egress-src-v5-0123456789abcdef0", None),
            ("egress-cluster-cidr-ipv40", None),
            ("egress4-src-0123456789abcdef", None),
            ("egress-ingore-cidr", None),
        ] {
            assert_eq!(family_of_set(name), family, "{name}");
        }
    }

    #[test]
    fn a_rule_of_theirs_may_take_a_mark_of_ours() {
        let theirs = (Family::V4, 0x26d9_b723, RuleMessage::default());
        let found = Predecessor { rules: vec![theirs], ..Predecessor::default() };
        let ours = |family, mark| Rule {
            family,
            priority: 102,
            mark: Mark::new(mark),
            mask: 0xffff_ff00,
            inverted: false,
            input: None,
            action: RuleAction::Lookup(TableId::new(3000).unwrap()),
        };
        assert!(found.takes(&ours(Family::V4, 0x26d9_b700)));
        assert!(!found.takes(&ours(Family::V6, 0x26d9_b700)));
        assert!(!found.takes(&ours(Family::V4, 0x26d9_b600)));
    }

    #[test]
    fn the_base_mark_is_no_nodes() {
        assert!(!is_mark(0x2600_0000) && !is_mark(0x26ff_ffff) && !is_mark(0x2700_0001));
        assert!(is_mark(0x2600_0001) && is_mark(0x26d9_b723));
    }
}
