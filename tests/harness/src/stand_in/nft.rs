//! `nft`: tables, chains, elements, and rules of the few statements that other programs are played
//! with.

use std::io::{self, Read};
use std::net::IpAddr;

use super::netlink::{Body, NETFILTER, Netlink, attributes, flag, octets};
use super::words::{Words, net, unknown};

/// Requests of nf_tables (`include/uapi/linux/netfilter/nf_tables.h`), and of a transaction.
const NF_TABLES: u8 = 10;
const BEGIN: u16 = 16;
const END: u16 = 17;
const NEW_TABLE: u16 = request(0);
const LIST_TABLES: u16 = request(1);
const DELETE_TABLE: u16 = request(2);
const NEW_CHAIN: u16 = request(3);
const LIST_CHAINS: u16 = request(4);
const DELETE_CHAIN: u16 = request(5);
const NEW_RULE: u16 = request(6);
const LIST_RULES: u16 = request(7);
const DELETE_RULE: u16 = request(8);
const NEW_SET: u16 = request(9);
const LIST_SETS: u16 = request(10);
const NEW_ELEMENT: u16 = request(12);
const LIST_ELEMENTS: u16 = request(13);
const DELETE_ELEMENT: u16 = request(14);

const fn request(number: u16) -> u16 {
    (NF_TABLES as u16) << 8 | number
}

type Request = (u16, u16, Body);

pub(super) fn main(mut words: Words) -> io::Result<String> {
    let mut text = String::new();
    if words.take("-v") {
        return Ok("a stand-in for nft\n".to_owned());
    }
    if words.take("--terse") {
        return counters(words);
    }
    if words.take("-s") {
        return ruleset(words);
    }
    if words.take("-f") {
        if !words.take("-") {
            return Err(unknown("nft -f but of standard input"));
        }
        io::stdin().read_to_string(&mut text)?;
    } else {
        while let Some(word) = words.next() {
            text.push_str(&word);
            text.push(' ');
        }
    }
    let requests = commands(&text)?;
    let batch = |kind| (kind, Body::default().raw(&[0, 0, 0, NF_TABLES]));
    let mut netlink = Netlink::open(NETFILTER)?;
    netlink.transaction(&[batch(BEGIN)], &requests, &[batch(END)])?;
    Ok(String::new())
}

/// `nft --terse list table`: of each chain the rules that count.
fn counters(mut words: Words) -> io::Result<String> {
    if !(words.take("list") && words.take("table")) {
        return Err(unknown("nft --terse but list table"));
    }
    let table = Table::read(&mut words)?;
    let request = table.header().text(1, &table.name);
    let mut text = String::new();
    for entry in Netlink::open(NETFILTER)?.dump(LIST_RULES, &request)? {
        for (kind, value) in attributes(entry.get(4..).unwrap_or_default()) {
            match kind {
                2 => {
                    let chain = String::from_utf8_lossy(value);
                    text.push_str(&format!("chain {} {{\n", chain.trim_end_matches('\0')));
                }
                4 => {
                    for (_, expression) in attributes(value) {
                        text.extend(counter(expression));
                    }
                }
                _ => {}
            }
        }
    }
    Ok(text)
}

/// `nft -s list ruleset`: all objects, a line for each, but for handles, uses and counters.
fn ruleset(mut words: Words) -> io::Result<String> {
    if !(words.take("list") && words.take("ruleset")) {
        return Err(unknown("nft -s but list ruleset"));
    }
    let mut netlink = Netlink::open(NETFILTER)?;
    let mut text = String::new();
    // Of a set the attributes that name it are those which its elements are asked for by.
    let lists: [(u16, &[u16]); 4] = [
        (LIST_TABLES, &[3, 4, 7]),
        (LIST_CHAINS, &[2, 6, 8]),
        (LIST_RULES, &[3, 6]),
        (LIST_SETS, &[16]),
    ];
    for (list, volatile) in lists {
        for entry in netlink.dump(list, &header(0))? {
            let family = entry.first().copied().unwrap_or(0);
            let object = attributes(entry.get(4..).unwrap_or_default());
            text.push_str(&format!("{list:x} {family}"));
            for (kind, value) in &object {
                match kind {
                    kind if volatile.contains(kind) => {}
                    4 if list == LIST_RULES => {
                        let steady = |(_, it): &(u16, &[u8])| counter(it).is_none();
                        text.push_str(&format!(
                            " {:02x?}",
                            attributes(value).into_iter().filter(steady).collect::<Vec<_>>()
                        ));
                    }
                    kind => text.push_str(&format!(" {kind}={value:02x?}")),
                }
            }
            text.push('\n');
            if let (LIST_SETS, [(1, table), (2, set), ..]) = (list, &object[..]) {
                let request = header(family).put(1, table).put(2, set);
                for elements in netlink.dump(LIST_ELEMENTS, &request)? {
                    text.push_str(&listed_elements(set, &elements));
                }
            }
        }
    }
    Ok(text)
}

