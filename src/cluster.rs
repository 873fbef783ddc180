//! The world a plan is made for: this node, the other nodes, and what stays inside.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::mark::MarkLayout;
use crate::state::Variant;
use crate::types::{DeviceName, MacAddr, Mark, NodeName};

/// The cluster as one of its nodes sees it.
///
/// Plain data; [`plan`](crate::plan) checks it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct Cluster {
    /// The node that is planned for; one of `nodes`.
    pub node: NodeName,
    /// All nodes, in any order.
    pub nodes: Vec<Node>,
    /// Prefixes that are never steered: pods, services, whatever else is inside. At least one.
    ///
    /// The nodes' own addresses, link-local and multicast destinations are always added.
    #[cfg_attr(feature = "serde", serde(deserialize_with = "crate::serde_forms::nets"))]
    pub excluded: Vec<IpNet>,
    /// The tunnel between the nodes.
    #[cfg_attr(feature = "serde", serde(default))]
    pub tunnel: Tunnel,
    /// Which bits of a packet's mark are ours.
    #[cfg_attr(feature = "serde", serde(default))]
    pub marks: MarkLayout,
    /// The first of the four priorities of our routing rules, 1 to 32762: guards that lead packets
    /// without our prefix and this node's own past the gateways, then the gateways' rules in two
    /// halves, then the closing one.
    ///
    /// Default 101: behind the rule for local addresses, also where Cilium has moved it to 100,
    /// and ahead of everything that has a default route.
    #[cfg_attr(feature = "serde", serde(default = "rule_priority"))]
    pub rule_priority: u32,
    /// Whether the first packet of a connection decides for all of them; default no.
    ///
    /// The connection's mark then has the bits of its gateway's, and later packets from the pod are
    /// asked for nothing else: they cost the same however many policies there are. A change
    /// of policies takes hold of open connections when [`reconcile`](crate::Reconciler::reconcile)
    /// or [`settle`](crate::Reconciler::settle) has looked them through, not with the first packet
    /// behind it; until then they go on to their old gateway, which translates or drops them.
    ///
    /// Nothing comes of it in a layout without prefix, where the marks of connections cannot be
    /// told from other people's, and with iptables. It cannot be had together with
    /// [`policy_counters`](Self::policy_counters).
    #[cfg_attr(feature = "serde", serde(default))]
    pub connection_caching: bool,
    /// Whether packets and bytes are counted for each policy; default no, because it costs every
    /// steered packet a look-up.
    ///
    /// A node counts the packets of its own pods: those of connections that the pods opened, in
    /// that direction and with ICMP errors about answers, whatever becomes of them. What is
    /// dropped because the policy is closed counts, too; what is dropped because no policy has
    /// been asked does not. A packet is what the kernel handles as one, which may be several
    /// segments put together (GRO), and its bytes are those of IP.
    ///
    /// [`Reconciler::counts`](crate::Reconciler::counts) reads them. They go on over changes of the
    /// policy, moves and restarts, and end with the policy, or with its last source of the family;
    /// those of all end when everything is removed, or when this is switched off.
    ///
    /// It cannot be had together with [`connection_caching`](Self::connection_caching), where most
    /// packets come by no policy and some policies would count everything and others hardly
    /// anything, nor with iptables, where a policy is no rule of its own. It needs Linux 5.7.
    #[cfg_attr(feature = "serde", serde(default))]
    pub policy_counters: bool,
    /// Where packets are marked and translated; default nf_tables.
    #[cfg_attr(feature = "serde", serde(default))]
    pub backend: Backend,
    /// How a marked packet finds its gateway; default by a routing table for each.
    #[cfg_attr(feature = "serde", serde(default))]
    pub steering: Steering,
}

/// What leads a marked packet to its gateway.
///
/// Both close when something is lost, and a node may change from one to the other while packets
/// flow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
#[non_exhaustive]
pub enum Steering {
    /// A routing rule and a table for each gateway, as many gateways as there are tables.
    ///
    /// The kernel asks the rules in turn, twice for each packet.
    #[default]
    Tables,
    /// One rule and one table for all gateways, as many as there are marks: a chain at the egress
    /// hook of the tunnel device looks up the Ethernet address of a mark's gateway.
    ///
    /// It needs a kernel with `CONFIG_NETFILTER_EGRESS` (Linux 5.16), which
    /// [`Preflight`](crate::preflight::Preflight) looks for, a layout of marks with a prefix, and
    /// nf_tables as backend. Packets keep their mark through postrouting. The tunnel addresses of
    /// other nodes are no neighbours of this one, so that its own packets do not get there.
    EgressHook,
}

/// What marks and translates packets on a node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "lowercase"))]
#[non_exhaustive]
pub enum Backend {
    /// A table of nf_tables of its own.
    #[default]
    Nftables,
    /// Chains in iptables that look into ipsets, for nodes where everything else is there too; it
    /// closes less than nf_tables can, see [`Iptables`].
    Iptables(Iptables),
}

