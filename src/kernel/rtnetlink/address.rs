//! Addresses of interfaces.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::net::IpAddr;

use ipnet::IpNet;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressProtocol,
    AddressScope, CacheInfo,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::socket::{Request, RouteSocket, unless_absent};
use crate::error::{KernelError, errno};
use crate::state::PROTOCOL;
use crate::types::{DeviceName, Family};

/// Index in a request for the addresses of all interfaces.
pub(crate) const ALL: u32 = 0;

const NO_IPV6: &str = "set the sysctl net.ipv6.conf.<device>.disable_ipv6 to 0";

pub(crate) const fn kernel_family(family: Family) -> AddressFamily {
    match family {
        Family::V4 => AddressFamily::Inet,
        Family::V6 => AddressFamily::Inet6,
    }
}

/// Whether the kernel creates such addresses and neighbours by itself.
pub(crate) fn is_link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(_) => false,
        IpAddr::V6(address) => address.is_unicast_link_local(),
    }
}

pub(crate) fn message(index: u32, net: IpNet) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = kernel_family(Family::of_net(&net));
    message.header.prefix_len = net.prefix_len();
    message.header.index = index;
    message.attributes =
        vec![AddressAttribute::Local(net.addr()), AddressAttribute::Address(net.addr())];
    message
}

/// Interface index, and the address with its prefix length.
pub(crate) fn parse(message: &AddressMessage) -> Option<(u32, IpNet)> {
    let local = message.attributes.iter().find_map(|attribute| {
        if let AddressAttribute::Local(address) = attribute { Some(*address) } else { None }
    });
    // IPv6 has `IFA_LOCAL` only if the address has a peer, IPv4 always.
    let address = local.or_else(|| {
        message.attributes.iter().find_map(|attribute| {
            if let AddressAttribute::Address(address) = attribute { Some(*address) } else { None }
        })
    })?;
    let net = IpNet::new(address, message.header.prefix_len).ok()?;
    Some((message.header.index, net))
}

/// Request that adds an address to an interface.
pub(crate) fn add(index: u32, net: IpNet) -> Request {
    let mut message = message(index, net);
    if matches!(net, IpNet::V6(_)) {
        // No other host can have the address, and it would be unusable until duplicate address
        // detection ends.
        message.header.flags = AddressHeaderFlags::Nodad;
    }
    let message = RouteNetlinkMessage::NewAddress(message);
    Request { message, flags: NLM_F_CREATE | NLM_F_EXCL }
}

/// Adds the remedy to the error of an address that was not added.
pub(crate) fn not_added(net: IpNet, error: KernelError) -> KernelError {
    // EACCES means here that IPv6 is disabled, not that a privilege is missing.
    if error.errno() == Some(errno::EACCES) && matches!(net, IpNet::V6(_)) {
        error.with_remedy(NO_IPV6)
    } else {
        error
    }
}

/// Request that adds an egress IP to an interface of the host.
///
/// The node's own packets never get it as source: the kernel chooses no IPv4 address of scope `host`
/// for another host (`inet_select_addr`), and no deprecated IPv6 address while there is another.
pub(crate) fn claim(index: u32, address: IpAddr) -> Request {
    let mut message = message(index, IpNet::from(address));
    message.attributes.push(AddressAttribute::Protocol(AddressProtocol::Other(PROTOCOL)));
    if address.is_ipv4() {
        message.header.scope = AddressScope::Host;
    } else {
        // Duplicates were asked for, and detection would take another second.
        let flags = AddressFlags::Nodad | AddressFlags::Noprefixroute;
        let mut lifetime = CacheInfo::default();
        (lifetime.ifa_preferred, lifetime.ifa_valid) = (0, u32::MAX);
        message
            .attributes
            .extend([AddressAttribute::Flags(flags), AddressAttribute::CacheInfo(lifetime)]);
    }
    let message = RouteNetlinkMessage::NewAddress(message);
    Request { message, flags: NLM_F_CREATE | NLM_F_EXCL }
}

/// Returns whether the address has this crate's protocol number.
fn is_claim(message: &AddressMessage) -> bool {
    let own = AddressAttribute::Protocol(AddressProtocol::Other(PROTOCOL));
    message.attributes.contains(&own)
}

/// Request that deletes an address from an interface.
pub(crate) fn delete(index: u32, net: IpNet) -> Request {
    Request { message: RouteNetlinkMessage::DelAddress(message(index, net)), flags: 0 }
}

impl RouteSocket {
    /// Addresses of the interface with this index, without link-local addresses.
    pub(crate) fn addresses(&mut self, index: u32) -> Result<BTreeSet<IpNet>, KernelError> {
        let what = format!("ip addr show dev index {index}");
        let found = self.pick_addresses(&what, index, &Family::BOTH, parse)?.into_iter();
        let found = found.filter(|(at, net)| *at == index && !is_link_local(net.addr()));
        Ok(found.map(|(_, net)| net).collect())
    }

    /// Addresses of all interfaces of this node: index, prefix, and whether it is a claim.
    pub(crate) fn addresses_of_host(&mut self) -> Result<Vec<(u32, IpNet, bool)>, KernelError> {
        self.pick_addresses(&"ip addr show", ALL, &Family::BOTH, |message| {
            let (index, net) = parse(message)?;
            Some((index, net, is_claim(message)))
        })
    }

    /// Addresses of all interfaces of this node.
    pub(crate) fn local_addresses(&mut self) -> Result<BTreeSet<IpAddr>, KernelError> {
        Ok(self.addresses_of_host()?.into_iter().map(|(_, net, _)| net.addr()).collect())
    }

    /// Interface that has this address, and its MTU.
    pub(crate) fn device_of(
        &mut self,
        address: IpAddr,
    ) -> Result<Option<(DeviceName, u32)>, KernelError> {
        let what = format!("ip addr show to {address}");
        let nets = self.pick_addresses(&what, ALL, &[Family::of(address)], parse)?;
        let Some((index, _)) = nets.into_iter().find(|(_, net)| net.addr() == address) else {
            return Ok(None);
        };
        let device = self.device_at(index)?;
        Ok(device.and_then(|device| Some((DeviceName::new(device.name).ok()?, device.mtu))))
    }

    /// Addresses of an interface, or of [`ALL`] interfaces, as far as `pick` returns them.
    pub(crate) fn pick_addresses<T>(
        &mut self,
        what: &dyn Display,
        index: u32,
        families: &[Family],
        pick: impl Fn(&AddressMessage) -> Option<T>,
    ) -> Result<Vec<T>, KernelError> {
        let mut all = Vec::new();
        for family in families {
            let mut message = AddressMessage::default();
            message.header.family = kernel_family(*family);
            message.header.index = index;
            let message = RouteNetlinkMessage::GetAddress(message);
            let found = self.dump(what, &message, |message| match message {
                // A kernel without IPv6 replies with the addresses of all the families that it has.
                RouteNetlinkMessage::NewAddress(message)
                    if message.header.family == kernel_family(*family) =>
                {
                    pick(&message)
                }
                _ => None,
            });
            all.extend(unless_absent(*family, found)?);
        }
        Ok(all)
    }
}
