//! Network namespaces without a name, which live as long as their file descriptor is open.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::panic;
use std::sync::{Mutex, PoisonError};
use std::thread;

use rustix::process::{getegid, geteuid};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};

use super::rtnl::{LOOPBACK, Rtnl};

/// A network namespace, removed by the kernel when this value is dropped or the process dies.
#[derive(Debug)]
pub struct Netns {
    fd: OwnedFd,
    rtnl: Mutex<Rtnl>,
}

impl Netns {
    /// Creates a namespace with only the loopback interface, which is up.
    pub fn new() -> io::Result<Self> {
        let made = thread::spawn(|| {
            unshare(UnshareFlags::NEWNET)?;
            let fd = File::open("/proc/thread-self/ns/net")?.into();
            let mut rtnl = Rtnl::open()?;
            rtnl.up(LOOPBACK)?;
            let rtnl = Mutex::new(rtnl);
            Ok(Self { fd, rtnl })
        });
        made.join().unwrap_or_else(|panicked| panic::resume_unwind(panicked))
    }

    /// Runs a closure in the namespace; sockets that it opens remain in the namespace.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        inside(self.fd.as_fd(), work)
    }

    /// Runs a closure that changes links, addresses and routes of the namespace.
    pub fn link<T>(&self, work: impl FnOnce(&mut Rtnl) -> io::Result<T>) -> io::Result<T> {
        work(&mut self.rtnl.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Writes kernel parameters (sysctls), each named by its path under `/proc/sys/net`.
    pub fn sysctl(&self, settings: &[(&str, &str)]) -> io::Result<()> {
        self.run(|| {
            settings.iter().try_for_each(|(name, value)| {
                let path = format!("/proc/sys/net/{name}");
                fs::write(&path, value).map_err(|error| {
                    let sentence = format!("cannot write {value} to {path}: {error}");
                    io::Error::new(error.kind(), sentence)
                })
            })
        })?
    }
}

/// Runs a closure in a network namespace, on a new thread.
pub fn inside<T: Send>(
    namespace: BorrowedFd<'_>,
    work: impl FnOnce() -> T + Send,
) -> io::Result<T> {
    thread::scope(|scope| {
        let inside = scope.spawn(|| {
            move_into_link_name_space(namespace, Some(LinkNameSpaceType::Network))?;
            Ok(work())
        });
        inside.join().unwrap_or_else(|panicked| panic::resume_unwind(panicked))
    })
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Moves this process into a new network namespace; it must not have started threads.
///
/// For root this is a network namespace only. Other users also get a new user namespace, in which
/// they are root.
pub fn isolate() -> io::Result<()> {
    let (user, group) = (geteuid(), getegid());
    if user.is_root() {
        return unshare(UnshareFlags::NEWNET);
    }
    unshare(UnshareFlags::NEWUSER | UnshareFlags::NEWNET).map_err(|error| {
        let sentence = format!("this user may not create a user namespace: {error}");
        io::Error::new(error.kind(), sentence)
    })?;
    // The kernel refuses the group map of an unprivileged process until setgroups is denied.
    fs::write("/proc/self/setgroups", "deny")?;
    fs::write("/proc/self/uid_map", format!("0 {} 1", user.as_raw()))?;
    fs::write("/proc/self/gid_map", format!("0 {} 1", group.as_raw()))
}

#[expect(deprecated, reason = "deprecated because of CLONE_FILES, which is not used here")]
fn unshare(what: UnshareFlags) -> io::Result<()> {
    Ok(rustix::thread::unshare(what)?)
}
