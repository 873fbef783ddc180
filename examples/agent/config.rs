//! The configuration file, and its conversion to a cluster and policies.

use std::fmt::Display;
use std::net::IpAddr;
use std::str::FromStr;

use egress_datapath::{
    Backend, Cluster, Destinations, DeviceName, EgressIp, EgressPolicy, MacAddr, Mark, MarkLayout,
    Node, NodeName, PlanError, PolicyError, PolicyId, Steering, TableRange, Tunnel, Unavailable,
};
use ipnet::IpNet;
use serde::Deserialize;
use serde::de::{Deserializer, Error};

/// Configuration of this node.
pub(crate) struct Config {
    pub(crate) cluster: Cluster,
    pub(crate) policies: Vec<EgressPolicy>,
    pub(crate) tables: TableRange,
}

impl Config {
    /// Parses the text of the file with this name.
    ///
    /// An error is one sentence that names the field and its value.
    pub(crate) fn parse(node: NodeName, file: &str, text: &str) -> Result<Self, String> {
        let mut json = serde_json::Deserializer::from_str(text);
        let form: File = serde_path_to_error::deserialize(&mut json).map_err(|error| {
            let path = match error.path().to_string() {
                // A syntax error belongs to no field.
                _ if error.inner().is_syntax() || error.inner().is_eof() => String::new(),
                path if path == "." => String::new(),
                path => format!("{path}: "),
            };
            place(file, &path, error.inner())
        })?;
        json.end().map_err(|error| place(file, "", &error))?;
        Ok(form.into_config(node))
    }

    /// Returns the field that caused a planning error.
    pub(crate) fn field_of(&self, error: &PlanError) -> String {
        let field = match error {
            PlanError::UnknownNode { .. } => "--node",
            PlanError::Vni { .. } => "tunnel.vni",
            PlanError::Port => "tunnel.port",
            PlanError::Mtu { .. } => "tunnel.underlay_device",
            PlanError::RulePriority { .. } => "rule_priority",
            PlanError::CachedCounters | PlanError::IptablesCounters => "policy_counters",
            PlanError::NothingExcluded | PlanError::Excluded { .. } => "excluded",
            PlanError::EgressHookPrefix | PlanError::EgressHookBackend => "steering",
            PlanError::Mark(_) => "marks",
            PlanError::Table(_) => "tables",
            PlanError::DuplicatePolicy { .. } => "policies",
            PlanError::Policy { policy, source } => {
                let at = self.policies.iter().position(|other| other.id == *policy);
                let at = at.unwrap_or_default();
                let sources = self.policies.get(at).map(|policy| policy.sources.as_slice());
                let field = match source {
                    PolicyError::HostBits { net, .. } | PolicyError::Mapped { net } => {
                        let is_source = sources.is_some_and(|sources| sources.contains(net));
                        if is_source { ".sources" } else { ".destinations" }
                    }
                    PolicyError::NoSources => ".sources",
                    PolicyError::NoDestinations => ".destinations",
                    PolicyError::UnknownGateway { .. } => ".gateway",
                    PolicyError::EgressIpNotUnicast { .. }
                    | PolicyError::EgressIpExcluded { .. }
                    | PolicyError::EgressIpOfNode { .. } => ".egress_ip",
                    _ => "",
                };
                return format!("policies[{at}]{field}");
            }
            _ => "nodes",
        };
        field.into()
    }

    /// Returns the underlay address of this node that the tunnel uses, and its field.
    pub(crate) fn underlay(&self) -> Option<(IpAddr, String)> {
        let nodes = self.cluster.nodes.iter().enumerate();
        let (at, here) = nodes.into_iter().find(|(_, node)| node.name == self.cluster.node)?;
        let addresses = here.underlay.iter().enumerate();
        let (place, address) = addresses.min_by_key(|(_, address)| address.is_ipv6())?;
        Some((*address, format!("nodes[{at}].underlay[{place}]")))
    }
}

/// Returns an error message with file, line, column and field in front.
fn place(file: &str, path: &str, error: &serde_json::Error) -> String {
    let (line, column) = (error.line(), error.column());
    let text = error.to_string();
    let suffix = format!(" at line {line} column {column}");
    let sentence = text.strip_suffix(&suffix).unwrap_or(&text);
    printable(&format!("{file}:{line}:{column}: {path}{sentence}"))
}

/// Escapes control characters: messages contain keys of the file.
fn printable(text: &str) -> String {
    let mut line = String::with_capacity(text.len());
    for character in text.chars() {
        if character.is_control() {
            line.extend(character.escape_default());
        } else {
            line.push(character);
        }
    }
    line
}

#[derive(Deserialize)]
#[serde(rename = "the file", deny_unknown_fields)]
struct File {
    excluded: Vec<Text<Prefix>>,
    #[serde(default)]
    tunnel: TunnelForm,
    #[serde(default)]
    marks: MarkLayout,
    #[serde(default)]
    tables: TableRange,
    rule_priority: Option<u32>,
    #[serde(default)]
    connection_caching: bool,
    #[serde(default)]
    policy_counters: bool,
    #[serde(default)]
    steering: Steering,
    nodes: Vec<NodeForm>,
    policies: Vec<PolicyForm>,
}

