//! Programs for the kernel's socket filter, in classic BPF (`linux/bpf_common.h`).

use super::socket::Instruction;

// Offsets in a message, `struct nlmsghdr`.
pub(crate) const LENGTH: u32 = 0;
pub(crate) const TYPE: u32 = 4;
pub(crate) const FLAGS: u32 = 6;
pub(crate) const SEQUENCE: u32 = 8;
pub(crate) const PORT: u32 = 12;

const fn plain(code: u16, value: u32) -> Instruction {
    Instruction { code, yes: 0, no: 0, value }
}

pub(crate) const fn word(offset: u32) -> Instruction {
    plain(0x20, offset)
}

pub(crate) const fn half(offset: u32) -> Instruction {
    plain(0x28, offset)
}

pub(crate) const fn byte(offset: u32) -> Instruction {
    plain(0x30, offset)
}

pub(crate) const fn is(value: u32, yes: u8, no: u8) -> Instruction {
    Instruction { code: 0x15, yes, no, value }
}

pub(crate) const fn at_least(value: u32, yes: u8, no: u8) -> Instruction {
    Instruction { code: 0x35, yes, no, value }
}

pub(crate) const fn has(bits: u32, yes: u8, no: u8) -> Instruction {
    Instruction { code: 0x45, yes, no, value: bits }
}

/// Puts what was loaded aside, for [`is_the_same`].
pub(crate) const PUT_ASIDE: Instruction = plain(0x07, 0);

/// Compares what was loaded to what was put aside.
pub(crate) const fn is_the_same(yes: u8, no: u8) -> Instruction {
    Instruction { code: 0x1d, yes, no, value: 0 }
}

pub(crate) const ACCEPT: Instruction = plain(0x06, u32::MAX);
pub(crate) const DROP: Instruction = plain(0x06, 0);

/// A filter loads everything as if it were big-endian; headers are in the machine's own order.
pub(crate) fn as_loaded(value: u16) -> u32 {
    u32::from(u16::from_be_bytes(value.to_ne_bytes()))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// What the kernel's interpreter does, as far as the programs need it.
    pub(crate) fn run(program: &[Instruction], bytes: &[u8]) -> bool {
        let (mut at, mut accumulator, mut index) = (0, 0_u32, 0);
        loop {
            let Instruction { code, yes, no, value } = program[at];
            let load = |width| {
                let offset = value as usize;
                bytes
                    .get(offset..offset + width)
                    .map(|bytes| bytes.iter().fold(0, |sum, byte| (sum << 8) | u32::from(*byte)))
            };
            let jump = |holds| usize::from(if holds { yes } else { no });
            at += 1;
            let loaded = match code {
                0x20 => load(4),
                0x28 => load(2),
                0x30 => load(1),
                0x15 => {
                    at += jump(accumulator == value);
                    continue;
                }
                0x35 => {
                    at += jump(accumulator >= value);
                    continue;
                }
                0x45 => {
                    at += jump(accumulator & value != 0);
                    continue;
                }
                0x1d => {
                    at += jump(accumulator == index);
                    continue;
                }
                0x07 => {
                    index = accumulator;
                    continue;
                }
                0x06 => return value != 0,
                other => panic!("{other:#x}"),
            };
            match loaded {
                Some(loaded) => accumulator = loaded,
                None => return false,
            }
        }
    }
}
