//! Real packets, and what `explain` says of them: each scenario that decided how the datapath is,
//! as far as it is about the way of a packet that a pod sends.
#![allow(clippy::indexing_slicing, clippy::unwrap_used, reason = "a test says what it expects")]

use std::collections::BTreeSet;
use std::fmt;
use std::io::{self, Write};
use std::net::IpAddr;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use common::fleet::{Fleet, Result, lab, nft, tool, unless_beyond};
use egress_datapath::datapath::observe;
use egress_datapath::explain::{Fate, HostContext, Packet, Trace, explain_received};
use egress_datapath::state::State;
use egress_datapath::testing::lab::{
    Host, Lab, NODE_A, NODE_B_OUTSIDE, NODE_C_OUTSIDE, Netns, POD_A, POD_B, POD_C, PORT, Pair,
    Proto, STRANGER, probe,
};
use egress_datapath::{EgressPolicy, KernelDatapath, Sim, explain};

mod scenarios;
mod special;

use scenarios::{NOT_COVERED, SCENARIOS, Scenario};

/// Port that explained packets come from; no rule of ours looks at it.
const FROM_PORT: u16 = 40_000;

/// How long a packet may take that must come.
const LATE: Duration = Duration::from_secs(120);

/// What becomes of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum End {
    /// Nobody outside or in another pod sees it.
    Lost,
    /// It is seen with this source.
    As(IpAddr),
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lost => f.write_str("nothing"),
            Self::As(source) => source.fmt(f),
        }
    }
}

/// A scenario under way, and what was seen and said in it.
struct World<'a> {
    lab: &'a Lab,
    fleet: Fleet,
    /// What node-a, node-b and node-c are looked into with.
    kernels: Vec<KernelDatapath>,
    packets: usize,
    real: BTreeSet<End>,
    told: BTreeSet<End>,
    wrong: Vec<String>,
}

impl<'a> World<'a> {
    fn new(lab: &'a Lab) -> Result<Self> {
        let open = |host: &Host| -> Result<_> { Ok(host.netns.run(KernelDatapath::open)??) };
        Ok(Self {
            lab,
            fleet: Fleet::open(lab)?,
            kernels: lab.nodes().into_iter().map(open).collect::<Result<_>>()?,
            packets: 0,
            real: BTreeSet::new(),
            told: BTreeSet::new(),
            wrong: Vec::new(),
        })
    }

    fn apply(&mut self, policies: &[EgressPolicy]) -> Result {
        self.fleet.apply(policies).map(drop)
    }

    /// What the kernels hold.
    fn states(&mut self) -> Result<Vec<State>> {
        Ok(self.kernels.iter_mut().map(observe).collect::<std::result::Result<_, _>>()?)
    }

    /// A pod sends packets of every protocol and family, and each is explained.
    fn send(&mut self, pod: Pair, to: Pair) -> Result {
        self.send_by_way_of(pod, &to, &to)
    }

    /// The same where the host translates the destination on the way.
    fn send_by_way_of(&mut self, pod: Pair, to: &[IpAddr], in_the_end: &[IpAddr]) -> Result {
        let states = self.states()?;
        let (netns, _) = self.at(pod[0])?;
        drop(self.lab.outside.take_seen());
        let answers: Vec<(Proto, IpAddr, io::Result<IpAddr>)> = thread::scope(|scope| {
            let mut asked = Vec::new();
            for proto in Proto::BOTH {
                for (to, end) in to.iter().zip(in_the_end) {
                    asked.push(scope.spawn(move || (proto, *end, probe(netns, proto, *to))));
                }
            }
            asked.into_iter().map(|asked| asked.join().unwrap()).collect()
        });
        // What is not answered may have been seen all the same.
        let mut seen = self.lab.outside.take_seen();
        for (proto, to, answer) in answers {
            let source = pod[usize::from(to.is_ipv6())];
            let (told, trace) = self.explained(&states, packet(proto, source, to))?;
            let came =
                |(from, by): &&(IpAddr, Proto)| *by == proto && from.is_ipv4() == source.is_ipv4();
            let begin = Instant::now();
            let is_due = matches!(told, End::As(_)) && answer.is_err();
            while is_due && !seen.iter().any(|one| came(&one)) && begin.elapsed() < LATE {
                thread::sleep(Duration::from_millis(20));
                seen.extend(self.lab.outside.take_seen());
            }
            let real = match answer {
                Ok(source) => End::As(source),
                Err(_) => seen.iter().find(came).map_or(End::Lost, |(from, _)| End::As(*from)),
            };
            self.compare(real, told, &trace);
        }
        Ok(())
    }

