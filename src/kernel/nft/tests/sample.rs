//! A table with every set, every kind of element and every statement in it.

use std::net::IpAddr;

use crate::diff::op::Op;
use crate::range::IpRange;
use crate::state::{
    Base, ChainId, ChainType, Comment, Data, Direction, Field, Firewall, Hook, Interface, Key,
    MarkBits, MarkOf, NftRule, Set, Stmt, TableFamily, Tag, Target, Value, Verdict,
};
use crate::types::{DeviceName, Family, MacAddr, Mark};

use Family::{V4, V6};

const GATEWAY: Mark = Mark::new(0x2600_0100);

pub(super) fn device() -> DeviceName {
    DeviceName::new("egress.vxlan").unwrap()
}

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn range(first: &str, last: &str) -> IpRange {
    IpRange::new(address(first), address(last)).unwrap()
}

/// A tag with this number in its low half.
pub(super) fn tag(number: u16) -> Tag {
    Tag::new(0x3f2a_0000 | u32::from(number.max(1))).unwrap()
}

const fn base(kind: ChainType, hook: Hook, priority: i32) -> Base {
    Base { kind, hook, priority }
}

const MASK: u32 = 0xffff_ff00;

const MARK: Stmt = Stmt::SetMark(MarkOf::Packet, MarkBits { mask: MASK, value: GATEWAY.get() });

const FLOW: MarkBits = MarkBits { mask: 0xff00_0000, value: 0x2700_0000 };

const UNMARK: Stmt = Stmt::SetMark(MarkOf::Packet, MarkBits { mask: MASK, value: 0 });

/// A value in the bits of our marks.
const fn bits(value: u32) -> MarkBits {
    MarkBits { mask: MASK, value }
}

fn input() -> Stmt {
    Stmt::Interface(Interface::Input, device())
}

fn output() -> Stmt {
    Stmt::Interface(Interface::Output, device())
}

fn by_source(map: Set) -> Stmt {
    let family = map.family().unwrap();
    Field::Source(family).map(map, Target::Priority)
}

fn by_tag(map: Set) -> Stmt {
    Field::Priority.map(map, Target::Priority)
}

/// A chain, how it is called, and its rules.
type Chain = (ChainId, Option<Base>, Vec<NftRule>);

fn rules(list: Vec<Vec<Stmt>>) -> Vec<NftRule> {
    list.into_iter().map(NftRule).collect()
}

fn base_chains() -> Vec<Chain> {
    #[allow(clippy::enum_glob_use, reason = "the statements of a table read as a list")]
    use Stmt::*;
    vec![
        (
            ChainId::Prerouting,
            Some(base(ChainType::Filter, Hook::Prerouting, -99)),
            rules(vec![
                vec![input(), MARK, Return],
                vec![
                    Field::CtMark.has(FLOW),
                    Stmt::direction(Direction::Original),
                    Field::CtMark.bits(MASK).map(Set::Connection, Target::Verdict),
                ],
                vec![by_source(Set::Source(V4)), Goto(ChainId::SelectPolicy(V4))],
                vec![by_source(Set::SourceNet(V4)), Goto(ChainId::SelectPolicy(V4))],
                vec![by_source(Set::Source(V6)), Goto(ChainId::SelectPolicy(V6))],
                vec![by_source(Set::SourceNet(V6)), Goto(ChainId::SelectPolicy(V6))],
            ]),
        ),
        (
            ChainId::Input,
            Some(base(ChainType::Filter, Hook::Input, -150)),
            rules(vec![
                vec![
                    Field::UdpDestinationPort.is(7789),
                    Field::Source(V4).is_not_in(Set::Peer(V4)),
                    Counter,
                    Drop,
                ],
                vec![OtherInterface(crate::state::Interface::Input, device()), Counter, Drop],
                vec![OtherInterface(crate::state::Interface::Output, device()), Counter, Drop],
                vec![Field::Destination(V6).is_in(Set::Eip(V6)), Goto(ChainId::EgressIp)],
                vec![
                    Field::Source(V4).is_in(Set::Peer(V4)),
                    Field::Destination(V4).is_not_in(Set::Excluded(V4)),
                    Drop,
                ],
                vec![
                    Field::Source(V6).is_in(Set::Peer(V6)),
                    Field::Destination(V6).is_in(Set::Excluded(V6)),
                    Drop,
                ],
                vec![Field::Destination(V4).is_in(Set::Eip(V4)), Drop],
            ]),
        ),
        (
            ChainId::Output,
            Some(base(ChainType::Filter, Hook::Output, -300)),
            rules(vec![vec![
                Field::UdpDestinationPort.is(7789),
                Field::Destination(V4).is_in(Set::Peer(V4)),
                NoTrack,
            ]]),
        ),
        (
            ChainId::Forward,
            Some(base(ChainType::Filter, Hook::Forward, -150)),
            rules(vec![
                vec![output(), UNMARK, ClearPriority],
                vec![Stmt::with_syn(), ClampMss(V4, 1410)],
                vec![ClampMss(V6, 1390)],
                vec![Field::Mark.has(bits(0x2600_0000)), Drop],
                vec![Field::Mark.bits(MASK).is_in(Set::Gateway), Drop],
            ]),
        ),
        (
            ChainId::NatPostrouting,
            Some(base(ChainType::Nat, Hook::Postrouting, 99)),
            rules(vec![
                vec![output(), KeepSource(V4)],
                vec![output(), KeepSource(V6)],
                vec![Field::Mark.has_not(bits(0x2700_0000)), Return],
                vec![by_source(Set::Source(V4)), Goto(ChainId::Snat(V4))],
                vec![by_source(Set::Source(V6)), Goto(ChainId::Snat(V6))],
            ]),
        ),
        (
            ChainId::Guard,
            Some(base(ChainType::Filter, Hook::Postrouting, 101)),
            rules(vec![
                vec![Stmt::state(Stmt::INVALID | Stmt::UNTRACKED), Drop],
                vec![Stmt::direction(Direction::Original), Stmt::not_translated(), Drop],
                vec![Stmt::direction(Direction::Reply), Return],
                vec![Stmt::state(Stmt::NEW), ClearPriority],
                vec![
                    Field::CtMark.has(FLOW),
                    Field::CtMark.has_not(FLOW),
                    SetMark(MarkOf::Connection, FLOW),
                ],
            ]),
        ),
    ]
}