/// The elements in a message of a listing, a line for each: key, data and flags.
fn listed_elements(set: &[u8], message: &[u8]) -> String {
    let mut text = String::new();
    let lists = attributes(message.get(4..).unwrap_or_default()).into_iter();
    for (_, list) in lists.filter(|(kind, _)| *kind == 3) {
        for (_, element) in attributes(list) {
            let kept: Vec<_> =
                attributes(element).into_iter().filter(|(kind, _)| matches!(kind, 1..=3)).collect();
            text.push_str(&format!("{set:02x?} {kept:02x?}\n"));
        }
    }
    text
}

/// A counter among the expressions of a rule, as `nft` prints it.
fn counter(expression: &[u8]) -> Option<String> {
    let [(1, b"counter\0"), (2, data)] = attributes(expression)[..] else { return None };
    let number = |wanted: u16| {
        let (_, value) = attributes(data).into_iter().find(|(kind, _)| *kind == wanted)?;
        value.first_chunk().map(|bytes| u64::from_be_bytes(*bytes))
    };
    Some(format!("counter packets {} bytes {}\n", number(2)?, number(1)?))
}

/// Words and punctuation; a line ends as a statement does, by `;`.
fn tokens(text: &str) -> Words {
    let mut spaced = String::new();
    for letter in text.chars() {
        match letter {
            '{' | '}' | ';' | ',' => spaced.extend([' ', letter, ' ']),
            '\n' => spaced.push_str(" ; "),
            letter => spaced.push(letter),
        }
    }
    Words::new(spaced.split_whitespace().map(str::to_owned).collect())
}

fn commands(text: &str) -> io::Result<Vec<Request>> {
    let mut words = tokens(text);
    let mut requests = Vec::new();
    while let Some(word) = words.next() {
        match word.as_str() {
            ";" => {}
            "table" => {
                let table = Table::read(&mut words)?;
                requests.push(table.create(0));
                table.block(&mut words, &mut requests)?;
            }
            "add" | "insert" | "delete" | "flush" => command(&word, &mut words, &mut requests)?,
            word => return Err(unknown(format_args!("nft {word}"))),
        }
    }
    Ok(requests)
}

fn command(verb: &str, words: &mut Words, requests: &mut Vec<Request>) -> io::Result<()> {
    let object = words.word()?;
    if (verb, object.as_str()) == ("flush", "ruleset") {
        requests.push((DELETE_TABLE, 0, header(0)));
        return Ok(());
    }
    let table = Table::read(words)?;
    let named = |name: &str, at| table.header().text(1, &table.name).text(at, name);
    requests.push(match (verb, object.as_str()) {
        ("add", "table") => {
            let mut flags = 0;
            if words.take("{") {
                for word in ["flags", "dormant", ";", "}"] {
                    if !words.take(word) && word != ";" {
                        return Err(unknown("a table but with flags dormant"));
                    }
                }
                flags = 1;
            }
            table.create(flags)
        }
        ("delete", "table") => (DELETE_TABLE, 0, table.header().text(1, &table.name)),
        ("flush", "table") => (DELETE_RULE, 0, table.header().text(1, &table.name)),
        ("add", "chain") => {
            let name = words.word()?;
            if words.peek() == Some("{") {
                return Err(unknown("nft add chain with a hook"));
            }
            (NEW_CHAIN, flag::CREATE, named(&name, 3))
        }
        ("add", "set") => return table.set(words, requests),
        ("delete", "chain") => (DELETE_CHAIN, 0, named(&words.word()?, 3)),
        ("flush", "chain") => (DELETE_RULE, 0, named(&words.word()?, 2)),
        ("flush", "map" | "set") => (DELETE_ELEMENT, 0, named(&words.word()?, 2)),
        ("add" | "insert", "rule") => {
            let chain = words.word()?;
            let flags = flag::CREATE | if verb == "add" { flag::APPEND } else { 0 };
            (NEW_RULE, flags, named(&chain, 2).nest(4, table.rule(words)?))
        }
        ("add" | "delete", "element") => {
            let set = words.word()?;
            let elements = elements(words, &set)?;
            let kind = if verb == "add" { NEW_ELEMENT } else { DELETE_ELEMENT };
            (kind, flag::CREATE, named(&set, 2).nest(3, elements))
        }
        (verb, object) => return Err(unknown(format_args!("nft {verb} {object}"))),
    });
    Ok(())
}

