//! Frames on a device, as they are on the wire.

use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::OwnedFd;

use egress_datapath::testing::lab::Netns;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrAny, SocketFlags, SocketType, eth, recvfrom,
    sendto, socket_with,
};

use crate::Result;

/// A device that frames are sent by.
pub(crate) struct Port {
    socket: OwnedFd,
    device: SocketAddrAny,
    /// Ethernet address of the other end.
    pub(crate) peer: [u8; 6],
}

impl Port {
    /// The device in a namespace on which a neighbour asks for an address that it does not know.
    ///
    /// There is no way to write a device's address down that is safe in Rust; that of a frame
    /// which came in by it is one.
    pub(crate) fn open(netns: &Netns, neighbour: &Netns, address: Ipv4Addr) -> Result<Self> {
        let open = |kind| {
            socket_with(
                AddressFamily::PACKET,
                SocketType::RAW,
                SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
                kind,
            )
        };
        let heard = netns.run(|| open(Some(eth::ARP)))??;
        neighbour.run(|| UdpSocket::bind("0.0.0.0:0")?.send_to(&[], (address, 9)))??;
        let mut frame = [0; 64];
        let (_, _, device) = receive(&heard, &mut frame)?.ok_or("nobody asks for the address")?;
        let peer = frame.get(6..12).ok_or("a short frame")?.try_into()?;
        // With no protocol it receives nothing.
        let socket = netns.run(|| open(None))??;
        Ok(Self { socket, device: device.ok_or("a frame from no device")?, peer })
    }

    /// Sends a frame; when this returns it has arrived where it was to, or nowhere.
    pub(crate) fn send(&self, frame: &[u8]) -> rustix::io::Result<()> {
        sendto(&self.socket, frame, SendFlags::empty(), &self.device).map(drop)
    }
}

type Received = (usize, usize, Option<SocketAddrAny>);

fn receive(socket: &OwnedFd, into: &mut [u8]) -> Result<Option<Received>> {
    // A device that is new takes a while, and the neighbour asks once in a second.
    let wait = Timespec { tv_sec: 4, tv_nsec: 0 };
    if poll(&mut [PollFd::new(socket, PollFlags::IN)], Some(&wait))? == 0 {
        return Ok(None);
    }
    Ok(Some(recvfrom(socket, into, RecvFlags::empty())?))
}

/// Sees the IPv4 frames that come in by any device of a namespace.
pub(crate) struct Tap(OwnedFd);

impl Tap {
    pub(crate) fn open(netns: &Netns) -> Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let open = || socket_with(AddressFamily::PACKET, SocketType::RAW, flags, Some(eth::IP));
        Ok(Self(netns.run(open)??))
    }

    /// What has come in since.
    pub(crate) fn frames(&self) -> Result<Vec<Vec<u8>>> {
        let mut frames = Vec::new();
        loop {
            let mut frame = vec![0; 256];
            match recvfrom(&self.0, &mut frame[..], RecvFlags::empty()) {
                Ok((length, ..)) => {
                    frame.truncate(length);
                    frames.push(frame);
                }
                Err(Errno::AGAIN) => return Ok(frames),
                Err(error) => return Err(error.into()),
            }
        }
    }
}
