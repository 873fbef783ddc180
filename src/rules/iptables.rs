//! Our iptables objects: our own chains, and the jumps to them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use super::ipset::Ipset;
use super::stmt::{Direction, Field, MarkBits, Stmt};
use crate::types::{DeviceName, Family, Mark};

/// One of the two implementations of iptables.
///
/// Both may have rules on one host, and then both act on packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "lowercase"))]
pub enum Variant {
    /// The kernel's `ip_tables`.
    Legacy,
    /// nf_tables through the iptables compatibility layer.
    Nft,
}

impl Variant {
    /// Both variants.
    pub const BOTH: [Self; 2] = [Self::Legacy, Self::Nft];

    /// The command name for a family, as distributions install it beside `iptables`.
    pub const fn command(self, family: Family) -> &'static str {
        match (self, family) {
            (Self::Legacy, Family::V4) => "iptables-legacy",
            (Self::Legacy, Family::V6) => "ip6tables-legacy",
            (Self::Nft, Family::V4) => "iptables-nft",
            (Self::Nft, Family::V6) => "ip6tables-nft",
        }
    }
}

/// Our chains and jumps in one variant of iptables, both families.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Xtables {
    /// Our chains and their rules.
    pub chains: BTreeMap<XtChain, Vec<XtRule>>,
    /// Rules in built-in chains that jump to our chains, each with its position, counted from 1.
    pub jumps: BTreeMap<XtChain, Vec<(usize, XtRule)>>,
}

/// A table of iptables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum XtTable {
    /// `filter`
    Filter,
    /// `nat`
    Nat,
    /// `mangle`
    Mangle,
}

impl XtTable {
    /// All tables that this crate uses.
    pub const ALL: [Self; 3] = [Self::Filter, Self::Nat, Self::Mangle];

    /// The table's name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Filter => "filter",
            Self::Nat => "nat",
            Self::Mangle => "mangle",
        }
    }
}

/// A chain, identified by family, table and name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct XtChain {
    /// The family.
    pub family: Family,
    /// The table.
    pub table: XtTable,
    /// The chain's name.
    pub name: XtName,
}

/// The name of a built-in chain or of a chain of our own.
///
/// Our names begin with `EGRESSGATEWAY-`. Four of them are names that operators of spidernet's
/// egressgateway know; only one of the two programs can run on a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum XtName {
    /// Built-in chain `PREROUTING`.
    Prerouting,
    /// Built-in chain `INPUT`.
    Input,
    /// Built-in chain `FORWARD`.
    Forward,
    /// Built-in chain `OUTPUT`.
    Output,
    /// Built-in chain `POSTROUTING`.
    Postrouting,
    /// Sets the mark on packets that policies take, before routing and before destination NAT.
    ///
    /// Only packets from a selected source that do not come from the tunnel are sent to this chain.
    MarkRequest,
    /// Clears the mark before encapsulation; drops marked packets that do not enter the tunnel.
    ResetMark,
    /// Lowers the MSS of segments to pods whose own segments use the tunnel.
    ClampMss,
    /// Drops tunnel packets of unknown senders.
    Guard,
    /// Packets to an egress IP: drops those that neither a connection nor a socket expects.
    EgressIp,
    /// Checks the source translation of open connections.
    CheckSnat,
    /// Accepts our packets where the host's default is to drop.
    KeepMark,
    /// Accepts the tunnel's outer packets where the host's default is to drop.
    Tunnel,
    /// Prevents other rules from translating packets that enter the tunnel.
    NoSnat,
    /// Source NAT to the egress IPs.
    SnatEip,
    /// Action: translate the packet on this node.
    Local,
    /// Action: leave the packet unchanged.
    Clear,
    /// Action: drop the packet where it would leave the node, if it does.
    Denied,
    /// Action: steer the packet to the gateway with this mark.
    To(Mark),
}

