//! Summary of an installed state: tunnel, gateways, policies and sizes, for people and programs.

use std::collections::BTreeMap;
use std::fmt;

use crate::count::{Count, Counts};
use crate::state::{
    ChainId, Data, Firewall, Key, KeyValue, RuleAction, Set, State, Tag, Value, Variant, Verdict,
    Xtables,
};
use crate::types::Family;

/// Summary of the objects of this crate on a node.
///
/// `Display` prints a line for each item. With the feature `serde` it serializes as a JSON object
/// with the names of the fields; fields may be added, but none is changed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct Summary {
    /// The tunnel interface; `None` if there is none.
    pub link: Option<Link>,
    /// Nodes to which this node sends packets, sorted by name.
    pub gateways: Vec<Gateway>,
    /// Policies in force, sorted by id.
    pub policies: Vec<PolicySummary>,
    /// Numbers of elements that map sources to policies.
    pub sources: PerFamily<Sources>,
    /// Egress IPs that this node has added to interfaces, sorted by address.
    #[cfg_attr(feature = "serde", serde(skip_serializing_if = "Vec::is_empty"))]
    pub claims: Vec<ClaimSummary>,
    /// Packets dropped by the rules of each chain, by the name of the chain; only chains that
    /// dropped packets.
    #[cfg_attr(feature = "serde", serde(skip_serializing_if = "BTreeMap::is_empty"))]
    pub drops: BTreeMap<String, Count>,
    /// Variants of iptables that contain rules of this crate.
    #[cfg_attr(feature = "serde", serde(skip_serializing_if = "Vec::is_empty"))]
    pub iptables: Vec<IptablesSummary>,
}

/// The tunnel interface.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct Link {
    /// Name of the interface.
    pub name: String,
    /// VXLAN network identifier.
    pub vni: u32,
    /// UDP destination port.
    pub port: u16,
    /// Source address of the outer packets.
    pub local: String,
    /// Interface that carries the outer packets; `None` if none is configured.
    pub underlay_device: Option<String>,
    /// MAC address.
    pub mac: String,
    /// Maximum size of an inner packet in bytes.
    pub mtu: u32,
    /// True if the interface is up.
    pub up: bool,
    /// Addresses inside the tunnel, with prefix length.
    pub addresses: Vec<String>,
}

/// A node to which this node sends packets.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct Gateway {
    /// Name of the node.
    pub node: String,
    /// Firewall mark, such as `0x26000100`.
    pub mark: String,
    /// Routing table; `None` if no routing rule looks one up.
    pub table: Option<u32>,
}

/// An egress IP that this node has added to an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct ClaimSummary {
    /// The egress IP.
    pub egress_ip: String,
    /// Name of the interface.
    pub device: String,
}

/// A policy in force.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct PolicySummary {
    /// Id of the policy.
    pub id: String,
    /// Treatment of the traffic of each family; `None` for a family without sources.
    #[cfg_attr(feature = "serde", serde(flatten))]
    pub families: PerFamily<Option<Treatment>>,
}

/// Treatment of the traffic of a policy.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct Treatment {
    /// Action: `gateway` (steered), `local` (translated on this node), `deny` (dropped) or
    /// `bypass` (left unchanged).
    pub action: &'static str,
    /// Gateway node; `None` unless the action is `gateway`.
    pub gateway: Option<String>,
    /// Egress IP, or `node` for the node's own address; `None` unless the action is `local`.
    pub egress_ip: Option<String>,
    /// Packets and bytes of this node's pods; `None` if policies are not counted.
    #[cfg_attr(feature = "serde", serde(flatten))]
    pub count: Option<Count>,
}

/// Numbers of elements that map sources to policies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct Sources {
    /// Single addresses.
    pub addresses: usize,
    /// Ranges of addresses.
    pub ranges: usize,
}

/// Objects in one variant of iptables.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct IptablesSummary {
    /// The variant.
    pub variant: Variant,
    /// Number of chains.
    pub chains: usize,
    /// Number of rules in these chains.
    pub rules: usize,
    /// Sets that the rules match, with the number of their members.
    pub ipsets: BTreeMap<String, usize>,
}

