//! All or nothing, and which operation it was.

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::netns::{in_netns, nft};
use super::sample;
use super::sample::tag;
use crate::connection::Connection;
use crate::diff::op::Op;
use crate::error::errno;
use crate::kernel::nft::{commit, generation, observe};
use crate::state::{Data, Key, NFT_TABLE, Set, TableFamily, Value};
use crate::types::{DeviceName, Family};

const V4: Family = Family::V4;

fn any(number: u16, to: u16) -> (Key, Value) {
    (Key::any(V4, tag(number)), Value::plain(Data::Tag(tag(to))))
}

fn add(number: u16) -> Op {
    let (key, value) = any(number, 1);
    Op::AddElement(key, value)
}

fn delete(number: u16) -> Op {
    let (key, value) = any(number, 1);
    Op::DeleteElement(key, value)
}

#[test]
fn a_refused_operation_is_named_and_nothing_is_done() {
    in_netns(|socket| {
        commit(socket, &[Op::AddTable(TableFamily::Inet), Op::AddSet(Set::Any(V4)), add(1)])
            .unwrap();
        let before = observe(socket).unwrap();
        let ops = [
            Op::DeleteLink(DeviceName::new("not-nft").unwrap()),
            add(2),
            add(3),
            add(1),
            add(4),
            Op::AddSet(Set::Peer(V4)),
            Op::AddSet(Set::Any(V4)),
            delete(9),
        ];
        let refused = commit(socket, &ops).unwrap_err();
        let refused: Vec<_> = refused
            .into_iter()
            .map(|(index, error)| (index, error.errno(), error.request().to_owned()))
            .collect();
        assert_eq!(
            refused,
            [
                (3, Some(errno::EEXIST), ops[3].to_string()),
                (6, Some(errno::EEXIST), ops[6].to_string()),
                (7, Some(errno::ENOENT), ops[7].to_string()),
            ]
        );
        assert_eq!(observe(socket).unwrap(), before);
    });
}

#[test]
fn a_value_changes_by_deleting_and_adding_its_key() {
    in_netns(|socket| {
        commit(
            socket,
            &[Op::AddTable(TableFamily::Inet), Op::AddSet(Set::Any(V4)), add(1), add(2)],
        )
        .unwrap();
        let (key, value) = any(1, 77);
        commit(socket, &[delete(1), Op::AddElement(key, value.clone())]).unwrap();
        let found = observe(socket).unwrap().unwrap();
        assert_eq!(found.elements.get(&key), Some(value));
        assert_eq!(found.elements.len(), 2);
    });
}

/// A connection of a protocol, by whose second number alone it differs from others.
fn connection(protocol: u8, port: u16) -> Connection {
    let (opener, peer) = ([10, 0, 0, 1].into(), [192, 0, 2, 1].into());
    Connection {
        protocol,
        source: opener,
        source_port: port,
        destination: peer,
        destination_port: 53,
        peer,
        reply_source_port: 53,
        snat_address: opener,
        snat_port: port,
        mark: 0,
        zone: 0,
        reply_zone: 0,
        id: port.into(),
    }
}

/// How long the elements of a set still stay.
fn left(set: Set) -> Vec<Duration> {
    let set = set.to_string();
    let list = nft(&["list", "set", "inet", NFT_TABLE, &set], "").unwrap();
    let times = list.split(" expires ").skip(1);
    times.filter_map(|behind| behind.split_whitespace().next()).map(read_time).collect()
}

/// As `nft` prints it: `29s984ms`, `30s` or `984ms`.
fn read_time(text: &str) -> Duration {
    let text = text.trim_end_matches(|end: char| !end.is_ascii_alphanumeric());
    let (seconds, rest) = match text.split_once('s') {
        Some((seconds, rest)) if seconds.bytes().all(|byte| byte.is_ascii_digit()) => {
            (seconds, rest)
        }
        _ => ("0", text),
    };
    let rest = rest.trim_end_matches("ms");
    let number = |text: &str| text.parse().unwrap_or(0);
    Duration::from_secs(number(seconds)) + Duration::from_millis(number(rest))
}

