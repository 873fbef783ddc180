//! What is put is what is read, also by `nft` and from `nft`.

use std::process::Command;

use super::netns::{in_netns, nft};
use super::sample;
use crate::diff::op::Op;
use crate::kernel::nft::{commit, observe, observe_hook, observe_objects};
use crate::state::{
    ChainId, Data, Elements, Firewall, Key, NFT_TABLE, Set, Stray, TableFamily, Value,
};
use crate::types::{DeviceName, Family};

#[track_caller]
fn assert_same(found: Option<Firewall>) {
    let (found, wanted) = (found.unwrap(), sample::firewall());
    assert_eq!(found.strays, wanted.strays);
    assert_eq!(found.sets, wanted.sets);
    for (id, chain) in &wanted.chains {
        assert_eq!(found.chains.get(id), Some(chain), "{id}");
    }
    for (key, value) in &wanted.elements {
        assert_eq!(found.elements.get(&key), Some(value), "{key}");
    }
    assert_eq!(found, wanted);
}

#[test]
fn there_is_no_table_until_it_is_made_and_after_it_is_deleted() {
    in_netns(|socket| {
        assert_eq!(observe(socket), Ok(None));
        assert_eq!(commit(socket, &[]), Ok(()));
        assert_eq!(commit(socket, &[Op::AddTable(TableFamily::Inet)]), Ok(()));
        assert_eq!(observe(socket), Ok(Some(Firewall::default())));
        assert_eq!(commit(socket, &[Op::DeleteTable(TableFamily::Inet)]), Ok(()));
        assert_eq!(observe(socket), Ok(None));
    });
}

#[test]
fn a_table_with_everything_reads_back() {
    in_netns(|socket| {
        assert_eq!(commit(socket, &sample::ops()), Ok(()));
        assert_same(observe(socket).unwrap());
    });
}

/// Makes the device of the sample's hook.
fn make_device(name: &DeviceName) {
    let args = ["link", "add", name.as_str(), "type", "bridge"];
    assert!(Command::new("ip").args(args).status().unwrap().success());
}

#[test]
fn the_table_at_the_hook_is_one_of_its_own_and_reads_back() {
    harness::needs(&["nft"]);
    in_netns(|socket| {
        make_device(&sample::device());
        let (ops, wanted) = (sample::hook_ops(), sample::hook());
        commit(socket, &sample::ops()).unwrap();
        assert_eq!(observe_hook(socket), Ok(None));
        commit(socket, &ops).unwrap();
        assert_eq!(observe_hook(socket), Ok(Some(wanted.clone())));
        assert_same(observe(socket).unwrap());

        let listed = nft(&["-nn", "list", "ruleset"], "").unwrap();
        for rule in &wanted.chains[&ChainId::Egress].1[1..2] {
            assert!(listed.contains(&format!("\t{rule}\n")), "{rule} in {listed}");
        }
        for part in [
            "0x26000100 comment \"node-1\" : 02:00:00:00:00:01",
            "type filter hook egress device \"egress.vxlan\" priority 0; policy accept;",
        ] {
            assert!(listed.contains(part), "{part} in {listed}");
        }
        for again in [listed, script(&ops)] {
            nft(&["delete", "table", "netdev", NFT_TABLE], "").unwrap();
            assert_same(observe(socket).unwrap());
            let inet = again.find("table inet").unwrap_or(again.len());
            let netdev = again.find("table netdev").unwrap_or(0);
            let end = if inet > netdev { inet } else { again.len() };
            nft(&["-f", "-"], &again[netdev.min(end)..end]).unwrap();
            assert_eq!(observe_hook(socket), Ok(Some(wanted.clone())));
        }
        let script = format!("add table netdev {NFT_TABLE} {{ flags dormant; }}");
        nft(&["-f", "-"], &script).unwrap();
        let asleep = Firewall { dormant: true, ..wanted.clone() };
        assert_eq!(observe_hook(socket), Ok(Some(asleep)));
        commit(socket, &[Op::WakeTable(TableFamily::Netdev)]).unwrap();
        assert_eq!(observe_hook(socket), Ok(Some(wanted)));
        commit(socket, &[Op::DeleteTable(TableFamily::Netdev)]).unwrap();
        assert_eq!(observe_hook(socket), Ok(None));
        assert_same(observe(socket).unwrap());
    });
}

#[test]
fn a_chain_at_other_devices_and_names_of_the_other_table_are_not_ours() {
    harness::needs(&["nft"]);
    in_netns(|socket| {
        make_device(&sample::device());
        let script = format!(
            "table netdev {NFT_TABLE} {{
                 set peer4 {{ type ipv4_addr; }}
                 chain forward {{ }}
                 chain egress {{
                     type filter hook egress devices = {{ lo, {} }} priority 0;
                 }}
             }}",
            sample::device()
        );
        nft(&["-f", "-"], &script).unwrap();
        let found = observe_hook(socket).unwrap().unwrap();
        assert!(found.chains.is_empty() && found.sets.is_empty());
        let strays: Vec<_> = found.strays.into_iter().collect();
        let chain = |name: &str| Stray::Chain(name.into());
        assert_eq!(strays, [chain("egress"), chain("forward"), Stray::Set("peer4".into())]);
    });
}