impl XtName {
    /// The chain with this name; `None` for chains of other programs.
    pub fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "PREROUTING" => Self::Prerouting,
            "INPUT" => Self::Input,
            "FORWARD" => Self::Forward,
            "OUTPUT" => Self::Output,
            "POSTROUTING" => Self::Postrouting,
            _ => match name.strip_prefix("EGRESSGATEWAY-")? {
                "MARK-REQUEST" => Self::MarkRequest,
                "RESET-MARK" => Self::ResetMark,
                "CLAMP-MSS" => Self::ClampMss,
                "GUARD" => Self::Guard,
                "EIP" => Self::EgressIp,
                "CHECK-SNAT" => Self::CheckSnat,
                "KEEP-MARK" => Self::KeepMark,
                "TUNNEL" => Self::Tunnel,
                "NO-SNAT" => Self::NoSnat,
                "SNAT-EIP" => Self::SnatEip,
                "LOCAL" => Self::Local,
                "CLEAR" => Self::Clear,
                "DENIED" => Self::Denied,
                rest => {
                    let digits = rest.strip_prefix("TO-")?;
                    let chain = Self::To(Mark::new(u32::from_str_radix(digits, 16).ok()?));
                    return (chain.to_string() == name).then_some(chain);
                }
            },
        })
    }

    /// Whether the kernel creates the chain itself.
    pub const fn is_built_in(self) -> bool {
        matches!(
            self,
            Self::Prerouting | Self::Input | Self::Forward | Self::Output | Self::Postrouting
        )
    }
}

impl fmt::Display for XtName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self {
            Self::Prerouting => "PREROUTING",
            Self::Input => "INPUT",
            Self::Forward => "FORWARD",
            Self::Output => "OUTPUT",
            Self::Postrouting => "POSTROUTING",
            Self::MarkRequest => "EGRESSGATEWAY-MARK-REQUEST",
            Self::ResetMark => "EGRESSGATEWAY-RESET-MARK",
            Self::ClampMss => "EGRESSGATEWAY-CLAMP-MSS",
            Self::Guard => "EGRESSGATEWAY-GUARD",
            Self::EgressIp => "EGRESSGATEWAY-EIP",
            Self::CheckSnat => "EGRESSGATEWAY-CHECK-SNAT",
            Self::KeepMark => "EGRESSGATEWAY-KEEP-MARK",
            Self::Tunnel => "EGRESSGATEWAY-TUNNEL",
            Self::NoSnat => "EGRESSGATEWAY-NO-SNAT",
            Self::SnatEip => "EGRESSGATEWAY-SNAT-EIP",
            Self::Local => "EGRESSGATEWAY-LOCAL",
            Self::Clear => "EGRESSGATEWAY-CLEAR",
            Self::Denied => "EGRESSGATEWAY-DENIED",
            Self::To(mark) => return write!(f, "EGRESSGATEWAY-TO-{:08x}", mark.get()),
        };
        f.write_str(name)
    }
}

/// An iptables rule: matches, target and comment.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct XtRule {
    /// Matches that must all hold; their order is irrelevant, because a match has no effect.
    pub matches: BTreeSet<XtMatch>,
    /// The target of the rule.
    pub target: XtTarget,
    /// Comment for the operator; may be empty. Iptables truncates it beyond 255 bytes.
    pub comment: Box<str>,
}

/// A match of an iptables rule.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum XtMatch {
    /// `-i device`
    InputDevice(Is, DeviceName),
    /// `-o device`
    OutputDevice(DeviceName),
    /// `-p udp --dport port`
    UdpPort(u16),
    /// `-p udp`
    Udp,
    /// `-p tcp ! --tcp-flags SYN,ACK SYN`: the segment is not the first one of a connection
    OpensNothing,
    /// `-p tcp --tcp-flags SYN SYN`: only such segments have an MSS option
    Syn,
    /// `-m socket`: a socket takes the packet that is connected or bound to the address
    Socket,
    /// `-m socket --nowildcard`: the same, or a socket that is bound to no address
    AnySocket,
    /// `--mark value/mask`
    Mark(Is, MarkBits),
    /// `--mark value/mask` of the connection
    Connmark(Is, MarkBits),
    /// `--ctdir`
    Direction(Direction),
    /// `--ctstate`: any of these states
    State(Is, CtState),
    /// `--ctstatus CONFIRMED`: the packet is not the first of its connection
    Confirmed(Is),
    /// `--match-set`
    Set(Is, Ipset, Side),
}