#[derive(Default, Deserialize)]
#[serde(rename = "a tunnel", deny_unknown_fields)]
struct TunnelForm {
    device: Option<Text<DeviceName>>,
    vni: Option<u32>,
    port: Option<u16>,
    underlay_device: Option<Text<DeviceName>>,
}

#[derive(Deserialize)]
#[serde(rename = "a node", deny_unknown_fields)]
struct NodeForm {
    name: Text<NodeName>,
    underlay: Vec<Text<IpAddr>>,
    tunnel: Vec<Text<Prefix>>,
    mac: Option<MacAddr>,
    mark: Option<Mark>,
}

#[derive(Deserialize)]
#[serde(rename = "a policy", deny_unknown_fields)]
struct PolicyForm {
    id: Text<PolicyId>,
    #[serde(default)]
    priority: u32,
    sources: Vec<Text<Hosts>>,
    #[serde(default)]
    destinations: Option<Vec<Text<Hosts>>>,
    gateway: Option<Text<NodeName>>,
    egress_ip: EgressIp,
    #[serde(default)]
    unavailable: Unavailable,
}

impl File {
    fn into_config(self, node: NodeName) -> Config {
        let fallback = Tunnel::default();
        let cluster = Cluster {
            node,
            nodes: self.nodes.into_iter().map(NodeForm::into_node).collect(),
            excluded: self.excluded.into_iter().map(|net| net.0.0).collect(),
            tunnel: Tunnel {
                device: self.tunnel.device.map_or(fallback.device, |device| device.0),
                vni: self.tunnel.vni.unwrap_or(fallback.vni),
                port: self.tunnel.port.unwrap_or(fallback.port),
                underlay_device: self.tunnel.underlay_device.map(|device| device.0),
                underlay_mtu: fallback.underlay_mtu,
            },
            marks: self.marks,
            rule_priority: self.rule_priority.unwrap_or(Cluster::RULE_PRIORITY),
            connection_caching: self.connection_caching,
            policy_counters: self.policy_counters,
            backend: Backend::default(),
            steering: self.steering,
        };
        Config {
            cluster,
            policies: self.policies.into_iter().map(PolicyForm::into_policy).collect(),
            tables: self.tables,
        }
    }
}

impl NodeForm {
    fn into_node(self) -> Node {
        Node {
            name: self.name.0,
            underlay: self.underlay.into_iter().map(|address| address.0).collect(),
            tunnel: self.tunnel.into_iter().map(|net| net.0.0).collect(),
            mac: self.mac,
            mark: self.mark,
        }
    }
}

impl PolicyForm {
    fn into_policy(self) -> EgressPolicy {
        let nets = |nets: Vec<Text<Hosts>>| nets.into_iter().map(|net| net.0.0).collect();
        let destinations = self.destinations.filter(|listed| !listed.is_empty());
        EgressPolicy {
            id: self.id.0,
            priority: self.priority,
            sources: nets(self.sources),
            destinations: destinations
                .map_or(Destinations::External, |listed| Destinations::Nets(nets(listed))),
            gateway: self.gateway.map(|gateway| gateway.0),
            egress_ip: self.egress_ip,
            unavailable: self.unavailable,
        }
    }
}

/// A value that is a string in the file; an error quotes the string.
struct Text<T>(T);

impl<'de, T: FromStr<Err: Display>> Deserialize<'de> for Text<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let parsed = text.parse().map(Self);
        parsed.map_err(|error| D::Error::custom(format_args!("{text:?}: {error}")))
    }
}

/// A prefix with a prefix length.
struct Prefix(IpNet);

impl FromStr for Prefix {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (address, length) =
            text.split_once('/').ok_or("a prefix needs a length, such as 10.244.0.0/16")?;
        let address: IpAddr = address.parse().map_err(|_| NO_ADDRESS)?;
        // `u8` parses a sign and leading zeros.
        let plain = length == "0" || !length.starts_with(['0', '+']);
        let net = length
            .parse()
            .ok()
            .filter(|_| plain)
            .and_then(|length| IpNet::new(address, length).ok());
        let most = if address.is_ipv4() { 32 } else { 128 };
        let error = || format!("{length:?} is not a prefix length of 0 to {most}");
        net.map(Self).ok_or_else(error)
    }
}

/// A prefix, or an address as a prefix of full length.
struct Hosts(IpNet);

impl FromStr for Hosts {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.contains('/') {
            return text.parse().map(|Prefix(net)| Self(net));
        }
        let address: IpAddr = text.parse().map_err(|_| NO_ADDRESS)?;
        Ok(Self(address.into()))
    }
}

/// Leading zeros are refused because some parsers read octal numbers.
const NO_ADDRESS: &str = "not an IP address, which has no leading zeros";
