//! One descriptor that is readable when any of several is: `epoll(7)`.

#![expect(unsafe_code, reason = "std has no epoll")]

use std::ffi::c_int;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

// O_CLOEXEC of asm-generic/fcntl.h, and of the architecture that has another one.
#[cfg(not(target_arch = "sparc64"))]
const EPOLL_CLOEXEC: c_int = 0x8_0000;
#[cfg(target_arch = "sparc64")]
const EPOLL_CLOEXEC: c_int = 0x40_0000;

const EPOLL_CTL_ADD: c_int = 1;
const EPOLLIN: u32 = 1;

/// `struct epoll_event` of `linux/eventpoll.h`, where `x86_64` packs it.
#[repr(C)]
#[cfg_attr(target_arch = "x86_64", repr(packed))]
struct Event {
    events: u32,
    data: u64,
}

unsafe extern "C" {
    /// `epoll_create1(2)`.
    fn epoll_create1(flags: c_int) -> c_int;
    /// `epoll_ctl(2)`.
    fn epoll_ctl(epoll: c_int, op: c_int, descriptor: c_int, event: *mut Event) -> c_int;
}

/// Readable while one of its members is, or has an error to tell; a member leaves when it is
/// closed.
#[derive(Debug)]
pub(crate) struct Epoll(OwnedFd);

impl Epoll {
    /// Without members.
    pub(crate) fn new() -> io::Result<Self> {
        // SAFETY: the call takes a number and touches no memory of ours.
        let descriptor = unsafe { epoll_create1(EPOLL_CLOEXEC) };
        if descriptor < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just made the descriptor for us: it is open, nobody else knows
        // it, and closing it is all that it takes.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(descriptor) }))
    }

    /// Adds a member.
    pub(crate) fn add(&self, member: BorrowedFd<'_>) -> io::Result<()> {
        let mut event = Event { events: EPOLLIN, data: 0 };
        // SAFETY: both descriptors are open for as long as they are borrowed. The kernel reads
        // one `struct epoll_event` from the pointer, which has that layout and is alive until the
        // call returns; it keeps no pointer.
        let result = unsafe {
            epoll_ctl(self.0.as_raw_fd(), EPOLL_CTL_ADD, member.as_raw_fd(), &raw mut event)
        };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

impl AsFd for Epoll {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;

    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    use super::*;

    fn is_readable(epoll: &Epoll) -> bool {
        let mut list = [PollFd::new(epoll, PollFlags::IN)];
        poll(&mut list, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap() == 1
    }

    #[test]
    fn it_is_readable_while_a_member_is() {
        let epoll = Epoll::new().unwrap();
        let (here, there) = UnixDatagram::pair().unwrap();
        let (_quiet, other) = UnixDatagram::pair().unwrap();
        epoll.add(there.as_fd()).unwrap();
        epoll.add(other.as_fd()).unwrap();
        assert!(!is_readable(&epoll));
        here.send(&[1]).unwrap();
        here.send(&[1]).unwrap();
        assert!(is_readable(&epoll) && is_readable(&epoll));
        there.recv(&mut [0]).unwrap();
        assert!(is_readable(&epoll));
        there.recv(&mut [0]).unwrap();
        assert!(!is_readable(&epoll));
        here.send(&[1]).unwrap();
        drop(there);
        assert!(!is_readable(&epoll));
    }

    #[test]
    fn a_member_is_added_once() {
        let epoll = Epoll::new().unwrap();
        let (here, _there) = UnixDatagram::pair().unwrap();
        epoll.add(here.as_fd()).unwrap();
        assert_eq!(epoll.add(here.as_fd()).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
    }
}
