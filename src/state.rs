//! What one network namespace holds of ours, wanted or found.
//!
//! The same value describes both sides: [`plan`](crate::plan) makes it from policies, a
//! [`Datapath`](crate::Datapath) reads it back from the kernel, and
//! [`Changes`](crate::Changes) is the difference of two of them.
//!
//! Everything in it can be told from other people's objects after a restart with no memory:
//!
//! | object | ours if |
//! |---|---|
//! | VXLAN device | it has our [`LINK_ALIAS`] or our [`LINK_GROUP`] |
//! | address, forwarding entry, neighbour | it is on our device |
//! | route | its protocol is [`PROTOCOL`] and its table is not one of the kernel's own |
//! | rule | its protocol is [`PROTOCOL`] |
//! | set, chain, element | it is in the nf_tables table `inet egress_datapath` or `netdev egress_datapath` |
//! | ipset | its name is one that [`Ipset`] prints |
//! | iptables chain, rule | the chain's name is one that [`XtName`] prints, or it leads to one |

mod leftovers;
pub(crate) mod lookup;
mod walk;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;

use crate::types::{DeviceName, Family, MacAddr, Mark, TableId};

pub use crate::rules::chain::{Base, ChainId, ChainType, Hook, TableFamily};
pub use crate::rules::element::{Comment, Data, Key, Tag, Value, Verdict};
pub use crate::rules::elements::{Elements, Iter as ElementsIter};
pub use crate::rules::ipset::{Ipset, IpsetContents, Member};
pub use crate::rules::iptables::{
    CtState, Is, Side, Variant, XtChain, XtEdit, XtMatch, XtName, XtRule, XtTable, XtTarget,
    Xtables,
};
#[cfg(all(feature = "kernel", target_os = "linux"))]
pub(crate) use crate::rules::set::Datum;
pub use crate::rules::set::Set;
pub use crate::rules::stmt::{Direction, MarkBits, NftRule, Stmt};
pub use crate::rules::table::{Firewall, Stray};
pub use leftovers::{StrayKind, StrayRouting};

/// Protocol number of our routes and rules, as `ip route` and `ip rule` print it.
///
/// Not in `include/uapi/linux/rtnetlink.h` nor in iproute2's `rt_protos`.
pub const PROTOCOL: u8 = 69;

/// Alias of our VXLAN device.
pub const LINK_ALIAS: &str = "egress-datapath";

/// Group of our VXLAN device: the letters `egrx`.
///
/// The kernel takes a group when it creates a device, and an alias only later: one whose maker
/// died in between is known by it, and so is one whose alias others have used for their own ends.
pub const LINK_GROUP: u32 = 0x6567_7278;

/// Name of our nf_tables tables, one of family `inet` and, where
/// [`Steering::EgressHook`](crate::Steering::EgressHook) asks for it, one of family `netdev`.
pub const NFT_TABLE: &str = "egress_datapath";

/// Metric of the `unreachable` route in each of our tables: the highest that anybody would use
/// by hand plus one step, so that it loses to every other default route.
pub const BACKSTOP_METRIC: u32 = 4_278_198_272;

/// Everything of ours in one network namespace: wanted or found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// The tunnel device.
    pub link: Option<Vxlan>,
    /// Addresses of the tunnel device, with their prefix length.
    pub addresses: BTreeSet<IpNet>,
    /// Which node a tunnelled frame goes to, by its destination address.
    pub fdb: BTreeMap<MacAddr, IpAddr>,
    /// Ethernet addresses of the other nodes' tunnel addresses.
    pub neighbours: BTreeMap<IpAddr, MacAddr>,
    /// Routes in our tables.
    pub routes: BTreeMap<RouteKey, Route>,
    /// Rules that send marked packets to our tables, and others past them.
    pub rules: BTreeSet<Rule>,
    /// Routes and rules found with our protocol number that we never make.
    pub strays: BTreeSet<StrayRouting>,
    /// The nf_tables table of family `inet`.
    pub firewall: Option<Firewall>,
    /// The nf_tables table of family `netdev`, at the egress hook of the tunnel device.
    pub hook: Option<Firewall>,
    /// Sets that iptables rules look into.
    pub ipsets: BTreeMap<Ipset, IpsetContents>,
    /// Chains in iptables, by its variant.
    pub xtables: BTreeMap<Variant, Xtables>,
}

