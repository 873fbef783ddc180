//! Kernel operations; `Display` prints each as the command that an operator would type.

mod iptables;

use std::borrow::Cow;
use std::fmt::{self, Write};
use std::net::IpAddr;

use ipnet::IpNet;

use crate::connection::Connection;
use crate::state::{
    Base, ChainId, FLOWTABLE, Ipset, IpsetContents, Key, LINK_ALIAS, LINK_GROUP, MarkBits, Member,
    NFT_TABLE, NftRule, PROTOCOL, Route, RouteKey, Rule, Set, Stray, StrayKind, StrayRouting,
    TableFamily, Value, Variant, Vxlan, XtChain, XtEdit,
};
use crate::types::{DeviceName, Family, MacAddr};

/// A kernel operation; `Display` prints it as the command that an operator would type.
///
/// The command is quoted for a shell.
///
/// Verbs are strict: an added object must not exist, a deleted object must exist. `Put` creates or
/// replaces. An operation for which this does not hold is refused, so that drift becomes visible.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Op {
    /// Creates the VXLAN device of the tunnel and sets it up.
    AddLink(Vxlan),
    /// Sets the changeable attributes of the VXLAN device.
    ///
    /// These are local address, underlay interface, MAC address, MTU, `rp_filter`, the up flag, and
    /// the attributes that all VXLAN devices of this crate have in common.
    SetLink(Vxlan),
    /// Deletes the VXLAN device, and with it its addresses, routes and neighbours.
    DeleteLink(DeviceName),
    /// Adds an address to the VXLAN device.
    AddAddress(DeviceName, IpNet),
    /// Deletes an address of the VXLAN device.
    DeleteAddress(DeviceName, IpNet),
    /// Adds an egress IP to an interface of the host, if no other host replies for it, and
    /// announces it.
    ClaimAddress(DeviceName, IpAddr),
    /// Deletes an egress IP of this crate from an interface of the host.
    ReleaseAddress(DeviceName, IpAddr),
    /// Creates or replaces an FDB entry: the node to which frames for a MAC address are sent.
    PutFdb(DeviceName, MacAddr, IpAddr),
    /// Deletes an FDB entry.
    DeleteFdb(DeviceName, MacAddr, IpAddr),
    /// Creates or replaces a neighbour: the MAC address of an IP address.
    PutNeighbour(DeviceName, IpAddr, MacAddr),
    /// Deletes a neighbour.
    DeleteNeighbour(DeviceName, IpAddr),
    /// Creates or replaces a route; a route via a gateway uses this device.
    PutRoute(DeviceName, RouteKey, Route),
    /// Deletes a route.
    DeleteRoute(DeviceName, RouteKey, Route),
    /// Adds a routing rule.
    AddRule(Rule),
    /// Deletes a routing rule, by all its attributes.
    DeleteRule(Rule),
    /// Deletes a route or a rule with this crate's protocol number that this crate did not create.
    DeleteStrayRouting(StrayRouting),
    /// Clears the dormant flag of a table, so that the kernel evaluates its chains again.
    WakeTable(TableFamily),
    /// Creates an nf_tables table of this crate.
    AddTable(TableFamily),
    /// Deletes an nf_tables table of this crate and everything in it.
    DeleteTable(TableFamily),
    /// Creates an empty set or map.
    AddSet(Set),
    /// Deletes a set or map.
    DeleteSet(Set),
    /// Creates the flowtable without devices.
    AddFlowtable,
    /// Creates a chain without rules; `None` for a chain that is not a base chain.
    AddChain(ChainId, Option<Base>),
    /// Deletes a chain and its rules.
    DeleteChain(ChainId),
    /// Replaces all rules of a chain.
    SetRules(ChainId, Vec<NftRule>),
    /// Adds an element.
    AddElement(Key, Value),
    /// Deletes an element.
    DeleteElement(Key, Value),
    /// Deletes all elements of a set or map.
    FlushSet(Set),
    /// Deletes an object in a table of this crate that this crate never creates.
    DeleteStray(TableFamily, Stray),
    /// Creates an ipset with these members.
    AddIpset(Ipset, IpsetContents),
    /// Replaces the capacity and the members of an ipset, all at once by a swap.
    PutIpset(Ipset, IpsetContents),
    /// Deletes an ipset that no rule matches.
    DeleteIpset(Ipset),
    /// Adds a member to an ipset, or changes its mark or `nomatch` flag.
    PutMember(Ipset, IpNet, Member),
    /// Deletes a member of an ipset.
    DeleteMember(Ipset, IpNet),
    /// Creates an iptables chain without rules.
    AddXtChain(Variant, XtChain),
    /// Deletes an iptables chain and its rules.
    DeleteXtChain(Variant, XtChain),
    /// Edits the rules of an iptables chain, one edit after the other.
    EditXtChain(Variant, XtChain, Vec<XtEdit>),
    /// Blocks replies to a connection that is about to end, for [`Connection::REPLY_BLOCK_TIME`].
    ///
    /// Such a reply would open the connection in the reverse direction.
    BlockReplies(Connection),
    /// Sets bits of a connection's mark.
    MarkConnection(Connection, MarkBits),
    /// Deletes a conntrack entry, so that the connection's next packet is classified again.
    EndConnection(Connection),
}

