use super::*;
use crate::kernel::nft::observe;
use crate::kernel::nft::tests::netns::{in_netns, nft};
use crate::state::{ChainId, Data, Field, Key, NFT_TABLE, Tag, Target, Value};
use crate::types::Family;

const SOURCES: Set = Set::Source(Family::V4);
const OTHERS: Set = Set::Peer(Family::V4);

fn sources(from: u32, to: u32) -> impl Iterator<Item = Op> {
    let value = Tag::new(0x0001_0001).map(|tag| Value::plain(Data::Tag(tag))).unwrap();
    let key = |number: u32| Key::source((0x0a00_0000 + number).to_be_bytes().into());
    (from..to).map(move |number| Op::AddElement(key(number), value.clone()))
}

fn commit(socket: &mut Socket, ops: &[Op]) -> Result<(), Refused> {
    let sizes = Sizes::of(ops);
    let terms = Terms { sizes: Some(&sizes), ..Terms::default() };
    commit_as(socket, ops, &terms).map(drop)
}

/// Operations for a table with two chains, one of which looks up the sources, and `count` sources.
fn table(count: u32) -> Vec<Op> {
    let mut ops = vec![Op::AddTable(TableFamily::Inet), Op::AddSet(SOURCES), Op::AddSet(OTHERS)];
    for chain in [ChainId::Classify, ChainId::Bypass] {
        ops.push(Op::AddChain(chain, None));
    }
    let looks = NftRule(vec![
        Field::Source(Family::V4).map(SOURCES, Target::Priority),
        Stmt::Goto(ChainId::Bypass),
    ]);
    ops.push(Op::SetRules(ChainId::Classify, vec![looks]));
    ops.push(Op::SetRules(ChainId::Bypass, vec![NftRule(vec![Stmt::ClearPriority])]));
    let peer = std::net::Ipv4Addr::LOCALHOST.into();
    ops.push(Op::AddElement(Key::peer(peer), Value::plain(Data::None)));
    ops.extend(sources(0, count));
    ops
}

/// Adds more sources than the set has room for.
fn overfill(socket: &mut Socket, to: u32) -> (Vec<Op>, Refused) {
    let more: Vec<_> = sources(410, to).collect();
    let refused = commit(socket, &more).unwrap_err();
    assert_eq!(full(&more, &refused), [SOURCES].into(), "{refused:?}");
    (more, refused)
}

/// Adds more sources than the set has room for, and enlarges it.
fn outgrow(socket: &mut Socket, to: u32) -> (Vec<Op>, Between) {
    let (more, refused) = overfill(socket, to);
    let between = enlarge(socket, &[SOURCES].into(), &Sizes::of(&more), refused).unwrap();
    (more, between)
}

fn size_of(set: Set) -> Option<u32> {
    let noun = if set.data().is_some() { "map" } else { "set" };
    let text = nft(&["list", noun, "inet", NFT_TABLE, &set.name()], "").unwrap();
    let mut words = text.split_whitespace().skip_while(|word| *word != "size");
    words.nth(1).map(|size| size.parse().unwrap())
}

#[test]
fn a_full_set_is_made_anew_with_all_that_was_in_it() {
    in_netns(|socket| {
        commit(socket, &table(410)).unwrap();
        let before = observe(socket).unwrap();

        let (more, between) = outgrow(socket, 600);
        assert_eq!(between.after, between.before + 1);
        assert_eq!(observe(socket).unwrap(), before);
        commit(socket, &more).unwrap();
        let found = observe(socket).unwrap().unwrap();
        assert_eq!(found.elements.of(SOURCES).count(), 600);
        harness::needs(&["nft"]);
        assert_eq!((size_of(SOURCES), size_of(OTHERS)), (Some(1024), Some(512)));
    });
}

#[test]
fn a_set_that_outgrows_every_size_grows_by_itself() {
    in_netns(|socket| {
        commit(socket, &table(410)).unwrap();
        let (many, _) = outgrow(socket, 150_000);
        commit(socket, &many).unwrap();
        let more: Vec<_> = sources(150_000, 200_000).collect();
        commit(socket, &more).unwrap();
    });
}

#[test]
fn a_set_that_somebody_elses_rule_looks_into_is_left_as_it_is() {
    harness::needs(&["nft"]);
    in_netns(|socket| {
        commit(socket, &table(410)).unwrap();
        let rule = "meta priority set ip saddr map @source4 counter accept";
        nft(&["-f", "-"], &format!("add rule inet {NFT_TABLE} classify {rule}")).unwrap();
        let before = observe(socket).unwrap().unwrap();
        let (_, rules) = &before.chains[&ChainId::Classify];
        assert!(rules[1].0.iter().any(|statement| matches!(statement, Stmt::Unknown(_))));
        let (more, refused) = overfill(socket, 513);
        let refused = enlarge(socket, &[SOURCES].into(), &Sizes::of(&more), refused).unwrap_err();
        let said = refused[0].1.to_string();
        assert!(said.contains("source4") && said.contains("set is full"), "{said}");
        assert_eq!(observe(socket).unwrap(), Some(before));
    });
}

#[test]
fn what_was_refused_for_other_reasons_is_no_matter_of_room() {
    in_netns(|socket| {
        commit(socket, &table(410)).unwrap();
        let there: Vec<_> = sources(409, 410).collect();
        let refused = commit(socket, &there).unwrap_err();
        assert_eq!(refused[0].1.errno(), Some(errno::EEXIST));
        assert!(full(&there, &refused).is_empty());
    });
}

#[test]
fn somebody_elses_chain_in_our_table_is_not_in_the_way() {
    harness::needs(&["nft"]);
    in_netns(|socket| {
        commit(socket, &table(410)).unwrap();
        let script = format!(
            "add chain inet {NFT_TABLE} theirs\n\
             add rule inet {NFT_TABLE} theirs meta priority set ip saddr map @source4"
        );
        nft(&["-f", "-"], &script).unwrap();
        assert_eq!(observe(socket).unwrap().unwrap().strays.len(), 1);
        let (more, _) = outgrow(socket, 513);
        commit(socket, &more).unwrap();
        assert!(observe(socket).unwrap().unwrap().strays.is_empty());
    });
}
