//! Reads the nf_tables table from the kernel.

mod counts;
#[cfg(test)]
mod mutated;
mod verify;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::generation::{ask, generation};
use super::{chain, element, expr, flowtable, kind, range, set, table};
use crate::error::{KernelError, errno};
use crate::kernel::netlink::exchange::{Answered, in_one_piece};
use crate::kernel::netlink::message::{Attribute, Attributes, Malformed, Writer, flag};
use crate::kernel::netlink::nfnetlink::Request;
use crate::kernel::netlink::socket::Socket;
use crate::state::{ChainId, Elements, Firewall, Key, NFT_TABLE, Set, Stray, TableFamily, Value};

pub(crate) use counts::counts;

/// Number of elements up to which a set is dumped and not verified key by key.
///
/// At about this number both cost the same.
const FEW: usize = 8192;

/// Limit of the pause between dumps of one set.
///
/// The pause doubles up to this limit; all pauses together take one second.
const LONGEST_PAUSE: Duration = Duration::from_millis(1024);

/// Reads our table; `None` if there is none.
///
/// A dump is no snapshot: elements that are added or deleted during it may be in it or not, and
/// others may be missing. So the whole table is read at one ruleset generation, or read again.
#[cfg(test)]
pub(crate) fn observe(socket: &mut Socket) -> Result<Option<Firewall>, KernelError> {
    observe_at(socket, None).map(|(firewall, _)| firewall)
}

/// Reads our table and the ruleset generation; `expected` are the elements its sets probably hold.
pub(crate) fn observe_at(
    socket: &mut Socket,
    expected: Option<&Elements>,
) -> Result<(Option<Firewall>, u32), KernelError> {
    whole(socket, TableFamily::Inet, expected)
}

/// Reads our table without elements, and the ruleset generation.
pub(crate) fn observe_objects(socket: &mut Socket) -> Result<(Option<Firewall>, u32), KernelError> {
    steady(socket, TableFamily::Inet, None, |reader| reader.table(|_| false))
}

/// Reads the table's chains, its sets, the elements of some sets, and the generation.
pub(super) fn observe_some(
    socket: &mut Socket,
    sets: &BTreeSet<Set>,
) -> Result<(Firewall, u32), KernelError> {
    steady(socket, TableFamily::Inet, None, |reader| {
        let mut firewall = Firewall::default();
        reader.contents(|set| sets.contains(&set), &mut firewall)?;
        Ok(firewall)
    })
}

/// Reads the table of the egress hook; `None` if there is none.
pub(crate) fn observe_hook(socket: &mut Socket) -> Result<Option<Firewall>, KernelError> {
    // Most nodes have no such table.
    let table = table::flags_and_owner(socket, TableFamily::Netdev)?;
    if table.is_none() {
        return Ok(None);
    }
    whole(socket, TableFamily::Netdev, None).map(|(table, _)| table)
}

fn whole(
    socket: &mut Socket,
    family: TableFamily,
    expected: Option<&Elements>,
) -> Result<(Option<Firewall>, u32), KernelError> {
    steady(socket, family, expected, |reader| reader.table(|_| true))
}

/// Reads part of a table, repeatedly until the ruleset generation did not change during the read.
fn steady<T>(
    socket: &mut Socket,
    family: TableFamily,
    expected: Option<&Elements>,
    mut read: impl FnMut(&mut Reader<'_>) -> Result<T, KernelError>,
) -> Result<(T, u32), KernelError> {
    let found = in_one_piece(|| {
        let before = generation(socket)?;
        let mut reader = Reader::new(&mut *socket, family, before, expected);
        // An error is ignored, too, if the ruleset changed during the read.
        let read = read(&mut reader).map(|found| (found, before));
        let interrupted = reader.moved || generation(socket)? != before;
        Ok((read, Answered { interrupted }))
    })?;
    found.unwrap_or_else(|| {
        Err(KernelError::answer(
            format!("nft list table {family} {NFT_TABLE}"),
            "other programs change nf_tables faster than it can be read",
        ))
    })
}

/// Low half of the generation, which is in every reply.
const fn low_half(generation: u32) -> u16 {
    (generation & 0xffff) as u16
}

struct Reader<'a> {
    socket: &'a mut Socket,
    family: TableFamily,
    generation: u16,
    /// Elements that the sets probably hold.
    expected: Option<&'a Elements>,
    /// Whether the ruleset changed since the read started.
    moved: bool,
}

