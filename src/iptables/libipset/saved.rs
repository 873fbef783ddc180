//! Parser of `ipset save` output.

use std::collections::BTreeMap;

use ipnet::IpNet;

use crate::error::KernelError;
use crate::state::{Ipset, IpsetContents, MarkBits, Member};

type Found = BTreeMap<Ipset, IpsetContents>;

/// Reads sets of the datapath and their members; lines about other sets are skipped.
///
/// # Errors
///
/// A line about a set of the datapath has a form that the datapath never writes.
pub(crate) fn read(text: &str) -> Result<Found, KernelError> {
    let mut found = Found::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let (verb, name) = (words.next(), words.next());
        let Some(set) = name.and_then(Ipset::from_name) else { continue };
        let words: Vec<&str> = words.collect();
        let known = match verb {
            Some("create") => create(&words).map(|contents| drop(found.insert(set, contents))),
            Some("add") => member(&words).zip(found.get_mut(&set)).map(|((net, member), set)| {
                set.members.insert(net, member);
            }),
            _ => None,
        };
        if known.is_none() {
            let request = format!("ipset save {set}");
            let error = KernelError::answer(request, "what was printed is of no set of ours");
            return Err(error.with_words(Some(line.to_owned())));
        }
    }
    Ok(found)
}

fn create(words: &[&str]) -> Option<IpsetContents> {
    let (kind, options) = words.split_first()?;
    let value = |name: &str| options.iter().skip_while(|word| **word != name).nth(1);
    if *kind != "hash:net" {
        return None;
    }
    let mut contents = IpsetContents::of([]);
    contents.capacity = value("maxelem")?.parse().ok()?;
    contents.with_marks = options.contains(&"skbinfo");
    Some(contents)
}

fn member(words: &[&str]) -> Option<(IpNet, Member)> {
    let (net, options) = words.split_first()?;
    // A single address has no prefix length.
    let net = net.parse().ok().or_else(|| Some(net.parse::<std::net::IpAddr>().ok()?.into()))?;
    let member = match options {
        [] => Member::In,
        [.., "nomatch"] => Member::Not,
        ["skbmark", bits] => {
            let (value, mask) = bits.split_once('/').unwrap_or((bits, "0xffffffff"));
            let number = |text: &str| u32::from_str_radix(text.strip_prefix("0x")?, 16).ok();
            Member::Marked(MarkBits { mask: number(mask)?, value: number(value)? })
        }
        _ => return None,
    };
    Some((net, member))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::Family;

    #[test]
    fn what_is_printed_is_read_back() {
        let text = "\
create egress4-marks hash:net family inet hashsize 64 maxelem 65536 skbinfo bucketsize 12 initval 0x9e
add egress4-marks 10.2.0.1
add egress4-marks 10.1.0.0/16 nomatch
add egress4-marks 10.0.0.0/8 skbmark 0x26000100/0xffffff00
add egress4-marks 10.3.0.0/16 skbmark 0x26000100
create egress-src-v4-x hash:ip family inet
add egress-src-v4-x whatever
create egress6-selected hash:net family inet6 hashsize 1024 maxelem 131072
add egress6-selected 2001:db8::1
";
        let found = read(text).unwrap();
        let marked = |mask| Member::Marked(MarkBits { mask, value: 0x2600_0100 });
        let net = |text: &str| text.parse::<IpNet>().unwrap();
        let marks = &found[&Ipset::Marks(Family::V4)];
        assert_eq!((marks.capacity, marks.with_marks), (65_536, true));
        assert_eq!(marks.members[&net("10.2.0.1/32")], Member::In);
        assert_eq!(marks.members[&net("10.1.0.0/16")], Member::Not);
        assert_eq!(marks.members[&net("10.0.0.0/8")], marked(0xffff_ff00));
        assert_eq!(marks.members[&net("10.3.0.0/16")], marked(u32::MAX));
        let selected = &found[&Ipset::Selected(Family::V6)];
        assert_eq!((selected.capacity, selected.members.len()), (131_072, 1));
        assert_eq!(found.len(), 2);
    }

    #[test]
    fn a_set_of_our_name_and_another_kind_is_an_error() {
        for line in [
            "create egress4-marks hash:ip maxelem 4",
            "create egress4-marks hash:net",
            "add egress4-marks 10.0.0.0/8",
            "create egress4-marks hash:net maxelem 4\nadd egress4-marks 10.0.0.0/8 timeout 7",
            "create egress4-marks hash:net maxelem 4\nadd egress4-marks ten",
        ] {
            let error = read(line).unwrap_err();
            assert!(error.to_string().contains("egress4-marks"), "{error}");
        }
    }
}
