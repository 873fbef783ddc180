//! Compares this crate's conntrack dumps with those of `conntrack`.

use super::*;
use crate::Update;
use crate::datapath::{Datapath, Op};
use crate::kernel::monitor::tests::Host;
use crate::kernel::nft;
use crate::kernel::rtnetlink::kernel_tests::{in_namespace, sh};

/// Commands that create connections of three pods, some of them IPv6.
const OPEN: &str = "
    for port in 1 2 3; do
        conntrack -I -s 10.244.7.1 -d 198.51.100.9 -p udp --sport $port --dport 53 -t 60
        conntrack -I -s 10.244.7.2 -d 198.51.100.9 -p tcp --sport $port --dport 80 -t 60 \
            --state ESTABLISHED
        conntrack -I -s fd44::7:1 -d 2001:db8::9 -p udp --sport $port --dport 53 -t 60
    done
    conntrack -I -s 198.51.100.9 -d 10.244.7.1 -p udp --sport 1 --dport 53 -t 60";

fn counted(source: &str, family: &str) -> usize {
    sh(&format!("conntrack -L -f {family} -s {source} 2>/dev/null")).lines().count()
}

/// Number of connections of a source in this crate's dump.
///
/// The first test compares that dump with `conntrack`.
fn listed(source: &str) -> usize {
    all(&mut nft::open().unwrap(), Some(&[source.parse().unwrap()].into())).len()
}

fn all(socket: &mut Socket, sources: Option<&BTreeSet<IpAddr>>) -> Vec<Connection> {
    let mut all = Vec::new();
    let among = sources.map_or(Among::All, Among::Sources);
    connections(socket, among, &mut |found| all.push(found)).unwrap();
    all
}

#[test]
fn the_kernel_picks_out_a_source_as_conntrack_does() {
    harness::needs(&["conntrack"]);
    in_namespace(|| {
        sh(OPEN);
        let mut socket = nft::open().unwrap();
        let whole = all(&mut socket, None);
        assert_eq!(whole.len(), 10);
        for (source, family, count) in [
            ("10.244.7.1", "ipv4", 3),
            ("10.244.7.2", "ipv4", 3),
            ("198.51.100.9", "ipv4", 1),
            ("10.244.7.3", "ipv4", 0),
            ("fd44::7:1", "ipv6", 3),
            ("fd44::7:2", "ipv6", 0),
        ] {
            assert_eq!(counted(source, family), count);
            let source = source.parse().unwrap();
            let mut found = all(&mut socket, Some(&[source].into()));
            let mut wanted = whole.clone();
            wanted.retain(|connection| connection.source == source);
            found.sort_unstable();
            wanted.sort_unstable();
            assert_eq!((found.len(), found), (count, wanted));
            // With the kernel's filter by source nothing else is sent; otherwise the whole family
            // is.
            let picked = if source.is_ipv4() { count } else { 3 };
            assert_eq!(sent(&mut socket, Pick::of(source)), picked);
        }
    });
}

/// Number of connections that the kernel sends.
fn sent(socket: &mut Socket, pick: Pick) -> usize {
    let request = Request { text: TEXT, kind: GET, flags: flag::DUMP, answer: NEW };
    let mut count = 0;
    ask(
        socket,
        &request,
        |writer| pick.write(writer),
        |_, _| {
            count += 1;
            Ok(())
        },
    )
    .unwrap();
    count
}

