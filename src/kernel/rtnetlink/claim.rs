//! Egress IPs on interfaces of the host: the network is asked for them, they are added, and
//! announced.
//!
//! The kernel itself asks, as for any neighbour (`NTF_USE`): with an ARP request or a neighbour
//! solicitation. A host that replies becomes a neighbour with a MAC address.

use std::collections::BTreeSet;
use std::collections::btree_map::{BTreeMap, Entry};
use std::fmt::Display;
use std::net::IpAddr;
use std::thread;
use std::time::{Duration, Instant};

use netlink_packet_core::NLM_F_CREATE;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::LinkMessage;
use netlink_packet_route::neighbour::{
    NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};

use super::address::{self, kernel_family};
use super::link::Device;
use super::neighbour::{destination, lladdr, message};
use super::socket::RouteSocket;
use crate::cluster::Claim;
use crate::diff::op::Op;
use crate::error::{KernelError, errno};
use crate::types::{DeviceName, Family, MacAddr};

/// Number of times that the network is asked for an address; each may be lost.
const ROUNDS: u32 = 4;

/// Interval at which the neighbours are read.
const POLL: Duration = Duration::from_millis(5);

const NO_DEVICE: &str = "create the interface first or name another one";
const DOWN: &str = "set the interface up first or name another one";
const ADDED: &str = "delete it there, or leave the address out of the claims";
const NO_PROTOCOL: &str = "the kernel keeps no protocol of an address, by which it would be found \
                           again: this takes Linux 5.18";

/// An egress IP that is to be added to an interface.
#[derive(Debug)]
pub(super) struct Asked<'a> {
    place: usize,
    op: &'a Op,
    name: &'a DeviceName,
    address: IpAddr,
}

impl<'a> Asked<'a> {
    pub(super) const fn new(
        place: usize,
        op: &'a Op,
        name: &'a DeviceName,
        address: IpAddr,
    ) -> Self {
        Self { place, op, name, address }
    }
}

impl RouteSocket {
    /// Egress IPs that this crate has added to interfaces other than the tunnel's.
    pub(super) fn claims(
        &mut self,
        tunnel: Option<u32>,
    ) -> Result<BTreeSet<(IpAddr, DeviceName)>, KernelError> {
        let mut names = BTreeMap::new();
        let mut found = BTreeSet::new();
        for (index, net, claimed) in self.addresses_of_host()? {
            if !claimed || Some(index) == tunnel {
                continue;
            }
            if let Entry::Vacant(entry) = names.entry(index) {
                let device = self.device_at(index)?;
                entry.insert(device.and_then(|device| DeviceName::new(device.name).ok()));
            }
            let name = names.get(&index).and_then(Option::as_ref);
            found.extend(name.map(|name| (net.addr(), name.clone())));
        }
        Ok(found)
    }

    /// Adds egress IPs, and returns the errors by the index of the operation.
    pub(super) fn make_claims(&mut self, asked: Vec<Asked<'_>>) -> Vec<(usize, KernelError)> {
        if asked.is_empty() {
            return Vec::new();
        }
        let mut refused = Vec::new();
        let mut free = Vec::new();
        for one in asked {
            match self.is_possible(&one) {
                Ok(device) => free.push((one, device)),
                Err(error) => refused.push((one.place, error)),
            }
        }
        let holders = self.holders(&free);
        let mut holders = holders.into_iter();
        free.retain(|(one, _)| match holders.next() {
            Some(Ok(None)) => true,
            Some(Ok(Some(mac))) => {
                let error = KernelError::refused(one.op, errno::EADDRINUSE);
                refused.push((one.place, error.with_duplicate(mac)));
                false
            }
            Some(Err(error)) => {
                refused.push((one.place, error));
                false
            }
            None => false,
        });
        for (one, device) in free {
            refused.extend(self.take(&one, &device).err().map(|error| (one.place, error)));
        }
        refused
    }

    /// Announces all egress IPs that this crate has added.
    pub(crate) fn announce_claims(&mut self) -> Result<(), KernelError> {
        for (address, name) in self.claims(None)? {
            let what = format!("announce {address} on {name}");
            if let Some(device) = self.device_named(&what, &name)? {
                self.announce(&what, &device, address)?;
            }
        }
        Ok(())
    }

    /// Returns the interface, if the address can be added to it.
    fn is_possible(&mut self, one: &Asked<'_>) -> Result<Device, KernelError> {
        let Some(device) = self.device_named(one.op, one.name)? else {
            return Err(KernelError::refused(one.op, errno::ENODEV).with_remedy(NO_DEVICE));
        };
        if !device.up {
            return Err(KernelError::refused(one.op, errno::ENETDOWN).with_remedy(DOWN));
        }
        if device.mac.is_some() {
            self.announcer().check(one.op)?;
        }
        let others =
            |(_, net, claimed): &&(u32, ipnet::IpNet, bool)| net.addr() == one.address && !claimed;
        if let Some((index, ..)) = self.addresses_of_host()?.iter().find(others) {
            let at = self.device_at(*index)?.map_or_else(|| index.to_string(), |found| found.name);
            let words = format!("another program has added the address to {at}");
            return Err(KernelError::refused(one.op, errno::EEXIST)
                .with_words(Some(words))
                .with_remedy(ADDED));
        }
        Ok(device)
    }

