//! What a socket takes at once and what it refuses: `setsockopt(2)`.

#![expect(unsafe_code, reason = "neither std nor netlink-sys has a safe way to set these options")]

use std::ffi::{c_int, c_ushort, c_void};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

// asm-generic/socket.h; the few architectures with other numbers have other tables, too.
#[cfg(not(any(target_arch = "mips", target_arch = "mips64", target_arch = "sparc64")))]
mod number {
    use super::c_int;

    pub(crate) const SOL_SOCKET: c_int = 1;
    pub(crate) const SO_SNDBUF: c_int = 7;
    pub(crate) const SO_RCVBUF: c_int = 8;
    pub(crate) const SO_SNDBUFFORCE: c_int = 32;
    pub(crate) const SO_RCVBUFFORCE: c_int = 33;
}
// arch/mips/include/uapi/asm/socket.h
#[cfg(any(target_arch = "mips", target_arch = "mips64"))]
mod number {
    use super::c_int;

    pub(crate) const SOL_SOCKET: c_int = 0xffff;
    pub(crate) const SO_SNDBUF: c_int = 0x1001;
    pub(crate) const SO_RCVBUF: c_int = 0x1002;
    pub(crate) const SO_SNDBUFFORCE: c_int = 0x1f;
    pub(crate) const SO_RCVBUFFORCE: c_int = 0x21;
}
// arch/sparc/include/uapi/asm/socket.h
#[cfg(target_arch = "sparc64")]
mod number {
    use super::c_int;

    pub(crate) const SOL_SOCKET: c_int = 0xffff;
    pub(crate) const SO_SNDBUF: c_int = 0x1001;
    pub(crate) const SO_RCVBUF: c_int = 0x1002;
    pub(crate) const SO_SNDBUFFORCE: c_int = 0x100a;
    pub(crate) const SO_RCVBUFFORCE: c_int = 0x100b;
}

/// The same numbers everywhere.
const SO_ATTACH_FILTER: c_int = 26;
const SO_DETACH_FILTER: c_int = 27;

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
pub(crate) fn set_send_buffer(socket: BorrowedFd<'_>, bytes: usize) {
    let bytes = c_int::try_from(bytes).unwrap_or(c_int::MAX);
    if set(socket, number::SO_SNDBUFFORCE, &bytes).is_err() {
        // Whether it was enough is said by the next send.
        let _refused = set(socket, number::SO_SNDBUF, &bytes);
    }
}

/// Makes the socket keep this many bytes that nobody has read yet: as many with the privilege,
/// else as many as `net.core.rmem_max` allows.
pub(crate) fn set_receive_buffer(socket: BorrowedFd<'_>, bytes: usize) {
    let bytes = c_int::try_from(bytes).unwrap_or(c_int::MAX);
    if set(socket, number::SO_RCVBUFFORCE, &bytes).is_err() {
        // Whether it was enough is said by ENOBUFS.
        let _refused = set(socket, number::SO_RCVBUF, &bytes);
    }
}

/// One instruction of a classic BPF program, `struct sock_filter` of `linux/filter.h`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Instruction {
    pub(crate) code: u16,
    /// Instructions to skip if the comparison holds.
    pub(crate) yes: u8,
    /// Instructions to skip if it does not.
    pub(crate) no: u8,
    pub(crate) value: u32,
}

/// `struct sock_fprog` of `linux/filter.h`.
#[repr(C)]
struct Program {
    length: c_ushort,
    instructions: *const Instruction,
}

/// Makes the kernel drop datagrams for this socket for which the program returns 0.
pub(crate) fn attach_filter(socket: BorrowedFd<'_>, program: &[Instruction]) -> io::Result<()> {
    let length = c_ushort::try_from(program.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    // The kernel reads `length` instructions from the pointer, which is as many as `program` has,
    // borrowed until `set` returns, and copies them.
    set(socket, SO_ATTACH_FILTER, &Program { length, instructions: program.as_ptr() })
}

/// Has the kernel pass every datagram again.
pub(crate) fn detach_filter(socket: BorrowedFd<'_>) -> io::Result<()> {
    set(socket, SO_DETACH_FILTER, &0)
}

/// What `setsockopt` may read: numbers, and pointers that the kernel follows only to read.
trait Plain {}
impl Plain for c_int {}
impl Plain for Program {}

fn set<T: Plain>(socket: BorrowedFd<'_>, name: c_int, value: &T) -> io::Result<()> {
    let length = u32::try_from(size_of::<T>()).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: the descriptor is open for as long as it is borrowed. The kernel reads `length`
    // bytes from the pointer, which are those of `value`, borrowed until the call returns; it
    // keeps no pointer and writes nothing. A value with a pointer in it is made above only, and
    // says there why the kernel may follow it.
    let result = unsafe {
        setsockopt(
            socket.as_raw_fd(),
            number::SOL_SOCKET,
            name,
            std::ptr::from_ref(value).cast::<c_void>(),
            length,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixDatagram;

    use super::*;

    fn pair() -> (UnixDatagram, UnixDatagram) {
        let (here, there) = UnixDatagram::pair().unwrap();
        here.set_nonblocking(true).unwrap();
        there.set_nonblocking(true).unwrap();
        (here, there)
    }

    #[test]
    fn a_socket_takes_more_after_it_was_told_so() {
        let (here, _there) = pair();
        set(here.as_fd(), number::SO_SNDBUF, &(8 * 1024)).unwrap();
        assert!(here.send(&vec![0; 64 * 1024]).is_err());
        set_send_buffer(here.as_fd(), 128 * 1024);
        assert_eq!(here.send(&vec![0; 64 * 1024]).unwrap(), 64 * 1024);
    }

    #[test]
    fn an_unknown_option_is_an_error() {
        let (here, _there) = pair();
        assert!(set(here.as_fd(), -1, &1).is_err());
    }

    #[test]
    fn a_filter_decides_by_what_is_in_the_datagram() {
        let (here, there) = pair();
        let program = [
            Instruction { code: 0x20, yes: 0, no: 0, value: 0 },
            Instruction { code: 0x15, yes: 0, no: 1, value: 0x0102_0304 },
            Instruction { code: 0x06, yes: 0, no: 0, value: 0 },
            Instruction { code: 0x06, yes: 0, no: 0, value: u32::MAX },
        ];
        attach_filter(there.as_fd(), &program).unwrap();
        // The kernel says yes to the sender of a datagram that the filter drops, or EPERM.
        let _dropped = here.send(&[1, 2, 3, 4, 5]);
        here.send(&[1, 2, 3, 5, 5]).unwrap();
        let mut bytes = [0; 8];
        assert_eq!(there.recv(&mut bytes).unwrap(), 5);
        assert_eq!(bytes[..5], [1, 2, 3, 5, 5]);
        assert!(there.recv(&mut bytes).is_err());
        detach_filter(there.as_fd()).unwrap();
        here.send(&[1, 2, 3, 4, 5]).unwrap();
        assert_eq!(there.recv(&mut bytes).unwrap(), 5);
        assert!(detach_filter(there.as_fd()).is_err());
    }

    #[test]
    fn a_filter_without_end_is_refused() {
        let (_here, there) = pair();
        assert!(attach_filter(there.as_fd(), &[]).is_err());
        let endless = [Instruction { code: 0x20, yes: 0, no: 0, value: 0 }];
        assert!(attach_filter(there.as_fd(), &endless).is_err());
        assert!(attach_filter(there.as_fd(), &vec![endless[0]; 70_000]).is_err());
    }
}
