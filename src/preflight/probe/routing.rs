//! Reads routing rules and tables of other programs.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteType,
};
use netlink_packet_route::rule::{
    RuleAction as KernelAction, RuleAttribute, RuleFlags, RuleMessage,
};

use crate::error::{KernelError, errno};
use crate::kernel::rtnetlink::socket::RouteSocket;
use crate::kernel::rtnetlink::{route, rule};
use crate::preflight::facts::{Action, Intruder, Rule};
use crate::state::PROTOCOL;
use crate::types::{Family, TableId};

/// Routing tables that other programs use.
#[derive(Default)]
pub(crate) struct Tables {
    /// Tables in use.
    pub(crate) used: BTreeSet<u32>,
    /// Tables in use that have a route for every destination, by family.
    pub(crate) catch_all: BTreeSet<(Family, u32)>,
    /// Routes of other programs in tables that hold a route of the datapath.
    pub(crate) intruders: Vec<Intruder>,
    /// Addresses that routes of other programs name as the source of this host's packets.
    pub(crate) sources: BTreeSet<IpAddr>,
}

/// Route from a dump.
struct Listed {
    table: u32,
    /// Route of another program: its text and whether it matches every destination.
    ///
    /// The text is in the syntax of `ip route`, and present in a table that may be the datapath's.
    foreign: Option<(Option<String>, bool)>,
    source: Option<IpAddr>,
}

impl RouteSocket {
    pub(crate) fn foreign_rules(&mut self) -> Result<Vec<Rule>, KernelError> {
        let mut found = Vec::new();
        for family in Family::BOTH {
            found.extend(self.dump_rules(family, |message| foreign(message, family))?);
        }
        Ok(found)
    }

    pub(crate) fn foreign_tables(&mut self, rules: &[Rule]) -> Result<Tables, KernelError> {
        let used = rules
            .iter()
            .filter_map(|rule| match rule.action {
                Action::Lookup { table, .. } => Some(table),
                _ => None,
            })
            .collect();
        let mut tables = Tables { used, ..Tables::default() };
        for family in Family::BOTH {
            let what = "ip route show table all";
            let found = self.dump_routes(&what, RouteMessage::default(), family, |message| {
                let ours = message.header.protocol == RouteProtocol::from(PROTOCOL);
                let table = route::table(message);
                let text = || TableId::new(table).map(|_| route::text(message, family));
                let foreign = (!ours).then(|| (text(), is_catch_all(message)));
                Some(Listed { table, foreign, source: source(message) })
            });
            let found = match found {
                // The same kernel has no rules, and the rule dump reports that.
                Err(error) if error.errno() == Some(errno::EOPNOTSUPP) => Vec::new(),
                other => other?,
            };
            let ours: BTreeSet<u32> = found
                .iter()
                .filter(|route| route.foreign.is_none())
                .map(|route| route.table)
                .collect();
            for Listed { table, foreign, source } in found {
                let Some((text, catches)) = foreign else { continue };
                tables.sources.extend(source);
                tables.used.insert(table);
                if catches {
                    tables.catch_all.insert((family, table));
                }
                if ours.contains(&table) {
                    tables.intruders.extend(text.map(|text| Intruder { family, text }));
                }
            }
        }
        Ok(tables)
    }
}

/// Source address of this host's packets, if a route to other hosts names one.
fn source(message: &RouteMessage) -> Option<IpAddr> {
    let mut attributes = message.attributes.iter();
    attributes.find_map(|attribute| match attribute {
        RouteAttribute::PrefSource(address) if message.header.kind == RouteType::Unicast => {
            match address {
                RouteAddress::Inet(v4) => Some(IpAddr::from(*v4)),
                RouteAddress::Inet6(v6) => Some(IpAddr::from(*v6)),
                _ => None,
            }
        }
        _ => None,
    })
}

pub(crate) fn is_catch_all(message: &RouteMessage) -> bool {
    message.header.destination_prefix_length == 0 && message.header.kind != RouteType::Throw
}

/// Reads a rule of another program.
pub(crate) fn foreign(message: &RuleMessage, family: Family) -> Option<Rule> {
    let header = &message.header;
    let mut found = Rule {
        family,
        priority: 0,
        mark: None,
        source: None,
        selects: header.dst_len != 0 || header.tos != 0,
        inverted: header.flags.contains(RuleFlags::Invert),
        action: Action::Other,
    };
    let (mut value, mut mask, mut without_default) = (0, None, false);
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Protocol(number) if u8::from(*number) == PROTOCOL => return None,
            RuleAttribute::Priority(number) => found.priority = *number,
            RuleAttribute::FwMark(number) => value = *number,
            RuleAttribute::FwMask(number) => mask = Some(*number),
            RuleAttribute::Source(ip) => found.source = IpNet::new(*ip, header.src_len).ok(),
            RuleAttribute::SuppressPrefixLen(length) => without_default = *length != u32::MAX,
            RuleAttribute::Iifname(_)
            | RuleAttribute::Oifname(_)
            | RuleAttribute::L3MDev(_)
            | RuleAttribute::TunId(_)
            | RuleAttribute::UidRange(_)
            | RuleAttribute::IpProtocol(_)
            | RuleAttribute::SourcePortRange(_)
            | RuleAttribute::DestinationPortRange(_)
            | RuleAttribute::Other(_) => found.selects = true,
            _ => {}
        }
    }
    found.mark = mask.filter(|mask| *mask != 0).map(|mask| (value, mask));
    found.action = match header.action {
        KernelAction::ToTable => Action::Lookup { table: rule::table(message), without_default },
        KernelAction::Blackhole | KernelAction::Unreachable | KernelAction::Prohibit => {
            Action::Refuse
        }
        _ => Action::Other,
    };
    Some(found)
}
