//! Output of the installed state, as text and as JSON.
//!
//! The field names of the JSON document are stable: fields may be added, but none is changed.

use std::collections::BTreeMap;
use std::io::{self, Write};

use egress_datapath::state::{
    ChainId, Data, Firewall, Key, RuleAction, Tag, Value, Variant, Verdict, Xtables,
};
use egress_datapath::{Count, Counts, Family, State};
use serde::Serialize;

/// The JSON document.
#[derive(Serialize)]
struct Document {
    /// The tunnel interface; null if there is none.
    link: Option<Link>,
    /// Nodes that this node sends packets to, sorted by name.
    gateways: Vec<Gateway>,
    /// Policies, sorted by id.
    policies: Vec<Policy>,
    sources: PerFamily<Sources>,
    /// Variants of iptables that contain rules of the datapath.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    iptables: Vec<Tables>,
}

#[derive(Serialize)]
struct Tables {
    /// `legacy` or `nft`.
    variant: Variant,
    chains: usize,
    rules: usize,
    /// Sets that the rules look up, with the number of their members.
    ipsets: BTreeMap<String, usize>,
}

#[derive(Serialize)]
struct Link {
    name: String,
    vni: u32,
    port: u16,
    /// Source address of the outer packets.
    local: String,
    /// Interface that carries the outer packets; null if none is configured.
    underlay_device: Option<String>,
    mac: String,
    mtu: u32,
    up: bool,
    /// Addresses inside the tunnel, with prefix length.
    addresses: Vec<String>,
}

#[derive(Serialize)]
struct Gateway {
    node: String,
    /// Firewall mark, such as `0x26000100`.
    mark: String,
    /// Routing table; null if no routing rule looks one up.
    table: Option<u32>,
}

#[derive(Serialize)]
struct Policy {
    id: String,
    /// Action for the traffic of each family; null for a family without sources.
    #[serde(flatten)]
    families: PerFamily<Option<Steered>>,
}

#[derive(Clone, Serialize)]
struct Steered {
    /// Action: `gateway` (steered), `local` (translated on this node), `deny` (dropped) or
    /// `bypass` (left unchanged).
    action: &'static str,
    /// Gateway node; null unless `action` is `gateway`.
    gateway: Option<String>,
    /// Egress IP, or `node` for the node's own address; null unless `action` is `local`.
    egress_ip: Option<String>,
    /// Counters `packets` and `bytes` of this node's pods; absent if policies are not counted.
    #[serde(flatten)]
    count: Option<Count>,
}

/// Numbers of elements that map sources to policies.
#[derive(Default, Serialize)]
struct Sources {
    addresses: usize,
    ranges: usize,
}

#[derive(Default, Serialize)]
struct PerFamily<T> {
    ipv4: T,
    ipv6: T,
}

impl<T> PerFamily<T> {
    fn of(&mut self, family: Family) -> &mut T {
        match family {
            Family::V4 => &mut self.ipv4,
            Family::V6 => &mut self.ipv6,
        }
    }
}

/// Writes the state as one JSON document.
pub(crate) fn json(state: &State, counts: &Counts) -> io::Result<()> {
    let mut out = io::stdout().lock();
    serde_json::to_writer_pretty(&mut out, &document(state, counts))?;
    writeln!(out)
}

/// Writes the state as text.
pub(crate) fn people(state: &State, counts: &Counts) -> io::Result<()> {
    let mut out = io::stdout().lock();
    let document = document(state, counts);
    match &document.link {
        None => writeln!(out, "link: none")?,
        Some(link) => {
            write!(out, "link: {} ", link.name)?;
            write!(out, "{} ", if link.up { "up" } else { "down" })?;
            write!(out, "vni {} port {} local {} ", link.vni, link.port, link.local)?;
            if let Some(underlay) = &link.underlay_device {
                write!(out, "dev {underlay} ")?;
            }
            writeln!(out, "mac {} mtu {} {}", link.mac, link.mtu, link.addresses.join(" "))?;
        }
    }
    for Gateway { node, mark, table } in &document.gateways {
        let table = table.map_or("none".into(), |table| table.to_string());
        writeln!(out, "gateway: {node} mark {mark} table {table}")?;
    }
    for Policy { id, families } in &document.policies {
        for (family, steered) in [("IPv4", &families.ipv4), ("IPv6", &families.ipv6)] {
            let Some(steered) = steered else { continue };
            write!(out, "policy: {id} {family} {}", steered.action)?;
            if let Some(gateway) = &steered.gateway {
                write!(out, " {gateway}")?;
            }
            if let Some(egress_ip) = &steered.egress_ip {
                write!(out, " as {egress_ip}")?;
            }
            if let Some(Count { packets, bytes }) = steered.count {
                write!(out, ", {packets} packets {bytes} bytes")?;
            }
            writeln!(out)?;
        }
    }
    for (family, Sources { addresses, ranges }) in
        [("IPv4", document.sources.ipv4), ("IPv6", document.sources.ipv6)]
    {
        writeln!(out, "sources: {family} {addresses} addresses, {ranges} ranges")?;
    }
    for Tables { variant, chains, rules, ipsets } in document.iptables {
        let (name, members) = (variant.command(Family::V4), ipsets.values().sum::<usize>());
        write!(out, "{name}: {chains} chains, {rules} rules, ")?;
        writeln!(out, "{} sets of {members} members", ipsets.len())?;
    }
    Ok(())
}