/// `struct nfgenmsg`.
fn header(family: u8) -> Body {
    Body::default().raw(&[family, 0, 0, 0])
}

struct Table {
    family: u8,
    name: String,
}

impl Table {
    fn read(words: &mut Words) -> io::Result<Self> {
        let family = match words.word()?.as_str() {
            "inet" => 1,
            "ip" => 2,
            "netdev" => 5,
            "ip6" => 10,
            family => return Err(unknown(format_args!("the family {family}"))),
        };
        Ok(Self { family, name: words.word()? })
    }

    fn header(&self) -> Body {
        header(self.family)
    }

    fn create(&self, flags: u32) -> Request {
        (NEW_TABLE, flag::CREATE, self.header().text(1, &self.name).be32(2, flags))
    }

    /// A set of single values, with elements or without.
    fn set(&self, words: &mut Words, requests: &mut Vec<Request>) -> io::Result<()> {
        let name = words.word()?;
        let named = self.header().text(1, &self.name).text(2, &name);
        if !words.take("{") {
            return Err(unknown("a set without braces"));
        }
        while words.take(";") {}
        // `nft`'s own number of the type, which only `nft` reads, and the length of a value.
        let (number, length) = match (words.take("type"), words.word()?.as_str()) {
            (true, "ipv4_addr") => (7, 4),
            (true, "mark") => (19, 4),
            (_, kind) => return Err(unknown(format_args!("a set of {kind}"))),
        };
        let set = named.clone().be32(3, 0).be32(4, number).be32(5, length).be32(10, 1);
        requests.push((NEW_SET, flag::CREATE, set));
        loop {
            match words.word()?.as_str() {
                ";" | "=" => {}
                "}" => return Ok(()),
                "elements" => {
                    words.take("=");
                    let elements = elements(words, &name)?;
                    requests.push((NEW_ELEMENT, flag::CREATE, named.clone().nest(3, elements)));
                }
                word => return Err(unknown(format_args!("{word} in a set"))),
            }
        }
    }

    /// The chains and sets between braces.
    fn block(&self, words: &mut Words, requests: &mut Vec<Request>) -> io::Result<()> {
        if !words.take("{") {
            return Err(unknown("a table without braces"));
        }
        loop {
            match words.word()?.as_str() {
                ";" => {}
                "}" => return Ok(()),
                "chain" => self.chain(words, requests)?,
                "set" => self.set(words, requests)?,
                word => return Err(unknown(format_args!("{word} in a table"))),
            }
        }
    }

    fn chain(&self, words: &mut Words, requests: &mut Vec<Request>) -> io::Result<()> {
        let name = words.word()?;
        if !words.take("{") {
            return Err(unknown("a chain without braces"));
        }
        while words.take(";") {}
        let mut chain = self.header().text(1, &self.name).text(3, &name);
        if words.take("type") {
            let kind = words.word()?;
            let number = match (words.take("hook"), words.word()?.as_str()) {
                (true, "prerouting") => 0,
                (true, "input") => 1,
                (true, "forward") => 2,
                (true, "output") => 3,
                (true, "postrouting") => 4,
                (_, hook) => return Err(unknown(format_args!("the hook {hook}"))),
            };
            words.take("priority");
            let priority = match words.word()?.as_str() {
                "raw" => -300,
                "mangle" => -150,
                "dstnat" => -100,
                "filter" => 0,
                "srcnat" => 100,
                number => number.parse().map_err(|_| unknown(format_args!("priority {number}")))?,
            };
            let hook = Body::default().be32(1, number).put(2, &i32::to_be_bytes(priority));
            chain = chain.nest(4, hook).text(7, &kind);
        }
        requests.push((NEW_CHAIN, flag::CREATE, chain));
        loop {
            while words.take(";") {}
            if words.take("}") {
                return Ok(());
            }
            let rule = self.header().text(1, &self.name).text(2, &name).nest(4, self.rule(words)?);
            requests.push((NEW_RULE, flag::CREATE | flag::APPEND, rule));
        }
    }

