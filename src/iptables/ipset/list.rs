//! Reads ipsets from the kernel: names, headers and members.

use std::collections::{BTreeMap, BTreeSet};

use super::member;
use super::protocol::{
    HASH_NET, NETWORK_ORDER, OLDEST, WITH_MARKS, ask, attribute, byte, data, kind, nfproto,
};
use crate::error::KernelError;
use crate::kernel::netlink::exchange::in_one_piece;
use crate::kernel::netlink::message::{Attributes, Malformed, Writer, flag};
use crate::kernel::netlink::nfnetlink::Request;
use crate::kernel::netlink::socket::Socket;
use crate::state::{Ipset, IpsetContents};
use crate::types::Family;

/// `IPSET_FLAG_LIST_SETNAME`: list names only.
const NAMES: u32 = 2;

/// Contents of this crate's sets, by set.
pub(crate) type Found = BTreeMap<Ipset, IpsetContents>;

const LIST: &str = "ipset list -n";

/// Reads all sets of this crate with their members; of other sets only the names.
pub(super) fn observe(protocol: u8, socket: &mut Socket) -> Result<Found, KernelError> {
    let mut found = Found::new();
    for set in names(protocol, socket)? {
        match contents(protocol, socket, set) {
            Ok(contents) => drop(found.insert(set, contents)),
            // Destroyed in the meantime.
            Err(error) if error.is_not_found() => {}
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}

/// Returns the names of this crate's sets in the kernel.
pub(super) fn names(protocol: u8, socket: &mut Socket) -> Result<BTreeSet<Ipset>, KernelError> {
    all_names(protocol, socket, Ipset::from_name)
}

fn all_names<T: Ord>(
    protocol: u8,
    socket: &mut Socket,
    pick: impl Fn(&str) -> Option<T>,
) -> Result<BTreeSet<T>, KernelError> {
    let request = Request { text: LIST, kind: kind::LIST, flags: flag::DUMP, answer: kind::LIST };
    let found = in_one_piece(|| {
        let mut names = BTreeSet::new();
        let write = |writer: &mut Writer| {
            writer.be32(attribute::FLAGS | NETWORK_ORDER, NAMES);
        };
        let answered = ask(socket, &request, protocol, write, |body| {
            for found in Attributes::new(body) {
                let found = found?;
                if found.kind == attribute::SETNAME {
                    // Names of other programs' sets may be any bytes.
                    names.extend(found.text().ok().and_then(&pick));
                }
            }
            Ok(())
        })?;
        Ok((names, answered))
    })?;
    found.ok_or_else(|| KernelError::answer(LIST, "the sets change faster than they can be listed"))
}

/// Returns sets of another program: type `hash:net`, recognised by name and family.
///
/// `family_of` returns the family that a set of this name must have, or `None` for other names.
pub(crate) fn foreign(
    socket: &mut Socket,
    family_of: impl Fn(&str) -> Option<Family>,
) -> Result<Vec<String>, KernelError> {
    let named = |name: &str| family_of(name).map(|family| (name.to_owned(), nfproto(family)));
    let mut found = Vec::new();
    for (name, family) in all_names(OLDEST, socket, named)? {
        let text = format!("ipset list -t {name}");
        let request = Request { text: &text, kind: kind::HEADER, flags: 0, answer: kind::HEADER };
        let write = |writer: &mut Writer| writer.string(attribute::SETNAME, &name);
        let mut is = (false, false);
        let asked = ask(socket, &request, OLDEST, write, |body| {
            for found in Attributes::new(body) {
                let found = found?;
                match found.kind {
                    attribute::TYPENAME => is.0 = found.is(HASH_NET),
                    attribute::FAMILY => is.1 = byte(&found)? == family,
                    _ => {}
                }
            }
            Ok(())
        });
        match asked {
            Ok(_) if is == (true, true) => found.push(name),
            Ok(_) => {}
            // Destroyed in the meantime.
            Err(error) if error.is_not_found() => {}
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}

fn contents(protocol: u8, socket: &mut Socket, set: Ipset) -> Result<IpsetContents, KernelError> {
    let text = format!("ipset list {set}");
    let request = Request { text: &text, kind: kind::LIST, flags: flag::DUMP, answer: kind::LIST };
    let listing = in_one_piece(|| {
        let mut listing = Listing::new();
        let write = |writer: &mut Writer| writer.string(attribute::SETNAME, &set.to_string());
        let answered =
            ask(socket, &request, protocol, write, |body| listing.take(Attributes::new(body)))?;
        Ok((listing, answered))
    })?;
    match listing {
        Some(Listing { is_hash_net: true, contents }) => Ok(contents),
        Some(_) => Err(KernelError::answer(text, "it is of another type than hash:net")
            .with_remedy("delete it: no other program should create sets of this name")),
        None => Err(KernelError::answer(text, "the set changes faster than it can be listed")),
    }
}

/// The listing of one set, collected from several messages.
pub(crate) struct Listing {
    pub(crate) contents: IpsetContents,
    is_hash_net: bool,
}

impl Listing {
    pub(crate) fn new() -> Self {
        let mut contents = IpsetContents::of([]);
        contents.capacity = 0;
        Self { contents, is_hash_net: false }
    }

    pub(crate) fn take(&mut self, attributes: Attributes<'_>) -> Result<(), Malformed> {
        for found in attributes {
            let found = found?;
            match found.kind {
                attribute::TYPENAME => self.is_hash_net = found.is(HASH_NET),
                attribute::DATA => self.header(found.nested())?,
                attribute::MEMBERS => {
                    for one in found.nested() {
                        self.contents.members.extend(member::read(one?.nested())?);
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn header(&mut self, attributes: Attributes<'_>) -> Result<(), Malformed> {
        for found in attributes {
            let found = found?;
            match found.kind {
                data::MAX_ELEMENTS => self.contents.capacity = found.be32()?,
                data::FLAGS => self.contents.with_marks = found.be32()? & WITH_MARKS != 0,
                _ => {}
            }
        }
        Ok(())
    }
}
