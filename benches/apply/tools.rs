//! The same through the kernel's tools.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write as _;
use std::net::Ipv4Addr;
use std::process::{Command, Stdio};
use std::time::Duration;

use egress_datapath::Changes;
use egress_datapath::datapath::Op;

use super::timed;

/// What `nft -f` takes to make the table that the changes make.
pub(crate) fn nft_file(changes: &Changes) -> String {
    let (mut text, mut elements) = (String::new(), BTreeMap::<_, String>::new());
    let mut rest = String::new();
    for op in changes.ops() {
        match op {
            Op::AddElement(key, value) => {
                let list = elements.entry(key.set()).or_default();
                let between = if list.is_empty() { "" } else { ", " };
                write!(list, "{between}{key}{value}").unwrap();
            }
            // Chains go to one another, and rules look into sets.
            Op::SetRules(..) => writeln!(rest, "{op}").unwrap(),
            other => writeln!(text, "{other}").unwrap(),
        }
    }
    text.push_str(&rest);
    let only_nft = text.lines().filter_map(|line| line.strip_prefix("nft "));
    // A command that means something to a shell is quoted.
    let commands = only_nft.map(|line| line.trim_matches('\'').replace(r"'\''", "'") + "\n");
    let mut file: String = commands.collect();
    for (set, list) in elements {
        writeln!(file, "add element inet egress_datapath {set} {{ {list} }}").unwrap();
    }
    file
}

/// Feeds a tool, and says how long it took.
pub(crate) fn feed(program: &str, arguments: &[&str], text: &str) -> Duration {
    let (took, exit) = timed(|| {
        let mut command = Command::new(program);
        let mut child = command.args(arguments).stdin(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
        child.wait().unwrap()
    });
    assert!(exit.success(), "{program} failed");
    took
}

/// Makes the table and deletes it again.
pub(crate) fn nft(file: &str) -> Duration {
    let took = feed("nft", &["-f", "-"], file);
    feed("nft", &["-f", "-"], "delete table inet egress_datapath\n");
    took
}

/// The same policies as two sets and a rule each, made and deleted again.
pub(crate) fn restore(count: u32, sources: u32) -> (Duration, Duration) {
    let (mut sets, mut rules) = (String::new(), String::from("*mangle\n"));
    for policy in 0..count {
        let size = sources.max(64);
        writeln!(sets, "create s{policy} hash:ip maxelem {size}").unwrap();
        writeln!(sets, "create d{policy} hash:net maxelem 64").unwrap();
        for source in 0..sources {
            let address = Ipv4Addr::from_bits(0x0b00_0000 + policy * sources + source);
            writeln!(sets, "add s{policy} {address}").unwrap();
        }
        writeln!(sets, "add d{policy} 0.0.0.0/1\nadd d{policy} 128.0.0.0/1").unwrap();
        writeln!(
            rules,
            "-A PREROUTING -m set --match-set s{policy} src -m set --match-set d{policy} dst \
             -j MARK --set-mark {:#x}/0xffffff00",
            0x2600_0000 + (policy % 100 + 1) * 256
        )
        .unwrap();
    }
    rules.push_str("COMMIT\n");
    let ipset = feed("ipset", &["restore"], &sets);
    let iptables = feed("iptables-legacy-restore", &[], &rules);
    feed("iptables-legacy-restore", &[], "*mangle\nCOMMIT\n");
    feed("ipset", &["destroy"], "");
    (ipset, iptables)
}
