//! Reads interfaces and their addresses, and tests for VXLAN support.

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVxlan, LinkAttribute, LinkInfo, LinkMessage, LinkXdp, XdpAttached,
};

use crate::error::{KernelError, errno};
use crate::kernel::rtnetlink::address::{ALL, parse};
use crate::kernel::rtnetlink::link;
use crate::kernel::rtnetlink::socket::RouteSocket;
use crate::preflight::facts::{Address, Device, DeviceKind, Vxlan};
use crate::types::Family;

/// VNI one above the highest (24 bits), invalid for every VXLAN device.
const IMPOSSIBLE_VNI: u32 = 1 << 24;

/// Interface index and interface.
pub(crate) type Indexed = (u32, Device);

impl RouteSocket {
    pub(crate) fn all_devices(&mut self) -> Result<Vec<Indexed>, KernelError> {
        let mut message = LinkMessage::default();
        message.attributes = vec![link::without_statistics()];
        let message = RouteNetlinkMessage::GetLink(message);
        self.dump(&"ip -d link show", &message, |message| match message {
            RouteNetlinkMessage::NewLink(link) => Some(device(link)),
            _ => None,
        })
    }

    pub(crate) fn all_addresses(
        &mut self,
        devices: &[Indexed],
    ) -> Result<Vec<Address>, KernelError> {
        let name = |index| devices.iter().find(|(at, _)| *at == index).map(|(_, d)| d.name.clone());
        self.pick_addresses(&"ip addr show", ALL, &Family::BOTH, |message| {
            let (index, net) = parse(message)?;
            let deprecated = is_deprecated(message);
            Some(Address { ip: net.addr(), device: name(index)?, deprecated })
        })
    }

    /// Returns true if the kernel supports VXLAN devices; the kernel loads the module if it can.
    ///
    /// The request has an invalid VNI, so the kernel must refuse it: it looks for the device kind
    /// before it checks the VNI.
    pub(crate) fn has_vxlan(&mut self) -> Result<bool, KernelError> {
        let mut message = LinkMessage::default();
        message.attributes = vec![LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Vxlan),
            LinkInfo::Data(InfoData::Vxlan(vec![InfoVxlan::Id(IMPOSSIBLE_VNI)])),
        ])];
        let what = format!("ip link add type vxlan id {IMPOSSIBLE_VNI}");
        let message = RouteNetlinkMessage::NewLink(message);
        match self.request(&what, message, NLM_F_CREATE | NLM_F_EXCL) {
            Err(error) if error.is_denied() => Err(error),
            Err(error) => Ok(error.errno() != Some(errno::EOPNOTSUPP)),
            Ok(()) => Err(KernelError::answer(what, "the kernel took an impossible VNI")),
        }
    }
}

pub(crate) fn is_deprecated(message: &AddressMessage) -> bool {
    message.attributes.iter().any(|attribute| match attribute {
        AddressAttribute::Flags(flags) => flags.contains(AddressFlags::Deprecated),
        _ => false,
    })
}

pub(crate) fn device(message: LinkMessage) -> Indexed {
    let infos: Vec<&LinkInfo> = message
        .attributes
        .iter()
        .filter_map(|attribute| match attribute {
            LinkAttribute::LinkInfo(infos) => Some(infos),
            _ => None,
        })
        .flatten()
        .collect();
    let kind = infos.iter().find_map(|info| match info {
        LinkInfo::Kind(InfoKind::Ifb) => Some(DeviceKind::Ifb),
        LinkInfo::Kind(InfoKind::Netkit) => Some(DeviceKind::Netkit),
        LinkInfo::Kind(kind) => is_tunnel(kind).then_some(DeviceKind::Tunnel),
        _ => None,
    });
    let external = infos.iter().any(|info| match info {
        LinkInfo::Data(InfoData::Vxlan(data)) => data.contains(&InfoVxlan::CollectMetadata(true)),
        _ => false,
    });
    let xdp = message.attributes.iter().any(|attribute| match attribute {
        LinkAttribute::Xdp(found) => found.iter().any(|xdp| match xdp {
            LinkXdp::Attached(how) => *how != XdpAttached::None,
            _ => false,
        }),
        _ => false,
    });
    let found = link::Device::parse(message);
    let vxlan = found.tunnel.map(|t| Vxlan { vni: t.vni, port: t.port, external });
    let device = Device {
        ours: found.is_ours(),
        down: !found.up,
        name: found.name,
        kind: kind.unwrap_or_default(),
        mtu: found.mtu,
        rp_filter: found.rp_filter,
        not_forwarding: !found.forwarding,
        vxlan,
        xdp,
    };
    (found.index, device)
}

fn is_tunnel(kind: &InfoKind) -> bool {
    matches!(
        kind,
        InfoKind::Vxlan
            | InfoKind::Geneve
            | InfoKind::IpIp
            | InfoKind::Ip6Tnl
            | InfoKind::SitTun
            | InfoKind::GreTun
            | InfoKind::Wireguard
            | InfoKind::Tun
            | InfoKind::Xfrm
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_and_programs_of_interfaces() {
        let kind = |kind| LinkAttribute::LinkInfo(vec![LinkInfo::Kind(kind)]);
        let xdp = |how| LinkAttribute::Xdp(vec![LinkXdp::Attached(how)]);
        for (attributes, kind, has_xdp) in [
            (vec![], DeviceKind::Other, false),
            (vec![kind(InfoKind::Ifb)], DeviceKind::Ifb, false),
            (vec![kind(InfoKind::Netkit)], DeviceKind::Netkit, false),
            (vec![kind(InfoKind::Geneve)], DeviceKind::Tunnel, false),
            (vec![kind(InfoKind::Veth), xdp(XdpAttached::None)], DeviceKind::Other, false),
            (vec![xdp(XdpAttached::SocketBuffer)], DeviceKind::Other, true),
        ] {
            let mut message = LinkMessage::default();
            message.attributes = attributes;
            let (_, found) = device(message);
            assert_eq!((found.kind, found.xdp), (kind, has_xdp), "{found:?}");
        }
    }
}
