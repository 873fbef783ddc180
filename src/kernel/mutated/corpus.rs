//! Messages to be damaged: what a real kernel says where there may be one, and what it would say.

use std::net::UdpSocket;

use crate::alloc::TableRange;
use crate::kernel::netlink::message::{NLMSG_ERROR, Writer, flag};
use crate::kernel::netlink::socket::Socket;
use crate::kernel::nft::tests::sample_datagram;
use crate::testing::lab::Netns;
use crate::{Cluster, EgressIp, EgressPolicy, MarkLayout, Node, NodeName, PolicyId, Reconciler};

/// What a kernel with our objects in it answers to requests of this protocol, message by message.
///
/// Each request has a type, flags beside those of every request, and a body.
pub(crate) fn answers(protocol: isize, requests: Vec<(u16, u16, Vec<u8>)>) -> Vec<Vec<u8>> {
    answers_after(protocol, requests, |_| reconciled())
}

/// The same of a kernel that holds what `prepare` makes.
pub(crate) fn answers_after<T>(
    protocol: isize,
    requests: Vec<(u16, u16, Vec<u8>)>,
    prepare: impl FnOnce(&mut Socket) -> T + Send + 'static,
) -> Vec<Vec<u8>> {
    in_netns(move || {
        let mut socket = Socket::open(protocol).unwrap();
        let _made = prepare(&mut socket);
        let mut found = Vec::new();
        for (kind, flags, body) in requests {
            let mut writer = Writer::default();
            let message = writer.message(kind, flag::REQUEST | flags, socket.next_sequence());
            writer.raw(&body);
            writer.end(message);
            socket.send(&writer.finish().unwrap()).unwrap();
            found.extend(received(&mut socket));
        }
        found
    })
}

/// What a kernel tells these groups while our objects come and go.
pub(crate) fn notifications(protocol: isize, groups: std::ops::Range<u32>) -> Vec<Vec<u8>> {
    in_netns(move || {
        let mut socket = Socket::open(protocol).unwrap();
        socket.reserve_unread(1 << 20);
        groups.for_each(|group| socket.join(group).unwrap());
        let mut egress = reconciled();
        let mut found = received(&mut socket);
        egress.remove().unwrap();
        found.extend(received(&mut socket));
        found
    })
}

/// The messages that make a table with everything in it: the kernel lists it in the same form.
pub(crate) fn golden_table() -> Vec<Vec<u8>> {
    split(&sample_datagram())
}

/// Acknowledgements of every shape.
pub(crate) fn golden_acks() -> Vec<Vec<u8>> {
    let ack = |kind, flags, code: i32, echo: usize| {
        let mut writer = Writer::default();
        let message = writer.message(kind, flags, 1);
        writer.raw(&code.to_ne_bytes());
        if echo > 0 {
            let request = writer.message(0x0a06, flag::REQUEST, 1);
            writer.raw(&vec![0; echo - 16]);
            writer.end(request);
        }
        if flags & flag::ACK_TLVS != 0 {
            writer.string(1, "no such thing");
            writer.attribute(2, &52_u32.to_ne_bytes());
        }
        writer.end(message);
        writer.finish().unwrap()
    };
    vec![
        ack(NLMSG_ERROR, flag::CAPPED, 0, 16),
        ack(NLMSG_ERROR, flag::CAPPED, -1, 16),
        ack(NLMSG_ERROR, flag::CAPPED | flag::ACK_TLVS, -17, 16),
        ack(NLMSG_ERROR, flag::ACK_TLVS, -2, 60),
        ack(3, flag::ACK_TLVS, -4, 0),
        ack(3, 0, 0, 0),
    ]
}

fn reconciled() -> Reconciler<crate::KernelDatapath> {
    let node = |number: u8| {
        let underlay = vec![[192, 0, 2, number].into()];
        let tunnel = [format!("172.31.0.{number}/16"), format!("fd31::{number}/64")];
        let tunnel = tunnel.iter().map(|net| net.parse().unwrap()).collect();
        Node::new(NodeName::new(format!("node-{number}")).unwrap(), underlay, tunnel)
    };
    let excluded = ["10.244.0.0/16", "fd44::/48"].map(|net| net.parse().unwrap());
    let cluster = Cluster::new(node(1).name, (1..4).map(node).collect(), excluded.to_vec());
    let policies = (1..4).map(|number: u8| {
        let sources = [format!("10.244.1.{number}/32"), format!("fd44::{number}0/124")];
        let sources = sources.iter().map(|net| net.parse().unwrap()).collect();
        let v6 = format!("2001:db8:1::{number}").parse().unwrap();
        let eip = EgressIp::Dual([198, 51, 100, number].into(), v6);
        EgressPolicy {
            gateway: Some(node(number).name),
            ..EgressPolicy::new(PolicyId::new(format!("shop/p{number}")).unwrap(), sources, eip)
        }
    });
    let mut egress = Reconciler::open(MarkLayout::SEED, TableRange::default()).unwrap();
    let _report = egress.reconcile(&cluster, policies).unwrap();
    // Connections to be listed; what becomes of their packets does not matter.
    for (from, to) in [("172.31.0.1", "172.31.0.2"), ("fd31::1", "fd31::2")] {
        let socket = UdpSocket::bind((from, 7000)).unwrap();
        let _sent = socket.send_to(b"?", (to, 7000));
    }
    egress
}

/// Everything that waits to be read.
fn received(socket: &mut Socket) -> Vec<Vec<u8>> {
    let mut found = Vec::new();
    while let Ok(datagram) = socket.receive() {
        found.extend(split(datagram));
    }
    found
}

fn split(mut datagram: &[u8]) -> Vec<Vec<u8>> {
    let mut found = Vec::new();
    while let Some((length, _)) = datagram.split_first_chunk() {
        let length = usize::try_from(u32::from_ne_bytes(*length)).unwrap();
        found.push(datagram[..length].to_vec());
        datagram = datagram.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    found
}

fn in_netns(run: impl FnOnce() -> Vec<Vec<u8>> + Send) -> Vec<Vec<u8>> {
    harness::given("network namespace", Netns::new()).run(run).unwrap()
}
