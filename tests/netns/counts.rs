//! What the nodes count for each policy: real packets, by their number and their bytes.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::UdpSocket;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use common::fleet::{
    Fleet, Result, check, dual, expect, lab, nft, policy, sources, tool, unless_beyond,
};
use egress_datapath::datapath::observe;
use egress_datapath::state::Set;
use egress_datapath::testing::lab::{
    EIP_B, EIP_C, Lab, Netns, POD_A, POD_B, POD_C, Pair, SERVER, STRANGER,
};
use egress_datapath::{Count, EgressPolicy, Family, KernelDatapath, NodeName};

use crate::flows::masquerade;

/// Bytes that a datagram carries.
const PAYLOAD: u64 = 100;

type Counts = BTreeMap<(String, Family), Count>;

/// Sends so many datagrams of each family, by few flows, so that most are of known connections.
fn send(netns: &Netns, from: Pair, to: Pair, numbers: [u64; 2]) -> Result {
    netns.run(|| {
        for ((from, to), number) in from.into_iter().zip(to).zip(numbers) {
            let sockets = [UdpSocket::bind((from, 0))?, UdpSocket::bind((from, 0))?];
            let bytes = vec![0; usize::try_from(PAYLOAD).unwrap_or_default()];
            for (socket, _) in sockets.iter().cycle().zip(0..number) {
                // Nobody listens there.
                socket.send_to(&bytes, (to, 9))?;
            }
        }
        io::Result::Ok(())
    })??;
    Ok(())
}

/// So many packets of each family.
fn of(all: &[(&str, [u64; 2])]) -> Counts {
    let of = |&(id, [v4, v6]): &(&str, [u64; 2])| {
        [(Family::V4, 28, v4), (Family::V6, 48, v6)].map(|(family, headers, packets)| {
            let bytes = packets * (headers + PAYLOAD);
            ((id.to_owned(), family), Count { packets, bytes })
        })
    };
    all.iter().flat_map(of).collect()
}

/// Two for the pods of one node, one for a pod of its own gateway, one that is closed.
fn policies() -> Result<Vec<EgressPolicy>> {
    Ok(vec![
        policy("one", &[POD_A], Some("node-b"), dual(EIP_B))?,
        policy("two", &[STRANGER], Some("node-c"), dual(EIP_C))?,
        policy("at-home", &[POD_B], Some("node-b"), dual(EIP_B))?,
        policy("closed", &[POD_C], None, dual(EIP_C))?,
    ])
}

/// The packets of those that are on a node, by the order of the policies.
fn there(numbers: [[u64; 2]; 4], node: &str) -> Counts {
    let home = ["node-a", "node-a", "node-b", "node-c"];
    let ids = ["one", "two", "at-home", "closed"].into_iter().zip(home).zip(numbers);
    let counted = |((id, home), numbers)| (id, if home == node { numbers } else { [0; 2] });
    of(&ids.map(counted).collect::<Vec<_>>())
}

fn assert_counts(fleet: &mut Fleet, numbers: [[u64; 2]; 4], when: &str) -> Result {
    for node in ["node-a", "node-b", "node-c"] {
        assert_eq!(fleet.counts(node)?, there(numbers, node), "{when}, {node}");
    }
    Ok(())
}

fn counting(lab: &Lab) -> Result<Fleet> {
    Fleet::with(lab, |cluster| cluster.policy_counters = true)
}

#[test]
fn counters_survive_policy_change_and_restart() -> Result {
    unless_beyond("policies are not counted");
    let lab = lab();
    masquerade(&lab)?;
    let mut fleet = counting(&lab)?;
    let mut policies = policies()?;
    fleet.apply(&policies)?;
    let pods =
        [(&lab.pod_a, POD_A), (&lab.stranger, STRANGER), (&lab.pod_b, POD_B), (&lab.pod_c, POD_C)];
    let mut numbers = [[17, 5], [3, 8], [6, 4], [2, 1]];
    for ((netns, pod), numbers) in pods.into_iter().zip(numbers) {
        send(netns, pod, SERVER, numbers)?;
        // What stays inside is nobody's.
        send(netns, pod, if pod == POD_C { POD_B } else { POD_C }, [3, 3])?;
    }
    assert_counts(&mut fleet, numbers, "sent")?;

    // Nothing is different because something was counted.
    assert!(fleet.apply(&policies)?.iter().all(|report| report.changes.is_empty()));
    assert_counts(&mut fleet, numbers, "reconciled again")?;
    // Who comes after knows nothing, and finds them.
    let mut fleet = counting(&lab)?;
    assert!(fleet.apply(&policies)?.iter().all(|report| report.changes.is_empty()));
    assert_counts(&mut fleet, numbers, "restarted")?;

    // To another gateway, with another address, other members, and others around it.
    policies[0] = policy("one", &[POD_A], Some("node-c"), dual(EIP_C))?;
    policies[2].priority = 3;
    policies[3].gateway = Some(NodeName::new("node-b")?);
    policies[3].egress_ip = dual(EIP_B);
    fleet.apply(&policies)?;
    let other = policy("other", &[POD_A, POD_B], Some("node-b"), dual(EIP_B))?;
    fleet.apply(&[&policies[..], &[other]].concat())?;
    fleet.apply(&policies)?;
    assert_counts(&mut fleet, numbers, "moved")?;
    for ((netns, pod), numbers) in pods.into_iter().zip(&mut numbers) {
        send(netns, pod, SERVER, [4, 2])?;
        (numbers[0], numbers[1]) = (numbers[0] + 4, numbers[1] + 2);
    }
    assert_counts(&mut fleet, numbers, "sent on")?;

    // With the policy it ends.
    fleet.apply(&policies[1..])?;
    let mut left = there(numbers, "node-a");
    left.retain(|(id, _), _| id != "one");
    assert_eq!(fleet.counts("node-a")?, left);
    fleet.apply(&policies)?;
    numbers[0] = [0; 2];
    assert_counts(&mut fleet, numbers, "back again")?;
    fleet.remove()?;
    assert_eq!(fleet.counts("node-a")?, Counts::new());
    Ok(())
}

