//! Reading the table back.

use std::collections::{BTreeMap, BTreeSet};

use super::{Answered, Request, ask, chain, element, expr, generation, kind, range, set};
use crate::error::{KernelError, errno};
use crate::kernel::socket::Socket;
use crate::kernel::wire::{Attributes, Malformed, Writer, flag};
use crate::state::{ChainId, Firewall, NFT_TABLE, Set, Stray};

/// Times that the table is read until nobody changes anything meanwhile.
const ATTEMPTS: usize = 5;

/// Reads our table; `None` if there is none.
///
/// A list that the kernel gives is no snapshot: elements that someone adds or deletes meanwhile
/// may be in it or not, and others may be missing. So all is read under one generation of the
/// rules, or again.
pub(in super::super) fn observe(socket: &mut Socket) -> Result<Option<Firewall>, KernelError> {
    for _ in 0..ATTEMPTS {
        let generation_before = generation(socket)?;
        let mut reader =
            Reader { socket: &mut *socket, generation: low_half(generation_before), moved: false };
        let read = reader.table();
        let moved = reader.moved;
        if generation(socket)? == generation_before && !moved {
            return read;
        }
    }
    Err(KernelError::answer(
        format!("nft list table inet {NFT_TABLE}"),
        "somebody changes nf_tables faster than it can be read",
    ))
}

/// The part of a generation that is in every answer.
const fn low_half(generation: u32) -> u16 {
    (generation & 0xffff) as u16
}

struct Reader<'a> {
    socket: &'a mut Socket,
    generation: u16,
    /// Whether something was changed since the reading began.
    moved: bool,
}

impl Reader<'_> {
    fn ask(
        &mut self,
        request: &Request<'_>,
        write: impl FnOnce(&mut Writer),
        mut take: impl FnMut(Attributes<'_>) -> Result<(), Malformed>,
    ) -> Result<(), KernelError> {
        let (generation, mut moved) = (self.generation, false);
        let Answered { interrupted } = ask(self.socket, request, write, |resource, body| {
            moved |= resource != generation;
            take(Attributes::new(body))
        })?;
        self.moved |= moved || interrupted;
        Ok(())
    }

    fn table(&mut self) -> Result<Option<Firewall>, KernelError> {
        let request = Request {
            text: &format!("nft list table inet {NFT_TABLE}"),
            kind: kind::GETTABLE,
            flags: 0,
            answer: kind::NEWTABLE,
        };
        match self.ask(&request, |writer| writer.string(1, NFT_TABLE), |_| Ok(())) {
            Err(error) if error.errno() == Some(errno::ENOENT) => return Ok(None),
            other => other?,
        }
        let mut firewall = Firewall::default();
        self.chains(&mut firewall)?;
        self.rules(&mut firewall)?;
        for set in self.sets(&mut firewall)? {
            self.elements(set, &mut firewall)?;
        }
        Ok(Some(firewall))
    }

    fn chains(&mut self, firewall: &mut Firewall) -> Result<(), KernelError> {
        let request = Request {
            text: "nft list chains inet",
            kind: kind::GETCHAIN,
            flags: flag::DUMP,
            answer: kind::NEWCHAIN,
        };
        let take = |attributes: Attributes<'_>| {
            let Some(found) = chain::read(attributes)? else {
                return Ok(());
            };
            match found.ours() {
                Some((id, base)) => {
                    firewall.chains.insert(id, (base, Vec::new()));
                }
                None => {
                    firewall.strays.insert(Stray::Chain(found.name));
                }
            }
            Ok(())
        };
        self.ask(&request, |writer| writer.string(1, NFT_TABLE), take)
    }

    fn rules(&mut self, firewall: &mut Firewall) -> Result<(), KernelError> {
        let request = Request {
            text: &format!("nft list table inet {NFT_TABLE}"),
            kind: kind::GETRULE,
            flags: flag::DUMP,
            answer: kind::NEWRULE,
        };
        let mut seen = BTreeSet::new();
        let take = |attributes: Attributes<'_>| {
            let Some(found) = chain::read_rule(attributes)? else {
                return Ok(());
            };
            let chain = ChainId::from_name(&found.chain);
            if let Some((_, rules)) = chain.and_then(|chain| firewall.chains.get_mut(&chain)) {
                if seen.insert(found.handle) {
                    rules.push(found.rule);
                }
            }
            Ok(())
        };
        self.ask(&request, |writer| writer.string(1, NFT_TABLE), take)
    }

    fn sets(&mut self, firewall: &mut Firewall) -> Result<Vec<Set>, KernelError> {
        let request = Request {
            text: "nft list sets inet",
            kind: kind::GETSET,
            flags: flag::DUMP,
            answer: kind::NEWSET,
        };
        let take = |attributes: Attributes<'_>| {
            let Some(found) = set::read(attributes)? else {
                return Ok(());
            };
            match found.ours() {
                Some(set) => {
                    firewall.sets.insert(set);
                }
                // A rule that we do not know brought it and takes it away.
                None if found.is_anonymous() => {}
                None => {
                    firewall.strays.insert(Stray::Set(found.name));
                }
            }
            Ok(())
        };
        self.ask(&request, |writer| writer.string(1, NFT_TABLE), take)?;
        Ok(firewall.sets.iter().copied().collect())
    }

    fn elements(&mut self, set: Set, firewall: &mut Firewall) -> Result<(), KernelError> {
        let request = Request {
            text: &format!("nft list set inet {NFT_TABLE} {set}"),
            kind: kind::GETSETELEM,
            flags: flag::DUMP,
            answer: kind::NEWSETELEM,
        };
        let mut elements = Some(Vec::new());
        let take = |attributes: Attributes<'_>| {
            for attribute in attributes {
                let attribute = attribute?;
                if attribute.kind != 3 {
                    continue;
                }
                for found in attribute.nested() {
                    let found = found?;
                    if found.kind == expr::ELEMENT {
                        collect(&mut elements, element::read(&found, set)?);
                    }
                }
            }
            Ok(())
        };
        let write = |writer: &mut Writer| {
            writer.string(1, NFT_TABLE);
            writer.string(2, &set.name());
        };
        match self.ask(&request, write, take) {
            // Deleted since the sets were listed; the generation says so, too.
            Err(error) if error.errno() == Some(errno::ENOENT) => {
                self.moved = true;
                return Ok(());
            }
            other => other?,
        }
        match elements.and_then(|elements| decode(set, elements)) {
            Some(elements) => firewall.elements.extend(elements),
            None => {
                // It holds what we never write and cannot name, so it must be made anew.
                firewall.sets.remove(&set);
                firewall.strays.insert(Stray::Set(set.name()));
            }
        }
        Ok(())
    }
}

/// Adds an element to the list, or gives the list up if it is one that we never write.
fn collect(list: &mut Option<Vec<element::Found>>, found: Option<element::Found>) {
    match (list.as_mut(), found) {
        (Some(list), Some(found)) => list.push(found),
        _ => *list = None,
    }
}

type Elements = BTreeMap<crate::state::Key, crate::state::Value>;

fn decode(set: Set, elements: Vec<element::Found>) -> Option<Elements> {
    if set.is_interval() {
        return Some(range::ranges(set, elements)?.into_iter().collect());
    }
    elements.into_iter().map(|found| Some((element::key(set, &found.key)?, found.value?))).collect()
}
