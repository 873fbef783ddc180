//! Finds rules of this crate in files from which the host restores its firewall at boot.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use crate::preflight::facts::Saved;
use crate::state::{NFT_TABLE, XtName};

/// Files of netfilter-persistent, the iptables and nftables services, and of Alpine, Arch and Gentoo.
const FILES: [&str; 14] = [
    "etc/iptables/rules.v4",
    "etc/iptables/rules.v6",
    "etc/iptables/iptables.rules",
    "etc/iptables/ip6tables.rules",
    "etc/iptables/rules-save",
    "etc/iptables/rules6-save",
    "etc/iptables.up.rules",
    "etc/sysconfig/iptables",
    "etc/sysconfig/ip6tables",
    "etc/sysconfig/nftables.conf",
    "etc/nftables.conf",
    "etc/nftables.nft",
    "var/lib/iptables/rules-save",
    "var/lib/nftables/rules-save",
];

/// Folders whose files the services include.
const FOLDERS: [&str; 3] = ["etc/nftables", "etc/nftables.d", "etc/sysconfig/nftables.d"];

/// Most files that are read of a folder.
const MANY: usize = 64;

/// Most bytes that are read of a file.
const SIZE: u64 = 16 << 20;

/// Reads the files below a folder, which is `/`; missing ones have no rules.
pub(crate) fn saved(root: &Path) -> Vec<Saved> {
    let mut files: Vec<PathBuf> = FILES.iter().map(|file| root.join(file)).collect();
    for folder in FOLDERS {
        let entries = fs::read_dir(root.join(folder)).into_iter().flatten().flatten();
        let mut found: Vec<_> = entries.map(|entry| entry.path()).take(MANY).collect();
        found.sort();
        files.extend(found);
    }
    files.iter().filter_map(|file| saved_in(file)).collect()
}

fn saved_in(file: &Path) -> Option<Saved> {
    // To open a FIFO would block.
    fs::metadata(file).ok().filter(fs::Metadata::is_file)?;
    let mut bytes = Vec::new();
    let _cut = File::open(file).ok()?.take(SIZE).read_to_end(&mut bytes);
    let for_iptables = find(&String::from_utf8_lossy(&bytes))?;
    let file = file.display().to_string().escape_debug().collect();
    Some(Saved { file, for_iptables })
}

/// Looks for rules of this crate in a text; true if they are as `iptables-save` prints them.
pub(crate) fn find(text: &str) -> Option<bool> {
    let table = |line: &str| {
        ["inet", "netdev"]
            .iter()
            .any(|family| line.contains(&format!("table {family} {NFT_TABLE}")))
    };
    let is_chain = |word: &str| XtName::from_name(word).is_some_and(|name| !name.is_built_in());
    let chain = |line: &str| {
        let mut words = line.split(|c: char| !c.is_ascii_alphanumeric() && c != '-');
        line.contains("EGRESSGATEWAY-") && words.any(is_chain)
    };
    let mut lines = text.lines().map(str::trim_start).filter(|line| !line.starts_with('#'));
    let line = lines.find(|line| table(line) || chain(line))?;
    Some(line.starts_with([':', '-']))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_of_ours_in_saved_files() {
        for (text, found) in [
            (":EGRESSGATEWAY-GUARD - [0:0]", Some(true)),
            ("*mangle\n-A PREROUTING -i eth0 -j EGRESSGATEWAY-MARK-REQUEST", Some(true)),
            (":EGRESSGATEWAY-TO-26000100 - [0:0]", Some(true)),
            ("table inet egress_datapath {", Some(false)),
            ("  add table netdev egress_datapath", Some(false)),
            ("table ip mangle {\n\tchain EGRESSGATEWAY-GUARD {", Some(false)),
            ("# table inet egress_datapath", None),
            (":EGRESSGATEWAY-OTHER - [0:0]", None),
            ("table ip egress_datapath {", None),
            ("-A PREROUTING -j ACCEPT", None),
            ("", None),
        ] {
            assert_eq!(find(text), found, "{text}");
        }
    }

    #[test]
    fn saved_files_are_read_with_bounds() {
        let root = std::env::temp_dir().join(format!("egress-saved-{}", std::process::id()));
        fs::create_dir_all(root.join("etc/nftables/folder")).unwrap();
        fs::create_dir_all(root.join("etc/sysconfig")).unwrap();
        let ours = "table inet egress_datapath {\n}\n";
        fs::write(root.join("etc/nftables/b.nft"), ours).unwrap();
        fs::write(root.join("etc/nftables/a.nft"), [0xff, 0, 7]).unwrap();
        fs::write(root.join("etc/sysconfig/iptables"), ":EGRESSGATEWAY-GUARD - [0:0]\n").unwrap();
        let mut large = vec![b'\n'; usize::try_from(SIZE).unwrap()];
        large.extend(ours.bytes());
        fs::write(root.join("etc/nftables.conf"), large).unwrap();
        let fifo = root.join("etc/sysconfig/ip6tables");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &fifo,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RUSR,
            0,
        )
        .unwrap();
        let name = |file: &str| root.join(file).display().to_string();
        let wanted = [
            Saved { file: name("etc/sysconfig/iptables"), for_iptables: true },
            Saved { file: name("etc/nftables/b.nft"), for_iptables: false },
        ];
        assert_eq!(saved(&root), wanted);
        fs::remove_dir_all(&root).unwrap();
    }
}
