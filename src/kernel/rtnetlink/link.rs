//! VXLAN device: read, create, change and delete.

use std::fmt::Display;
use std::net::{IpAddr, Ipv4Addr};

use netlink_packet_core::{DefaultNla, Emitable, NLA_F_NESTED, NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    AfSpecInet, AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoData, InfoKind, InfoVxlan,
    LinkAttribute, LinkExtentMask, LinkFlags, LinkInfo, LinkMessage,
};

use super::ipv6;
use super::socket::RouteSocket;
use crate::error::{KernelError, errno};
use crate::state::{LINK_ALIAS, LINK_GROUP, Rule, Vxlan};
use crate::types::{DeviceName, MacAddr};

// From `linux/if_link.h` and `linux/ip.h`.
const IFLA_INET_CONF: u16 = 1;
const IPV4_DEVCONF_FORWARDING: u16 = 1;
const IPV4_DEVCONF_RP_FILTER: u16 = 8;
const IPV4_DEVCONF_PROMOTE_SECONDARIES: u16 = 20;
const IPV4_DEVCONF_SRC_VMARK: u16 = 24;

const NAME_TAKEN: &str =
    "a device of another program has this name: remove that device or choose another name";
const VNI_TAKEN: &str =
    "another VXLAN device has this VNI and port: remove that device or choose others";
const NO_UNDERLAY: &str = "create the underlay device first or name another one";
const UNCHANGEABLE: &str =
    "VNI, port, address family and lack of an underlay stay: delete the device and add it again";
const NOT_OURS: &str = "no tunnel device of ours has this name; read the state again";

/// Network interface, with the attributes that this crate uses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Device {
    pub(crate) index: u32,
    pub(crate) name: String,
    pub(crate) alias: Option<String>,
    pub(crate) group: u32,
    /// Index of the controller, such as a bridge, that receives incoming frames; 0 for none.
    pub(crate) master: u32,
    pub(crate) mac: Option<MacAddr>,
    pub(crate) mtu: u32,
    pub(crate) rp_filter: u32,
    /// Whether packets that arrive on the device are forwarded, by IPv4.
    pub(crate) forwarding: bool,
    /// Lookup of the reverse path of a packet with its mark, by IPv4.
    pub(crate) src_valid_mark: bool,
    /// Whether IPv6 is enabled on the device; `None` if the network stack has no IPv6.
    pub(crate) ipv6: Option<bool>,
    pub(crate) up: bool,
    /// VXLAN attributes; `None` if the interface is no VXLAN device.
    pub(crate) tunnel: Option<Tunnel>,
}

/// Attributes of a VXLAN device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tunnel {
    pub(crate) vni: u32,
    pub(crate) port: u16,
    pub(crate) local: Option<IpAddr>,
    /// Interface index of the underlay; 0 for none.
    pub(crate) underlay: u32,
    /// Whether the device learns FDB entries from incoming frames.
    pub(crate) learning: bool,
    /// TTL of the outer packets; 0 for the host's default.
    pub(crate) ttl: u8,
}

