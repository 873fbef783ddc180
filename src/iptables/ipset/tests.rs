//! Tests of ipset messages against the kernel and the `ipset` program.

use std::io::Write;
use std::process::{Command, Stdio};

use super::*;
use crate::kernel::netlink::message::{Attributes, Messages};
use crate::kernel::netlink::nfnetlink::NETFILTER;
use crate::kernel::nft::tests::netns::in_netns;
use crate::kernel::{mutate, mutated};
use crate::state::MarkBits;
use crate::types::Family;

const V4: Family = Family::V4;
const V6: Family = Family::V6;

/// Output of `ipset`, run in the network namespace of the calling thread.
fn ipset(arguments: &[&str], input: &str) -> Result<String, String> {
    harness::needs(&["ipset"]);
    let mut child = Command::new("ipset")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    if output.status.success() { Ok(text(output.stdout)) } else { Err(text(output.stderr)) }
}

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

/// Sample sets: one set of each kind, with each kind of member.
fn samples() -> Vec<(Ipset, IpsetContents)> {
    let marked = |value| Member::Marked(MarkBits { mask: 0xffff_1100, value });
    vec![
        (
            Ipset::Sources(V4, 0xdead_beef),
            IpsetContents::of([net("10.244.1.10/32"), net("10.244.2.0/24"), net("0.0.0.0/0")]),
        ),
        (
            Ipset::Destinations(V6, 7),
            IpsetContents::new(
                false,
                [(net("2001:db8::/32"), Member::In), (net("2001:db8::1/128"), Member::Not)],
            ),
        ),
        (
            Ipset::Marks(V4),
            IpsetContents::new(
                true,
                [
                    (net("10.244.1.0/24"), marked(0x2600_0100)),
                    (net("10.244.1.9/32"), marked(0x2700_0000)),
                    (net("10.244.1.7/32"), Member::Not),
                ],
            ),
        ),
        (Ipset::Marks(V6), IpsetContents::new(true, [(net("fd44::/64"), marked(0xffff_1100))])),
        (Ipset::Selected(V6), IpsetContents::of([])),
    ]
}

fn lines(text: &str) -> Vec<String> {
    let mut lines: Vec<_> = text.lines().map(str::to_owned).collect();
    lines.sort_unstable();
    lines
}

/// Lines of `ipset save`, without the values that the kernel chooses.
fn saved() -> Vec<String> {
    let text = ipset(&["save"], "").unwrap();
    let chosen = ["hashsize", "bucketsize", "initval"];
    let line = |line: &str| {
        let mut words = line.split_whitespace();
        let mut kept = Vec::new();
        while let Some(word) = words.next() {
            if chosen.contains(&word) {
                words.next();
            } else {
                kept.push(word);
            }
        }
        kept.join(" ")
    };
    lines(&text.lines().map(line).collect::<Vec<_>>().join("\n"))
}

fn wanted() -> Vec<String> {
    let mut text = Vec::new();
    for (set, contents) in samples() {
        let family = if set.family() == V4 { "inet" } else { "inet6" };
        let marks = if contents.with_marks { " skbinfo" } else { "" };
        text.push(format!(
            "create {set} hash:net family {family} maxelem {}{marks}",
            contents.capacity
        ));
        for (net, member) in &contents.members {
            // `ipset` omits the prefix length of a single address.
            let full = net.prefix_len() == net.max_prefix_len();
            let net = if full { net.addr().to_string() } else { net.to_string() };
            let member = match member {
                Member::Not if contents.with_marks => " nomatch".to_owned(),
                member => member.to_string(),
            };
            text.push(format!("add {set} {net}{member}"));
        }
    }
    lines(&text.join("\n"))
}

/// Applies one operation.
fn make(ipsets: &Ipsets, socket: &mut Socket, op: &Op) -> Result<(), KernelError> {
    let (made, mut refused) = ipsets.make_all(socket, &[op]);
    assert_eq!(made + refused.len(), 1);
    refused.pop().map_or(Ok(()), |(_, error)| Err(error))
}

