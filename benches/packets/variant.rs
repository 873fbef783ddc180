//! A path, what goes along it, and how long that takes.

use std::fmt;
use std::net::Ipv4Addr;
use std::rc::Rc;
use std::time::{Duration, Instant};

use egress_datapath::state::Variant as Tables;
use egress_datapath::{Family, Replies, Steering};

use crate::frame::{self, Flow};
use crate::path::{End, Path};
use crate::{Result, iptables, ours, seed};

/// Packets that are timed together: few, so that most of the batches are not interrupted.
const BATCH: u16 = 16;
/// Packets that are looked at together: their receiver has room for them.
const GLANCE: usize = 64;
/// Flows that take turns.
const FLOWS: u32 = 1024;
/// Turns of the flows in a round: the first one is cold.
const TURNS: usize = 8;
/// The end of a turn, unless its time is up before; and what there is at least.
const ENOUGH: u64 = FLOWS as u64;
const LEAST: u64 = 3 * BATCH as u64;
/// Packets of the kernel's own that a receiver may see in a round.
const STRAY: u64 = 8;

/// Policies of a client that steers by the egress hook, and static routes beside them: as many as
/// there are gateways at most.
const HOOKED: u32 = 1_000;

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The sender alone: the router takes the packets for somebody else's.
    Sending,
    /// The kernel forwards, and that is all.
    Plain,
    /// It tracks connections.
    Conntrack,
    /// It tracks connections, and a static route leads into the VXLAN.
    Bound,
    /// The same with routes of their own for the destinations of 1 000 policies.
    Spread { gateways: u32 },
    /// The least that steers by a mark.
    Least,
    /// As this crate programs a client; packets of selected pods or of others.
    Ours { policies: u32, gateways: u32, selected: bool, caching: bool },
    /// As this crate programs a client of 1 000 policies that steers by the egress hook.
    Hook { gateways: u32, selected: bool },
    /// As the origin does.
    Seed { policies: u32, selected: bool },
    /// As this crate programs a client with iptables, for policies that take every destination.
    Iptables { policies: u32, variant: Tables, selected: bool },
    /// As this crate programs a client of one policy, with replies by the tunnel.
    Replies { selected: bool },
    /// As this crate programs a gateway: out of the tunnel, each packet of a new connection.
    Gateway { policies: u32 },
    /// The same of connections that are established, or their replies.
    Established { replies: Replies, back: bool },
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let which = |selected| if selected { "steered" } else { "unselected" };
        let ies = |count| if count == 1 { "y" } else { "ies" };
        match *self {
            Self::Sending => f.write_str("sending alone"),
            Self::Plain => f.write_str("no rules"),
            Self::Conntrack => f.write_str("conntrack alone"),
            Self::Bound => f.write_str("static route into the VXLAN, conntrack"),
            Self::Spread { gateways } => {
                let ays = if gateways == 1 { "" } else { "s" };
                write!(f, "{HOOKED} static routes into it, {gateways} gateway{ays}")
            }
            Self::Least => f.write_str("the least that steers by a mark"),
            Self::Ours { policies, gateways: 1, selected, caching } => {
                let cached = if caching { ", cached" } else { "" };
                write!(f, "{}, {policies} polic{}{cached}", which(selected), ies(policies))
            }
            Self::Ours { policies, gateways, selected, .. } => {
                write!(f, "{}, {policies} policies, {gateways} gateways", which(selected))
            }
            Self::Hook { gateways, selected } => {
                let ays = if gateways == 1 { "" } else { "s" };
                write!(f, "{}, egress hook, {HOOKED} policies, ", which(selected))?;
                write!(f, "{gateways} gateway{ays}")
            }
            Self::Seed { policies, selected } => {
                write!(f, "origin {}, {policies} polic{}", which(selected), ies(policies))
            }
            Self::Iptables { policies, variant, selected } => {
                let name = variant.command(Family::V4);
                write!(f, "{name} {}, {policies} policies for everything", which(selected))
            }
            Self::Gateway { policies } => {
                write!(f, "gateway, new connections, {policies} policies")
            }
            Self::Replies { selected } => {
                write!(f, "{}, 1 policy, replies by the tunnel", which(selected))
            }
            Self::Established { replies, back } => {
                let which = if back { "replies" } else { "packets" };
                let by = if replies == Replies::Tunnel { "by the tunnel" } else { "direct" };
                write!(f, "gateway, {which} of established connections, replies {by}")
            }
        }
    }
}

