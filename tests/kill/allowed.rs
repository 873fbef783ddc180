//! Which sources the server may see of a flow, and when.

use std::net::IpAddr;

use egress_datapath::testing::lab::{
    NODE_A, NODE_B_OUTSIDE, NODE_C_OUTSIDE, POD_A, POD_B, POD_C, Pair, STRANGER,
};

use crate::scenarios::{Pod, Scenario, Source};
use crate::wire::Flow;

/// Whether the nodes translate what pods send outside, as most CNI plugins have them do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cni {
    Routes,
    Masquerades,
}

/// How far a node has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    NotYet,
    /// Its process was killed; whether connections had been ended by then.
    Killed {
        ended: bool,
    },
    Done,
}

/// How far the nodes have come.
#[derive(Clone, Copy, Debug)]
pub(crate) struct At {
    /// Index in the order of nodes: those before it are done, those after it have not begun.
    pub(crate) step: usize,
    pub(crate) progress: Progress,
}

impl At {
    /// Whether everything is done.
    pub(crate) fn is_over(self, scenario: &Scenario) -> bool {
        self.progress == Progress::Done && self.step + 1 == scenario.order.len()
    }

    /// How far the node of a pod has come; one that changes nothing never begins.
    fn of(self, scenario: &Scenario, pod: Pod) -> Progress {
        match scenario.order.iter().position(|node| *node == pod.node()) {
            Some(turn) if turn < self.step => Progress::Done,
            Some(turn) if turn == self.step => self.progress,
            _ => Progress::NotYet,
        }
    }
}

/// The sources that a flow may show.
///
/// An egress IP may be the old one or the new one until all nodes are done. The pod as it is
/// without a policy may be seen only until its node is done, where a policy comes, and only from
/// when its node has begun, where it goes; of an open connection that was steered only after it
/// was ended.
pub(crate) fn allowed(scenario: &Scenario, cni: Cni, flow: &Flow, at: At) -> Vec<IpAddr> {
    let Some(talk) = scenario.talks.get(flow.talk) else { return Vec::new() };
    let progress = at.of(scenario, talk.pod);
    let over = at.is_over(scenario) && !flow.established;
    let before = match (talk.before, progress) {
        _ if talk.before == talk.after => true,
        (Source::Plain, Progress::Done) => false,
        _ => !over,
    };
    let after = match (talk.after, progress) {
        _ if talk.before == talk.after => true,
        (Source::Plain, Progress::NotYet) => false,
        (Source::Plain, Progress::Killed { ended }) => ended || !flow.established,
        _ => true,
    };
    [(before, talk.before), (after, talk.after)]
        .into_iter()
        .filter_map(|(allowed, source)| match source {
            _ if !allowed => None,
            Source::Eip(pair) => Some(pair),
            Source::Plain => Some(plain(cni, talk.pod)),
            Source::Nothing => None,
        })
        .flatten()
        .filter(|source| source.is_ipv4() == flow.to.is_ipv4())
        .collect()
}

/// As whom a pod speaks without a policy.
const fn plain(cni: Cni, pod: Pod) -> Pair {
    match (cni, pod) {
        (Cni::Routes, Pod::A) => POD_A,
        (Cni::Routes, Pod::Stranger) => STRANGER,
        (Cni::Routes, Pod::B) => POD_B,
        (Cni::Routes, Pod::C) => POD_C,
        (Cni::Masquerades, Pod::A | Pod::Stranger) => NODE_A,
        (Cni::Masquerades, Pod::B) => NODE_B_OUTSIDE,
        (Cni::Masquerades, Pod::C) => NODE_C_OUTSIDE,
    }
}
