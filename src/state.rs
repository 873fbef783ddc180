//! The state of one network namespace: the objects that this crate programs, wanted or found.
//!
//! The same type describes both sides: [`plan`](crate::plan) computes it from policies, a
//! [`Datapath`](crate::Datapath) reads it back from the kernel, and [`Changes`](crate::Changes) is
//! the difference of two states.
//!
//! After a restart without memory, each object can still be distinguished from objects of other
//! programs:
//!
//! | object | of this crate if |
//! |---|---|
//! | VXLAN device | it has the alias [`LINK_ALIAS`] or the group [`LINK_GROUP`] |
//! | address, FDB entry, neighbour | it is on the VXLAN device |
//! | claimed egress IP | it is an address of another interface with the protocol [`PROTOCOL`] |
//! | route | its protocol is [`PROTOCOL`] and its table is not one of the kernel's own |
//! | rule | its protocol is [`PROTOCOL`] |
//! | set, chain, element | it is in the nf_tables table `inet egress_datapath` or `netdev egress_datapath` |
//! | ipset | its name is one that [`Ipset`] prints |
//! | iptables chain, rule | the chain's name is one that [`XtName`] prints, or the rule jumps to one |

mod leftovers;
mod lookup;
mod walk;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;

use crate::types::{DeviceName, Family, MacAddr, Mark, TableId};

pub use crate::range::IpRange;
pub use crate::rules::chain::{Base, ChainId, ChainType, Hook, TableFamily};
pub use crate::rules::element::{Comment, Data, Tag, Value, Verdict};
pub use crate::rules::elements::{Elements, Iter as ElementsIter};
pub use crate::rules::ipset::{Ipset, IpsetContents, Member};
pub use crate::rules::iptables::{
    CtState, Is, Side, Variant, XtChain, XtEdit, XtMatch, XtName, XtRule, XtTable, XtTarget,
    Xtables,
};
pub(crate) use crate::rules::set::{Datum, Stage};
pub use crate::rules::set::{Key, KeyValue, Set};
pub use crate::rules::stmt::{
    Direction, FLOWTABLE, Field, Interface, MarkBits, MarkOf, Mask, NftRule, Selector, Stmt, Target,
};
pub use crate::rules::table::{Firewall, Stray};
pub use leftovers::{StrayKind, StrayRouting};
pub use lookup::{Action, action};

/// Protocol number of this crate's routes and rules, as `ip route` and `ip rule` print it.
///
/// It is neither in `include/uapi/linux/rtnetlink.h` nor in iproute2's `rt_protos`.
pub const PROTOCOL: u8 = 69;

/// Alias of the VXLAN device.
pub const LINK_ALIAS: &str = "egress-datapath";

/// Group of the VXLAN device: the letters `egrx`.
///
/// The kernel sets a group when it creates an interface, and an alias only later. The group
/// therefore identifies a device whose creator died in between, and one whose alias another program
/// has changed.
pub const LINK_GROUP: u32 = 0x6567_7278;

/// Name of the nf_tables tables of this crate.
///
/// One table is of family `inet`. The other is of family `netdev`, and exists where
/// [`Steering::EgressHook`](crate::Steering::EgressHook) asks for it.
pub const NFT_TABLE: &str = "egress_datapath";

/// Metric of the `unreachable` route in each routing table of this crate.
///
/// It is one step above the highest metric that anybody would use by hand, so that the route loses
/// to every other default route.
pub const BACKSTOP_METRIC: u32 = 4_278_198_272;

