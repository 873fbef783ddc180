//! Facts about a host that the preflight check judges, as plain values.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;

use super::terms::{FastPath, MarkKind};
use crate::kernel::nft::KernelPart;
use crate::types::Family;

/// Objects and settings on this host that do not belong to the datapath.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Facts {
    /// Set if the kernel refuses changes because a privilege is missing.
    pub(crate) denied: bool,
    pub(crate) missing: Vec<KernelPart>,
    /// Major and minor version of the kernel, if it reports one.
    pub(crate) version: Option<(u32, u32)>,
    pub(crate) settings: Settings,
    pub(crate) devices: Vec<Device>,
    pub(crate) addresses: Vec<Address>,
    pub(crate) rules: Vec<Rule>,
    /// Routing tables that a rule of another program names or that hold its routes.
    pub(crate) tables: BTreeSet<u32>,
    /// Tables among `tables` that have a route for every destination, by family.
    pub(crate) catch_all: BTreeSet<(Family, u32)>,
    /// Routes of other programs in tables that hold a route of the datapath.
    pub(crate) intruders: Vec<Intruder>,
    /// Addresses that this host uses itself, and what for: routes, and sockets bound to them.
    pub(crate) uses: BTreeSet<(IpAddr, String)>,
    pub(crate) firewall: Firewall,
    /// Set if the tunnel device has no IPv6, and this process cannot enable it.
    pub(crate) lacks_ipv6: bool,
    /// Tables of legacy iptables.
    pub(crate) legacy: Vec<String>,
    /// Files with rules of the datapath that the host restores at boot.
    pub(crate) saved: Vec<Saved>,
    /// Interfaces where packets may be forwarded ahead of all nf_tables hooks.
    pub(crate) fast_paths: BTreeMap<FastPath, BTreeSet<String>>,
}

/// Sysctl settings below `/proc/sys/net`, by name with slashes; missing settings have no entry.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Settings(pub(crate) BTreeMap<String, u64>);

impl Settings {
    pub(crate) fn get(&self, name: &str) -> Option<u64> {
        self.0.get(name).copied()
    }

    /// Effective value of a setting where the kernel takes the larger of `all` and the interface.
    pub(crate) fn larger(&self, name: &str, device: &str) -> u64 {
        let of = |device| self.get(&format!("ipv4/conf/{device}/{name}")).unwrap_or(0);
        of("all").max(of(device))
    }
}

/// File from which the host restores rules of the datapath.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Saved {
    pub(crate) file: String,
    /// Set if the file is one of `iptables-restore`; otherwise one of `nft`.
    pub(crate) for_iptables: bool,
}

/// Network interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
pub(crate) struct Device {
    pub(crate) name: String,
    pub(crate) ours: bool,
    /// Set if the interface is not up.
    pub(crate) down: bool,
    pub(crate) kind: DeviceKind,
    pub(crate) mtu: u32,
    pub(crate) rp_filter: u32,
    /// Set if IPv4 packets that arrive on the interface are not forwarded.
    pub(crate) not_forwarding: bool,
    pub(crate) vxlan: Option<Vxlan>,
    /// Set if an XDP program is attached.
    pub(crate) xdp: bool,
}

/// Kind of an interface, as far as it decides about packets that arrive on it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum DeviceKind {
    /// Decapsulates packets.
    Tunnel,
    /// Gives packets back to the interface that they were redirected from (`ifb`).
    Ifb,
    /// Has eBPF programs in place of a qdisc.
    Netkit,
    #[default]
    Other,
}

/// Attributes of a VXLAN device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Vxlan {
    pub(crate) vni: u32,
    pub(crate) port: u16,
    /// Set if the device takes every VNI, and another program dispatches them (`external`).
    pub(crate) external: bool,
}

/// Address of an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Address {
    pub(crate) ip: IpAddr,
    pub(crate) device: String,
    /// Set if the preferred lifetime of the address is over.
    pub(crate) deprecated: bool,
}