/// How iptables is used.
///
/// It has limits that no rule of it removes:
///
/// - Packets are classified before destination NAT. One to a service address outside
///   [`Cluster::excluded`] is steered by that address, and stays inside if it turns out to go
///   there; one to an excluded service address is not steered, wherever it goes in the end.
/// - Whoever inserts a masquerade above ours, has one in the other variant, or one in an nf_tables
///   table of their own, translates first. Our place is repaired with every reconciliation; a
///   packet that was translated otherwise is dropped from the second one of its connection on.
/// - The first packets of a connection that somebody else translates first do get out, with the
///   address that they were given, where they leave from the pod's own node.
/// - Whoever overwrites the whole mark of a packet takes ours away, and the packet leaves as if
///   there were no policy.
/// - An answer that is under way when its connection is ended, or when somebody empties the table
///   of connections, may open it the other way round; the pod's packets then leave as answers to
///   that, with its own address.
/// - Each policy with a list of destinations costs every steered packet two lookups, and every
///   policy of a gateway its connections' first packets.
/// - The packets of the tunnel are tracked like others, one connection for each of the pods'.
/// - The layout of the marks cannot be changed while policies are in force:
///   [drain](crate::Reconciler::drain) the node first.
/// - Of connections nothing is cached, [`Cluster::connection_caching`] or not, and
///   [`explain`](crate::sim::explain()) does not read the rules.
/// - Several tables and sets are not changed at once: the order of the steps keeps them safe.
/// - Nobody tells when others have changed something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Iptables {
    /// Which of the two implementations.
    pub variant: Variant,
    /// Whether to accept what is ours where the host's firewall drops by default: the tunnel's
    /// packets, and what goes in and comes out of it. Default no, because it is accepted ahead of
    /// network policies.
    #[cfg_attr(feature = "serde", serde(default))]
    pub accept: bool,
    /// Whether to keep Weave Net, which masquerades by what it thinks is inside, from translating
    /// the packets of policies on their own node, whatever device they leave by. Default no; what
    /// enters the tunnel is kept from being translated in any case.
    #[cfg_attr(feature = "serde", serde(default))]
    pub weave: bool,
}

impl Iptables {
    /// The variant without any option.
    pub const fn new(variant: Variant) -> Self {
        Self { variant, accept: false, weave: false }
    }
}

#[cfg(feature = "serde")]
const fn rule_priority() -> u32 {
    Cluster::RULE_PRIORITY
}

impl Cluster {
    /// Default of the first priority of our routing rules.
    pub const RULE_PRIORITY: u32 = 101;

    /// A cluster with the default tunnel, marks and rule priority.
    pub fn new(node: NodeName, nodes: Vec<Node>, excluded: Vec<IpNet>) -> Self {
        Self {
            node,
            nodes,
            excluded,
            tunnel: Tunnel::default(),
            marks: MarkLayout::SEED,
            rule_priority: Self::RULE_PRIORITY,
            connection_caching: false,
            policy_counters: false,
            backend: Backend::default(),
            steering: Steering::default(),
        }
    }
}

/// Priorities of our routing rules.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RulePriorities {
    /// Leads packets without our prefix, this node's own, and lookups of the way back to a sender
    /// past the gateways' rules; only in layouts with a prefix.
    ///
    /// It is for three rules: no packet fits two of them, and all lead to the same, so that it is
    /// no matter which of them is asked first.
    pub(crate) guard: u32,
    /// Leads packets with a gateway's mark to its table.
    pub(crate) gateways: u32,
    /// The same for the marks with [`MarkLayout::half`], which a rule at `gateways` leads here: a
    /// packet is asked about half of the gateways.
    pub(crate) half: u32,
    /// Refuses other packets with our prefix; only in layouts with a prefix.
    pub(crate) closing: u32,
}

impl RulePriorities {
    /// The highest that the first can have: 32766 is the kernel's rule for the main table.
    pub(crate) const LAST: u32 = 32_762;

    pub(crate) const fn of(cluster: &Cluster) -> Self {
        let first = cluster.rule_priority;
        Self {
            guard: first,
            gateways: first.saturating_add(1),
            half: first.saturating_add(2),
            closing: first.saturating_add(3),
        }
    }
}

/// A node of the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct Node {
    /// Its name.
    pub name: NodeName,
    /// Its addresses on the network that carries the tunnel, at most one per family.
    pub underlay: Vec<IpAddr>,
    /// Its addresses inside the tunnel, at most one per family, with the tunnel's prefix length.
    #[cfg_attr(feature = "serde", serde(deserialize_with = "crate::serde_forms::nets"))]
    pub tunnel: Vec<IpNet>,
    /// Ethernet address of its tunnel device; derived from its name if `None`.
    #[cfg_attr(feature = "serde", serde(default))]
    pub mac: Option<MacAddr>,
    /// Firewall mark of traffic to it as a gateway; allocated if `None`.
    #[cfg_attr(feature = "serde", serde(default))]
    pub mark: Option<Mark>,
}

impl Node {
    /// A node whose Ethernet address is derived and whose mark is allocated.
    pub const fn new(name: NodeName, underlay: Vec<IpAddr>, tunnel: Vec<IpNet>) -> Self {
        Self { name, underlay, tunnel, mac: None, mark: None }
    }

    /// Ethernet address of its tunnel device.
    pub fn mac(&self) -> MacAddr {
        self.mac.unwrap_or_else(|| MacAddr::of_node(&self.name))
    }
}

/// The VXLAN tunnel between the nodes.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
pub struct Tunnel {
    /// Name of the device; default `egress.vxlan`.
    pub device: DeviceName,
    /// VXLAN network identifier, 1 to 2²⁴ − 1; default 100.
    pub vni: u32,
    /// UDP port; default 7789.
    pub port: u16,
    /// Device that carries the outer packets on this node; if it goes, the tunnel goes with it.
    pub underlay_device: Option<DeviceName>,
    /// MTU of that device in bytes; default 1500.
    pub underlay_mtu: u32,
}

impl Default for Tunnel {
    fn default() -> Self {
        Self {
            device: DeviceName::known("egress.vxlan"),
            vni: 100,
            port: 7789,
            underlay_device: None,
            underlay_mtu: 1500,
        }
    }
}
