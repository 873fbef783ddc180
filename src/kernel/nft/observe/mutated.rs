//! Mutated dumps of our table.

use super::*;
use crate::kernel::mutate;
use crate::kernel::mutated::{answers, golden_table};
use crate::kernel::netlink::message::{Message, Messages};
use crate::kernel::nft::{batch, kind, table};
use crate::state::Stmt;

const DUMP: u16 = flag::DUMP | flag::ACK;

/// Dumps of these kinds: those of the kernel, and golden ones.
fn corpus(requests: &[(u16, u16, Option<Set>)]) -> Vec<Vec<u8>> {
    let request = |(kind, flags, set): &(u16, u16, Option<Set>)| {
        let mut writer = Writer::default();
        writer.nfgen(batch::INET, 0);
        writer.string(1, NFT_TABLE);
        if let Some(set) = set {
            writer.string(2, &set.name());
        }
        (*kind, *flags, writer.finish().unwrap())
    };
    let mut found = answers(
        crate::kernel::netlink::nfnetlink::NETFILTER,
        requests.iter().map(request).collect(),
    );
    found.extend(golden_table());
    found
}

/// Calls `take` with the body of each message of a type; `None` if no message could be read.
fn each(input: &[u8], kind: u16, mut take: impl FnMut(Attributes<'_>) -> bool) -> Option<()> {
    let mut count = 0;
    for message in Messages::new(input) {
        let message: Message<'_> = message.ok()?;
        if message.kind == kind {
            let (_, body) = message.nfgen().ok()?;
            count += usize::from(take(Attributes::new(body)));
        }
    }
    (count > 0).then_some(())
}

#[test]
fn mutated_tables() {
    let corpus = corpus(&[(kind::GETTABLE, 0, None), (kind::GETTABLE, DUMP, None)]);
    mutate::messages("nf_tables tables", 1, &corpus, |input| {
        each(input, kind::NEWTABLE, |body| table::read(body).is_ok())?;
        Some(0)
    });
}

#[test]
fn mutated_chains() {
    mutate::messages("nf_tables chains", 8, &corpus(&[(kind::GETCHAIN, DUMP, None)]), |input| {
        let mut found = Firewall::default();
        each(input, kind::NEWCHAIN, |body| add_chain(body, TableFamily::Inet, &mut found).is_ok())?;
        for id in found.chains.keys() {
            assert_eq!(ChainId::from_name(&id.to_string()), Some(*id));
        }
        Some(
            found.chains.len() * size_of::<(ChainId, Option<crate::state::Base>)>() + names(&found),
        )
    });
}

fn names(found: &Firewall) -> usize {
    let names = found.strays.iter().map(|stray| match stray {
        Stray::Chain(name) | Stray::Set(name) | Stray::Flowtable(name) => {
            size_of::<Stray>() + name.len()
        }
    });
    names.sum()
}

#[test]
fn mutated_rules() {
    let all: Vec<ChainId> = crate::kernel::nft::tests::sample_chains();
    mutate::messages("nf_tables rules", 24, &corpus(&[(kind::GETRULE, DUMP, None)]), |input| {
        let mut found = Firewall::default();
        found.chains.extend(all.iter().map(|id| (*id, (None, Vec::new()))));
        let mut seen = BTreeSet::new();
        each(input, kind::NEWRULE, |body| match new_rule(body, &mut seen) {
            Ok(Some((chain, rule))) => {
                found.chains.entry(chain).or_default().1.push(rule.rule);
                true
            }
            other => other.is_ok(),
        })?;
        let rules = found.chains.values().flat_map(|(_, rules)| rules);
        Some(rules.map(|rule| size_of_val(rule) + rule.0.len() * size_of::<Stmt>()).sum())
    });
}

#[test]
fn mutated_sets() {
    mutate::messages("nf_tables sets", 8, &corpus(&[(kind::GETSET, DUMP, None)]), |input| {
        let (mut found, mut counts) = (Firewall::default(), BTreeMap::new());
        each(input, kind::NEWSET, |body| {
            add_set(body, TableFamily::Inet, &mut counts, &mut found).is_ok()
        })?;
        Some(found.sets.len() * size_of::<Set>() + names(&found))
    });
}

#[test]
fn mutated_elements() {
    use crate::types::Family::{V4, V6};
    let sets = [
        Set::PolicyAction,
        Set::Gateway,
        Set::Peer(V4),
        Set::Excluded(V4),
        Set::Excluded(V6),
        Set::Source(V4),
        Set::SourceNet(V6),
        Set::Steer(V4),
        Set::Snat(V6),
        Set::Count(V4),
        Set::Any(V4),
        Set::Destination(V4, 24),
        Set::Destination(V6, 64),
    ];
    let corpus = corpus(&sets.map(|set| (kind::GETSETELEM, DUMP, Some(set))));
    mutate::messages("nf_tables elements", 32, &corpus, |input| {
        // Each input is read as that of every fourth set; the first of them follows from the input.
        let turn = input.iter().map(|byte| usize::from(*byte)).sum::<usize>() % 4;
        let mut size = None;
        for set in sets.iter().skip(turn).step_by(4) {
            let mut list = Some(Vec::new());
            let Some(()) =
                each(input, kind::NEWSETELEM, |body| add_elements(body, *set, &mut list).is_ok())
            else {
                continue;
            };
            let Some(list) = list else { continue };
            let held: usize =
                list.iter().map(|found| size_of_val(found) + found.key.len() + note(found)).sum();
            size = size.max(Some(held));
            if let List::Elements(elements) = decode(*set, list) {
                assert!(elements.keys().all(|key| key.set() == *set));
            }
        }
        size
    });
}

fn note(found: &element::Found) -> usize {
    let comment = found.value.as_ref().and_then(|value| value.comment.as_ref());
    comment.map_or(0, |comment| comment.as_str().len())
}
