//! News of a simulated kernel.

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

/// Readable when somebody else touched what a [`SimDatapath`](super::SimDatapath) has written: what
/// `Watch` is to the kernel's.
///
/// It tells every part that changed, side effects too, and nothing of what its own datapath wrote.
/// Who it was is not told: [`News::writers`] is empty.
#[derive(Debug)]
pub struct SimWatch {
    listener: Arc<Listener>,
    #[cfg(unix)]
    bell: Arc<Bell>,
}

impl SimWatch {
    /// Hears everybody but a writer.
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

    /// Takes all news out; afterwards it is not readable until there is more.
    ///
    /// It never fails; the result is for those who also drain a kernel's `Watch`.
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

/// Makes a descriptor readable, where there are descriptors.
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
        // Where there is no room it is readable already.
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
