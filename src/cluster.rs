//! The cluster as input of a plan: this node, the other nodes, excluded prefixes and settings.

use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;

use crate::mark::MarkLayout;
use crate::state::Variant;
use crate::types::{DeviceName, MacAddr, Mark, NodeName};

/// The cluster as seen by one of its nodes.
///
/// Plain data; [`plan`](crate::plan) validates it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
#[non_exhaustive]
pub struct Cluster {
    /// The node that the plan is for; one of `nodes`.
    pub node: NodeName,
    /// All nodes, in any order.
    pub nodes: Vec<Node>,
    /// Destination prefixes that are never steered; at least one, here or in `pods`.
    ///
    /// These are the prefixes of pods, services and other internal destinations. The nodes' own
    /// addresses, link-local and multicast destinations are always added. An egress IP may lie in
    /// such a prefix, for example in the nodes' own subnet.
    #[cfg_attr(feature = "serde", serde(deserialize_with = "crate::serde_forms::nets"))]
    pub excluded: Vec<IpNet>,
    /// Prefixes of pod addresses, which are excluded destinations as well; default none.
    ///
    /// A policy whose egress IP lies in one of them is closed, and a node whose tunnel address does
    /// is left out: the address of a pod cannot be used for either. The option only finds such
    /// mistakes: without it, list these prefixes in [`excluded`](Self::excluded).
    #[cfg_attr(feature = "serde", serde(default, deserialize_with = "crate::serde_forms::nets"))]
    pub pods: Vec<IpNet>,
    /// The VXLAN tunnel between the nodes.
    #[cfg_attr(feature = "serde", serde(default))]
    pub tunnel: Tunnel,
    /// The bits of a packet's firewall mark that this crate uses.
    #[cfg_attr(feature = "serde", serde(default))]
    pub marks: MarkLayout,
    /// The first of the five consecutive priorities of routing rules, 1 to 32761; default 101.
    ///
    /// The five are: guard rules that skip the gateways' rules for packets without the mark prefix
    /// and for this node's own packets, then the gateways' rules in two halves, then the fallback
    /// rule, and with replies by the tunnel the end of all these.
    ///
    /// The default is behind the rule for local addresses, also where Cilium has moved that rule to
    /// 100, and ahead of every rule whose table has a default route.
    #[cfg_attr(feature = "serde", serde(default = "rule_priority"))]
    pub rule_priority: u32,
    /// Enables connection caching: the first packet of a connection decides for all; default off.
    ///
    /// The connection mark then has the bits of the gateway's mark, and later packets from the pod
    /// are matched by that mark alone: they cost the same however many policies there are. A change
    /// of policies applies to open connections only when
    /// [`reconcile`](crate::Reconciler::reconcile) or [`settle`](crate::Reconciler::settle) has
    /// processed them, not from the first packet after the commit. Until then they go to their old
    /// gateway, which translates or drops them.
    ///
    /// The option has no effect in a mark layout without prefix, where the connection marks of this
    /// crate cannot be told from those of other programs, and with iptables. It cannot be combined
    /// with [`policy_counters`](Self::policy_counters).
    #[cfg_attr(feature = "serde", serde(default))]
    pub connection_caching: bool,
    /// Enables packet and byte counters for each policy; default off.
    ///
    /// Counting costs every steered packet a lookup. A node counts the packets of its own pods:
    /// those of connections that the pods opened, in the original direction and with ICMP errors
    /// about replies, whatever becomes of the packets. Packets that are dropped because the policy
    /// is closed are counted; packets that are dropped before a policy is looked up are not. A
    /// packet is what the kernel handles as one, which may be several segments merged by GRO, and
    /// its bytes are those from the IP header on.
    ///
    /// [`Reconciler::counters`](crate::Reconciler::counters) reads the counters. They continue over
    /// changes of the policy, moves and restarts, and end with the policy or with its last source
    /// of the family. All of them end when everything is removed, or when this option is switched
    /// off.
    ///
    /// The option cannot be combined with [`connection_caching`](Self::connection_caching), where
    /// most packets match no policy and some policies would count everything and others hardly
    /// anything, nor with iptables, where not every policy has a rule of its own. It needs Linux
    /// 5.7.
    #[cfg_attr(feature = "serde", serde(default))]
    pub policy_counters: bool,
    /// The firewall in which packets are marked and translated; default nf_tables.
    #[cfg_attr(feature = "serde", serde(default))]
    pub backend: Backend,
    /// The steering of marked packets to their gateway; default a routing table for each gateway.
    #[cfg_attr(feature = "serde", serde(default))]
    pub steering: Steering,
    /// The path of replies from the gateway to the pod's node; default the host's own routes.
    #[cfg_attr(feature = "serde", serde(default))]
    pub replies: Replies,
    /// Egress IPs that a node adds to an interface while it is their gateway; default none.
    ///
    /// An egress IP in no prefix of the list is the caller's: on an interface, routed to the node,
    /// or assigned by a cloud.
    #[cfg_attr(feature = "serde", serde(default))]
    pub claims: Vec<Claim>,
}

