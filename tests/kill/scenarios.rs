//! What changes, and which sources the server may see meanwhile.

use std::slice::from_ref;

use common::backend::{backend, replies, steering, underlay};
use egress_datapath::testing::lab::{
    self, EIP_A, EIP_B, EIP_C, OTHER_SERVER, POD_A, POD_B, Pair, SERVER, STRANGER, dual, hosts,
};
use egress_datapath::{
    Backend, Claim, Cluster, Destinations, DeviceName, EgressPolicy, MarkLayout, Ownership, Replies,
};

use crate::{NODES, Result};

/// What a node should hold.
#[derive(Clone)]
pub(crate) enum Wanted {
    Policies(Vec<EgressPolicy>),
    /// The same, and packets find their gateways in the other way than the run is about, if the
    /// backend has another.
    Otherwise(Vec<EgressPolicy>),
    Nothing,
}

/// Which pod.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Pod {
    A,
    Stranger,
    B,
    C,
}

impl Pod {
    /// The node it is on.
    pub(crate) const fn node(self) -> usize {
        match self {
            Self::A | Self::Stranger => A,
            Self::B => B,
            Self::C => C,
        }
    }
}

/// As whom a pod speaks to the server.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Source {
    /// As an egress IP.
    Eip(Pair),
    /// As without any policy.
    Plain,
    /// Not at all.
    Nothing,
}

/// A conversation between a pod and a server.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Talk {
    pub(crate) pod: Pod,
    pub(crate) to: Pair,
    pub(crate) before: Source,
    pub(crate) after: Source,
}

/// A change of one or more nodes, one after another.
pub(crate) struct Scenario {
    pub(crate) name: &'static str,
    /// What each of the nodes holds at first, and at last.
    pub(crate) before: [Wanted; 3],
    pub(crate) after: [Wanted; 3],
    /// Which nodes change, in turn.
    pub(crate) order: Vec<usize>,
    pub(crate) talks: Vec<Talk>,
    /// The bits of the marks, at first and at last.
    pub(crate) marks: [Marks; 2],
    pub(crate) ownership: Ownership,
    pauses: Pauses,
}

/// What the marks of packets and connections say.
#[derive(Clone, Copy)]
pub(crate) struct Marks {
    layout: MarkLayout,
    caching: bool,
    /// The path of replies; that of the run if it is not by the tunnel.
    replies: Replies,
    /// Egress IPs are added by the gateway to the interface of their network.
    claims: bool,
}

impl Marks {
    const USUAL: Self =
        Self { layout: MarkLayout::SEED, caching: false, replies: Replies::Direct, claims: false };

    pub(crate) fn of(self, cluster: Cluster) -> Cluster {
        let Self { layout: marks, caching: connection_caching, replies: by, claims } = self;
        let (backend, steering) = (backend(), steering(&marks));
        let by = if by == Replies::Direct { replies(&marks, backend) } else { by };
        underlay(cluster)
            .with_marks(marks)
            .with_connection_caching(connection_caching)
            .with_backend(backend)
            .with_steering(steering)
            .with_replies(by)
            .with_claims(if claims { self::claims() } else { Vec::new() })
    }
}

/// The egress IP that no interface of the lab has.
fn claims() -> Vec<Claim> {
    DeviceName::new("eth1").map_or_else(
        |_| Vec::new(),
        |device| EIP_A.map(|address| Claim::new(address.into(), device.clone())).to_vec(),
    )
}

/// What may not get through for a while although nothing changes for it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Pauses {
    Nothing,
    /// Open connections of the pod on the gateway that was: they were translated there, and must
    /// end before the new one takes them.
    OldGateway,
    /// All of the policy: the order of the nodes leaves it no way.
    Policy,
    /// All policies, on a node that has begun and not ended: a mark is routed in one layout only.
    HalfWay,
}

impl Scenario {
    /// Whether nothing changes for a pod's flow, so that it must go on without a pause.
    pub(crate) fn must_arrive(&self, talk: &Talk, established: bool, is_killed: bool) -> bool {
        let pauses = match self.pauses {
            Pauses::Nothing => false,
            Pauses::HalfWay => is_killed,
            Pauses::OldGateway => established && talk.pod == Pod::B,
            Pauses::Policy => matches!(talk.pod, Pod::A | Pod::B),
        };
        talk.before == talk.after && !pauses
    }
}

const A: usize = 0;
const B: usize = 1;
const C: usize = 2;