/// A value for each address family.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct PerFamily<T> {
    /// The value for IPv4.
    pub ipv4: T,
    /// The value for IPv6.
    pub ipv6: T,
}

impl<T> PerFamily<T> {
    const fn of(&mut self, family: Family) -> &mut T {
        match family {
            Family::V4 => &mut self.ipv4,
            Family::V6 => &mut self.ipv6,
        }
    }

    const fn each(&self) -> [(Family, &T); 2] {
        [(Family::V4, &self.ipv4), (Family::V6, &self.ipv6)]
    }
}

impl State {
    /// Summarizes the state; the counters are those of
    /// [`Datapath::counters`](crate::Datapath::counters), or empty.
    ///
    /// ```
    /// use egress_datapath::datapath::{Counts, observe};
    /// use egress_datapath::Sim;
    ///
    /// let state = observe(&mut Sim::new())?;
    /// assert!(state.summary(&Counts::new()).policies.is_empty());
    /// # Ok::<(), egress_datapath::KernelError>(())
    /// ```
    pub fn summary(&self, counts: &Counts) -> Summary {
        let mut summary = Summary {
            link: self.link.as_ref().map(|link| Link {
                name: link.name.to_string(),
                vni: link.vni,
                port: link.port,
                local: link.local.to_string(),
                underlay_device: link.underlay.as_ref().map(ToString::to_string),
                mac: link.mac.to_string(),
                mtu: link.mtu,
                up: link.up,
                addresses: self.addresses.iter().map(ToString::to_string).collect(),
            }),
            claims: self
                .claims
                .iter()
                .map(|(address, device)| ClaimSummary {
                    egress_ip: address.to_string(),
                    device: device.to_string(),
                })
                .collect(),
            drops: counts
                .drops
                .iter()
                .filter(|(_, count)| count.packets > 0)
                .map(|(chain, count)| (chain.clone(), *count))
                .collect(),
            iptables: self
                .xtables
                .iter()
                .map(|(variant, found)| self.iptables(*variant, found))
                .collect(),
            ..Summary::default()
        };
        if let Some(firewall) = &self.firewall {
            for key in firewall.elements.keys() {
                match key.set() {
                    Set::Source(family) => summary.sources.of(family).addresses += 1,
                    Set::SourceNet(family) => summary.sources.of(family).ranges += 1,
                    _ => {}
                }
            }
            summary.gateways = self.gateways(firewall);
            summary.policies = policies(firewall, counts);
        }
        summary
    }

    fn iptables(&self, variant: Variant, found: &Xtables) -> IptablesSummary {
        let sets = self.ipsets.iter();
        IptablesSummary {
            variant,
            chains: found.chains.len(),
            rules: found.chains.values().map(Vec::len).sum(),
            ipsets: sets.map(|(set, held)| (set.to_string(), held.members.len())).collect(),
        }
    }

    fn gateways(&self, firewall: &Firewall) -> Vec<Gateway> {
        let gateway = |value: Value| match value.data {
            Data::Verdict(Verdict::Goto(ChainId::To(mark))) => {
                let mut rules = self.rules.iter().filter(|rule| rule.mark == mark);
                let table = rules.find_map(|rule| match rule.action {
                    RuleAction::Lookup(table) => Some(table.get()),
                    RuleAction::Unreachable | RuleAction::Goto(_) => None,
                });
                Some(Gateway { node: comment(&value), mark: mark.to_string(), table })
            }
            _ => None,
        };
        let mut gateways: Vec<_> = firewall.elements.values().filter_map(gateway).collect();
        gateways.sort_by(|one, other| one.node.cmp(&other.node));
        gateways
    }
}

/// The comment of an element, which is the name of a node or the id of a policy.
fn comment(value: &Value) -> String {
    value.comment.as_ref().map_or_else(|| "?".into(), |comment| comment.as_str().into())
}

