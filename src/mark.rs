//! The layout of firewall marks: the bits of a 32-bit packet mark that this crate uses.

use crate::state::MarkBits;
use crate::types::Mark;

/// The layout of firewall marks: the bits that this crate uses, and how they encode a gateway.
///
/// A mark is `prefix | value << shift`. Two values of the same bits are reserved and never
/// allocated to a gateway: [`tunnel`](Self::tunnel) for packets that this node must translate, and
/// one for packets that are dropped when they are forwarded.
///
/// ```
/// use egress_datapath::{Mark, MarkLayout};
/// let layout = MarkLayout::SEED;
/// assert_eq!(layout.mark(1), Some(Mark::new(0x2600_0100)));
/// assert_eq!(layout.mask(), 0xffff_ff00);
/// assert_eq!(layout.capacity(), 65_536);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(try_from = "Form"))]
pub struct MarkLayout {
    #[cfg_attr(feature = "serde", serde(serialize_with = "as_mark"))]
    prefix: u32,
    #[cfg_attr(feature = "serde", serde(serialize_with = "as_mark"))]
    prefix_mask: u32,
    shift: u8,
    bits: u8,
    #[cfg_attr(feature = "serde", serde(serialize_with = "as_mark"))]
    avoid: u32,
}

#[cfg(feature = "serde")]
#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
fn as_mark<S: serde::Serializer>(bits: &u32, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&Mark::new(*bits))
}

/// The serialized form of a [`MarkLayout`].
#[cfg(feature = "serde")]
#[derive(serde::Deserialize)]
#[serde(rename = "MarkLayout", deny_unknown_fields)]
struct Form {
    prefix: Mark,
    prefix_mask: Mark,
    shift: u8,
    bits: u8,
    #[serde(default = "known_foreign")]
    avoid: Mark,
}

#[cfg(feature = "serde")]
const fn known_foreign() -> Mark {
    Mark::new(MarkLayout::KNOWN_FOREIGN)
}

#[cfg(feature = "serde")]
impl TryFrom<Form> for MarkLayout {
    type Error = LayoutError;

    fn try_from(form: Form) -> Result<Self, LayoutError> {
        let (prefix, mask) = (form.prefix.get(), form.prefix_mask.get());
        Ok(Self::new(prefix, mask, form.shift, form.bits)?.with_avoid(form.avoid.get()))
    }
}

/// The reason why a mark layout was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LayoutError {
    /// The value has bits above bit 31, no bits, or more than 16 bits.
    #[error(
        "{bits} value bits at bit {shift} do not fit: a layout has 1 to 16 of them below bit 32"
    )]
    Field {
        /// Lowest bit of the value.
        shift: u8,
        /// Number of value bits.
        bits: u8,
    },
    /// The prefix has bits outside its mask, so that no packet could ever match it.
    #[error("prefix {prefix:#010x} has bits outside its mask {mask:#010x}")]
    PrefixOutsideMask {
        /// The prefix.
        prefix: u32,
        /// Its mask.
        mask: u32,
    },
    /// The prefix is zero and its mask is not: unmarked packets would match it.
    #[error("a prefix of zero under mask {mask:#010x} is what unmarked packets carry")]
    PrefixZero {
        /// The mask.
        mask: u32,
    },
    /// The prefix and the value share bits.
    #[error("prefix mask {prefix_mask:#010x} and value bits {value_mask:#010x} overlap")]
    Overlap {
        /// The mask of the prefix.
        prefix_mask: u32,
        /// The bits of the value, as a mask.
        value_mask: u32,
    },
    /// All values are reserved, so that none is left for a gateway.
    #[error("{bits} value bits without a wider prefix leave no value for a gateway")]
    NoValues {
        /// Number of value bits.
        bits: u8,
    },
}

impl MarkLayout {
    /// Mark bits that other software is known to test.
    ///
    /// They are those of kube-proxy (0x4000, 0x8000), the portmap CNI plugin (0x2000), Cilium
    /// (0x0f00) and Istio ambient (0x0fff).
    pub const KNOWN_FOREIGN: u32 = 0x0000_efff;

    /// The default layout: prefix 0x26 in the top byte and 16 value bits, `0x26vvvv00/0xffffff00`.
    pub const SEED: Self = Self {
        prefix: 0x2600_0000,
        prefix_mask: 0xff00_0000,
        shift: 8,
        bits: 16,
        avoid: Self::KNOWN_FOREIGN,
    };