#[test]
fn everything_can_be_deleted_again() {
    in_netns(|socket| {
        commit(socket, &sample::ops()).unwrap();
        let wanted = sample::firewall();
        let mut ops: Vec<_> = wanted.chains.keys().map(|id| Op::SetRules(*id, vec![])).collect();
        ops.extend(wanted.elements.iter().map(|(key, value)| Op::DeleteElement(key, value)));
        ops.extend(wanted.chains.into_keys().map(Op::DeleteChain));
        ops.extend(wanted.sets.into_iter().map(Op::DeleteSet));
        assert_eq!(commit(socket, &ops), Ok(()));
        assert_eq!(observe(socket), Ok(Some(Firewall::default())));
    });
}

#[test]
fn flushed_sets_are_empty_and_take_elements_again() {
    harness::needs(&["nft"]);
    in_netns(|socket| {
        commit(socket, &sample::ops()).unwrap();
        let whole = sample::firewall();
        let flush: Vec<_> = whole.sets.iter().copied().map(Op::FlushSet).collect();
        let refill = whole.elements.iter().map(|(key, value)| Op::AddElement(key, value));
        let refill: Vec<_> = refill.collect();
        let empty = Firewall { elements: Elements::default(), ..whole };
        for by_nft in [false, true] {
            for _ in 0..2 {
                // An empty set can be flushed, too.
                if by_nft {
                    nft(&["-f", "-"], &script(&flush)).unwrap();
                } else {
                    commit(socket, &flush).unwrap();
                }
                assert_eq!(observe(socket), Ok(Some(empty.clone())));
            }
            commit(socket, &refill).unwrap();
            assert_same(observe(socket).unwrap());
        }
        // A read without elements is the same as a read of empty sets.
        assert_eq!(observe_objects(socket).unwrap().0, Some(empty));
    });
}

/// The operations as `nft -f` takes them.
fn script(ops: &[Op]) -> String {
    let lines = ops.iter().flat_map(|op| {
        let text = op.to_string();
        text.lines().map(String::from).collect::<Vec<_>>()
    });
    let unquoted = |line: String| {
        let command = line.strip_prefix("nft ").unwrap();
        command.trim_matches('\'').to_owned() + "\n"
    };
    lines.map(unquoted).collect()
}

#[test]
fn what_we_print_makes_the_same_table_when_nft_runs_it() {
    harness::needs(&["nft"]);
    in_netns(|socket| {
        nft(&["-f", "-"], &script(&sample::ops())).unwrap();
        assert_same(observe(socket).unwrap());
    });
}

#[test]
fn what_nft_lists_makes_the_same_table_again() {
    harness::needs(&["nft"]);
    in_netns(|socket| {
        commit(socket, &sample::ops()).unwrap();
        let listed = nft(&["list", "ruleset"], "").unwrap();
        nft(&["flush", "ruleset"], "").unwrap();
        nft(&["-f", "-"], &listed).unwrap();
        assert_same(observe(socket).unwrap());
    });
}

#[test]
fn nft_lists_rules_in_the_words_that_we_use() {
    harness::needs(&["nft"]);
    in_netns(|socket| {
        commit(socket, &sample::ops()).unwrap();
        let listed = nft(&["-nn", "list", "ruleset"], "").unwrap();
        let (mut same, mut different) = (0, Vec::new());
        for (_, _, rules) in sample::chains() {
            for rule in rules {
                if listed.contains(&format!("\t{rule}\n")) {
                    same += 1;
                } else {
                    different.push(rule.to_string());
                }
            }
        }
        assert!(same >= 30, "{same} of {listed}\n{different:#?}");
        for element in [
            "3f2a:8 comment \"default/p2\" : 198.51.100.200",
            "198.51.100.0 . 3f2a:1 comment \"default/p1\" : 3f2a:3",
            "0x26000100 comment \"node-1\"",
            "10.9.0.0-10.9.0.77 : 3f2a:5",
        ] {
            assert!(listed.contains(element), "{element} in {listed}");
        }
    });
}