fn add_all(ipsets: &Ipsets, socket: &mut Socket) {
    for (set, contents) in samples() {
        make(ipsets, socket, &Op::AddIpset(set, contents)).unwrap();
    }
}

#[test]
fn what_we_write_ipset_and_we_read_back() {
    in_netns(|socket| {
        let ipsets = Ipsets::probe(socket).unwrap();
        add_all(&ipsets, socket);
        assert_eq!(ipsets.observe(socket).unwrap(), samples().into_iter().collect());
        let seen = harness::has("ipset").then(saved);
        for (set, _) in samples() {
            make(&ipsets, socket, &Op::DeleteIpset(set)).unwrap();
        }
        assert!(ipsets.observe(socket).unwrap().is_empty());
        harness::needs(&["ipset"]);
        assert_eq!(seen, Some(wanted()));
    });
}

#[test]
fn what_ipset_writes_we_read() {
    in_netns(|socket| {
        let ipsets = Ipsets::probe(socket).unwrap();
        let mut script = wanted();
        script.push("create egress-src-v4-theirs hash:net".to_owned());
        script.push("create cali40s bitmap:port range 0-9".to_owned());
        script.sort_by_key(|line| line.starts_with("add"));
        ipset(&["restore"], &(script.join("\n") + "\n")).unwrap();
        assert_eq!(ipsets.observe(socket).unwrap(), samples().into_iter().collect());
    });
}

#[test]
fn a_set_grows_by_a_swap_and_keeps_no_spare() {
    in_netns(|socket| {
        let ipsets = Ipsets::probe(socket).unwrap();
        let set = Ipset::Selected(V4);
        let nets = |count: u32| {
            (0..count)
                .map(|n| net(&format!("{}/32", std::net::Ipv4Addr::from_bits(0x0af4_0000 + n))))
        };
        let small = IpsetContents { capacity: 64, ..IpsetContents::of(nets(64)) };
        make(&ipsets, socket, &Op::AddIpset(set, small)).unwrap();
        let one_more = Op::PutMember(set, net("10.9.9.9/32"), Member::In);
        let full = make(&ipsets, socket, &one_more).unwrap_err();
        assert_eq!(full.errno(), Some(errno::ENOSPC), "{full}");
        assert!(full.to_string().contains("the set is full, ipset error 4352"), "{full}");

        let large = IpsetContents::of(nets(70_000));
        make(&ipsets, socket, &Op::PutIpset(set, large.clone())).unwrap();
        let found = ipsets.observe(socket).unwrap();
        assert_eq!(found, [(set, large)].into_iter().collect());
        make(&ipsets, socket, &one_more).unwrap();
    });
}

#[test]
fn members_that_come_and_go_together_do_so_in_a_message() {
    in_netns(|socket| {
        let ipsets = Ipsets::probe(socket).unwrap();
        let (a, b) = (Ipset::Sources(V4, 1), Ipset::Sources(V4, 2));
        for set in [a, b] {
            make(&ipsets, socket, &Op::AddIpset(set, IpsetContents::of([]))).unwrap();
        }
        let host = |n: u8| net(&format!("10.0.0.{n}/32"));
        let put = |set, n| Op::PutMember(set, host(n), Member::In);
        let ops = [put(a, 1), put(a, 2), put(b, 1), Op::DeleteMember(a, host(1)), put(a, 3)];
        let (made, refused) = ipsets.make_all(socket, &ops.iter().collect::<Vec<_>>());
        assert_eq!((made, refused), (5, Vec::new()));
        let found = ipsets.observe(socket).unwrap();
        assert_eq!(found[&a], IpsetContents::of([host(2), host(3)]));
        assert_eq!(found[&b], IpsetContents::of([host(1)]));

        let gone = Ipset::Sources(V4, 3);
        let ops = [put(gone, 1), put(gone, 2), put(b, 2)];
        let (made, refused) = ipsets.make_all(socket, &ops.iter().collect::<Vec<_>>());
        assert_eq!((made, refused.len()), (1, 1));
        assert_eq!(refused[0].0, 0);
        assert!(refused[0].1.is_not_found(), "{refused:?}");
        assert_eq!(ipsets.observe(socket).unwrap()[&b].members.len(), 2);
    });
}

