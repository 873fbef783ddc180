//! Routing rules.

use std::collections::BTreeSet;

use netlink_packet_core::{Emitable, NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::route::RouteProtocol;
use netlink_packet_route::rule::{
    RuleAction as KernelAction, RuleAttribute, RuleFlags, RuleMessage,
};

use super::address::kernel_family;
use super::socket::{Request, RouteSocket, unless_absent};
use crate::error::KernelError;
use crate::state::{PROTOCOL, Rule, RuleAction, StrayKind, StrayRouting};
use crate::types::{DeviceName, Family, Mark, TableId};

pub(crate) fn message(rule: &Rule) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = kernel_family(rule.family);
    message.attributes = vec![
        RuleAttribute::Priority(rule.priority),
        RuleAttribute::FwMark(rule.mark.get()),
        RuleAttribute::FwMask(rule.mask),
    ];
    if rule.inverted {
        message.header.flags |= RuleFlags::Invert;
    }
    if let Some(device) = &rule.input {
        message.attributes.push(RuleAttribute::Iifname(device.to_string()));
    }
    match rule.action {
        RuleAction::Unreachable => message.header.action = KernelAction::Unreachable,
        RuleAction::Lookup(table) => {
            message.header.action = KernelAction::ToTable;
            // The header's byte is too small for most table numbers; the attribute takes
            // precedence.
            message.header.table = u8::try_from(table.get()).unwrap_or_default();
            message.attributes.push(RuleAttribute::Table(table.get()));
        }
        RuleAction::Goto(priority) => {
            message.header.action = KernelAction::Goto;
            message.attributes.push(RuleAttribute::Goto(priority));
        }
    }
    let protocol = RouteProtocol::from(PROTOCOL);
    message.attributes.push(RuleAttribute::Protocol(protocol));
    message
}

/// Parses a rule of this crate; `None` for a rule that it never writes.
pub(crate) fn parse(message: &RuleMessage, family: Family) -> Option<Rule> {
    let header = &message.header;
    let selects = (header.src_len, header.dst_len, header.tos) != (0, 0, 0);
    if selects {
        return None;
    }
    let inverted = header.flags.contains(RuleFlags::Invert);
    let mut protocol = None;
    let mut priority = 0;
    let mut value = 0;
    let mut mask = None;
    let mut target = None;
    let mut input = None;
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Protocol(number) => protocol = Some(u8::from(*number)),
            RuleAttribute::Priority(number) => priority = *number,
            RuleAttribute::FwMark(number) => value = *number,
            RuleAttribute::FwMask(number) => mask = Some(*number),
            RuleAttribute::Goto(priority) => target = Some(*priority),
            RuleAttribute::Iifname(name) => input = Some(DeviceName::new(name).ok()?),
            // Attributes that the kernel reports for every rule.
            RuleAttribute::SuppressPrefixLen(u32::MAX) | RuleAttribute::Table(_) => {}
            // A selector or an option that this crate never uses.
            _ => return None,
        }
    }
    if protocol != Some(PROTOCOL) {
        return None;
    }
    let action = match (header.action, target, inverted, &input) {
        (KernelAction::Unreachable, None, false, None) => RuleAction::Unreachable,
        (KernelAction::ToTable, None, false, None) => {
            RuleAction::Lookup(TableId::new(table(message))?)
        }
        (KernelAction::Goto, Some(priority), true, None)
        | (KernelAction::Goto, Some(priority), false, _) => RuleAction::Goto(priority),
        _ => return None,
    };
    Some(Rule { family, priority, mark: Mark::new(value), mask: mask?, inverted, input, action })
}

/// Parses a rule with our protocol number that this crate never writes.
pub(crate) fn stray(message: &RuleMessage, family: Family) -> Option<StrayRouting> {
    let mut priority = 0;
    let mut ours = false;
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Protocol(number) => ours = u8::from(*number) == PROTOCOL,
            RuleAttribute::Priority(number) => priority = *number,
            _ => {}
        }
    }
    let what = match message.header.action {
        KernelAction::ToTable => format!(" lookup {}", table(message)),
        _ => String::new(),
    };
    let text = format!("pref {priority}{what} protocol {PROTOCOL}");
    let mut bytes = vec![0; message.buffer_len()];
    message.emit(&mut bytes);
    ours.then_some(StrayRouting { kind: StrayKind::Rule, family, text, message: bytes })
}

/// Routing table of a rule.
///
/// The byte in the header is a placeholder if the number does not fit.
pub(crate) fn table(message: &RuleMessage) -> u32 {
    message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RuleAttribute::Table(id) => Some(*id),
            _ => None,
        })
        .unwrap_or(u32::from(message.header.table))
}

/// Request that adds a rule.
pub(crate) fn add(rule: &Rule) -> Request {
    // Without `NLM_F_EXCL` the kernel adds identical rules as often as it is asked.
    let message = RouteNetlinkMessage::NewRule(message(rule));
    Request { message, flags: NLM_F_CREATE | NLM_F_EXCL }
}

/// Request that deletes a rule by all its attributes.
///
/// The kernel deletes the first rule that matches; an attribute that is not in the request matches
/// every rule. It compares neither whether a rule is inverted nor the target of a `goto`
/// (`rule_find` in `net/core/fib_rules.c`): of several `goto` rules, those with an input interface
/// must be deleted first.
pub(crate) fn delete(rule: &Rule) -> Request {
    Request { message: RouteNetlinkMessage::DelRule(message(rule)), flags: 0 }
}

impl RouteSocket {
    /// Rules with our protocol number; the second set has those that this crate never writes.
    pub(crate) fn rules(
        &mut self,
    ) -> Result<(BTreeSet<Rule>, BTreeSet<StrayRouting>), KernelError> {
        let (mut found, mut strays) = (BTreeSet::new(), BTreeSet::new());
        for family in Family::BOTH {
            let rules = self.dump_rules(family, |rule| match parse(rule, family) {
                Some(rule) => Some(Ok(rule)),
                None => stray(rule, family).map(Err),
            })?;
            for rule in rules {
                match rule {
                    Ok(rule) => drop(found.insert(rule)),
                    Err(stray) => drop(strays.insert(stray)),
                }
            }
        }
        Ok((found, strays))
    }

    /// Routing tables that a rule of either family looks up, of any owner.
    pub(crate) fn tables_of_rules(&mut self) -> Result<Vec<u32>, KernelError> {
        let mut found = Vec::new();
        for family in Family::BOTH {
            let tables = self.dump_rules(family, |rule| match rule.header.action {
                KernelAction::ToTable => Some(table(rule)),
                _ => None,
            })?;
            found.extend(tables);
        }
        Ok(found)
    }

    pub(crate) fn dump_rules<T>(
        &mut self,
        family: Family,
        pick: impl Fn(&RuleMessage) -> Option<T>,
    ) -> Result<Vec<T>, KernelError> {
        let what = match family {
            Family::V4 => "ip rule show",
            Family::V6 => "ip -6 rule show",
        };
        let mut request = RuleMessage::default();
        request.header.family = kernel_family(family);
        let request = RouteNetlinkMessage::GetRule(request);
        let found = self.dump(&what, &request, |message| match message {
            RouteNetlinkMessage::NewRule(rule) if rule.header.family == kernel_family(family) => {
                pick(&rule)
            }
            _ => None,
        });
        unless_absent(family, found)
    }
}