    /// The end of a pod's packet by what the kernels hold.
    fn explained(&self, states: &[State], packet: Packet) -> Result<(End, Vec<Trace>)> {
        let (_, mut at) = self.at(packet.source)?;
        let mut traces = vec![explain(&states[at], &packet)];
        if let Some(Trace { fate: Fate::Tunnelled(frame), .. }) = traces.first() {
            let nodes = self.lab.cluster(self.lab.nodes()[at])?.nodes;
            let peer = nodes.iter().position(|node| node.underlay.contains(&frame.to));
            at = peer.ok_or("a frame to nobody")?;
            let frame = *frame;
            traces.push(explain_received(&states[at], &frame));
        }
        let own = [NODE_A, NODE_B_OUTSIDE, NODE_C_OUTSIDE][at];
        let end = match traces.last().map(|trace| trace.fate) {
            Some(Fate::Routed(Some(source))) => End::As(source),
            Some(Fate::Routed(None)) => End::As(own[usize::from(packet.source.is_ipv6())]),
            _ => End::Lost,
        };
        Ok((end, traces))
    }

    fn compare(&mut self, real: End, told: End, traces: &[Trace]) {
        self.packets += 1;
        self.real.insert(real);
        self.told.insert(told);
        if real != told {
            let traces: String = traces.iter().map(ToString::to_string).collect();
            self.wrong.push(format!("it ended as {real}, and was explained as {told}:\n{traces}"));
        }
    }

    /// A pod's network, and the number of its node.
    fn at(&self, pod: IpAddr) -> Result<(&'a Netns, usize)> {
        let pods = [
            (POD_A, &self.lab.pod_a, 0),
            (STRANGER, &self.lab.stranger, 0),
            (POD_B, &self.lab.pod_b, 1),
            (POD_C, &self.lab.pod_c, 2),
        ];
        let found = pods.into_iter().find(|(addresses, ..)| addresses.contains(&pod));
        found.map(|(_, netns, node)| (netns, node)).ok_or_else(|| "no such pod".into())
    }

    /// A node as its kernel holds it, in memory.
    fn simulated(&mut self, at: usize) -> Result<Sim> {
        let local = [NODE_A, NODE_B_OUTSIDE, NODE_C_OUTSIDE][at].to_vec();
        let around = HostContext::new(local);
        Ok(Sim::with_state(observe(&mut self.kernels[at])?).with_host(around))
    }
}

fn packet(proto: Proto, source: IpAddr, to: IpAddr) -> Packet {
    match proto {
        Proto::Tcp => Packet::tcp(source, FROM_PORT, to, PORT),
        Proto::Udp => Packet::udp(source, FROM_PORT, to, PORT),
    }
}

/// A scenario's line, or what was wrong with it.
fn run(scenario: &Scenario) -> Result<(String, usize)> {
    let lab = Lab::new()?;
    let mut world = World::new(&lab)?;
    (scenario.run)(&mut world)?;
    if let Some(wrong) = world.wrong.first() {
        return Err(wrong.clone().into());
    }
    let list = |ends: &BTreeSet<End>| {
        let ends: Vec<String> = ends.iter().map(ToString::to_string).collect();
        ends.join(", ")
    };
    let Scenario { id, what, .. } = scenario;
    let (real, told) = (list(&world.real), list(&world.told));
    let packets = world.packets;
    let line = format!("{id:<4} {what}: {packets} packets ended as {real}; explained as {told}");
    Ok((line, world.packets))
}

#[test]
fn explain_matches_real_packets() -> Result {
    unless_beyond("chains are not explained");
    drop(lab());
    harness::needs(&["nft", "ip", "iptables-legacy"]);
    let queue = Mutex::new(SCENARIOS.iter().enumerate());
    let done = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                loop {
                    let Some((number, scenario)) = queue.lock().unwrap().next() else { return };
                    let told = run(scenario)
                        .map_err(|error| format!("{} {}: {error}", scenario.id, scenario.what));
                    done.lock().unwrap().push((number, told));
                }
            });
        }
    });
    let mut done = done.into_inner().unwrap();
    done.sort_by_key(|(number, _)| *number);
    let wrong: Vec<&String> = done.iter().filter_map(|(_, told)| told.as_ref().err()).collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
    let told: Vec<(String, usize)> = done.into_iter().filter_map(|(_, told)| told.ok()).collect();
    let packets: usize = told.iter().map(|(_, packets)| packets).sum();
    let mut out = io::stderr();
    for (line, _) in &told {
        writeln!(out, "{line}")?;
    }
    for (ids, why) in NOT_COVERED {
        writeln!(out, "not covered: {ids}: {why}")?;
    }
    writeln!(out, "{} scenarios, {packets} packets, 0 differences", told.len())?;
    assert_eq!(told.len(), SCENARIOS.len());
    Ok(())
}