    /// A layout for 253 gateways: eight value bits at bit 22 and no prefix.
    ///
    /// It has no default bits of Calico and no bits of Cilium, Istio and kube-proxy. Tailscale
    /// tests some of its bits.
    pub const COMPACT: Self =
        Self { prefix: 0, prefix_mask: 0, shift: 22, bits: 8, avoid: Self::KNOWN_FOREIGN };

    /// A layout for 61 gateways: six value bits at bit 24 and no prefix.
    ///
    /// Like [`COMPACT`](Self::COMPACT), it has no default bits of Calico and no bits of Cilium,
    /// Istio and kube-proxy, nor of Tailscale.
    pub const COMPACT6: Self =
        Self { prefix: 0, prefix_mask: 0, shift: 24, bits: 6, avoid: Self::KNOWN_FOREIGN };

    /// Creates a layout; `prefix_mask` 0 and `prefix` 0 mean a layout without prefix.
    ///
    /// A prefix of one bit is set in all marks of this crate and distinguishes none of them from
    /// another. Features that need a layout with a prefix need a prefix of at least two bits.
    pub fn new(prefix: u32, prefix_mask: u32, shift: u8, bits: u8) -> Result<Self, LayoutError> {
        if bits == 0 || bits > 16 || u32::from(shift) + u32::from(bits) > 32 {
            return Err(LayoutError::Field { shift, bits });
        }
        if prefix & !prefix_mask != 0 {
            return Err(LayoutError::PrefixOutsideMask { prefix, mask: prefix_mask });
        }
        if prefix == 0 && prefix_mask != 0 {
            return Err(LayoutError::PrefixZero { mask: prefix_mask });
        }
        let layout = Self { prefix, prefix_mask, shift, bits, avoid: Self::KNOWN_FOREIGN };
        let value_mask = layout.value_mask();
        if prefix_mask & value_mask != 0 {
            return Err(LayoutError::Overlap { prefix_mask, value_mask });
        }
        if layout.capacity() == 0 {
            return Err(LayoutError::NoValues { bits });
        }
        Ok(layout)
    }

    /// Sets the avoided bits: bits that other programs may use.
    ///
    /// Values that need an avoided bit are allocated last. An avoided bit that no mark in use needs
    /// is neither written nor tested: another program may set it at any time.
    #[must_use]
    pub const fn with_avoid(mut self, avoid: u32) -> Self {
        self.avoid = avoid;
        self
    }

    /// Returns the prefix: the fixed part of every mark; 0 in a layout without prefix.
    pub const fn prefix(&self) -> u32 {
        self.prefix
    }

    /// Returns the mask of the prefix; 0 in a layout without prefix.
    pub const fn prefix_mask(&self) -> u32 {
        self.prefix_mask
    }

    /// Returns the lowest bit of the value.
    pub const fn shift(&self) -> u8 {
        self.shift
    }

    /// Returns the number of value bits.
    pub const fn bits(&self) -> u8 {
        self.bits
    }

    /// Returns the avoided bits.
    pub const fn avoid(&self) -> u32 {
        self.avoid
    }

    /// Returns the mask of the value.
    #[expect(clippy::cast_possible_truncation, reason = "at most 16 bits below bit 32")]
    pub const fn value_mask(&self) -> u32 {
        (((1_u64 << self.bits) - 1) << self.shift) as u32
    }

    /// Returns the mask of all bits that this crate may write.
    pub const fn mask(&self) -> u32 {
        self.prefix_mask | self.value_mask()
    }

    /// Returns the number of gateways that can have a mark.
    pub const fn capacity(&self) -> usize {
        let values = 1_usize << self.bits;
        if self.tells_by_prefix() {
            values
        } else if self.prefix_mask == 0 {
            // Zero is the mark of unmarked packets, and the two highest values are reserved.
            values.saturating_sub(3)
        } else {
            values.saturating_sub(2)
        }
    }

    /// Returns the mark with this value; `None` for values that do not fit or are reserved.
    pub const fn mark(&self, value: u16) -> Option<Mark> {
        let value = value as u32;
        if value >> self.bits != 0 {
            return None;
        }
        let mark = Mark::new(self.prefix | value << self.shift);
        if mark.get() == 0 || mark.get() == self.tunnel().get() || mark.get() == self.closed().get()
        {
            return None;
        }
        Some(mark)
    }

