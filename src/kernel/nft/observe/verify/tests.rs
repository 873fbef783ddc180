use std::collections::{BTreeMap, BTreeSet};

use super::*;
use crate::diff::op::Op;
use crate::kernel::netlink::bpf::tests::run;
use crate::kernel::netlink::socket::Socket;
use crate::kernel::nft::observe::observe_at;
use crate::kernel::nft::tests::netns::in_netns;
use crate::kernel::nft::{commit, generation, observe};
use crate::state::{Comment, Firewall, TableFamily};
use crate::types::Family;

const SETS: [Set; 4] = [
    Set::Source(Family::V4),
    Set::Source(Family::V6),
    Set::Destination(Family::V4, 24),
    Set::Destination(Family::V6, 64),
];

fn tag(number: u32) -> Tag {
    Tag::new(0x3f2a_0001 + number % 0x8000).unwrap()
}

fn key(set: Set, number: u32) -> Key {
    let address = |number: u32| std::net::Ipv4Addr::from_bits(0x0a00_0000 + number);
    let wide = |number: u32| (0x2001_0db8_u128 << 96 | u128::from(number) << 64).to_be_bytes();
    let net = |address, length| ipnet::IpNet::new(address, length).unwrap();
    match set {
        Set::Source(Family::V4) => Key::source(address(number).into()),
        Set::Source(_) => Key::source(wide(number).into()),
        Set::Destination(Family::V4, length) => {
            Key::destination(net(address(number << 8).into(), length), tag(number % 3))
        }
        Set::Destination(_, length) => {
            Key::destination(net(wide(number).into(), length), tag(number % 3))
        }
        other => panic!("{other}"),
    }
}

fn value(class: u32) -> Value {
    Value::plain(Data::Tag(tag(class)))
}

/// Adds elements to a new table.
fn put(socket: &mut Socket, elements: &Elements) {
    let _absent = commit(socket, &[Op::DeleteTable(TableFamily::Inet)]);
    let mut ops = vec![Op::AddTable(TableFamily::Inet)];
    ops.extend(SETS.map(Op::AddSet));
    ops.extend(elements.iter().map(|(key, value)| Op::AddElement(key, value)));
    commit(socket, &ops).unwrap();
}

/// Whether the kernel counts the elements of the first set, which is not empty.
fn counts_elements(socket: &mut Socket) -> bool {
    let now = generation(socket).unwrap();
    let mut reader = Reader::new(socket, TableFamily::Inet, now, None);
    reader.sets(&mut Firewall::default()).unwrap()[&SETS[0]] > 0
}

fn differences(socket: &mut Socket, set: Set, expected: &Elements) -> Option<Vec<Difference>> {
    let count = observe(socket).unwrap().unwrap().elements.of(set).count();
    let now = generation(socket).unwrap();
    let mut reader = Reader::new(socket, TableFamily::Inet, now, Some(expected));
    let found = reader.differences(set, count, expected).unwrap();
    assert!(!reader.moved);
    assert!(socket.unfilter().is_err(), "a filter was left");
    found
}

#[test]
fn silence_says_that_everything_is_as_expected() {
    in_netns(|socket| {
        for (set, count, class) in [
            (SETS[0], 70_000, 100),
            (SETS[0], 9000, 9000),
            (SETS[1], 5000, 1),
            (SETS[2], 5000, 7),
            (SETS[3], 300, 300),
        ] {
            // Equal values are never adjacent, so that they must be grouped.
            let all = (0..count).map(|n| (key(set, n), value(n % class)));
            let all: Elements = all.collect();
            put(socket, &all);
            assert_eq!(differences(socket, set, &all), Some(Vec::new()), "{set} {count} {class}");
        }
    });
}

/// Pseudorandom number below a limit.
fn random(seed: &mut u64, below: u64) -> u32 {
    *seed = seed.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
    u32::try_from((*seed >> 33) % below).unwrap()
}

#[test]
fn what_is_different_is_found_one_by_one_and_what_is_not_expected_needs_a_listing() {
    in_netns(|socket| {
        let (mut seed, mut proven) = (7, 0);
        for round in 0..120 {
            let set = SETS[round % SETS.len()];
            let classes = [1, 4, 1000][round % 3];
            let count = 1 + random(&mut seed, 400);
            let expected: Elements =
                (0..count).map(|n| (key(set, n), value(random(&mut seed, classes)))).collect();
            let mut is = expected.clone();
            for _ in 0..random(&mut seed, 12) {
                let hit = key(set, random(&mut seed, count.into()));
                match random(&mut seed, 3) {
                    0 => drop(is.remove(&hit)),
                    1 => drop(is.insert(hit, value(5000 + random(&mut seed, 3)))),
                    _ => {
                        let noted = Comment::of_name("somebody's");
                        let same =
                            is.get(&hit).map(|value| Value { comment: Some(noted), ..value });
                        is.extend(same.map(|value| (hit, value)));
                    }
                }
            }
            let extra = random(&mut seed, 4) == 0;
            if extra {
                is.insert(key(set, count + 7), value(1));
            }
            put(socket, &is);
            let found = differences(socket, set, &expected);
            assert_eq!(found.is_none(), extra, "round {round}");
            let Some(found) = found else { continue };
            proven += 1;
            let distinct: BTreeSet<_> = found.iter().map(|(key, _)| *key).collect();
            assert_eq!(distinct.len(), found.len(), "round {round}");
            let mut as_found = expected.clone();
            for (key, value) in found {
                assert_ne!(expected.get(&key), value, "round {round}");
                match value {
                    Some(value) => drop(as_found.insert(key, value)),
                    None => drop(as_found.remove(&key)),
                }
            }
            assert_eq!(as_found, is, "round {round}");
        }
        assert!(proven > 60, "{proven}");
    });
}