impl Device {
    pub(crate) fn parse(message: LinkMessage) -> Self {
        let mut device = Self {
            index: message.header.index,
            up: message.header.flags.contains(LinkFlags::Up),
            ..Self::default()
        };
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => device.name = name,
                LinkAttribute::IfAlias(alias) => device.alias = Some(alias),
                LinkAttribute::Group(group) => device.group = group,
                LinkAttribute::Controller(index) => device.master = index,
                LinkAttribute::Address(bytes) => device.mac = mac(&bytes),
                LinkAttribute::Mtu(mtu) => device.mtu = mtu,
                LinkAttribute::LinkInfo(infos) => device.tunnel = tunnel(&infos),
                LinkAttribute::AfSpecUnspec(families) => device.read_families(&families),
                _ => {}
            }
        }
        device
    }

    fn read_families(&mut self, families: &[AfSpecUnspec]) {
        for family in families {
            match family {
                AfSpecUnspec::Inet(attributes) => {
                    for attribute in attributes {
                        if let AfSpecInet::DevConf(conf) = attribute {
                            self.rp_filter = u32::try_from(conf.rp_filter).unwrap_or_default();
                            self.forwarding = conf.forwarding != 0;
                            self.src_valid_mark = conf.src_vmark != 0;
                        }
                    }
                }
                AfSpecUnspec::Inet6(attributes) => {
                    let disabled = attributes.iter().any(|attribute| match attribute {
                        AfSpecInet6::DevConf(conf) => conf.disable_ipv6 != 0,
                        _ => false,
                    });
                    self.ipv6 = Some(!disabled);
                }
                _ => {}
            }
        }
    }

    pub(crate) fn is_ours(&self) -> bool {
        let named = self.alias.as_deref() == Some(LINK_ALIAS);
        self.tunnel.is_some() && (named || self.group == LINK_GROUP)
    }

    /// Whether the settings that are the same for every VXLAN device of this crate are unchanged.
    pub(crate) fn is_intact(&self) -> bool {
        let plain = self.tunnel.is_some_and(|tunnel| !tunnel.learning && tunnel.ttl == 0);
        let named = self.alias.as_deref() == Some(LINK_ALIAS) && self.group == LINK_GROUP;
        plain && named && self.master == 0 && self.forwarding && self.src_valid_mark
    }
}

/// MAC address; `None` if the number of bytes is wrong.
pub(crate) fn mac(bytes: &[u8]) -> Option<MacAddr> {
    <[u8; 6]>::try_from(bytes).ok().map(MacAddr::new)
}

fn tunnel(infos: &[LinkInfo]) -> Option<Tunnel> {
    if !infos.contains(&LinkInfo::Kind(InfoKind::Vxlan)) {
        return None;
    }
    let mut tunnel = Tunnel::default();
    for info in infos {
        let LinkInfo::Data(InfoData::Vxlan(data)) = info else {
            continue;
        };
        for datum in data {
            match datum {
                InfoVxlan::Id(vni) => tunnel.vni = *vni,
                InfoVxlan::Port(port) => tunnel.port = *port,
                InfoVxlan::Local(local) => tunnel.local = Some((*local).into()),
                InfoVxlan::Local6(local) => tunnel.local = Some((*local).into()),
                InfoVxlan::Link(index) => tunnel.underlay = *index,
                InfoVxlan::Learning(learning) => tunnel.learning = *learning,
                InfoVxlan::Ttl(ttl) => tunnel.ttl = *ttl,
                _ => {}
            }
        }
    }
    Some(tunnel)
}

pub(crate) fn without_statistics() -> LinkAttribute {
    LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats])
}

/// Request that creates the device, down and without alias, which the kernel would ignore.
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

/// IPv4 settings of the device.
///
/// A new device takes its `forwarding` from the host's default, which may be off while the host
/// forwards: the kernel asks the device by which a packet arrives. Without `promote_secondaries` the
/// kernel deletes all other addresses of a subnet together with the oldest one, also the one that
/// was to replace it. With `src_valid_mark` the reverse path to the sender of a packet from the tunnel
/// is found by the mark that the rules have given to the packet.
fn ipv4(rp_filter: u32) -> LinkAttribute {
    let settings = [
        (IPV4_DEVCONF_FORWARDING, 1),
        (IPV4_DEVCONF_RP_FILTER, rp_filter),
        (IPV4_DEVCONF_PROMOTE_SECONDARIES, 1),
        (IPV4_DEVCONF_SRC_VMARK, 1),
    ]
    .map(|(kind, value)| DefaultNla::new(kind, value.to_ne_bytes().to_vec()));
    let settings = settings.as_slice();
    let mut bytes = vec![0; settings.buffer_len()];
    settings.emit(&mut bytes);
    // Not `DevConfRequest`, which leaves out settings of value 0.
    let conf = AfSpecInet::Other(DefaultNla::new(IFLA_INET_CONF | NLA_F_NESTED, bytes));
    LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet(vec![conf])])
}