impl<'a> Reader<'a> {
    const fn new(
        socket: &'a mut Socket,
        family: TableFamily,
        generation: u32,
        expected: Option<&'a Elements>,
    ) -> Self {
        Self { socket, family, generation: low_half(generation), expected, moved: false }
    }

    fn ask(
        &mut self,
        request: &Request<'_>,
        write: impl FnOnce(&mut Writer),
        mut take: impl FnMut(Attributes<'_>) -> Result<(), Malformed>,
    ) -> Result<(), KernelError> {
        let (generation, mut moved) = (self.generation, false);
        let Answered { interrupted } =
            ask(self.socket, self.family, request, write, |resource, body| {
                moved |= resource != generation;
                take(Attributes::new(body))
            })?;
        self.moved |= moved || interrupted;
        Ok(())
    }

    /// Reads the table, and the elements of the wanted sets; `None` if there is no table.
    fn table(&mut self, is_wanted: impl Fn(Set) -> bool) -> Result<Option<Firewall>, KernelError> {
        let request = Request {
            text: &format!("nft list table {} {NFT_TABLE}", self.family),
            kind: kind::GETTABLE,
            flags: 0,
            answer: kind::NEWTABLE,
        };
        let mut firewall = Firewall::default();
        let take = |attributes: Attributes<'_>| {
            let flags = table::read(attributes)?.flags;
            firewall.dormant = flags & table::DORMANT != 0;
            Ok(())
        };
        match self.ask(&request, |writer| writer.string(1, NFT_TABLE), take) {
            Err(error) if error.errno() == Some(errno::ENOENT) => return Ok(None),
            other => other?,
        }
        self.contents(is_wanted, &mut firewall)?;
        Ok(Some(firewall))
    }

    /// Reads the table's chains, rules and sets, and the elements of the wanted sets.
    fn contents(
        &mut self,
        is_wanted: impl Fn(Set) -> bool,
        firewall: &mut Firewall,
    ) -> Result<(), KernelError> {
        self.chains(firewall)?;
        self.rules(firewall)?;
        self.flowtables(firewall)?;
        for (set, count) in self.sets(firewall)? {
            if is_wanted(set) {
                self.elements(set, count, firewall)?;
            }
        }
        Ok(())
    }

    fn chains(&mut self, firewall: &mut Firewall) -> Result<(), KernelError> {
        let request = Request {
            text: &format!("nft list chains {}", self.family),
            kind: kind::GETCHAIN,
            flags: flag::DUMP,
            answer: kind::NEWCHAIN,
        };
        let family = self.family;
        let take = |attributes: Attributes<'_>| add_chain(attributes, family, firewall);
        self.ask(&request, |writer| writer.string(1, NFT_TABLE), take)
    }

    fn rules(&mut self, firewall: &mut Firewall) -> Result<(), KernelError> {
        self.each_rule(|chain, found| {
            if let Some((_, rules)) = firewall.chains.get_mut(&chain) {
                rules.push(found.rule);
            }
        })
    }

