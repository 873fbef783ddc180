//! Reader of netlink messages and attributes.

use netlink_packet_core::NLA_TYPE_MASK;

use super::{HEADER, Malformed, align, flag};

fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

/// Iterator over the messages of one datagram; ends after the first malformed one.
#[derive(Clone, Debug)]
pub(crate) struct Messages<'a>(&'a [u8]);

/// Netlink message.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Message<'a> {
    pub(crate) kind: u16,
    pub(crate) flags: u16,
    pub(crate) sequence: u32,
    payload: &'a [u8],
}

impl<'a> Messages<'a> {
    pub(crate) const fn new(datagram: &'a [u8]) -> Self {
        Self(datagram)
    }

    fn split(&self) -> Option<(Message<'a>, &'a [u8])> {
        let bytes = self.0;
        let length = usize::try_from(u32::from_ne_bytes(array(bytes, 0)?)).ok()?;
        let message = Message {
            kind: u16::from_ne_bytes(array(bytes, 4)?),
            flags: u16::from_ne_bytes(array(bytes, 6)?),
            sequence: u32::from_ne_bytes(array(bytes, 8)?),
            payload: bytes.get(HEADER..length)?,
        };
        Some((message, bytes.get(align(length)..).unwrap_or_default()))
    }
}

impl<'a> Iterator for Messages<'a> {
    type Item = Result<Message<'a>, Malformed>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let split = self.split();
        self.0 = split.map_or(&[], |(_, rest)| rest);
        Some(match split {
            Some((message, _)) => Ok(message),
            None => Err(Malformed("a message has a wrong length")),
        })
    }
}

impl<'a> Message<'a> {
    /// Bytes behind the header.
    pub(crate) const fn payload(&self) -> &'a [u8] {
        self.payload
    }

    /// Resource id of a netfilter message, and the bytes behind `struct nfgenmsg`.
    pub(crate) fn nfgen(&self) -> Result<(u16, &'a [u8]), Malformed> {
        let split = || Some((array(self.payload, 2)?, self.payload.get(4..)?));
        match split() {
            Some((resource, rest)) => Ok((u16::from_be_bytes(resource), rest)),
            None => Err(Malformed("a netfilter message has no header")),
        }
    }
}

/// Iterator over consecutive attributes; ends after the first malformed one.
#[derive(Clone, Debug)]
pub(crate) struct Attributes<'a>(&'a [u8]);

/// Netlink attribute.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Attribute<'a> {
    pub(crate) kind: u16,
    bytes: &'a [u8],
}

impl<'a> Attributes<'a> {
    pub(crate) const fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    fn split(&self) -> Option<(Attribute<'a>, &'a [u8])> {
        let bytes = self.0;
        let length = usize::from(u16::from_ne_bytes(array(bytes, 0)?));
        let attribute = Attribute {
            kind: u16::from_ne_bytes(array(bytes, 2)?) & NLA_TYPE_MASK,
            bytes: bytes.get(4..length)?,
        };
        Some((attribute, bytes.get(align(length)..).unwrap_or_default()))
    }
}

impl<'a> Iterator for Attributes<'a> {
    type Item = Result<Attribute<'a>, Malformed>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let split = self.split();
        self.0 = split.map_or(&[], |(_, rest)| rest);
        Some(match split {
            Some((attribute, _)) => Ok(attribute),
            None => Err(Malformed("an attribute has a wrong length")),
        })
    }
}

impl<'a> Attribute<'a> {
    pub(crate) const fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// Nested attributes.
    pub(crate) const fn nested(&self) -> Attributes<'a> {
        Attributes(self.bytes)
    }

    fn exact<const N: usize>(&self) -> Result<[u8; N], Malformed> {
        let value = self.bytes.try_into();
        value.map_err(|_| Malformed("a number has a wrong length"))
    }

    /// 32-bit number in network byte order.
    pub(crate) fn be32(&self) -> Result<u32, Malformed> {
        self.exact().map(u32::from_be_bytes)
    }

    /// 64-bit number in network byte order.
    pub(crate) fn be64(&self) -> Result<u64, Malformed> {
        self.exact().map(u64::from_be_bytes)
    }

    /// 32-bit number in native byte order.
    pub(crate) fn u32(&self) -> Result<u32, Malformed> {
        self.exact().map(u32::from_ne_bytes)
    }

    /// String, with or without its terminating NUL.
    pub(crate) fn text(&self) -> Result<&'a str, Malformed> {
        let bytes = self.bytes.strip_suffix(&[0]).unwrap_or(self.bytes);
        std::str::from_utf8(bytes).map_err(|_| Malformed("a name is not UTF-8"))
    }

    /// Whether the value is this string.
    pub(crate) fn is(&self, text: &str) -> bool {
        trim(self.bytes) == text.as_bytes()
    }
}

/// Acknowledgement of one request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Ack {
    /// Error number, positive; 0 for success.
    pub(crate) errno: i32,
    /// Offset of the refused attribute in the request, counted from the request's header.
    pub(crate) offset: Option<usize>,
    /// Error message of the kernel (extended acknowledgement).
    pub(crate) words: Option<String>,
}

impl Ack {
    /// Parses a message of type `NLMSG_ERROR` or `NLMSG_DONE`.
    pub(crate) fn read(message: &Message<'_>) -> Result<Self, Malformed> {
        let payload = message.payload();
        let code = array(payload, 0).map(i32::from_ne_bytes);
        let mut ack = Self {
            errno: code
                .ok_or(Malformed("an acknowledgement has no error number"))?
                .checked_neg()
                .unwrap_or(i32::MAX),
            offset: None,
            words: None,
        };
        if message.flags & flag::ACK_TLVS == 0 {
            return Ok(ack);
        }
        let echo = if message.kind == super::NLMSG_DONE {
            0
        } else if message.flags & flag::CAPPED == 0 && ack.errno != 0 {
            let length = array(payload, 4).map_or(0, u32::from_ne_bytes);
            align(usize::try_from(length).unwrap_or(usize::MAX))
        } else {
            HEADER
        };
        let tail = payload.get(echo.saturating_add(4)..).unwrap_or_default();
        for attribute in Attributes::new(tail) {
            let attribute = attribute?;
            match attribute.kind {
                1 => ack.words = Some(String::from_utf8_lossy(trim(attribute.bytes)).into()),
                2 => ack.offset = usize::try_from(attribute.u32()?).ok(),
                _ => {}
            }
        }
        Ok(ack)
    }
}

fn trim(bytes: &[u8]) -> &[u8] {
    bytes.strip_suffix(&[0]).unwrap_or(bytes)
}
