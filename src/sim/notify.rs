//! Delivers change notifications to simulated listeners.

use std::collections::BTreeSet;
use std::io;
#[cfg(unix)]
use std::io::{Read, Write};
#[cfg(unix)]
use std::os::fd::{AsFd, BorrowedFd};
#[cfg(unix)]
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use crate::datapath::Drift;
use crate::event::Component;
use crate::state::{Route, RouteKey, State, StrayKind, StrayRouting};

/// The writer of a change, as the kernel identifies it by the port id of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Writer {
    /// The simulator's own datapath.
    Own,
    /// The datapath with this number.
    Datapath(u32),
    /// Another program.
    Stranger,
}

/// A change that a writer made.
#[derive(Clone, Debug, Default)]
pub(super) struct ChangeSet {
    pub(super) parts: BTreeSet<Component>,
    /// Whether ipsets or iptables rules changed, for which the kernel sends no notification.
    pub(super) unnotified: bool,
    /// Whether anything may have changed.
    pub(super) anything: bool,
}

impl ChangeSet {
    /// Difference of two states in objects of rtnetlink, without changes the kernel does not
    /// notify.
    pub(super) fn between(before: &State, after: &State) -> Self {
        let strays = |kind: StrayKind| {
            let is = move |stray: &&StrayRouting| stray.kind == kind;
            !before.strays.iter().filter(is).eq(after.strays.iter().filter(is))
        };
        let differs = [
            (Component::Link, before.link != after.link),
            (
                Component::Address,
                before.addresses != after.addresses || before.claims != after.claims,
            ),
            (Component::Fdb, before.fdb != after.fdb),
            (Component::Neighbour, before.neighbours != after.neighbours),
            (Component::Route, routes_differ(before, after) || strays(StrayKind::Route)),
            (Component::Rule, before.rules != after.rules || strays(StrayKind::Rule)),
        ];
        let parts = differs.into_iter().filter_map(|(part, differs)| differs.then_some(part));
        Self { parts: parts.collect(), ..Self::default() }
    }

    /// Whether a watch is notified of it.
    pub(super) fn is_notified(&self) -> bool {
        self.anything || !self.parts.is_empty()
    }

    fn add(&mut self, other: &Self) {
        self.parts.extend(&other.parts);
        self.unnotified |= other.unnotified;
        self.anything |= other.anything;
    }
}

/// Whether routes differ in a way that the kernel sends notifications for.
///
/// It sends none for IPv4 routes that are removed with an interface or its last address
/// (`fib_sync_down_dev`, `fib_disable_ip`).
fn routes_differ(before: &State, after: &State) -> bool {
    let on_same_ground = before.link == after.link && before.addresses == after.addresses;
    let is_notified = |(key, route): (&RouteKey, &Route)| {
        let goes_along = key.dst.addr().is_ipv4() && matches!(route, Route::Via(_));
        match after.routes.get(key) {
            Some(now) => now != route,
            None => on_same_ground || !goes_along,
        }
    };
    let is_new = |key: &RouteKey| !before.routes.contains_key(key);
    before.routes.iter().any(is_notified) || after.routes.keys().any(is_new)
}

/// Parts of the state that certainly are as last read and written.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Freshness {
    pub(super) table: bool,
    pub(super) rest: bool,
}

impl Freshness {
    pub(super) fn hear(&mut self, written: &ChangeSet) {
        let ChangeSet { parts, unnotified, anything } = written;
        self.table &= !anything && !unnotified && !parts.contains(&Component::Firewall);
        self.rest &= !anything && !parts.iter().any(|part| *part != Component::Firewall);
    }

    pub(super) const fn drift(self) -> Drift {
        match (self.table, self.rest) {
            (true, true) => Drift::None,
            (true, false) => Drift::Rest,
            (false, _) => Drift::Unknown,
        }
    }
}

