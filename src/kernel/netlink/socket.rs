//! Netlink socket; the only file that uses netlink-sys.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

pub(crate) use netlink_sys::protocols::{NETLINK_NETFILTER as NETFILTER, NETLINK_ROUTE};
use netlink_sys::{Socket as RawSocket, SocketAddr};
use rustix::net::sockopt;
use socket2::{SockFilter, SockRef};

/// Size of the read buffer in bytes.
///
/// The kernel fills what the reader offers, up to 32 KiB in each datagram of a dump
/// (`net/netlink/af_netlink.c`, `netlink_recvmsg`).
const READ: usize = 64 * 1024;

/// Netlink socket of the network namespace of the thread that opened it.
///
/// It never blocks: the kernel replies to a request before `send` returns, so a missing reply is an
/// error and not something to wait for.
#[derive(Debug)]
pub(crate) struct Socket {
    // Never cloned: a clone closes the file descriptor of the original.
    inner: RawSocket,
    buffer: Vec<u8>,
    sequence: u32,
    port: u32,
    #[cfg(feature = "testing")]
    tap: Option<super::fault_injector::Tap>,
}

impl Socket {
    /// Opens a socket for a netlink protocol (`NETLINK_ROUTE`, `NETLINK_NETFILTER`).
    pub(crate) fn open(protocol: isize) -> io::Result<Self> {
        let mut inner = RawSocket::new(protocol)?;
        let address = inner.bind_auto()?;
        inner.connect(&SocketAddr::new(0, 0))?;
        inner.set_non_blocking(true)?;
        inner.set_ext_ack(true)?;
        // Acknowledgements without a copy of the request, which may be megabytes.
        inner.set_cap_ack(true)?;
        Ok(Self {
            inner,
            buffer: Vec::with_capacity(READ),
            sequence: 0,
            port: address.port_number(),
            #[cfg(feature = "testing")]
            tap: None,
        })
    }

    /// Adds fault injection to the messages sent and received.
    #[cfg(feature = "testing")]
    pub(crate) fn set_tap(&mut self, tap: super::fault_injector::Tap) {
        self.tap = Some(tap);
    }

    /// Makes the kernel apply the filters of dump requests (`NETLINK_GET_STRICT_CHK`).
    ///
    /// The kernel then refuses dump requests that it does not fully understand.
    pub(crate) fn set_strict(&self) -> io::Result<()> {
        self.inner.set_netlink_get_strict_chk(true)
    }

    /// Next sequence number; never 0.
    pub(crate) fn next_sequence(&mut self) -> u32 {
        self.sequence = self.sequence.wrapping_add(1).max(1);
        self.sequence
    }

    /// Port id of the socket, which replies to its requests carry.
    pub(crate) fn port(&self) -> u32 {
        self.port
    }

    /// Raises the send buffer, for a datagram of this many bytes.
    ///
    /// With the privilege to this size; otherwise to at most `net.core.wmem_max`.
    pub(crate) fn reserve(&self, bytes: usize) {
        if sockopt::set_socket_send_buffer_size_force(&self.inner, bytes).is_err() {
            // If the buffer is still too small, the next send fails.
            let _refused = sockopt::set_socket_send_buffer_size(&self.inner, bytes);
        }
    }

    /// Raises the receive buffer to this many bytes.
    ///
    /// With the privilege to this size; otherwise to at most `net.core.rmem_max`.
    pub(crate) fn reserve_unread(&self, bytes: usize) {
        if sockopt::set_socket_recv_buffer_size_force(&self.inner, bytes).is_err() {
            // If the buffer is still too small, a receive fails with ENOBUFS.
            let _refused = sockopt::set_socket_recv_buffer_size(&self.inner, bytes);
        }
    }

    /// Attaches a socket filter: the kernel drops messages for which the program returns 0.
    pub(crate) fn filter(&self, program: &[SockFilter]) -> io::Result<()> {
        SockRef::from(&self.inner).attach_filter(program)
    }

    /// Detaches the socket filter.
    pub(crate) fn unfilter(&self) -> io::Result<()> {
        SockRef::from(&self.inner).detach_filter()
    }

    /// Joins a multicast group, to receive its notifications.
    pub(crate) fn join(&self, group: u32) -> io::Result<()> {
        self.inner.add_membership(group)
    }

    /// Leaves a multicast group.
    pub(crate) fn leave(&self, group: u32) -> io::Result<()> {
        self.inner.drop_membership(group)
    }

    /// Sends one datagram of one or more messages.
    pub(crate) fn send(&mut self, datagram: &[u8]) -> io::Result<()> {
        let send = |datagram: &[u8]| send(&self.inner, datagram);
        #[cfg(feature = "testing")]
        if let Some(tap) = &mut self.tap {
            return tap.send(datagram, self.port, send);
        }
        send(datagram)
    }

    /// Receives one datagram from the kernel; an error of kind `WouldBlock` means there is none.
    pub(crate) fn receive(&mut self) -> io::Result<&[u8]> {
        #[cfg(feature = "testing")]
        if let Some(made_up) = self.tap.as_mut().and_then(super::fault_injector::Tap::made_up) {
            self.buffer.clear();
            self.buffer.extend(made_up);
            return Ok(&self.buffer);
        }
        self.fill()?;
        #[cfg(feature = "testing")]
        if let Some(tap) = &mut self.tap {
            tap.damage(&mut self.buffer)?;
        }
        Ok(&self.buffer)
    }

    fn fill(&mut self) -> io::Result<()> {
        loop {
            self.buffer.clear();
            // With MSG_TRUNC the length is that of the datagram, even if the buffer was too small.
            let (length, from) = self.inner.recv_from(&mut self.buffer, libc::MSG_TRUNC)?;
            if length > self.buffer.len() {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "a datagram was cut"));
            }
            // Any process may send to this socket; only port 0 is the kernel.
            if from.port_number() == 0 {
                return Ok(());
            }
        }
    }
}

fn send(socket: &RawSocket, datagram: &[u8]) -> io::Result<()> {
    let sent = socket.send(datagram, 0)?;
    if sent == datagram.len() {
        Ok(())
    } else {
        Err(io::Error::new(io::ErrorKind::WriteZero, "the datagram was sent in part"))
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.as_fd()
    }
}
