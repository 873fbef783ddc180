//! Routes in the gateways' routing tables.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use netlink_packet_core::{Emitable, NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::address::kernel_family;
use super::socket::{Request, RouteSocket, unless_absent};
use crate::error::KernelError;
use crate::state::{PROTOCOL, Route, RouteKey, StrayKind, StrayRouting};
use crate::types::{Family, TableId};

/// Message for a route; `oif` is the index of the interface of a route via a gateway.
pub(crate) fn message(key: &RouteKey, route: Route, oif: u32) -> RouteMessage {
    let mut message = RouteMessage::default();
    let header = &mut message.header;
    header.address_family = kernel_family(Family::of_net(&key.dst));
    header.destination_prefix_length = key.dst.prefix_len();
    header.protocol = RouteProtocol::from(PROTOCOL);
    header.scope = RouteScope::Universe;
    // The header's byte is too small for most table numbers; the attribute takes precedence.
    header.table = u8::try_from(key.table.get()).unwrap_or_default();
    header.kind = match route {
        Route::Via(_) => RouteType::Unicast,
        Route::Throw => RouteType::Throw,
        Route::Unreachable => RouteType::Unreachable,
    };
    if key.dst.prefix_len() != 0 {
        let dst = RouteAttribute::Destination(key.dst.addr().into());
        message.attributes.push(dst);
    }
    message.attributes.push(RouteAttribute::Table(key.table.get()));
    if key.metric != 0 {
        message.attributes.push(RouteAttribute::Priority(key.metric));
    }
    if let Route::Via(gateway) = route {
        message.header.flags = RouteFlags::Onlink;
        message
            .attributes
            .extend([RouteAttribute::Gateway(gateway.into()), RouteAttribute::Oif(oif)]);
    }
    message
}

/// Parses a route of this crate; `None` for a route that it never writes.
///
/// `oif` is the index of our device: a route with another outgoing interface is none of this
/// crate's.
pub(crate) fn parse(message: &RouteMessage, oif: Option<u32>) -> Option<(RouteKey, Route)> {
    let header = &message.header;
    if header.protocol != RouteProtocol::from(PROTOCOL)
        || header.source_prefix_length != 0
        || header.tos != 0
    {
        return None;
    }
    let family = family(header.address_family)?;
    let mut table = u32::from(header.table);
    let mut metric = 0;
    let mut dst = match family {
        Family::V4 => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        Family::V6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    let mut gateway = None;
    let mut device = None;
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(id) => table = *id,
            RouteAttribute::Priority(priority) => metric = *priority,
            RouteAttribute::Destination(address) => dst = ip(address)?,
            RouteAttribute::Gateway(address) => gateway = Some(ip(address)?),
            RouteAttribute::Oif(index) => device = Some(*index),
            RouteAttribute::MultiPath(_)
            | RouteAttribute::Via(_)
            | RouteAttribute::NhId(_)
            | RouteAttribute::Encap(_)
            | RouteAttribute::PrefSource(_) => return None,
            // Attributes that the kernel adds by itself, such as preference and expiry.
            _ => {}
        }
    }
    let key = RouteKey {
        table: TableId::new(table)?,
        dst: IpNet::new(dst, header.destination_prefix_length).ok()?,
        metric,
    };
    let route = match (header.kind, gateway) {
        (RouteType::Unicast, Some(gateway)) if device.is_some() && device == oif => {
            Route::Via(gateway)
        }
        // IPv6 reports the loopback interface for these.
        (RouteType::Throw, None) => Route::Throw,
        (RouteType::Unreachable, None) => Route::Unreachable,
        _ => return None,
    };
    Some((key, route))
}

/// Parses a route with our protocol number that this crate never writes.
///
/// `None` for a route in one of the kernel's own tables.
pub(crate) fn stray(message: &RouteMessage) -> Option<StrayRouting> {
    let header = &message.header;
    let ours = header.protocol == RouteProtocol::from(PROTOCOL);
    // A cached clone of a route, which the kernel drops by itself.
    let cached = header.flags.contains(RouteFlags::Cloned);
    TableId::new(table(message)).filter(|_| ours && !cached)?;
    let family = family(header.address_family)?;
    let mut message = message.clone();
    message.header.flags = RouteFlags::empty();
    // The attributes that identify the route, without the kernel's counters.
    message.attributes.retain(|attribute| {
        matches!(
            attribute,
            RouteAttribute::Table(_)
                | RouteAttribute::Destination(_)
                | RouteAttribute::Source(_)
                | RouteAttribute::Priority(_)
                | RouteAttribute::PrefSource(_)
                | RouteAttribute::Gateway(_)
                | RouteAttribute::Via(_)
                | RouteAttribute::Oif(_)
                | RouteAttribute::MultiPath(_)
                | RouteAttribute::NhId(_)
                | RouteAttribute::EncapType(_)
                | RouteAttribute::Encap(_)
        )
    });
    let mut bytes = vec![0; message.buffer_len()];
    message.emit(&mut bytes);
    let text = text(&message, family);
    Some(StrayRouting { kind: StrayKind::Route, family, text, message: bytes })
}

