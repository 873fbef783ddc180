//! The conformance kit's cases, passed by a reconciler of our own on each node.

use common::backend::{backend, datapath, replies, steering, underlay};
use common::fleet::{Result, is_beyond, needs_backend};
use egress_datapath::KernelTables;
use egress_datapath::alloc::{MarkPool, TablePool, TableRange};
use egress_datapath::testing::conformance::{BoxError, CASES, Integration, Outcome};
use egress_datapath::testing::lab::Host;
use egress_datapath::{Cluster, Datapath, EgressPolicy, MarkLayout, Reconciler};

/// A reconciler of the backend that this run is about.
struct Ours(Reconciler<Box<dyn Datapath>>);

impl Ours {
    fn start(host: &Host) -> std::result::Result<Self, BoxError> {
        let datapath = datapath(&host.netns, backend())?;
        let tables = TablePool::with_probe(TableRange::default(), KernelTables::open()?);
        let marks = MarkPool::new(MarkLayout::SEED);
        Ok(Self(Reconciler::with_allocators(datapath, marks, tables)))
    }
}

impl Integration for Ours {
    fn apply(
        &mut self,
        cluster: &Cluster,
        policies: &[EgressPolicy],
    ) -> std::result::Result<(), BoxError> {
        let steering = steering(&cluster.marks);
        let replies = replies(&cluster.marks, backend());
        let cluster = underlay(cluster.clone()).with_backend(backend()).with_steering(steering);
        let cluster = cluster.with_replies(replies);
        self.0.apply(&cluster, policies)
    }

    fn remove(&mut self) -> std::result::Result<(), BoxError> {
        Integration::remove(&mut self.0)
    }
}

fn passes(name: &str) -> Result {
    let case = CASES.iter().find(|case| case.name == name).ok_or("no such case")?;
    needs_backend();
    let is_beyond = case.beyond_iptables.is_some_and(is_beyond);
    match case.run(Ours::start) {
        Outcome::Passed if is_beyond => Err(format!("no limit: {}", case.shows).into()),
        // It failed, as it must.
        Outcome::Failed(_) if is_beyond => Ok(()),
        Outcome::Passed => Ok(()),
        Outcome::Skipped(missing) => harness::unmet(missing),
        Outcome::Failed(failure) => Err(format!("{}: {failure}", case.shows).into()),
    }
}

/// A test for each case, so that they run side by side.
macro_rules! cases {
    ($($function:ident $name:literal),* $(,)?) => {
        $(
            #[test]
            fn $function() -> Result {
                passes($name)
            }
        )*

        #[test]
        fn every_conformance_case_has_test() {
            let names: Vec<&str> = CASES.iter().map(|case| case.name).collect();
            assert_eq!(names, [$($name),*]);
        }
    };
}

cases! {
    lab "lab",
    selected_pod "selected-pod",
    destination_list "destination-list",
    narrow_in_wide "narrow-in-wide",
    source_prefix "source-prefix",
    pod_on_gateway "pod-on-gateway",
    gateway_as_client "gateway-as-client",
    specific_first "specific-first",
    default_route "default-route",
    node_address "node-address",
    called_from_outside "called-from-outside",
    node_itself "node-itself",
    move_and_end "move-and-end",
    restart "restart",
    nothing_left "nothing-left",
    no_gateway "no-gateway",
    single_family "single-family",
    gateway_not_ready "gateway-not-ready",
    nodes_disagree "nodes-disagree",
    lost_piece "lost-piece",
    lost_table "lost-table",
    injected_frame "injected-frame",
    frame_of_a_pod "frame-of-a-pod",
    egress_ip_service "egress-ip-service",
    strict_rp_filter "strict-rp-filter",
    marks_looked_back_with "marks-looked-back-with",
    masquerade "masquerade",
    network_policy "network-policy",
    service_address "service-address",
    open_datagrams "open-datagrams",
    open_connection "open-connection",
    connections_of_others "connections-of-others",
}
