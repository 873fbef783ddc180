//! The path of a packet through one node, evaluated on a [`State`] as the kernel would.
//!
//! Policies are unknown here: rules, maps, routes and FDB entries are evaluated as they are,
//! whether they were planned or read from a kernel.

mod chains;
pub(crate) mod conntrack;
mod elements;
mod hook;
mod reply_block;
mod routing;
mod ruleset;
mod skb;
mod xtables;

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

use super::packet::{Frame, Packet};
use super::trace::{Decision, Fate, Reason};
use crate::count::Counts;
use crate::state::{Hook, Rule, State, Vxlan};
use crate::types::{DeviceName, Family, MacAddr};

use conntrack::{Conntrack, Seen};
use hook::DESTINATION_NAT;
use routing::Routed;
use ruleset::{End, Nat};
use skb::{Skb, Tracking};

/// Addresses of a simulated host, beside the objects of this crate.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct HostContext {
    /// Addresses of the node: packets to them are delivered, not forwarded.
    pub local: Vec<IpAddr>,
    /// Source address of the node's own packets by destination; the longest prefix decides.
    pub own: Vec<(IpNet, IpAddr)>,
    /// Listening sockets of the node: protocol number, and the address and port they are bound to.
    ///
    /// An unspecified address is any address; that of IPv6 is also any of IPv4.
    pub sockets: Vec<(u8, SocketAddr)>,
}

impl HostContext {
    /// Creates a host with these addresses, whose own packets have none of them as default source.
    pub const fn new(local: Vec<IpAddr>) -> Self {
        Self { local, own: Vec::new(), sockets: Vec::new() }
    }

    /// Sets the source addresses of the node's own packets by destination.
    #[must_use]
    pub fn with_own(mut self, own: Vec<(IpNet, IpAddr)>) -> Self {
        self.own = own;
        self
    }

    /// Sets the listening sockets of the node.
    #[must_use]
    pub fn with_sockets(mut self, sockets: Vec<(u8, SocketAddr)>) -> Self {
        self.sockets = sockets;
        self
    }

    /// Wildcard flag of the socket that takes the packet: bound to no address; `None` without one.
    fn wildcard(&self, packet: &Packet) -> Option<bool> {
        let Packet { protocol, destination, destination_port, .. } = *packet;
        let takes = |bound: IpAddr| match bound {
            IpAddr::V4(any) if any.is_unspecified() => destination.is_ipv4(),
            bound => bound.is_unspecified() || bound == destination,
        };
        let found = self.sockets.iter().filter(|(of, socket)| {
            (*of, socket.port()) == (protocol, destination_port) && takes(socket.ip())
        });
        found.map(|(_, socket)| socket.ip().is_unspecified()).min()
    }

    fn own(&self, destination: IpAddr) -> Option<IpAddr> {
        let nets = self.own.iter().filter(|(net, _)| net.contains(&destination));
        nets.max_by_key(|(net, _)| net.prefix_len()).map(|(_, address)| *address)
    }
}

/// Evaluation of a packet on one node.
pub(crate) struct Walk<'a> {
    pub(crate) state: &'a State,
    pub(crate) conntrack: &'a mut Conntrack,
    pub(crate) counts: &'a mut Counts,
    pub(crate) around: &'a HostContext,
    pub(crate) reasons: Vec<Reason>,
}

/// Input of a packet: the tunnel or another interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Arrival {
    /// A pod on this node, or the network outside the tunnel.
    Wire,
    /// The tunnel, in a frame with this source MAC address.
    Tunnel(MacAddr),
}