/// A prefix of egress IPs, and the interface to which their gateway adds them.
///
/// The gateway of a policy asks the network for the egress IP for [`PROBE_TIME`](Self::PROBE_TIME),
/// adds it, and announces it by gratuitous ARP or an unsolicited neighbour advertisement. It deletes
/// the egress IP with the last policy that uses it. If a host replies, the operation is refused with
/// the MAC address of that host; everything else of the call is in force.
///
/// The address does not change which source the node's own packets have: it is an IPv4 address of
/// scope `host` with prefix length 32, or a deprecated IPv6 address. It has this crate's protocol
/// number, by which it is found again after a restart: Linux 5.18. Announcements need `CAP_NET_RAW`.
///
/// A caller that moves an egress IP calls the old gateway first and the new one after that. An
/// address that another program has added is not touched: the operation is refused. Of several
/// prefixes with an egress IP the longest counts.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
#[non_exhaustive]
pub struct Claim {
    /// The egress IPs, without host bits.
    #[cfg_attr(feature = "serde", serde(deserialize_with = "crate::serde_forms::net"))]
    pub net: IpNet,
    /// The interface, which reaches the network of the egress IPs; not that of the tunnel.
    pub device: DeviceName,
}

impl Claim {
    /// Time for which the network is asked for an address before it is added.
    pub const PROBE_TIME: Duration = Duration::from_millis(400);

    /// Creates a claim of the egress IPs in a prefix on an interface.
    pub const fn new(net: IpNet, device: DeviceName) -> Self {
        Self { net, device }
    }
}

/// The path of replies from the gateway to the node of the pod.
///
/// All nodes should have the same setting, but a node accepts either path, so that the setting can
/// be changed node by node without losing connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "lowercase"))]
#[non_exhaustive]
pub enum Replies {
    /// The gateway routes replies to the pod by its own routes, with the server's address as source.
    ///
    /// The network between the nodes must accept such packets. If the node of the pod has forgotten
    /// a connection that the gateway still knows, and the server sends first, the answers of the pod
    /// leave with the pod's address.
    #[default]
    Direct,
    /// The gateway sends replies through the tunnel to the node from which the connection came.
    ///
    /// The connection mark holds that node, so that no address of a pod is looked up, and a pod that
    /// moves to another node takes its connections along. A node that has forgotten a connection
    /// sends the answers of its pod back to the gateway from which the server's packet came.
    ///
    /// A gateway needs a mark for each other node, and with [`Steering::Tables`] a routing table
    /// too: for more nodes than tables choose [`Steering::EgressHook`]. The option needs a mark
    /// layout with a prefix, and nf_tables as backend.
    Tunnel,
}

/// The mechanism that routes a marked packet to its gateway.
///
/// Both mechanisms fail closed when an object is lost, and a node may change from one to the other
/// without losing packets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
#[non_exhaustive]
pub enum Steering {
    /// A routing rule and a routing table for each gateway, so that tables limit the gateways.
    ///
    /// The kernel evaluates the rules in turn, twice for each packet.
    #[default]
    Tables,
    /// One routing rule and one table for all gateways, so that only marks limit the gateways.
    ///
    /// A chain at the egress hook of the tunnel interface looks up the MAC address of a mark's
    /// gateway. This needs a kernel with `CONFIG_NETFILTER_EGRESS` (Linux 5.16), which
    /// [`Preflight`](crate::preflight::Preflight) checks, a mark layout with a prefix, and
    /// nf_tables as backend. Packets keep their mark through postrouting. The tunnel addresses of
    /// other nodes have no neighbour entries on this node, so that its own packets do not reach
    /// them.
    EgressHook,
}

/// The packet filter that marks and translates packets on a node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "lowercase"))]
#[non_exhaustive]
pub enum Backend {
    /// A separate nf_tables table.
    #[default]
    Nftables,
    /// Chains in iptables that look up ipsets, for nodes on which other software uses iptables too.
    ///
    /// This backend drops less than nf_tables can where an object is lost or bypassed; see
    /// [`Iptables`].
    Iptables(Iptables),
}

