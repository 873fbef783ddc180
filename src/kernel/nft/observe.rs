//! Reading the table back.

mod counts;
#[cfg(test)]
mod mutated;
mod verify;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::generation::{ask, generation};
use super::{chain, element, expr, kind, range, set, table};
use crate::error::{KernelError, errno};
use crate::kernel::netlink::exchange::{Answered, in_one_piece};
use crate::kernel::netlink::message::{Attribute, Attributes, Malformed, Writer, flag};
use crate::kernel::netlink::nfnetlink::Request;
use crate::kernel::netlink::socket::Socket;
use crate::state::{ChainId, Elements, Firewall, Key, NFT_TABLE, Set, Stray, TableFamily, Value};

pub(crate) use counts::counts;

/// Elements of a set that are as well listed as asked for one by one: about where the two cost the
/// same.
const FEW: usize = 8192;

/// Pauses between listings of one set double up to this, which makes a second of them all.
const LONGEST_PAUSE: Duration = Duration::from_millis(1024);

/// Reads our table; `None` if there is none.
///
/// A list that the kernel gives is no snapshot: elements that someone adds or deletes meanwhile
/// may be in it or not, and others may be missing. So all is read under one generation of the
/// rules, or again.
#[cfg(test)]
pub(crate) fn observe(socket: &mut Socket) -> Result<Option<Firewall>, KernelError> {
    observe_at(socket, None).map(|(firewall, _)| firewall)
}

/// The same, and the generation of the rules that it was read in; `expected` is what its sets
/// probably hold.
pub(crate) fn observe_at(
    socket: &mut Socket,
    expected: Option<&Elements>,
) -> Result<(Option<Firewall>, u32), KernelError> {
    whole(socket, TableFamily::Inet, expected)
}

/// Reads the table's chains and sets, and the elements of these sets; the generation, too.
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

/// Reads the table at the egress hook; `None` if there is none.
pub(crate) fn observe_hook(socket: &mut Socket) -> Result<Option<Firewall>, KernelError> {
    // Most nodes have none.
    let table = table::flags_and_owner(socket, TableFamily::Netdev)?;
    if table.is_none() {
        return Ok(None);
    }
    whole(socket, TableFamily::Netdev, None).map(|(table, _)| table)
}

#[expect(clippy::redundant_closure_for_method_calls, reason = "a path has no lifetime of its own")]
fn whole(
    socket: &mut Socket,
    family: TableFamily,
    expected: Option<&Elements>,
) -> Result<(Option<Firewall>, u32), KernelError> {
    steady(socket, family, expected, |reader| reader.table())
}

