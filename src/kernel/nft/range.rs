//! Ranges of interval sets, reconstructed from interval start and end elements.

use super::element::{Found, ip};
use crate::range::{IpRange, address, number};
use crate::state::{Key, KeyValue, Set, Value};
use crate::types::Family;

/// Returns the ranges of an interval set; `None` if the datapath never writes such elements.
pub(super) fn ranges(set: Set, found: Vec<Found>) -> Option<Vec<(Key, Value)>> {
    let family = set.family()?;
    let key = |range| Key::new(set, KeyValue::Range(range));
    let mut ends = Vec::with_capacity(found.len());
    for end in found {
        let at = number(ip(family, &end.key)?);
        ends.push((at, !end.is_end, end.value));
    }
    // At one address the end of a range sorts before the start of the next.
    ends.sort_by_key(|(at, is_start, _)| (*at, *is_start));
    ends.dedup_by_key(|(at, is_start, _)| (*at, *is_start));

    let mut ranges = Vec::new();
    let mut open: Option<(u128, Value)> = None;
    for (at, is_start, value) in ends {
        match (is_start, open.take()) {
            (true, None) => open = Some((at, value?)),
            (false, Some((first, value))) => {
                let range =
                    IpRange::new(address(family, first)?, address(family, at.checked_sub(1)?)?)?;
                ranges.push((key(range)?, value));
            }
            // `nft` starts a set without the lowest address with an end element at that address.
            (false, None) if at == 0 => {}
            _ => return None,
        }
    }
    if let Some((first, value)) = open {
        let last = match family {
            Family::V4 => u128::from(u32::MAX),
            Family::V6 => u128::MAX,
        };
        let range = IpRange::new(address(family, first)?, address(family, last)?)?;
        ranges.push((key(range)?, value));
    }
    Some(ranges)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::Data;

    const SET: Set = Set::Excluded(Family::V4);

    fn ends(list: &[(u32, bool)]) -> Vec<Found> {
        list.iter()
            .map(|(at, is_end)| Found {
                key: at.to_be_bytes().to_vec(),
                is_end: *is_end,
                value: Some(Value::plain(Data::None)),
            })
            .collect()
    }

    fn text(list: &[(u32, bool)]) -> Option<Vec<String>> {
        let ranges = ranges(SET, ends(list))?;
        Some(ranges.iter().map(|(key, _)| key.to_string()).collect())
    }

    #[test]
    fn ranges_come_from_their_ends_in_any_order() {
        let list =
            [(20, true), (0, true), (10, false), (20, false), (30, true), (u32::MAX - 1, false)];
        assert_eq!(
            text(&list).unwrap(),
            ["0.0.0.10-0.0.0.19", "0.0.0.20-0.0.0.29", "255.255.255.254/31"]
        );
        assert_eq!(text(&[(0, false)]).unwrap(), ["0.0.0.0/0"]);
        assert_eq!(text(&[]).unwrap(), [""; 0]);
    }

    #[test]
    fn ends_that_do_not_pair_are_not_ours() {
        assert_eq!(text(&[(5, true)]), None);
        assert_eq!(text(&[(5, false), (6, false), (7, true)]), None);
        assert_eq!(text(&[(5, false), (7, true), (9, true)]), None);
        let mut short = ends(&[(5, false)]);
        short[0].key.pop();
        assert_eq!(ranges(SET, short), None);
    }
}
