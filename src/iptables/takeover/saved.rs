//! Parser of `iptables-save` output for rules and chains of spidernet's egressgateway agent.

use std::collections::{BTreeMap, BTreeSet};

use crate::rules::iptables::words;
use crate::state::XtTable;

/// Agent chains with the name of a datapath chain: table, name, and name once set aside.
const NAMESAKES: [(XtTable, &str, &str); 2] = [
    (XtTable::Mangle, "EGRESSGATEWAY-MARK-REQUEST", "EGRESSGATEWAY-OLD-REQUEST"),
    (XtTable::Nat, "EGRESSGATEWAY-SNAT-EIP", "EGRESSGATEWAY-OLD-SNAT-EIP"),
];

/// Agent chain whose name the datapath does not use.
const REPLIES: (XtTable, &str) = (XtTable::Mangle, "EGRESSGATEWAY-REPLY-ROUTING");

fn is_chain(table: XtTable, name: &str) -> bool {
    let namesake =
        |&(of, own, aside): &(XtTable, &str, &str)| of == table && (own == name || aside == name);
    REPLIES == (table, name) || NAMESAKES.iter().any(namesake)
}

/// Prefix of the agent's rule hash and number of its characters.
const HASH: (&str, usize) = ("egw:", 16);

/// `iptables-restore` lines about the agent's objects in one table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Lines {
    /// Lines that rename chains with the name of a datapath chain.
    pub(crate) aside: Vec<String>,
    /// Lines that delete rules by specification, then chains.
    pub(crate) remove: Vec<String>,
}

/// Reads the agent's rules and chains, by table.
pub(crate) fn read(text: &str) -> BTreeMap<XtTable, Lines> {
    let mut found: BTreeMap<XtTable, Table<'_>> = BTreeMap::new();
    let mut table = None;
    for line in text.lines() {
        if let Some(name) = line.strip_prefix('*') {
            table = XtTable::ALL.into_iter().find(|table| table.name() == name);
        }
        let Some(table) = table else { continue };
        let here = found.entry(table).or_default();
        if let Some(rest) = line.strip_prefix(':') {
            let name = rest.split(' ').next().unwrap_or_default();
            if is_chain(table, name) {
                here.chains.insert(name);
            }
        } else if let Some(rest) = line.strip_prefix("-A ") {
            here.rule(rest);
        }
    }
    let lines = found.into_iter().map(|(table, found)| (table, found.lines(table)));
    lines.filter(|(_, lines)| !lines.remove.is_empty()).collect()
}

#[derive(Default)]
struct Table<'a> {
    /// Chains with a name of the agent.
    chains: BTreeSet<&'a str>,
    /// Rules of the agent, as printed.
    rules: Vec<&'a str>,
    /// Chains that contain a rule of the agent or are the target of one.
    proven: BTreeSet<String>,
    /// Chains that contain a rule of another program or are the target of one.
    shared: BTreeSet<String>,
}

impl<'a> Table<'a> {
    fn rule(&mut self, rule: &'a str) {
        let words = words(rule);
        let options = words.iter().zip(words.iter().skip(1));
        let value = |wanted: &'static [&'static str]| {
            let found = options.clone().filter(move |(o, _)| wanted.contains(&o.as_str()));
            found.map(|(_, value)| value.clone())
        };
        let theirs = value(&["--comment"]).any(|comment| is_hash(&comment));
        let chains = words.first().cloned().into_iter().chain(value(&["-j", "-g"]));
        if theirs {
            self.rules.push(rule);
            self.proven.extend(chains);
        } else {
            self.shared.extend(chains);
        }
    }

    fn lines(self, table: XtTable) -> Lines {
        let only_theirs =
            |chain: &&&str| self.proven.contains(**chain) && !self.shared.contains(**chain);
        let chains: Vec<&str> = self.chains.iter().filter(only_theirs).copied().collect();
        let rules = self.rules.iter().map(|rule| format!("-D {rule}"));
        let gone = chains.iter().map(|chain| format!("-X {chain}"));
        let namesakes = NAMESAKES.iter().filter(|(of, own, aside)| {
            *of == table && chains.contains(own) && !self.chains.contains(aside)
        });
        Lines {
            aside: namesakes.map(|(_, own, aside)| format!("-E {own} {aside}")).collect(),
            remove: rules.chain(gone).collect(),
        }
    }
}