    /// Returns the value in a mark; `None` if it is not a gateway's mark of this layout.
    #[expect(clippy::cast_possible_truncation, reason = "at most 16 value bits")]
    pub const fn value(&self, mark: Mark) -> Option<u16> {
        if mark.get() & !self.value_mask() != self.prefix {
            return None;
        }
        let value = ((mark.get() & self.value_mask()) >> self.shift) as u16;
        if self.mark(value).is_none() { None } else { Some(value) }
    }

    /// Returns the mark of packets to be translated here, from the tunnel or from pods of this
    /// node.
    ///
    /// With a prefix of two bits or more it differs from every gateway's mark in the prefix, so
    /// that all values stay free; otherwise it is the last but one value.
    pub const fn tunnel(&self) -> Mark {
        if self.tells_by_prefix() {
            Mark::new(self.other_prefix(0))
        } else {
            Mark::new(self.prefix | (((1 << self.bits) - 2) << self.shift))
        }
    }

    /// Returns the mark of packets to be dropped when forwarded, because their policy drops them.
    ///
    /// Only the iptables backend sets it. Its chain at the prerouting hook comes before destination
    /// NAT, where it is not known yet whether the packet stays inside the cluster.
    pub(crate) const fn closed(&self) -> Mark {
        if self.tells_by_prefix() {
            Mark::new(self.other_prefix(1))
        } else {
            Mark::new(self.prefix | (((1 << self.bits) - 1) << self.shift))
        }
    }

    /// Returns the connection mark of connections that this node translates or binds (null NAT).
    ///
    /// It is the [`tunnel`](Self::tunnel) mark, in the bits that distinguish it from other marks
    /// whichever gateways there are.
    pub const fn connection(&self) -> MarkBits {
        let mask = if self.tells_by_prefix() { self.prefix_mask } else { self.mask() };
        MarkBits { mask, value: self.tunnel().get() & mask }
    }

    /// Returns the connection mark bits that the tunnel mark and the gateways' marks share.
    ///
    /// They identify the connections that this node translates or binds where the connection mark
    /// may also be that of a gateway. The tunnel mark differs from the gateways' marks in one
    /// prefix bit only, so no other mark has the remaining bits. Only for layouts with a prefix.
    pub(crate) const fn bound(&self) -> MarkBits {
        let mask = self.prefix_mask & !(self.prefix ^ self.tunnel().get());
        MarkBits { mask, value: self.prefix & mask }
    }

    /// Returns whether a mark needs an avoided bit.
    pub const fn touches_avoided(&self, mark: Mark) -> bool {
        mark.get() & self.avoid != 0
    }

    /// Returns the bits to write and to test so that these marks can be distinguished.
    ///
    /// These are all bits of the layout except the avoided bits that none of the marks needs. A
    /// packet therefore stays steered if another program sets such a bit in its mark later.
    pub fn tested(&self, marks: impl IntoIterator<Item = Mark>) -> u32 {
        let used = marks
            .into_iter()
            .chain([self.tunnel(), self.closed()])
            .fold(0, |bits, mark| bits | mark.get());
        self.prefix_mask | (self.value_mask() & (!self.avoid | used))
    }

    /// Returns the value bit by which the gateways' routing rules are split into two halves.
    ///
    /// It is the lowest value bit that is not avoided; every second mark that a pool allocates has
    /// it. Zero in layouts without prefix, and where all bits are avoided.
    pub(crate) const fn half(&self) -> u32 {
        let clear = self.value_mask() & !self.avoid;
        if self.tells_by_prefix() { clear & clear.wrapping_neg() } else { 0 }
    }

    /// Returns whether the prefix alone distinguishes gateways' marks from the reserved marks.
    ///
    /// This needs a prefix of at least two bits.
    pub(crate) const fn tells_by_prefix(&self) -> bool {
        self.prefix_mask.count_ones() >= 2
    }

    /// Returns the n-th nonzero value of the prefix bits that differs from the prefix.
    ///
    /// The order is that of the differing bits, from the lowest.
    const fn other_prefix(&self, n: u32) -> u32 {
        let mut seen = 0;
        // The XOR patterns of the prefix bits, ascending; four are enough to find two other values.
        let mut flip = self.prefix_mask & self.prefix_mask.wrapping_neg();
        loop {
            let candidate = self.prefix ^ flip;
            if candidate != 0 {
                if seen == n {
                    return candidate;
                }
                seen += 1;
            }
            flip = flip.wrapping_sub(self.prefix_mask) & self.prefix_mask;
            if flip == 0 {
                return candidate;
            }
        }
    }
}