/// One of the things to be measured.
pub(crate) struct Variant {
    pub(crate) kind: Kind,
    path: Rc<Path>,
    /// Frames that open the connections ahead of the others.
    opening: Vec<Vec<u8>>,
    frames: Vec<Vec<u8>>,
    /// What each frame is where it comes out.
    expected: Vec<Flow>,
    /// Where the ports of the flow are that a new connection has others of, and its number.
    fresh: Option<(usize, u32)>,
    next: usize,
    /// Nanoseconds of a packet: the least of the medians so far.
    pub(crate) best: Cost,
}

/// Nanoseconds of a packet.
#[derive(Clone, Copy)]
pub(crate) struct Cost {
    /// Behind others of the same variant: the flows' own packets have just been there.
    pub(crate) warm: f64,
    /// Behind those of all other variants, which have left their own in the processor's caches.
    pub(crate) cold: f64,
}

impl Cost {
    const UNKNOWN: Self = Self { warm: f64::INFINITY, cold: f64::INFINITY };
}

/// A pod of some policy and somebody whom it may talk to.
fn flow(number: u32, policies: u32) -> Flow {
    // Any order that is not that of the elements.
    let scattered = number.wrapping_mul(0x9e37_79b1);
    let (policy, pod) = (scattered % policies, scattered >> 16);
    let host = ours::destination(policy).network().to_bits() + 1 + number % 250;
    Flow {
        source: ours::pod(policy * ours::SOURCES + pod % ours::SOURCES),
        destination: Ipv4Addr::from_bits(host),
        ports: (u16::try_from(10_000 + number).unwrap_or_default(), 443),
    }
}

/// The flow of a pod that nobody selects.
fn other(flow: Flow) -> Flow {
    Flow { source: Ipv4Addr::from_bits(flow.source.to_bits() | 1 << 21), ..flow }
}

impl Variant {
    pub(crate) fn sending() -> Result<Self> {
        let mut variant = Self::forwarded(Kind::Sending, Rc::new(Path::new()?), flows(1));
        for byte in variant.frames.iter_mut().filter_map(|frame| frame.get_mut(5)) {
            *byte = !*byte;
        }
        variant.expected.clear();
        Ok(variant)
    }

    pub(crate) fn plain() -> Result<Self> {
        Ok(Self::forwarded(Kind::Plain, Rc::new(Path::new()?), flows(1)))
    }

    pub(crate) fn conntrack() -> Result<Self> {
        let path = Path::new()?;
        seed::track(&path)?;
        Ok(Self::forwarded(Kind::Conntrack, Rc::new(path), flows(1)))
    }

    pub(crate) fn bound() -> Result<Self> {
        let path = Path::new()?;
        seed::track(&path)?;
        seed::route(&path, "main")?;
        Ok(Self::forwarded(Kind::Bound, Rc::new(path), flows(1)))
    }

    pub(crate) fn spread(gateways: u32) -> Result<Self> {
        let path = Path::new()?;
        seed::track(&path)?;
        seed::spread(&path, HOOKED, gateways)?;
        Ok(Self::forwarded(Kind::Spread { gateways }, Rc::new(path), flows(HOOKED)))
    }

    pub(crate) fn least() -> Result<Self> {
        let path = Path::new()?;
        seed::track(&path)?;
        seed::least(&path)?;
        Ok(Self::forwarded(Kind::Least, Rc::new(path), flows(1)))
    }

    /// The same router twice: for selected pods and for others.
    pub(crate) fn ours(policies: u32, gateways: u32, caching: bool) -> Result<[Self; 2]> {
        let path = Path::new()?;
        ours::program(&path, policies, gateways, |cluster| cluster.connection_caching = caching)?;
        let kind = |selected| Kind::Ours { policies, gateways, selected, caching };
        Ok(Self::both(Rc::new(path), policies, kind))
    }

    pub(crate) fn hook(gateways: u32) -> Result<[Self; 2]> {
        let path = Path::new()?;
        ours::program(&path, HOOKED, gateways, |cluster| cluster.steering = Steering::EgressHook)?;
        Ok(Self::both(Rc::new(path), HOOKED, |selected| Kind::Hook { gateways, selected }))
    }