    /// Reads the rules of the chains that this crate makes.
    fn each_rule(
        &mut self,
        mut each: impl FnMut(ChainId, chain::FoundRule),
    ) -> Result<(), KernelError> {
        let request = Request {
            text: &format!("nft list table {} {NFT_TABLE}", self.family),
            kind: kind::GETRULE,
            flags: flag::DUMP,
            answer: kind::NEWRULE,
        };
        let mut seen = BTreeSet::new();
        let take = |attributes: Attributes<'_>| {
            if let Some((chain, found)) = new_rule(attributes, &mut seen)? {
                each(chain, found);
            }
            Ok(())
        };
        self.ask(&request, |writer| writer.string(1, NFT_TABLE), take)
    }

    fn flowtables(&mut self, firewall: &mut Firewall) -> Result<(), KernelError> {
        let request = Request {
            text: &format!("nft list flowtables {}", self.family),
            kind: kind::GETFLOWTABLE,
            flags: flag::DUMP,
            answer: kind::NEWFLOWTABLE,
        };
        let take = |attributes: Attributes<'_>| add_flowtable(attributes, firewall);
        self.ask(&request, |writer| writer.string(1, NFT_TABLE), take)
    }

    fn sets(&mut self, firewall: &mut Firewall) -> Result<BTreeMap<Set, usize>, KernelError> {
        let mut counts = BTreeMap::new();
        let request = Request {
            text: &format!("nft list sets {}", self.family),
            kind: kind::GETSET,
            flags: flag::DUMP,
            answer: kind::NEWSET,
        };
        let family = self.family;
        let take = |attributes: Attributes<'_>| add_set(attributes, family, &mut counts, firewall);
        self.ask(&request, |writer| writer.string(1, NFT_TABLE), take)?;
        Ok(counts)
    }

    /// Reads the elements of a set that has at least `least` of them.
    fn elements(
        &mut self,
        set: Set,
        least: usize,
        firewall: &mut Firewall,
    ) -> Result<(), KernelError> {
        if let Some(expected) = self.expected.filter(|_| least > FEW) {
            if let Some(differences) = self.differences(set, least, expected)? {
                firewall.elements.take_over(expected, set);
                for (key, value) in differences {
                    match value {
                        Some(value) => firewall.elements.insert(key, value),
                        None => firewall.elements.remove(&key),
                    };
                }
                return Ok(());
            }
        }
        let mut pause = Duration::from_millis(1);
        while pause < LONGEST_PAUSE {
            match self.list(set)? {
                // For interval sets the kernel counts both ends of each range.
                List::Elements(elements) if !set.is_interval() && elements.len() < least => {
                    std::thread::sleep(pause);
                }
                List::Elements(elements) => {
                    firewall.elements.extend(elements);
                    return Ok(());
                }
                List::NotOurs => {
                    // The set has elements that this crate never writes and cannot represent, so it
                    // must be recreated.
                    firewall.sets.remove(&set);
                    firewall.strays.insert(Stray::Set(set.name()));
                    return Ok(());
                }
                List::Torn => std::thread::sleep(pause),
            }
            pause *= 2;
        }
        Err(torn(self.family, set))
    }

    /// Dumps the elements of a set once.
    fn list(&mut self, set: Set) -> Result<List, KernelError> {
        let mut elements = Some(Vec::new());
        self.list_with(set, |attributes| add_elements(attributes, set, &mut elements))?;
        Ok(elements.map_or(List::NotOurs, |elements| decode(set, elements)))
    }

    /// Dumps the elements of a set, and passes each message to `take`.
    fn list_with(
        &mut self,
        set: Set,
        take: impl FnMut(Attributes<'_>) -> Result<(), Malformed>,
    ) -> Result<(), KernelError> {
        let request = Request {
            text: &format!("nft list set {} {NFT_TABLE} {set}", self.family),
            kind: kind::GETSETELEM,
            flags: flag::DUMP,
            answer: kind::NEWSETELEM,
        };
        let write = |writer: &mut Writer| {
            writer.string(1, NFT_TABLE);
            writer.string(2, &set.name());
        };
        match self.ask(&request, write, take) {
            // The set was deleted after the sets were dumped; the generation shows that, too.
            Err(error) if error.errno() == Some(errno::ENOENT) => {
                self.moved = true;
                Ok(())
            }
            other => other,
        }
    }
}

fn torn(family: TableFamily, set: Set) -> KernelError {
    KernelError::answer(
        format!("nft list set {family} {NFT_TABLE} {set}"),
        "the kernel keeps listing some elements twice and others not at all",
    )
}

/// Adds a dumped chain.
fn add_chain(
    attributes: Attributes<'_>,
    family: TableFamily,
    firewall: &mut Firewall,
) -> Result<(), Malformed> {
    let Some(found) = chain::read(attributes, family)? else {
        return Ok(());
    };
    match found.ours(family) {
        Some((id, base)) => {
            firewall.chains.insert(id, (base, Vec::new()));
        }
        None => {
            firewall.strays.insert(Stray::Chain(found.name));
        }
    }
    Ok(())
}