fn policies(firewall: &Firewall, counts: &Counts) -> Vec<PolicySummary> {
    let mut policies: BTreeMap<String, PerFamily<Option<Treatment>>> = BTreeMap::new();
    for (key, value) in &firewall.elements {
        let parts = (key.set(), key.value(), value.data);
        if let (Set::Steer(family), KeyValue::Tag(policy), Data::Tag(action)) = parts {
            let families = policies.entry(comment(&value)).or_default();
            let count = counts.policies.get(&(family, policy)).copied();
            *families.of(family) =
                Some(Treatment { count, ..treatment(firewall, family, policy, action) });
        }
    }
    policies.into_iter().map(|(id, families)| PolicySummary { id, families }).collect()
}

fn treatment(firewall: &Firewall, family: Family, policy: Tag, action: Tag) -> Treatment {
    let mut treatment = Treatment { action: "deny", gateway: None, egress_ip: None, count: None };
    let elements = &firewall.elements;
    match elements.get(&Key::policy_action(action)) {
        Some(Value { data: Data::Verdict(Verdict::Goto(ChainId::LocalGateway)), .. }) => {
            treatment.action = "local";
            let snat = elements.get(&Key::snat(family, policy)).map(|value| value.data);
            treatment.egress_ip = match snat {
                Some(Data::Address(address)) => Some(address.to_string()),
                _ if elements.contains_key(&Key::masquerade(family, policy)) => Some("node".into()),
                _ => None,
            };
        }
        Some(Value { data: Data::Verdict(Verdict::Goto(ChainId::Bypass)), .. }) => {
            treatment.action = "bypass";
        }
        Some(value @ Value { data: Data::Verdict(Verdict::Goto(_)), .. }) => {
            treatment.action = "gateway";
            treatment.gateway = Some(comment(&value));
        }
        _ => {}
    }
    treatment
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.summary(&Counts::new()).fmt(f)
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.link {
            None => writeln!(f, "link: none")?,
            Some(link) => {
                let state = if link.up { "up" } else { "down" };
                write!(f, "link: {} {state} vni {} port {} ", link.name, link.vni, link.port)?;
                write!(f, "local {} ", link.local)?;
                if let Some(underlay) = &link.underlay_device {
                    write!(f, "dev {underlay} ")?;
                }
                writeln!(f, "mac {} mtu {} {}", link.mac, link.mtu, link.addresses.join(" "))?;
            }
        }
        for Gateway { node, mark, table } in &self.gateways {
            let table = table.map_or("none".into(), |table| table.to_string());
            writeln!(f, "gateway: {node} mark {mark} table {table}")?;
        }
        for ClaimSummary { egress_ip, device } in &self.claims {
            writeln!(f, "claim: {egress_ip} dev {device}")?;
        }
        for PolicySummary { id, families } in &self.policies {
            for (family, treatment) in families.each() {
                let Some(treatment) = treatment else { continue };
                write!(f, "policy: {id} {family} {}", treatment.action)?;
                if let Some(gateway) = &treatment.gateway {
                    write!(f, " {gateway}")?;
                }
                if let Some(egress_ip) = &treatment.egress_ip {
                    write!(f, " as {egress_ip}")?;
                }
                if let Some(Count { packets, bytes }) = treatment.count {
                    write!(f, ", {packets} packets {bytes} bytes")?;
                }
                writeln!(f)?;
            }
        }
        for (family, Sources { addresses, ranges }) in self.sources.each() {
            writeln!(f, "sources: {family} {addresses} addresses, {ranges} ranges")?;
        }
        for (chain, Count { packets, bytes }) in &self.drops {
            writeln!(f, "dropped: chain {chain} {packets} packets {bytes} bytes")?;
        }
        for IptablesSummary { variant, chains, rules, ipsets } in &self.iptables {
            let (name, members) = (variant.command(Family::V4), ipsets.values().sum::<usize>());
            write!(f, "{name}: {chains} chains, {rules} rules, ")?;
            writeln!(f, "{} sets of {members} members", ipsets.len())?;
        }
        Ok(())
    }
}