    /// The statements up to the end of a rule.
    fn rule(&self, words: &mut Words) -> io::Result<Body> {
        let mut rule = Body::default();
        while let Some(word) = words.peek().map(str::to_owned) {
            if word == ";" || word == "}" {
                break;
            }
            words.next();
            rule = match word.as_str() {
                "counter" => expression(rule, "counter", Body::default()),
                "masquerade" => expression(rule, "masq", Body::default()),
                "accept" => verdict(rule, 1),
                "drop" => verdict(rule, 0),
                "return" => verdict(rule, -5),
                "ip" | "ip6" => self.matched(rule, words)?,
                "icmp" | "icmpv6" => unreachable(rule, &word, words)?,
                "meta" => mark(rule, words)?,
                "ct" => tracked(rule, words)?,
                "dnat" => dnat(rule, words)?,
                word => return Err(unknown(format_args!("the statement {word}"))),
            };
        }
        Ok(rule)
    }

    /// Compares an address of the packet with a prefix.
    fn matched(&self, rule: Body, words: &mut Words) -> io::Result<Body> {
        let field = words.word()?;
        let operator = u32::from(words.take("!="));
        let (address, length) = net(&words.word()?)?;
        // Where the addresses are in the header, and the number of the protocol for `meta`.
        let (offset, protocol) = match (address, field.as_str()) {
            (IpAddr::V4(_), "saddr") => (12, 2),
            (IpAddr::V4(_), "daddr") => (16, 2),
            (IpAddr::V6(_), "saddr") => (8, 10),
            (IpAddr::V6(_), "daddr") => (24, 10),
            (_, field) => return Err(unknown(format_args!("the field {field}"))),
        };
        let address = octets(address);
        let bytes = u32::try_from(address.len()).unwrap_or(0);
        let mask = mask(length, address.len());
        let mut rule = rule;
        if self.family == 1 {
            let meta = Body::default().be32(1, 1).be32(2, 15);
            rule = compared(expression(rule, "meta", meta), 0, &[protocol]);
        }
        let payload = Body::default().be32(1, 1).be32(2, 1).be32(3, offset).be32(4, bytes);
        rule = masked(expression(rule, "payload", payload), &mask, &vec![0; mask.len()]);
        Ok(compared(rule, operator, &address))
    }
}

/// The first register, with what is outside the mask taken away and these bits turned over.
fn masked(rule: Body, mask: &[u8], xor: &[u8]) -> Body {
    let bitwise = Body::default()
        .be32(1, 1)
        .be32(2, 1)
        .be32(3, u32::try_from(mask.len()).unwrap_or(0))
        .nest(4, Body::default().put(1, mask))
        .nest(5, Body::default().put(1, xor));
    expression(rule, "bitwise", bitwise)
}

/// A value in the first register.
fn loaded(rule: Body, value: &[u8]) -> Body {
    let value = Body::default().put(1, value);
    expression(rule, "immediate", Body::default().be32(1, 1).nest(2, value))
}

/// `meta mark set NUMBER` or `meta mark set meta mark | NUMBER`.
fn mark(rule: Body, words: &mut Words) -> io::Result<Body> {
    const MARK: u32 = 3;
    if !(words.take("mark") && words.take("set")) {
        return Err(unknown("meta but mark set"));
    }
    let rule = if words.take("meta") {
        if !(words.take("mark") && words.take("|")) {
            return Err(unknown("a mark but meta mark | NUMBER"));
        }
        let bits = words.number()?;
        let rule = expression(rule, "meta", Body::default().be32(1, 1).be32(2, MARK));
        masked(rule, &(!bits).to_ne_bytes(), &bits.to_ne_bytes())
    } else {
        loaded(rule, &words.number()?.to_ne_bytes())
    };
    Ok(expression(rule, "meta", Body::default().be32(2, MARK).be32(3, 1)))
}