/// Text of a route of any owner, in the form of `ip route`.
pub(crate) fn text(message: &RouteMessage, family: Family) -> String {
    let length = message.header.destination_prefix_length;
    let (mut dst, mut via, mut metric) = (family.unspecified(), String::new(), String::new());
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(address) => dst = ip(address).unwrap_or(dst),
            RouteAttribute::Gateway(address) => {
                via = ip(address).map(|gateway| format!(" via {gateway}")).unwrap_or_default();
            }
            RouteAttribute::Priority(number) => metric = format!(" metric {number}"),
            _ => {}
        }
    }
    let (table, protocol) = (table(message), u8::from(message.header.protocol));
    format!("{dst}/{length}{via} table {table}{metric} proto {protocol}")
}

fn family(family: AddressFamily) -> Option<Family> {
    match family {
        AddressFamily::Inet => Some(Family::V4),
        AddressFamily::Inet6 => Some(Family::V6),
        _ => None,
    }
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some((*address).into()),
        RouteAddress::Inet6(address) => Some((*address).into()),
        _ => None,
    }
}

/// Routing table of a route.
pub(crate) fn table(message: &RouteMessage) -> u32 {
    message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::Table(id) => Some(*id),
            _ => None,
        })
        .unwrap_or(u32::from(message.header.table))
}

/// Request that adds a route or replaces the one with the same key.
pub(crate) fn put(key: &RouteKey, route: Route, oif: u32) -> Request {
    let message = RouteNetlinkMessage::NewRoute(message(key, route, oif));
    Request { message, flags: NLM_F_CREATE | NLM_F_REPLACE }
}

/// Request that deletes a route by all attributes that the kernel compares.
///
/// A metric of 0 matches any metric in IPv4, but the kernel deletes the route with the lowest one
/// first, and it also compares the route type.
pub(crate) fn delete(key: &RouteKey, route: Route, oif: u32) -> Request {
    let mut message = message(key, route, oif);
    message.header.scope = RouteScope::NoWhere;
    Request { message: RouteNetlinkMessage::DelRoute(message), flags: 0 }
}

impl RouteSocket {
    /// Routes outside the kernel's own tables with our protocol number.
    ///
    /// The second set has those that this crate never writes.
    pub(crate) fn routes(
        &mut self,
        oif: Option<u32>,
    ) -> Result<(BTreeMap<RouteKey, Route>, BTreeSet<StrayRouting>), KernelError> {
        let (mut found, mut strays) = (BTreeMap::new(), BTreeSet::new());
        for family in Family::BOTH {
            let what = format!("ip route show table all proto {PROTOCOL}");
            let mut request = RouteMessage::default();
            request.header.protocol = RouteProtocol::from(PROTOCOL);
            let routes = self.dump_routes(&what, request, family, |message| {
                let stray = stray(message);
                let ours = parse(message, oif);
                (stray.is_some() || ours.is_some()).then_some((ours, stray))
            })?;
            for (ours, stray) in routes {
                match ours.map(|(key, route)| (found.entry(key), route)) {
                    Some((Entry::Vacant(entry), route)) => drop(entry.insert(route)),
                    // Of several routes with one key the kernel uses the first.
                    Some((Entry::Occupied(_), _)) | None => strays.extend(stray),
                }
            }
        }
        Ok((found, strays))
    }

    /// Routing tables of either family that have a route, of any owner.
    pub(crate) fn tables_of_routes(&mut self) -> Result<Vec<u32>, KernelError> {
        let mut found = Vec::new();
        for family in Family::BOTH {
            let what = "ip route show table all";
            let request = RouteMessage::default();
            found.extend(self.dump_routes(&what, request, family, |route| Some(table(route)))?);
        }
        Ok(found)
    }

    pub(crate) fn dump_routes<T>(
        &mut self,
        what: &dyn Display,
        mut request: RouteMessage,
        family: Family,
        pick: impl Fn(&RouteMessage) -> Option<T>,
    ) -> Result<Vec<T>, KernelError> {
        request.header.address_family = kernel_family(family);
        let request = RouteNetlinkMessage::GetRoute(request);
        let found = self.dump(what, &request, |message| match message {
            // A kernel without IPv6 replies with the routes of all the families that it has.
            RouteNetlinkMessage::NewRoute(route)
                if route.header.address_family == kernel_family(family) =>
            {
                pick(&route)
            }
            _ => None,
        });
        unless_absent(family, found)
    }
}