/// All chains.
pub(super) fn chains() -> Vec<Chain> {
    #[allow(clippy::enum_glob_use, reason = "the statements of a table read as a list")]
    use Stmt::*;
    let mut list = base_chains();
    list.extend([
        (
            ChainId::EgressIp,
            None,
            rules(vec![
                vec![Field::SocketWildcard.is(0), Return],
                vec![Stmt::opens_nothing(), Drop],
                vec![Field::Protocol.is(Stmt::UDP), Counter, Drop],
            ]),
        ),
        (ChainId::LocalGateway, None, rules(vec![vec![ClearPriority]])),
        (ChainId::Bypass, None, rules(vec![])),
        (ChainId::To(GATEWAY), None, rules(vec![vec![MARK], vec![ClearPriority], vec![Counter]])),
    ]);
    for (family, lengths) in [(V4, [32, 24, 1]), (V6, [128, 64, 1])] {
        let mut pick: Vec<_> = lengths
            .into_iter()
            .map(|length| {
                vec![
                    Stmt::by_prefix(Field::Destination(family), length),
                    Goto(ChainId::Steer(family)),
                ]
            })
            .collect();
        pick.push(vec![by_tag(Set::Any(family)), Goto(ChainId::Steer(family))]);
        list.extend([
            (
                ChainId::Exclude(family),
                None,
                rules(vec![
                    vec![Field::DestinationType.is(Stmt::LOCAL), Return],
                    vec![Goto(ChainId::SelectPolicy(family))],
                ]),
            ),
            (ChainId::SelectPolicy(family), None, rules(pick)),
            (
                ChainId::Steer(family),
                None,
                rules(vec![
                    vec![Field::Output.is(0), Field::Priority.is_in(Set::Count(family))],
                    vec![
                        by_tag(Set::Steer(family)),
                        Field::Priority.map(Set::PolicyAction, Target::Verdict),
                    ],
                    vec![Drop],
                ]),
            ),
            (ChainId::Translate(family), None, rules(vec![vec![Return]])),
            (
                ChainId::Snat(family),
                None,
                rules(vec![
                    vec![Field::Priority.map(Set::Snat(family), Target::Snat(family))],
                    vec![Field::Priority.is_in(Set::Masquerade(family)), Masquerade],
                    vec![Drop],
                ]),
            ),
        ]);
    }
    list
}

pub(super) fn sets() -> Vec<Set> {
    let mut sets = vec![Set::Gateway, Set::Connection, Set::PolicyAction];
    for (family, lengths) in [(V4, [32, 24, 1]), (V6, [128, 64, 1])] {
        sets.extend([
            Set::Peer(family),
            Set::Underlay(family),
            Set::Excluded(family),
            Set::Eip(family),
            Set::Steer(family),
            Set::Snat(family),
            Set::Masquerade(family),
            Set::Count(family),
            Set::Any(family),
            Set::Source(family),
            Set::SourceNet(family),
        ]);
        sets.extend(lengths.map(|length| Set::Destination(family, length)));
    }
    sets
}