/// Reads something of a table, again and again until nobody has changed anything meanwhile.
fn steady<T>(
    socket: &mut Socket,
    family: TableFamily,
    expected: Option<&Elements>,
    mut read: impl FnMut(&mut Reader<'_>) -> Result<T, KernelError>,
) -> Result<(T, u32), KernelError> {
    let found = in_one_piece(|| {
        let before = generation(socket)?;
        let mut reader = Reader::new(&mut *socket, family, before, expected);
        // Also an error is of no account if it is of what has changed.
        let read = read(&mut reader).map(|found| (found, before));
        let interrupted = reader.moved || generation(socket)? != before;
        Ok((read, Answered { interrupted }))
    })?;
    found.unwrap_or_else(|| {
        Err(KernelError::answer(
            format!("nft list table {family} {NFT_TABLE}"),
            "somebody changes nf_tables faster than it can be read",
        ))
    })
}

/// The part of a generation that is in every answer.
const fn low_half(generation: u32) -> u16 {
    (generation & 0xffff) as u16
}

struct Reader<'a> {
    socket: &'a mut Socket,
    family: TableFamily,
    generation: u16,
    /// What the sets probably hold.
    expected: Option<&'a Elements>,
    /// Whether something was changed since the reading began.
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

    fn table(&mut self) -> Result<Option<Firewall>, KernelError> {
        let request = Request {
            text: &format!("nft list table {} {NFT_TABLE}", self.family),
            kind: kind::GETTABLE,
            flags: 0,
            answer: kind::NEWTABLE,
        };
        let mut firewall = Firewall::default();
        let take = |attributes: Attributes<'_>| {
            let (flags, _) = table::read(attributes)?;
            firewall.dormant = flags & table::DORMANT != 0;
            Ok(())
        };
        match self.ask(&request, |writer| writer.string(1, NFT_TABLE), take) {
            Err(error) if error.errno() == Some(errno::ENOENT) => return Ok(None),
            other => other?,
        }
        self.contents(|_| true, &mut firewall)?;
        Ok(Some(firewall))
    }

    /// Reads the table's chains, rules and sets, and the elements of some of these.
    fn contents(
        &mut self,
        is_wanted: impl Fn(Set) -> bool,
        firewall: &mut Firewall,
    ) -> Result<(), KernelError> {
        self.chains(firewall)?;
        self.rules(firewall)?;
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
        let request = Request {
            text: &format!("nft list table {} {NFT_TABLE}", self.family),
            kind: kind::GETRULE,
            flags: flag::DUMP,
            answer: kind::NEWRULE,
        };
        let mut seen = BTreeSet::new();
        let take = |attributes: Attributes<'_>| add_rule(attributes, &mut seen, firewall);
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

    /// Reads the elements of a set that has at least so many.
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
                // Of ranges the kernel counts both ends.
                List::Elements(elements) if !set.is_interval() && elements.len() < least => {
                    std::thread::sleep(pause);
                }
                List::Elements(elements) => {
                    firewall.elements.extend(elements);
                    return Ok(());
                }
                List::NotOurs => {
                    // It holds what we never write and cannot name, so it must be made anew.
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

    /// Lists the elements of a set once.
    fn list(&mut self, set: Set) -> Result<List, KernelError> {
        let mut elements = Some(Vec::new());
        self.list_with(set, |attributes| add_elements(attributes, set, &mut elements))?;
        Ok(elements.map_or(List::NotOurs, |elements| decode(set, elements)))
    }

    /// Gives every message of a listing of a set's elements to `take`.
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
            // Deleted since the sets were listed; the generation says so, too.
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

/// Adds a listed chain.
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

/// Adds a listed rule to its chain, unless one with its handle was seen.
fn add_rule(
    attributes: Attributes<'_>,
    seen: &mut BTreeSet<u64>,
    firewall: &mut Firewall,
) -> Result<(), Malformed> {
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
}

/// Adds a listed set, and how many elements it has.
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
            // Elements that go by themselves are part of no state.
            let count = found.count.and_then(|count| usize::try_from(count).ok());
            if !set.is_fleeting() {
                counts.insert(set, count.unwrap_or(0));
            }
        }
        // A rule that we do not know brought it and takes it away.
        None if found.is_anonymous() => {}
        None => {
            firewall.strays.insert(Stray::Set(found.name));
        }
    }
    Ok(())
}

/// Adds the elements in one message of a listing.
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

/// Calls it with each element in one message of a listing.
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

/// Adds an element to the list, or gives the list up if it is one that we never write.
fn collect(list: &mut Option<Vec<element::Found>>, found: Option<element::Found>) {
    match (list.as_mut(), found) {
        (Some(list), Some(found)) => list.push(found),
        _ => *list = None,
    }
}

type Listed = BTreeMap<Key, Value>;

/// What one listing of a set's elements came to.
enum List {
    Elements(Listed),
    /// There are some that we never write.
    NotOurs,
    /// Some came twice.
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
        // The kernel goes on in a list by the number of elements it gave already. When it makes
        // a hash table larger meanwhile, in the background and in no generation of its own, some
        // elements come twice and as many not at all.
        Some(elements) if !set.is_interval() && elements.len() < count => List::Torn,
        Some(elements) => List::Elements(elements),
        None => List::NotOurs,
    }
}