const fn ip(family: Family) -> &'static str {
    match family {
        Family::V4 => "ip",
        Family::V6 => "ip -6",
    }
}

impl Op {
    /// Returns whether the operation may change how packets are translated.
    pub(crate) const fn concerns_packets(&self) -> bool {
        self.is_nft() || self.is_xtables()
    }

    /// Returns the connection that the operation ends.
    #[cfg(test)]
    pub(crate) const fn ended(&self) -> Option<&Connection> {
        match self {
            Self::EndConnection(connection) => Some(connection),
            _ => None,
        }
    }

    /// Returns whether the operation changes or ends a connection.
    pub(crate) const fn is_conntrack(&self) -> bool {
        matches!(self, Self::MarkConnection(..) | Self::EndConnection(_))
    }

    /// Returns whether the operation belongs to an nf_tables transaction.
    pub(crate) const fn is_nft(&self) -> bool {
        matches!(
            self,
            Self::WakeTable(_)
                | Self::AddTable(_)
                | Self::DeleteTable(_)
                | Self::AddSet(_)
                | Self::DeleteSet(_)
                | Self::AddFlowtable
                | Self::AddChain(..)
                | Self::DeleteChain(_)
                | Self::SetRules(..)
                | Self::AddElement(..)
                | Self::DeleteElement(..)
                | Self::FlushSet(_)
                | Self::DeleteStray(..)
                | Self::BlockReplies(_)
        )
    }

    /// Returns the table of an operation on tables, sets, chains and elements.
    pub(crate) fn table(&self) -> TableFamily {
        match self {
            Self::WakeTable(family)
            | Self::AddTable(family)
            | Self::DeleteTable(family)
            | Self::DeleteStray(family, _) => *family,
            Self::AddSet(set) | Self::DeleteSet(set) | Self::FlushSet(set) => set.table(),
            Self::AddChain(chain, _) | Self::DeleteChain(chain) | Self::SetRules(chain, _) => {
                chain.table()
            }
            Self::AddElement(key, _) | Self::DeleteElement(key, _) => key.set().table(),
            _ => TableFamily::Inet,
        }
    }
}

#[cfg(all(feature = "kernel", target_os = "linux"))]
pub(crate) use iptables::write_edit;