/// `ct state new` or `ct original zone set NUMBER`.
fn tracked(rule: Body, words: &mut Words) -> io::Result<Body> {
    const STATE: u32 = 0;
    const ZONE: u32 = 17;
    /// The bit of `IP_CT_NEW`.
    const NEW: u32 = 8;
    if words.take("state") && words.take("new") {
        let rule = expression(rule, "ct", Body::default().be32(1, 1).be32(2, STATE));
        let rule = masked(rule, &NEW.to_ne_bytes(), &[0; 4]);
        return Ok(compared(rule, 1, &[0; 4]));
    }
    if words.take("original") && words.take("zone") && words.take("set") {
        let rule = loaded(rule, &words.value::<u16>()?.to_ne_bytes());
        let zone = Body::default().be32(2, ZONE).put(3, &[0]).be32(4, 1);
        return Ok(expression(rule, "ct", zone));
    }
    Err(unknown("ct but state new and original zone set"))
}

/// `icmp type destination-unreachable`, of either version.
fn unreachable(rule: Body, version: &str, words: &mut Words) -> io::Result<Body> {
    if !(words.take("type") && words.take("destination-unreachable")) {
        return Err(unknown("icmp but type destination-unreachable"));
    }
    let (protocol, kind) = if version == "icmp" { (1, 3) } else { (58, 1) };
    let meta = Body::default().be32(1, 1).be32(2, 16);
    let rule = compared(expression(rule, "meta", meta), 0, &[protocol]);
    let payload = Body::default().be32(1, 1).be32(2, 2).be32(3, 0).be32(4, 1);
    Ok(compared(expression(rule, "payload", payload), 0, &[kind]))
}

/// `dnat ip to ADDRESS`, of either version.
fn dnat(rule: Body, words: &mut Words) -> io::Result<Body> {
    let family = if words.word()? == "ip" { 2 } else { 10 };
    if !words.take("to") {
        return Err(unknown("dnat without to"));
    }
    let rule = loaded(rule, &octets(words.value::<IpAddr>()?));
    Ok(expression(rule, "nat", Body::default().be32(1, 1).be32(2, family).be32(3, 1)))
}

fn mask(length: u8, bytes: usize) -> Vec<u8> {
    let ones = |at: usize| {
        let left = usize::from(length).saturating_sub(at * 8).min(8);
        u8::try_from(0xff00_u32 >> left & 0xff).unwrap_or(0)
    };
    (0..bytes).map(ones).collect()
}

fn expression(rule: Body, name: &str, data: Body) -> Body {
    rule.nest(1, Body::default().text(1, name).nest(2, data))
}

/// Compares the first register: 0 for equal, 1 for not equal.
fn compared(rule: Body, operator: u32, value: &[u8]) -> Body {
    let value = Body::default().put(1, value);
    expression(rule, "cmp", Body::default().be32(1, 1).be32(2, operator).nest(3, value))
}

fn verdict(rule: Body, code: i32) -> Body {
    let verdict = Body::default().put(1, &code.to_be_bytes());
    let data = Body::default().nest(2, verdict);
    expression(rule, "immediate", Body::default().be32(1, 0).nest(2, data))
}

/// The elements between braces: addresses, prefixes of sets of intervals, and `class : class`.
fn elements(words: &mut Words, set: &str) -> io::Result<Body> {
    let value = |bytes: &[u8]| Body::default().put(1, bytes);
    let mut found = Body::default();
    if !words.take("{") {
        return Err(unknown("elements without braces"));
    }
    while !words.take("}") {
        let word = words.word()?;
        if word == "," {
            continue;
        }
        let (address, length) = net(&word)?;
        let first = octets(address);
        let is_prefix = usize::from(length) < first.len() * 8;
        let mut element = Body::default().nest(1, value(&first));
        if words.take(":") {
            let data = words.word()?;
            let (major, minor) = data.split_once(':').ok_or_else(|| unknown(&data))?;
            let half = |text: &str| {
                u32::from_str_radix(text, 16).map_err(|_| unknown(format_args!("the class {text}")))
            };
            let class = half(major)? << 16 | half(minor)?;
            element = element.nest(2, value(&class.to_ne_bytes()));
        }
        found = found.nest(1, element);
        if is_prefix {
            let mut end = first.clone();
            for (byte, mask) in end.iter_mut().zip(mask(length, first.len())) {
                *byte |= !mask;
            }
            for byte in end.iter_mut().rev() {
                *byte = byte.wrapping_add(1);
                if *byte != 0 {
                    break;
                }
            }
            // `NFT_SET_ELEM_INTERVAL_END`
            found = found.nest(1, Body::default().nest(1, value(&end)).be32(3, 1));
        }
    }
    if found.0.is_empty() {
        return Err(unknown(format_args!("no elements of {set}")));
    }
    Ok(found)
}
