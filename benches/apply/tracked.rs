//! First calls of a process where connections of others are tracked.

use std::net::{Ipv4Addr, SocketAddr};
use std::process::Command;
use std::time::Duration;

use common::stream::raw;
use common::world::{cluster, policies};
use egress_datapath::{KernelDatapath, Reconciler};
use rustix::net::{SendFlags, sendto};

use crate::{line, median, timed};

const ROUNDS: usize = 7;
const TRACKED: u32 = 100_000;

/// A host whose other software tracks connections already: otherwise the kernel walks them all when
/// the first rules come.
const HOST: &str = "set -e; ip link set lo up; nft 'table inet other { chain nat {
    type nat hook postrouting priority 100; ct state new oifname other masquerade; }; }'
    sysctl -qw net.netfilter.nf_conntrack_udp_timeout=600";

/// Has the kernel track so many UDP flows of this host to itself, for some minutes.
fn track(flows: u32) {
    let to = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 0);
    let socket = raw(to.ip()).unwrap();
    for flow in 0..flows {
        let [a, b, c, d] = (0x0400_0400 + flow % 50_000 * 0x1_0000 + flow / 50_000).to_be_bytes();
        // Source port, destination port, length, no checksum.
        sendto(&socket, &[a, b, c, d, 0, 8, 0, 0], SendFlags::empty(), &to).unwrap();
    }
}

fn run(script: &str) {
    let output = Command::new("sh").args(["-c", script]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

pub(crate) fn tracked() {
    run(HOST);
    for (count, sources) in [(1, 1), (10, 10), (1_000, 100)] {
        let (cluster, policies) = (cluster(), policies(count, sources));
        println!("{count} x {sources}, connections of others that the kernel tracks: 0, {TRACKED}");
        let first = |unsettled: bool| {
            let rounds = (0..ROUNDS).map(|_| {
                let mut egress = Reconciler::new(KernelDatapath::open().unwrap());
                let call = |egress: &mut Reconciler<KernelDatapath>| {
                    if unsettled {
                        egress.reconcile_unsettled(&cluster, &policies).unwrap()
                    } else {
                        egress.reconcile(&cluster, &policies).unwrap()
                    }
                };
                let took = timed(|| call(&mut egress)).0;
                let settling = timed(|| egress.settle().unwrap()).0;
                egress.remove().unwrap();
                (took, settling)
            });
            let (all, settling): (Vec<Duration>, Vec<_>) = rounds.unzip();
            (median(all), median(settling))
        };
        for flows in [0, TRACKED] {
            track(flows);
            line("first reconcile", first(false).0, None);
            let (took, settling) = first(true);
            line("first reconcile_unsettled", took, None);
            line("settle after it", settling, None);
        }
        run("conntrack -F 2>&1");
    }
}