/// Characters other than letters and digits that are not special to a shell.
const PLAIN: &str = "-_./:=,@%+";

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_xtables() {
            return iptables::command(f, self);
        }
        let mut text = String::new();
        if self.is_nft() {
            nft_commands(&mut text, self)?;
            let plain = format!(" {PLAIN}");
            let commands = text.lines().map(|line| format!("nft {}", quoted(line, &plain)));
            return f.write_str(&commands.collect::<Vec<_>>().join("\n"));
        }
        commands(&mut text, self)?;
        let commands = text.lines().map(|line| {
            let words = line.split(' ').map(|word| quoted(word, PLAIN));
            words.collect::<Vec<_>>().join(" ")
        });
        f.write_str(&commands.collect::<Vec<_>>().join(" && "))
    }
}

/// Quotes a text as one word of a shell, unless all its characters are plain.
fn quoted<'a>(text: &'a str, plain: &str) -> Cow<'a, str> {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || plain.contains(c);
    if text.chars().all(is_plain) {
        return text.into();
    }
    format!("'{}'", text.replace('\'', r"'\''")).into()
}

/// Writes the commands of an operation on links, routes, rules or connections, one per line.
fn commands(f: &mut String, op: &Op) -> fmt::Result {
    match op {
        Op::AddLink(link) => {
            write!(f, "ip link add {} address {} mtu {} ", link.name, link.mac, link.mtu)?;
            write!(f, "group {LINK_GROUP} type vxlan id {} ", link.vni)?;
            link_attributes(f, link)?;
            write!(f, " dstport {} nolearning", link.port)?;
            // The kernel ignores an alias in the request that creates a device.
            write!(f, "\nip link set {} alias {LINK_ALIAS} addrgenmode none", link.name)?;
            ipv4_settings(f, link)?;
            // Without `promote_secondaries` the deletion of an address also deletes other addresses
            // of its network.
            write!(f, " net/ipv4/conf/{}/promote_secondaries=1", link.name)?;
            if link.up { write!(f, "\nip link set {} up", link.name) } else { Ok(()) }
        }
        Op::SetLink(link) => {
            write!(f, "ip link set {} address {} mtu {} ", link.name, link.mac, link.mtu)?;
            write!(f, "nomaster alias {LINK_ALIAS} group {LINK_GROUP} ")?;
            f.write_str(if link.up { "up type vxlan " } else { "down type vxlan " })?;
            link_attributes(f, link)?;
            f.write_str(" nolearning ttl auto")?;
            ipv4_settings(f, link)
        }
        Op::DeleteLink(name) => write!(f, "ip link del {name}"),
        Op::AddAddress(device, net) => {
            write!(f, "{} addr add {net} dev {device}", ip(Family::of_net(net)))?;
            f.write_str(if matches!(net, IpNet::V6(_)) { " nodad" } else { "" })
        }
        Op::DeleteAddress(device, net) => {
            write!(f, "{} addr del {net} dev {device}", ip(Family::of_net(net)))
        }
        Op::ClaimAddress(device, IpAddr::V4(address)) => write!(
            f,
            "arping -D -c 3 -I {device} {address}\n\
             ip addr add {address}/32 dev {device} scope host proto {PROTOCOL}\n\
             arping -U -c 1 -I {device} {address}"
        ),
        Op::ClaimAddress(device, IpAddr::V6(address)) => write!(
            f,
            "ip -6 addr add {address}/128 dev {device} noprefixroute preferred_lft 0 proto {PROTOCOL}"
        ),
        Op::ReleaseAddress(device, address) => {
            let (family, net) = (Family::of(*address), IpNet::from(*address));
            write!(f, "{} addr del {net} dev {device}", ip(family))
        }
        Op::PutFdb(device, mac, node) => {
            write!(f, "bridge fdb replace {mac} dev {device} dst {node} self permanent")
        }
        Op::DeleteFdb(device, mac, node) => {
            write!(f, "bridge fdb del {mac} dev {device} dst {node} self")
        }
        Op::PutNeighbour(device, address, mac) => {
            let ip = ip(Family::of(*address));
            write!(
                f,
                "{ip} neigh replace {address} lladdr {mac} dev {device} nud permanent protocol {PROTOCOL}"
            )
        }
        Op::DeleteNeighbour(device, address) => {
            write!(f, "{} neigh del {address} dev {device}", ip(Family::of(*address)))
        }
        Op::PutRoute(device, key, route) => route_command(f, "replace", device, key, *route),
        Op::DeleteRoute(device, key, route) => route_command(f, "del", device, key, *route),
        Op::AddRule(rule) => write!(f, "{} rule add {rule}", ip(rule.family)),
        Op::DeleteRule(rule) => write!(f, "{} rule del {rule}", ip(rule.family)),
        Op::DeleteStrayRouting(stray) => {
            let noun = match stray.kind {
                StrayKind::Route => "route",
                StrayKind::Rule => "rule",
            };
            write!(f, "{} {noun} del {stray}", ip(stray.family))
        }
        Op::MarkConnection(connection, MarkBits { mask, value }) => {
            write!(f, "conntrack -U {connection} --mark {value:#x}/{mask:#x}")
        }
        Op::EndConnection(connection) => write!(f, "conntrack -D {connection}"),
        _ => Ok(()),
    }
}

