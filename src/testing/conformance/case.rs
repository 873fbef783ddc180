//! The list of conformance cases.

use std::fmt;

use super::super::lab::{Host, Lab};
use super::trial::{Trial, have_nft};
use super::{BoxError, Failure, Integration, Missing, Outcome, basics, closed, flows, neighbours};

/// A conformance case: a property of packets, and the test of it.
#[derive(Clone, Copy)]
#[non_exhaustive]
pub struct Case {
    /// Stable name of the case.
    pub name: &'static str,
    /// The property that the case shows.
    pub shows: &'static str,
    /// True if the case installs rules of other software with the program `nft`.
    pub needs_nft: bool,
    /// The reason why [`Backend::Iptables`](crate::Backend::Iptables) cannot pass the
    /// case, if it cannot.
    pub beyond_iptables: Option<&'static str>,
    pub(super) body: Body,
}

type Body = fn(&mut Trial<'_>) -> Result<(), Failure>;

impl Case {
    /// Runs the case in its own lab; `start` starts the program under test on a node.
    ///
    /// Takes some seconds at most, if the calls of the program under test return.
    pub fn run<I: Integration + 'static>(
        &self,
        mut start: impl FnMut(&Host) -> Result<I, BoxError> + Send,
    ) -> Outcome {
        if self.needs_nft {
            if let Err(error) = have_nft() {
                return Outcome::Skipped(Missing::Program("nft", error));
            }
        }
        let lab = match Lab::new() {
            Ok(lab) => lab,
            Err(error) => return Outcome::Skipped(Missing::Lab(error)),
        };
        let mut start =
            |host: &Host| -> Result<Box<dyn Integration>, BoxError> { Ok(Box::new(start(host)?)) };
        let tried = Trial::new(lab, &mut start).and_then(|mut trial| (self.body)(&mut trial));
        tried.map_or_else(Outcome::Failed, |()| Outcome::Passed)
    }

    const fn new(name: &'static str, shows: &'static str, body: Body) -> Self {
        Self { name, shows, needs_nft: false, beyond_iptables: None, body }
    }

    const fn with_nft(self) -> Self {
        Self { needs_nft: true, ..self }
    }

    const fn beyond_iptables(self, limit: &'static str) -> Self {
        Self { beyond_iptables: Some(limit), ..self }
    }
}

impl fmt::Debug for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Case").field("name", &self.name).finish_non_exhaustive()
    }
}

/// All conformance cases.
pub static CASES: &[Case] = &[
    Case::new("lab", "without policies every source arrives as it is", basics::lab),
    Case::new(
        "selected-pod",
        "a selected pod uses the egress IP and no other pod does",
        basics::selected_pod,
    ),
    Case::new(
        "destination-list",
        "a list of destinations steers nothing else",
        basics::destination_list,
    ),
    Case::new(
        "narrow-in-wide",
        "a narrow list inside a wide one takes its own, the wide one the rest",
        basics::narrow_in_wide,
    ),
    Case::new("source-prefix", "a prefix of sources takes all pods in it", basics::source_prefix),
    Case::new("pod-on-gateway", "a pod on the gateway uses the egress IP", basics::pod_on_gateway),
    Case::new(
        "gateway-as-client",
        "a gateway's own pod leaves by another gateway",
        basics::gateway_as_client,
    ),
    Case::new(
        "specific-first",
        "the more specific of two policies wins where it comes first, on every node",
        basics::specific_first,
    ),
    Case::new(
        "default-route",
        "destinations of length zero leave the cluster's own traffic alone",
        basics::default_route,
    ),
    Case::new(
        "node-address",
        "without an egress IP of its own a policy uses the gateway's address",
        basics::node_address,
    ),
    Case::new(
        "called-from-outside",
        "who is called, from outside or by another pod, answers as itself",
        basics::called_from_outside,
    ),
    Case::new(
        "node-itself",
        "what a node itself sends is never selected, whatever the sources are",
        basics::node_itself,
    ),
    Case::new("move-and-end", "a policy moves, loses a pod and goes", basics::move_and_end),
    Case::new("restart", "a restart changes nothing that packets notice", flows::restart),
    Case::new("nothing-left", "after removal nothing of it is in any kernel", closed::nothing_left),
    Case::new("no-gateway", "a policy without a gateway lets nothing out", closed::no_gateway),
    Case::new("single-family", "a family without an egress IP stays inside", closed::single_family),
    Case::new(
        "gateway-not-ready",
        "a gateway that does not know the policy yet lets nothing out",
        closed::gateway_not_ready,
    ),
    Case::new(
        "nodes-disagree",
        "gateways that disagree about a policy let nothing out with a wrong source",
        closed::nodes_disagree,
    ),
    Case::new(
        "lost-piece",
        "while a piece of the way is lost nothing gets out, and it is put back",
        closed::lost_piece,
    ),
    Case::new("lost-table", "what is lost as a whole is put back", closed::lost_table),
    Case::new(
        "injected-frame",
        "a stranger on the underlay cannot speak through the tunnel",
        closed::injected_frame,
    ),
    Case::new(
        "frame-of-a-pod",
        "a pod cannot speak through the tunnel in the name of its node",
        closed::frame_of_a_pod,
    )
    .with_nft(),
    Case::new(
        "egress-ip-service",
        "a service of the gateway at an egress IP answers",
        closed::egress_ip_service,
    ),
    Case::new(
        "strict-rp-filter",
        "strict filtering of sources on every other device does not matter",
        neighbours::strict_rp_filter,
    ),
    Case::new(
        "marks-looked-back-with",
        "marks that the kernel looks the way back up with do not matter",
        neighbours::marks_looked_back_with,
    ),
    Case::new(
        "masquerade",
        "a masquerade of other software, older or newer, does not take a selected pod",
        neighbours::masquerade,
    )
    .with_nft()
    .beyond_iptables("a masquerade ahead of ours binds"),
    Case::new(
        "network-policy",
        "what other software drops stays dropped",
        neighbours::network_policy,
    )
    .with_nft(),
    Case::new(
        "service-address",
        "a packet to a service is classified by where it leads",
        neighbours::service_address,
    )
    .with_nft()
    .beyond_iptables("packets are classified before destination NAT"),
    Case::new(
        "open-datagrams",
        "an open UDP flow has the source of a new one after every change",
        flows::open_datagrams,
    )
    .with_nft(),
    Case::new(
        "open-connection",
        "an open connection ends or goes on, but never leaves as the pod",
        flows::open_connection,
    )
    .with_nft(),
    Case::new(
        "connections-of-others",
        "open connections of pods that are not selected go on through every change",
        flows::connections_of_others,
    )
    .with_nft(),
];
