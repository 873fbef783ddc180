//! What must hold of packets, whatever is lost on their way.

use std::collections::BTreeSet;
use std::net::IpAddr;

use egress_datapath::explain::{Decision, Fate, Frame, Packet};
use egress_datapath::sim::{ClusterTrace, Outcome, SimCluster};
use egress_datapath::state::{ChainId, Interface, Key, Route, Rule, RuleAction, Set, State, Stmt};
use egress_datapath::testing::lab::{
    self, EIP_B, EIP_C, NODE_B, OTHER_SERVER, POD_A, POD_B, POD_C, Pair, SERVER, STRANGER, hosts,
};
use egress_datapath::{
    Changes, Datapath, Destinations, EgressPolicy, NodeName, PolicyId, Sim, TableId,
};

use crate::nodes::node;
use crate::world;

pub(crate) type Mutate = fn(&mut State);
pub(crate) type Check = fn(&World) -> Result<(), String>;

/// Plans with a fault.
pub(crate) struct World {
    pub(crate) mutate: Mutate,
}

const NODES: [&str; 3] = ["node-a", "node-b", "node-c"];

fn name(of: &str) -> NodeName {
    NodeName::new(of).unwrap()
}

fn policy(id: &str, pod: Pair, gateway: Option<(&str, Pair)>) -> EgressPolicy {
    let eip = gateway.map_or(EIP_B, |(_, eip)| eip);
    let [IpAddr::V4(v4), IpAddr::V6(v6)] = eip else { unreachable!() };
    EgressPolicy::new(
        PolicyId::new(id).unwrap(),
        hosts(&[pod]),
        egress_datapath::EgressIp::Dual(v4, v6),
    )
    .with_gateway(gateway.map(|(gateway, _)| name(gateway)))
}

/// Pod a goes by node b, but for one destination by node c; pod b leaves from its own node; pod c
/// must not leave.
pub(crate) fn policies() -> Vec<EgressPolicy> {
    let mut narrow = policy("narrow", POD_A, Some(("node-c", EIP_C)));
    narrow.destinations = Destinations::Nets(hosts(&[OTHER_SERVER]));
    let mut wide = policy("wide", POD_A, Some(("node-b", EIP_B)));
    wide.priority = 1;
    vec![
        narrow,
        wide,
        policy("here", POD_B, Some(("node-b", EIP_B))),
        policy("closed", POD_C, None),
    ]
}

impl World {
    fn planned(&self, of: &str, policies: &[EgressPolicy]) -> State {
        let mut state = world::planned(&lab::cluster(of).unwrap(), policies);
        (self.mutate)(&mut state);
        state
    }

    fn cluster(&self) -> SimCluster {
        let nodes = (1..).zip(NODES).map(|(number, of)| {
            let mut node = node(number, &lab::cluster(of).unwrap());
            *node.sim.state_mut() = self.planned(of, &policies());
            node
        });
        SimCluster::new(nodes)
    }

    /// The cluster after node a has lost something.
    fn without(&self, lose: impl FnOnce(&mut State)) -> SimCluster {
        let mut sims = self.cluster();
        lose(sim(&mut sims, "node-a").state_mut());
        sims
    }
}

fn sim<'a>(sims: &'a mut SimCluster, of: &str) -> &'a mut Sim {
    &mut sims.node_mut(&name(of)).unwrap().sim
}

/// The rules that lead to a gateway.
pub(crate) fn gateways(state: &State) -> BTreeSet<Rule> {
    let sends = |table: TableId| {
        state.routes.iter().any(|(key, route)| key.table == table && matches!(route, Route::Via(_)))
    };
    let leads = |rule: &&Rule| matches!(rule.action, RuleAction::Lookup(table) if sends(table));
    state.rules.iter().filter(leads).cloned().collect()
}

fn packets(from: Pair, to: Pair) -> impl Iterator<Item = Packet> {
    from.into_iter().zip(to).map(|(from, to)| Packet::udp(from, 40_000, to, 53))
}

/// Both families from one to the other; how they must leave, if at all.
fn leaves(
    sims: &mut SimCluster,
    from: Pair,
    to: Pair,
    wanted: Option<(&str, Pair)>,
) -> Result<(), String> {
    for (number, packet) in packets(from, to).enumerate() {
        let journey = sims.send(packet);
        let left = left(&journey);
        let wanted = wanted.map(|(node, source)| (name(node), source[number]));
        if left != wanted {
            return Err(format!("{packet}: {left:?} instead of {wanted:?}"));
        }
    }
    Ok(())
}