fn link_attributes(f: &mut String, link: &Vxlan) -> fmt::Result {
    write!(f, "local {}", link.local)?;
    match &link.underlay {
        Some(underlay) => write!(f, " dev {underlay}"),
        None => Ok(()),
    }
}

fn ipv4_settings(f: &mut String, link: &Vxlan) -> fmt::Result {
    // Slashes as separators, because the interface name may have a dot.
    let settings = format!("net/ipv4/conf/{}", link.name);
    write!(
        f,
        "\nsysctl -w {settings}/forwarding=1 {settings}/src_valid_mark=1 {settings}/rp_filter={}",
        link.rp_filter
    )
}

/// Writes the commands of an nf_tables operation, one per line, in the syntax of `nft -f`.
fn nft_commands(f: &mut String, op: &Op) -> fmt::Result {
    let table = format!("{} {NFT_TABLE}", op.table());
    match op {
        Op::WakeTable(_) => write!(f, "add table {table}"),
        Op::AddTable(_) => write!(f, "create table {table}"),
        Op::DeleteTable(_) => write!(f, "delete table {table}"),
        Op::AddSet(set) => add_set(f, *set),
        Op::DeleteSet(set) => write!(f, "delete {} {table} {set}", noun(*set)),
        Op::AddFlowtable => {
            write!(f, "create flowtable {table} {FLOWTABLE} {{ hook ingress priority 0; }}")
        }
        Op::AddChain(chain, None) => write!(f, "create chain {table} {chain}"),
        Op::AddChain(chain, Some(base)) => {
            write!(f, "create chain {table} {chain} {{ {base} }}")
        }
        Op::DeleteChain(chain) => write!(f, "delete chain {table} {chain}"),
        Op::SetRules(chain, rules) => {
            write!(f, "flush chain {table} {chain}")?;
            rules.iter().try_for_each(|rule| write!(f, "\nadd rule {table} {chain} {rule}"))
        }
        Op::AddElement(key, value) => {
            let set = key.set();
            let counter = if set.is_counting() { " counter" } else { "" };
            write!(f, "create element {table} {set} {{ {key}{counter}{value} }}")
        }
        Op::DeleteElement(key, _) => {
            write!(f, "delete element {table} {} {{ {key} }}", key.set())
        }
        Op::FlushSet(set) => write!(f, "flush {} {table} {set}", noun(*set)),
        Op::DeleteStray(_, Stray::Chain(name)) => {
            write!(f, "delete chain {table} {}", name.escape_default())
        }
        Op::DeleteStray(_, Stray::Set(name)) => {
            write!(f, "delete set {table} {}", name.escape_default())
        }
        Op::DeleteStray(_, Stray::Flowtable(name)) => {
            write!(f, "delete flowtable {table} {}", name.escape_default())
        }
        Op::BlockReplies(connection) => {
            let Connection { peer, snat_address, protocol, reply_source_port, snat_port, .. } =
                connection;
            let set = connection.blocked_replies();
            write!(f, "add element {table} {set} {{ {peer} . {snat_address} . {protocol}")?;
            if let Set::BlockedReply(_) = set {
                write!(f, " . {reply_source_port} . {snat_port}")?;
            }
            write!(f, " timeout {}s }}", Connection::REPLY_BLOCK_TIME.as_secs())
        }
        _ => Ok(()),
    }
}

