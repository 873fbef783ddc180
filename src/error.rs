//! Errors of kernel requests and of applied changes.

use std::fmt;

use crate::types::MacAddr;

pub use crate::types::{NameError, ParseMacError};

/// An error of a kernel request: the kernel refused it, or its reply could not be understood.
///
/// `Display` writes one sentence: the request as an operator would type it, the kernel's error, and
/// the message of its extended acknowledgement where there is one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelError(Box<Inner>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Inner {
    request: String,
    cause: Cause,
    words: Option<String>,
    remedy: Option<&'static str>,
    holder: Option<u32>,
    duplicate: Option<MacAddr>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cause {
    Errno(i32),
    Answer(&'static str),
}

/// The kernel's error numbers.
#[cfg(all(feature = "kernel", target_os = "linux"))]
pub(crate) mod errno {
    pub(crate) use libc::{
        EACCES, EADDRINUSE, EADDRNOTAVAIL, EAFNOSUPPORT, EAGAIN, EBUSY, EEXIST, EINTR, EINVAL,
        EMSGSIZE, ENETDOWN, ENFILE, ENOBUFS, ENODEV, ENOENT, ENOSPC, EOPNOTSUPP, EPERM,
        EPROTONOSUPPORT, ERANGE, ERESTART, ESRCH,
    };
}

/// The error numbers of `asm-generic/errno*.h`, for a build without the kernel backend.
#[cfg(not(all(feature = "kernel", target_os = "linux")))]
pub(crate) mod errno {
    pub(crate) const EPERM: i32 = 1;
    pub(crate) const ENOENT: i32 = 2;
    pub(crate) const ESRCH: i32 = 3;
    pub(crate) const EINTR: i32 = 4;
    pub(crate) const EAGAIN: i32 = 11;
    pub(crate) const EACCES: i32 = 13;
    pub(crate) const EBUSY: i32 = 16;
    pub(crate) const EEXIST: i32 = 17;
    pub(crate) const ENODEV: i32 = 19;
    pub(crate) const EINVAL: i32 = 22;
    pub(crate) const ENOSPC: i32 = 28;
    pub(crate) const ERANGE: i32 = 34;
    pub(crate) const ERESTART: i32 = 85;
    pub(crate) const EPROTONOSUPPORT: i32 = 93;
    pub(crate) const EOPNOTSUPP: i32 = 95;
    pub(crate) const EAFNOSUPPORT: i32 = 97;
    pub(crate) const EADDRNOTAVAIL: i32 = 99;
    pub(crate) const ENETDOWN: i32 = 100;
    pub(crate) const ENOBUFS: i32 = 105;
}

impl KernelError {
    /// Creates the error of a request that the kernel refused with an error number (positive).
    pub fn refused(request: impl fmt::Display, errno: i32) -> Self {
        Self::with(request, Cause::Errno(errno))
    }

    /// Creates the error of a request whose reply was missing or could not be understood.
    pub fn answer(request: impl fmt::Display, what: &'static str) -> Self {
        Self::with(request, Cause::Answer(what))
    }

    /// Creates the error of a request whose system call failed.
    #[cfg(all(feature = "kernel", target_os = "linux"))]
    pub(crate) fn io(request: impl fmt::Display, error: &std::io::Error) -> Self {
        match error.raw_os_error() {
            Some(errno) => Self::refused(request, errno),
            None => Self::answer(request, "the socket failed"),
        }
    }

    fn with(request: impl fmt::Display, cause: Cause) -> Self {
        let request = request.to_string();
        Self(Box::new(Inner {
            request,
            cause,
            words: None,
            remedy: None,
            holder: None,
            duplicate: None,
        }))
    }

    /// Names another request: of several in one message that which the kernel refused.
    #[cfg(all(feature = "kernel", target_os = "linux"))]
    #[must_use]
    pub(crate) fn with_request(mut self, request: impl fmt::Display) -> Self {
        self.0.request = request.to_string();
        self
    }

    /// Adds the kernel's message from an extended acknowledgement.
    #[must_use]
    pub fn with_words(mut self, words: Option<String>) -> Self {
        self.0.words = words.filter(|words| !words.is_empty());
        self
    }

    /// Adds the remedy: what the operator can do about the error.
    #[must_use]
    pub fn with_remedy(mut self, remedy: &'static str) -> Self {
        self.0.remedy = Some(remedy);
        self
    }

    /// Adds the process that holds the requested object.
    #[cfg(all(feature = "kernel", target_os = "linux"))]
    #[must_use]
    pub(crate) fn with_holder(mut self, process: u32) -> Self {
        self.0.holder = Some(process);
        self.0.remedy = Some("stop that process, or leave this network namespace to it");
        self
    }

    /// Returns the process that holds the requested object: the lock, or the nf_tables table.
    ///
    /// It is the PID that a datapath of this crate writes into its lock. Of another owner of the
    /// table it is the port id of the netlink socket: the PID, unless the process has more than one
    /// such socket.
    pub fn holder(&self) -> Option<u32> {
        self.0.holder
    }

    /// Adds the MAC address of the host that has the requested address.
    #[cfg(all(feature = "kernel", target_os = "linux"))]
    #[must_use]
    pub(crate) fn with_duplicate(mut self, mac: MacAddr) -> Self {
        self.0.words = Some(format!("the host with MAC address {mac} has the address"));
        self.0.remedy = Some("release the address there first, or choose another egress IP");
        self.0.duplicate = Some(mac);
        self
    }

    /// Returns the MAC address of the host that already has the egress IP to be claimed.
    pub fn duplicate(&self) -> Option<MacAddr> {
        self.0.duplicate
    }

    /// Returns the request, as an operator would type it.
    pub fn request(&self) -> &str {
        &self.0.request
    }

    /// Returns the kernel's error number, positive; `None` if the reply was not understood.
    pub fn errno(&self) -> Option<i32> {
        match self.0.cause {
            Cause::Errno(errno) => Some(errno),
            Cause::Answer(_) => None,
        }
    }

    /// Returns the kernel's message from the extended acknowledgement, if there was one.
    pub fn words(&self) -> Option<&str> {
        self.0.words.as_deref()
    }

    /// Returns the remedy, what the operator can do about the error, where one is known.
    pub fn remedy(&self) -> Option<&'static str> {
        self.0.remedy.or(match self.errno()? {
            errno::EPERM | errno::EACCES => {
                Some("run with CAP_NET_ADMIN in the network namespace's user namespace")
            }
            errno::EPROTONOSUPPORT => Some("use a kernel built with CONFIG_NETFILTER_NETLINK"),
            _ => None,
        })
    }

    /// Returns whether the object did not exist.
    pub fn is_not_found(&self) -> bool {
        matches!(
            self.errno(),
            Some(errno::ENOENT | errno::ESRCH | errno::ENODEV | errno::EADDRNOTAVAIL)
        )
    }

    /// Returns whether the object already existed.
    pub fn is_exists(&self) -> bool {
        self.errno() == Some(errno::EEXIST)
    }

    /// Returns whether a privilege was missing.
    pub fn is_denied(&self) -> bool {
        matches!(self.errno(), Some(errno::EPERM | errno::EACCES))
    }

    /// Returns whether the same request may succeed if it is repeated.
    pub fn is_transient(&self) -> bool {
        matches!(
            self.errno(),
            Some(errno::EINTR | errno::EAGAIN | errno::EBUSY | errno::ERESTART | errno::ENOBUFS)
        )
    }
}

impl fmt::Display for KernelError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.0.request)?;
        match self.0.cause {
            Cause::Errno(errno) => std::io::Error::from_raw_os_error(errno).fmt(f)?,
            Cause::Answer(what) => f.write_str(what)?,
        }
        if let Some(words) = &self.0.words {
            write!(f, " ({words})")?;
        }
        if let Some(holder) = self.0.holder {
            write!(f, ", held by process {holder}")?;
        }
        if let Some(remedy) = self.remedy() {
            write!(f, "; {remedy}")?;
        }
        Ok(())
    }
}

impl std::error::Error for KernelError {}
