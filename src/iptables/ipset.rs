//! The netlink interface to ipsets: sets of type `hash:net`, IPv4 or IPv6, with or without marks.

mod error;
mod list;
mod member;
mod protocol;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;

use ipnet::IpNet;

use crate::diff::op::Op;
use crate::error::{KernelError, errno};
use crate::kernel::netlink::message::{Writer, flag};
use crate::kernel::netlink::nfnetlink::Request;
use crate::kernel::netlink::socket::Socket;
use crate::state::{Ipset, IpsetContents, Member};

pub(crate) use list::{Found, foreign};
use protocol::{
    HASH_NET, NETWORK_ORDER, NFPROTO_IPV4, OLDEST, PROTOCOL, Refused, WITH_MARKS, ask,
    ask_about_members, attribute, byte, data, kind, nfproto,
};

/// The first revision of `hash:net` with marks (`skbinfo`, kernel 3.18).
const REVISION: u8 = 6;

/// The operation on a member: add or delete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verb {
    Put,
    Delete,
}

/// The kernel's ipset subsystem, with the protocol version and set revision to use.
#[derive(Debug)]
pub(crate) struct Ipsets {
    protocol: u8,
    revision: u8,
}

impl Ipsets {
    /// Queries the kernel's ipset protocol version and its revision of set type `hash:net`.
    ///
    /// # Errors
    ///
    /// The error names the missing kernel feature.
    pub(crate) fn probe(socket: &mut Socket) -> Result<Self, KernelError> {
        let (mut newest, mut oldest) = (OLDEST, OLDEST);
        let text = "ipset version";
        let request = Request { text, kind: kind::PROTOCOL, flags: 0, answer: kind::PROTOCOL };
        ask(
            socket,
            &request,
            OLDEST,
            |_| {},
            |body| {
                for found in crate::kernel::netlink::message::Attributes::new(body) {
                    let found = found?;
                    match found.kind {
                        attribute::PROTOCOL => newest = byte(&found)?,
                        attribute::PROTOCOL_MIN => oldest = byte(&found)?,
                        _ => {}
                    }
                }
                Ok(())
            },
        )?;
        let protocol = newest.min(PROTOCOL);
        if protocol < oldest.max(OLDEST) {
            return Err(KernelError::answer(text, "the kernel speaks no protocol that we know"));
        }
        let mut revision = 0;
        let text = "ipset create … hash:net";
        let request = Request { text, kind: kind::TYPE, flags: 0, answer: kind::TYPE };
        let write = |writer: &mut Writer| {
            writer.string(attribute::TYPENAME, HASH_NET);
            writer.attribute(attribute::FAMILY, &[NFPROTO_IPV4]);
        };
        ask(socket, &request, protocol, write, |body| {
            for found in crate::kernel::netlink::message::Attributes::new(body) {
                let found = found?;
                if found.kind == attribute::REVISION {
                    revision = byte(&found)?;
                }
            }
            Ok(())
        })?;
        if revision < REVISION {
            return Err(KernelError::answer(text, "the kernel's sets cannot hold marks")
                .with_remedy("use a kernel from 3.18 on"));
        }
        Ok(Self { protocol, revision: REVISION })
    }

    /// Returns the names of this crate's sets in the kernel.
    pub(crate) fn names(&self, socket: &mut Socket) -> Result<BTreeSet<Ipset>, KernelError> {
        list::names(self.protocol, socket)
    }

    /// Reads all sets of this crate with their members; of other sets only the names.
    pub(crate) fn observe(&self, socket: &mut Socket) -> Result<Found, KernelError> {
        list::observe(self.protocol, socket)
    }

