//! Reads kernel settings from files of the kernel.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use crate::preflight::facts::Settings;

const FIXED: [&str; 11] = [
    "ipv4/ip_forward",
    "ipv4/fwmark_reflect",
    "ipv6/fwmark_reflect",
    "ipv6/conf/all/forwarding",
    "ipv6/conf/default/disable_ipv6",
    "ipv4/conf/all/rp_filter",
    "ipv4/conf/all/src_valid_mark",
    "ipv4/conf/all/arp_ignore",
    "netfilter/nf_conntrack_count",
    "netfilter/nf_conntrack_max",
    "netfilter/nf_conntrack_tcp_loose",
];

/// Reads the existing settings that matter, global ones and those of `devices`.
///
/// The kernel shows the settings of the network namespace of the reading thread.
pub(crate) fn settings(devices: &BTreeSet<&str>) -> Settings {
    let of_devices = devices.iter().flat_map(|device| {
        ["ipv4 src_valid_mark", "ipv4 arp_ignore", "ipv6 disable_ipv6"]
            .map(|setting| setting.replace(' ', &format!("/conf/{device}/")))
    });
    let mut found = BTreeMap::new();
    for name in FIXED.into_iter().map(String::from).chain(of_devices) {
        let text = fs::read_to_string(format!("/proc/sys/net/{name}"));
        if let Some(value) = text.ok().and_then(|text| text.trim().parse().ok()) {
            found.insert(name, value);
        }
    }
    Settings(found)
}

/// Major and minor number of the kernel version.
pub(crate) fn version() -> Option<(u32, u32)> {
    read_version(&fs::read_to_string("/proc/sys/kernel/osrelease").ok()?)
}

fn read_version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|other: char| !other.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// Tables of legacy iptables, as far as the kernel lets this process read them.
pub(crate) fn legacy_tables() -> Vec<String> {
    // `/proc/net` is that of the process, which may be in another namespace than this thread.
    let read = |file| fs::read_to_string(format!("/proc/thread-self/net/{file}"));
    let texts = ["ip_tables_names", "ip6_tables_names"].map(read);
    let names = texts.iter().flatten().flat_map(|text| text.lines());
    names.map(String::from).collect::<BTreeSet<_>>().into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_kernels() {
        assert_eq!(read_version("6.1.0-57-cloud-amd64\n"), Some((6, 1)));
        assert_eq!(read_version("6.12.117+deb12-cloud-amd64\n"), Some((6, 12)));
        assert_eq!(read_version("7.0-rc1"), Some((7, 0)));
        for other in ["", "6", "6.", "six.1", ".1"] {
            assert_eq!(read_version(other), None, "{other}");
        }
        assert!(version().is_some());
    }
}