/// Whether a match is inverted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Is {
    /// The match must hold.
    So,
    /// The match must not hold (`!`).
    Not,
}

/// The address of a packet that is looked up in a set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Side {
    /// The source address.
    Src,
    /// The destination address.
    Dst,
}

/// Connection states that our rules match.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum CtState {
    /// `INVALID`
    Invalid,
    /// `INVALID,UNTRACKED`
    InvalidOrUntracked,
    /// `RELATED,ESTABLISHED,UNTRACKED`
    KnownOrUntracked,
    /// `SNAT`: the source is translated.
    Snat,
}

impl CtState {
    #[cfg(all(feature = "kernel", target_os = "linux"))]
    pub(crate) const ALL: [Self; 4] =
        [Self::Invalid, Self::InvalidOrUntracked, Self::KnownOrUntracked, Self::Snat];

    /// The field of a packet in which nf_tables has the state.
    pub(crate) const fn field(self) -> Field {
        match self {
            Self::Invalid | Self::InvalidOrUntracked | Self::KnownOrUntracked => Field::CtState,
            Self::Snat => Field::CtStatus,
        }
    }

    /// The bits of the field, any of which is the state.
    pub(crate) const fn bits(self) -> u32 {
        match self {
            Self::Invalid => Stmt::INVALID,
            Self::InvalidOrUntracked => Stmt::INVALID | Stmt::UNTRACKED,
            Self::KnownOrUntracked => Stmt::ESTABLISHED | Stmt::RELATED | Stmt::UNTRACKED,
            Self::Snat => Stmt::SNAT,
        }
    }

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Invalid => "INVALID",
            Self::InvalidOrUntracked => "INVALID,UNTRACKED",
            Self::KnownOrUntracked => "RELATED,ESTABLISHED,UNTRACKED",
            Self::Snat => "SNAT",
        }
    }
}

/// A target of an iptables rule.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum XtTarget {
    /// `ACCEPT`
    Accept,
    /// `DROP`
    Drop,
    /// `RETURN`
    Return,
    /// `MARK --set-xmark value/mask`
    SetMark(MarkBits),
    /// `CONNMARK --set-xmark value/mask`
    SetConnmark(MarkBits),
    /// `SET --map-set set src --map-mark`
    MapMark(Ipset),
    /// `SNAT --to-source address`
    Snat(IpAddr),
    /// `MASQUERADE`
    Masquerade,
    /// `NETMAP --to` all addresses: maps the connection to its own source, which blocks masquerades
    Netmap(Family),
    /// `TCPMSS --set-mss size`, in bytes: lowers the MSS of a segment
    ClampMss(u16),
    /// `NFQUEUE` to a queue without a reader, which drops; the nat table refuses `DROP`.
    Sink,
    /// `-j chain`
    Jump(XtName),
    /// `-g chain`
    Goto(XtName),
    /// A rule in the kernel that this crate never writes, as its text.
    Unknown(Box<str>),
}

/// The queue number of [`XtTarget::Sink`].
pub(crate) const SINK_QUEUE: u16 = 65_535;

pub(crate) const fn everything(family: Family) -> &'static str {
    match family {
        Family::V4 => "0.0.0.0/0",
        Family::V6 => "::/0",
    }
}

impl fmt::Display for Is {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if *self == Self::So { "" } else { "! " })
    }
}