/// Alias and group that identify the device as this crate's.
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
    /// VXLAN device of this crate, whatever its name; the oldest if there are several.
    pub(crate) fn link(&mut self) -> Result<Option<(Device, Vxlan)>, KernelError> {
        let what = "ip -d link show type vxlan";
        let mut message = LinkMessage::default();
        message.attributes = vec![
            without_statistics(),
            LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Vxlan)]),
        ];
        let message = RouteNetlinkMessage::GetLink(message);
        let devices = self.dump(&what, &message, |message| match message {
            RouteNetlinkMessage::NewLink(link) => Some(Device::parse(link)).filter(Device::is_ours),
            _ => None,
        })?;
        let Some(device) = devices.into_iter().min_by_key(|device| device.index) else {
            return Ok(None);
        };
        self.found(device.index);
        let (tunnel, intact) = (device.tunnel.unwrap_or_default(), device.is_intact());
        let name = DeviceName::new(&device.name)
            .map_err(|_| KernelError::answer(what, "our device has an impossible name"))?;
        let link = Vxlan {
            name,
            vni: tunnel.vni,
            port: tunnel.port,
            local: tunnel.local.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED)),
            underlay: self.name_of(tunnel.underlay)?,
            mac: device.mac.unwrap_or(MacAddr::new([0; 6])),
            mtu: device.mtu,
            rp_filter: device.rp_filter,
            up: device.up,
            intact,
        };
        Ok(Some((device, link)))
    }

    /// Whether our device cannot have IPv6 addresses, now or when it is created.
    pub(crate) fn lacks_ipv6(&mut self, device: Option<&Device>) -> Result<bool, KernelError> {
        let known = device.and_then(|device| device.ipv6.zip(Some(device)));
        let (name, enabled) = if let Some((enabled, device)) = known {
            (device.name.as_str(), enabled)
        } else {
            // A network stack without IPv6 has none on the loopback interface, either; a device may
            // have none because of its MTU.
            let loopback = DeviceName::known(Rule::LOOPBACK);
            let found = self.device_named(&"ip link show lo", &loopback)?;
            if found.is_some_and(|found| found.ipv6.is_none()) {
                return Ok(true);
            }
            (ipv6::DEFAULT, self.settings().is_default())
        };
        Ok(!enabled && !self.settings().can_enable(name))
    }

    /// Interface with this name, of any owner.
    pub(crate) fn device_named(
        &mut self,
        what: &dyn Display,
        name: &DeviceName,
    ) -> Result<Option<Device>, KernelError> {
        let mut message = LinkMessage::default();
        message.attributes =
            vec![LinkAttribute::IfName(name.as_str().to_owned()), without_statistics()];
        self.device(what, message)
    }

    /// VXLAN device of this crate with this name.
    ///
    /// The index is looked up for every operation: it changes when the device is recreated.
    pub(crate) fn our_device(
        &mut self,
        what: &dyn Display,
        name: &DeviceName,
    ) -> Result<Device, KernelError> {
        let device = self
            .device_named(what, name)?
            .filter(Device::is_ours)
            .ok_or_else(|| KernelError::refused(what, errno::ENODEV).with_remedy(NOT_OURS))?;
        self.found(device.index);
        Ok(device)
    }

    /// Interface with this index, of any owner.
    pub(crate) fn device_at(&mut self, index: u32) -> Result<Option<Device>, KernelError> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.attributes = vec![without_statistics()];
        self.device(&format_args!("ip link show up to index {index}"), message)
    }

    fn device(
        &mut self,
        what: &dyn Display,
        message: LinkMessage,
    ) -> Result<Option<Device>, KernelError> {
        match self.get(what, RouteNetlinkMessage::GetLink(message)) {
            Ok(RouteNetlinkMessage::NewLink(link)) => Ok(Some(Device::parse(link))),
            Ok(_) => Err(KernelError::answer(what, "the answer was not a device")),
            Err(error) if error.errno() == Some(errno::ENODEV) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Name of the interface with this index; `None` for 0 and for a deleted interface.
    fn name_of(&mut self, index: u32) -> Result<Option<DeviceName>, KernelError> {
        if index == 0 {
            return Ok(None);
        }
        let device = self.device_at(index)?;
        Ok(device.and_then(|device| DeviceName::new(device.name).ok()))
    }

    /// Enables IPv6 on our device if it is disabled there.
    pub(super) fn enable_ipv6(
        &mut self,
        what: &dyn Display,
        name: &DeviceName,
    ) -> Result<(), KernelError> {
        match self.our_device(what, name)?.ipv6 {
            Some(false) => self.settings().enable(what, name.as_str()),
            _ => Ok(()),
        }
    }

    /// Creates and configures the device; deletes it again if it cannot be configured.
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
        self.found(device.index);
        let finished = self.finish_link(what, link, device.index);
        if finished.is_err() {
            // The first error is reported; the error of the deletion would say less.
            let _ = self.delete_device(what, device.index);
        }
        finished
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

    /// Changes the attributes of the device that differ.
    ///
    /// A new MAC address makes the kernel delete the neighbours, permanent ones too; setting the
    /// device down makes it delete neighbours and routes.
    pub(crate) fn set_link(&mut self, what: &dyn Display, link: &Vxlan) -> Result<(), KernelError> {
        let device = self.our_device(what, &link.name)?;
        let index = device.index;
        let tunnel = device.tunnel.unwrap_or_default();
        if (tunnel.vni, tunnel.port) != (link.vni, link.port) {
            return Err(KernelError::refused(what, errno::EOPNOTSUPP).with_remedy(UNCHANGEABLE));
        }
        let underlay = self.underlay(what, link)?;
        // The kernel accepts an underlay of 0 and keeps the old one.
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
            attributes.push(LinkAttribute::Address(link.mac.octets().to_vec()));
        }
        if device.mtu != link.mtu {
            attributes.push(LinkAttribute::Mtu(link.mtu));
        }
        if device.master != 0 {
            attributes.push(LinkAttribute::Controller(0));
        }
        // A device whose creator died before it set the alias lacks the other settings, too.
        let unnamed = device.alias.as_deref() != Some(LINK_ALIAS) || device.group != LINK_GROUP;
        if unnamed {
            attributes.extend(named_ours());
        }
        if device.rp_filter != link.rp_filter || !device.forwarding || unnamed {
            attributes.push(ipv4(link.rp_filter));
        }
        if !attributes.is_empty() {
            self.set_device(what, change(index, attributes))?;
        }
        if device.up != link.up {
            if link.up {
                self.stop_link_local(what, index)?;
            }
            self.set_device(what, raise(index, link.up))?;
        }
        Ok(())
    }

    /// Deletes the device if it is this crate's.
    pub(crate) fn delete_link(
        &mut self,
        what: &dyn Display,
        name: &DeviceName,
    ) -> Result<(), KernelError> {
        let device = self.our_device(what, name)?;
        self.delete_device(what, device.index)
    }

    fn delete_device(&mut self, what: &dyn Display, index: u32) -> Result<(), KernelError> {
        let message = RouteNetlinkMessage::DelLink(change(index, Vec::new()));
        self.request(what, message, 0)
    }

    fn set_device(&mut self, what: &dyn Display, message: LinkMessage) -> Result<(), KernelError> {
        self.request(what, RouteNetlinkMessage::SetLink(message), 0)
    }

    /// Prevents the kernel from adding a link-local IPv6 address to the device, if there is IPv6.
    fn stop_link_local(&mut self, what: &dyn Display, index: u32) -> Result<(), KernelError> {
        match self.set_device(what, change(index, vec![no_link_local()])) {
            Err(error) if error.errno() == Some(errno::EAFNOSUPPORT) => Ok(()),
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