fn policy(id: &str, sources: &[Pair], gateway: usize, eip: Pair) -> Result<EgressPolicy> {
    let gateway = NODES.get(gateway).copied();
    Ok(lab::policy(id, sources, gateway, dual(eip))?)
}

fn everywhere(policies: &[EgressPolicy]) -> [Wanted; 3] {
    [(); 3].map(|()| Wanted::Policies(policies.to_vec()))
}

fn but(mut wanted: [Wanted; 3], node: usize) -> [Wanted; 3] {
    if let Some(wanted) = wanted.get_mut(node) {
        *wanted = Wanted::Nothing;
    }
    wanted
}

fn talk(pod: Pod, before: Source, after: Source) -> Talk {
    Talk { pod, to: SERVER, before, after }
}

/// All of them. `p` is the policy that changes; `other`, where there is one, stays, and a pod
/// without a policy is always there.
#[expect(clippy::too_many_lines, reason = "a list")]
pub(crate) fn scenarios() -> Result<Vec<Scenario>> {
    use Source::{Eip, Nothing, Plain};
    let both = [POD_A, POD_B];
    let (eip_b, eip_c) = (Eip(EIP_B), Eip(EIP_C));
    let p = policy("p", &both, B, EIP_B)?;
    let other = policy("other", &[STRANGER], C, EIP_C)?;
    let listed = p.clone().with_destinations(Destinations::Nets(hosts(&[OTHER_SERVER])));
    let alone = everywhere(from_ref(&other));
    let with = |p: &EgressPolicy| everywhere(&[p.clone(), other.clone()]);
    let scenario = |name, before, after, order: &[usize], talks: &[Talk]| Scenario {
        name,
        before,
        after,
        order: order.to_vec(),
        talks: [talks, &[talk(Pod::C, Plain, Plain)]].concat(),
        marks: [Marks::USUAL; 2],
        ownership: Ownership::Shared,
        pauses: Pauses::Nothing,
    };
    let pods = |before, after, other| {
        [
            talk(Pod::A, before, after),
            talk(Pod::B, before, after),
            talk(Pod::Stranger, other, other),
        ]
    };
    let other_server = Talk { to: OTHER_SERVER, ..talk(Pod::A, eip_b, eip_b) };
    let elsewhere = policy("p", &both, C, EIP_B)?;
    let fresh = policy("p", &both, B, EIP_C)?;
    let moved = policy("p", &both, C, EIP_C)?;
    let same = |name, marks| Scenario {
        marks,
        ..scenario(name, with(&p), with(&p), &[B, C, A], &pods(eip_b, eip_b, eip_c))
    };
    let ends = |name, marks| Scenario {
        marks,
        ..scenario(name, with(&p), alone.clone(), &[A, B, C], &pods(eip_b, Plain, eip_c))
    };
    let half_way = |scenario| Scenario { pauses: Pauses::HalfWay, ..scenario };
    let compact = Marks { layout: MarkLayout::COMPACT, ..Marks::USUAL };
    let caching = Marks { caching: true, ..Marks::USUAL };
    let returned = Marks { replies: Replies::Tunnel, ..Marks::USUAL };
    let claiming = Marks { claims: true, ..Marks::USUAL };
    let mut all = vec![
        scenario(
            "bootstrap client",
            but(with(&p), A),
            with(&p),
            &[A],
            &[
                talk(Pod::A, Plain, eip_b),
                talk(Pod::Stranger, Plain, eip_c),
                talk(Pod::B, eip_b, eip_b),
            ],
        ),
        scenario(
            "bootstrap gateway",
            but(with(&p), B),
            with(&p),
            &[B],
            &[
                talk(Pod::A, Nothing, eip_b),
                talk(Pod::B, Plain, eip_b),
                talk(Pod::Stranger, eip_c, eip_c),
            ],
        ),
        scenario(
            "add policy, gateway first",
            alone.clone(),
            with(&p),
            &[B, C, A],
            &pods(Plain, eip_b, eip_c),
        ),
        scenario(
            "add policy, client first",
            alone.clone(),
            with(&p),
            &[A, C, B],
            &pods(Plain, eip_b, eip_c),
        ),
        scenario(
            "change members",
            everywhere(from_ref(&p)),
            everywhere(&[policy("p", &[POD_A, STRANGER], B, EIP_B)?]),
            &[B, A, C],
            &[
                talk(Pod::A, eip_b, eip_b),
                talk(Pod::B, eip_b, Plain),
                talk(Pod::Stranger, Plain, eip_b),
            ],
        ),
        scenario(
            "change destinations",
            with(&p),
            with(&listed),
            &[A, B, C],
            &[
                talk(Pod::A, eip_b, Plain),
                talk(Pod::B, eip_b, Plain),
                talk(Pod::Stranger, eip_c, eip_c),
                other_server,
            ],
        ),
        Scenario {
            pauses: Pauses::OldGateway,
            ..scenario(
                "move gateway, same EIP",
                with(&p),
                with(&elsewhere),
                &[C, A, B],
                &pods(eip_b, eip_b, eip_c),
            )
        },
        Scenario {
            pauses: Pauses::Policy,
            ..scenario(
                "move gateway, same EIP, old one first",
                with(&p),
                with(&elsewhere),
                &[B, A, C],
                &pods(eip_b, eip_b, eip_c),
            )
        },
        Scenario {
            pauses: Pauses::Policy,
            marks: [claiming; 2],
            ..scenario(
                "move gateway, same claimed EIP, old one first",
                with(&policy("p", &both, B, EIP_A)?),
                with(&policy("p", &both, C, EIP_A)?),
                &[B, A, C],
                &pods(Eip(EIP_A), Eip(EIP_A), eip_c),
            )
        },
        scenario(
            "move gateway, other EIP",
            with(&p),
            with(&moved),
            &[C, A, B],
            &pods(eip_b, eip_c, eip_c),
        ),
        scenario("change EIP", with(&p), with(&fresh), &[B, A, C], &pods(eip_b, eip_c, eip_c)),
        scenario(
            "remove policy, client first",
            with(&p),
            alone.clone(),
            &[A, B, C],
            &pods(eip_b, Plain, eip_c),
        ),
        scenario(
            "remove policy, gateway first",
            with(&p),
            alone.clone(),
            &[B, C, A],
            &pods(eip_b, Plain, eip_c),
        ),
        scenario("restart", with(&p), with(&p), &[A, B, C], &pods(eip_b, eip_b, eip_c)),
        scenario(
            "change steering",
            with(&p),
            [(); 3].map(|()| Wanted::Otherwise(vec![p.clone(), other.clone()])),
            &[B, A, C],
            &pods(eip_b, eip_b, eip_c),
        ),
        scenario(
            "uninstall client",
            with(&p),
            but(with(&p), A),
            &[A],
            &[
                talk(Pod::A, eip_b, Plain),
                talk(Pod::Stranger, eip_c, Plain),
                talk(Pod::B, eip_b, eip_b),
            ],
        ),
        scenario(
            "uninstall gateway",
            with(&p),
            but(with(&p), B),
            &[B],
            &[
                talk(Pod::A, eip_b, Nothing),
                talk(Pod::B, eip_b, Plain),
                talk(Pod::Stranger, eip_c, eip_c),
            ],
        ),
    ];
    if backend() != Backend::Nftables {
        return Ok(all);
    }
    let exclusive = |name, scenario| Scenario { name, ownership: Ownership::Exclusive, ..scenario };
    all.extend([
        half_way(same("layout of the marks", [Marks::USUAL, compact])),
        half_way(same("layout of the marks, back", [compact, Marks::USUAL])),
        half_way(ends("layout of the marks, and a policy goes", [Marks::USUAL, compact])),
        half_way(ends("layout of the marks, back, and a policy goes", [compact, Marks::USUAL])),
        same("connections cached", [Marks::USUAL, caching]),
        same("connections cached no more", [caching, Marks::USUAL]),
        ends("connections cached, and a policy goes", [Marks::USUAL, caching]),
        ends("connections cached no more, and a policy goes", [caching, Marks::USUAL]),
        same("replies by the tunnel", [Marks::USUAL, returned]),
        same("replies direct again", [returned, Marks::USUAL]),
        ends("replies by the tunnel, and a policy goes", [returned, returned]),
        Scenario {
            marks: [returned, returned],
            ..scenario(
                "replies by the tunnel, move gateway",
                with(&p),
                with(&moved),
                &[C, A, B],
                &pods(eip_b, eip_c, eip_c),
            )
        },
        exclusive(
            "add policy, alone in charge",
            scenario("", alone.clone(), with(&p), &[B, C, A], &pods(Plain, eip_b, eip_c)),
        ),
        exclusive(
            "move gateway, alone in charge",
            scenario("", with(&p), with(&moved), &[C, A, B], &pods(eip_b, eip_c, eip_c)),
        ),
        exclusive("remove policy, alone in charge", ends("", [Marks::USUAL; 2])),
        exclusive("restart, alone in charge", same("", [Marks::USUAL; 2])),
    ]);
    Ok(all)
}