#[test]
fn refusal_names_its_member_and_the_others_are_made() {
    in_netns(|socket| {
        let ipsets = Ipsets::probe(socket).unwrap();
        for family in [V4, V6] {
            let set = Ipset::Selected(family);
            let host = |n: u32| match family {
                V4 => IpNet::from(std::net::IpAddr::from(n.to_be_bytes())),
                V6 => IpNet::from(std::net::IpAddr::from(u128::from(n).to_be_bytes())),
            };
            let spaced = |step: u32, count: u32| (1..=count).map(move |n| host(step * n));
            make(&ipsets, socket, &Op::AddIpset(set, IpsetContents::of([]))).unwrap();
            let put: Vec<_> =
                spaced(1, 2_100).map(|net| Op::PutMember(set, net, Member::In)).collect();
            let (made, refused) = ipsets.make_all(socket, &put.iter().collect::<Vec<_>>());
            assert_eq!((made, refused), (2_100, Vec::new()));
            // Every 700th member is gone already: the first, some and the last of a message.
            let gone: Vec<_> = spaced(700, 3).map(|net| Op::DeleteMember(set, net)).collect();
            for op in &gone {
                make(&ipsets, socket, op).unwrap();
            }
            let all: Vec<_> = spaced(1, 2_100).map(|net| Op::DeleteMember(set, net)).collect();
            let (made, refused) = ipsets.make_all(socket, &all.iter().collect::<Vec<_>>());
            assert_eq!(made, 2_097);
            for ((index, error), op) in refused.iter().zip(&gone) {
                assert_eq!(all[*index], *op);
                assert_eq!(error.request(), op.to_string());
                assert!(error.is_not_found(), "{error}");
            }
            assert_eq!(refused.len(), 3);
            assert!(ipsets.observe(socket).unwrap()[&set].members.is_empty());
            make(&ipsets, socket, &Op::DeleteIpset(set)).unwrap();
        }
    });
}

#[test]
fn full_set_refuses_each_further_member() {
    in_netns(|socket| {
        let ipsets = Ipsets::probe(socket).unwrap();
        let set = Ipset::Marks(V6);
        let full = IpsetContents { capacity: 3, ..IpsetContents::new(true, []) };
        make(&ipsets, socket, &Op::AddIpset(set, full)).unwrap();
        let member = Member::Marked(MarkBits { mask: 0xff, value: 1 });
        let put = |n: u128| {
            Op::PutMember(set, IpNet::from(std::net::IpAddr::from(n.to_be_bytes())), member)
        };
        let ops: Vec<_> = (1..=1_500).map(put).collect();
        let (made, refused) = ipsets.make_all(socket, &ops.iter().collect::<Vec<_>>());
        let held = ipsets.observe(socket).unwrap()[&set].members.len();
        assert!(held >= 3);
        assert_eq!((made, refused.len()), (held, 1_500 - held));
        for (index, error) in refused {
            assert_eq!(error.errno(), Some(errno::ENOSPC), "{error}");
            assert_eq!(error.request(), ops[index].to_string());
        }
    });
}

