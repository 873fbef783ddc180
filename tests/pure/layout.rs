//! Which file of the crate imports which, read from the sources.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// The files and folders of `src`: each imports only those above it, the last one also the root.
const ORDER: &[&str] = &[
    "serde_forms",
    "types",
    "error",
    "range",
    "event",
    "faults",
    "rules",
    "state",
    "count",
    "summary",
    "mark",
    "policy",
    "alloc",
    "cluster",
    "plan",
    "connection",
    "diff",
    "datapath",
    "reconcile",
    "sim",
    "kernel",
    "iptables",
    "preflight",
    "guide",
    "testing",
];

/// Files whose parts import what they are parts of, and why. Parts of one file make no circle among
/// themselves all the same.
const PARTS: &[(&str, &str)] = &[
    ("diff", "the change that the parts of a difference are collected in"),
    ("diff::op", "the operation that one part prints"),
    ("kernel::netlink::message", "flags and lengths of what is read and written"),
    ("kernel::nft::expr", "numbers of the expressions that are read and written"),
    ("kernel::nft::observe", "methods of the reader"),
    ("plan", "the draft that the parts of a plan write into"),
    ("preflight", "methods of the judge, and the problems that it finds"),
    ("reconcile", "methods of the reconciler"),
    ("sim", "methods of the simulator"),
    ("sim::path", "methods of the packet's walk"),
    ("state", "methods of the state"),
    ("testing::conformance", "the trial that the cases run in"),
];

/// Files by their path below `src`, with their text.
pub(crate) type Sources = BTreeMap<String, String>;

/// A module's imports by the module's path: `kernel::nft` for `kernel/nft.rs`.
type Imports = BTreeMap<String, BTreeSet<String>>;

#[test]
fn no_circle_of_imports_between_files() {
    let mut imports = imports(&sources());
    assert!(imports.len() > 100, "{}", imports.len());
    for (parent, reason) in PARTS {
        let mut needed = false;
        for (module, of) in &mut imports {
            needed |= is_inside(module, parent) && of.remove(*parent);
        }
        assert!(needed, "{parent} is no exception any more: {reason}");
    }
    let circles = circles(&imports);
    assert!(circles.is_empty(), "circles of imports:\n{}", circles.join("\n"));
}

#[test]
fn folders_import_only_what_stands_above_them() {
    let wrong = against_order(&imports(&sources()), ORDER);
    assert!(wrong.is_empty(), "against the order:\n{}", wrong.join("\n"));
}

#[test]
fn no_visibility_by_path_and_no_unsafe_code() {
    for (file, text) in sources() {
        let code = without_comments_and_strings(&text);
        assert!(!code.contains("pub(in"), "{file} has `pub(in …)`");
        let is_unsafe = words(&code).any(|word| word == "unsafe");
        assert!(!is_unsafe, "{file} has unsafe code");
    }
}

#[test]
fn layout_scan_finds_circles_and_imports_against_the_order() {
    let tree = |files: &[(&str, &str)]| -> Imports {
        let files = files.iter().map(|(file, text)| ((*file).to_owned(), (*text).to_owned()));
        imports(&files.collect())
    };
    let found = tree(&[
        ("lib.rs", "mod a; mod b; #[cfg(test)] mod tests; pub use a::A;"),
        ("a.rs", "mod one; mod two; use crate::b::B; // use crate::b::one;\nfn f() { \"{\" }"),
        (
            "a/one.rs",
            "use super::{two::{Two, three::Three}};\n#[cfg(test)]\nmod tests { use crate::b::X; }",
        ),
        ("a/two.rs", "fn f<'a>(c: char) -> bool { c == '\"' && super::one::yes(\"crate::b::x\") }"),
        ("b.rs", "#[cfg(test)] use crate::a::A; fn f() { let x: crate::a::one::One; }"),
        ("tests.rs", "use crate::b::B;"),
    ]);
    let names = |module: &str| found[module].iter().map(String::as_str).collect::<Vec<_>>();
    assert_eq!(names("a"), ["a::one", "a::two", "b"]);
    assert_eq!(names("a::one"), ["a::two"]);
    assert_eq!(names("a::two"), ["a::one"]);
    assert_eq!(names("b"), ["a::one"]);
    assert!(!found.contains_key("tests"));
    assert_eq!(circles(&found), ["a::one -> a::two -> a::one"]);
    assert_eq!(against_order(&found, &["a", "b"]), ["a imports b"]);
    assert_eq!(against_order(&found, &["b", "a"]), ["b imports a::one"]);
    assert_eq!(against_order(&found, &["a"]), ["a imports b", "b has no place"]);
    let parent = tree(&[
        ("lib.rs", "mod a;"),
        ("a.rs", "mod part; pub struct A;"),
        ("a/part.rs", "use super::A;"),
    ]);
    assert_eq!(circles(&parent), ["a -> a::part -> a"]);
}

