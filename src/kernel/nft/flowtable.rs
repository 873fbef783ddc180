//! Encoding and decoding of the flowtable.

use crate::kernel::netlink::message::{Attributes, Malformed, Writer};
use crate::state::{FLOWTABLE, NFT_TABLE};

const TABLE: u16 = 1;
const NAME: u16 = 2;
const HOOK: u16 = 3;

// Attributes of the hook.
const NUMBER: u16 = 1;
const PRIORITY: u16 = 2;
const DEVICES: u16 = 3;

/// `NF_NETDEV_INGRESS`, the only hook of a flowtable.
const INGRESS: u32 = 0;

/// Writes the new flowtable.
pub(super) fn write(writer: &mut Writer) {
    write_in(writer, NFT_TABLE);
}

/// Writes the new flowtable in a table of this name.
pub(super) fn write_in(writer: &mut Writer, table: &str) {
    writer.string(TABLE, table);
    writer.string(NAME, FLOWTABLE);
    writer.nest(HOOK, |writer| {
        writer.be32(NUMBER, INGRESS);
        writer.be32(PRIORITY, 0);
    });
}

/// A flowtable as the kernel lists it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) name: String,
    /// Presence of devices.
    has_devices: bool,
}

impl Found {
    /// Returns true for the flowtable of this crate.
    pub(super) fn is_ours(&self) -> bool {
        self.name == FLOWTABLE && !self.has_devices
    }
}

/// Reads a listed flowtable; `None` if it is in a table of another name.
pub(super) fn read(attributes: Attributes<'_>) -> Result<Option<Found>, Malformed> {
    let (mut ours, mut name, mut has_devices) = (false, None, false);
    for attribute in attributes {
        let attribute = attribute?;
        match attribute.kind {
            TABLE => ours = attribute.is(NFT_TABLE),
            NAME => name = Some(attribute),
            HOOK => {
                for part in attribute.nested() {
                    let part = part?;
                    has_devices |= part.kind == DEVICES && part.nested().next().is_some();
                }
            }
            _ => {}
        }
    }
    if !ours {
        return Ok(None);
    }
    let name = name.ok_or(Malformed("a flowtable has no name"))?.text()?.to_owned();
    Ok(Some(Found { name, has_devices }))
}
