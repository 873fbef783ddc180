//! Classic BPF instructions for socket filters (`linux/bpf_common.h`).

use socket2::SockFilter;

// Offsets in a message, `struct nlmsghdr`.
pub(crate) const LENGTH: u32 = 0;
pub(crate) const TYPE: u32 = 4;
pub(crate) const FLAGS: u32 = 6;
pub(crate) const SEQUENCE: u32 = 8;
pub(crate) const PORT: u32 = 12;

const fn plain(code: u16, value: u32) -> SockFilter {
    SockFilter::new(code, 0, 0, value)
}

pub(crate) const fn word(offset: u32) -> SockFilter {
    plain(0x20, offset)
}

pub(crate) const fn half(offset: u32) -> SockFilter {
    plain(0x28, offset)
}

pub(crate) const fn byte(offset: u32) -> SockFilter {
    plain(0x30, offset)
}

pub(crate) const fn is(value: u32, yes: u8, no: u8) -> SockFilter {
    SockFilter::new(0x15, yes, no, value)
}

pub(crate) const fn at_least(value: u32, yes: u8, no: u8) -> SockFilter {
    SockFilter::new(0x35, yes, no, value)
}

pub(crate) const fn has(bits: u32, yes: u8, no: u8) -> SockFilter {
    SockFilter::new(0x45, yes, no, bits)
}

/// Copies the accumulator to the index register, for [`is_the_same`].
pub(crate) const PUT_ASIDE: SockFilter = plain(0x07, 0);

/// Compares the accumulator to the index register.
pub(crate) const fn is_the_same(yes: u8, no: u8) -> SockFilter {
    SockFilter::new(0x1d, yes, no, 0)
}

pub(crate) const ACCEPT: SockFilter = plain(0x06, u32::MAX);
pub(crate) const DROP: SockFilter = plain(0x06, 0);

/// Constant to compare with a loaded field of a header.
///
/// A filter loads every field as big-endian; headers are in native byte order.
pub(crate) fn as_loaded(value: u16) -> u32 {
    u32::from(u16::from_be_bytes(value.to_ne_bytes()))
}

#[cfg(test)]
pub(crate) mod tests {
    use std::os::unix::net::UnixDatagram;

    use socket2::SockRef;

    use super::*;

    /// Whether a socket with this filter receives these bytes.
    pub(crate) fn run(program: &[SockFilter], bytes: &[u8]) -> bool {
        let (here, there) = UnixDatagram::pair().unwrap();
        there.set_nonblocking(true).unwrap();
        SockRef::from(&there).attach_filter(program).unwrap();
        // For a datagram that the filter drops, the sender gets success or EPERM.
        let _dropped = here.send(bytes);
        there.recv(&mut [0]).is_ok()
    }
}
