//! Watch for changes of a simulated kernel.

use std::collections::BTreeSet;
use std::io;
#[cfg(unix)]
use std::io::{Read, Write};
#[cfg(unix)]
use std::os::fd::{AsFd, BorrowedFd};
#[cfg(unix)]
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use super::notify::{Listener, Writer, Written};
use crate::error::KernelError;
use crate::event::News;

/// Watch for changes by other programs to objects that a [`SimDatapath`](super::SimDatapath) wrote.
///
/// Its file descriptor is readable when such a change was made. It corresponds to the kernel's
/// `Watch`. It reports every part that changed, including side effects, and no writes of its own
/// datapath. It does not report the writer: [`News::writers`] is empty.
#[derive(Debug)]
pub struct SimWatch {
    listener: Arc<Listener>,
    #[cfg(unix)]
    bell: Arc<Bell>,
}

impl SimWatch {
    /// A watch for the changes of all writers but one.
    pub(super) fn of(writer: Writer) -> io::Result<(Self, Arc<Listener>)> {
        let bell = Arc::new(Bell::new()?);
        let listener = Listener::new(writer, Some(Arc::clone(&bell)));
        let watch = Self {
            listener: Arc::clone(&listener),
            #[cfg(unix)]
            bell,
        };
        Ok((watch, listener))
    }

    /// Takes all events; the descriptor is not readable until there are more.
    ///
    /// It never fails; the result type matches that of the kernel's `Watch`.
    pub fn drain(&mut self) -> Result<News, KernelError> {
        let Written { parts, anything, .. } = self.listener.take();
        Ok(News { changed: parts, lost: anything, writers: BTreeSet::new() })
    }
}

#[cfg(unix)]
impl AsFd for SimWatch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.bell.heard.as_fd()
    }
}

/// Wake-up of a file descriptor, on platforms that have file descriptors.
#[derive(Debug)]
pub(super) struct Bell {
    #[cfg(unix)]
    rung: UnixStream,
    #[cfg(unix)]
    heard: UnixStream,
}

#[cfg(unix)]
impl Bell {
    pub(super) fn new() -> io::Result<Self> {
        let (rung, heard) = UnixStream::pair()?;
        rung.set_nonblocking(true)?;
        heard.set_nonblocking(true)?;
        Ok(Self { rung, heard })
    }

    pub(super) fn ring(&self) {
        // If the buffer is full, the descriptor is already readable.
        let _full = (&self.rung).write(&[0]);
    }

    pub(super) fn hush(&self) {
        let mut rings = [0; 64];
        while (&self.heard).read(&mut rings).is_ok_and(|read| read > 0) {}
    }
}

#[cfg(not(unix))]
impl Bell {
    #[expect(clippy::unnecessary_wraps, reason = "elsewhere it needs a descriptor")]
    pub(super) const fn new() -> io::Result<Self> {
        Ok(Self {})
    }

    #[expect(clippy::unused_self, reason = "elsewhere it has something to ring")]
    pub(super) const fn ring(&self) {}

    #[expect(clippy::unused_self, reason = "elsewhere it has something to hush")]
    pub(super) const fn hush(&self) {}
}
