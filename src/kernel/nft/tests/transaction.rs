//! All or nothing, and which operation it was.

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::netns::in_netns;
use super::sample::{self, tag};
use crate::error::errno;
use crate::kernel::nft::{commit, observe};
use crate::op::Op;
use crate::state::{Data, Key, Set, TableFamily, Value};
use crate::types::{DeviceName, Family};

const V4: Family = Family::V4;

fn any(number: u16, to: u16) -> (Key, Value) {
    (Key::Any(V4, tag(number)), Value::plain(Data::Tag(tag(to))))
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

#[test]
fn each_operation_of_a_large_transaction_can_be_the_one_that_is_named() {
    in_netns(|socket| {
        let mut ops = sample::ops();
        let good = ops.len();
        for at in [0, 1, 5, 30, good] {
            ops.insert(
                at,
                Op::AddElement(Key::Peer([9, 9, 9, 9].into()), Value::plain(Data::None)),
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
