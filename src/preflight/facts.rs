//! What is judged: facts about a host, as plain values.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;

use super::terms::MarkKind;
use crate::kernel::nft::KernelPart;
use crate::types::Family;

/// What is there, and not ours.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Facts {
    /// Whether the kernel refuses changes for want of a privilege.
    pub(crate) denied: bool,
    pub(crate) missing: Vec<KernelPart>,
    /// The kernel's version, major and minor, if it says one.
    pub(crate) version: Option<(u32, u32)>,
    pub(crate) settings: Settings,
    pub(crate) devices: Vec<Device>,
    pub(crate) addresses: Vec<Address>,
    pub(crate) rules: Vec<Rule>,
    /// Tables that somebody's rule names or that hold somebody's route.
    pub(crate) tables: BTreeSet<u32>,
    /// Of these, those that have a route for every destination.
    pub(crate) catch_all: BTreeSet<(Family, u32)>,
    /// Routes of others in tables that hold one of ours.
    pub(crate) intruders: Vec<Intruder>,
    pub(crate) firewall: Firewall,
    /// Tables of legacy iptables.
    pub(crate) legacy: Vec<String>,
}

/// Settings below `/proc/sys/net`, by their names with slashes; what is missing is not there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Settings(pub(crate) BTreeMap<String, u64>);

impl Settings {
    pub(crate) fn get(&self, name: &str) -> Option<u64> {
        self.0.get(name).copied()
    }

    /// A setting of which the kernel takes the larger of that of all devices and of this one.
    pub(crate) fn larger(&self, name: &str, device: &str) -> u64 {
        let of = |device| self.get(&format!("ipv4/conf/{device}/{name}")).unwrap_or(0);
        of("all").max(of(device))
    }
}

/// A network device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Device {
    pub(crate) name: String,
    pub(crate) ours: bool,
    /// Whether it takes packets out of other packets.
    pub(crate) decapsulates: bool,
    pub(crate) mtu: u32,
    pub(crate) rp_filter: u32,
    pub(crate) vxlan: Option<Vxlan>,
}

/// What only a VXLAN device has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Vxlan {
    pub(crate) vni: u32,
    pub(crate) port: u16,
    /// Whether it takes every VNI, and another program sorts them.
    pub(crate) external: bool,
}

/// An address of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Address {
    pub(crate) ip: IpAddr,
    pub(crate) device: String,
    /// Whether its preferred lifetime is over.
    pub(crate) deprecated: bool,
}

/// A routing rule of somebody else.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Rule {
    pub(crate) family: Family,
    pub(crate) priority: u32,
    /// Value and mask.
    pub(crate) mark: Option<(u32, u32)>,
    pub(crate) source: Option<IpNet>,
    /// Whether anything else of the packet is asked for.
    pub(crate) selects: bool,
    /// Whether all of the selectors are to fail.
    pub(crate) inverted: bool,
    pub(crate) action: Action,
}

/// What a routing rule does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Looks in a table; perhaps not at its default route.
    Lookup { table: u32, without_default: bool },
    /// Ends the packet.
    Refuse,
    /// Anything else.
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

/// A route of somebody else in a table of ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Intruder {
    pub(crate) family: Family,
    /// As `ip route` takes it.
    pub(crate) text: String,
}

/// What others have in nf_tables.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Firewall {
    pub(crate) chains: Vec<Chain>,
    pub(crate) marks: Vec<MarkUse>,
}

/// A base chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Chain {
    /// Family and name, as `nft` takes them.
    pub(crate) table: String,
    pub(crate) name: String,
    /// Families of the packets it sees.
    pub(crate) families: Vec<Family>,
    pub(crate) nat: bool,
    /// Number of the hook (`enum nf_inet_hooks`).
    pub(crate) hook: u32,
    pub(crate) priority: i32,
    pub(crate) drops: bool,
}

/// Rules of one table that do the same to a mark.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MarkUse {
    pub(crate) table: String,
    /// The first chain that has one.
    pub(crate) chain: String,
    pub(crate) kind: MarkKind,
    pub(crate) bits: u32,
    pub(crate) writes: bool,
    pub(crate) rules: usize,
}