/// Adds a dumped flowtable.
fn add_flowtable(attributes: Attributes<'_>, firewall: &mut Firewall) -> Result<(), Malformed> {
    match flowtable::read(attributes)? {
        Some(found) if found.is_ours() => firewall.flowtable = true,
        Some(found) => drop(firewall.strays.insert(Stray::Flowtable(found.name))),
        None => {}
    }
    Ok(())
}

/// Reads a dumped rule of a chain that this crate makes; `None` if its handle was seen.
fn new_rule(
    attributes: Attributes<'_>,
    seen: &mut BTreeSet<u64>,
) -> Result<Option<(ChainId, chain::FoundRule)>, Malformed> {
    let found = chain::read_rule(attributes)?;
    Ok(found.and_then(|found| {
        let chain = ChainId::from_name(&found.chain)?;
        seen.insert(found.handle).then_some((chain, found))
    }))
}

/// Adds a dumped set, and its number of elements.
fn add_set(
    attributes: Attributes<'_>,
    family: TableFamily,
    counts: &mut BTreeMap<Set, usize>,
    firewall: &mut Firewall,
) -> Result<(), Malformed> {
    let Some(found) = set::read(attributes)? else {
        return Ok(());
    };
    match found.ours(family) {
        Some(set) => {
            firewall.sets.insert(set);
            // Elements with a timeout are no part of the state.
            let count = found.count.and_then(|count| usize::try_from(count).ok());
            if !set.is_fleeting() {
                counts.insert(set, count.unwrap_or(0));
            }
        }
        // An anonymous set is created and deleted with a rule that this crate does not know.
        None if found.is_anonymous() => {}
        None => {
            firewall.strays.insert(Stray::Set(found.name));
        }
    }
    Ok(())
}

/// Adds the elements in one message of a dump.
fn add_elements(
    attributes: Attributes<'_>,
    set: Set,
    list: &mut Option<Vec<element::Found>>,
) -> Result<(), Malformed> {
    each_element(attributes, |found| {
        collect(list, element::read(found, set)?);
        Ok(())
    })
}

/// Calls `each` with every element in one message of a dump.
fn each_element(
    attributes: Attributes<'_>,
    mut each: impl FnMut(&Attribute<'_>) -> Result<(), Malformed>,
) -> Result<(), Malformed> {
    for attribute in attributes {
        let attribute = attribute?;
        if attribute.kind != 3 {
            continue;
        }
        for found in attribute.nested() {
            let found = found?;
            if found.kind == expr::ELEMENT {
                each(&found)?;
            }
        }
    }
    Ok(())
}

/// Adds an element to the list; clears the list if this crate never writes such an element.
fn collect(list: &mut Option<Vec<element::Found>>, found: Option<element::Found>) {
    match (list.as_mut(), found) {
        (Some(list), Some(found)) => list.push(found),
        _ => *list = None,
    }
}

type Listed = BTreeMap<Key, Value>;

/// Result of one dump of a set's elements.
enum List {
    Elements(Listed),
    /// The set has elements that this crate never writes.
    NotOurs,
    /// Some elements were dumped twice.
    Torn,
}

fn decode(set: Set, mut found: Vec<element::Found>) -> List {
    let count = found.len();
    let elements: Option<Listed> = if set.is_interval() {
        found.sort_by(|a, b| (&a.key, a.is_end).cmp(&(&b.key, b.is_end)));
        found.dedup_by(|a, b| a.key == b.key && a.is_end == b.is_end);
        if found.len() < count {
            return List::Torn;
        }
        range::ranges(set, found).map(|ranges| ranges.into_iter().collect())
    } else {
        let pairs = found.into_iter();
        pairs.map(|found| Some((element::key(set, &found.key)?, found.value?))).collect()
    };
    match elements {
        // The kernel continues a dump by the number of elements already sent. When it resizes the
        // hash table meanwhile, which happens in the background and without a new generation, some
        // elements are dumped twice and as many not at all.
        Some(elements) if !set.is_interval() && elements.len() < count => List::Torn,
        Some(elements) => List::Elements(elements),
        None => List::NotOurs,
    }
}