fn document(state: &State, counts: &Counts) -> Document {
    let link = state.link.as_ref().map(|link| Link {
        name: link.name.to_string(),
        vni: link.vni,
        port: link.port,
        local: link.local.to_string(),
        underlay_device: link.underlay.as_ref().map(ToString::to_string),
        mac: link.mac.to_string(),
        mtu: link.mtu,
        up: link.up,
        addresses: state.addresses.iter().map(ToString::to_string).collect(),
    });
    let mut document = Document {
        link,
        gateways: Vec::new(),
        policies: Vec::new(),
        sources: PerFamily::default(),
        iptables: state
            .xtables
            .iter()
            .map(|(variant, found)| tables(state, *variant, found))
            .collect(),
    };
    if let Some(firewall) = &state.firewall {
        for key in firewall.elements.keys() {
            match key {
                Key::Source(address) => {
                    document.sources.of(Family::of(address)).addresses += 1;
                }
                Key::SourceNet(range) => document.sources.of(range.family()).ranges += 1,
                _ => {}
            }
        }
        document.gateways = gateways(state, firewall);
        document.policies = policies(firewall, counts);
    }
    document
}

fn tables(state: &State, variant: Variant, found: &Xtables) -> Tables {
    let sets = state.ipsets.iter();
    Tables {
        variant,
        chains: found.chains.len(),
        rules: found.chains.values().map(Vec::len).sum(),
        ipsets: sets.map(|(set, held)| (set.to_string(), held.members.len())).collect(),
    }
}

fn comment(value: &Value) -> String {
    let comment = value.comment.as_ref();
    comment.map_or_else(|| "?".into(), |comment| comment.as_str().into())
}

fn gateways(state: &State, firewall: &Firewall) -> Vec<Gateway> {
    let mut gateways: Vec<_> = firewall
        .elements
        .values()
        .filter_map(|value| match value.data {
            Data::Verdict(Verdict::Goto(ChainId::To(mark))) => {
                let mut rules = state.rules.iter().filter(|rule| rule.mark == mark);
                let table = rules.find_map(|rule| match rule.action {
                    RuleAction::Lookup(table) => Some(table.get()),
                    RuleAction::Unreachable | RuleAction::Goto(_) => None,
                });
                Some(Gateway { node: comment(&value), mark: mark.to_string(), table })
            }
            _ => None,
        })
        .collect();
    gateways.sort_by(|one, other| one.node.cmp(&other.node));
    gateways
}

fn policies(firewall: &Firewall, counts: &Counts) -> Vec<Policy> {
    let mut policies: BTreeMap<String, PerFamily<Option<Steered>>> = BTreeMap::new();
    for (key, value) in &firewall.elements {
        if let (Key::Steer(family, policy), Data::Tag(action)) = (key, value.data) {
            let families = policies.entry(comment(&value)).or_default();
            let count = counts.get(&(family, policy)).copied();
            let steered = steered(firewall, family, policy, action);
            *families.of(family) = Some(Steered { count, ..steered });
        }
    }
    let policy = |(id, families)| Policy { id, families };
    policies.into_iter().map(policy).collect()
}

fn steered(firewall: &Firewall, family: Family, policy: Tag, action: Tag) -> Steered {
    let mut steered = Steered { action: "deny", gateway: None, egress_ip: None, count: None };
    let elements = &firewall.elements;
    match elements.get(&Key::PolicyAction(action)) {
        Some(Value { data: Data::Verdict(Verdict::Goto(ChainId::LocalGateway)), .. }) => {
            steered.action = "local";
            let worn = elements.get(&Key::Snat(family, policy)).map(|value| value.data);
            steered.egress_ip = match worn {
                Some(Data::Address(address)) => Some(address.to_string()),
                _ if elements.contains_key(&Key::Masquerade(family, policy)) => Some("node".into()),
                _ => None,
            };
        }
        Some(Value { data: Data::Verdict(Verdict::Goto(ChainId::Bypass)), .. }) => {
            steered.action = "bypass";
        }
        Some(value @ Value { data: Data::Verdict(Verdict::Goto(_)), .. }) => {
            steered.action = "gateway";
            steered.gateway = Some(comment(&value));
        }
        _ => {}
    }
    steered
}
