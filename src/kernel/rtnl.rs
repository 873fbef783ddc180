//! The part of the state that the kernel's routing subsystem holds.

use std::collections::BTreeSet;

use super::route_socket::RouteSocket;
use crate::error::{KernelError, errno};
use crate::op::Op;
use crate::state::State;
use crate::types::Family;

/// Not among the error numbers that callers ask about.
pub(super) const EAFNOSUPPORT: i32 = 97;

/// A kernel without IPv6 has nothing of it; that is no error.
pub(super) fn unless_absent<T>(
    family: Family,
    found: Result<Vec<T>, KernelError>,
) -> Result<Vec<T>, KernelError> {
    match found {
        Err(error)
            if family == Family::V6
                && matches!(error.errno(), Some(EAFNOSUPPORT | errno::EOPNOTSUPP)) =>
        {
            Ok(Vec::new())
        }
        found => found,
    }
}

impl RouteSocket {
    /// Makes one change, of those that are not part of an nf_tables transaction.
    pub(crate) fn make(&mut self, op: &Op) -> Result<(), KernelError> {
        // Before it is made, for a watch may hear of it before the answer is read.
        self.expected().will_make(op);
        let made = self.request_op(op);
        if made.is_err() {
            self.expected().refused(op);
        }
        made
    }

    fn request_op(&mut self, op: &Op) -> Result<(), KernelError> {
        match op {
            Op::AddLink(link) => self.add_link(op, link),
            Op::SetLink(link) => self.set_link(op, link),
            Op::DeleteLink(name) => self.delete_link(op, name),
            Op::AddAddress(device, net) => self.add_address(op, device, *net),
            Op::DeleteAddress(device, net) => self.delete_address(op, device, *net),
            Op::PutFdb(device, mac, node) => self.put_fdb(op, device, *mac, *node),
            Op::DeleteFdb(device, mac, node) => self.delete_fdb(op, device, *mac, *node),
            Op::PutNeighbour(device, ip, mac) => self.put_neighbour(op, device, *ip, *mac),
            Op::DeleteNeighbour(device, ip) => self.delete_neighbour(op, device, *ip),
            Op::PutRoute(device, key, route) => self.put_route(op, device, key, *route),
            Op::DeleteRoute(device, key, route) => self.delete_route(op, device, key, *route),
            Op::AddRule(rule) => self.add_rule(op, rule),
            Op::DeleteRule(rule) => self.delete_rule(op, rule),
            Op::DeleteStrayRouting(stray) => self.delete_stray(op, stray),
            Op::WakeTable(_)
            | Op::AddTable(_)
            | Op::DeleteTable(_)
            | Op::AddSet(_)
            | Op::DeleteSet(_)
            | Op::AddChain(..)
            | Op::DeleteChain(_)
            | Op::SetRules(..)
            | Op::AddElement(..)
            | Op::DeleteElement(..)
            | Op::DeleteStray(..)
            | Op::HoldAnswers(_)
            | Op::MarkConnection(..)
            | Op::EndConnection(_) => {
                Err(KernelError::answer(op, "operations of netfilter go by the other socket"))
            }
            Op::AddIpset(..)
            | Op::PutIpset(..)
            | Op::DeleteIpset(_)
            | Op::PutMember(..)
            | Op::DeleteMember(..)
            | Op::AddXtChain(..)
            | Op::DeleteXtChain(..)
            | Op::EditXtChain(..) => {
                Err(KernelError::answer(op, "this needs a datapath that was opened for iptables"))
            }
        }
    }

    /// Reads back the tunnel device with what is on it, the routes and the rules.
    pub(crate) fn observe(&mut self, state: &mut State) -> Result<(), KernelError> {
        let link = self.link()?;
        let index = link.as_ref().map(|(index, _)| *index);
        state.link = link.map(|(_, link)| link);
        if let Some(index) = index {
            state.addresses = self.addresses(index)?;
            state.fdb = self.fdb(index)?;
            state.neighbours = self.neighbours(index)?;
        } else {
            state.addresses.clear();
            state.fdb.clear();
            state.neighbours.clear();
        }
        (state.routes, state.strays) = self.routes(index)?;
        let (rules, strays) = self.rules()?;
        state.rules = rules;
        state.strays.extend(strays);
        Ok(())
    }

    /// Every table that a rule names or that holds a route, of either family and of whoever.
    pub(crate) fn tables_in_use(&mut self) -> Result<BTreeSet<u32>, KernelError> {
        let mut tables: BTreeSet<u32> = self.tables_of_routes()?.into_iter().collect();
        tables.extend(self.tables_of_rules()?);
        Ok(tables)
    }
}
