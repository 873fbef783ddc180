//! How much a socket takes at once; the only unsafe code of the crate.

#![expect(unsafe_code, reason = "no safe way to set SO_SNDBUFFORCE is in std or netlink-sys")]

use std::ffi::{c_int, c_void};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

// asm-generic/socket.h; the few architectures with other numbers have other tables, too.
#[cfg(not(any(target_arch = "mips", target_arch = "mips64", target_arch = "sparc64")))]
mod number {
    use super::c_int;

    pub(super) const SOL_SOCKET: c_int = 1;
    pub(super) const SO_SNDBUF: c_int = 7;
    pub(super) const SO_SNDBUFFORCE: c_int = 32;
}
// arch/mips/include/uapi/asm/socket.h
#[cfg(any(target_arch = "mips", target_arch = "mips64"))]
mod number {
    use super::c_int;

    pub(super) const SOL_SOCKET: c_int = 0xffff;
    pub(super) const SO_SNDBUF: c_int = 0x1001;
    pub(super) const SO_SNDBUFFORCE: c_int = 0x1f;
}
// arch/sparc/include/uapi/asm/socket.h
#[cfg(target_arch = "sparc64")]
mod number {
    use super::c_int;

    pub(super) const SOL_SOCKET: c_int = 0xffff;
    pub(super) const SO_SNDBUF: c_int = 0x1001;
    pub(super) const SO_SNDBUFFORCE: c_int = 0x100a;
}

unsafe extern "C" {
    /// `setsockopt(2)`; every Linux program of std is linked with the C library.
    fn setsockopt(
        socket: c_int,
        level: c_int,
        name: c_int,
        value: *const c_void,
        length: u32,
    ) -> c_int;
}

/// Makes the socket take datagrams of this many bytes: as many with the privilege, else as many
/// as `net.core.wmem_max` allows.
pub(super) fn set_send_buffer(socket: BorrowedFd<'_>, bytes: usize) {
    let bytes = c_int::try_from(bytes).unwrap_or(c_int::MAX);
    if set(socket, number::SO_SNDBUFFORCE, bytes).is_err() {
        // Whether it was enough is said by the next send.
        let _refused = set(socket, number::SO_SNDBUF, bytes);
    }
}

fn set(socket: BorrowedFd<'_>, name: c_int, value: c_int) -> io::Result<()> {
    const LENGTH: u32 = 4;
    const { assert!(size_of::<c_int>() == LENGTH as usize) };
    // SAFETY: the descriptor is open for as long as it is borrowed. The kernel reads `LENGTH`
    // bytes from the pointer, which are those of `value`, alive until the call returns; it keeps
    // no pointer and writes nothing.
    let result = unsafe {
        setsockopt(
            socket.as_raw_fd(),
            number::SOL_SOCKET,
            name,
            (&raw const value).cast::<c_void>(),
            LENGTH,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixDatagram;

    use super::*;

    #[test]
    fn a_socket_takes_more_after_it_was_told_so() {
        let (here, _there) = UnixDatagram::pair().unwrap();
        here.set_nonblocking(true).unwrap();
        set(here.as_fd(), number::SO_SNDBUF, 8 * 1024).unwrap();
        assert!(here.send(&vec![0; 64 * 1024]).is_err());
        set_send_buffer(here.as_fd(), 128 * 1024);
        assert_eq!(here.send(&vec![0; 64 * 1024]).unwrap(), 64 * 1024);
    }

    #[test]
    fn an_unknown_option_is_an_error() {
        let (here, _there) = UnixDatagram::pair().unwrap();
        assert!(set(here.as_fd(), -1, 1).is_err());
    }
}
