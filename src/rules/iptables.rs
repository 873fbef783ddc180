//! What we keep in iptables: chains of our own, and the jumps to them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use super::ipset::Ipset;
use super::stmt::{Direction, MarkBits};
use crate::types::{DeviceName, Family, Mark};

/// Which of the two implementations of iptables: both may have rules on one host, and then both
/// act.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "lowercase"))]
pub enum Variant {
    /// The kernel's `ip_tables`.
    Legacy,
    /// nf_tables through its compatibility layer.
    Nft,
}

impl Variant {
    /// Both.
    pub const BOTH: [Self; 2] = [Self::Legacy, Self::Nft];

    /// The name of the command for a family, as distributions install it beside `iptables`.
    pub const fn command(self, family: Family) -> &'static str {
        match (self, family) {
            (Self::Legacy, Family::V4) => "iptables-legacy",
            (Self::Legacy, Family::V6) => "ip6tables-legacy",
            (Self::Nft, Family::V4) => "iptables-nft",
            (Self::Nft, Family::V6) => "ip6tables-nft",
        }
    }
}

/// Our part of the rules of one variant of iptables, both families.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Xtables {
    /// Chains of ours and their rules.
    pub chains: BTreeMap<XtChain, Vec<XtRule>>,
    /// By built-in chain the rules that lead to ours, each with its place, counted from 1.
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
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Filter, Self::Nat, Self::Mangle];

    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Filter => "filter",
            Self::Nat => "nat",
            Self::Mangle => "mangle",
        }
    }
}

/// A chain of one family and table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct XtChain {
    /// The family.
    pub family: Family,
    /// The table.
    pub table: XtTable,
    /// Which one.
    pub name: XtName,
}

/// The name of a chain, built in or ours.
///
/// Ours begin with `EGRESSGATEWAY-`, four of them with the names that operators of spidernet's
/// egressgateway know; on a node only one of the two can run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum XtName {
    /// Built in.
    Prerouting,
    /// Built in.
    Input,
    /// Built in.
    Forward,
    /// Built in.
    Output,
    /// Built in.
    Postrouting,
    /// Gives the packets of policies their mark, before routing and before destination NAT. Only
    /// what comes from a selected source and not out of the tunnel is sent here.
    MarkRequest,
    /// Takes the mark off before encapsulation; stops what is marked but not tunnelled.
    ResetMark,
    /// Keeps strangers out of the tunnel and services off the egress IPs.
    Guard,
    /// Looks at how connections that are open were translated.
    CheckSnat,
    /// Accepts what is ours where the host's default is to drop.
    KeepMark,
    /// Accepts the tunnel's own packets where the host's default is to drop.
    Tunnel,
    /// Keeps others from translating what enters the tunnel.
    NoSnat,
    /// Translates.
    SnatEip,
    /// Way out: translate it here.
    Here,
    /// Way out: leave it alone.
    Clear,
    /// Way out: drop it where it leaves, if it does.
    Closed,
    /// Way out: the gateway with this mark.
    To(Mark),
}

impl XtName {
    /// The chain with this name; `None` for chains of others.
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
                "GUARD" => Self::Guard,
                "CHECK-SNAT" => Self::CheckSnat,
                "KEEP-MARK" => Self::KeepMark,
                "TUNNEL" => Self::Tunnel,
                "NO-SNAT" => Self::NoSnat,
                "SNAT-EIP" => Self::SnatEip,
                "HERE" => Self::Here,
                "CLEAR" => Self::Clear,
                "CLOSED" => Self::Closed,
                rest => {
                    let digits = rest.strip_prefix("TO-")?;
                    let chain = Self::To(Mark::new(u32::from_str_radix(digits, 16).ok()?));
                    return (chain.to_string() == name).then_some(chain);
                }
            },
        })
    }

    /// Whether the kernel has it anyway.
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
            Self::Guard => "EGRESSGATEWAY-GUARD",
            Self::CheckSnat => "EGRESSGATEWAY-CHECK-SNAT",
            Self::KeepMark => "EGRESSGATEWAY-KEEP-MARK",
            Self::Tunnel => "EGRESSGATEWAY-TUNNEL",
            Self::NoSnat => "EGRESSGATEWAY-NO-SNAT",
            Self::SnatEip => "EGRESSGATEWAY-SNAT-EIP",
            Self::Here => "EGRESSGATEWAY-HERE",
            Self::Clear => "EGRESSGATEWAY-CLEAR",
            Self::Closed => "EGRESSGATEWAY-CLOSED",
            Self::To(mark) => return write!(f, "EGRESSGATEWAY-TO-{:08x}", mark.get()),
        };
        f.write_str(name)
    }
}