    /// Applies one operation on a set as a whole.
    fn make(&self, socket: &mut Socket, op: &Op) -> Result<(), KernelError> {
        match op {
            Op::AddIpset(set, contents) => {
                let new = self.fill_new(socket, op, *set, contents)?;
                // Renamed last, so that a set under its final name is always complete.
                let named = self.two_names(socket, op, kind::RENAME, new, *set);
                if named.is_err() {
                    let _kept = self.destroy(socket, op, new);
                }
                named
            }
            Op::PutIpset(set, contents) => {
                let new = self.fill_new(socket, op, *set, contents)?;
                let swapped = self.two_names(socket, op, kind::SWAP, new, *set);
                let destroyed = self.destroy(socket, op, new);
                match swapped {
                    Err(error) if error.is_exists() => {
                        let missing = KernelError::refused(error.request(), errno::ENOENT);
                        Err(missing.with_words(Some("there is no set to swap with".to_owned())))
                    }
                    swapped => swapped.and(destroyed),
                }
            }
            Op::DeleteIpset(set) => self.destroy(socket, op, *set),
            _ => Err(KernelError::answer(op, "this is no operation on sets")),
        }
    }

    /// Applies operations in order; returns the number of those made, and the refused ones by index.
    ///
    /// Successive members of one set share messages.
    pub(crate) fn make_all(
        &self,
        socket: &mut Socket,
        ops: &[&Op],
    ) -> (usize, Vec<(usize, KernelError)>) {
        let (mut made, mut refused) = (0, Vec::new());
        let (mut index, mut at_once) = (0, member::AT_ONCE);
        while let Some((op, rest)) = ops.get(index..).and_then(<[_]>::split_first) {
            let Some((verb, set, first)) = member_of(op) else {
                match self.make(socket, op) {
                    Ok(()) => made += 1,
                    Err(error) => refused.push((index, error)),
                }
                index += 1;
                continue;
            };
            let alike = rest.iter().map_while(|op| member_of(op));
            let alike = alike.take_while(|(v, s, _)| (*v, *s) == (verb, set));
            let members: Vec<_> =
                std::iter::once(first).chain(alike.map(|(.., member)| member)).collect();
            let message = members.get(..at_once).unwrap_or(&members);
            match self.members(socket, op, verb, set, message) {
                Ok(()) => {
                    made += message.len();
                    index += message.len();
                    at_once = (2 * at_once).min(member::AT_ONCE);
                }
                Err(Refused { member: Some(at), error }) => {
                    made += at;
                    index += at;
                    let text = ops.get(index).map(|op| request_text(op)).unwrap_or_default();
                    refused.push((index, error.with_request(text)));
                    index += 1;
                    // The next members are probably refused as well, each by a message.
                    at_once = 1;
                }
                // There is no such set, for example.
                Err(Refused { member: None, error }) => {
                    refused.push((index, error));
                    index += members.len();
                }
            }
        }
        (made, refused)
    }

    /// Creates a set with these members under a temporary name.
    fn fill_new(
        &self,
        socket: &mut Socket,
        op: &Op,
        set: Ipset,
        contents: &IpsetContents,
    ) -> Result<Ipset, KernelError> {
        let new = Ipset::Temporary(set.family());
        match self.destroy(socket, op, new) {
            Err(error) if !error.is_not_found() => return Err(error),
            _ => {}
        }
        self.create(socket, op, new, contents)?;
        let members: Vec<_> =
            contents.members.iter().map(|(net, member)| (*net, *member)).collect();
        for chunk in members.chunks(member::AT_ONCE) {
            let filled = self.members(socket, op, Verb::Put, new, chunk);
            filled.map_err(|refused| refused.error)?;
        }
        Ok(new)
    }

    fn create(
        &self,
        socket: &mut Socket,
        op: &Op,
        set: Ipset,
        contents: &IpsetContents,
    ) -> Result<(), KernelError> {
        self.change(socket, op, kind::CREATE, |writer| {
            writer.string(attribute::SETNAME, &set.to_string());
            writer.string(attribute::TYPENAME, HASH_NET);
            writer.attribute(attribute::REVISION, &[self.revision]);
            writer.attribute(attribute::FAMILY, &[nfproto(set.family())]);
            writer.nest(attribute::DATA, |writer| {
                let mut number = |kind, value| writer.be32(kind | NETWORK_ORDER, value);
                // The final size from the start: a resize copies all members, again and again.
                let size = u32::try_from(contents.members.len()).unwrap_or(u32::MAX);
                number(data::HASH_SIZE, size.clamp(64, 1 << 26).next_power_of_two());
                number(data::MAX_ELEMENTS, contents.capacity);
                number(data::FLAGS, if contents.with_marks { WITH_MARKS } else { 0 });
            });
        })
    }