    pub(crate) fn seed(policies: u32) -> Result<[Self; 2]> {
        let path = Path::new()?;
        seed::program(&path, policies)?;
        let kind = |selected| Kind::Seed { policies, selected };
        Ok(Self::both(Rc::new(path), policies, kind))
    }

    pub(crate) fn iptables(policies: u32, variant: Tables) -> Result<[Self; 2]> {
        let path = Path::new()?;
        iptables::program(&path, policies, variant)?;
        let kind = |selected| Kind::Iptables { policies, variant, selected };
        Ok(Self::both(Rc::new(path), policies, kind))
    }

    fn both(path: Rc<Path>, policies: u32, kind: impl Fn(bool) -> Kind) -> [Self; 2] {
        let others = flows(policies).into_iter().map(other).collect();
        [
            Self::forwarded(kind(true), Rc::clone(&path), flows(policies)),
            Self::forwarded(kind(false), path, others),
        ]
    }

    fn forwarded(kind: Kind, path: Rc<Path>, flows: Vec<Flow>) -> Self {
        let frames = flows.iter().map(|flow| frame::udp(path.there.peer, *flow)).collect();
        Self {
            kind,
            path,
            opening: Vec::new(),
            frames,
            expected: flows,
            fresh: None,
            next: 0,
            best: Cost::UNKNOWN,
        }
    }

    /// A client of one policy with replies by the tunnel.
    pub(crate) fn replies() -> Result<[Self; 2]> {
        let path = Path::new()?;
        ours::program(&path, 1, 1, |cluster| cluster.replies = Replies::Tunnel)?;
        Ok(Self::both(Rc::new(path), 1, |selected| Kind::Replies { selected }))
    }

    pub(crate) fn gateway(policies: u32) -> Result<Self> {
        let path = Path::new()?;
        ours::program(&path, policies, 0, |_| {})?;
        let variant = Self::out_of_tunnel(Kind::Gateway { policies }, Rc::new(path), policies)?;
        Ok(Self { fresh: Some((frame::OUTER + frame::PORTS, 0)), ..variant })
    }

    /// The same gateway twice: for packets of established connections, and for their replies.
    pub(crate) fn established(policies: u32, replies: Replies) -> Result<[Self; 2]> {
        let path = Path::new()?;
        ours::program(&path, policies, 0, |cluster| cluster.replies = replies)?;
        let path = Rc::new(path);
        let kind = |back| Kind::Established { replies, back };
        let there = Self::out_of_tunnel(kind(false), Rc::clone(&path), policies)?;
        let answer = |flow: &Flow| frame::udp(path.back.peer, flow.back());
        let frames = there.expected.iter().map(answer).collect();
        let expected = flows(policies).into_iter().map(Flow::back).collect();
        let opening = there.frames.clone();
        let (kind, path) = (kind(true), Rc::clone(&path));
        let (fresh, best) = (None, Cost::UNKNOWN);
        let back = Self { kind, path, opening, frames, expected, fresh, next: 0, best };
        Ok([there, back])
    }

    fn out_of_tunnel(kind: Kind, path: Rc<Path>, policies: u32) -> Result<Self> {
        let nodes =
            Flow { source: ours::gateway(0), destination: crate::path::NODE, ports: (50_000, 0) };
        let cluster = ours::cluster(1)?;
        let mut macs = cluster.nodes.iter().map(|node| node.mac().octets());
        let (device, peer) = macs.next().zip(macs.next()).ok_or("two nodes")?;
        let flows = flows(policies);
        let frame = |flow: &Flow| {
            let inner = frame::udp_from(peer, device, *flow);
            frame::vxlan(path.there.peer, nodes, &inner)
        };
        let frames = flows.iter().map(frame).collect();
        let worn = |flow: Flow| {
            let policy =
                (flow.destination.to_bits() - ours::destination(0).network().to_bits()) >> 8;
            Flow { source: ours::egress_ip(policy), ..flow }
        };
        let expected = flows.into_iter().map(worn).collect();
        let (opening, fresh, best) = (Vec::new(), None, Cost::UNKNOWN);
        Ok(Self { kind, path, opening, frames, expected, fresh, next: 0, best })
    }

    const fn is_back(&self) -> bool {
        matches!(self.kind, Kind::Established { back: true, .. })
    }

    /// Where frames are put in.
    fn port(&self) -> &crate::port::Port {
        if self.is_back() { &self.path.back } else { &self.path.there }
    }

