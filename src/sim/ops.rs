//! Applies one operation with the kernel's error checks.

use std::collections::btree_map::Entry;

use super::side_effects::{LinkSnapshot, follow, has_ipv6};
use crate::diff::op::Op;
use crate::error::errno;
use crate::state::{
    ChainId, Data, FLOWTABLE, Field, Firewall, NftRule, Route, RuleAction, Set, State, Stmt, Stray,
    Verdict, Vxlan,
};
use crate::types::{DeviceName, Family};

/// An error number, positive.
pub(super) type Errno = i32;

/// Applies an operation, or refuses it.
pub(super) fn make(state: &mut State, op: &Op) -> Result<(), Errno> {
    match op {
        Op::AddTable(family) => {
            let table = state.table_mut(*family);
            if table.is_some() {
                return Err(errno::EEXIST);
            }
            *table = Some(Firewall::default());
            Ok(())
        }
        Op::DeleteTable(family) => state.table_mut(*family).take().map(drop).ok_or(errno::ENOENT),
        Op::WakeTable(family) => {
            state.table_mut(*family).as_mut().ok_or(errno::ENOENT)?.dormant = false;
            Ok(())
        }
        Op::AddFlowtable if state.missing.flowtables => Err(errno::ENOENT),
        Op::SetRules(_, rules)
            if state.missing.fields.iter().any(|field| tested(*field, rules)) =>
        {
            Err(errno::ENOENT)
        }
        op if op.is_nft() => nft(state.table_mut(op.table()).as_mut().ok_or(errno::ENOENT)?, op),
        op => rtnetlink(state, op),
    }
}

fn tested(field: Field, rules: &[NftRule]) -> bool {
    rules.iter().flat_map(|rule| &rule.0).any(|statement| statement.compares(field))
}

fn rtnetlink(state: &mut State, op: &Op) -> Result<(), Errno> {
    let family = match op {
        Op::AddAddress(_, net) => Some(Family::of_net(net)),
        Op::ClaimAddress(_, address) | Op::PutNeighbour(_, address, _) => {
            Some(Family::of(*address))
        }
        Op::PutRoute(_, key, _) => Some(Family::of_net(&key.dst)),
        Op::AddRule(rule) => Some(rule.family),
        _ => None,
    };
    if family.is_some_and(|family| state.missing.families.contains(&family)) {
        return Err(errno::EAFNOSUPPORT);
    }
    let was = LinkSnapshot::of(state);
    request(state, op)?;
    follow(&was, state);
    Ok(())
}