    fn destroy(&self, socket: &mut Socket, op: &Op, set: Ipset) -> Result<(), KernelError> {
        self.change(socket, op, kind::DESTROY, |writer| {
            writer.string(attribute::SETNAME, &set.to_string());
        })
    }

    fn two_names(
        &self,
        socket: &mut Socket,
        op: &Op,
        kind: u16,
        one: Ipset,
        other: Ipset,
    ) -> Result<(), KernelError> {
        self.change(socket, op, kind, |writer| {
            writer.string(attribute::SETNAME, &one.to_string());
            writer.string(attribute::TYPENAME, &other.to_string());
        })
    }

    /// Adds or deletes members in one message, up to the first one that is refused.
    fn members(
        &self,
        socket: &mut Socket,
        op: &Op,
        verb: Verb,
        set: Ipset,
        members: &[(IpNet, Member)],
    ) -> Result<(), Refused> {
        // A member may be added again, with another mark; a member that is deleted must exist.
        let (kind, flags) = match verb {
            Verb::Put => (kind::ADD, 0),
            Verb::Delete => (kind::DELETE, flag::EXCL),
        };
        let text = request_text(op);
        let request = Request { text: &text, kind, flags, answer: u16::MAX };
        // Numbers take a seventh of the time; of a whole set the members are not operations.
        let numbered = member_of(op).is_some();
        let made = ask_about_members(socket, &request, self.protocol, |writer| {
            writer.string(attribute::SETNAME, &set.to_string());
            writer.be32(attribute::LINE | NETWORK_ORDER, 0);
            writer.nest(attribute::MEMBERS, |writer| {
                for (number, (net, member)) in (1..).zip(members) {
                    member::write(writer, numbered.then_some(number), *net, *member);
                }
            });
        });
        made.map_err(|Refused { member, error }| {
            let missing = verb == Verb::Delete && error.is_exists();
            let error = if missing {
                let missing = KernelError::refused(error.request(), errno::ENOENT);
                missing.with_words(Some("the set has no such member".to_owned()))
            } else {
                error
            };
            Refused { member, error }
        })
    }

    fn change(
        &self,
        socket: &mut Socket,
        op: &Op,
        kind: u16,
        write: impl FnOnce(&mut Writer),
    ) -> Result<(), KernelError> {
        let text = request_text(op);
        // Without `EXCL` the kernel reports success if the object exists already, or does not
        // exist.
        let request = Request { text: &text, kind, flags: flag::EXCL, answer: u16::MAX };
        ask(socket, &request, self.protocol, write, |_| Ok(())).map(drop)
    }
}

/// Destroys a set of another program, if no rule matches it.
pub(crate) fn destroy_foreign(socket: &mut Socket, name: &str) -> Result<(), KernelError> {
    let text = format!("ipset destroy {name}");
    let request = Request { text: &text, kind: kind::DESTROY, flags: flag::EXCL, answer: u16::MAX };
    let write = |writer: &mut Writer| writer.string(attribute::SETNAME, name);
    ask(socket, &request, OLDEST, write, |_| Ok(())).map(drop)
}

/// Returns a short text of the operation for errors; that of a large set has a million commands.
fn request_text(op: &Op) -> String {
    match op {
        Op::AddIpset(set, contents) => {
            format!("ipset create {set} ({} members)", contents.members.len())
        }
        Op::PutIpset(set, contents) => {
            format!("ipset swap {set} ({} members)", contents.members.len())
        }
        op => op.to_string(),
    }
}

fn member_of(op: &Op) -> Option<(Verb, Ipset, (IpNet, Member))> {
    match op {
        Op::PutMember(set, net, member) => Some((Verb::Put, *set, (*net, *member))),
        Op::DeleteMember(set, net) => Some((Verb::Delete, *set, (*net, Member::In))),
        _ => None,
    }
}