#[test]
fn answers_are_held_as_long_from_every_time_that_it_is_asked_for() {
    harness::needs(&["nft"]);
    in_netns(|socket| {
        let sets = [Set::BlockedReply(V4), Set::PortlessBlockedReply(V4)];
        let made = [&[Op::AddTable(TableFamily::Inet)][..], &sets.map(Op::AddSet)].concat();
        commit(socket, &made).unwrap();
        let hold = |protocol, port| Op::BlockReplies(connection(protocol, port));
        // Without ports all connections between the two have the same answers.
        let first = [hold(17, 7), hold(47, 1), hold(47, 2)];
        commit(socket, &first).unwrap();
        let full = Connection::REPLY_BLOCK_TIME;
        let (mut before, begin) = (left(sets[0]), Instant::now());
        assert_eq!((before.len(), left(sets[1]).len()), (1, 1));
        while before[0] + Duration::from_millis(500) >= full {
            assert!(begin.elapsed() < full, "time does not pass");
            std::thread::sleep(Duration::from_millis(50));
            before = left(sets[0]);
        }
        let earlier = generation(socket).unwrap();
        let again = [hold(17, 7), hold(17, 8), hold(47, 3)];
        commit(socket, &again).unwrap();
        assert_eq!(generation(socket), Ok(earlier + 1));
        for set in sets {
            let now = left(set);
            assert!(now.iter().all(|left| *left > before[0]), "{set}: {before:?}, then {now:?}");
        }
        assert_eq!((left(sets[0]).len(), left(sets[1]).len()), (2, 1));
    });
}

#[test]
fn a_transaction_that_has_nothing_to_do_is_no_error() {
    in_netns(|socket| {
        commit(socket, &[Op::AddTable(TableFamily::Inet)]).unwrap();
        let before = generation(socket);
        commit(socket, &[Op::WakeTable(TableFamily::Inet)]).unwrap();
        assert_eq!(generation(socket), before);
    });
}

#[test]
fn each_operation_of_a_large_transaction_can_be_the_one_that_is_named() {
    in_netns(|socket| {
        let mut ops = sample::ops();
        let good = ops.len();
        for at in [0, 1, 5, 30, good] {
            ops.insert(
                at,
                Op::AddElement(Key::peer([9, 9, 9, 9].into()), Value::plain(Data::None)),
            );
            ops.insert(at, Op::DeleteSet(Set::Destination(V4, 7)));
            let refused = commit(socket, &ops).unwrap_err();
            assert_eq!(refused[0].0, at, "{refused:?}");
            assert_eq!(refused[0].1.errno(), Some(errno::ENOENT));
            assert_eq!(observe(socket), Ok(None));
            ops.drain(at..at + 2);
        }
        assert_eq!(commit(socket, &ops), Ok(()));
    });
}

#[test]
fn other_writers_delay_but_do_not_stop_us() {
    in_netns(|socket| {
        commit(socket, &[Op::AddTable(TableFamily::Inet), Op::AddSet(Set::Any(V4))]).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        std::thread::scope(|scope| {
            // A thread inherits the network namespace of the one that starts it.
            let stopped = Arc::clone(&stop);
            let writer = scope.spawn(move || {
                let mut commits = 0;
                while !stopped.load(Ordering::Relaxed) && commits < 1000 {
                    for verb in ["add", "delete"] {
                        let done = Command::new("nft").args([verb, "table", "inet", "x"]).status();
                        commits += u32::from(done.is_ok_and(|status| status.success()));
                    }
                }
                commits
            });
            for number in 1..=400 {
                assert_eq!(commit(socket, &[add(number)]), Ok(()));
            }
            stop.store(true, Ordering::Relaxed);
            assert!(writer.join().unwrap() > 0);
        });
        assert_eq!(observe(socket).unwrap().unwrap().elements.len(), 400);
    });
}