    /// Where they come out.
    const fn end(&self) -> End {
        match self.kind {
            Kind::Established { back: true, replies: Replies::Direct } => End::Sender,
            _ => End::Receiver,
        }
    }

    /// Whether packets are seen inside a VXLAN packet to one of the gateways.
    fn tunnelled(&self) -> Option<u32> {
        match self.kind {
            Kind::Bound
            | Kind::Least
            | Kind::Seed { selected: true, .. }
            | Kind::Iptables { selected: true, .. }
            | Kind::Replies { selected: true }
            | Kind::Established { back: true, replies: Replies::Tunnel } => Some(1),
            Kind::Spread { gateways }
            | Kind::Ours { gateways, selected: true, .. }
            | Kind::Hook { gateways, selected: true } => Some(gateways),
            _ => None,
        }
    }

    /// Sends a packet of every flow and looks at what comes out; then every flow gets an answer.
    pub(crate) fn verify(&self) -> Result {
        for frame in &self.opening {
            self.path.there.send(frame)?;
        }
        for (frames, flows) in self.frames.chunks(GLANCE).zip(self.expected.chunks(GLANCE)) {
            let tap = self.path.tap(self.end())?;
            for frame in frames {
                self.port().send(frame)?;
            }
            let seen = tap.frames()?;
            for flow in flows {
                let arrived = seen.iter().any(|frame| self.is(frame, *flow));
                if !arrived {
                    let sentence = format!("{}: {flow:?} does not arrive as it should", self.kind);
                    return Err(sentence.into());
                }
            }
        }
        for flow in self.expected.iter().filter(|_| !self.is_back()) {
            self.path.back.send(&frame::udp(self.path.back.peer, flow.back()))?;
        }
        Ok(())
    }

    fn is(&self, frame: &[u8], flow: Flow) -> bool {
        match self.tunnelled() {
            None => frame::flow(frame) == Some(flow),
            Some(gateways) => {
                let to = frame::flow(frame).map(|nodes| nodes.destination);
                let gateway = (0..gateways).any(|number| Some(ours::gateway(number)) == to);
                gateway && frame::inner(frame).and_then(frame::flow) == Some(flow)
            }
        }
    }

    /// A round: the flows take some turns, and the median of a turn is kept if it is the best.
    pub(crate) fn measure(&mut self, time: Duration) -> Result {
        let before = self.path.received(self.end())?;
        let mut sent = 0;
        for turn in 0..TURNS {
            let (packets, median) = self.turn(time)?;
            sent += packets;
            let best = if turn == 0 { &mut self.best.cold } else { &mut self.best.warm };
            *best = best.min(median);
        }
        let arrived = self.path.received(self.end())? - before;
        if self.fresh.is_some() {
            self.path.forget()?;
        }
        let due = if self.kind == Kind::Sending { 0 } else { sent };
        if !(due..=due + STRAY).contains(&arrived) {
            return Err(format!("{}: of {sent} packets {arrived} arrived", self.kind).into());
        }
        Ok(())
    }

    /// Sends until it is enough: how many packets, and the median of what they cost.
    fn turn(&mut self, time: Duration) -> Result<(u64, f64)> {
        let (begin, back) = (Instant::now(), self.is_back());
        let (mut sent, mut batches) = (0, Vec::new());
        while sent < LEAST || sent < ENOUGH && begin.elapsed() < time {
            let at = self.next;
            let end = at + usize::from(BATCH);
            self.next = end % self.frames.len();
            let frames = self.frames.get_mut(at..end).ok_or("too few flows")?;
            if let Some((at, number)) = &mut self.fresh {
                for frame in &mut *frames {
                    *number += 1;
                    frame.splice(*at..*at + 4, number.to_be_bytes());
                }
            }
            let start = Instant::now();
            let port = if back { &self.path.back } else { &self.path.there };
            for frame in frames {
                port.send(frame)?;
            }
            batches.push(start.elapsed());
            sent += u64::from(BATCH);
        }
        batches.sort_unstable();
        let median = batches.get(batches.len() / 2).ok_or("nothing was sent")?;
        Ok((sent, median.as_secs_f64() * 1e9 / f64::from(BATCH)))
    }
}

fn flows(policies: u32) -> Vec<Flow> {
    (0..FLOWS).map(|number| flow(number, policies)).collect()
}