fn request(state: &mut State, op: &Op) -> Result<(), Errno> {
    let has = |device: &DeviceName| {
        state.link.as_ref().filter(|link| link.name == *device).ok_or(errno::ENODEV)
    };
    match op {
        Op::AddLink(link) => {
            possible(link)?;
            if state.link.is_some() {
                return Err(errno::EEXIST);
            }
            state.link = Some(link.clone());
        }
        Op::SetLink(link) => {
            let old = has(&link.name)?;
            let fixed = (old.vni, old.port) == (link.vni, link.port);
            possible(link)?;
            if !fixed {
                return Err(errno::EOPNOTSUPP);
            }
            state.link = Some(link.clone());
        }
        Op::DeleteLink(device) => {
            has(device)?;
            state.link = None;
        }
        Op::AddAddress(device, net) => {
            let link = has(device)?;
            if net.addr().is_ipv6() && !has_ipv6(link) {
                return Err(errno::EINVAL);
            }
            if !state.addresses.insert(*net) {
                return Err(errno::EEXIST);
            }
        }
        Op::DeleteAddress(device, net) => {
            has(device)?;
            if !state.addresses.remove(net) {
                return Err(errno::EADDRNOTAVAIL);
            }
        }
        Op::ClaimAddress(device, address) => {
            if !state.claims.insert((*address, device.clone())) {
                return Err(errno::EEXIST);
            }
        }
        Op::ReleaseAddress(device, address) => {
            if !state.claims.remove(&(*address, device.clone())) {
                return Err(errno::EADDRNOTAVAIL);
            }
        }
        Op::PutFdb(device, mac, node) => {
            has(device)?;
            state.fdb.insert(*mac, *node);
        }
        Op::DeleteFdb(device, mac, node) => {
            has(device)?;
            match state.fdb.entry(*mac) {
                Entry::Occupied(entry) if entry.get() == node => drop(entry.remove()),
                // An FDB entry to another node stays, and no error is returned
                // (`__vxlan_fdb_delete`).
                Entry::Occupied(_) => {}
                Entry::Vacant(_) => return Err(errno::ENOENT),
            }
        }
        Op::PutNeighbour(device, address, mac) => {
            let link = has(device)?;
            if address.is_ipv6() && !has_ipv6(link) {
                return Err(errno::EINVAL);
            }
            state.neighbours.insert(*address, *mac);
        }
        Op::DeleteNeighbour(device, address) => {
            has(device)?;
            state.neighbours.remove(address).ok_or(errno::ENOENT)?;
        }
        Op::PutRoute(device, key, route) => {
            if let Route::Via(via) = route {
                let link = has(device)?;
                if via.is_ipv6() && !has_ipv6(link) {
                    return Err(errno::ENODEV);
                }
                if !link.up {
                    return Err(errno::ENETDOWN);
                }
            }
            state.routes.insert(*key, *route);
        }
        Op::DeleteRoute(_, key, route) => match state.routes.entry(*key) {
            // IPv6 does not compare the type of the route that it deletes (`ip6_route_del`).
            Entry::Occupied(entry)
                if entry.get() == route
                    || key.dst.addr().is_ipv6() && !matches!(route, Route::Via(_)) =>
            {
                entry.remove();
            }
            _ => return Err(errno::ESRCH),
        },
        op => return rules(state, op),
    }
    Ok(())
}

fn rules(state: &mut State, op: &Op) -> Result<(), Errno> {
    match op {
        Op::AddRule(rule) => {
            if matches!(rule.action, RuleAction::Goto(later) if later <= rule.priority) {
                return Err(errno::EINVAL);
            }
            if state.rules.iter().any(|found| found.differs_by_target(rule)) {
                return Err(errno::EEXIST);
            }
            if !state.rules.insert(rule.clone()) {
                return Err(errno::EEXIST);
            }
        }
        Op::DeleteRule(rule) => {
            if !state.rules.remove(rule) {
                return Err(errno::ENOENT);
            }
        }
        // A route that was removed with its interface is deleted, as requested.
        Op::DeleteStrayRouting(stray) => {
            state.strays.remove(stray);
        }
        _ => return Err(errno::EINVAL),
    }
    Ok(())
}

/// Checks the attributes of a VXLAN device (`eth_validate_addr`, `vxlan_validate`, RFC 791).
fn possible(link: &Vxlan) -> Result<(), Errno> {
    let octets = link.mac.octets();
    if octets[0] & 1 != 0 || octets == [0; 6] {
        return Err(errno::EADDRNOTAVAIL);
    }
    if link.vni >= 1 << 24 {
        return Err(errno::ERANGE);
    }
    if link.mtu < 68 { Err(errno::EINVAL) } else { Ok(()) }
}