fn left(journey: &ClusterTrace) -> Option<(NodeName, IpAddr)> {
    match &journey.outcome {
        Outcome::Left { node, packet } => Some((node.clone(), packet.source)),
        Outcome::Arrived { .. } | Outcome::Dropped { .. } => None,
    }
}

fn dropped(sims: &mut SimCluster, by: &str) -> Result<(), String> {
    for packet in packets(POD_A, SERVER) {
        let trace = sims.send(packet).trace;
        let object = trace.dropped_by().map(|reason| reason.object.as_str());
        if !object.is_some_and(|object| object.starts_with(by)) {
            return Err(format!("{object:?} instead of {by}\n{trace}"));
        }
    }
    Ok(())
}

pub(crate) const CHECKS: [(&str, Check); 15] = [
    ("a selected pod wears its egress IP, others their own address", |world| {
        let mut sims = world.cluster();
        leaves(&mut sims, POD_A, SERVER, Some(("node-b", EIP_B)))?;
        leaves(&mut sims, POD_A, OTHER_SERVER, Some(("node-c", EIP_C)))?;
        leaves(&mut sims, POD_B, SERVER, Some(("node-b", EIP_B)))?;
        leaves(&mut sims, STRANGER, SERVER, Some(("node-a", STRANGER)))
    }),
    ("what has no gateway goes nowhere", |world| leaves(&mut world.cluster(), POD_C, SERVER, None)),
    ("pods talk to pods as themselves", |world| {
        let mut sims = world.cluster();
        packets(POD_A, POD_C).try_for_each(|packet| match sims.send(packet).outcome {
            Outcome::Arrived { packet: come, .. } if come == packet => Ok(()),
            other => Err(format!("{other:?}")),
        })
    }),
    ("answers find back", |world| {
        let mut sims = world.cluster();
        packets(POD_A, SERVER).chain(packets(POD_B, SERVER)).try_for_each(|packet| {
            let Outcome::Left { packet: out, .. } = sims.send(packet).outcome else {
                return Err("it did not leave".into());
            };
            match sims.send(out.reply()).outcome {
                Outcome::Arrived { packet: come, .. } if come == packet.reply() => Ok(()),
                other => Err(format!("{other:?}")),
            }
        })
    }),
    ("who is called from outside answers as himself", |world| {
        let mut sims = world.cluster();
        packets(POD_A, SERVER).try_for_each(|packet| {
            let _come = sims.send(packet.reply());
            let left = left(&sims.send(packet));
            let wanted = Some((name("node-a"), packet.source));
            if left == wanted { Ok(()) } else { Err(format!("{left:?}")) }
        })
    }),
    ("an invalid packet goes nowhere", |world| {
        let mut sims = world.cluster();
        packets(POD_A, SERVER).try_for_each(|packet| {
            let trace = sim(&mut sims, "node-a").send_invalid(packet);
            if trace.fate == Fate::Dropped { Ok(()) } else { Err(trace.to_string()) }
        })
    }),
    ("without its rules a packet is stopped by the forward chain", |world| {
        dropped(&mut world.without(|state| state.rules.clear()), "chain marked")
    }),
    ("without the gateway's rule it is refused by the closing table", |world| {
        let lose = |state: &mut State| {
            let gone = gateways(state);
            state.rules.retain(|rule| !gone.contains(rule));
        };
        dropped(&mut world.without(lose), "unreachable route")
    }),
    ("without the device it is refused by the gateway's table", |world| {
        let device = |state: &mut State| {
            state.link = None;
            state.routes.retain(|_, route| !matches!(route, Route::Via(_)));
        };
        dropped(&mut world.without(device), "unreachable route")
    }),
    ("a connection that was ours does not go on without its policy", |world| {
        let mut sims = world.cluster();
        for packet in packets(POD_A, SERVER) {
            let _left = sims.send(packet);
        }
        let firewall = sim(&mut sims, "node-a").state_mut().firewall.as_mut().unwrap();
        firewall.elements.retain(|key: &Key, _| !matches!(key.set(), Set::Source(_)));
        leaves(&mut sims, POD_A, SERVER, None)
    }),
    ("a gateway that does not know the policy stops it", |world| {
        let mut sims = world.cluster();
        *sim(&mut sims, "node-b").state_mut() = world.planned("node-b", &[]);
        leaves(&mut sims, POD_A, SERVER, None)
    }),
    ("gateways that disagree do not send it to and fro", |world| {
        // The mark of what came out of the tunnel sees to it, and so does a routing rule.
        let lose: [Mutate; 2] = [
            |state| state.rules.retain(|rule| rule.input.is_none()),
            |state| {
                let chains = &mut state.firewall.as_mut().unwrap().chains;
                let (_, rules) = chains.get_mut(&ChainId::Prerouting).unwrap();
                rules.retain(|rule| {
                    !matches!(rule.0[..], [Stmt::Interface(Interface::Input, _), ..])
                });
            },
        ];
        lose.into_iter().try_for_each(|lose| {
            let mut sims = world.cluster();
            let moved = [policy("wide", POD_A, Some(("node-c", EIP_C)))];
            let mut state = world.planned("node-b", &moved);
            lose(&mut state);
            *sim(&mut sims, "node-b").state_mut() = state;
            packets(POD_A, SERVER).try_for_each(|packet| {
                let journey = sims.send(packet);
                let wanted = Outcome::Dropped { node: Some(name("node-b")) };
                if journey.outcome == wanted { Ok(()) } else { Err(journey.trace.to_string()) }
            })
        })
    }),
    ("a stranger has no say in the tunnel, and finds nobody at an egress IP", |world| {
        let mut sims = world.cluster();
        let link = sim(&mut sims, "node-b").state().link.clone().ok_or("no device")?;
        for packet in packets(POD_A, SERVER) {
            let from = "10.10.0.99".parse().unwrap();
            let (to, port, vni, mac) = (NODE_B[0], link.port, link.vni, link.mac);
            let frame = Frame { from, to, port, vni, source_mac: mac, mac, packet };
            let trace = sim(&mut sims, "node-b").receive(&frame);
            if trace.fate != Fate::Dropped {
                return Err(trace.to_string());
            }
        }
        packets(SERVER, EIP_B).try_for_each(|packet| match sims.send(packet).outcome {
            Outcome::Dropped { .. } => Ok(()),
            other => Err(format!("{other:?}")),
        })
    }),
    ("nothing leaves a node with a mark of ours, or a source that others could change", |world| {
        let mut sims = world.cluster();
        packets(POD_A, SERVER).try_for_each(|packet| {
            let trace = sims.send(packet).trace;
            for of in ["node-a", "node-b"].map(name) {
                let on = trace.reasons.iter().filter(|reason| reason.node.as_ref() == Some(&of));
                let decisions: Vec<_> = on.map(|reason| &reason.decision).collect();
                let mark = decisions.iter().rev().find_map(|decision| match decision {
                    Decision::Mark(mark) => Some(mark.get()),
                    _ => None,
                });
                let bound = |decision: &&&Decision| {
                    matches!(decision, Decision::SourceKept | Decision::Snat(_))
                };
                if mark != Some(0) || !decisions.iter().any(|decision| bound(&decision)) {
                    return Err(trace.to_string());
                }
            }
            Ok(())
        })
    }),
    ("at every point of a move the pod wears the old egress IP or the new one", |world| {
        every_point(world, |now, new| vec![Changes::between(now, new)])
    }),
];