/// Routing rule of another program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Rule {
    pub(crate) family: Family,
    pub(crate) priority: u32,
    /// Value and mask of the firewall mark.
    pub(crate) mark: Option<(u32, u32)>,
    pub(crate) source: Option<IpNet>,
    /// Set if the rule has selectors besides firewall mark and source.
    pub(crate) selects: bool,
    /// Set if the rule matches packets that fail its selectors (`not`).
    pub(crate) inverted: bool,
    pub(crate) action: Action,
}

/// Action of a routing rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Looks up a routing table; with `without_default`, its default route is ignored.
    Lookup { table: u32, without_default: bool },
    /// Ends the lookup and refuses the packet.
    Refuse,
    /// Any other action.
    Other,
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let family = match self.family {
            Family::V4 => "ip",
            Family::V6 => "ip -6",
        };
        write!(f, "{family} rule {}:", self.priority)?;
        if self.inverted {
            f.write_str(" not")?;
        }
        if let Some(source) = self.source {
            write!(f, " from {source}")?;
        }
        if let Some((value, mask)) = self.mark {
            write!(f, " fwmark {value:#x}/{mask:#x}")?;
        }
        match self.action {
            Action::Lookup { table, .. } => write!(f, " lookup {table}"),
            Action::Refuse => f.write_str(" refuse"),
            Action::Other => Ok(()),
        }
    }
}

/// Route of another program in a routing table of the datapath.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Intruder {
    pub(crate) family: Family,
    /// Route in the syntax of `ip route`.
    pub(crate) text: String,
}

/// Chains and mark uses of other programs in nf_tables.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Firewall {
    pub(crate) chains: Vec<Chain>,
    pub(crate) marks: Vec<MarkUse>,
    /// Tables with a reverse path filter.
    pub(crate) filters: Vec<Filters>,
    pub(crate) flowtables: Vec<Flowtable>,
}

/// Flowtable.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Flowtable {
    /// Family and name of the table, in the syntax of `nft`.
    pub(crate) table: String,
    pub(crate) name: String,
    pub(crate) devices: Vec<String>,
    /// Set if connections are offloaded to the hardware.
    pub(crate) hardware: bool,
}

/// Rules of a table with a reverse path filter.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Filters {
    /// Family and name of the table, in the syntax of `nft`.
    pub(crate) table: String,
    /// Rules of each chain in their order.
    pub(crate) chains: BTreeMap<String, Vec<FilterRule>>,
}

/// Rule of another program, as far as it decides what happens to a packet of the tunnel device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct FilterRule {
    pub(crate) handle: u64,
    pub(crate) tests: Vec<Test>,
    /// Set if the rule may write the packet's mark.
    pub(crate) marks: bool,
    pub(crate) verdict: Option<Verdict>,
}

/// Condition of a rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Test {
    /// The name of the input interface, or with `begins` the begin of it.
    Input { name: String, begins: bool, equal: bool },
    /// The family of the packet.
    Family { number: u8, equal: bool },
    /// Bits of the firewall mark.
    Mark { value: u32, mask: u32, equal: bool },
    /// A route to the source exists, or is missing; with `strict`, by the input interface.
    ///
    /// With `by_mark`, it is looked up with the packet's mark.
    WayBack { strict: bool, by_mark: bool, exists: bool },
    /// Anything else.
    Unknown,
}

/// Verdict of a rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Accept,
    Drop,
    Return,
    Jump(String),
    Goto(String),
}

/// Base chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Chain {
    /// Family and name of the table, in the syntax of `nft`.
    pub(crate) table: String,
    pub(crate) name: String,
    /// Address families of the packets that pass through the chain.
    pub(crate) families: Vec<Family>,
    pub(crate) nat: bool,
    /// Hook number (`enum nf_inet_hooks`).
    pub(crate) hook: u32,
    pub(crate) priority: i32,
    pub(crate) drops: bool,
}

/// Rules of one table that use the same bits of a mark in the same way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MarkUse {
    pub(crate) table: String,
    /// First chain with such a rule.
    pub(crate) chain: String,
    pub(crate) kind: MarkKind,
    pub(crate) bits: u32,
    pub(crate) writes: bool,
    pub(crate) rules: usize,
}