impl State {
    /// What is little to read: a million elements may be in the rest.
    pub(crate) fn routing(&self) -> Self {
        Self {
            link: self.link.clone(),
            addresses: self.addresses.clone(),
            fdb: self.fdb.clone(),
            neighbours: self.neighbours.clone(),
            routes: self.routes.clone(),
            rules: self.rules.clone(),
            strays: self.strays.clone(),
            hook: self.hook.clone(),
            ..Self::default()
        }
    }

    /// One of the two nf_tables tables.
    pub const fn table(&self, family: TableFamily) -> Option<&Firewall> {
        match family {
            TableFamily::Inet => self.firewall.as_ref(),
            TableFamily::Netdev => self.hook.as_ref(),
        }
    }

    /// The place of one of the two nf_tables tables.
    pub(crate) const fn table_mut(&mut self, family: TableFamily) -> &mut Option<Firewall> {
        match family {
            TableFamily::Inet => &mut self.firewall,
            TableFamily::Netdev => &mut self.hook,
        }
    }

    /// What its sets hold, if it has the table.
    pub(crate) fn elements(&self) -> Option<&Elements> {
        self.firewall.as_ref().map(|firewall| &firewall.elements)
    }

    /// Whether there is nothing.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// The tunnel device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vxlan {
    /// Its name.
    pub name: DeviceName,
    /// VXLAN network identifier, 24 bits; the kernel cannot change it later.
    pub vni: u32,
    /// UDP destination port; the kernel cannot change it later.
    pub port: u16,
    /// Source address of the outer packets, an address of this node.
    pub local: IpAddr,
    /// Device that carries the outer packets.
    pub underlay: Option<DeviceName>,
    /// Ethernet address of the device.
    pub mac: MacAddr,
    /// Largest inner packet in bytes.
    pub mtu: u32,
    /// `rp_filter` of the device; 2, because strict filtering drops every steered packet.
    pub rp_filter: u32,
    /// Whether it is up.
    pub up: bool,
    /// Whether the rest of it is as we make it: our alias and our group, in no bridge, without
    /// learning, and frames with the host's TTL.
    pub intact: bool,
}

/// What the kernel tells routes apart by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RouteKey {
    /// The table.
    pub table: TableId,
    /// The destination.
    pub dst: IpNet,
    /// The metric; lower wins. IPv6 has no metric 0, the kernel makes it 1024.
    pub metric: u32,
}

impl RouteKey {
    /// Metric that the kernel gives to a route for which none was asked.
    pub const fn default_metric(family: Family) -> u32 {
        match family {
            Family::V4 => 0,
            Family::V6 => 1024,
        }
    }
}

/// What a route does with a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Route {
    /// Sends it to a neighbour on the tunnel device.
    Via(IpAddr),
    /// Ends the lookup in this table; the next rule decides.
    Throw,
    /// Refuses it, and says so to the sender.
    Unreachable,
}

/// A routing rule: what packets with a mark, or without it, are routed by.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Rule {
    /// Its family.
    pub family: Family,
    /// Its place; lower is asked first.
    pub priority: u32,
    /// The mark to look for.
    pub mark: Mark,
    /// The bits of the mark that are compared.
    pub mask: u32,
    /// Whether it is for packets that have another mark.
    pub inverted: bool,
    /// Only for lookups by which a packet comes in by this device (`iif`).
    ///
    /// [`LOOPBACK`](Self::LOOPBACK) is that of the node's own packets. Where the kernel looks the
    /// way back to a sender up, it is the device by which the packet is about to leave
    /// (`__fib_validate_source` in `net/ipv4/fib_frontend.c`).
    pub input: Option<DeviceName>,
    /// What happens to a packet that it is for.
    pub action: RuleAction,
}

impl Rule {
    /// The device that a node's own packets come in by, as far as rules can tell.
    pub const LOOPBACK: &'static str = "lo";
}

/// What a routing rule does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RuleAction {
    /// Refuses the packet, and says so to the sender.
    Unreachable,
    /// Looks the destination up in a table; if it finds nothing the next rule is asked.
    Lookup(TableId),
    /// Goes on with the rule of this priority, which must be a later one; while there is none the
    /// next rule is asked.
    Goto(u32),
}

impl fmt::Display for Rule {
    /// The rule as `ip rule add` takes it.
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