/// Options of the iptables backend.
///
/// The backend has limitations that none of its rules can remove:
///
/// - Packets are classified before destination NAT. A packet to a service address outside
///   [`Cluster::excluded`] is steered by that address, and stays inside if its translated
///   destination is inside; a packet to an excluded service address is not steered, whatever its
///   translated destination is.
/// - A program translates first if it inserts a masquerade above the rules of this crate, has one
///   in the other iptables variant, or has one in its own nf_tables table. Every reconciliation
///   restores the position of the rules. A connection that was translated otherwise is dropped from
///   its second packet on.
/// - The first packets of a connection that another program translates first do leave, with the
///   address that program gave them, if they leave from the pod's own node.
/// - A program that overwrites the whole mark of a packet removes the mark of this crate, and the
///   packet leaves as if there were no policy.
/// - A reply that is in flight when its connection is ended, or when another program flushes the
///   conntrack table, may open the connection in the reverse direction. The pod's packets then
///   leave as replies to it, with the pod's own address.
/// - Each policy with a list of destinations costs every steered packet two lookups, and every
///   policy whose gateway is this node costs the first packet of each connection.
/// - Packets of the tunnel are tracked like others: one conntrack entry for each connection of the
///   pods.
/// - The mark layout cannot be changed while policies are in force:
///   [drain](crate::Reconciler::drain) the node first.
/// - Connections are not cached, with or without [`Cluster::connection_caching`].
/// - Several tables and sets do not change atomically: the order of the steps keeps them safe.
/// - There are no notifications of changes by other programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
#[non_exhaustive]
pub struct Iptables {
    /// The iptables implementation: nft or legacy.
    pub variant: Variant,
    /// Accepts packets of the tunnel where the host's firewall drops by default; default off.
    ///
    /// These are the outer packets, and the packets that enter and leave the tunnel. The option is
    /// off by default because it accepts them ahead of network policies.
    #[cfg_attr(feature = "serde", serde(default))]
    pub accept: bool,
    /// Keeps Weave Net from translating the packets of policies on the pod's own node; default off.
    ///
    /// Weave Net masquerades by its own notion of internal addresses. With this option it does not
    /// translate packets of policies, whatever interface they leave by. Packets that enter the
    /// tunnel are never translated, with or without this option.
    #[cfg_attr(feature = "serde", serde(default))]
    pub weave: bool,
}

impl Iptables {
    /// Creates the options for a variant, with all of them off.
    pub const fn new(variant: Variant) -> Self {
        Self { variant, accept: false, weave: false }
    }

    /// Accepts packets of the tunnel where the host's firewall drops by default.
    #[must_use]
    pub const fn with_accept(mut self, accept: bool) -> Self {
        self.accept = accept;
        self
    }

    /// Keeps Weave Net from translating the packets of policies on the pod's own node.
    #[must_use]
    pub const fn with_weave(mut self, weave: bool) -> Self {
        self.weave = weave;
        self
    }
}

#[cfg(feature = "serde")]
const fn rule_priority() -> u32 {
    Cluster::RULE_PRIORITY
}

impl Cluster {
    /// Default of the first priority of the routing rules.
    pub const RULE_PRIORITY: u32 = 101;

    /// Creates a cluster with the default tunnel, mark layout and rule priority.
    pub fn new(node: NodeName, nodes: Vec<Node>, excluded: Vec<IpNet>) -> Self {
        Self {
            node,
            nodes,
            excluded,
            pods: Vec::new(),
            tunnel: Tunnel::default(),
            marks: MarkLayout::SEED,
            rule_priority: Self::RULE_PRIORITY,
            connection_caching: false,
            policy_counters: false,
            backend: Backend::default(),
            steering: Steering::default(),
            replies: Replies::default(),
            claims: Vec::new(),
        }
    }

    /// Sets the prefixes of pod addresses.
    #[must_use]
    pub fn with_pods(mut self, pods: Vec<IpNet>) -> Self {
        self.pods = pods;
        self
    }

    /// Sets the VXLAN tunnel between the nodes.
    #[must_use]
    pub fn with_tunnel(mut self, tunnel: Tunnel) -> Self {
        self.tunnel = tunnel;
        self
    }

    /// Sets the bits of a packet's firewall mark that this crate uses.
    #[must_use]
    pub const fn with_marks(mut self, marks: MarkLayout) -> Self {
        self.marks = marks;
        self
    }

