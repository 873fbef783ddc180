//! News of a simulated kernel.

use std::collections::BTreeSet;
use std::io;
#[cfg(unix)]
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use super::notify::{Bell, Listener, Writer, Written};
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
        self.bell.as_fd()
    }
}