pub(crate) fn sources() -> Sources {
    let mut found = Sources::new();
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut folders = vec![src.clone()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let name = path.strip_prefix(&src).unwrap().to_str().unwrap().to_owned();
                found.insert(name, fs::read_to_string(&path).unwrap());
            }
        }
    }
    found
}

/// The imports of every module that is not for tests.
fn imports(sources: &Sources) -> Imports {
    let module = |file: &str| {
        let name = file.trim_end_matches(".rs").trim_end_matches("/mod").replace('/', "::");
        if name == "lib" { String::new() } else { name }
    };
    let text: BTreeMap<_, _> = sources.iter().map(|(file, text)| (module(file), text)).collect();
    let mut codes = BTreeMap::new();
    let mut left = vec![String::new()];
    while let Some(module) = left.pop() {
        let Some(text) = text.get(&module) else { continue };
        let code = without_tests(&without_comments_and_strings(text));
        left.extend(declared(&code).map(|name| join(&module, name)));
        codes.insert(module, code);
    }
    let resolved = |module: &String, code: &String| {
        let children: BTreeSet<_> = declared(code).collect();
        let mut found: BTreeSet<String> = children.iter().map(|name| join(module, name)).collect();
        for path in paths(code) {
            // In a module within a file at the top, `super` is that file.
            let own = path.first().is_some_and(|first| first == "super") && !module.contains("::");
            let path = Some(path).filter(|_| !own);
            let target = path.and_then(|path| absolute(module, &children, &path));
            let target = target.map(|path| deepest(&codes, &path));
            found.extend(target.filter(|target| target != module));
        }
        found
    };
    let all = codes.iter().filter(|(module, _)| !module.is_empty());
    all.map(|(module, code)| (module.clone(), resolved(module, code))).collect()
}

fn join(module: &str, name: &str) -> String {
    if module.is_empty() { name.to_owned() } else { format!("{module}::{name}") }
}

fn is_inside(module: &str, folder: &str) -> bool {
    module.strip_prefix(folder).is_some_and(|rest| rest.starts_with("::"))
}

/// Names of `mod name;`.
fn declared(code: &str) -> impl Iterator<Item = &str> {
    code.split("mod ").skip(1).filter_map(|rest| {
        let (name, _) = rest.split_once(';')?;
        words(name).next().filter(|word| *word == name)
    })
}

/// The module that has what a path names.
fn deepest(codes: &BTreeMap<String, String>, path: &[String]) -> String {
    let mut lengths = (0..=path.len()).rev().map(|length| path[..length].join("::"));
    lengths.find(|module| codes.contains_key(module)).unwrap_or_default()
}

/// A path from the root of the crate; `None` for one into another crate.
fn absolute(module: &str, children: &BTreeSet<&str>, path: &[String]) -> Option<Vec<String>> {
    let mut here: Vec<String> = module.split("::").map(str::to_owned).collect();
    let (first, mut rest) = path.split_first()?;
    match first.as_str() {
        "crate" => here.clear(),
        "self" => {}
        "super" => {
            here.pop();
            while let Some((_, deeper)) = rest.split_first().filter(|(next, _)| *next == "super") {
                here.pop();
                rest = deeper;
            }
        }
        child if children.contains(child) => here.push(child.to_owned()),
        _ => return None,
    }
    here.extend(rest.iter().cloned());
    Some(here)
}

/// All paths in code that have more than one part, those of `use {…}` one by one.
fn paths(code: &str) -> Vec<Vec<String>> {
    let mut found = Vec::new();
    let mut tokens = tokens(code).into_iter().peekable();
    // The parts in front of each open brace of a `use`, and those of the path that is read.
    let (mut open, mut path, mut joined, mut in_use) = (Vec::new(), Vec::new(), false, false);
    let mut end = |path: &mut Vec<String>| {
        if path.len() > 1 {
            found.push(path.clone());
        }
    };
    while let Some(token) = tokens.next() {
        match token.as_str() {
            "use" => in_use = true,
            "::" => joined = true,
            "{" if in_use && joined => open.push(path.clone()),
            "," | "}" if in_use && !open.is_empty() => {
                end(&mut path);
                let outer = open.last().cloned().unwrap_or_default();
                path = if token == "}" { Vec::new() } else { outer };
                if token == "}" {
                    open.pop();
                    if let (Some(","), Some(outer)) =
                        (tokens.peek().map(String::as_str), open.last())
                    {
                        path.clone_from(outer);
                        tokens.next();
                    }
                }
                joined = true;
            }
            word if word.starts_with(|c: char| c.is_alphanumeric() || c == '_') => {
                if !joined {
                    end(&mut path);
                    path.clear();
                }
                path.push(token);
                joined = false;
            }
            other => {
                end(&mut path);
                path.clear();
                joined = false;
                in_use &= other != ";";
            }
        }
    }
    found
}

