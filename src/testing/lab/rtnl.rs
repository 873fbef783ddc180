//! A minimal rtnetlink client: the requests that build a lab.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, BorrowedFd};

use ipnet::IpNet;
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkHeader,
    NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage, CacheInfo};
use netlink_packet_route::link::{
    InfoBridge, InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use netlink_packet_route::neighbour::{NeighbourAttribute, NeighbourMessage, NeighbourState};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};

/// Index of the loopback interface in every namespace.
pub const LOOPBACK: u32 = 1;

/// An interface to be created: its name and the index it will have.
#[derive(Clone, Copy, Debug)]
pub struct Device<'a> {
    /// Name of the interface.
    pub name: &'a str,
    /// Index of the interface in its namespace.
    pub index: u32,
}

/// The preference of an address in source address selection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Preference {
    /// The kernel's default: the address may be selected.
    Usual,
    /// Deprecated (`preferred_lft 0`): never selected for a socket that does not request it.
    Deprecated,
}

/// An rtnetlink socket of one network namespace.
#[derive(Debug)]
pub struct Rtnl {
    socket: Socket,
    sequence: u32,
}

impl Rtnl {
    /// Opens a socket in the calling thread's namespace.
    pub fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        // The kernel's acknowledgement is queued before `send` returns.
        socket.set_non_blocking(true)?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Sets an interface up.
    pub fn up(&mut self, index: u32) -> io::Result<()> {
        let mut link = link(index);
        link.header.flags = LinkFlags::Up;
        link.header.change_mask = LinkFlags::Up;
        self.request(RouteNetlinkMessage::SetLink(link), 0)
    }

    /// Creates a bridge without forward delay and sets it up.
    pub fn bridge(&mut self, device: Device<'_>) -> io::Result<()> {
        let info = vec![
            LinkInfo::Kind(InfoKind::Bridge),
            LinkInfo::Data(InfoData::Bridge(vec![
                InfoBridge::ForwardDelay(0),
                InfoBridge::MulticastSnooping(false),
            ])),
        ];
        let mut link = named(device);
        link.attributes.push(LinkAttribute::LinkInfo(info));
        self.request(RouteNetlinkMessage::NewLink(link), CREATE)
    }

    /// Creates a veth pair: one interface here, up, and its peer in another namespace, down.
    pub fn veth(
        &mut self,
        here: Device<'_>,
        bridge: Option<u32>,
        there: Device<'_>,
        namespace: BorrowedFd<'_>,
    ) -> io::Result<()> {
        // The peer is created down: it would be opened before it has a peer, which is refused.
        let mut peer = down(there);
        let namespace = LinkAttribute::NetNsFd(namespace.as_raw_fd());
        peer.attributes.push(namespace);
        let mut link = named(here);
        link.attributes.extend(bridge.map(LinkAttribute::Controller));
        link.attributes.push(LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Veth),
            LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
        ]));
        self.request(RouteNetlinkMessage::NewLink(link), CREATE)
    }

    /// Adds an address to an interface, without duplicate address detection.
    pub fn address(&mut self, index: u32, net: IpNet, preference: Preference) -> io::Result<()> {
        let mut message = AddressMessage::default();
        message.header.family = family(net.addr());
        message.header.prefix_len = net.prefix_len();
        message.header.index = index;
        message.attributes = vec![
            AddressAttribute::Local(net.addr()),
            AddressAttribute::Address(net.addr()),
            AddressAttribute::Flags(AddressFlags::Nodad),
        ];
        if preference == Preference::Deprecated {
            let mut lifetime = CacheInfo::default();
            lifetime.ifa_valid = u32::MAX;
            message.attributes.push(AddressAttribute::CacheInfo(lifetime));
        }
        self.request(RouteNetlinkMessage::NewAddress(message), CREATE)
    }

    /// Adds a route to the main table, via a gateway or on the link.
    pub fn route(&mut self, dst: IpNet, via: Option<IpAddr>, index: u32) -> io::Result<()> {
        let mut message = RouteMessage::default();
        message.header.address_family = family(dst.addr());
        message.header.destination_prefix_length = dst.prefix_len();
        message.header.table = RouteHeader::RT_TABLE_MAIN;
        message.header.protocol = RouteProtocol::Static;
        message.header.kind = RouteType::Unicast;
        if via.is_none() {
            message.header.scope = RouteScope::Link;
        }
        if dst.prefix_len() > 0 {
            let dst = RouteAttribute::Destination(dst.network().into());
            message.attributes.push(dst);
        }
        let via = via.map(RouteAddress::from).map(RouteAttribute::Gateway);
        message.attributes.extend(via);
        message.attributes.push(RouteAttribute::Oif(index));
        self.request(RouteNetlinkMessage::NewRoute(message), CREATE)
    }

    /// Adds or replaces a permanent neighbour.
    pub fn neighbour(&mut self, index: u32, ip: IpAddr, mac: [u8; 6]) -> io::Result<()> {
        let mut message = NeighbourMessage::default();
        message.header.family = family(ip);
        message.header.ifindex = index;
        message.header.state = NeighbourState::Permanent;
        message.attributes = vec![
            NeighbourAttribute::Destination(ip.into()),
            NeighbourAttribute::LinkLayerAddress(mac.to_vec()),
        ];
        self.request(RouteNetlinkMessage::NewNeighbour(message), NLM_F_CREATE | NLM_F_REPLACE)
    }

    fn request(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        let mut header = NetlinkHeader::default();
        self.sequence += 1;
        header.sequence_number = self.sequence;
        header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::from(message));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;
        let (answer, _) = self.socket.recv_from_full()?;
        let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&answer)
            .map_err(io::Error::other)?;
        match answer.payload {
            NetlinkPayload::Error(error) if error.code.is_some() => {
                let asked = message.payload;
                let error = error.to_io();
                Err(io::Error::new(error.kind(), format!("{error}: {asked:?}")))
            }
            _ => Ok(()),
        }
    }
}

const CREATE: u16 = NLM_F_CREATE | NLM_F_EXCL;

fn family(address: IpAddr) -> AddressFamily {
    match address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}

fn link(index: u32) -> LinkMessage {
    let mut link = LinkMessage::default();
    link.header.index = index;
    link
}

fn named(device: Device<'_>) -> LinkMessage {
    let mut link = down(device);
    link.header.flags = LinkFlags::Up;
    link.header.change_mask = LinkFlags::Up;
    link
}

fn down(device: Device<'_>) -> LinkMessage {
    let mut link = link(device.index);
    let name = device.name.to_owned();
    link.attributes.push(LinkAttribute::IfName(name));
    link
}
