//! What the datapath's origin programs, and the bounds of what anybody could.
//!
//! The origin has an iptables rule and two ipsets for every policy. Its rule that takes the mark
//! off the outer packet is written so that it carries packets at all: it compares the prefix.

use std::fmt::Write;

use crate::Result;
use crate::ours::{SOURCES, destination, gateway, pod, tunnel};
use crate::path::{NODE, Path};

/// Turns the tracking of connections on and does nothing else to a packet that is forwarded.
pub(crate) fn track(path: &Path) -> Result {
    path.feed(
        "nft -f -",
        "table ip tracked {
            chain input { type filter hook input priority 0; ct state invalid drop; }
        }",
    )
}

/// The VXLAN device and the way to one peer, which a table's default route takes.
pub(crate) fn route(path: &Path, table: &str) -> Result {
    let (peer, mac) = (gateway(0), "02:00:00:00:01:00");
    let (here, via) = (tunnel(NODE), tunnel(peer));
    path.feed(
        "ip -batch -",
        &format!(
            "link add egress.vxlan type vxlan id 100 dstport 7789 local {NODE} nolearning
            address add {here}/16 dev egress.vxlan
            link set egress.vxlan up
            neighbour add {via} lladdr {mac} dev egress.vxlan
            route replace default via {via} dev egress.vxlan onlink table {table}
            "
        ),
    )?;
    path.feed("bridge -batch -", &format!("fdb add {mac} dev egress.vxlan dst {peer}\n"))
}

/// The same, and static routes to some gateways, shared out among the destinations of policies.
pub(crate) fn spread(path: &Path, policies: u32, gateways: u32) -> Result {
    route(path, "main")?;
    let (mut ip, mut fdb) = (String::new(), String::new());
    for number in 1..gateways {
        let [.., high, low] = number.to_be_bytes();
        let mac = format!("02:00:00:01:{high:02x}:{low:02x}");
        let peer = gateway(number);
        writeln!(ip, "neighbour add {} lladdr {mac} dev egress.vxlan", tunnel(peer))?;
        writeln!(fdb, "fdb add {mac} dev egress.vxlan dst {peer}")?;
    }
    for policy in 0..policies {
        let via = tunnel(gateway(policy % gateways));
        writeln!(ip, "route add {} via {via} dev egress.vxlan onlink", destination(policy))?;
    }
    path.feed("ip -batch -", &ip)?;
    path.feed("bridge -batch -", &fdb)
}

/// The mark of whatever is steered.
const MARK: u32 = 0x2600_0100;

/// The way to one peer for what has the mark.
fn route_by_mark(path: &Path) -> Result {
    route(path, "3000")?;
    path.feed("ip -batch -", &format!("rule add fwmark {MARK:#x} table 3000\n"))
}

/// The least that steers by a mark and a rule: one map by the source, whatever the destination and
/// the direction, which overwrites all of the mark; no NAT of others, no tracking of outer packets.
pub(crate) fn least(path: &Path) -> Result {
    route_by_mark(path)?;
    let pods = (0..SOURCES).map(|number| format!("{} : {MARK:#x}", pod(number)));
    let pods = pods.collect::<Vec<_>>().join(", ");
    path.feed(
        "nft -f -",
        &format!(
            "table ip least {{
                map marks {{ type ipv4_addr : mark; size 512; elements = {{ {pods} }}; }}
                chain marking {{
                    type filter hook prerouting priority -99;
                    meta mark set ip saddr map @marks;
                }}
                chain resetting {{
                    type filter hook forward priority -150;
                    meta mark {MARK:#x} oifname egress.vxlan meta mark set 0;
                }}
                chain keeping {{
                    type nat hook postrouting priority 99;
                    oifname egress.vxlan snat to ip saddr;
                }}
                chain outer {{ type filter hook output priority -300; udp dport 7789 notrack; }}
            }}"
        ),
    )
}

/// A client of one gateway.
pub(crate) fn program(path: &Path, policies: u32) -> Result {
    route_by_mark(path)?;
    let (mut sets, mut rules) = (String::new(), String::new());
    for policy in 0..policies {
        writeln!(sets, "create egress-dest-{policy} hash:net")?;
        writeln!(sets, "add egress-dest-{policy} {}", destination(policy))?;
        writeln!(sets, "create egress-src-{policy} hash:net")?;
        for source in 0..SOURCES {
            writeln!(sets, "add egress-src-{policy} {}", pod(policy * SOURCES + source))?;
        }
        writeln!(
            rules,
            "-A EGRESSGATEWAY-MARK-REQUEST -m conntrack --ctdir ORIGINAL \
             -m set --match-set egress-dest-{policy} dst -m set --match-set egress-src-{policy} src \
             -j MARK --set-mark {MARK:#x}"
        )?;
    }
    path.feed("ipset restore", &sets)?;
    path.feed(
        "iptables-legacy-restore",
        &format!(
            "*mangle
:EGRESSGATEWAY-RESET-MARK -
:EGRESSGATEWAY-MARK-REQUEST -
-A PREROUTING -j EGRESSGATEWAY-MARK-REQUEST
-A FORWARD -j EGRESSGATEWAY-RESET-MARK
-A POSTROUTING -m mark --mark 0x12000000 -j ACCEPT
-A EGRESSGATEWAY-RESET-MARK -m mark --mark 0x26000000/0xff000000 -j MARK --set-mark 0x12000000
{rules}COMMIT
*filter
-A FORWARD -m mark --mark 0x12000000 -j ACCEPT
-A OUTPUT -m mark --mark 0x12000000 -j ACCEPT
COMMIT
*nat
:EGRESSGATEWAY-NO-SNAT -
:EGRESSGATEWAY-SNAT-EIP -
-A POSTROUTING -j EGRESSGATEWAY-SNAT-EIP
-A POSTROUTING -j EGRESSGATEWAY-NO-SNAT
-A EGRESSGATEWAY-NO-SNAT -m mark --mark 0x12000000 -j ACCEPT
COMMIT
"
        ),
    )
}