    /// Asks the network for the addresses; returns for each the MAC address of the host that has it.
    fn holders(
        &mut self,
        asked: &[(Asked<'_>, Device)],
    ) -> Vec<Result<Option<MacAddr>, KernelError>> {
        let mut found: Vec<_> = asked.iter().map(|_| Ok(None)).collect();
        let mut own = None;
        for _ in 0..ROUNDS {
            for ((one, device), found) in asked.iter().zip(&mut found) {
                if let Ok(None) = found {
                    if let Err(error) = self.ask_for(one, device) {
                        *found = Err(error);
                    }
                }
            }
            let until = Instant::now() + Claim::PROBE_TIME / ROUNDS;
            while found.iter().any(|found| matches!(found, Ok(None))) && Instant::now() < until {
                thread::sleep(POLL);
                for ((one, device), found) in asked.iter().zip(&mut found) {
                    if !matches!(found, Ok(None)) {
                        continue;
                    }
                    *found = self.neighbour(one, device).and_then(|mac| {
                        let Some(mac) = mac else { return Ok(None) };
                        // This host replies by one interface for an address of another.
                        let macs = match &mut own {
                            Some(macs) => macs,
                            none => none.insert(self.macs()?),
                        };
                        Ok(Some(mac).filter(|mac| !macs.contains(mac)))
                    });
                }
            }
        }
        for (one, device) in asked {
            let _gone = self.forget(one, device);
        }
        found
    }

    /// Has the kernel ask for an address, whatever it knew before.
    fn ask_for(&mut self, one: &Asked<'_>, device: &Device) -> Result<(), KernelError> {
        // What the kernel knows may be the gateway that has released the address.
        let _unknown = self.forget(one, device);
        let mut request = message(device.index, one.address);
        request.header.flags = NeighbourFlags::Use;
        self.request(one.op, RouteNetlinkMessage::NewNeighbour(request), NLM_F_CREATE)
    }

    fn forget(&mut self, one: &Asked<'_>, device: &Device) -> Result<(), KernelError> {
        let request = message(device.index, one.address);
        self.request(one.op, RouteNetlinkMessage::DelNeighbour(request), 0)
    }

    /// MAC address of a host that has replied for the address.
    fn neighbour(
        &mut self,
        one: &Asked<'_>,
        device: &Device,
    ) -> Result<Option<MacAddr>, KernelError> {
        let mut request = NeighbourMessage::default();
        request.header.family = kernel_family(Family::of(one.address));
        request.attributes = vec![NeighbourAttribute::IfIndex(device.index)];
        let request = RouteNetlinkMessage::GetNeighbour(request);
        let found = self.dump(one.op, &request, |message| match message {
            RouteNetlinkMessage::NewNeighbour(found)
                if found.header.ifindex == device.index
                    && destination(&found.attributes) == Some(one.address)
                    && found.header.state != NeighbourState::Noarp =>
            {
                lladdr(&found.attributes)
            }
            _ => None,
        })?;
        Ok(found.into_iter().next())
    }

    /// MAC addresses of all interfaces of this host.
    fn macs(&mut self) -> Result<BTreeSet<MacAddr>, KernelError> {
        let request = RouteNetlinkMessage::GetLink(LinkMessage::default());
        let found = self.dump(&"ip link show", &request, |message| match message {
            RouteNetlinkMessage::NewLink(link) => Device::parse(link).mac,
            _ => None,
        })?;
        Ok(found.into_iter().collect())
    }

    /// Adds an address and announces it.
    fn take(&mut self, one: &Asked<'_>, device: &Device) -> Result<(), KernelError> {
        let request = address::claim(device.index, one.address);
        let added = self.request(one.op, request.message, request.flags);
        added.map_err(|error| address::not_added(one.address.into(), error))?;
        let ours = (device.index, one.address.into(), true);
        if !self.addresses_of_host()?.contains(&ours) {
            let request = address::delete(device.index, one.address.into());
            self.request(one.op, request.message, request.flags)?;
            return Err(KernelError::answer(one.op, NO_PROTOCOL));
        }
        self.announce(one.op, device, one.address)
    }

    /// Announces an address; an interface without MAC address has no neighbours to tell.
    fn announce(
        &self,
        what: &dyn Display,
        device: &Device,
        address: IpAddr,
    ) -> Result<(), KernelError> {
        match device.mac {
            Some(mac) => self.announcer().announce(what, device.index, mac, address),
            None => Ok(()),
        }
    }
}
