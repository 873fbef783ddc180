//! The configuration file, and its conversion to a cluster and policies.

use std::fmt::{self, Display};
use std::net::IpAddr;
use std::str::FromStr;

use egress_datapath::alloc::TableRange;
use egress_datapath::{
    Claim, Cluster, Destinations, DeviceName, EgressIp, EgressPolicy, MacAddr, Mark, MarkLayout,
    Node, NodeName, PlanError, PolicyId, Replies, Steering, Tunnel, Unavailable,
};
use ipnet::IpNet;
use serde::Deserialize;
use serde::de::{DeserializeOwned, Deserializer, Error, MapAccess, Visitor};
use serde_json::Value;
use serde_json::value::RawValue;

/// Configuration of this node.
pub(crate) struct Config {
    pub(crate) cluster: Cluster,
    /// The policies, with a closed one for each that cannot be read.
    pub(crate) policies: Vec<EgressPolicy>,
    pub(crate) unreadable: Vec<Unreadable>,
    pub(crate) tables: TableRange,
    /// The smallest MTU of the underlay among all nodes, if the file has it.
    pub(crate) underlay_mtu: Option<u32>,
}

/// The error of a policy that cannot be read.
#[derive(Debug)]
pub(crate) struct Unreadable {
    /// The id, or one made from the place in the list if the id cannot be read.
    pub(crate) policy: PolicyId,
    unavailable: Unavailable,
    /// File, line, column, field and reason.
    sentence: String,
}

impl Display for Unreadable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let treated = match self.unavailable {
            Unavailable::Bypass => "leaves its traffic unchanged",
            _ => "drops its traffic",
        };
        write!(f, "policy {} {treated}: {}", self.policy, self.sentence)
    }
}

impl Config {
    /// Parses the text of the file with this name.
    ///
    /// An error is one sentence that names the field and its value. A policy that cannot be read is
    /// no error of the file.
    pub(crate) fn parse(node: NodeName, file: &str, text: &str) -> Result<Self, String> {
        let mut json = serde_json::Deserializer::from_str(text);
        let form: File<'_> = serde_path_to_error::deserialize(&mut json).map_err(|error| {
            let path = match error.path().to_string() {
                // A syntax error belongs to no field.
                _ if error.inner().is_syntax() || error.inner().is_eof() => String::new(),
                path if path == "." => String::new(),
                path => format!("{path}: "),
            };
            place(file, &path, error.inner())
        })?;
        json.end().map_err(|error| place(file, "", &error))?;
        Ok(form.into_config(node, file, text))
    }

    /// Returns the field that caused a planning error.
    pub(crate) const fn field_of(error: &PlanError) -> &'static str {
        match error {
            PlanError::UnknownNode { .. } => "--node",
            PlanError::Vni { .. } => "tunnel.vni",
            PlanError::Port => "tunnel.port",
            PlanError::Mtu { .. } => "tunnel",
            PlanError::RulePriority { .. } => "rule_priority",
            PlanError::CachedCounters | PlanError::IptablesCounters => "policy_counters",
            PlanError::NothingExcluded | PlanError::Excluded { .. } => "excluded",
            PlanError::EgressHookPrefix | PlanError::EgressHookBackend => "steering",
            PlanError::TunnelRepliesPrefix | PlanError::TunnelRepliesBackend => "replies",
            PlanError::Claim { .. } | PlanError::ClaimDevice { .. } => "claims",
            PlanError::UnderlayOnlyDevice | PlanError::UnderlayOnlyBackend => {
                "tunnel.underlay_only"
            }
            PlanError::Mark(_) => "marks",
            PlanError::Table(_) => "tables",
            _ => "nodes",
        }
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
    place_at(file, path, error, (error.line(), error.column()))
}