    /// Sets the first of the five priorities of routing rules, 1 to 32761.
    #[must_use]
    pub const fn with_rule_priority(mut self, rule_priority: u32) -> Self {
        self.rule_priority = rule_priority;
        self
    }

    /// Enables connection caching.
    #[must_use]
    pub const fn with_connection_caching(mut self, connection_caching: bool) -> Self {
        self.connection_caching = connection_caching;
        self
    }

    /// Enables packet and byte counters for each policy.
    #[must_use]
    pub const fn with_policy_counters(mut self, policy_counters: bool) -> Self {
        self.policy_counters = policy_counters;
        self
    }

    /// Sets the firewall in which packets are marked and translated.
    #[must_use]
    pub const fn with_backend(mut self, backend: Backend) -> Self {
        self.backend = backend;
        self
    }

    /// Sets the steering of marked packets to their gateway.
    #[must_use]
    pub const fn with_steering(mut self, steering: Steering) -> Self {
        self.steering = steering;
        self
    }

    /// Sets the path of replies from the gateway to the node of the pod.
    #[must_use]
    pub const fn with_replies(mut self, replies: Replies) -> Self {
        self.replies = replies;
        self
    }

    /// Sets the egress IPs that a node adds to an interface while it is their gateway.
    #[must_use]
    pub fn with_claims(mut self, claims: Vec<Claim>) -> Self {
        self.claims = claims;
        self
    }

    /// Returns the claim of an egress IP: of several, the one with the longest prefix.
    pub(crate) fn claim_of(&self, address: IpAddr) -> Option<&Claim> {
        let around = self.claims.iter().filter(|claim| claim.net.contains(&address));
        around.max_by_key(|claim| claim.net.prefix_len())
    }
}

/// Priorities of our routing rules.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RulePriorities {
    /// Priority of the guard rules, which skip the gateways' rules; only in layouts with a prefix.
    ///
    /// They skip for packets without our mark prefix, for this node's own packets, and for lookups
    /// of the reverse path to a sender. There are three such rules: no packet matches two of them,
    /// and all have the same target, so that their order has no effect.
    pub(crate) guard: u32,
    /// Priority of the rules that send packets with a gateway's mark to the gateway's table.
    pub(crate) gateways: u32,
    /// Priority of the gateways' rules for marks with the [`MarkLayout::half`] bit.
    ///
    /// A rule at `gateways` skips to it, so that a packet is matched against half of the gateways
    /// only.
    pub(crate) half: u32,
    /// Priority of the fallback rule; only in layouts with a prefix.
    ///
    /// Packets with our prefix that matched no gateway's rule fail closed there.
    pub(crate) closing: u32,
    /// Priority of a rule that matches no packet, to which other rules skip the fallback rule; only
    /// with replies by the tunnel.
    pub(crate) end: u32,
}

impl RulePriorities {
    /// The highest value of the first priority: 32766 is the kernel's rule for the main table.
    pub(crate) const LAST: u32 = 32_761;

    pub(crate) const fn of(cluster: &Cluster) -> Self {
        let first = cluster.rule_priority;
        Self {
            guard: first,
            gateways: first.saturating_add(1),
            half: first.saturating_add(2),
            closing: first.saturating_add(3),
            end: first.saturating_add(4),
        }
    }
}

/// A node of the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
#[non_exhaustive]
pub struct Node {
    /// Name of the node.
    pub name: NodeName,
    /// Addresses on the underlay network that carries the tunnel, at most one per family.
    pub underlay: Vec<IpAddr>,
    /// Addresses inside the tunnel, at most one per family, with the tunnel's prefix length.
    #[cfg_attr(feature = "serde", serde(deserialize_with = "crate::serde_forms::nets"))]
    pub tunnel: Vec<IpNet>,
    /// MAC address of the node's tunnel interface; derived from the node's name if `None`.
    #[cfg_attr(feature = "serde", serde(default))]
    pub mac: Option<MacAddr>,
    /// Firewall mark of traffic to this node as a gateway; allocated if `None`.
    #[cfg_attr(feature = "serde", serde(default))]
    pub mark: Option<Mark>,
}

impl Node {
    /// Creates a node whose MAC address is derived and whose mark is allocated.
    pub const fn new(name: NodeName, underlay: Vec<IpAddr>, tunnel: Vec<IpNet>) -> Self {
        Self { name, underlay, tunnel, mac: None, mark: None }
    }

    /// Sets the MAC address of the node's tunnel interface; derived from the name if `None`.
    #[must_use]
    pub fn with_mac(mut self, mac: impl Into<Option<MacAddr>>) -> Self {
        self.mac = mac.into();
        self
    }