impl Walk<'_> {
    /// Evaluates a packet from an interface other than the tunnel; returns it as forwarded.
    pub(crate) fn arrive(&mut self, packet: Packet) -> (Fate, Packet) {
        self.pass(packet, Arrival::Wire)
    }

    /// Evaluates a packet with conntrack state `INVALID`.
    pub(crate) fn arrive_invalid(&mut self, packet: Packet) -> (Fate, Packet) {
        let mut skb = Skb::new(packet, Tracking::Invalid);
        let fate = self.through(&mut skb, None, Arrival::Wire);
        (fate, skb.packet)
    }

    /// Evaluates a tunnel frame of another node.
    pub(crate) fn receive(&mut self, frame: &Frame) -> (Fate, Packet) {
        let packet = frame.packet;
        let outer = Packet::udp(frame.from, u16::MAX, frame.to, frame.port);
        let mut skb = Skb::new(outer, Tracking::fresh());
        skb.input = self.state.link.as_ref().and_then(|link| link.underlay.clone());
        if let End::Dropped = self.hook(&Hook::Input, &mut skb, false) {
            return (Fate::Dropped, packet);
        }
        let link = self.state.link.as_ref().filter(|link| link.up);
        let Some(link) = link.filter(|link| (link.vni, link.port) == (frame.vni, frame.port))
        else {
            self.say("no tunnel device takes it", Decision::Dropped);
            return (Fate::Dropped, packet);
        };
        let device = format!("{} address {}", link.name, link.mac);
        if link.mac != frame.mac {
            self.say(device, Decision::Dropped);
            return (Fate::Dropped, packet);
        }
        self.say(device, Decision::Received);
        self.pass(packet, Arrival::Tunnel(frame.source_mac))
    }

    /// The reverse path filter that drops a packet from the tunnel (`__fib_validate_source`).
    ///
    /// Unless our rules lead back into the tunnel, strict filtering drops the packet: the host's own
    /// route to the sender is not the tunnel. Without an address on the interface, loose filtering
    /// drops every packet as well. IPv6 has no such filter.
    fn filtered(&mut self, link: &Vxlan, source: IpAddr, mark: u32) -> Option<String> {
        if source.is_ipv6() || link.rp_filter == 0 {
            return None;
        }
        // The lookup is no decision about the packet.
        let said = self.reasons.len();
        let back = self.route(source, mark, None);
        self.reasons.truncate(said);
        let (name, filter) = (&link.name, link.rp_filter);
        let bare = !self.state.addresses.iter().any(|net| net.addr().is_ipv4());
        match back {
            Routed::Via(..) if !bare => None,
            Routed::Own if filter != 1 && !bare => None,
            Routed::Refused => Some(format!("{name} rp_filter {filter}, no route back")),
            _ if bare => Some(format!("{name} rp_filter {filter} without address")),
            _ => Some(format!("{name} rp_filter {filter}")),
        }
    }

    fn pass(&mut self, packet: Packet, arrival: Arrival) -> (Fate, Packet) {
        let seen = self.conntrack.see(packet);
        let mut skb = Skb::new(packet, Tracking::Seen(seen.facts()));
        let fate = self.through(&mut skb, Some(seen), arrival);
        // On a known connection a rule sets the mark immediately, and it stays if the packet is
        // dropped.
        if let Tracking::Seen(facts) = &skb.tracking {
            self.conntrack.note(&seen, facts.mark);
        }
        (fate, skb.packet)
    }

    fn through(&mut self, skb: &mut Skb, seen: Option<Seen>, arrival: Arrival) -> Fate {
        if let (Arrival::Tunnel(source), Some(link)) = (arrival, &self.state.link) {
            skb.input = Some(link.name.clone());
            skb.ethernet_source = Some(source);
        }
        let before_nat = i32::MIN..=DESTINATION_NAT;
        if let End::Dropped = self.hook_within(&Hook::Prerouting, skb, false, before_nat) {
            return Fate::Dropped;
        }
        if let Some(seen) = &seen {
            seen.translate_back(&mut skb.packet);
        }
        skb.local = self.around.local.contains(&skb.packet.destination);
        let behind_nat = DESTINATION_NAT + 1..=i32::MAX;
        if let End::Dropped = self.hook_within(&Hook::Prerouting, skb, false, behind_nat) {
            return Fate::Dropped;
        }
        if let (Arrival::Tunnel(_), Some(link)) = (arrival, &self.state.link) {
            if let Some(filter) = self.filtered(link, skb.packet.source, skb.mark) {
                self.say(filter, Decision::Dropped);
                return Fate::Dropped;
            }
        }
        if skb.local {
            skb.wildcard = self.around.wildcard(&skb.packet);
            if let End::Dropped = self.hook(&Hook::Input, skb, false) {
                return Fate::Dropped;
            }
            self.confirm(skb, seen, None);
            return Fate::Delivered;
        }
        let input = skb.input.as_ref().map(DeviceName::as_str);
        let tunnel = match self.route(skb.packet.destination, skb.mark, input) {
            Routed::Refused => return Fate::Dropped,
            Routed::Own => None,
            Routed::Via(link, via) => {
                skb.output = Some(link.name.clone());
                Some((link, via))
            }
        };
        skb.routed = true;
        if skb.packet.destination.is_ipv4() {
            // Forwarding sets the priority from the type of service (`ip_forward`).
            skb.priority = 0;
        }
        if let End::Dropped = self.hook(&Hook::Forward, skb, false) {
            return Fate::Dropped;
        }
        let open = seen.as_ref().is_some_and(Seen::is_untranslated);
        let before = skb.packet.source;
        let mut nat = None;
        match self.hook(&Hook::Postrouting, skb, open) {
            End::Dropped => return Fate::Dropped,
            End::Accepted => {}
            End::Nat(done) => nat = Some(done),
        }
        self.confirm(skb, seen, nat);
        // The connection was translated at its first packet, not by a rule just now.
        if nat.is_none() && skb.packet.source != before {
            self.say("connection", Decision::Connection);
        }
        self.leave(skb, nat, tunnel)
    }

    /// Sends a packet through the tunnel, or by the host's own routes.
    fn leave(&mut self, skb: &mut Skb, nat: Option<Nat>, tunnel: Option<(&Vxlan, IpAddr)>) -> Fate {
        let Some((link, via)) = tunnel else {
            let unknown =
                nat == Some(Nat::Masquerade) && self.around.own(skb.packet.destination).is_none();
            return Fate::Routed((!unknown).then_some(skb.packet.source));
        };
        let Some(mac) = self.state.neighbours.get(&via).copied() else {
            self.say(format!("no neighbour {via} dev {}", link.name), Decision::Dropped);
            return Fate::Dropped;
        };
        self.say(format!("neighbour {via} dev {}", link.name), Decision::Ethernet(mac));
        skb.ethernet = Some(mac);
        if let End::Dropped = self.hook(&Hook::Egress(link.name.clone()), skb, false) {
            return Fate::Dropped;
        }
        let mac = skb.ethernet.unwrap_or(mac);
        let Some(to) = self.state.fdb.get(&mac).copied() else {
            self.say(format!("no fdb {mac} dev {}", link.name), Decision::Dropped);
            return Fate::Dropped;
        };
        self.say(format!("fdb {mac} dev {}", link.name), Decision::Tunnel(to));
        let frame = Frame {
            from: link.local,
            to,
            port: link.port,
            vni: link.vni,
            source_mac: link.mac,
            mac,
            packet: skb.packet,
        };
        if self.outer(&frame, skb.mark, &link.name) {
            Fate::Tunnelled(frame)
        } else {
            Fate::Dropped
        }
    }

    /// Whether the outer packet, which inherits the firewall mark, leaves this node.
    fn outer(&mut self, frame: &Frame, mark: u32, device: &DeviceName) -> bool {
        let outer = Packet::udp(frame.from, u16::MAX, frame.to, frame.port);
        let mut skb = Skb::new(outer, Tracking::fresh());
        skb.mark = mark;
        // Postrouting sees the VXLAN device as the input interface; it is not the output interface.
        skb.input = Some(device.clone());
        skb.output = self.state.link.as_ref().and_then(|link| link.underlay.clone());
        match self.route(frame.to, mark, Some(Rule::LOOPBACK)) {
            Routed::Own => {}
            Routed::Refused => return false,
            Routed::Via(..) => {
                self.say("the route to the tunnel leads through the tunnel", Decision::Dropped);
                return false;
            }
        }
        skb.routed = true;
        [Hook::Output, Hook::Postrouting]
            .into_iter()
            .all(|hook| self.hook(&hook, &mut skb, true) != End::Dropped)
    }

    /// Confirms the conntrack entry of the connection, and translates the packet's source.
    fn confirm(&mut self, skb: &mut Skb, seen: Option<Seen>, nat: Option<Nat>) {
        let Some(mut seen) = seen else { return };
        if let Tracking::Seen(facts) = &skb.tracking {
            seen.set_mark(facts.mark);
        }
        let source = match nat {
            Some(Nat::To(address)) => Some(address),
            Some(Nat::Masquerade) => self.around.own(skb.packet.destination),
            Some(Nat::Bound) | None => None,
        };
        self.conntrack.confirm(&mut seen, source);
        seen.translate(&mut skb.packet);
    }

    fn family(packet: Packet) -> Family {
        Family::of(packet.source)
    }

    fn say(&mut self, object: impl Into<String>, decision: Decision) {
        self.reasons.push(Reason { node: None, object: object.into(), decision });
    }
}
