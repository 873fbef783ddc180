//! Basic value types with their ranges and units: families, marks, tables, names, MAC addresses.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::num::NonZeroU32;
use std::str::FromStr;

use ipnet::IpNet;

/// An IP version.
///
/// Every kernel object that carries addresses belongs to one.
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

    /// Returns the family of an address.
    pub const fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }

    /// Returns the family of a prefix.
    pub const fn of_net(net: &IpNet) -> Self {
        match net {
            IpNet::V4(_) => Self::V4,
            IpNet::V6(_) => Self::V6,
        }
    }

    /// Returns the unspecified address: all zeros.
    pub(crate) const fn unspecified(self) -> IpAddr {
        match self {
            Self::V4 => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            Self::V6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        }
    }

    /// Returns 4 or 6, the last character of the names of kernel objects of this family.
    pub(crate) const fn digit(self) -> char {
        match self {
            Self::V4 => '4',
            Self::V6 => '6',
        }
    }

    /// Returns the length of a host prefix in bits: 32 or 128.
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
/// A plain number in host byte order. The [`MarkLayout`](crate::MarkLayout) that it was made from
/// says which of its bits belong to this crate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mark(u32);

impl Mark {
    /// Creates a mark from a number, unchanged.
    pub const fn new(value: u32) -> Self {
        Self(value)
    }

    /// Returns the number.
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

/// The id of a kernel routing table, never one of the kernel's own (0, 253, 254, 255).
///
/// Table ids are 32-bit numbers: there is no limit of 255 tables, and 0 means the main table
/// (`include/uapi/linux/rtnetlink.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TableId(NonZeroU32);

impl TableId {
    /// Returns the table with this id, or `None` if the id belongs to the kernel.
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

    /// Returns the id.
    pub const fn get(self) -> u32 {
        self.0.get()
    }
}

impl fmt::Display for TableId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The reason why a name was rejected.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NameError {
    /// The name is empty.
    #[error("a {what} cannot be empty")]
    Empty {
        /// Kind of name.
        what: &'static str,
    },
    /// The name has more bytes than the limit.
    #[error("a {what} has at most {limit} bytes, this one has {len}")]
    TooLong {
        /// Kind of name.
        what: &'static str,
        /// Bytes given.
        len: usize,
        /// Bytes allowed.
        limit: usize,
    },
    /// The name has a character that is not allowed.
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

/// Allowed characters of identifiers: those of Kubernetes names and of the usual ways to join them.
///
/// Quotes, `$`, `;`, blanks and control characters are excluded, so that an identifier can stand in
/// a comment that `nft` prints and reads back.
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
            /// Checks the text and creates the name.
            pub fn new(text: impl AsRef<str>) -> Result<Self, NameError> {
                let text = text.as_ref();
                check_name(text, $what, $limit, $allowed)?;
                Ok(Self(text.into()))
            }

            /// Returns the text.
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
    /// Stable identity of a policy: 1 to 317 bytes of ASCII letters, digits and `-_./:@+=,~#%`.
    ///
    /// Every `namespace/name` of Kubernetes is valid: 63 and 253 bytes, and the slash. The kernel sees
    /// the id only as a comment, never as the name of an object.
    PolicyId, "policy id", 317, identifier
}

name! {
    /// Name of a node of the cluster: 1 to 253 bytes of ASCII letters, digits and `-_./:@+=,~#%`.
    NodeName, "node name", 253, identifier
}

name! {
    /// Name of a network interface: 1 to 15 bytes, no blank, slash, colon, quote or `*`.
    ///
    /// The limit is the kernel's `IFNAMSIZ` (`include/uapi/linux/if.h`). A trailing `*` is a
    /// wildcard to `nft`.
    DeviceName, "device name", 15, device
}

impl NodeName {
    /// Creates a name from a literal that is known to be valid.
    pub(crate) fn known(name: &'static str) -> Self {
        debug_assert!(Self::new(name).is_ok());
        Self(name.into())
    }
}

impl DeviceName {
    /// Creates a name from a literal that is known to be valid.
    pub(crate) fn known(name: &'static str) -> Self {
        debug_assert!(Self::new(name).is_ok());
        Self(name.into())
    }
}

/// A MAC address (Ethernet address).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(try_from = "String", into = "String"))]
pub struct MacAddr([u8; 6]);

impl MacAddr {
    /// Creates the address from its six bytes.
    pub const fn new(bytes: [u8; 6]) -> Self {
        Self(bytes)
    }

    /// Returns the six bytes.
    pub const fn octets(self) -> [u8; 6] {
        self.0
    }

    /// Derives a locally administered unicast address from the node's name alone.
    ///
    /// The first byte is 0x66, the other five are the low bytes of the 64-bit FNV-1a hash of the
    /// name, so that every node computes the same address for a peer.
    pub fn of_node(node: &NodeName) -> Self {
        let mut bytes = [0x66; 6];
        let hash = fnv1a(node.as_str().as_bytes()).to_be_bytes();
        bytes.iter_mut().skip(1).zip(hash.iter().skip(3)).for_each(|(byte, hash)| *byte = *hash);
        Self(bytes)
    }

    /// Returns whether an interface can have the address: not zero and not a group address.
    pub fn is_unicast(self) -> bool {
        self.0 != [0; 6] && self.0[0] & 1 == 0
    }
}

/// The 64-bit FNV-1a hash: stable over machines and versions, and not cryptographic.
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

/// An error for text that is not six pairs of hex digits joined by colons.
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
