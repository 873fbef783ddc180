//! The small values everything else is made of; their ranges and units live here.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::num::NonZeroU32;
use std::str::FromStr;

use ipnet::IpNet;

/// An IP version; every object of the kernel that carries addresses belongs to one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Family {
    /// Internet Protocol version 4.
    V4,
    /// Internet Protocol version 6.
    V6,
}

impl Family {
    /// Both families, IPv4 first.
    pub const BOTH: [Self; 2] = [Self::V4, Self::V6];

    /// The family of an address.
    pub const fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }

    /// The family of a prefix.
    pub const fn of_net(net: &IpNet) -> Self {
        match net {
            IpNet::V4(_) => Self::V4,
            IpNet::V6(_) => Self::V6,
        }
    }

    /// The address of all zeros.
    pub(crate) const fn unspecified(self) -> IpAddr {
        match self {
            Self::V4 => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            Self::V6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        }
    }

    /// 4 or 6, as names of kernel objects end.
    pub(crate) const fn digit(self) -> char {
        match self {
            Self::V4 => '4',
            Self::V6 => '6',
        }
    }

    /// Length of a full prefix in bits: 32 or 128.
    pub const fn bits(self) -> u8 {
        match self {
            Self::V4 => 32,
            Self::V6 => 128,
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

/// A firewall mark that routes a packet to one gateway node.
///
/// A plain number in host byte order; which of its bits are ours is said by the
/// [`MarkLayout`](crate::MarkLayout) it was made from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mark(u32);

impl Mark {
    /// Takes the number as it is.
    pub const fn new(value: u32) -> Self {
        Self(value)
    }

    /// The number.
    pub const fn get(self) -> u32 {
        self.0
    }
}

impl fmt::Display for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#010x}", self.0)
    }
}

#[cfg(feature = "serde")]
impl serde::Serialize for Mark {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(feature = "serde")]
impl<'de> serde::Deserialize<'de> for Mark {
    /// From text: `0x` and hexadecimal digits, or decimal digits.
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        crate::serde_forms::parsed(deserializer, |text| {
            let hexadecimal = text.strip_prefix("0x").map(|digits| (digits, 16));
            let (digits, radix) = hexadecimal.unwrap_or((text, 10));
            // `from_str_radix` takes a sign.
            let plain = Some(digits).filter(|digits| !digits.starts_with('+'));
            plain
                .and_then(|digits| u32::from_str_radix(digits, radix).ok())
                .map(Self)
                .ok_or("is not a mark: write 0x26000100, or a decimal number, of 32 bits")
        })
    }
}

/// A kernel routing table; never one of the kernel's own (0, 253, 254, 255).
///
/// Table ids are 32-bit numbers; there is no limit of 255 tables, and 0 means the main table
/// (`include/uapi/linux/rtnetlink.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TableId(NonZeroU32);

impl TableId {
    /// The table with this id, `None` if the id belongs to the kernel.
    ///
    /// ```
    /// use egress_datapath::TableId;
    /// assert!(TableId::new(3000).is_some());
    /// assert!(TableId::new(254).is_none(), "254 is the main table");
    /// ```
    pub const fn new(id: u32) -> Option<Self> {
        match id {
            253..=255 => None,
            _ => match NonZeroU32::new(id) {
                Some(id) => Some(Self(id)),
                None => None,
            },
        }
    }

    /// The id.
    pub const fn get(self) -> u32 {
        self.0.get()
    }
}

impl fmt::Display for TableId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Why a name was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NameError {
    /// Nothing was given.
    #[error("a {what} cannot be empty")]
    Empty {
        /// Kind of name.
        what: &'static str,
    },
    /// More bytes than the limit.
    #[error("a {what} has at most {limit} bytes, this one has {len}")]
    TooLong {
        /// Kind of name.
        what: &'static str,
        /// Bytes given.
        len: usize,
        /// Bytes allowed.
        limit: usize,
    },
    /// A character that has no place in such a name.
    #[error("a {what} cannot contain {found:?} (at byte {at})")]
    Character {
        /// Kind of name.
        what: &'static str,
        /// The character.
        found: char,
        /// Its byte offset.
        at: usize,
    },
}

fn check_name(
    text: &str,
    what: &'static str,
    limit: usize,
    allowed: impl Fn(char) -> bool,
) -> Result<(), NameError> {
    if text.is_empty() {
        return Err(NameError::Empty { what });
    }
    if text.len() > limit {
        return Err(NameError::TooLong { what, len: text.len(), limit });
    }
    match text.char_indices().find(|&(_, c)| !allowed(c)) {
        Some((at, found)) => Err(NameError::Character { what, found, at }),
        None => Ok(()),
    }
}

