//! Writer of netlink messages and attributes.

use netlink_packet_core::{NLA_F_NESTED, NLA_HEADER_SIZE};

use super::{HEADER, align};

/// Offset of the flag byte that contains `NLM_F_ACK`.
const FLAGS: usize = if cfg!(target_endian = "little") { 6 } else { 7 };
const ACK: u8 = 4;

/// Writes one message after another into one datagram.
///
/// A length that does not fit its field is never written truncated: [`Writer::finish`] then returns
/// `None`.
#[derive(Debug, Default)]
pub(crate) struct Writer {
    bytes: Vec<u8>,
    overflow: bool,
}

/// Start of a message or attribute whose length is written when it ends.
#[derive(Clone, Copy, Debug)]
#[must_use]
pub(crate) struct Open(usize);

impl Writer {
    /// Creates a writer with capacity for about this many bytes.
    pub(crate) fn with_capacity(bytes: usize) -> Self {
        Self { bytes: Vec::with_capacity(bytes), overflow: false }
    }

    /// Starts a message.
    pub(crate) fn message(&mut self, kind: u16, flags: u16, sequence: u32) -> Open {
        let open = Open(self.bytes.len());
        self.raw(&0_u32.to_ne_bytes());
        self.raw(&kind.to_ne_bytes());
        self.raw(&flags.to_ne_bytes());
        self.raw(&sequence.to_ne_bytes());
        // The kernel fills in the port.
        self.raw(&0_u32.to_ne_bytes());
        debug_assert_eq!(self.bytes.len() - open.0, HEADER);
        open
    }

    /// Ends a message.
    pub(crate) fn end(&mut self, open: Open) {
        let length = u32::try_from(self.bytes.len() - open.0);
        self.overflow |= length.is_err();
        self.patch(open.0, &length.unwrap_or_default().to_ne_bytes());
    }

    /// Requests an acknowledgement of a message.
    pub(crate) fn demand_ack(&mut self, open: Open) {
        if let Some(low) = self.bytes.get_mut(open.0 + FLAGS) {
            *low |= ACK;
        }
    }

    /// Writes `struct nfgenmsg`, the header of every netfilter message.
    pub(crate) fn nfgen(&mut self, family: u8, resource: u16) {
        self.raw(&[family, 0]);
        self.raw(&resource.to_be_bytes());
    }

    /// Writes an attribute with these bytes.
    #[inline]
    pub(crate) fn attribute(&mut self, kind: u16, value: &[u8]) {
        let length = u16::try_from(NLA_HEADER_SIZE + value.len());
        self.overflow |= length.is_err();
        self.header(length.unwrap_or_default(), kind);
        self.raw(value);
        if value.len() != align(value.len()) {
            self.bytes.resize(align(self.bytes.len()), 0);
        }
    }

    /// Writes an attribute with a 32-bit number in network byte order, as netfilter uses.
    pub(crate) fn be32(&mut self, kind: u16, value: u32) {
        self.attribute(kind, &value.to_be_bytes());
    }

    /// Writes an attribute with a string and its terminating NUL.
    pub(crate) fn string(&mut self, kind: u16, value: &str) {
        let mut bytes = Vec::with_capacity(value.len() + 1);
        bytes.extend_from_slice(value.as_bytes());
        bytes.push(0);
        self.attribute(kind, &bytes);
    }

    /// Writes an attribute that contains the attributes written by `inside`.
    #[inline]
    pub(crate) fn nest(&mut self, kind: u16, inside: impl FnOnce(&mut Self)) {
        let open = self.open(kind);
        inside(self);
        self.close(open);
    }

    /// Starts an attribute that contains nested attributes.
    #[inline]
    pub(crate) fn open(&mut self, kind: u16) -> Open {
        let open = Open(self.bytes.len());
        self.header(0, kind | NLA_F_NESTED);
        open
    }

    /// Writes `struct nlattr`, the header of an attribute.
    #[inline]
    fn header(&mut self, length: u16, kind: u16) {
        let ([a, b], [c, d]) = (length.to_ne_bytes(), kind.to_ne_bytes());
        self.raw(&[a, b, c, d]);
    }

    /// Ends an attribute that contains nested attributes.
    #[inline]
    pub(crate) fn close(&mut self, open: Open) {
        let length = u16::try_from(self.since(open));
        self.overflow |= length.is_err();
        self.patch(open.0, &length.unwrap_or_default().to_ne_bytes());
    }

    /// Number of bytes written since the start of a message or attribute.
    #[inline]
    pub(crate) fn since(&self, open: Open) -> usize {
        self.bytes.len() - open.0
    }

    /// Writes bytes unchanged.
    #[inline]
    pub(crate) fn raw(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// Bytes written so far.
    #[cfg(test)]
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Finished datagram; `None` if a length did not fit its field.
    pub(crate) fn finish(self) -> Option<Vec<u8>> {
        (!self.overflow).then_some(self.bytes)
    }

    #[inline]
    fn patch(&mut self, at: usize, value: &[u8]) {
        if let Some(slot) = self.bytes.get_mut(at..at + value.len()) {
            slot.copy_from_slice(value);
        }
    }
}