#[test]
fn what_differs_a_lot_is_listed() {
    in_netns(|socket| {
        let set = SETS[0];
        let few: Elements = (0..10).map(|n| (key(set, n), value(0))).collect();
        let many: Elements = (0..3000).map(|n| (key(set, n), value(0))).collect();
        let others: Elements = (0..3000).map(|n| (key(set, n), value(n + 1))).collect();
        let elsewhere: Elements = (5000..8000).map(|n| (key(set, n), value(0))).collect();
        put(socket, &few);
        assert_eq!(differences(socket, set, &many), None);
        put(socket, &many);
        for expected in [few, others, elsewhere, Elements::default()] {
            assert_eq!(differences(socket, set, &expected), None);
        }
        let noted = Value { comment: Some(Comment::of_name("x")), ..value(0) };
        let noted: Elements = many.iter().map(|(key, _)| (key, noted.clone())).collect();
        assert_eq!(differences(socket, set, &noted), None);
    });
}

#[test]
fn a_large_table_reads_the_same_whatever_is_expected() {
    in_netns(|socket| {
        let mut all: BTreeMap<_, _> = (0..9000).map(|n| (key(SETS[0], n), value(n % 90))).collect();
        all.extend((0..9000).map(|n| (key(SETS[1], n), value(n % 90))));
        all.extend((0..40).map(|n| (key(SETS[2], n), value(n))));
        let expected: Elements = all.clone().into_iter().collect();
        all.remove(&key(SETS[0], 8999));
        all.insert(key(SETS[0], 17), value(4000));
        all.insert(key(SETS[1], 9001), value(1));
        let is: Elements = all.into_iter().collect();
        put(socket, &is);
        let listed = observe(socket).unwrap().unwrap();
        assert!(listed.elements == is);
        for expected in [&expected, &is, &Elements::default()] {
            let (found, at) = observe_at(socket, Some(expected)).unwrap();
            assert!(found.as_ref() == Some(&listed) && at == generation(socket).unwrap());
        }
        let counts = counts_elements(socket);
        harness::needs_kernel("counts of the elements of a set (Linux 6.16)", counts);
        let (found, _) = observe_at(socket, Some(&is)).unwrap();
        let found = found.unwrap().elements;
        let numbers = [found.v4_apart_from(&is).len(), found.v6_apart_from(&is).len()];
        assert_eq!(numbers, [0, 0], "not taken as proven");
    });
}

#[cfg(feature = "testing")]
#[test]
fn whatever_goes_wrong_the_table_is_read() {
    use crate::faults::{Fault, Faults};
    use crate::kernel::netlink::fault_injector::Tap;
    /// Index of the call that reads the table; the generation is read before it.
    const TABLE: usize = 1;
    in_netns(|socket| {
        let expected: Elements = (0..9000).map(|n| (key(SETS[0], n), value(n % 9))).collect();
        let mut is = expected.clone();
        is.remove(&key(SETS[0], 4000));
        put(socket, &is);
        let counted = Faults::new();
        socket.set_tap(Tap::of_netfilter(counted.clone()));
        let wanted = observe_at(socket, Some(&expected)).unwrap();
        let calls = counted.calls().len();
        assert!(calls > 8, "{calls}");
        for call in 0..calls {
            for fault in [Fault::LoseReply, Fault::CutReply, Fault::Refuse(2), Fault::Errno(105)] {
                if call == TABLE && matches!(fault, Fault::Refuse(2)) {
                    continue; // ENOENT here means that there is no table.
                }
                let text = format!("{fault:?} at {call}");
                let faults = Faults::new().at_call(call, fault);
                socket.set_tap(Tap::of_netfilter(faults.clone()));
                // An error is as good as the correct result.
                if let Ok(found) = observe_at(socket, Some(&expected)) {
                    assert!(found == wanted, "{text}");
                }
                assert_eq!(faults.pending(), 0, "{text}");
                socket.set_tap(Tap::of_netfilter(Faults::new()));
                assert!(observe_at(socket, Some(&expected)).unwrap() == wanted, "{text}");
            }
        }
    });
}

#[test]
fn only_answers_with_the_expected_value_alone_are_dropped() {
    for set in SETS {
        let program = filter(set, &key(set, 1)).unwrap();
        let answer = |kind, sequence, value: &Value| {
            let mut writer = Writer::default();
            let message = begin(&mut writer, kind, 0, sequence, set);
            writer.nest(3, |writer| element::write(writer, &key(set, 2), Some(value)));
            writer.end(message);
            writer.finish().unwrap()
        };
        let expected = tag(3).get();
        let noted = Value { comment: Some(Comment::of_name("x")), ..value(3) };
        assert!(!run(&program, &answer(kind::NEWSETELEM, expected, &value(3))), "{set}");
        for (kind, sequence, value) in [
            (kind::NEWSETELEM, expected, value(4)),
            (kind::NEWSETELEM, expected + 1, value(3)),
            (kind::NEWSETELEM, expected, noted),
            (NLMSG_ERROR, expected, value(3)),
            (kind::DELSETELEM, expected, value(3)),
        ] {
            assert!(run(&program, &answer(kind, sequence, &value)), "{set} {kind} {value:?}");
        }
    }
}
