//! Routing part of the state: applies operations to it and reads it over rtnetlink.

use std::collections::BTreeSet;
use std::mem;

use ipnet::IpNet;

use super::claim::Asked;
use super::socket::{Request, RouteSocket, Run};
use super::{address, fdb, leftovers, neighbour, route, rule};
use crate::diff::op::Op;
use crate::error::{KernelError, errno};
use crate::state::{Route, State};
use crate::types::{DeviceName, Family};

/// Adds a remedy to the error of an operation; `None` if the error is as good as success.
fn explained(op: &Op, error: KernelError) -> Option<KernelError> {
    match op {
        Op::AddAddress(_, net) => Some(address::not_added(*net, error)),
        Op::DeleteStrayRouting(_) if leftovers::is_gone(&error) => None,
        _ => Some(error),
    }
}

impl RouteSocket {
    /// Applies routing operations one after another, and returns the errors by index.
    ///
    /// Operations of an nf_tables transaction are not applied here. All operations are tried, also
    /// after an error.
    pub(crate) fn make(&mut self, ops: &[Op]) -> Vec<(usize, KernelError)> {
        let (mut refused, mut run, mut ours) = (Vec::new(), Run::default(), None);
        let mut claims = Vec::new();
        for (place, op) in ops.iter().enumerate() {
            if matches!(op, Op::AddLink(_) | Op::SetLink(_) | Op::DeleteLink(_)) {
                // Several requests, each of which depends on the replies to those before; and our
                // device may have another index afterwards.
                refused.extend(self.make_run(&mem::take(&mut run)));
                refused.extend(self.make_link(op).err().map(|error| (place, error)));
                ours = None;
                continue;
            }
            if let Op::ClaimAddress(device, address) = op {
                // The network is asked for all of them at the same time.
                claims.push(Asked::new(place, op, device, *address));
                continue;
            }
            match self.request_of(op, &mut ours) {
                Ok(request) => run.push(place, op, request, self.next_sequence()),
                Err(error) => refused.push((place, error)),
            }
            if run.is_full() {
                refused.extend(self.make_run(&mem::take(&mut run)));
            }
        }
        refused.extend(self.make_run(&run));
        refused.extend(self.make_claims(claims));
        refused.sort_by_key(|(place, _)| *place);
        refused
    }

    /// Applies one operation.
    #[cfg(test)]
    pub(crate) fn make_one(&mut self, op: &Op) -> Result<(), KernelError> {
        self.make(std::slice::from_ref(op)).pop().map_or(Ok(()), |(_, error)| Err(error))
    }

    /// Applies operations of one request each.
    fn make_run(&mut self, run: &Run<'_>) -> Vec<(usize, KernelError)> {
        let refused = self.request_all(run).into_iter();
        refused.filter_map(|(place, op, error)| Some((place, explained(op, error)?))).collect()
    }

    fn make_link(&mut self, op: &Op) -> Result<(), KernelError> {
        match op {
            Op::AddLink(link) => self.add_link(op, link),
            Op::SetLink(link) => self.set_link(op, link),
            Op::DeleteLink(name) => self.delete_link(op, name),
            _ => Ok(()),
        }
    }

    /// Request of an operation; `ours` caches the name and the index of our device.
    fn request_of(
        &mut self,
        op: &Op,
        ours: &mut Option<(DeviceName, u32)>,
    ) -> Result<Request, KernelError> {
        let mut index = |device: &DeviceName| match ours {
            // The kernel never reuses an index: if the device were gone, the request would fail.
            Some((name, index)) if name == device => Ok(*index),
            _ => {
                let index = self.our_device(op, device)?.index;
                *ours = Some((device.clone(), index));
                Ok(index)
            }
        };
        let mut oif = |device: &DeviceName, route: &Route| match route {
            Route::Via(_) => index(device),
            Route::Throw | Route::Unreachable => Ok(0),
        };
        Ok(match op {
            Op::PutRoute(device, key, route) => route::put(key, *route, oif(device, route)?),
            Op::DeleteRoute(device, key, route) => route::delete(key, *route, oif(device, route)?),
            Op::AddAddress(device, net) => {
                let index = index(device)?;
                if net.addr().is_ipv6() {
                    self.enable_ipv6(op, device)?;
                }
                address::add(index, *net)
            }
            Op::DeleteAddress(device, net) => address::delete(index(device)?, *net),
            Op::ReleaseAddress(device, address) => match self.device_named(op, device)? {
                Some(device) => address::delete(device.index, IpNet::from(*address)),
                None => return Err(KernelError::refused(op, errno::ENODEV)),
            },
            Op::PutFdb(device, mac, node) => fdb::put(index(device)?, *mac, *node),
            Op::DeleteFdb(device, mac, node) => fdb::delete(index(device)?, *mac, *node),
            Op::PutNeighbour(device, ip, mac) => neighbour::put(index(device)?, *ip, *mac),
            Op::DeleteNeighbour(device, ip) => neighbour::delete(index(device)?, *ip),
            Op::AddRule(rule) => {
                self.our_rules().add(rule);
                rule::add(rule)
            }
            Op::DeleteRule(rule) => rule::delete(rule),
            Op::DeleteStrayRouting(stray) => return leftovers::delete(op, stray),
            Op::AddLink(_) | Op::SetLink(_) | Op::DeleteLink(_) | Op::ClaimAddress(..) => {
                return Err(KernelError::answer(op, "a device takes more than one request"));
            }
            Op::WakeTable(_)
            | Op::AddTable(_)
            | Op::DeleteTable(_)
            | Op::AddSet(_)
            | Op::DeleteSet(_)
            | Op::AddFlowtable
            | Op::AddChain(..)
            | Op::DeleteChain(_)
            | Op::SetRules(..)
            | Op::AddElement(..)
            | Op::DeleteElement(..)
            | Op::FlushSet(_)
            | Op::DeleteStray(..)
            | Op::BlockReplies(_)
            | Op::MarkConnection(..)
            | Op::EndConnection(_) => {
                return Err(KernelError::answer(
                    op,
                    "operations of netfilter go by the other socket",
                ));
            }
            Op::AddIpset(..)
            | Op::PutIpset(..)
            | Op::DeleteIpset(_)
            | Op::PutMember(..)
            | Op::DeleteMember(..)
            | Op::AddXtChain(..)
            | Op::DeleteXtChain(..)
            | Op::EditXtChain(..) => {
                return Err(KernelError::answer(
                    op,
                    "this needs a datapath that was opened for iptables",
                ));
            }
        })
    }

    /// Reads the VXLAN device and the objects on it, the routes and the rules.
    pub(crate) fn observe(&mut self, state: &mut State) -> Result<(), KernelError> {
        let link = self.link()?;
        let index = link.as_ref().map(|(device, _)| device.index);
        if self.lacks_ipv6(link.as_ref().map(|(device, _)| device))? {
            state.missing.families.insert(Family::V6);
        }
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
        state.claims = self.claims(index)?;
        (state.routes, state.strays) = self.routes(index)?;
        let (rules, strays) = self.rules()?;
        self.our_rules().set(&rules);
        state.rules = rules;
        state.strays.extend(strays);
        Ok(())
    }

    /// Routing tables of either family that have a route or that a rule looks up, of any owner.
    pub(crate) fn tables_in_use(&mut self) -> Result<BTreeSet<u32>, KernelError> {
        let mut tables: BTreeSet<u32> = self.tables_of_routes()?.into_iter().collect();
        tables.extend(self.tables_of_rules()?);
        Ok(tables)
    }
}