/// Returns true for a comment that is the agent's hash of a rule, in URL-safe base64.
fn is_hash(comment: &str) -> bool {
    let (prefix, length) = HASH;
    comment.strip_prefix(prefix).is_some_and(|hash| {
        let known = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
        hash.len() == length && hash.bytes().all(known)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::mutate;

    const SAVED: &str = "\
*mangle
:PREROUTING ACCEPT [0:0]
:EGRESSGATEWAY-MARK-REQUEST - [0:0]
:EGRESSGATEWAY-REPLY-ROUTING - [0:0]
:EGRESSGATEWAY-OTHER - [0:0]
-A PREROUTING -m comment --comment \"egw:zY_4B-7mQk1rT0aP\" -m comment --comment \"Checking for EgressPolicy matched traffic\" -j EGRESSGATEWAY-MARK-REQUEST
-A PREROUTING -m comment --comment \"egw:aaaaaaaaaaaaaaaa\" -j EGRESSGATEWAY-REPLY-ROUTING
-A PREROUTING -m comment --comment \"egw:short\" -j EGRESSGATEWAY-OTHER
-A PREROUTING -m comment --comment \"of egw:aaaaaaaaaaaaaaaa\" -j ACCEPT
-A EGRESSGATEWAY-MARK-REQUEST -m comment --comment egw:bbbbbbbbbbbbbbbb -j MARK --set-xmark 0x26d9b723/0xffffffff
-A EGRESSGATEWAY-REPLY-ROUTING -m comment --comment egw:cccccccccccccccc -j ACCEPT
-A EGRESSGATEWAY-REPLY-ROUTING -s 203.0.113.77/32 -j DROP
COMMIT
*nat
:EGRESSGATEWAY-SNAT-EIP - [0:0]
:EGRESSGATEWAY-MARK-REQUEST - [0:0]
-A POSTROUTING -m comment --comment egw:dddddddddddddddd -j EGRESSGATEWAY-SNAT-EIP
COMMIT
*filter
:EGRESSGATEWAY-SNAT-EIP - [0:0]
-A FORWARD -m mark --mark 0x26000000 -j ACCEPT
COMMIT
";

    #[test]
    fn rules_are_known_by_their_hash_and_chains_by_their_rules() {
        let found = read(SAVED);
        let mangle = &found[&XtTable::Mangle].remove;
        assert_eq!(mangle.iter().filter(|line| line.starts_with("-D ")).count(), 4, "{mangle:#?}");
        let chains = |table| {
            let lines = &found[&table].remove;
            lines.iter().filter(|line| line.starts_with("-X ")).cloned().collect::<Vec<_>>()
        };
        // `EGRESSGATEWAY-REPLY-ROUTING` contains a rule of another program.
        assert_eq!(chains(XtTable::Mangle), ["-X EGRESSGATEWAY-MARK-REQUEST"]);
        assert_eq!(chains(XtTable::Nat), ["-X EGRESSGATEWAY-SNAT-EIP"]);
        assert!(!found.contains_key(&XtTable::Filter));
        let aside = "-E EGRESSGATEWAY-SNAT-EIP EGRESSGATEWAY-OLD-SNAT-EIP";
        assert_eq!(found[&XtTable::Nat].aside, [aside]);
    }

    #[test]
    fn names_fit() {
        // `XT_EXTENSION_MAXNAMELEN` with its NUL is 29.
        assert!(NAMESAKES.iter().all(|(_, _, aside)| aside.len() <= 28));
        // The names once set aside are not names of the datapath's chains.
        let is_ours = |name: &str| crate::state::XtName::from_name(name).is_some();
        assert!(NAMESAKES.iter().all(|(_, own, aside)| is_ours(own) && !is_ours(aside)));
    }

    #[test]
    fn mutated_listings() {
        let corpus = [SAVED.as_bytes().to_vec()];
        mutate::bytes(
            "chains of other programs in iptables",
            1,
            &corpus,
            mutate::Random::damaged,
            |bytes| {
                let text = String::from_utf8_lossy(bytes);
                let found = read(&text);
                (!found.is_empty()).then_some(bytes.len())
            },
        );
    }
}
