use std::process::Command;

use super::counts;
use crate::count::{Count, Counts};
use crate::diff::op::Op;
use crate::kernel::nft::observe::{observe, observe_at};
use crate::kernel::nft::tests::netns::in_netns;
use crate::kernel::nft::{commit, generation};
use crate::state::{Comment, Data, Elements, Key, Set, TableFamily, Tag, Value};
use crate::types::Family;

const BOTH: [Set; 2] = [Set::Count(Family::V4), Set::Count(Family::V6)];

fn tag(number: u32) -> Tag {
    Tag::new(0x3f2a_0001 + number).unwrap()
}

fn element(number: u32) -> (Key, Value) {
    let comment = Some(Comment::of_name(&format!("policy-{number}")));
    (Key::count(Family::V4, tag(number)), Value { data: Data::None, comment })
}

#[test]
fn what_was_counted_is_read_and_is_no_difference() {
    in_netns(|socket| {
        assert_eq!(counts(socket).unwrap(), Counts::new(), "there is no table");
        let mut ops = vec![Op::AddTable(TableFamily::Inet)];
        ops.extend(BOTH.map(Op::AddSet));
        let (key, value) = element(1);
        ops.push(Op::AddElement(key, value));
        commit(socket, &ops).unwrap();
        let zero = [((Family::V4, tag(1)), Count::default())];
        assert_eq!(counts(socket).unwrap().policies, zero.into());
        harness::needs(&["nft"]);
        let before = observe(socket).unwrap();
        commit(socket, &[Op::DeleteElement(key, element(1).1)]).unwrap();
        let line = "add element inet egress_datapath count4 \
                    { 3f2a:2 counter packets 5 bytes 300 comment \"policy-1\" }";
        assert!(Command::new("nft").arg(line).status().unwrap().success());
        let count = Count { packets: 5, bytes: 300 };
        assert_eq!(counts(socket).unwrap().policies, [((Family::V4, tag(1)), count)].into());
        assert_eq!(observe(socket).unwrap(), before);
    });
}

#[test]
fn a_set_of_the_same_name_that_counts_nothing_is_not_ours() {
    in_netns(|socket| {
        commit(socket, &[Op::AddTable(TableFamily::Inet)]).unwrap();
        harness::needs(&["nft"]);
        for kind in ["type classid;", "type classid; counter; quota over 1 mbytes;"] {
            let line = format!("add set inet egress_datapath count4 {{ {kind} }}");
            assert!(Command::new("nft").arg(line).status().unwrap().success());
            let found = observe(socket).unwrap().unwrap();
            assert_eq!((found.sets.len(), found.strays.len()), (0, 1), "{kind}");
            assert_eq!(counts(socket).unwrap(), Counts::new());
            commit(socket, &[Op::DeleteSet(BOTH[0])]).unwrap();
        }
        let line = "add set inet egress_datapath steer4 { type classid; counter; }";
        assert!(Command::new("nft").arg(line).status().unwrap().success());
        assert_eq!(observe(socket).unwrap().unwrap().strays.len(), 1);
    });
}

#[test]
fn many_counters_are_all_read_and_known_without_a_difference() {
    in_netns(|socket| {
        let all: Elements = (0..10_000).map(element).collect();
        let mut ops = vec![Op::AddTable(TableFamily::Inet), Op::AddSet(BOTH[0])];
        ops.extend(all.iter().map(|(key, value)| Op::AddElement(key, value)));
        commit(socket, &ops).unwrap();
        assert_eq!(counts(socket).unwrap().policies.len(), 10_000);
        // Reads with expected elements: elements with comments cannot be verified key by key.
        let (found, at) = observe_at(socket, Some(&all)).unwrap();
        assert_eq!((found.unwrap().elements, at), (all, generation(socket).unwrap()));
    });
}
