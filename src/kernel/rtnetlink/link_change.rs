//! The tunnel device, made, changed and deleted.

use std::fmt::Display;
use std::net::IpAddr;

use netlink_packet_core::{DefaultNla, Emitable, NLA_F_NESTED, NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    AfSpecInet, AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoData, InfoKind, InfoVxlan,
    LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};

use super::link::{Device, Tunnel};
use super::socket::{EAFNOSUPPORT, RouteSocket};
use crate::error::{KernelError, errno};
use crate::state::{LINK_ALIAS, LINK_GROUP, Vxlan};
use crate::types::DeviceName;

// Of `linux/if_link.h` and `linux/ip.h`.
const IFLA_INET_CONF: u16 = 1;
const IPV4_DEVCONF_RP_FILTER: u16 = 8;
const IPV4_DEVCONF_PROMOTE_SECONDARIES: u16 = 20;

const NAME_TAKEN: &str =
    "the name is taken by somebody else's device: remove that device or choose another name";
const VNI_TAKEN: &str =
    "another VXLAN device has this VNI and port: remove that device or choose others";
const NO_UNDERLAY: &str = "create the underlay device first or name another one";
const UNCHANGEABLE: &str =
    "VNI, port, address family and lack of an underlay stay: delete the device and add it again";

/// The request that creates the device, down and without its alias, which the kernel would ignore.
pub(crate) fn create(link: &Vxlan, underlay: u32) -> LinkMessage {
    let mut data = vec![InfoVxlan::Id(link.vni), local(link.local)];
    if underlay != 0 {
        data.push(InfoVxlan::Link(underlay));
    }
    data.extend([InfoVxlan::Learning(false), InfoVxlan::Port(link.port)]);
    let mut message = LinkMessage::default();
    message.attributes = vec![
        LinkAttribute::IfName(link.name.as_str().to_owned()),
        LinkAttribute::Address(link.mac.octets().to_vec()),
        LinkAttribute::Mtu(link.mtu),
        LinkAttribute::Group(LINK_GROUP),
        info(data),
    ];
    message
}

fn local(address: IpAddr) -> InfoVxlan {
    match address {
        IpAddr::V4(address) => InfoVxlan::Local(address),
        IpAddr::V6(address) => InfoVxlan::Local6(address),
    }
}

fn info(data: Vec<InfoVxlan>) -> LinkAttribute {
    LinkAttribute::LinkInfo(vec![
        LinkInfo::Kind(InfoKind::Vxlan),
        LinkInfo::Data(InfoData::Vxlan(data)),
    ])
}

/// The device's IPv4 settings.
///
/// Without `promote_secondaries` the kernel deletes all other addresses of a subnet together with
/// the oldest one, also the one that was to replace it.
fn ipv4(rp_filter: u32) -> LinkAttribute {
    let settings = [(IPV4_DEVCONF_RP_FILTER, rp_filter), (IPV4_DEVCONF_PROMOTE_SECONDARIES, 1)]
        .map(|(kind, value)| DefaultNla::new(kind, value.to_ne_bytes().to_vec()));
    let settings = settings.as_slice();
    let mut bytes = vec![0; settings.buffer_len()];
    settings.emit(&mut bytes);
    // Not `DevConfRequest`, which leaves out settings of value 0.
    let conf = AfSpecInet::Other(DefaultNla::new(IFLA_INET_CONF | NLA_F_NESTED, bytes));
    LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet(vec![conf])])
}

/// Says whose the device is.
fn named_ours() -> [LinkAttribute; 2] {
    [LinkAttribute::IfAlias(LINK_ALIAS.to_owned()), LinkAttribute::Group(LINK_GROUP)]
}

fn no_link_local() -> LinkAttribute {
    let mode = AfSpecInet6::AddrGenMode(In6AddrGenMode::None);
    LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![mode])])
}

fn change(index: u32, attributes: Vec<LinkAttribute>) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.attributes = attributes;
    message
}

fn raise(index: u32, up: bool) -> LinkMessage {
    let mut message = change(index, Vec::new());
    message.header.change_mask = LinkFlags::Up;
    if up {
        message.header.flags = LinkFlags::Up;
    }
    message
}

impl RouteSocket {
    /// Creates the device and finishes it, or leaves none behind.
    pub(crate) fn add_link(&mut self, what: &dyn Display, link: &Vxlan) -> Result<(), KernelError> {
        let underlay = self.underlay(what, link)?;
        let create = RouteNetlinkMessage::NewLink(create(link, underlay));
        match self.request(what, create, NLM_F_CREATE | NLM_F_EXCL) {
            Err(error) if error.is_exists() => match self.device_named(what, &link.name)? {
                None => return Err(error.with_remedy(VNI_TAKEN)),
                Some(device) if device.is_ours() => return Err(error),
                Some(_) => return Err(error.with_remedy(NAME_TAKEN)),
            },
            done => done?,
        }
        let device = self
            .device_named(what, &link.name)?
            .ok_or_else(|| KernelError::refused(what, errno::ENODEV))?;
        self.expect_new(link, device.index, underlay);
        let finished = self.finish_link(what, link, device.index);
        if finished.is_err() {
            // The first refusal says more than what becomes of this.
            let _ = self.delete_device(what, device.index);
        }
        finished
    }

    /// Has a watch expect what [`finish_link`](Self::finish_link) does, from the beginning.
    fn expect_new(&mut self, link: &Vxlan, index: u32, underlay: u32) {
        let (vni, port, local) = (link.vni, link.port, Some(link.local));
        let tunnel = Tunnel { vni, port, local, underlay, ..Tunnel::default() };
        let mut device = Device {
            index,
            name: link.name.as_str().to_owned(),
            mac: Some(link.mac),
            mtu: link.mtu,
            group: LINK_GROUP,
            tunnel: Some(tunnel),
            ..Device::default()
        };
        let mut expected = self.expected();
        expected.found(index);
        expected.will_be(&device);
        device.alias = Some(LINK_ALIAS.to_owned());
        device.rp_filter = link.rp_filter;
        expected.will_be(&device);
        device.up = link.up;
        expected.will_be(&device);
    }