impl fmt::Display for XtMatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InputDevice(is, name) => write!(f, "{is}-i {name}"),
            Self::OutputDevice(name) => write!(f, "-o {name}"),
            Self::UdpPort(port) => write!(f, "-p udp -m udp --dport {port}"),
            Self::Udp => f.write_str("-p udp"),
            Self::OpensNothing => f.write_str("-p tcp -m tcp ! --tcp-flags SYN,ACK SYN"),
            Self::Syn => f.write_str("-p tcp -m tcp --tcp-flags SYN SYN"),
            Self::Socket => f.write_str("-m socket"),
            Self::AnySocket => f.write_str("-m socket --nowildcard"),
            Self::Mark(is, bits) => write!(f, "-m mark {is}--mark {}", xmark(*bits)),
            Self::Connmark(is, bits) => write!(f, "-m connmark {is}--mark {}", xmark(*bits)),
            Self::Direction(Direction::Original) => f.write_str("-m conntrack --ctdir ORIGINAL"),
            Self::Direction(Direction::Reply) => f.write_str("-m conntrack --ctdir REPLY"),
            Self::State(is, state) => write!(f, "-m conntrack {is}--ctstate {}", state.name()),
            Self::Confirmed(is) => write!(f, "-m conntrack {is}--ctstatus CONFIRMED"),
            Self::Set(is, set, Side::Src) => write!(f, "-m set {is}--match-set {set} src"),
            Self::Set(is, set, Side::Dst) => write!(f, "-m set {is}--match-set {set} dst"),
        }
    }
}

fn xmark(MarkBits { mask, value }: MarkBits) -> String {
    format!("{value:#x}/{mask:#x}")
}

impl fmt::Display for XtRule {
    /// The rule in the syntax of `iptables-restore`, without the chain's name.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let XtTarget::Unknown(text) = &self.target {
            return f.write_str(text);
        }
        for one in &self.matches {
            write!(f, "{one} ")?;
        }
        if !self.comment.is_empty() {
            write!(f, "-m comment --comment {} ", quoted(&self.comment))?;
        }
        match &self.target {
            XtTarget::Accept => f.write_str("-j ACCEPT"),
            XtTarget::Drop => f.write_str("-j DROP"),
            XtTarget::Return => f.write_str("-j RETURN"),
            XtTarget::SetMark(bits) => write!(f, "-j MARK --set-xmark {}", xmark(*bits)),
            XtTarget::SetConnmark(bits) => write!(f, "-j CONNMARK --set-xmark {}", xmark(*bits)),
            XtTarget::MapMark(set) => write!(f, "-j SET --map-set {set} src --map-mark"),
            XtTarget::Snat(address) => write!(f, "-j SNAT --to-source {address}"),
            XtTarget::Masquerade => f.write_str("-j MASQUERADE"),
            XtTarget::Netmap(family) => write!(f, "-j NETMAP --to {}", everything(*family)),
            XtTarget::ClampMss(size) => write!(f, "-j TCPMSS --set-mss {size}"),
            XtTarget::Sink => write!(f, "-j NFQUEUE --queue-num {SINK_QUEUE}"),
            XtTarget::Jump(chain) => write!(f, "-j {chain}"),
            XtTarget::Goto(chain) => write!(f, "-g {chain}"),
            XtTarget::Unknown(_) => Ok(()),
        }
    }
}

/// Splits a line into words at blanks, with double quotes around words that contain some.
pub(crate) fn words(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    let (mut word, mut quoted, mut begun) = (String::new(), false, false);
    let mut characters = line.chars();
    while let Some(character) = characters.next() {
        match character {
            '"' => {
                quoted = !quoted;
                begun = true;
            }
            '\\' if quoted => word.extend(characters.next()),
            ' ' | '\t' if !quoted => {
                if begun {
                    words.push(std::mem::take(&mut word));
                }
                begun = false;
            }
            other => {
                word.push(other);
                begun = true;
            }
        }
    }
    if begun {
        words.push(word);
    }
    words
}

/// A word in double quotes, as `iptables-restore` reads it; a shell would expand it.
fn quoted(text: &str) -> String {
    let mut word = String::with_capacity(text.len() + 2);
    word.push('"');
    for character in text.chars() {
        match character {
            '"' | '\\' => word.extend(['\\', character]),
            other => word.push(other),
        }
    }
    word.push('"');
    word
}

/// An edit of one chain; positions count from 1.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum XtEdit {
    /// Appends a rule to a chain of our own.
    Append(XtRule),
    /// Inserts a rule at a position of our own or a built-in chain.
    Insert(usize, XtRule),
    /// Deletes the rule at a position of a chain of our own.
    Delete(usize),
    /// Deletes a rule of a built-in chain by its contents: another program may have moved it.
    Remove(XtRule),
}