/// Stops the changes of node a before each operation, and sends a packet.
pub(crate) fn every_point(
    world: &World,
    order: impl Fn(&State, &State) -> Vec<Changes>,
) -> Result<(), String> {
    let mut moved = policies();
    moved[1].gateway = Some(name("node-c"));
    moved[1].egress_ip = moved[0].egress_ip;
    let mut base = world.cluster();
    for of in ["node-b", "node-c"] {
        // Both gateways know it, as while a policy moves.
        let mut both = policies();
        both[1].gateway = Some(name(of));
        *sim(&mut base, of).state_mut() = world.planned(of, &both);
    }
    let new = world.planned("node-a", &moved);
    let now = sim(&mut base, "node-a").state().clone();
    let changes = order(&now, &new);
    let count: usize = changes.iter().map(Changes::len).sum();
    for stop in 0..=count {
        let mut sims = base.clone();
        let here = sim(&mut sims, "node-a");
        here.refuse(stop, 12);
        for part in &changes {
            if here.apply(part).is_err() {
                break;
            }
        }
        for (number, packet) in packets(POD_A, SERVER).enumerate() {
            let left = left(&sims.send(packet)).map(|(_, source)| source);
            let fine = [None, Some(EIP_B[number]), Some(EIP_C[number])];
            if !fine.contains(&left) {
                return Err(format!("stopped after {stop} of {count}, it left as {left:?}"));
            }
        }
    }
    Ok(())
}
