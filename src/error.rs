//! What can go wrong between us and the kernel.

use std::fmt;

/// A request that the kernel refused, or an answer that was not one.
///
/// Its `Display` is one sentence: the request as an operator would type it, the kernel's error,
/// and the kernel's own words where it has any.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelError(Box<Inner>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Inner {
    request: String,
    cause: Cause,
    words: Option<String>,
    remedy: Option<&'static str>,
    holder: Option<u32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cause {
    Errno(i32),
    Answer(&'static str),
}

/// Error numbers of `asm-generic/errno*.h` that we look for.
#[cfg_attr(not(feature = "kernel"), allow(dead_code, reason = "the wire knows more of them"))]
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
    pub(crate) const ENFILE: i32 = 23;
    pub(crate) const ENOSPC: i32 = 28;
    pub(crate) const ERANGE: i32 = 34;
    pub(crate) const ERESTART: i32 = 85;
    pub(crate) const EMSGSIZE: i32 = 90;
    pub(crate) const EOPNOTSUPP: i32 = 95;
    pub(crate) const EADDRNOTAVAIL: i32 = 99;
    pub(crate) const ENETDOWN: i32 = 100;
    pub(crate) const ENOBUFS: i32 = 105;
    pub(crate) const EPROTONOSUPPORT: i32 = 93;
}

impl KernelError {
    /// The kernel answered this request with an error number (positive).
    pub fn refused(request: impl fmt::Display, errno: i32) -> Self {
        Self::with(request, Cause::Errno(errno))
    }

    /// The answer to this request could not be understood, or there was none.
    pub fn answer(request: impl fmt::Display, what: &'static str) -> Self {
        Self::with(request, Cause::Answer(what))
    }

    /// The system call under this request failed.
    #[cfg(all(feature = "kernel", target_os = "linux"))]
    pub(crate) fn io(request: impl fmt::Display, error: &std::io::Error) -> Self {
        match error.raw_os_error() {
            Some(errno) => Self::refused(request, errno),
            None => Self::answer(request, "the socket failed"),
        }
    }

    fn with(request: impl fmt::Display, cause: Cause) -> Self {
        let request = request.to_string();
        Self(Box::new(Inner { request, cause, words: None, remedy: None, holder: None }))
    }

    /// Adds the kernel's own words, from an extended acknowledgement.
    #[must_use]
    pub fn with_words(mut self, words: Option<String>) -> Self {
        self.0.words = words.filter(|words| !words.is_empty());
        self
    }

    /// Adds what the operator can do about it.
    #[must_use]
    pub fn with_remedy(mut self, remedy: &'static str) -> Self {
        self.0.remedy = Some(remedy);
        self
    }

    /// Adds who has what was asked for.
    #[cfg(all(feature = "kernel", target_os = "linux"))]
    #[must_use]
    #[cfg(all(feature = "kernel", target_os = "linux"))]
    pub(crate) fn with_holder(mut self, process: u32) -> Self {
        self.0.holder = Some(process);
        self.0.remedy = Some("stop that process, or leave this network namespace to it");
        self
    }

    /// The process that has what was asked for: the lock, or the nf_tables table.
    ///
    /// Of a table it is the port of its owner's netlink socket, which is the number of the process
    /// unless that has more than one.
    pub fn holder(&self) -> Option<u32> {
        self.0.holder
    }

    /// The request, as an operator would type it.
    pub fn request(&self) -> &str {
        &self.0.request
    }

    /// The kernel's error number, positive; `None` if the answer was not understood.
    pub fn errno(&self) -> Option<i32> {
        match self.0.cause {
            Cause::Errno(errno) => Some(errno),
            Cause::Answer(_) => None,
        }
    }

    /// The kernel's own words, if it had any.
    pub fn words(&self) -> Option<&str> {
        self.0.words.as_deref()
    }

    /// What the operator can do about it, where that is known.
    pub fn remedy(&self) -> Option<&'static str> {
        self.0.remedy.or(match self.errno()? {
            errno::EPERM | errno::EACCES => {
                Some("run with CAP_NET_ADMIN in the network namespace's user namespace")
            }
            errno::EPROTONOSUPPORT => Some("use a kernel built with CONFIG_NETFILTER_NETLINK"),
            _ => None,
        })
    }

    /// Whether the object did not exist.
    pub fn is_not_found(&self) -> bool {
        matches!(
            self.errno(),
            Some(errno::ENOENT | errno::ESRCH | errno::ENODEV | errno::EADDRNOTAVAIL)
        )
    }

    /// Whether the object existed already.
    pub fn is_exists(&self) -> bool {
        self.errno() == Some(errno::EEXIST)
    }

    /// Whether a privilege was missing.
    pub fn is_denied(&self) -> bool {
        matches!(self.errno(), Some(errno::EPERM | errno::EACCES))
    }

    /// Whether the same request may succeed when it is made again.
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
