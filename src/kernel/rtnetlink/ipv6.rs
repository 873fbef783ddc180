//! The setting that disables IPv6 on an interface, which no netlink message can change.
//!
//! `/proc/sys/net` shows the network namespace of the thread that opens a file below it. A socket
//! may be used by a thread in another namespace, so that every access compares the two.

use std::fmt::Display;
use std::fs::{self, OpenOptions};
use std::os::linux::fs::MetadataExt;

use crate::error::KernelError;

/// Name of the settings that new interfaces inherit.
pub(super) const DEFAULT: &str = "default";

/// Access to the settings of one network namespace.
#[derive(Clone, Copy, Debug)]
pub(super) struct Settings {
    /// Inode number of the namespace, which identifies it; `None` without `/proc`.
    namespace: Option<u64>,
    /// Whether new interfaces had IPv6 enabled when this was made.
    default: bool,
}

impl Settings {
    /// The settings of the calling thread's network namespace.
    pub(super) fn of_thread() -> Self {
        Self { namespace: namespace(), default: is_default() }
    }

    pub(super) fn are_of_thread(self) -> bool {
        self.namespace.is_some() && namespace() == self.namespace
    }

    /// Whether new interfaces have IPv6 enabled, as far as it can be read.
    pub(super) fn is_default(self) -> bool {
        if self.are_of_thread() { is_default() } else { self.default }
    }

    /// Whether this thread may enable IPv6 on an interface.
    pub(super) fn can_enable(self, device: &str) -> bool {
        self.are_of_thread() && OpenOptions::new().write(true).open(path(device)).is_ok()
    }

    /// Enables IPv6 on an interface.
    pub(super) fn enable(self, what: &dyn Display, device: &str) -> Result<(), KernelError> {
        if !self.are_of_thread() {
            return Err(KernelError::answer(
                what,
                "IPv6 is disabled on the interface, and the calling thread is in another network \
                 namespace than the socket",
            ));
        }
        fs::write(path(device), "0").map_err(|error| KernelError::io(what, &error))
    }
}

fn namespace() -> Option<u64> {
    Some(fs::metadata("/proc/thread-self/ns/net").ok()?.st_ino())
}

fn is_default() -> bool {
    !fs::read_to_string(path(DEFAULT)).is_ok_and(|text| text.trim() != "0")
}

fn path(device: &str) -> String {
    format!("/proc/sys/net/ipv6/conf/{device}/disable_ipv6")
}