#[test]
fn the_kernel_picks_out_marks_as_conntrack_does() {
    harness::needs(&["conntrack"]);
    in_namespace(|| {
        sh(OPEN);
        sh("conntrack -U -p udp -s 10.244.7.1 --dport 53 --mark 0x27000001
            conntrack -U -p udp -s fd44::7:1 --sport 2 --mark 0x27000002
            conntrack -U -p tcp -s 10.244.7.2 --sport 2 --mark 0x1");
        let mut socket = nft::open().unwrap();
        let ours = MarkBits { mask: 0xff00_0000, value: 0x2700_0000 };
        assert_eq!(sent(&mut socket, Pick::Mark(ours)), 4);
        let whole = all(&mut socket, None);
        for (sources, count) in [
            (&[][..], 4),
            (&["10.244.7.1"], 4),
            (&["10.244.7.2"], 7),
            (&["10.244.7.2", "10.244.7.3", "fd44::7:1"], 9),
            (&["fd44::7:1"], 6),
        ] {
            let sources = sources.iter().map(|source| source.parse().unwrap()).collect();
            let marks = [ours].into();
            let among = Among::SourcesOrMarks(&sources, &marks);
            let needed: BTreeSet<_> = whole.iter().copied().filter(|one| among.has(one)).collect();
            assert_eq!(needed.len(), count);
            let mut found = BTreeSet::new();
            for pick in picks(among) {
                let mut each = |one| {
                    found.insert(one);
                };
                dump(&mut socket, pick, among, &mut each).unwrap();
            }
            assert_eq!(found, needed);
            let mut found = BTreeSet::new();
            let mut each = |one| {
                found.insert(one);
            };
            connections(&mut socket, among, &mut each).unwrap();
            assert_eq!(found, needed);
        }
    });
}

#[test]
fn after_an_update_the_connections_of_its_sources_end_and_no_others() {
    in_namespace(|| {
        let mut host = Host::new();
        sh(OPEN);
        let id = host.policies[0].id.clone();
        let sources = vec!["10.244.7.1/32".parse().unwrap()];
        let update: Update = Update::AddSources { policy: id.clone(), sources };
        host.egress.update([update]).unwrap();
        assert_eq!(listed("10.244.7.1"), 3, "they are left to be settled");
        let settled = host.egress.settle().unwrap();
        assert_eq!(settled.changes.ops().filter_map(Op::ended).count(), 3);
        assert_eq!(listed("10.244.7.1"), 0);
        assert_eq!(listed("10.244.7.2"), 3);
        assert_eq!(listed("fd44::7:1"), 3);
        // More sources than the limit up to which connections are dumped for each source.
        let sources = ["10.244.7.2/32", "10.244.7.3/32", "10.244.7.4/32", "fd44::7:1/128"];
        let sources = sources.map(|net| net.parse().unwrap()).to_vec();
        host.egress
            .update([Update::<crate::EgressPolicy>::AddSources { policy: id, sources }])
            .unwrap();
        let settled = host.egress.settle().unwrap();
        assert_eq!(settled.changes.ops().filter_map(Op::ended).count(), 6);
        assert_eq!(listed("10.244.7.2"), 0);
        assert_eq!(listed("fd44::7:1"), 0);
        assert_eq!(listed("198.51.100.9"), 1);
        let mut listed = 0;
        host.egress.datapath().connections(Among::All, &mut |_| listed += 1).unwrap();
        assert_eq!(listed, 1);
    });
}

#[test]
fn connection_that_follows_translated_one_with_its_tuple_and_id_goes_on() {
    const TUPLE: &str = "-s 10.244.7.1 -d 198.51.100.9 -p udp --sport 1 --dport 53";
    harness::needs(&["conntrack"]);
    in_namespace(|| {
        let mut socket = nft::open().unwrap();
        let mut only = |request: &str| {
            sh(&format!("conntrack -F; conntrack -I {TUPLE} {request} -t 60"));
            let found = all(&mut socket, None);
            assert_eq!(found.len(), 1);
            found[0]
        };
        let translated =
            only("-r 198.51.100.9 -q 10.10.0.11 --reply-port-src 53 --reply-port-dst 7");
        let next = only("");
        assert_eq!(next.source_port, translated.source_port);
        let mut socket = nft::open().unwrap();
        let mut end = |connection: Connection| {
            assert!(make(&mut socket, &[Op::EndConnection(connection)]).is_empty());
            all(&mut socket, None)
        };
        // Same place in the kernel's memory, same id.
        assert_eq!(end(Connection { id: next.id, ..translated }), [next]);
        assert_eq!(end(next), []);
    });
}
