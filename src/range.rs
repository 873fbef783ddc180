//! Closed ranges of addresses, the form in which the kernel's interval sets store prefixes.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use crate::types::Family;

/// A closed range of addresses of one family, from the first to the last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IpRange {
    first: IpAddr,
    last: IpAddr,
}

impl IpRange {
    /// Creates a range; `None` if the families differ or `first` is greater than `last`.
    pub fn new(first: IpAddr, last: IpAddr) -> Option<Self> {
        (Family::of(first) == Family::of(last) && first <= last).then_some(Self { first, last })
    }

    /// Creates the range from an address to the last address of its family.
    pub(crate) const fn from_to_end(first: IpAddr) -> Self {
        let last = match first {
            IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::BROADCAST),
            IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::from_bits(u128::MAX)),
        };
        Self { first, last }
    }

    /// Returns the lowest address.
    pub const fn first(&self) -> IpAddr {
        self.first
    }

    /// Returns the highest address.
    pub const fn last(&self) -> IpAddr {
        self.last
    }

    /// Returns the family of both ends.
    pub const fn family(&self) -> Family {
        Family::of(self.first)
    }

    /// Returns whether the address lies in the range.
    pub fn contains(&self, address: IpAddr) -> bool {
        Family::of(address) == self.family() && self.first <= address && address <= self.last
    }
}

impl From<IpNet> for IpRange {
    fn from(net: IpNet) -> Self {
        Self { first: net.network(), last: net.broadcast() }
    }
}

impl fmt::Display for IpRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last {
            return self.first.fmt(f);
        }
        let common = number(self.first) ^ number(self.last);
        let bits = u32::from(self.family().bits());
        let host = 128 - common.leading_zeros();
        let low = number(self.first).trailing_zeros().min(bits);
        let high = (!number(self.last)).trailing_zeros().min(bits);
        if low >= host && high >= host {
            write!(f, "{}/{}", self.first, bits - host)
        } else {
            write!(f, "{}-{}", self.first, self.last)
        }
    }
}

/// Converts an address to a number, for arithmetic.
pub(crate) fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => u128::from(v4.to_bits()),
        IpAddr::V6(v6) => v6.to_bits(),
    }
}

/// Converts a number to an address; `None` if it is out of range for the family.
pub(crate) fn address(family: Family, number: u128) -> Option<IpAddr> {
    match family {
        Family::V4 => u32::try_from(number).ok().map(|n| Ipv4Addr::from_bits(n).into()),
        Family::V6 => Some(Ipv6Addr::from_bits(number).into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_that_is_a_prefix_prints_as_one() {
        for text in ["10.0.0.0/8", "0.0.0.0/0", "::/0", "fd00::/16", "8000::/1"] {
            assert_eq!(IpRange::from(text.parse::<IpNet>().unwrap()).to_string(), text);
        }
        let range = |a: &str, b: &str| IpRange::new(a.parse().unwrap(), b.parse().unwrap());
        assert_eq!(range("10.0.0.1", "10.0.0.1").unwrap().to_string(), "10.0.0.1");
        assert_eq!(range("10.0.0.0", "10.0.0.6").unwrap().to_string(), "10.0.0.0-10.0.0.6");
        assert_eq!(range("10.0.0.1", "10.0.0.2").unwrap().to_string(), "10.0.0.1-10.0.0.2");
        assert_eq!(range("10.0.0.2", "10.0.0.1"), None);
        assert_eq!(range("10.0.0.2", "::1"), None);
    }
}
