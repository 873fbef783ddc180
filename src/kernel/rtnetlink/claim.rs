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

use ipnet::IpNet;
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

/// Returns whether no host has replied yet.
const fn is_open(found: &Result<Option<MacAddr>, KernelError>) -> bool {
    matches!(found, Ok(None))
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
        let (mut refused, mut free) = (Vec::new(), Vec::new());
        let all = match self.addresses_of_host() {
            Ok(all) => all,
            Err(error) => return asked.iter().map(|one| (one.place, error.clone())).collect(),
        };
        let others: BTreeMap<_, _> = all
            .into_iter()
            .filter(|(.., claimed)| !claimed)
            .map(|(index, net, _)| (net.addr(), index))
            .collect();
        for one in asked {
            match self.is_possible(&one, others.get(&one.address).copied()) {
                Ok(device) => free.push((one, device)),
                Err(error) => refused.push((one.place, error)),
            }
        }
        let holders = self.holders(&free);
        let mut added = Vec::new();
        for ((one, device), holder) in free.into_iter().zip(holders) {
            let made = match holder {
                Ok(None) => self.add(&one, &device),
                Ok(Some(mac)) => {
                    Err(KernelError::refused(one.op, errno::EADDRINUSE).with_duplicate(mac))
                }
                Err(error) => Err(error),
            };
            match made {
                Ok(()) => added.push((one, device)),
                Err(error) => refused.push((one.place, error)),
            }
        }
        let found = self.addresses_of_host().map(BTreeSet::from_iter);
        for (one, device) in added {
            let claim = (device.index, IpNet::from(one.address), true);
            let made = match &found {
                Ok(found) if found.contains(&claim) => self.announce(one.op, &device, one.address),
                Ok(_) => self.take_back(&one, &device),
                Err(error) => Err(error.clone()),
            };
            refused.extend(made.err().map(|error| (one.place, error)));
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

    /// Returns the interface, if the address can be added to it; `other` is the interface to which
    /// another program has added the address.
    fn is_possible(&mut self, one: &Asked<'_>, other: Option<u32>) -> Result<Device, KernelError> {
        let Some(device) = self.device_named(one.op, one.name)? else {
            return Err(KernelError::refused(one.op, errno::ENODEV).with_remedy(NO_DEVICE));
        };
        if !device.up {
            return Err(KernelError::refused(one.op, errno::ENETDOWN).with_remedy(DOWN));
        }
        if device.mac.is_some() {
            self.announcer().check(one.op)?;
        }
        if let Some(index) = other {
            let at = self.device_at(index)?.map_or_else(|| index.to_string(), |found| found.name);
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
        // A permanent neighbour is another program's, and says who has the address.
        let known = self.macs().and_then(|own| Ok((own, self.replied(asked, true)?)));
        // This host replies by one interface for an address of another.
        let (own, permanent) = match known {
            Ok(known) => known,
            Err(error) => return asked.iter().map(|_| Err(error.clone())).collect(),
        };
        let of = |(one, device): &(Asked<'_>, Device)| {
            Ok(permanent.get(&(device.index, one.address)).copied())
        };
        let mut found: Vec<Result<_, _>> = asked.iter().map(of).collect();
        let open = asked.iter().zip(&found).filter(|(_, found)| is_open(found));
        let open: Vec<_> = open.map(|(one, _)| one).collect();
        for _ in 0..ROUNDS {
            for ((one, device), found) in asked.iter().zip(&mut found) {
                if is_open(found) {
                    *found = self.ask_for(one, device).map(|()| None);
                }
            }
            let until = Instant::now() + Claim::PROBE_TIME / ROUNDS;
            while found.iter().any(is_open) && Instant::now() < until {
                thread::sleep(POLL);
                let replied = self.replied(asked, false);
                for ((one, device), found) in asked.iter().zip(&mut found) {
                    if is_open(found) {
                        let mac = |all: &BTreeMap<_, _>| {
                            let mac = all.get(&(device.index, one.address)).copied();
                            mac.filter(|mac| !own.contains(mac))
                        };
                        *found = replied.as_ref().map(mac).map_err(KernelError::clone);
                    }
                }
            }
        }
        for (one, device) in open {
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

    /// MAC addresses of the hosts that have replied, or those of permanent neighbours, by interface
    /// and address.
    fn replied(
        &mut self,
        asked: &[(Asked<'_>, Device)],
        permanent: bool,
    ) -> Result<BTreeMap<(u32, IpAddr), MacAddr>, KernelError> {
        let tables = asked.iter().map(|(one, device)| (device.index, Family::of(one.address)));
        let tables: BTreeSet<_> = tables.collect();
        let mut all = BTreeMap::new();
        for (index, family) in tables {
            let mut request = NeighbourMessage::default();
            request.header.family = kernel_family(family);
            request.attributes = vec![NeighbourAttribute::IfIndex(index)];
            let request = RouteNetlinkMessage::GetNeighbour(request);
            all.extend(self.dump(&"ip neigh show", &request, |message| match message {
                RouteNetlinkMessage::NewNeighbour(found)
                    if found.header.ifindex == index
                        && found.header.state != NeighbourState::Noarp
                        && (found.header.state == NeighbourState::Permanent) == permanent =>
                {
                    let address = destination(&found.attributes)?;
                    Some(((index, address), lladdr(&found.attributes)?))
                }
                _ => None,
            })?);
        }
        Ok(all)
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

    fn add(&mut self, one: &Asked<'_>, device: &Device) -> Result<(), KernelError> {
        let request = address::claim(device.index, one.address);
        let added = self.request(one.op, request.message, request.flags);
        added.map_err(|error| address::not_added(one.address.into(), error))
    }

    /// Deletes an address that would not be found again.
    fn take_back(&mut self, one: &Asked<'_>, device: &Device) -> Result<(), KernelError> {
        let request = address::delete(device.index, one.address.into());
        self.request(one.op, request.message, request.flags)?;
        Err(KernelError::answer(one.op, NO_PROTOCOL))
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
