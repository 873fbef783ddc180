//! Watch for changes of a simulated kernel.

use std::collections::BTreeSet;
use std::io;
#[cfg(unix)]
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use super::notify::{ChangeSet, EventFd, Listener, Writer};
use crate::error::KernelError;
use crate::event::ChangeEvents;

/// Watch for changes by other programs to objects that a [`SimDatapath`](super::SimDatapath) wrote.
///
/// Its file descriptor is readable when such a change was made. It corresponds to the kernel's
/// `Watch`. It reports every part that changed, including side effects, and no writes of its own
/// datapath. It does not report the writer: [`ChangeEvents::writers`] is empty.
#[derive(Debug)]
pub struct SimWatch {
    listener: Arc<Listener>,
    #[cfg(unix)]
    event_fd: Arc<EventFd>,
}

impl SimWatch {
    /// A watch for the changes of all writers but one.
    pub(super) fn of(writer: Writer) -> io::Result<(Self, Arc<Listener>)> {
        let event_fd = Arc::new(EventFd::new()?);
        let listener = Listener::new(writer, Some(Arc::clone(&event_fd)));
        let watch = Self {
            listener: Arc::clone(&listener),
            #[cfg(unix)]
            event_fd,
        };
        Ok((watch, listener))
    }

    /// Takes all events; the descriptor is not readable until there are more.
    ///
    /// It never fails; the result type matches that of the kernel's `Watch`.
    pub fn drain(&mut self) -> Result<ChangeEvents, KernelError> {
        let ChangeSet { parts, anything, .. } = self.listener.take();
        Ok(ChangeEvents { changed: parts, lost: anything, writers: BTreeSet::new() })
    }
}

#[cfg(unix)]
impl AsFd for SimWatch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event_fd.as_fd()
    }
}