    /// Sets the firewall mark of traffic to this node as a gateway; allocated if `None`.
    #[must_use]
    pub fn with_mark(mut self, mark: impl Into<Option<Mark>>) -> Self {
        self.mark = mark.into();
        self
    }

    /// Returns the MAC address of the node's tunnel interface.
    pub fn mac(&self) -> MacAddr {
        self.mac.unwrap_or_else(|| MacAddr::of_node(&self.name))
    }
}

/// The VXLAN tunnel between the nodes.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
#[non_exhaustive]
pub struct Tunnel {
    /// Name of the VXLAN device; default `egress.vxlan`.
    pub device: DeviceName,
    /// VXLAN network identifier, 1 to 2²⁴ − 1; default 100.
    pub vni: u32,
    /// UDP destination port; default 7789.
    pub port: u16,
    /// Interface that carries the outer packets on this node; if it is deleted, so is the tunnel.
    pub underlay_device: Option<DeviceName>,
    /// Drops tunnel packets that leave or arrive by another interface than the underlay device;
    /// default off.
    ///
    /// With an underlay device that encrypts, such as a WireGuard interface, no packet of a pod is
    /// sent in the clear: neither while the interface is down, when the route to a node may be one by
    /// another interface, nor while it is created again. The option needs `underlay_device`, and
    /// nf_tables as backend.
    pub underlay_only: bool,
    /// Smallest MTU of the underlay among all nodes, in bytes; default 1500.
    ///
    /// The MTU of the tunnel interface follows from it and should be the same on every node: an
    /// outer packet that is larger than the MTU of a switch or of the receiving interface is lost
    /// without an ICMP error.
    pub underlay_mtu: u32,
    /// Lowers the MSS of TCP connections to what the tunnel carries; default off.
    ///
    /// Without the option, a sender learns from ICMP errors that the tunnel carries less than its own
    /// link. With the option, no such error is needed: set it if a firewall drops them. The MSS is
    /// the MTU of the tunnel minus 40 bytes over IPv4 and 60 over IPv6, as in RFC 9293 section 3.7.1.
    /// The node of the pod lowers it in segments with the SYN flag that it sends to the pod. With
    /// [`Replies::Tunnel`], both nodes lower it in those that they send by the tunnel, too: a
    /// connection that is opened while nodes change to that path may have the larger MSS in one
    /// direction. A smaller MSS stays.
    pub clamp_mss: bool,
}

impl Default for Tunnel {
    fn default() -> Self {
        Self {
            device: DeviceName::known("egress.vxlan"),
            vni: 100,
            port: 7789,
            underlay_device: None,
            underlay_only: false,
            underlay_mtu: 1500,
            clamp_mss: false,
        }
    }
}

impl Tunnel {
    /// Sets the name of the VXLAN device.
    #[must_use]
    pub fn with_device(mut self, device: DeviceName) -> Self {
        self.device = device;
        self
    }

    /// Sets the VXLAN network identifier, 1 to 2²⁴ − 1.
    #[must_use]
    pub const fn with_vni(mut self, vni: u32) -> Self {
        self.vni = vni;
        self
    }

    /// Sets the UDP destination port.
    #[must_use]
    pub const fn with_port(mut self, port: u16) -> Self {
        self.port = port;
        self
    }

    /// Sets the interface that carries the outer packets on this node.
    #[must_use]
    pub fn with_underlay_device(mut self, underlay_device: impl Into<Option<DeviceName>>) -> Self {
        self.underlay_device = underlay_device.into();
        self
    }

    /// Drops tunnel packets that leave or arrive by another interface than the underlay device.
    #[must_use]
    pub const fn with_underlay_only(mut self, underlay_only: bool) -> Self {
        self.underlay_only = underlay_only;
        self
    }

    /// Returns the interface by which all tunnel packets leave and arrive, if there is but one.
    pub(crate) const fn only_underlay(&self) -> Option<&DeviceName> {
        if self.underlay_only { self.underlay_device.as_ref() } else { None }
    }

    /// Sets the smallest MTU of the underlay among all nodes, in bytes.
    #[must_use]
    pub const fn with_underlay_mtu(mut self, underlay_mtu: u32) -> Self {
        self.underlay_mtu = underlay_mtu;
        self
    }

    /// Lowers the MSS of TCP connections to what the tunnel carries.
    #[must_use]
    pub const fn with_clamp_mss(mut self, clamp_mss: bool) -> Self {
        self.clamp_mss = clamp_mss;
        self
    }
}