fn tokens(code: &str) -> Vec<String> {
    let mut found: Vec<String> = Vec::new();
    let mut after_word = false;
    let mut after_colon = false;
    for c in code.chars() {
        let is_part = c.is_alphanumeric() || c == '_';
        match found.last_mut() {
            Some(last) if is_part && after_word => last.push(c),
            Some(last) if c == ':' && after_colon && last == ":" => last.push(c),
            _ if c.is_whitespace() => {}
            _ => found.push(c.to_string()),
        }
        (after_word, after_colon) = (is_part, c == ':');
    }
    found
}

fn words(code: &str) -> impl Iterator<Item = &str> {
    let parts = code.split(|c: char| !c.is_alphanumeric() && c != '_');
    parts.filter(|word| !word.is_empty())
}

/// Code with comments, strings and characters left out.
fn without_comments_and_strings(text: &str) -> String {
    let mut code = String::new();
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let raw =
            rest.strip_prefix('r').map(|rest| rest.len() - rest.trim_start_matches('#').len());
        let is_raw = raw
            .filter(|hashes| rest[1 + hashes..].starts_with('"'))
            .filter(|_| !code.ends_with(|before: char| before.is_alphanumeric() || before == '_'));
        let length = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            rest.find("*/").map_or(rest.len(), |at| at + 2)
        } else if let Some(hashes) = is_raw {
            let close = format!("\"{}", "#".repeat(hashes));
            let begin = 2 + hashes;
            rest[begin..].find(&close).map_or(rest.len(), |at| begin + at + close.len())
        } else if c == '"' {
            quoted(rest, '"')
        } else if c == '\'' && is_character(rest) {
            quoted(rest, '\'')
        } else {
            code.push(c);
            c.len_utf8()
        };
        rest = &rest[length..];
    }
    code
}

/// Whether a character begins here, not a lifetime.
fn is_character(rest: &str) -> bool {
    let mut chars = rest.chars().skip(1);
    chars.next() == Some('\\') || chars.next() == Some('\'')
}

/// Length of what stands between two of these quotes, with both.
fn quoted(rest: &str, quote: char) -> usize {
    let mut escaped = true;
    for (at, c) in rest.char_indices() {
        if c == quote && !escaped {
            return at + c.len_utf8();
        }
        escaped = c == '\\' && !escaped;
    }
    rest.len()
}

/// Code without the items that are for tests.
fn without_tests(code: &str) -> String {
    let mut kept = String::new();
    let mut rest = code;
    while let Some(at) = rest.find("#[cfg(test)]") {
        kept.push_str(&rest[..at]);
        rest = &rest[at..];
        rest = &rest[item(rest)..];
    }
    kept.push_str(rest);
    kept
}

/// Length of an item with its attributes.
fn item(code: &str) -> usize {
    let mut depth = 0_usize;
    let is_use = {
        let item = code.trim_start_matches("#[cfg(test)]");
        words(item).find(|word| *word != "pub" && *word != "crate" && *word != "super")
            == Some("use")
    };
    for (at, c) in code.char_indices() {
        match c {
            '(' | '[' | '{' => depth += 1,
            ')' | ']' => depth -= 1,
            '}' => {
                depth -= 1;
                if depth == 0 && !is_use {
                    return at + 1;
                }
            }
            ';' if depth == 0 => return at + 1,
            _ => {}
        }
    }
    code.len()
}

/// Imports of a folder from one that does not stand above it, and folders without a place.
fn against_order(imports: &Imports, order: &[&str]) -> Vec<String> {
    let top = |module: &str| module.split("::").next().unwrap_or_default().to_owned();
    let place = |module: &str| match top(module) {
        root if root.is_empty() => order.len().checked_sub(1),
        top => order.iter().position(|name| *name == top),
    };
    let mut wrong = Vec::new();
    for (module, of) in imports {
        let Some(here) = place(module) else {
            wrong.push(format!("{module} has no place"));
            continue;
        };
        let not_above = of.iter().filter(|other| place(other).is_none_or(|there| there > here));
        wrong.extend(not_above.map(|other| format!("{module} imports {other}")));
    }
    wrong
}

/// A shortest circle through each module that is in one.
fn circles(imports: &Imports) -> Vec<String> {
    let mut found = Vec::new();
    let mut in_circle = BTreeSet::new();
    for start in imports.keys() {
        if in_circle.contains(start) {
            continue;
        }
        let mut from: BTreeMap<&String, &String> = BTreeMap::new();
        let mut left = std::collections::VecDeque::from([start]);
        while let Some(module) = left.pop_front() {
            for next in imports.get(module).into_iter().flatten() {
                if from.contains_key(next) {
                    continue;
                }
                from.insert(next, module);
                left.push_back(next);
            }
        }
        if let Some(mut at) = from.get(start).copied() {
            let mut circle = vec![start.as_str()];
            while at != start {
                circle.push(at);
                at = from[at];
            }
            circle.push(start);
            circle.reverse();
            in_circle.extend(circle.iter().map(|module| (*module).to_owned()));
            found.push(circle.join(" -> "));
        }
    }
    found
}