#[test]
fn refusals_are_sentences() {
    in_netns(|socket| {
        let ipsets = Ipsets::probe(socket).unwrap();
        let set = Ipset::Denied(V4);
        let add = Op::AddIpset(set, IpsetContents::of([net("10.0.0.0/8")]));
        make(&ipsets, socket, &add).unwrap();
        let twice = make(&ipsets, socket, &add).unwrap_err();
        assert!(twice.is_exists() && twice.to_string().contains("ipset error 4101"), "{twice}");
        let other = Op::PutMember(set, net("2001:db8::/32"), Member::In);
        let error = make(&ipsets, socket, &other).unwrap_err();
        assert!(error.to_string().contains("ipset error 4097"), "{error}");
        let mark = Member::Marked(MarkBits { mask: 1, value: 1 });
        let error =
            make(&ipsets, socket, &Op::PutMember(set, net("10.1.0.0/16"), mark)).unwrap_err();
        assert!(error.to_string().contains("without marks"), "{error}");
        let missing = make(&ipsets, socket, &Op::DeleteIpset(Ipset::Denied(V6))).unwrap_err();
        assert!(missing.is_not_found(), "{missing}");
        let missing = Op::PutIpset(Ipset::Denied(V6), IpsetContents::of([]));
        assert!(make(&ipsets, socket, &missing).unwrap_err().is_not_found());
        // A set that could not be swapped in must not be left under its temporary name.
        make(&ipsets, socket, &Op::AddIpset(Ipset::Denied(V6), IpsetContents::of([]))).unwrap();
        let found: Vec<_> = ipsets.observe(socket).unwrap().into_keys().collect();
        assert_eq!(found, [Ipset::Denied(V4), Ipset::Denied(V6)]);
    });
}

/// Dumps as a kernel with sets of the datapath returns them.
fn corpus() -> Vec<Vec<u8>> {
    let sets = |set: &Ipset| {
        let mut writer = Writer::default();
        writer.nfgen(NFPROTO_IPV4, 0);
        writer.attribute(attribute::PROTOCOL, &[PROTOCOL]);
        writer.string(attribute::SETNAME, &set.to_string());
        (kind::LIST, flag::DUMP | flag::ACK, writer.finish().unwrap())
    };
    let requests = samples().iter().map(|(set, _)| sets(set)).collect();
    let mut found = mutated::answers_after(NETFILTER, requests, |socket| {
        let ipsets = Ipsets::probe(socket).unwrap();
        add_all(&ipsets, socket);
    });
    // The messages are built by hand for kernels that may have no ipset.
    for (set, contents) in samples() {
        let mut writer = Writer::default();
        let message = writer.message(kind::LIST, 2, 1);
        writer.nfgen(NFPROTO_IPV4, 0);
        writer.string(attribute::SETNAME, &set.to_string());
        writer.string(attribute::TYPENAME, HASH_NET);
        writer.nest(attribute::DATA, |writer| {
            writer.be32(data::MAX_ELEMENTS | NETWORK_ORDER, contents.capacity);
            writer.be32(data::FLAGS | NETWORK_ORDER, WITH_MARKS);
        });
        writer.nest(attribute::MEMBERS, |writer| {
            contents
                .members
                .iter()
                .for_each(|(net, member)| member::write(writer, Some(1), *net, *member));
        });
        writer.end(message);
        found.push(writer.finish().unwrap());
    }
    found
}

#[test]
fn mutated_sets() {
    mutate::messages("sets", 8, &corpus(), |input| {
        let mut listing = list::Listing::new();
        for message in Messages::new(input) {
            let message = message.ok()?;
            if message.kind == kind::LIST {
                let (_, body) = message.nfgen().ok()?;
                listing.take(Attributes::new(body)).ok()?;
            }
        }
        let members = &listing.contents.members;
        for (net, member) in members {
            let mut writer = Writer::default();
            member::write(&mut writer, None, *net, *member);
            let again = writer.finish().unwrap();
            let inside = Attributes::new(&again).next().unwrap().unwrap();
            assert_eq!(member::read(inside.nested()), Ok(Some((*net, *member))));
        }
        (!members.is_empty()).then(|| members.len() * size_of::<(IpNet, Member)>())
    });
}
