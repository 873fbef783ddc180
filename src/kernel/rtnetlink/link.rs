//! The tunnel device, read from the kernel.

use std::fmt::Display;
use std::net::{IpAddr, Ipv4Addr};

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    AfSpecInet, AfSpecUnspec, InfoData, InfoKind, InfoVxlan, LinkAttribute, LinkExtentMask,
    LinkFlags, LinkInfo, LinkMessage,
};

use super::socket::RouteSocket;
use crate::error::{KernelError, errno};
use crate::state::{LINK_ALIAS, LINK_GROUP, Vxlan};
use crate::types::{DeviceName, MacAddr};

const NOT_OURS: &str = "no tunnel device of ours has this name; read the state again";

/// A network device, as far as it matters here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Device {
    pub(crate) index: u32,
    pub(crate) name: String,
    pub(crate) alias: Option<String>,
    pub(crate) group: u32,
    /// Index of the bridge or the like that takes what comes in; 0 for none.
    pub(crate) master: u32,
    pub(crate) mac: Option<MacAddr>,
    pub(crate) mtu: u32,
    pub(crate) rp_filter: u32,
    pub(crate) up: bool,
    /// What it has as a VXLAN device; `None` if it is not one.
    pub(crate) tunnel: Option<Tunnel>,
}

/// What only a VXLAN device has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tunnel {
    pub(crate) vni: u32,
    pub(crate) port: u16,
    pub(crate) local: Option<IpAddr>,
    /// Interface index of the underlay; 0 for none.
    pub(crate) underlay: u32,
    /// Whether frames that come in say where others go to.
    pub(crate) learning: bool,
    /// TTL of the outer packets; 0 for that of the host.
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
                LinkAttribute::AfSpecUnspec(families) => device.rp_filter = rp_filter(&families),
                _ => {}
            }
        }
        device
    }

    pub(crate) fn is_ours(&self) -> bool {
        let named = self.alias.as_deref() == Some(LINK_ALIAS);
        self.tunnel.is_some() && (named || self.group == LINK_GROUP)
    }

    /// Whether what never differs from one device of ours to another is as we make it.
    pub(crate) fn is_intact(&self) -> bool {
        let plain = self.tunnel.is_some_and(|tunnel| !tunnel.learning && tunnel.ttl == 0);
        let named = self.alias.as_deref() == Some(LINK_ALIAS) && self.group == LINK_GROUP;
        plain && named && self.master == 0
    }
}

/// The Ethernet address in these bytes, if they are as many as one has.
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

fn rp_filter(families: &[AfSpecUnspec]) -> u32 {
    families
        .iter()
        .find_map(|family| match family {
            AfSpecUnspec::Inet(attributes) => {
                attributes.iter().find_map(|attribute| match attribute {
                    AfSpecInet::DevConf(conf) => u32::try_from(conf.rp_filter).ok(),
                    _ => None,
                })
            }
            _ => None,
        })
        .unwrap_or_default()
}

pub(crate) fn without_statistics() -> LinkAttribute {
    LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats])
}

impl RouteSocket {
    /// Our tunnel device, whatever its name; the oldest if there are several.
    pub(crate) fn link(&mut self) -> Result<Option<(u32, Vxlan)>, KernelError> {
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
        self.expected().found(device.index);
        let (tunnel, intact) = (device.tunnel.unwrap_or_default(), device.is_intact());
        let name = DeviceName::new(&device.name)
            .map_err(|_| KernelError::answer(what, "our device has an impossible name"))?;
        Ok(Some((
            device.index,
            Vxlan {
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
            },
        )))
    }

    /// The device with this name, of whoever.
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

    /// Our device with this name.
    ///
    /// The index is looked up for every operation: it changes when the device is made anew.
    pub(crate) fn our_device(
        &mut self,
        what: &dyn Display,
        name: &DeviceName,
    ) -> Result<Device, KernelError> {
        let device = self
            .device_named(what, name)?
            .filter(Device::is_ours)
            .ok_or_else(|| KernelError::refused(what, errno::ENODEV).with_remedy(NOT_OURS))?;
        self.expected().found(device.index);
        Ok(device)
    }

    /// The device with this index, of whoever.
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

    /// Name of the device with this index; `None` for 0 and for one that is gone.
    fn name_of(&mut self, index: u32) -> Result<Option<DeviceName>, KernelError> {
        if index == 0 {
            return Ok(None);
        }
        let device = self.device_at(index)?;
        Ok(device.and_then(|device| DeviceName::new(device.name).ok()))
    }
}