/// The characters of identifiers: those of Kubernetes names and of the usual ways to join them.
///
/// Quotes, `$`, `;`, blanks and control characters stay out, so an identifier can stand in a
/// comment that `nft` prints and reads back.
fn identifier(c: char) -> bool {
    c.is_ascii_alphanumeric() || "-_./:@+=,~#%".contains(c)
}

fn device(c: char) -> bool {
    c.is_ascii_graphic() && !"/:\"\\*%".contains(c)
}

macro_rules! name {
    ($(#[$doc:meta])* $name:ident, $what:literal, $limit:literal, $allowed:path) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
        #[cfg_attr(feature = "serde", serde(try_from = "String", into = "String"))]
        pub struct $name(Box<str>);

        impl $name {
            /// Checks the text and takes it.
            pub fn new(text: impl AsRef<str>) -> Result<Self, NameError> {
                let text = text.as_ref();
                check_name(text, $what, $limit, $allowed)?;
                Ok(Self(text.into()))
            }

            /// The text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl FromStr for $name {
            type Err = NameError;

            fn from_str(text: &str) -> Result<Self, NameError> {
                Self::new(text)
            }
        }

        impl TryFrom<&str> for $name {
            type Error = NameError;

            fn try_from(text: &str) -> Result<Self, NameError> {
                Self::new(text)
            }
        }

        impl TryFrom<String> for $name {
            type Error = NameError;

            fn try_from(text: String) -> Result<Self, NameError> {
                Self::new(text)
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> Self {
                name.0.into()
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }
    };
}

name! {
    /// Stable identity of a policy: 1 to 253 bytes of ASCII letters, digits and `-_./:@+=,~#%`.
    ///
    /// `namespace/name` fits. The kernel never sees it as a name of an object, only as a comment.
    PolicyId, "policy id", 253, identifier
}

name! {
    /// Name of a node of the cluster: 1 to 253 bytes of ASCII letters, digits and `-_./:@+=,~#%`.
    NodeName, "node name", 253, identifier
}

name! {
    /// Name of a network device: 1 to 15 bytes, no blank, slash, colon, quote or `*`.
    ///
    /// The limit is the kernel's `IFNAMSIZ` (`include/uapi/linux/if.h`); a trailing `*` is a
    /// wildcard to `nft`.
    DeviceName, "device name", 15, device
}

impl DeviceName {
    /// A name written in the source, which is known to be good.
    pub(crate) fn known(name: &'static str) -> Self {
        debug_assert!(Self::new(name).is_ok());
        Self(name.into())
    }
}

/// An Ethernet address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(try_from = "String", into = "String"))]
pub struct MacAddr([u8; 6]);

impl MacAddr {
    /// The address with these six bytes.
    pub const fn new(bytes: [u8; 6]) -> Self {
        Self(bytes)
    }

    /// The six bytes.
    pub const fn octets(self) -> [u8; 6] {
        self.0
    }

    /// A locally administered unicast address that depends on the node's name alone.
    ///
    /// The first byte is 0x66, the other five are the low bytes of the name's 64-bit FNV-1a hash,
    /// so that every node computes the same address for a peer.
    pub fn of_node(node: &NodeName) -> Self {
        let mut bytes = [0x66; 6];
        let hash = fnv1a(node.as_str().as_bytes()).to_be_bytes();
        bytes.iter_mut().skip(1).zip(hash.iter().skip(3)).for_each(|(byte, hash)| *byte = *hash);
        Self(bytes)
    }

    /// Whether a device can have the address: not zero and not a group address.
    pub fn is_unicast(self) -> bool {
        self.0 != [0; 6] && self.0[0] & 1 == 0
    }
}

/// The 64-bit FNV-1a hash: the same on every machine and in every version, and no more than that.
pub(crate) fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, byte) in self.0.iter().enumerate() {
            write!(f, "{}{byte:02x}", if index == 0 { "" } else { ":" })?;
        }
        Ok(())
    }
}

impl fmt::Debug for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A text that is not six pairs of hex digits joined by colons.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not an Ethernet address such as 66:f7:06:23:81:6b")]
pub struct ParseMacError(String);

impl FromStr for MacAddr {
    type Err = ParseMacError;

    fn from_str(text: &str) -> Result<Self, ParseMacError> {
        let error = || ParseMacError(text.chars().take(40).collect());
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().ok_or_else(error)?;
            if part.len() != 2 || !part.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(error());
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| error())?;
        }
        if parts.next().is_some() { Err(error()) } else { Ok(Self(bytes)) }
    }
}

impl TryFrom<String> for MacAddr {
    type Error = ParseMacError;

    fn try_from(text: String) -> Result<Self, ParseMacError> {
        text.parse()
    }
}

impl From<MacAddr> for String {
    fn from(mac: MacAddr) -> Self {
        mac.to_string()
    }
}