fn place_at(
    file: &str,
    path: &str,
    error: &serde_json::Error,
    (line, column): (usize, usize),
) -> String {
    let text = error.to_string();
    let suffix = format!(" at line {} column {}", error.line(), error.column());
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
struct File<'a> {
    excluded: Vec<Text<Prefix>>,
    #[serde(default)]
    pods: Vec<Text<Prefix>>,
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
    #[serde(default)]
    replies: Replies,
    #[serde(default)]
    claims: Vec<Claim>,
    nodes: Vec<NodeForm>,
    #[serde(borrow)]
    policies: Vec<&'a RawValue>,
}

#[derive(Default, Deserialize)]
#[serde(rename = "a tunnel", deny_unknown_fields)]
struct TunnelForm {
    device: Option<Text<DeviceName>>,
    vni: Option<u32>,
    port: Option<u16>,
    underlay_device: Option<Text<DeviceName>>,
    #[serde(default)]
    underlay_only: bool,
    #[serde(default)]
    clamp_mss: bool,
    underlay_mtu: Option<u32>,
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

impl File<'_> {
    fn into_config(self, node: NodeName, file: &str, text: &str) -> Config {
        let nodes = self.nodes.into_iter().map(NodeForm::into_node).collect();
        let excluded = self.excluded.into_iter().map(|net| net.0.0).collect();
        let tunnel = Tunnel::default();
        let tunnel = Tunnel::default()
            .with_device(self.tunnel.device.map_or(tunnel.device, |device| device.0))
            .with_vni(self.tunnel.vni.unwrap_or(tunnel.vni))
            .with_port(self.tunnel.port.unwrap_or(tunnel.port))
            .with_underlay_device(self.tunnel.underlay_device.map(|device| device.0))
            .with_underlay_only(self.tunnel.underlay_only)
            .with_clamp_mss(self.tunnel.clamp_mss)
            .with_underlay_mtu(self.tunnel.underlay_mtu.unwrap_or(tunnel.underlay_mtu));
        let pods = self.pods.into_iter().map(|net| net.0.0).collect();
        let cluster = Cluster::new(node, nodes, excluded)
            .with_pods(pods)
            .with_tunnel(tunnel)
            .with_marks(self.marks)
            .with_rule_priority(self.rule_priority.unwrap_or(Cluster::RULE_PRIORITY))
            .with_connection_caching(self.connection_caching)
            .with_policy_counters(self.policy_counters)
            .with_steering(self.steering)
            .with_replies(self.replies)
            .with_claims(self.claims);
        let mut config = Config {
            cluster,
            policies: Vec::new(),
            unreadable: Vec::new(),
            tables: self.tables,
            underlay_mtu: self.tunnel.underlay_mtu,
        };
        let mut nameless = Vec::new();
        for (at, raw) in self.policies.iter().enumerate() {
            let sentence = match readable(raw) {
                Ok(form) => {
                    config.policies.push(form.into_policy());
                    continue;
                }
                Err(error) => {
                    let path = match error.path().to_string() {
                        path if path == "." => format!("policies[{at}]: "),
                        path => format!("policies[{at}].{path}: "),
                    };
                    let place = place_of(raw.get(), text, error.inner());
                    place_at(file, &path, error.inner(), place)
                }
            };
            let rough = Rough::of(raw);
            match rough.one("id") {
                Some(Text(id)) => config.close(rough.closed(id), sentence),
                None => nameless.push((at, rough, sentence)),
            }
        }
        for (at, rough, sentence) in nameless {
            let mut name = format!("policies/{at}");
            while config.policies.iter().any(|policy| policy.id.as_str() == name) {
                name.push('#');
            }
            // The characters are allowed, and too many of them are in no file.
            if let Ok(id) = PolicyId::new(name) {
                config.close(rough.closed(id), sentence);
            }
        }
        config
    }
}

/// Reads an entry of the list of policies.
fn readable(raw: &RawValue) -> Result<PolicyForm, serde_path_to_error::Error<serde_json::Error>> {
    serde_path_to_error::deserialize(&mut serde_json::Deserializer::from_str(raw.get()))
}

