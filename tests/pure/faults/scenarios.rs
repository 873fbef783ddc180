//! What changes, in which order of nodes, and as whom pods speak before and after.

use std::slice::from_ref;

use egress_datapath::{
    Cluster, Datapath, EgressPolicy, Error, MarkAllocator, Reconciler, Report, TableAllocator,
};

use crate::{dual, policy};

/// An address of each family.
pub(super) type Pair = [&'static str; 2];

pub(super) const POD_A: Pair = ["10.244.1.10", "fd44:1::10"];
pub(super) const OTHER_A: Pair = ["10.244.1.11", "fd44:1::11"];
pub(super) const POD_B: Pair = ["10.244.2.10", "fd44:2::10"];
pub(super) const POD_C: Pair = ["10.244.3.10", "fd44:3::10"];

const EIP_B: Pair = ["203.0.113.2", "2001:db8:ffff::2"];
const EIP_C: Pair = ["203.0.113.3", "2001:db8:ffff::3"];

const A: usize = 0;
const B: usize = 1;
const C: usize = 2;

/// What a node should hold.
#[derive(Clone)]
pub(super) enum Wanted {
    Policies(Vec<EgressPolicy>),
    Nothing,
}

impl Wanted {
    pub(super) fn make<D: Datapath, M: MarkAllocator, T: TableAllocator>(
        &self,
        cluster: &Cluster,
        egress: &mut Reconciler<D, M, T>,
    ) -> Result<Report, Error> {
        match self {
            Self::Policies(policies) => egress.reconcile(cluster, policies),
            Self::Nothing => egress.remove(),
        }
    }
}

/// As whom a pod speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// As an egress IP.
    Eip(Pair),
    /// As without any policy.
    Plain,
    /// Not at all.
    Nothing,
}

/// A pod that talks to the outside.
#[derive(Clone, Copy, Debug)]
pub(super) struct Talk {
    pub(super) pod: Pair,
    /// The pod's node.
    pub(super) node: usize,
    pub(super) before: Source,
    pub(super) after: Source,
}

/// A change of one or more nodes, one after another.
pub(super) struct Scenario {
    pub(super) name: &'static str,
    /// What each of the nodes holds at first, and at last.
    pub(super) before: [Wanted; 3],
    pub(super) after: [Wanted; 3],
    /// Which nodes change, in turn.
    pub(super) order: Vec<usize>,
    pub(super) talks: Vec<Talk>,
}

fn of(id: &str, sources: &[Pair], gateway: &str, [v4, v6]: Pair) -> EgressPolicy {
    let sources: Vec<_> =
        sources.iter().flat_map(|[v4, v6]| [format!("{v4}/32"), format!("{v6}/128")]).collect();
    let sources: Vec<_> = sources.iter().map(String::as_str).collect();
    policy(id, &sources, Some(gateway), dual(v4, v6))
}

fn everywhere(policies: &[EgressPolicy]) -> [Wanted; 3] {
    [(); 3].map(|()| Wanted::Policies(policies.to_vec()))
}

fn but(mut wanted: [Wanted; 3], node: usize) -> [Wanted; 3] {
    wanted[node] = Wanted::Nothing;
    wanted
}

/// All of them. `p` is the policy that changes; `other`, where there is one, stays, and a pod
/// without a policy is always there.
#[expect(clippy::too_many_lines, reason = "a list")]
pub(super) fn scenarios() -> Vec<Scenario> {
    use Source::{Eip, Nothing, Plain};
    let both = [POD_A, POD_B];
    let (eip_b, eip_c) = (Eip(EIP_B), Eip(EIP_C));
    let p = of("p", &both, "b", EIP_B);
    let other = of("other", &[OTHER_A], "c", EIP_C);
    let with = |p: &EgressPolicy| everywhere(&[p.clone(), other.clone()]);
    let alone = || everywhere(from_ref(&other));
    let talk = |pod, node, before, after| Talk { pod, node, before, after };
    // Of the selected pods, and of the one with the other policy.
    let talks = |before, after| {
        [
            talk(POD_A, A, before, after),
            talk(POD_B, B, before, after),
            talk(OTHER_A, A, eip_c, eip_c),
        ]
    };
    let scenario = |name, before, after, order: &[usize], talks: &[Talk]| Scenario {
        name,
        before,
        after,
        order: order.to_vec(),
        talks: [talks, &[talk(POD_C, C, Plain, Plain)]].concat(),
    };
    let elsewhere = of("p", &both, "c", EIP_B);
    let members = of("p", &[POD_A, OTHER_A], "b", EIP_B);
    let closed = p.clone().with_gateway(None);
    vec![
        scenario(
            "install on a client",
            but(with(&p), A),
            with(&p),
            &[A],
            &[
                talk(POD_A, A, Plain, eip_b),
                talk(OTHER_A, A, Plain, eip_c),
                talk(POD_B, B, eip_b, eip_b),
            ],
        ),
        scenario(
            "install on a gateway",
            but(with(&p), B),
            with(&p),
            &[B],
            &[
                talk(POD_A, A, Nothing, eip_b),
                talk(POD_B, B, Plain, eip_b),
                talk(OTHER_A, A, eip_c, eip_c),
            ],
        ),
        scenario("add, gateway first", alone(), with(&p), &[B, A], &talks(Plain, eip_b)),
        scenario("add, client first", alone(), with(&p), &[A, B], &talks(Plain, eip_b)),
        scenario("remove, client first", with(&p), alone(), &[A, B], &talks(eip_b, Plain)),
        scenario("remove, gateway first", with(&p), alone(), &[B, A], &talks(eip_b, Plain)),
        scenario(
            "change members",
            everywhere(from_ref(&p)),
            everywhere(from_ref(&members)),
            &[B, A],
            &[
                talk(POD_A, A, eip_b, eip_b),
                talk(POD_B, B, eip_b, Plain),
                talk(OTHER_A, A, Plain, eip_b),
            ],
        ),
        scenario("move", with(&p), with(&elsewhere), &[C, A, B], &talks(eip_b, eip_b)),
        scenario(
            "change the egress IP",
            with(&p),
            with(&of("p", &both, "b", EIP_C)),
            &[B, A],
            &talks(eip_b, eip_c),
        ),
        scenario(
            "move and change the egress IP",
            with(&p),
            with(&of("p", &both, "c", EIP_C)),
            &[C, A, B],
            &talks(eip_b, eip_c),
        ),
        scenario("close", with(&p), with(&closed), &[A, B], &talks(eip_b, Nothing)),
        scenario(
            "uninstall from a client",
            with(&p),
            but(with(&p), A),
            &[A],
            &[
                talk(POD_A, A, eip_b, Plain),
                talk(OTHER_A, A, eip_c, Plain),
                talk(POD_B, B, eip_b, eip_b),
            ],
        ),
        scenario(
            "uninstall from a gateway",
            with(&p),
            but(with(&p), B),
            &[B],
            &[
                talk(POD_A, A, eip_b, Nothing),
                talk(POD_B, B, eip_b, Plain),
                talk(OTHER_A, A, eip_c, eip_c),
            ],
        ),
    ]
}