fn nft(firewall: &mut Firewall, op: &Op) -> Result<(), Errno> {
    match op {
        Op::AddSet(set) => firewall.sets.insert(*set).then_some(()).ok_or(errno::EEXIST),
        Op::DeleteSet(set) => {
            if firewall.chains.values().any(|(_, rules)| rules.iter().any(|rule| names(rule, *set)))
            {
                return Err(errno::EBUSY);
            }
            if !firewall.sets.remove(set) {
                return Err(errno::ENOENT);
            }
            firewall.elements.retain(|key, _| key.set() != *set);
            Ok(())
        }
        Op::AddChain(chain, base) => match firewall.chains.entry(*chain) {
            Entry::Occupied(_) => Err(errno::EEXIST),
            Entry::Vacant(entry) => {
                entry.insert((base.clone(), Vec::new()));
                Ok(())
            }
        },
        Op::DeleteChain(chain) => {
            if goes_to(firewall, *chain) {
                // The kernel has deleted the chain's rules by then and released their references;
                // the aborted transaction undoes all of it (`nf_tables_delchain`).
                if let Some((_, rules)) = firewall.chains.get_mut(chain) {
                    rules.clear();
                }
                return Err(errno::EBUSY);
            }
            firewall.chains.remove(chain).map(drop).ok_or(errno::ENOENT)
        }
        Op::SetRules(chain, rules) => {
            if !rules.iter().all(|rule| refers_well(firewall, rule)) {
                return Err(errno::ENOENT);
            }
            let (_, old) = firewall.chains.get_mut(chain).ok_or(errno::ENOENT)?;
            old.clone_from(rules);
            Ok(())
        }
        Op::AddElement(key, value) => {
            if !firewall.sets.contains(&key.set()) {
                return Err(errno::ENOENT);
            }
            if let Data::Verdict(Verdict::Goto(chain)) = value.data {
                if !firewall.chains.contains_key(&chain) {
                    return Err(errno::ENOENT);
                }
            }
            if firewall.elements.contains_key(key) || firewall.overlapping(key).is_some() {
                return Err(errno::EEXIST);
            }
            firewall.elements.insert(*key, value.clone());
            Ok(())
        }
        Op::DeleteElement(key, _) => firewall.elements.remove(key).map(drop).ok_or(errno::ENOENT),
        Op::FlushSet(set) => {
            let all: Vec<_> = firewall.elements.keys().filter(|key| key.set() == *set).collect();
            for key in all {
                firewall.elements.remove(&key);
            }
            if firewall.sets.contains(set) { Ok(()) } else { Err(errno::ENOENT) }
        }
        Op::AddFlowtable => {
            let exists = std::mem::replace(&mut firewall.flowtable, true);
            if exists { Err(errno::EEXIST) } else { Ok(()) }
        }
        Op::DeleteStray(_, Stray::Flowtable(name)) if name == FLOWTABLE => {
            if firewall.chains.values().any(|(_, rules)| rules.iter().any(offloads)) {
                return Err(errno::EBUSY);
            }
            std::mem::take(&mut firewall.flowtable).then_some(()).ok_or(errno::ENOENT)
        }
        Op::DeleteStray(_, stray) => {
            firewall.strays.remove(stray).then_some(()).ok_or(errno::ENOENT)
        }
        // The set of the element does not exist.
        Op::BlockReplies(_) => Err(errno::ENOENT),
        _ => Err(errno::EINVAL),
    }
}

fn goes_to(firewall: &Firewall, chain: ChainId) -> bool {
    let by_rule = firewall.chains.values().any(|(_, rules)| {
        rules.iter().any(|NftRule(rule)| {
            rule.contains(&Stmt::Goto(chain)) || rule.contains(&Stmt::Jump(chain))
        })
    });
    let goto = Data::Verdict(Verdict::Goto(chain));
    by_rule || firewall.elements.values().any(|value| value.data == goto)
}

fn offloads(rule: &NftRule) -> bool {
    rule.0.contains(&Stmt::NoOffload)
}

fn names(rule: &NftRule, set: Set) -> bool {
    rule.0.iter().any(|statement| statement.set() == Some(set))
}

fn refers_well(firewall: &Firewall, rule: &NftRule) -> bool {
    rule.0.iter().all(|statement| match statement {
        Stmt::Goto(chain) | Stmt::Jump(chain) => firewall.chains.contains_key(chain),
        Stmt::NoOffload => firewall.flowtable,
        other => other.set().is_none_or(|set| firewall.sets.contains(&set)),
    })
}