fn noun(set: Set) -> &'static str {
    if set.data().is_some() { "map" } else { "set" }
}

fn add_set(f: &mut String, set: Set) -> fmt::Result {
    let key: Vec<_> = set.key().iter().map(|part| part.name()).collect();
    write!(f, "create {} {} {NFT_TABLE} {set} ", noun(set), set.table())?;
    write!(f, "{{ type {}", key.join(" . "))?;
    if let Some(data) = set.data() {
        write!(f, " : {}", data.name())?;
    }
    f.write_str(if set.is_interval() {
        "; flags interval; }"
    } else if set.is_fleeting() {
        "; flags timeout; }"
    } else if set.is_counting() {
        "; counter; }"
    } else {
        "; }"
    })
}

fn route_command(
    f: &mut String,
    verb: &str,
    device: &DeviceName,
    key: &RouteKey,
    route: Route,
) -> fmt::Result {
    write!(f, "{} route {verb} ", ip(Family::of_net(&key.dst)))?;
    match route {
        Route::Via(_) => {}
        Route::Throw => f.write_str("throw ")?,
        Route::Unreachable => f.write_str("unreachable ")?,
    }
    if key.dst.prefix_len() == 0 {
        f.write_str("default")?;
    } else {
        write!(f, "{}", key.dst)?;
    }
    if let Route::Via(gateway) = route {
        write!(f, " via {gateway} dev {device} onlink")?;
    }
    write!(f, " table {}", key.table)?;
    if key.metric != 0 {
        write!(f, " metric {}", key.metric)?;
    }
    write!(f, " proto {PROTOCOL}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_that_mean_something_to_a_shell_are_quoted() {
        let name = |text| DeviceName::new(text).unwrap();
        let printed = |text| Op::DeleteLink(name(text)).to_string();
        assert_eq!(printed("egress.vxlan"), "ip link del egress.vxlan");
        assert_eq!(printed("a;b"), "ip link del 'a;b'");
        assert_eq!(printed("$a'b"), r"ip link del '$a'\''b'");
        assert_eq!(printed("&&"), "ip link del '&&'");
    }

    #[test]
    fn iptables_rule_of_another_program_not_expanded_by_shell() {
        use crate::state::{XtChain, XtEdit, XtName, XtRule, XtTable, XtTarget};
        let text = r#"-m comment --comment "$(id) `id`" -j a;id"#;
        let target = XtTarget::Unknown(text.into());
        let rule = XtRule { matches: [].into(), target, comment: "".into() };
        let chain = XtChain { family: Family::V4, table: XtTable::Nat, name: XtName::Postrouting };
        let edits = vec![XtEdit::Remove(rule)];
        assert_eq!(
            Op::EditXtChain(Variant::Nft, chain, edits).to_string(),
            "iptables-nft -t nat -D POSTROUTING -m comment --comment '$(id) `id`' -j 'a;id'"
        );
    }

    #[test]
    fn nft_commands_with_braces_are_quoted_as_a_whole() {
        let set = Set::Peer(Family::V4);
        let made = Op::AddSet(set).to_string();
        assert_eq!(made, "nft 'create set inet egress_datapath peer4 { type ipv4_addr; }'");
        let deleted = Op::DeleteSet(set).to_string();
        assert_eq!(deleted, "nft delete set inet egress_datapath peer4");
    }
}
