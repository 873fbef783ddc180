//! Objects of other programs that look like ours.

use egress_datapath::testing::lab::Netns;

use crate::fleet::{Result, nft, tool};

/// Objects of other programs, each like one of ours but for one attribute.
///
/// Ours are: rules of protocol 69 at priorities 101 to 104; routes of protocol 69 in tables from
/// 3000; `egress.vxlan` with an alias; the table `inet egress_datapath`.
const DECOYS: &[&str] = &[
    // Rules with another protocol, or none.
    "ip -4 rule add pref 102 fwmark 0x26000000/0xff000000 lookup 3000",
    "ip -6 rule add pref 102 fwmark 0x26000000/0xff000000 lookup 3000 protocol static",
    "ip -4 rule add pref 101 not fwmark 0x26000000/0xff000000 goto 104 protocol 70",
    "ip -4 rule add pref 101 fwmark 0x26000000/0xff000000 iif lo goto 104 protocol 70",
    "ip -4 rule add pref 104 fwmark 0x26000000/0xff000000 unreachable protocol 70",
    "ip -6 rule add pref 104 fwmark 0x27000000/0xff000000 unreachable",
    "ip -4 rule add pref 105 fwmark 0x26000100/0xffffff00 lookup 3001 protocol 68",
    // A device of the same kind with another name and number, without an alias or with another.
    "ip link add foreign.vxlan type vxlan id 101 dev eth0 local 10.10.0.11 dstport 7790 nolearning",
    "ip link add other.vxlan type vxlan id 102 dev eth0 local 10.10.0.11 dstport 7791 nolearning",
    "ip link set other.vxlan alias egress-datapath-2",
    "ip link set foreign.vxlan up",
    "ip link set other.vxlan up",
    "ip addr add 172.31.200.1/24 dev foreign.vxlan",
    "bridge fdb add 66:00:00:00:00:12 dev foreign.vxlan dst 10.10.0.12",
    "ip neigh add 172.31.200.12 lladdr 66:00:00:00:00:12 dev foreign.vxlan nud permanent",
    "ip -6 neigh add fd11:200::12 lladdr 66:00:00:00:00:12 dev other.vxlan nud permanent",
    // Routes in tables of our range, with another protocol; and one of the protocol in main.
    "ip -4 route add default via 172.31.200.12 dev foreign.vxlan onlink table 3000",
    "ip -4 route add throw 10.244.0.0/16 table 3000 protocol static",
    "ip -4 route add unreachable default metric 4278198272 table 3001 protocol 68",
    "ip -6 route add unreachable default metric 4278198272 table 3001 protocol 70",
    "ip -6 route add throw fd44::/16 table 3002",
    "ip -4 route add 192.0.2.0/24 via 10.10.0.1 protocol 69",
    "ip -6 route add 2001:db8:2::/64 via fd10::1 protocol 69",
];

/// Tables of other names and families with chains of our names, and a set of one.
pub const TABLES: &str = "table ip egress_datapath {
    set source4 {
        type ipv4_addr
        elements = { 10.244.1.10 }
    }
    chain prerouting {
        type filter hook prerouting priority -99;
        ip saddr 192.0.2.1 drop
    }
}
table inet egress_datapath2 {
    chain nat_postrouting {
        type nat hook postrouting priority 99;
        ip saddr 192.0.2.1 masquerade
    }
}
table ip6 egress_datapath {
    chain guard {
        type filter hook postrouting priority 101;
        ip6 saddr 2001:db8::1 drop
    }
}";

/// Puts all of them on a node, which must be node-a.
pub fn plant(netns: &Netns) -> Result {
    plant_those(netns, |_| true)
}

/// Puts some of them there, by their command; all of the tables.
pub fn plant_those(netns: &Netns, wanted: impl Fn(&str) -> bool) -> Result {
    for line in DECOYS.iter().filter(|line| wanted(line)) {
        tool(netns, line)?;
    }
    nft(netns, &[], TABLES)
}