    fn finish_link(
        &mut self,
        what: &dyn Display,
        link: &Vxlan,
        index: u32,
    ) -> Result<(), KernelError> {
        let [alias, group] = named_ours();
        self.set_device(what, change(index, vec![alias, group, ipv4(link.rp_filter)]))?;
        self.stop_link_local(what, index)?;
        if link.up {
            self.set_device(what, raise(index, true))?;
        }
        Ok(())
    }

    /// Changes what differs.
    ///
    /// A new Ethernet address makes the kernel forget the neighbours, permanent ones too; going
    /// down makes it forget neighbours and routes.
    pub(crate) fn set_link(&mut self, what: &dyn Display, link: &Vxlan) -> Result<(), KernelError> {
        let device = self.our_device(what, &link.name)?;
        let index = device.index;
        let mut tunnel = device.tunnel.unwrap_or_default();
        let mut next = device.clone();
        if (tunnel.vni, tunnel.port) != (link.vni, link.port) {
            return Err(KernelError::refused(what, errno::EOPNOTSUPP).with_remedy(UNCHANGEABLE));
        }
        let underlay = self.underlay(what, link)?;
        // The kernel says yes to an underlay of 0 and keeps the old one.
        if underlay == 0 && tunnel.underlay != 0 {
            return Err(KernelError::refused(what, errno::EOPNOTSUPP).with_remedy(UNCHANGEABLE));
        }
        let mut data = Vec::new();
        if tunnel.local != Some(link.local) {
            data.push(local(link.local));
        }
        if tunnel.underlay != underlay {
            data.push(InfoVxlan::Link(underlay));
        }
        if tunnel.learning {
            data.push(InfoVxlan::Learning(false));
        }
        if tunnel.ttl != 0 {
            data.push(InfoVxlan::Ttl(0));
        }
        if !data.is_empty() {
            (tunnel.local, tunnel.underlay) = (Some(link.local), underlay);
            (tunnel.learning, tunnel.ttl) = (false, 0);
            next.tunnel = Some(tunnel);
            self.expected().will_be(&next);
            let message = RouteNetlinkMessage::NewLink(change(index, vec![info(data)]));
            self.request(what, message, 0).map_err(|error| {
                if error.errno() == Some(errno::EOPNOTSUPP) {
                    error.with_remedy(UNCHANGEABLE)
                } else {
                    error
                }
            })?;
        }
        let mut attributes = Vec::new();
        if device.mac != Some(link.mac) {
            next.mac = Some(link.mac);
            self.expected().will_be(&next);
            attributes.push(LinkAttribute::Address(link.mac.octets().to_vec()));
        }
        if device.mtu != link.mtu {
            next.mtu = link.mtu;
            self.expected().will_be(&next);
            attributes.push(LinkAttribute::Mtu(link.mtu));
        }
        if device.master != 0 {
            next.master = 0;
            self.expected().will_be(&next);
            attributes.push(LinkAttribute::Controller(0));
        }
        // One whose maker died lacks more than its name.
        let unnamed = device.alias.as_deref() != Some(LINK_ALIAS) || device.group != LINK_GROUP;
        if unnamed {
            (next.alias, next.group) = (Some(LINK_ALIAS.to_owned()), LINK_GROUP);
            attributes.extend(named_ours());
        }
        if device.rp_filter != link.rp_filter || unnamed {
            next.rp_filter = link.rp_filter;
            self.expected().will_be(&next);
            attributes.push(ipv4(link.rp_filter));
        }
        if !attributes.is_empty() {
            self.set_device(what, change(index, attributes))?;
        }
        if device.up != link.up {
            next.up = link.up;
            self.expected().will_be(&next);
            if link.up {
                self.stop_link_local(what, index)?;
            }
            self.set_device(what, raise(index, link.up))?;
        }
        Ok(())
    }

    /// Deletes the device if it is ours.
    pub(crate) fn delete_link(
        &mut self,
        what: &dyn Display,
        name: &DeviceName,
    ) -> Result<(), KernelError> {
        let device = self.our_device(what, name)?;
        self.delete_device(what, device.index)
    }

    fn delete_device(&mut self, what: &dyn Display, index: u32) -> Result<(), KernelError> {
        self.expected().will_go(index);
        let message = RouteNetlinkMessage::DelLink(change(index, Vec::new()));
        self.request(what, message, 0)
    }

    fn set_device(&mut self, what: &dyn Display, message: LinkMessage) -> Result<(), KernelError> {
        self.request(what, RouteNetlinkMessage::SetLink(message), 0)
    }

    /// Keeps the kernel from giving the device an IPv6 address of its own, where it has IPv6.
    fn stop_link_local(&mut self, what: &dyn Display, index: u32) -> Result<(), KernelError> {
        match self.set_device(what, change(index, vec![no_link_local()])) {
            Err(error) if error.errno() == Some(EAFNOSUPPORT) => Ok(()),
            done => done,
        }
    }

    fn underlay(&mut self, what: &dyn Display, link: &Vxlan) -> Result<u32, KernelError> {
        let Some(name) = &link.underlay else {
            return Ok(0);
        };
        match self.device_named(what, name)? {
            Some(device) => Ok(device.index),
            None => Err(KernelError::refused(what, errno::ENODEV).with_remedy(NO_UNDERLAY)),
        }
    }
}
