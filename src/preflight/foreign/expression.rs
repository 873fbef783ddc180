//! Attributes of expressions, of matches and targets of iptables, and names.

use crate::kernel::netlink::message::{Attribute, Attributes};

/// Returns the name of an expression and its attributes.
pub(super) fn expression<'a>(element: &Attribute<'a>) -> (&'a str, Attributes<'a>) {
    let (mut name, mut data) = ("", Attributes::new(&[]));
    for attribute in element.nested().flatten() {
        match attribute.kind {
            1 => name = attribute.text().unwrap_or_default(),
            2 => data = attribute.nested(),
            _ => {}
        }
    }
    (name, data)
}

/// Returns name, revision and data of an iptables match or target.
pub(super) fn extension(data: Attributes<'_>) -> (&str, u32, &[u8]) {
    let (mut name, mut revision, mut info) = ("", 0, &[][..]);
    for attribute in data.flatten() {
        match attribute.kind {
            1 => name = attribute.text().unwrap_or_default(),
            2 => revision = attribute.be32().unwrap_or_default(),
            3 => info = attribute.bytes(),
            _ => {}
        }
    }
    (name, revision, info)
}

/// Returns a name in printable form, because the kernel accepts any bytes as a name.
pub(super) fn text(attribute: &Attribute<'_>) -> String {
    let bytes = attribute.bytes();
    let bytes = bytes.strip_suffix(&[0]).unwrap_or(bytes);
    printable(&String::from_utf8_lossy(bytes))
}

pub(super) fn printable(name: &str) -> String {
    name.escape_debug().collect()
}