/// A subscriber to the changes of other writers.
#[derive(Debug)]
pub(super) struct Listener {
    /// The writer whose changes are not delivered.
    muted: Writer,
    /// Changes since the last call of `take`.
    heard: Mutex<ChangeSet>,
    /// Wake-up of a watch; the listener of a datapath has none.
    event_fd: Option<Arc<EventFd>>,
}

impl Listener {
    pub(super) fn new(muted: Writer, event_fd: Option<Arc<EventFd>>) -> Arc<Self> {
        Arc::new(Self { muted, heard: Mutex::default(), event_fd })
    }

    fn tell(&self, written: &ChangeSet) {
        let mut heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        let first = written.is_notified() && !heard.is_notified();
        heard.add(written);
        if let Some(event_fd) = self.event_fd.as_ref().filter(|_| first) {
            event_fd.signal();
        }
    }

    /// Takes the changes received so far.
    pub(super) fn take(&self) -> ChangeSet {
        let mut heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(event_fd) = &self.event_fd {
            event_fd.clear();
        }
        std::mem::take(&mut heard)
    }
}

/// All listeners; a clone of the simulator has none.
#[derive(Debug, Default)]
pub(super) struct Notifier {
    listeners: Vec<Weak<Listener>>,
    datapaths: u32,
}

impl Clone for Notifier {
    fn clone(&self) -> Self {
        Self::default()
    }
}

impl Notifier {
    /// Registers a new datapath as a writer.
    pub(super) fn writer(&mut self) -> Writer {
        self.datapaths += 1;
        Writer::Datapath(self.datapaths)
    }

    pub(super) fn add(&mut self, listener: &Arc<Listener>) {
        self.listeners.retain(|listener| listener.strong_count() > 0);
        self.listeners.push(Arc::downgrade(listener));
    }

    /// Whether a watch of this writer exists.
    pub(super) fn has_watch(&self, writer: Writer) -> bool {
        let mut alive = self.listeners.iter().filter_map(Weak::upgrade);
        alive.any(|listener| listener.muted == writer && listener.event_fd.is_some())
    }

    pub(super) fn is_read(&self) -> bool {
        self.listeners.iter().any(|listener| listener.strong_count() > 0)
    }

    /// Notifies all listeners but the writer.
    pub(super) fn tell(&self, writer: Writer, written: &ChangeSet) {
        for listener in self.listeners.iter().filter_map(Weak::upgrade) {
            if listener.muted != writer {
                listener.tell(written);
            }
        }
    }
}

/// Wake-up of a file descriptor, on platforms that have file descriptors.
#[derive(Debug)]
pub(super) struct EventFd {
    #[cfg(unix)]
    rung: UnixStream,
    #[cfg(unix)]
    heard: UnixStream,
}

#[cfg(unix)]
impl EventFd {
    pub(super) fn new() -> io::Result<Self> {
        let (rung, heard) = UnixStream::pair()?;
        rung.set_nonblocking(true)?;
        heard.set_nonblocking(true)?;
        Ok(Self { rung, heard })
    }

    pub(super) fn signal(&self) {
        // If the buffer is full, the descriptor is already readable.
        let _full = (&self.rung).write(&[0]);
    }

    pub(super) fn clear(&self) {
        let mut rings = [0; 64];
        while (&self.heard).read(&mut rings).is_ok_and(|read| read > 0) {}
    }
}

#[cfg(unix)]
impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.heard.as_fd()
    }
}

#[cfg(not(unix))]
impl EventFd {
    #[expect(clippy::unnecessary_wraps, reason = "elsewhere it needs a descriptor")]
    pub(super) const fn new() -> io::Result<Self> {
        Ok(Self {})
    }

    #[expect(clippy::unused_self, reason = "elsewhere it has something to ring")]
    pub(super) const fn signal(&self) {}

    #[expect(clippy::unused_self, reason = "elsewhere it has something to hush")]
    pub(super) const fn clear(&self) {}
}