#[test]
fn what_is_not_ours_is_told_apart() {
    harness::needs(&["nft"]);
    in_netns(|socket| {
        commit(socket, &sample::ops()).unwrap();
        let script = format!(
            "add chain inet {NFT_TABLE} foreign
             add set inet {NFT_TABLE} foreign {{ type inet_service; }}
             delete rule inet {NFT_TABLE} translate4 handle 99999"
        );
        assert!(nft(&["-f", "-"], &script).is_err());
        let script = format!(
            "add chain inet {NFT_TABLE} foreign
             add set inet {NFT_TABLE} foreign {{ type inet_service; }}
             flush chain inet {NFT_TABLE} local_gateway
             add rule inet {NFT_TABLE} local_gateway tcp dport {{ 80, 443 }} limit rate 1/second drop
             add rule inet {NFT_TABLE} local_gateway counter packets 7 bytes 70 masquerade random
             delete set inet {NFT_TABLE} eip4
             add element inet {NFT_TABLE} any4 {{ 0:7 : 1:1 }}
             chain inet {NFT_TABLE} guard {{ policy drop; }}"
        );
        // A set in use cannot be deleted, so nothing of this is done.
        assert!(nft(&["-f", "-"], &script).is_err());
        assert_same(observe(socket).unwrap());

        let script = script
            .replace(&format!("delete set inet {NFT_TABLE} eip4"), "")
            .replace(" masquerade random", "");
        nft(&["-f", "-"], &script).unwrap();
        let found = observe(socket).unwrap().unwrap();
        let strays: Vec<_> = found.strays.iter().collect();
        assert_eq!(
            strays,
            [
                &Stray::Chain("foreign".into()),
                &Stray::Chain("guard".into()),
                &Stray::Set("any4".into()),
                &Stray::Set("foreign".into()),
            ]
        );
        assert!(!found.sets.contains(&Set::Any(Family::V4)));
        assert!(!found.chains.contains_key(&ChainId::Guard));
        let here: Vec<_> =
            found.chains[&ChainId::LocalGateway].1.iter().map(ToString::to_string).collect();
        assert_eq!(here.len(), 2);
        assert!(here[0].ends_with("<not ours> drop"), "{here:?}");
        assert_eq!(here[1], "counter");
    });
}

#[test]
fn a_set_of_another_type_is_a_stray_that_can_be_made_anew() {
    harness::needs(&["nft"]);
    in_netns(|socket| {
        commit(socket, &[Op::AddTable(TableFamily::Inet)]).unwrap();
        nft(&["add", "set", "inet", NFT_TABLE, "peer4 { type ipv4_addr; flags interval; }"], "")
            .unwrap();
        let found = observe(socket).unwrap().unwrap();
        let stray = Stray::Set("peer4".into());
        assert_eq!(found.strays, [stray.clone()].into());
        assert_eq!(found.sets, [].into());
        let peer = Set::Peer(Family::V4);
        commit(socket, &[Op::DeleteStray(TableFamily::Inet, stray), Op::AddSet(peer)]).unwrap();
        let found = observe(socket).unwrap().unwrap();
        assert_eq!(found.sets, [peer].into());
        assert!(found.strays.is_empty());
    });
}

#[test]
fn a_table_that_sleeps_is_seen_and_woken() {
    harness::needs(&["nft"]);
    in_netns(|socket| {
        commit(socket, &sample::ops()).unwrap();
        let script = format!("add table inet {NFT_TABLE} {{ flags dormant; }}");
        nft(&["-f", "-"], &script).unwrap();
        let found = observe(socket).unwrap().unwrap();
        assert_eq!(found, Firewall { dormant: true, ..sample::firewall() });
        commit(socket, &[Op::WakeTable(TableFamily::Inet)]).unwrap();
        assert_same(observe(socket).unwrap());
        assert!(!nft(&["list", "tables", "inet"], "").unwrap().contains("dormant"));
    });
}

#[test]
fn a_hundred_thousand_elements_are_one_transaction() {
    in_netns(|socket| {
        let any = Set::Source(Family::V4);
        let mut ops = vec![Op::AddTable(TableFamily::Inet), Op::AddSet(any)];
        let value = Value::plain(Data::Tag(sample::tag(1)));
        let keys = (0..100_000).map(|n: u32| Key::source((0x0a00_0000 + n).to_be_bytes().into()));
        ops.extend(keys.map(|key| Op::AddElement(key, value.clone())));
        commit(socket, &ops).unwrap();
        let found = observe(socket).unwrap().unwrap();
        assert_eq!(found.elements.len(), 100_000);
        assert!(found.elements.values().all(|found| found == value));
    });
}

#[test]
fn elements_are_all_read_while_the_kernel_makes_their_table_larger() {
    in_netns(|socket| {
        let source = Set::Source(Family::V4);
        let value = Value::plain(Data::Tag(sample::tag(1)));
        for count in [50, 700, 6_000, 17_000, 3_000, 24_000] {
            let mut ops = vec![Op::AddTable(TableFamily::Inet), Op::AddSet(source)];
            let keys = (0..count).map(|n: u32| Key::source((n * 7 + 1).to_be_bytes().into()));
            ops.extend(keys.map(|key| Op::AddElement(key, value.clone())));
            commit(socket, &ops).unwrap();
            let found = observe(socket).unwrap().unwrap();
            assert_eq!(found.elements.len(), count as usize);
            commit(socket, &[Op::DeleteTable(TableFamily::Inet)]).unwrap();
        }
    });
}