#[test]
fn counters_mark_overwritten_packet_counted_once() -> Result {
    unless_beyond("policies are not counted");
    let lab = lab();
    let mut fleet = counting(&lab)?;
    let bypassed = policy("bypassed", &[STRANGER], None, dual(EIP_C))?
        .with_unavailable(egress_datapath::Unavailable::Bypass);
    fleet.apply(&[policy("one", &[POD_A], Some("node-b"), dual(EIP_B))?, bypassed])?;
    // Others overwrite the mark, so that the policy is asked again ahead of source NAT.
    let overwriting = "table inet overwriting {
        chain overwrite { type filter hook prerouting priority -90; meta mark set 0x10; }
    }";
    nft(&lab.node_a.netns, &[], overwriting)?;
    // Each by a flow of its own.
    for _ in 0..6 {
        send(&lab.pod_a, POD_A, SERVER, [1, 1])?;
        send(&lab.stranger, STRANGER, SERVER, [1, 1])?;
    }
    assert_eq!(fleet.counts("node-a")?, of(&[("one", [6, 6]), ("bypassed", [6, 6])]));
    Ok(())
}

#[test]
fn drops_of_a_chain_counted() -> Result {
    unless_beyond("drops are not counted");
    harness::needs(&["nft"]);
    let lab = lab();
    let mut fleet = Fleet::open(&lab)?;
    fleet.apply(&[policy("one", &[POD_A], Some("node-b"), dual(EIP_B))?])?;
    assert!(fleet.drops("node-b")?.values().all(|count| count.packets == 0));
    // Only nodes may send to the tunnel's port.
    for (any, to) in [("0.0.0.0", EIP_B[0]), ("::", EIP_B[1])] {
        let socket = lab.server.run(|| UdpSocket::bind((any, 0)))??;
        for _ in 0..3 {
            socket.send_to(b"?", (to, 7789))?;
        }
    }
    let six = Count { packets: 6, bytes: 3 * (29 + 49) };
    // Softirqs may run later than the call that sent the packets.
    let mut found = fleet.drops("node-b")?;
    for _ in 0..3000 {
        if found["input"] == six {
            break;
        }
        thread::sleep(Duration::from_millis(10));
        found = fleet.drops("node-b")?;
    }
    assert_eq!(found["input"], six, "{found:?}");
    let listed = tool(&lab.node_b.netns, "nft list chain inet egress_datapath input")?;
    // The rule of each family.
    assert!(listed.contains("counter packets 3 bytes 87 drop"), "{listed}");
    assert!(listed.contains("counter packets 3 bytes 147 drop"), "{listed}");
    Ok(())
}

#[test]
fn counters_switched_on_and_off_no_leak() -> Result {
    unless_beyond("policies are not counted");
    let lab = lab();
    masquerade(&lab)?;
    let mut fleet = Fleet::open(&lab)?;
    let policies = policies()?;
    fleet.apply(&policies)?;
    check(&[expect(&lab.pod_a, SERVER, EIP_B)]);
    drop(sources(&lab));
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let flood = scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                send(&lab.pod_a, POD_A, SERVER, [16, 16]).map_err(|error| error.to_string())?;
            }
            Ok::<_, String>(())
        });
        let mut turns = (0..20).map(|turn| {
            let on = turn % 2 == 0;
            fleet.change(|cluster| cluster.policy_counters = on);
            let changed = fleet.apply(&policies)?;
            assert!(changed.iter().all(|report| !report.changes.is_empty()), "turn {turn}");
            let again = fleet.apply(&policies)?;
            assert!(again.iter().all(|report| report.changes.is_empty()), "turn {turn}");
            let found = observe(&mut lab.node_a.netns.run(KernelDatapath::open)??)?;
            let sets = found.firewall.map(|table| table.sets).unwrap_or_default();
            assert_eq!(sets.contains(&Set::Count(Family::V4)), on, "turn {turn}");
            assert_eq!(fleet.counts("node-a")?.is_empty(), !on, "turn {turn}");
            Ok(())
        });
        let turned: Result = turns.try_for_each(|turn| turn);
        done.store(true, Ordering::Relaxed);
        flood.join().map_err(|_| "the flood panicked")??;
        turned
    })?;
    check(&[expect(&lab.pod_a, SERVER, EIP_B)]);
    assert_eq!(sources(&lab), EIP_B.into_iter().collect::<BTreeSet<_>>());
    Ok(())
}
