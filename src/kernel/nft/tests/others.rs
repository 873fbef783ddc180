//! What others write, in our table and beside it, is read without an error.

use super::netns::{in_netns, nft};
use super::sample;
use crate::diff::op::Op;
use crate::kernel::netlink::message::{Ack, Messages, NLMSG_ERROR, Writer, flag};
use crate::kernel::nft::{batch, commit, kind, observe};
use crate::state::{ChainId, Stmt};

#[test]
fn a_rule_of_any_form_in_our_chain_is_unknown_and_no_error() {
    in_netns(|socket| {
        harness::needs(&["nft"]);
        commit(socket, &sample::ops()).unwrap();
        let wanted = sample::firewall();
        for rule in [
            "ct original packets > 5 accept",
            "ct reply ip saddr 192.0.2.1 counter accept",
            "limit rate 5/second burst 7 packets counter",
            "ip daddr . tcp dport { 192.0.2.1 . 80 } log prefix \"x\" level warn",
            "meta mark set numgen inc mod 7 map { 0 : 1, 1 : 2 }",
            "tcp option maxseg size set rt mtu",
            "queue num 3",
        ] {
            let line = format!("insert rule inet egress_datapath forward {rule}");
            // A kernel may lack what the others need, but not what ours need.
            match nft(&[&line], "") {
                Err(_) if !rule.starts_with("ct") => continue,
                made => made.unwrap(),
            };
            let found = observe(socket).unwrap().unwrap();
            let (_, rules) = &found.chains[&ChainId::Forward];
            let ours = &wanted.chains[&ChainId::Forward].1;
            assert_eq!(rules.len(), ours.len() + 1, "{rule}");
            assert!(rules[0].0.iter().any(|stmt| matches!(stmt, Stmt::Unknown(_))), "{rule}");
            assert_eq!(&rules[1..], ours, "{rule}");
            // As a repair would.
            commit(socket, &[Op::SetRules(ChainId::Forward, ours.clone())]).unwrap();
        }
        assert_eq!(observe(socket), Ok(Some(wanted)));
    });
}

#[test]
fn names_of_other_tables_may_be_any_bytes() {
    in_netns(|socket| {
        commit(socket, &sample::ops()).unwrap();
        let mut writer = Writer::default();
        let mut send = |kind, flags, family, resource, names: &[(u16, &[u8])]| {
            let message = writer.message(kind, flag::REQUEST | flags, socket.next_sequence());
            writer.nfgen(family, resource);
            for (at, name) in names {
                writer.attribute(*at, name);
            }
            writer.end(message);
        };
        let new = flag::CREATE | flag::EXCL | flag::ACK;
        send(kind::BEGIN, 0, 0, batch::NF_TABLES, &[]);
        send(kind::NEWTABLE, new, batch::INET, 0, &[(1, b"\xff\xfe\0")]);
        send(kind::NEWCHAIN, new, batch::INET, 0, &[(1, b"\xff\xfe\0"), (3, b"\x80\0")]);
        send(kind::END, 0, 0, batch::NF_TABLES, &[]);
        socket.send(&writer.finish().unwrap()).unwrap();
        let mut made = 0;
        while let Ok(datagram) = socket.receive() {
            for message in Messages::new(datagram).flatten().filter(|m| m.kind == NLMSG_ERROR) {
                assert_eq!(Ack::read(&message).unwrap().errno, 0);
                made += 1;
            }
        }
        assert_eq!(made, 2);
        assert_eq!(observe(socket), Ok(Some(sample::firewall())));
        crate::preflight::foreign::foreign(socket, &std::collections::BTreeMap::new()).unwrap();
    });
}