/// A rule: what a packet must have, what is done with it, and what it is for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct XtRule {
    /// All of them must hold; none has an effect, so that their order has no meaning.
    pub matches: BTreeSet<XtMatch>,
    /// What is done.
    pub target: XtTarget,
    /// For the reader; may be empty. Iptables cuts what is longer than 255 bytes.
    pub comment: Box<str>,
}

/// What a packet must have.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum XtMatch {
    /// `-i device`
    InputDevice(Is, DeviceName),
    /// `-o device`
    OutputDevice(DeviceName),
    /// `-p udp --dport port`
    UdpPort(u16),
    /// `-p ipv6-icmp --icmpv6-type type`
    Icmp6Type(u8),
    /// `--mark value/mask`
    Mark(Is, MarkBits),
    /// `--mark value/mask` of the connection
    Connmark(Is, MarkBits),
    /// `--ctdir`
    Direction(Direction),
    /// `--ctstate`: one of these
    State(Is, CtState),
    /// `--ctstatus CONFIRMED`: not the first packet of its connection
    Confirmed(Is),
    /// `--match-set`
    Set(Is, Ipset, Side),
}

/// Whether a match is inverted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Is {
    /// It must hold.
    So,
    /// It must not.
    Not,
}

/// Which address is looked up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Side {
    /// The source.
    Src,
    /// The destination.
    Dst,
}

/// States of a connection that our rules look for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum CtState {
    /// `INVALID`
    Invalid,
    /// `INVALID,UNTRACKED`
    InvalidOrUntracked,
    /// `SNAT`: the source is translated.
    Snat,
}

impl CtState {
    #[cfg(all(feature = "kernel", target_os = "linux"))]
    pub(crate) const ALL: [Self; 3] = [Self::Invalid, Self::InvalidOrUntracked, Self::Snat];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Invalid => "INVALID",
            Self::InvalidOrUntracked => "INVALID,UNTRACKED",
            Self::Snat => "SNAT",
        }
    }
}

/// What is done with a packet.
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
    /// `NETMAP --to` everything: binds the connection to its own source, so nobody masquerades it
    Netmap(Family),
    /// `NFQUEUE` to a queue that nobody reads, which drops; `DROP` is refused in the nat table.
    Sink,
    /// `-j chain`
    Jump(XtName),
    /// `-g chain`
    Goto(XtName),
    /// Something found that we never write, as it is written.
    Unknown(Box<str>),
}

/// The queue that [`XtTarget::Sink`] names.
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
            Self::Icmp6Type(kind) => write!(f, "-p ipv6-icmp -m icmp6 --icmpv6-type {kind}"),
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
    /// The rule as `iptables` takes it, behind the chain's name.
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
            XtTarget::Sink => write!(f, "-j NFQUEUE --queue-num {SINK_QUEUE}"),
            XtTarget::Jump(chain) => write!(f, "-j {chain}"),
            XtTarget::Goto(chain) => write!(f, "-g {chain}"),
            XtTarget::Unknown(_) => Ok(()),
        }
    }
}

/// A word in double quotes, as `iptables-restore` reads it, and a shell too: our own comments have
/// nothing in them that it would expand.
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

/// A change to one chain; places count from 1.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum XtEdit {
    /// Appends a rule to a chain of ours.
    Append(XtRule),
    /// Inserts a rule at a place of a chain of ours, or of a built-in one.
    Insert(usize, XtRule),
    /// Deletes the rule at a place of a chain of ours.
    Delete(usize),
    /// Deletes a rule of a built-in chain by what it says: others may have moved it meanwhile.
    Remove(XtRule),
}
