//! The guide has a row for each stable code, and none for a code that does not exist.

use std::collections::BTreeSet;

use crate::layout::sources;

/// The type, the code and the variant that has it: `PolicyError`, `host_bits`, `HostBits`.
type Code = (String, String, String);

#[test]
fn each_stable_code_has_a_row_in_the_guide() {
    let codes: BTreeSet<Code> = sources().values().flat_map(|text| codes(text)).collect();
    let types: BTreeSet<_> = codes.iter().map(|(of, ..)| of.as_str()).collect();
    let all =
        ["DenyReason", "Error", "Finding", "NodeError", "PlanError", "PolicyError", "Problem"];
    assert_eq!(types.into_iter().collect::<Vec<_>>(), all);
    let rows = rows(include_str!("../../src/guide/errors.md"));
    let missing: Vec<_> = codes.difference(&rows).collect();
    assert!(missing.is_empty(), "no row in src/guide/errors.md: {missing:#?}");
    let unknown: Vec<_> = rows.difference(&codes).collect();
    assert!(unknown.is_empty(), "rows of codes that do not exist: {unknown:#?}");
}

#[test]
fn code_scan_finds_each_arm_and_each_row() {
    let code = |of: &str, code: &str, variant: &str| (of.into(), code.into(), variant.into());
    let source = "impl One {\n    fn code(&self) -> &'static str {\n        match self {\n            \
                  Self::A => \"a_a\",\n            Self::Bb { .. } =>\n                \"b\",\n            \
                  Self::C(all) => all.first().map_or(\"c\", Two::code),\n        }\n    }\n}\n";
    assert_eq!(codes(source), [code("One", "a_a", "A"), code("One", "b", "Bb")]);
    let guide = "| code | `One`, severity `X` | next |\n|---|---|---|\n| `a_a`, `b` | `A`, `Bb`: \
                 `c` | `d` |\n| that of `Two` | `C` | |\n| | `D` | |\n\n| error | `One` |\n|---|---|\n\
                 | `e` | `E` |\n";
    assert_eq!(rows(guide), [code("One", "a_a", "A"), code("One", "b", "Bb")].into());
}

/// The codes that the arms of `fn code` in a file return, but for those of another type's `code`.
fn codes(text: &str) -> Vec<Code> {
    let mut found = Vec::new();
    for (start, _) in text.match_indices("fn code(") {
        let (before, body) = text.split_at(start);
        let (_, of) = before.rsplit_once("impl ").unwrap();
        let of = of.split([' ', '<']).next().unwrap();
        let body = body.split("\n    }\n").next().unwrap();
        for arm in body.split("Self::").skip(1) {
            let (pattern, value) = arm.split_once("=>").unwrap();
            let variant = pattern.split(|letter: char| !letter.is_alphanumeric()).next().unwrap();
            let value = value.trim_start().trim_start_matches('{').trim_start();
            match value.strip_prefix('"') {
                Some(code) => {
                    let code = code.split('"').next().unwrap();
                    found.push((of.to_owned(), code.to_owned(), variant.to_owned()));
                }
                None => assert!(value.contains("code"), "{of}::{variant} has no code: {value}"),
            }
        }
    }
    found
}

/// The rows of the tables whose first column is `code`.
fn rows(guide: &str) -> BTreeSet<Code> {
    let mut found = BTreeSet::new();
    let mut of = None;
    for line in guide.lines() {
        let mut cells = line.strip_prefix('|').into_iter().flat_map(|rest| rest.split('|'));
        let (first, second) = (cells.next().unwrap_or_default().trim(), cells.next());
        let variants = quoted(second.unwrap_or_default());
        if first == "code" {
            of = variants.first().cloned();
        } else if !line.starts_with('|') {
            of = None;
        } else if let (Some(of), true) = (&of, first.starts_with('`')) {
            let codes = quoted(first);
            assert!(codes.len() <= variants.len(), "a code without variant: {line}");
            found.extend(codes.into_iter().zip(variants).map(|(c, v)| (of.clone(), c, v)));
        }
    }
    found
}

/// The words in backticks.
fn quoted(cell: &str) -> Vec<String> {
    cell.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}