pub(super) fn elements() -> Vec<(Key, Value)> {
    let note = |data, text: &str| Value { data, comment: Some(Comment::of_name(text)) };
    let plain = || Value::plain(Data::None);
    let class = |number| Value::plain(Data::Tag(tag(number)));
    let way = |tag, verdict| (Key::policy_action(tag), Value::plain(Data::Verdict(verdict)));
    let net = |text: &str, number| Key::destination(text.parse().unwrap(), tag(number));
    let mut list = vec![
        (Key::gateway(GATEWAY), note(Data::None, "node-1")),
        (
            Key::connection(GATEWAY),
            note(Data::Verdict(Verdict::Goto(ChainId::To(GATEWAY))), "node-1"),
        ),
        way(Tag::DENY, Verdict::Drop),
        way(Tag::LOCAL, Verdict::Goto(ChainId::LocalGateway)),
        way(Tag::BYPASS, Verdict::Goto(ChainId::Bypass)),
        way(Tag::gateway(0x2601), Verdict::Goto(ChainId::To(GATEWAY))),
        (net("198.51.100.7/32", 1), class(2)),
        (net("198.51.100.0/24", 1), note(Data::Tag(tag(3)), "default/p1")),
        (net("128.0.0.0/1", 2), class(4)),
        (net("2001:db8::7/128", 1), class(2)),
        (net("2001:db8::/64", 1), class(3)),
        (net("8000::/1", 2), class(4)),
        (Key::excluded(range("10.244.0.0", "10.244.255.255")), plain()),
        (Key::excluded(range("10.245.0.0", "10.245.0.6")), note(Data::None, "x")),
        (Key::excluded(range("240.0.0.0", "255.255.255.255")), plain()),
        (Key::excluded(range("::", "::ffff")), plain()),
        (Key::excluded(range("ff00::", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff")), plain()),
        (Key::source_net(range("10.9.0.0", "10.9.0.77")), class(5)),
        (Key::source_net(range("fd00::1", "fd00::1")), note(Data::Tag(tag(6)), &"n".repeat(200))),
    ];
    for (family, one, eip) in
        [(V4, "192.0.2.1", "198.51.100.200"), (V6, "2001:db8::1", "2001:db8::200")]
    {
        list.extend([
            (Key::peer(address(one)), note(Data::None, "node-2")),
            (Key::underlay(address(one)), plain()),
            (Key::eip(address(eip)), plain()),
            (Key::source(address(one)), class(7)),
            (Key::any(family, tag(1)), class(8)),
            (Key::steer(family, tag(8)), note(Data::Tag(Tag::LOCAL), "default/p2")),
            (Key::snat(family, tag(8)), note(Data::Address(address(eip)), "default/p2")),
            (Key::masquerade(family, tag(9)), plain()),
            (Key::count(family, tag(8)), note(Data::None, "default/p2")),
        ]);
    }
    list
}

/// The operations that make the table from nothing.
pub(super) fn ops() -> Vec<Op> {
    let mut ops = vec![Op::AddTable(TableFamily::Inet)];
    ops.extend(sets().into_iter().map(Op::AddSet));
    let chains = chains();
    ops.extend(chains.iter().map(|(id, base, _)| Op::AddChain(*id, base.clone())));
    ops.extend(elements().into_iter().map(|(key, value)| Op::AddElement(key, value)));
    ops.extend(chains.into_iter().map(|(id, _, rules)| Op::SetRules(id, rules)));
    ops
}

/// A table at the hook of a device.
pub(super) fn hook() -> Firewall {
    let chain = rules(vec![
        vec![Field::Mark.has_not(MarkBits { mask: 0xff00_0000, value: 0x2600_0000 }), Stmt::Return],
        vec![
            Field::Mark.bits(MASK).map(Set::NextHop, Target::EthernetDestination),
            UNMARK,
            Stmt::Return,
        ],
        vec![Stmt::Counter, Stmt::Drop],
    ]);
    let base = base(ChainType::Filter, Hook::Egress(device()), 0);
    let elements = [1, 2].map(|n| {
        let mac = MacAddr::new([2, 0, 0, 0, 0, n]);
        let key = Key::next_hop(Mark::new(0x2600_0000 | u32::from(n) << 8));
        let comment = Some(Comment::of_name(&format!("node-{n}")));
        (key, Value { data: Data::Ethernet(mac), comment })
    });
    Firewall {
        chains: [(ChainId::Egress, (Some(base), chain))].into(),
        sets: [Set::NextHop].into(),
        elements: elements.into_iter().collect(),
        ..Firewall::default()
    }
}

/// The operations that make it.
pub(super) fn hook_ops() -> Vec<Op> {
    let hook = hook();
    let mut ops = vec![Op::AddTable(TableFamily::Netdev), Op::AddSet(Set::NextHop)];
    for (id, (base, rules)) in hook.chains {
        ops.extend([Op::AddChain(id, base), Op::SetRules(id, rules)]);
    }
    ops.extend(hook.elements.iter().map(|(key, value)| Op::AddElement(key, value)));
    ops
}

/// The state that they make.
pub(super) fn firewall() -> Firewall {
    Firewall {
        chains: chains().into_iter().map(|(id, base, rules)| (id, (base, rules))).collect(),
        sets: sets().into_iter().collect(),
        elements: elements().into_iter().collect(),
        ..Firewall::default()
    }
}