/// Returns the line and column in the file of an error in a part of its text.
fn place_of(part: &str, text: &str, error: &serde_json::Error) -> (usize, usize) {
    let start = part.as_ptr().addr().saturating_sub(text.as_ptr().addr());
    let before = text.get(..start).unwrap_or_default();
    let line = before.matches('\n').count() + error.line();
    let indent = before.rsplit('\n').next().map_or(0, str::len);
    (line, if error.line() == 1 { indent + error.column() } else { error.column() })
}

impl Config {
    /// Adds a closed policy in place of one that cannot be read.
    fn close(&mut self, closed: EgressPolicy, sentence: String) {
        let (policy, unavailable) = (closed.id.clone(), closed.unavailable);
        self.unreadable.push(Unreadable { policy, unavailable, sentence });
        self.policies.push(closed);
    }
}

/// The fields of a policy that cannot be read as a whole; a field may occur more than once.
struct Rough(Vec<(String, Value)>);

impl<'de> Deserialize<'de> for Rough {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Form;

        impl<'de> Visitor<'de> for Form {
            type Value = Rough;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Rough, A::Error> {
                let mut fields = Vec::new();
                while let Some(field) = map.next_entry()? {
                    fields.push(field);
                }
                Ok(Rough(fields))
            }
        }

        deserializer.deserialize_map(Form)
    }
}

impl Rough {
    fn of(raw: &RawValue) -> Self {
        serde_json::from_str(raw.get()).unwrap_or(Self(Vec::new()))
    }

    fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Value> {
        self.0.iter().filter(move |(field, _)| field == name).map(|(_, value)| value)
    }

    /// Returns the only value of a field, if it can be read.
    fn one<T: DeserializeOwned>(&self, name: &str) -> Option<T> {
        let mut all = self.all(name);
        let value = all.next().filter(|_| all.next().is_none())?;
        T::deserialize(value).ok()
    }

    /// Returns a closed policy of all sources that can be read.
    fn closed(&self, id: PolicyId) -> EgressPolicy {
        let sources = self.all("sources").flat_map(|value| match value {
            Value::Array(list) => list.as_slice(),
            other => std::slice::from_ref(other),
        });
        let sources = sources.filter_map(|source| source.as_str()?.parse().ok());
        let nets = |nets: Vec<Text<Hosts>>| nets.into_iter().map(|net| net.0.0).collect();
        let destinations: Option<Vec<_>> = self.one("destinations").flatten();
        let destinations = destinations.filter(|listed: &Vec<_>| !listed.is_empty());
        let destinations =
            destinations.map_or(Destinations::External, |listed| Destinations::Nets(nets(listed)));
        EgressPolicy::new(id, sources.map(|Hosts(net)| net).collect(), EgressIp::Node)
            // The first in order: what cannot be read must not let another policy take its packets.
            .with_priority(self.one("priority").unwrap_or_default())
            .with_destinations(destinations)
            .with_unavailable(self.one("unavailable").unwrap_or_default())
    }
}

impl NodeForm {
    fn into_node(self) -> Node {
        let underlay = self.underlay.into_iter().map(|address| address.0).collect();
        let tunnel = self.tunnel.into_iter().map(|net| net.0.0).collect();
        Node::new(self.name.0, underlay, tunnel).with_mac(self.mac).with_mark(self.mark)
    }
}

impl PolicyForm {
    fn into_policy(self) -> EgressPolicy {
        let nets = |nets: Vec<Text<Hosts>>| nets.into_iter().map(|net| net.0.0).collect();
        let destinations = self.destinations.filter(|listed| !listed.is_empty());
        let destinations =
            destinations.map_or(Destinations::External, |listed| Destinations::Nets(nets(listed)));
        EgressPolicy::new(self.id.0, nets(self.sources), self.egress_ip)
            .with_priority(self.priority)
            .with_destinations(destinations)
            .with_gateway(self.gateway.map(|gateway| gateway.0))
            .with_unavailable(self.unavailable)
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