impl Default for MarkLayout {
    fn default() -> Self {
        Self::SEED
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_of_the_default_layout_is_a_mark() {
        let layout = MarkLayout::SEED;
        let mut seen = std::collections::BTreeSet::new();
        for value in 0..=u16::MAX {
            let mark = layout.mark(value).unwrap();
            assert_eq!(layout.value(mark), Some(value));
            assert_ne!(mark.get() & layout.mask(), layout.tunnel().get());
            assert_ne!(mark.get() & layout.mask(), layout.closed().get());
            seen.insert(mark);
        }
        assert_eq!(seen.len(), layout.capacity());
        assert_eq!(layout.tunnel(), Mark::new(0x2700_0000));
        assert_eq!(layout.closed(), Mark::new(0x2400_0000));
    }

    #[test]
    fn compact_layouts_set_aside_zero_and_the_two_highest_values() {
        for (layout, count) in [(MarkLayout::COMPACT, 253), (MarkLayout::COMPACT6, 61)] {
            assert_eq!(layout.capacity(), count);
            let usable = (0..=u16::MAX).filter(|v| layout.mark(*v).is_some()).count();
            assert_eq!(usable, count);
            assert_eq!(layout.mark(0), None);
            assert_eq!(layout.value(layout.tunnel()), None);
            assert_eq!(layout.value(layout.closed()), None);
        }
        assert_eq!(MarkLayout::COMPACT.mask(), 0x3fc0_0000);
        assert_eq!(MarkLayout::COMPACT6.mask(), 0x3f00_0000);
    }

    #[test]
    fn a_two_bit_prefix_still_sets_aside_two_others() {
        let layout = MarkLayout::new(0x0001_0000, 0x0003_0000, 0, 8).unwrap();
        let marks = [layout.tunnel(), layout.closed(), layout.mark(0).unwrap(), Mark::new(0)];
        let distinct: std::collections::BTreeSet<_> = marks.into_iter().collect();
        assert_eq!(distinct.len(), 4, "{marks:?}");
    }

    #[test]
    fn contradictory_layouts_are_refused() {
        assert!(matches!(MarkLayout::new(0, 0, 30, 4), Err(LayoutError::Field { .. })));
        assert!(matches!(MarkLayout::new(0, 0, 0, 17), Err(LayoutError::Field { .. })));
        assert!(matches!(MarkLayout::new(0, 0, 0, 0), Err(LayoutError::Field { .. })));
        assert!(matches!(
            MarkLayout::new(0x2600_0000, 0x0600_0000, 8, 8),
            Err(LayoutError::PrefixOutsideMask { .. })
        ));
        assert!(matches!(
            MarkLayout::new(0, 0xff00_0000, 8, 8),
            Err(LayoutError::PrefixZero { .. })
        ));
        assert!(matches!(
            MarkLayout::new(0x2600_0000, 0xff00_0000, 20, 8),
            Err(LayoutError::Overlap { .. })
        ));
        assert!(matches!(MarkLayout::new(0, 0, 0, 1), Err(LayoutError::NoValues { .. })));
    }

    #[test]
    fn every_other_mark_that_needs_no_avoided_bit_is_of_the_half() {
        let layout = MarkLayout::SEED;
        let marks = (0..=u16::MAX).filter_map(|value| layout.mark(value));
        let clear: Vec<_> = marks.filter(|mark| !layout.touches_avoided(*mark)).collect();
        let halves = clear.iter().map(|mark| mark.get() & layout.half() != 0);
        assert!(halves.eq((0..512).map(|number| number % 2 == 1)), "{clear:?}");
        assert_eq!(layout.tested([]) & layout.half(), 0x1000, "it is tested for every gateway");
        assert_eq!(layout.with_avoid(!0).half(), 0);
        assert_eq!(MarkLayout::COMPACT.half(), 0);
    }

    #[test]
    fn avoided_bits_are_tested_only_when_a_mark_needs_them() {
        let layout = MarkLayout::SEED;
        assert_eq!(layout.tested([]), 0xffff_1000);
        assert_eq!(layout.tested([Mark::new(0x2600_0100)]), 0xffff_1100);
        assert_eq!(MarkLayout::COMPACT.tested([]), 0x3fc0_0000);
    }
}
