//! What the kernel will tell because we asked, where it does not say that it was us.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::IpAddr;

use ipnet::IpNet;

use crate::diff::op::Op;
use crate::kernel::rtnetlink::link::Device;
use crate::types::MacAddr;

/// Our device, and the writes whose echo is no news.
///
/// An expectation is not a belief about the kernel: the first message that contradicts it is news
/// and ends it, so that it can hide no second change.
#[derive(Debug, Default)]
pub(crate) struct Expected {
    /// Whether anybody listens.
    active: bool,
    /// Whether something was not told.
    missed: bool,
    /// Index of our device, the last one known; 0 for none. The kernel gives out no index twice.
    index: u32,
    /// Index of our device that we are deleting; 0 for none.
    leaving: u32,
    /// What our device will be one after another, at last for good.
    device: VecDeque<Device>,
    /// What will be there, or nothing where it will go.
    addresses: BTreeMap<IpNet, bool>,
    fdb: BTreeMap<MacAddr, Option<IpAddr>>,
    /// Neighbours that will go; of those that come the kernel says whose doing it is.
    neighbours: BTreeSet<IpAddr>,
}

impl Expected {
    /// Expects nothing, and from now on what is asked.
    pub(crate) fn begin(&mut self) {
        *self = Self { active: true, index: self.index, ..Self::default() };
    }

    /// Expects nothing any more.
    pub(crate) fn end(&mut self) {
        *self = Self { index: self.index, ..Self::default() };
    }

    /// Whether anybody listens.
    pub(crate) const fn is_active(&self) -> bool {
        self.active
    }

    /// Something was not told.
    pub(crate) const fn missed(&mut self) {
        self.missed = true;
    }

    /// Whether something was not told since this was asked last.
    pub(crate) fn has_missed(&mut self) -> bool {
        std::mem::take(&mut self.missed)
    }

    /// Our device has this index.
    pub(crate) fn found(&mut self, index: u32) {
        self.index = index;
    }

    /// Index of our device, the last one known; 0 for none.
    pub(crate) const fn index(&self) -> u32 {
        self.index
    }

    /// An operation is about to be made.
    pub(crate) fn will_make(&mut self, op: &Op) {
        if !self.active {
            return;
        }
        match op {
            // Of IPv4 the kernel says whose doing it is.
            Op::AddAddress(_, net @ IpNet::V6(_)) => {
                self.addresses.insert(*net, true);
            }
            Op::DeleteAddress(_, net @ IpNet::V6(_)) => {
                self.addresses.insert(*net, false);
            }
            Op::PutFdb(_, mac, node) => {
                self.fdb.insert(*mac, Some(*node));
            }
            Op::DeleteFdb(_, mac, _) => {
                self.fdb.insert(*mac, None);
            }
            Op::DeleteNeighbour(_, ip) => {
                self.neighbours.insert(*ip);
            }
            _ => {}
        }
    }

    /// An operation was refused.
    pub(crate) fn refused(&mut self, op: &Op) {
        match op {
            Op::AddAddress(_, net) | Op::DeleteAddress(_, net) => {
                self.addresses.remove(net);
            }
            Op::PutFdb(_, mac, _) | Op::DeleteFdb(_, mac, _) => {
                self.fdb.remove(mac);
            }
            Op::DeleteNeighbour(_, ip) => {
                self.neighbours.remove(ip);
            }
            Op::AddLink(_) | Op::SetLink(_) => self.device.clear(),
            Op::DeleteLink(_) => self.leaving = 0,
            _ => {}
        }
    }

    /// Our device is about to become this.
    pub(crate) fn will_be(&mut self, device: &Device) {
        if self.active && self.device.back() != Some(device) {
            self.device.push_back(device.clone());
        }
    }

    /// A device of ours is about to be deleted.
    pub(crate) fn will_go(&mut self, index: u32) {
        if self.active {
            self.leaving = index;
            self.device.clear();
            // What is on it goes with it.
            self.addresses.clear();
            self.fdb.clear();
            self.neighbours.clear();
        }
    }

    /// Whether a message about something on this device is one about ours.
    pub(crate) fn concerns(&self, index: u32) -> bool {
        index != 0 && index == self.index && index != self.leaving
    }

    /// Whether we are deleting the device with this index.
    pub(crate) fn is_leaving(&self, index: u32) -> bool {
        index != 0 && index == self.leaving
    }

    /// The device that we were deleting is gone.
    pub(crate) fn has_left(&mut self) {
        self.leaving = 0;
    }

    /// Whether it is our doing that our device is this.
    pub(crate) fn is_expected(&mut self, device: &Device) -> bool {
        let at = self.device.iter().position(|expected| is_like(expected, device));
        self.device.drain(..at.unwrap_or(self.device.len()));
        at.is_some()
    }

    /// Whether it is our doing that this address is or is not there.
    pub(crate) fn is_expected_address(&mut self, net: IpNet, exists: bool) -> bool {
        let expected = self.addresses.get(&net) == Some(&exists);
        if !expected || !exists {
            self.addresses.remove(&net);
        }
        expected
    }

    /// Whether it is our doing that this neighbour went.
    pub(crate) fn is_expected_to_go(&mut self, neighbour: IpAddr) -> bool {
        self.neighbours.remove(&neighbour)
    }

    /// Whether it is our doing that this forwarding entry leads there, or is not there.
    pub(crate) fn is_expected_fdb(&mut self, mac: MacAddr, node: Option<IpAddr>) -> bool {
        let expected = self.fdb.get(&mac) == Some(&node);
        if !expected || node.is_none() {
            self.fdb.remove(&mac);
        }
        expected
    }

    /// Whether our device is to have this `rp_filter`.
    pub(crate) fn is_expected_rp_filter(&self, value: u32) -> bool {
        self.device.back().is_some_and(|device| device.rp_filter == value)
    }
}

/// Until it has our alias, it has the settings of a new device, whatever they are here.
fn is_like(expected: &Device, seen: &Device) -> bool {
    let new = expected.alias.is_none();
    let rp_filter = if new { seen.rp_filter } else { expected.rp_filter };
    *seen == Device { rp_filter, ..expected.clone() }
}