/// Defines `State`, whose fields are public with the feature `unstable-state` alone.
macro_rules! state {
    ($(#[$meta:meta])* struct State { $($(#[$doc:meta])* $field:ident: $type:ty,)* }) => {
        $(#[$meta])*
        #[cfg(feature = "unstable-state")]
        pub struct State { $($(#[$doc])* pub $field: $type,)* }

        $(#[$meta])*
        #[cfg(not(feature = "unstable-state"))]
        pub struct State { $($(#[$doc])* pub(crate) $field: $type,)* }
    };
}

state! {
    /// All objects of this crate in one network namespace, wanted or found.
    ///
    /// [`summary`](Self::summary) says what is in force; `Display` prints the summary. The objects
    /// themselves depend on the version of the crate: they are public, in the module `state`, with
    /// the feature `unstable-state`, which is exempt from semantic versioning.
    #[derive(Clone, Debug, Default, PartialEq, Eq)]
    struct State {
        /// The VXLAN device of the tunnel.
        link: Option<Vxlan>,
        /// Addresses of the VXLAN device, with their prefix length.
        addresses: BTreeSet<IpNet>,
        /// Egress IPs among the addresses of other interfaces, where this crate added them.
        claims: BTreeSet<(IpAddr, DeviceName)>,
        /// FDB entries of the VXLAN device: destination MAC address to underlay address of the
        /// node.
        fdb: BTreeMap<MacAddr, IpAddr>,
        /// Neighbours: the MAC address of each tunnel address of the other nodes.
        neighbours: BTreeMap<IpAddr, MacAddr>,
        /// Routes in the routing tables of this crate.
        routes: BTreeMap<RouteKey, Route>,
        /// Routing rules that send marked packets to these tables, and rules that skip those
        /// tables.
        rules: BTreeSet<Rule>,
        /// Routes and rules with this crate's protocol number that this crate never makes.
        strays: BTreeSet<StrayRouting>,
        /// The nf_tables table of family `inet`.
        firewall: Option<Firewall>,
        /// The nf_tables table of family `netdev`, at the egress hook of the VXLAN device.
        hook: Option<Firewall>,
        /// Sets that the iptables rules match.
        ipsets: BTreeMap<Ipset, IpsetContents>,
        /// Chains in iptables, by variant.
        xtables: BTreeMap<Variant, Xtables>,
        /// Features that the node lacks.
        missing: Missing,
    }
}

/// Features that the kernel or the network stack of a node lacks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Missing {
    /// Families that the network stack lacks, or that are disabled for good.
    ///
    /// No address, neighbour, route, rule or iptables chain of such a family can exist.
    pub families: BTreeSet<Family>,
    /// Fields that rules of the kernel cannot test, in nf_tables or in iptables.
    pub fields: BTreeSet<Field>,
    /// Absence of flowtables in nf_tables: nobody can offload a connection.
    pub flowtables: bool,
}

impl State {
    /// A copy without the parts that may be large, such as a table with a million elements.
    pub(crate) fn routing(&self) -> Self {
        Self {
            link: self.link.clone(),
            addresses: self.addresses.clone(),
            claims: self.claims.clone(),
            fdb: self.fdb.clone(),
            neighbours: self.neighbours.clone(),
            routes: self.routes.clone(),
            rules: self.rules.clone(),
            strays: self.strays.clone(),
            hook: self.hook.clone(),
            missing: self.missing.clone(),
            ..Self::default()
        }
    }

    /// Leaves out the objects that need a feature that the node lacks.
    ///
    /// The nf_tables tables do not depend on families and keep their elements: packets that need an
    /// object that was left out are dropped.
    pub(crate) fn leave_out(&mut self, missing: &Missing) {
        self.missing.clone_from(missing);
        if let Some(firewall) = self.firewall.as_mut().filter(|_| missing.flowtables) {
            firewall.leave_out_flowtable();
        }
        let stays = |family| !missing.families.contains(&family);
        self.addresses.retain(|net| stays(Family::of_net(net)));
        self.claims.retain(|(address, _)| stays(Family::of(*address)));
        self.neighbours.retain(|address, _| stays(Family::of(*address)));
        self.routes.retain(|key, _| stays(Family::of_net(&key.dst)));
        self.rules.retain(|rule| stays(rule.family));
        for tables in self.xtables.values_mut() {
            tables.chains.retain(|chain, _| stays(chain.family));
            tables.jumps.retain(|chain, _| stays(chain.family));
        }
    }

    /// Leaves out the elements of the `inet` table, and notes the sets that may have some.
    ///
    /// Elements that expire by themselves are no part of the state.
    pub(crate) fn without_elements(mut self) -> Self {
        if let Some(firewall) = &mut self.firewall {
            let sets = firewall.sets.iter().filter(|set| !set.is_fleeting());
            firewall.unlisted = sets.copied().collect();
            firewall.elements = Elements::default();
        }
        self
    }

    /// One of the two nf_tables tables.
    pub const fn table(&self, family: TableFamily) -> Option<&Firewall> {
        match family {
            TableFamily::Inet => self.firewall.as_ref(),
            TableFamily::Netdev => self.hook.as_ref(),
        }
    }

    /// The nf_tables tables that there are.
    pub(crate) fn tables(&self) -> impl Iterator<Item = &Firewall> {
        self.firewall.iter().chain(&self.hook)
    }

    /// A mutable reference to one of the two nf_tables tables.
    pub(crate) const fn table_mut(&mut self, family: TableFamily) -> &mut Option<Firewall> {
        match family {
            TableFamily::Inet => &mut self.firewall,
            TableFamily::Netdev => &mut self.hook,
        }
    }

    /// The elements of the `inet` table; `None` without that table.
    pub(crate) fn elements(&self) -> Option<&Elements> {
        self.firewall.as_ref().map(|firewall| &firewall.elements)
    }

    /// Returns true for a rule to the table of the reverse path, the only one without backstop route.
    pub(crate) fn leads_back(&self, rule: &Rule) -> bool {
        let RuleAction::Lookup(table) = rule.action else { return false };
        let dst = IpNet::new_assert(rule.family.unspecified(), 0);
        !self.routes.contains_key(&RouteKey { table, dst, metric: BACKSTOP_METRIC })
    }

    /// Whether the state has no objects.
    pub fn is_empty(&self) -> bool {
        let missing = self.missing.clone();
        *self == Self { missing, ..Self::default() }
    }
}

/// The VXLAN device of the tunnel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vxlan {
    /// The interface name.
    pub name: DeviceName,
    /// VXLAN network identifier, 24 bits; the kernel cannot change it later.
    pub vni: u32,
    /// UDP destination port; the kernel cannot change it later.
    pub port: u16,
    /// Source address of the outer packets, an address of this node.
    pub local: IpAddr,
    /// Underlay interface, which carries the outer packets.
    pub underlay: Option<DeviceName>,
    /// MAC address of the VXLAN device.
    pub mac: MacAddr,
    /// Maximum size of an inner packet in bytes.
    pub mtu: u32,
    /// `rp_filter` of the interface; 2, because strict filtering drops every steered packet.
    pub rp_filter: u32,
    /// Whether the interface is up.
    pub up: bool,
    /// Whether the other attributes are as this crate sets them.
    ///
    /// They are alias and group, no bridge, no learning, the host's TTL on frames, IPv4 forwarding,
    /// and `src_valid_mark`.
    pub intact: bool,
}

/// The properties by which the kernel distinguishes routes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RouteKey {
    /// The routing table.
    pub table: TableId,
    /// The destination prefix.
    pub dst: IpNet,
    /// The metric; lower wins. IPv6 has no metric 0, the kernel makes it 1024.
    pub metric: u32,
}

impl RouteKey {
    /// Metric of a route that was added without one.
    pub const fn default_metric(family: Family) -> u32 {
        match family {
            Family::V4 => 0,
            Family::V6 => 1024,
        }
    }
}

/// Type and next hop of a route.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Route {
    /// Sends the packet to a neighbour on the VXLAN device.
    Via(IpAddr),
    /// Ends the lookup in this table; the next rule decides.
    Throw,
    /// Rejects the packet and notifies the sender.
    Unreachable,
}

/// A routing rule, for packets with or without a firewall mark.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Rule {
    /// The address family.
    pub family: Family,
    /// Priority of the rule; lower is evaluated first.
    pub priority: u32,
    /// The firewall mark to match.
    pub mark: Mark,
    /// Mask of the compared bits of the mark.
    pub mask: u32,
    /// Whether the rule matches packets with any other mark.
    pub inverted: bool,
    /// Input interface of the lookups that the rule is limited to (`iif`).
    ///
    /// [`LOOPBACK`](Self::LOOPBACK) stands for the node's own packets. In a reverse path lookup,
    /// the kernel uses the interface by which the packet is about to leave (`__fib_validate_source`
    /// in `net/ipv4/fib_frontend.c`).
    pub input: Option<DeviceName>,
    /// Action for a packet that matches.
    pub action: RuleAction,
}

impl Rule {
    /// Returns true for two rules that differ in the rule to which they skip, and in nothing else.
    ///
    /// The kernel does not compare that priority (`rule_exists` in `net/core/fib_rules.c`), so that one
    /// of them must be deleted before the other is added.
    pub(crate) fn differs_by_target(&self, other: &Self) -> bool {
        let both = (&self.action, &other.action);
        matches!(both, (RuleAction::Goto(one), RuleAction::Goto(other)) if one != other)
            && *self == Self { action: self.action, ..other.clone() }
    }

    /// Input interface of the node's own packets in rule lookups.
    pub const LOOPBACK: &'static str = "lo";
}

/// Action of a routing rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RuleAction {
    /// Rejects the packet and notifies the sender.
    Unreachable,
    /// Looks up the destination in a table; without a matching route, the next rule is evaluated.
    Lookup(TableId),
    /// Continues with the rule of this priority, which must be a later one.
    ///
    /// While no rule has that priority, the next rule is evaluated.
    Goto(u32),
}

impl fmt::Display for Rule {
    /// The rule in the syntax of `ip rule add`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let not = if self.inverted { "not " } else { "" };
        write!(f, "pref {} {not}fwmark {}/{:#010x} ", self.priority, self.mark, self.mask)?;
        if let Some(device) = &self.input {
            write!(f, "iif {device} ")?;
        }
        match self.action {
            RuleAction::Unreachable => f.write_str("unreachable")?,
            RuleAction::Lookup(table) => write!(f, "lookup {table}")?,
            RuleAction::Goto(priority) => write!(f, "goto {priority}")?,
        }
        write!(f, " protocol {PROTOCOL}")
    }
}
