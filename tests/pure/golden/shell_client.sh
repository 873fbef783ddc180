set -e

# Skeleton
ipset create egress4-src-8c04c0e40aad86b2 hash:net family inet maxelem 65536
ipset add egress4-src-8c04c0e40aad86b2 172.29.234.173/32
ipset create egress4-dest-8c04c0e40aad86b2 hash:net family inet maxelem 65536
ipset add egress4-dest-8c04c0e40aad86b2 10.6.105.150/32
ipset create egress4-selected hash:net family inet maxelem 65536
ipset create egress4-ignore hash:net family inet maxelem 65536
ipset add egress4-ignore 10.10.0.11/32
ipset add egress4-ignore 10.10.0.12/32
ipset add egress4-ignore 10.10.0.13/32
ipset add egress4-ignore 10.244.0.0/16
ipset add egress4-ignore 169.254.0.0/16
ipset add egress4-ignore 172.31.0.11/32
ipset add egress4-ignore 172.31.0.12/32
ipset add egress4-ignore 172.31.0.13/32
ipset add egress4-ignore 224.0.0.0/4
ipset create egress4-marks hash:net family inet maxelem 65536 skbinfo
ipset create egress4-closed hash:net family inet maxelem 65536
ipset create egress4-peers hash:net family inet maxelem 65536
ipset add egress4-peers 10.10.0.12/32
ipset add egress4-peers 10.10.0.13/32
ipset create egress4-underlay hash:net family inet maxelem 65536
ipset add egress4-underlay 10.10.0.11/32
ipset create egress4-eips hash:net family inet maxelem 65536
iptables-legacy -t filter -N EGRESSGATEWAY-KEEP-MARK
iptables-legacy -t filter -N EGRESSGATEWAY-TUNNEL
iptables-legacy -t filter -A EGRESSGATEWAY-KEEP-MARK -o egress.vxlan -m comment --comment "egress gateway: keep mark" -j ACCEPT
iptables-legacy -t filter -A EGRESSGATEWAY-KEEP-MARK -m mark --mark 0x27000000/0xff000000 -m comment --comment "egress gateway: keep mark" -j ACCEPT
iptables-legacy -t filter -A EGRESSGATEWAY-KEEP-MARK -m connmark --mark 0x27000000/0xff000000 -m conntrack --ctdir REPLY -m comment --comment "egress gateway: keep mark" -j ACCEPT
iptables-legacy -t filter -A EGRESSGATEWAY-TUNNEL -p udp -m udp --dport 7789 -m set --match-set egress4-peers src -m comment --comment "egress gateway: tunnel" -j ACCEPT
iptables-legacy -t filter -A EGRESSGATEWAY-TUNNEL -p udp -m udp --dport 7789 -m set --match-set egress4-peers dst -m comment --comment "egress gateway: tunnel" -j ACCEPT
iptables-legacy -t filter -I INPUT 1 -m comment --comment "egress gateway: tunnel" -j EGRESSGATEWAY-TUNNEL
iptables-legacy -t filter -I FORWARD 1 -m comment --comment "egress gateway: keep mark" -j EGRESSGATEWAY-KEEP-MARK
iptables-legacy -t filter -I OUTPUT 1 -m comment --comment "egress gateway: tunnel" -j EGRESSGATEWAY-TUNNEL
iptables-legacy -t nat -N EGRESSGATEWAY-NO-SNAT
iptables-legacy -t nat -N EGRESSGATEWAY-SNAT-EIP
iptables-legacy -t nat -A EGRESSGATEWAY-NO-SNAT -o egress.vxlan -m comment --comment "egress gateway: no snat" -j CONNMARK --set-xmark 0x27000000/0xff000000
iptables-legacy -t nat -A EGRESSGATEWAY-NO-SNAT -o egress.vxlan -m comment --comment "egress gateway: no snat" -j NETMAP --to 0.0.0.0/0
iptables-legacy -t nat -A EGRESSGATEWAY-NO-SNAT -m set --match-set egress4-src-8c04c0e40aad86b2 src -m set --match-set egress4-dest-8c04c0e40aad86b2 dst -m comment --comment "rule uuid: weave does not do SNAT" -j ACCEPT
iptables-legacy -t nat -A EGRESSGATEWAY-SNAT-EIP -m mark ! --mark 0x27000000/0xff000000 -m comment --comment "egress gateway: not ours" -j RETURN
iptables-legacy -t nat -A EGRESSGATEWAY-SNAT-EIP -m comment --comment "egress gateway: snat EIP" -j CONNMARK --set-xmark 0x27000000/0xff000000
iptables-legacy -t nat -A EGRESSGATEWAY-SNAT-EIP -m comment --comment "egress gateway: snat EIP" -j MARK --set-xmark 0x0/0xffff1000
iptables-legacy -t nat -A EGRESSGATEWAY-SNAT-EIP -m comment --comment "egress gateway: no policy, drop" -j NFQUEUE --queue-num 65535
iptables-legacy -t nat -I POSTROUTING 1 -m comment --comment "egress gateway: snat EIP" -j EGRESSGATEWAY-SNAT-EIP
iptables-legacy -t nat -I POSTROUTING 2 -m comment --comment "egress gateway: no snat" -j EGRESSGATEWAY-NO-SNAT
iptables-legacy -t mangle -N EGRESSGATEWAY-MARK-REQUEST
iptables-legacy -t mangle -N EGRESSGATEWAY-RESET-MARK
iptables-legacy -t mangle -N EGRESSGATEWAY-GUARD
iptables-legacy -t mangle -N EGRESSGATEWAY-CHECK-SNAT
iptables-legacy -t mangle -N EGRESSGATEWAY-HERE
iptables-legacy -t mangle -N EGRESSGATEWAY-CLEAR
iptables-legacy -t mangle -N EGRESSGATEWAY-CLOSED
iptables-legacy -t mangle -N EGRESSGATEWAY-TO-26000000
iptables-legacy -t mangle -A EGRESSGATEWAY-MARK-REQUEST -m set --match-set egress4-ignore dst -m comment --comment "egress gateway: inside" -j RETURN
iptables-legacy -t mangle -A EGRESSGATEWAY-MARK-REQUEST -m conntrack --ctdir REPLY -m comment --comment "egress gateway: opened by others" -j RETURN
iptables-legacy -t mangle -A EGRESSGATEWAY-MARK-REQUEST -m conntrack --ctstate INVALID -m comment --comment "egress gateway: cannot be translated" -j DROP
iptables-legacy -t mangle -A EGRESSGATEWAY-MARK-REQUEST -m set --match-set egress4-closed src -m comment --comment "egress gateway: closed" -g EGRESSGATEWAY-CLOSED
iptables-legacy -t mangle -A EGRESSGATEWAY-MARK-REQUEST -m set --match-set egress4-src-8c04c0e40aad86b2 src -m set --match-set egress4-dest-8c04c0e40aad86b2 dst -m comment --comment "rule uuid: mark request packet" -g EGRESSGATEWAY-TO-26000000
iptables-legacy -t mangle -A EGRESSGATEWAY-MARK-REQUEST -m comment --comment "egress gateway: mark by source" -j SET --map-set egress4-marks src --map-mark
iptables-legacy -t mangle -A EGRESSGATEWAY-RESET-MARK -p udp -m udp --dport 7789 -m set --match-set egress4-peers dst -m set ! --match-set egress4-peers src -m comment --comment "egress gateway: no pod speaks to the tunnel" -j DROP
iptables-legacy -t mangle -A EGRESSGATEWAY-RESET-MARK -o egress.vxlan -m comment --comment "egress gateway: change mark" -j MARK --set-xmark 0x0/0xffff1000
iptables-legacy -t mangle -A EGRESSGATEWAY-RESET-MARK -o egress.vxlan -m comment --comment "egress gateway: into the tunnel" -j RETURN
iptables-legacy -t mangle -A EGRESSGATEWAY-RESET-MARK -m mark ! --mark 0x27000000/0xff000000 -m connmark --mark 0x27000000/0xff000000 -m conntrack --ctdir ORIGINAL -m comment --comment "egress gateway: policy has gone" -j DROP
iptables-legacy -t mangle -A EGRESSGATEWAY-RESET-MARK -m mark ! --mark 0x0/0xff000000 -m set --match-set egress4-ignore dst -m comment --comment "egress gateway: inside" -g EGRESSGATEWAY-CLEAR
iptables-legacy -t mangle -A EGRESSGATEWAY-RESET-MARK -m mark --mark 0x24000000/0xff000000 -m comment --comment "egress gateway: closed" -j DROP
iptables-legacy -t mangle -A EGRESSGATEWAY-RESET-MARK -m mark --mark 0x26000000/0xff000000 -m comment --comment "egress gateway: way is missing" -j DROP
iptables-legacy -t mangle -A EGRESSGATEWAY-GUARD -p udp -m udp --dport 7789 -m set ! --match-set egress4-peers src -m comment --comment "egress gateway: unknown node" -j DROP
iptables-legacy -t mangle -A EGRESSGATEWAY-GUARD -p udp -m udp --dport 7789 -m set ! --match-set egress4-underlay dst -m comment --comment "egress gateway: not for a node" -j DROP
iptables-legacy -t mangle -A EGRESSGATEWAY-GUARD -m set --match-set egress4-eips dst -m comment --comment "egress gateway: no service on an EIP" -j DROP
iptables-legacy -t mangle -A EGRESSGATEWAY-CHECK-SNAT -m mark ! --mark 0x27000000/0xff000000 -m comment --comment "egress gateway: not ours" -j RETURN
iptables-legacy -t mangle -A EGRESSGATEWAY-CHECK-SNAT -m conntrack --ctstate INVALID,UNTRACKED -m comment --comment "egress gateway: cannot be translated" -j DROP
iptables-legacy -t mangle -A EGRESSGATEWAY-CHECK-SNAT -m connmark ! --mark 0x27000000/0xff000000 -m conntrack --ctdir ORIGINAL -m conntrack --ctstatus CONFIRMED -m comment --comment "egress gateway: older than its policy" -j DROP
iptables-legacy -t mangle -A EGRESSGATEWAY-CHECK-SNAT -m conntrack --ctdir ORIGINAL -m conntrack ! --ctstate SNAT -m conntrack --ctstatus CONFIRMED -m comment --comment "egress gateway: not translated" -j DROP
iptables-legacy -t mangle -A EGRESSGATEWAY-CHECK-SNAT -m conntrack --ctstatus CONFIRMED -m comment --comment "egress gateway: translated" -j MARK --set-xmark 0x0/0xffff1000
iptables-legacy -t mangle -A EGRESSGATEWAY-HERE -m comment --comment "egress gateway: leaves from here" -j MARK --set-xmark 0x27000000/0xffff1000
iptables-legacy -t mangle -A EGRESSGATEWAY-CLEAR -m comment --comment "egress gateway: stays inside" -j MARK --set-xmark 0x0/0xffff1000
iptables-legacy -t mangle -A EGRESSGATEWAY-CLOSED -m comment --comment "egress gateway: closed" -j MARK --set-xmark 0x24000000/0xffff1000
iptables-legacy -t mangle -A EGRESSGATEWAY-TO-26000000 -m comment --comment "egress gateway: b" -j MARK --set-xmark 0x26000000/0xffff1000
iptables-legacy -t mangle -I PREROUTING 1 -i egress.vxlan -m comment --comment "egress gateway: out of the tunnel" -j EGRESSGATEWAY-HERE
iptables-legacy -t mangle -I PREROUTING 2 ! -i egress.vxlan -m set --match-set egress4-selected src -m comment --comment "egress gateway: mark egress packet" -j EGRESSGATEWAY-MARK-REQUEST
iptables-legacy -t mangle -I INPUT 1 -m comment --comment "egress gateway: guard tunnel and EIP" -j EGRESSGATEWAY-GUARD
iptables-legacy -t mangle -I FORWARD 1 -m mark --mark 0x0/0xff000000 -m connmark --mark 0x27000000/0xff000000 -m conntrack --ctdir ORIGINAL -m comment --comment "egress gateway: without the mark of its connection" -j EGRESSGATEWAY-RESET-MARK
iptables-legacy -t mangle -I FORWARD 2 -p udp -m udp --dport 7789 -m comment --comment "egress gateway: to the tunnel" -j EGRESSGATEWAY-RESET-MARK
iptables-legacy -t mangle -I FORWARD 3 -m mark ! --mark 0x0/0xff000000 -m comment --comment "egress gateway: reset mark" -j EGRESSGATEWAY-RESET-MARK
iptables-legacy -t mangle -I POSTROUTING 1 -m mark --mark 0x27000000/0xff000000 -m comment --comment "egress gateway: check snat" -j EGRESSGATEWAY-CHECK-SNAT

