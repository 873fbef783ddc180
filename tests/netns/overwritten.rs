//! Marks that other software overwrites as a whole, which takes ours away.

use common::backend::{backend, replies, steering};
use common::fleet::{
    Fleet, Result, check, dual, expect, expect_nothing, is_beyond, lab, nft, policy, sources, tool,
    unless_beyond,
};
use egress_datapath::testing::lab::{
    EIP_B, NODE_A, POD_A, POD_B, POD_C, Proto, SERVER, STRANGER, probe,
};
use egress_datapath::{MarkLayout, Replies, Steering};

use crate::flows::masquerade;

/// A chain that overwrites the mark of everything, such as it is not ours to keep.
fn overwriting(hook: &str) -> String {
    format!(
        "table inet overwriting {{
            chain overwrite {{ type filter hook {hook}; meta mark set 0x10; }}
        }}"
    )
}

#[test]
fn mark_overwritten_no_pod_or_node_address_leak() -> Result {
    let lab = lab();
    masquerade(&lab)?;
    if is_beyond("whoever overwrites the whole mark takes ours away") {
        let policies = [policy("p", &[POD_A], Some("node-b"), dual(EIP_B))?];
        Fleet::open(&lab)?.apply(&policies)?;
        check(&[expect(&lab.pod_a, SERVER, EIP_B)]);
        nft(&lab.node_a.netns, &[], &overwriting("prerouting priority -90"))?;
        check(&[expect(&lab.pod_a, SERVER, NODE_A)]);
        return Ok(());
    }
    for layout in [MarkLayout::SEED, MarkLayout::COMPACT] {
        let mut fleet = Fleet::with(&lab, |cluster| cluster.marks = layout)?;
        fleet.apply(&[policy("p", &[POD_A, POD_B], Some("node-b"), dual(EIP_B))?])?;
        let (client, gateway) = (&lab.node_a.netns, &lab.node_b.netns);

        // On the gateway, behind the routing decision, nothing is lost.
        for hook in ["forward priority 0", "postrouting priority mangle"] {
            nft(gateway, &[], &overwriting(hook))?;
            // With the egress hook, replies find the node of the pod by their mark.
            let hooked = steering(&layout) == Steering::EgressHook;
            let replied = !hooked || replies(&layout, backend()) == Replies::Direct;
            check(&[
                if replied {
                    expect(&lab.pod_a, SERVER, EIP_B)
                } else {
                    expect_nothing(&lab.pod_a, SERVER)
                },
                expect(&lab.pod_b, SERVER, EIP_B),
                expect(&lab.pod_b, POD_A, POD_B),
            ]);
            tool(gateway, "nft delete table inet overwriting")?;
        }

        // Ahead of it, open connections stop, and new ones wear what they should.
        drop(sources(&lab));
        nft(gateway, &[], &overwriting("prerouting priority -90"))?;
        for pod in [&lab.pod_a, &lab.pod_b] {
            for to in SERVER {
                assert!(probe(pod, Proto::Tcp, to).is_err(), "{to}");
                assert!(EIP_B.contains(&probe(pod, Proto::Udp, to)?), "{to}");
            }
        }
        tool(gateway, "nft delete table inet overwriting")?;
        assert_eq!(sources(&lab), EIP_B.into_iter().collect());

        // On the pod's node, behind the routing decision nothing is lost, unless the egress hook is
        // to find the gateway by the mark; ahead of it the way is.
        nft(client, &[], &overwriting("forward priority 0"))?;
        let steered = match steering(&layout) {
            Steering::EgressHook => expect_nothing(&lab.pod_a, SERVER),
            _ => expect(&lab.pod_a, SERVER, EIP_B),
        };
        check(&[steered, expect(&lab.stranger, SERVER, NODE_A)]);
        tool(client, "nft delete table inet overwriting")?;
        drop(sources(&lab));
        nft(client, &[], &overwriting("prerouting priority -90"))?;
        check(&[expect_nothing(&lab.pod_a, SERVER)]);
        // What was dropped on the gateway before may be said again.
        let seen = sources(&lab);
        assert!(seen.iter().all(|source| EIP_B.contains(source)), "{seen:?}");
        check(&[expect(&lab.stranger, SERVER, NODE_A), expect(&lab.stranger, POD_B, STRANGER)]);
        tool(client, "nft delete table inet overwriting")?;
    }
    Ok(())
}

#[test]
fn connection_mark_copied_to_packets_steered_and_answered() -> Result {
    let lab = lab();
    harness::needs(&["nft"]);
    unless_beyond("whoever overwrites the whole mark takes ours away");
    masquerade(&lab)?;
    for (layout, caching) in
        [(MarkLayout::SEED, false), (MarkLayout::SEED, true), (MarkLayout::COMPACT, false)]
    {
        let mut fleet = Fleet::with(&lab, |cluster| {
            cluster.marks = layout;
            cluster.connection_caching = caching;
        })?;
        let policies = [
            policy("p", &[POD_A, POD_B], Some("node-b"), dual(EIP_B))?,
            policy("q", &[POD_C], Some("node-b"), dual(EIP_B))?,
        ];
        fleet.apply(&policies)?;
        for (hook, statement) in [
            // `iptables -t mangle -A PREROUTING -j CONNMARK --restore-mark`
            ("prerouting priority mangle", "meta mark set ct mark"),
            ("forward priority -200", "meta mark set ct mark"),
            ("postrouting priority mangle", "meta mark set ct mark"),
            ("postrouting priority mangle", "meta mark != 0 ct mark set meta mark"),
        ] {
            // The egress hook looks up the mark behind all these chains; and the mark of a gateway,
            // copied behind the forward chain, would be the outer packet's.
            let hooked = steering(&layout) == Steering::EgressHook;
            let late = statement == "meta mark set ct mark" && !hook.starts_with("prerouting");
            if late && (hooked || caching && hook.starts_with("postrouting")) {
                continue;
            }
            println!("{hook}: {statement}, {layout:?}, caching {caching}");
            let copying = format!(
                "table inet copying {{
                    chain copy {{ type filter hook {hook}; {statement}; }}
                    chain again {{ type filter hook prerouting priority mangle; meta mark set ct mark; }}
                }}"
            );
            for host in lab.nodes() {
                nft(&host.netns, &[], &copying)?;
            }
            sources(&lab);
            check(&[
                expect(&lab.pod_a, SERVER, EIP_B),
                expect(&lab.pod_b, SERVER, EIP_B),
                expect(&lab.pod_c, SERVER, EIP_B),
                expect(&lab.stranger, SERVER, NODE_A),
                expect(&lab.pod_a, POD_B, POD_A),
            ]);
            let wanted = EIP_B.into_iter().chain(NODE_A).collect();
            assert_eq!(sources(&lab), wanted, "{hook}: {statement}");
            for host in lab.nodes() {
                tool(&host.netns, "nft delete table inet copying")?;
            }
        }
        fleet.remove()?;
    }
    Ok(())
}