# Tunnel
ip link add egress.vxlan address 66:4c:86:01:ec:8c mtu 1450 group 1701278328 type vxlan id 100 local 10.10.0.11 dstport 7789 nolearning && ip link set egress.vxlan alias egress-datapath addrgenmode none && sysctl -w net/ipv4/conf/egress.vxlan/rp_filter=2 net/ipv4/conf/egress.vxlan/promote_secondaries=1 && ip link set egress.vxlan up
ip addr add 172.31.0.11/16 dev egress.vxlan
bridge fdb replace 66:4c:86:01:ef:f2 dev egress.vxlan dst 10.10.0.13 self permanent
bridge fdb replace 66:4c:86:01:f1:a5 dev egress.vxlan dst 10.10.0.12 self permanent
ip neigh replace 172.31.0.12 lladdr 66:4c:86:01:f1:a5 dev egress.vxlan nud permanent protocol 69
ip neigh replace 172.31.0.13 lladdr 66:4c:86:01:ef:f2 dev egress.vxlan nud permanent protocol 69

# Routes
ip route replace unreachable default table 3000 metric 4278198272 proto 69
ip route replace unreachable default table 3001 metric 4278198272 proto 69
ip route replace throw 10.244.0.0/16 table 3001 proto 69
ip route replace throw 169.254.0.0/16 table 3001 proto 69
ip route replace throw 224.0.0.0/4 table 3001 proto 69
ip route replace default via 172.31.0.12 dev egress.vxlan onlink table 3000 proto 69

# Rules
ip rule add pref 104 fwmark 0x26000000/0xff000000 lookup 3001 protocol 69
ip rule add pref 101 not fwmark 0x26000000/0xff000000 goto 104 protocol 69
ip rule add pref 101 fwmark 0x26000000/0xff000000 iif egress.vxlan goto 104 protocol 69
ip rule add pref 101 fwmark 0x26000000/0xff000000 iif lo goto 104 protocol 69
ip rule add pref 102 fwmark 0x26000000/0xffff1000 lookup 3000 protocol 69

# FillSources
ipset add egress4-selected 172.29.234.173/32
