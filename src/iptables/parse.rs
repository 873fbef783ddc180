//! Parser of rules as `iptables-save` prints them.
//!
//! Only lines of the datapath's own chains, and those of built-in chains that jump to them, are
//! read. A part that is not understood is kept as it is written, and differs from every wanted
//! rule.

use std::collections::BTreeSet;
use std::mem::take;
use std::str::FromStr;

use crate::rules::ipset::Ipset;
use crate::rules::iptables::{
    CtState, Is, SINK_QUEUE, Side, XtMatch, XtName, XtRule, XtTarget, everything, words,
};
use crate::rules::stmt::{Direction, MarkBits};
use crate::types::{DeviceName, Family};

/// Returns the datapath chain that a line of a built-in chain jumps to, if any.
pub(crate) fn read_jump(words: &[String]) -> Option<XtName> {
    let at = words.iter().rposition(|word| word == "-j" || word == "-g")?;
    words.get(at + 1).and_then(|word| XtName::from_name(word)).filter(|name| !name.is_built_in())
}

/// Reads the rule specification after the chain's name.
pub(crate) fn read_rule(text: &str, family: Family) -> XtRule {
    let words = words(text);
    let mut reader = Reader {
        words: words.iter().map(String::as_str).collect(),
        family,
        module: "",
        protocol: "",
        rule: XtRule {
            matches: BTreeSet::new(),
            target: XtTarget::Unknown("".into()),
            comment: "".into(),
        },
    };
    if reader.read().is_some() {
        return reader.rule;
    }
    XtRule {
        matches: BTreeSet::new(),
        target: XtTarget::Unknown(text.trim().into()),
        comment: "".into(),
    }
}

struct Reader<'a> {
    words: std::collections::VecDeque<&'a str>,
    family: Family,
    /// Match or target module whose options follow.
    module: &'a str,
    protocol: &'a str,
    rule: XtRule,
}

impl Reader<'_> {
    fn next<T: FromStr>(&mut self) -> Option<T> {
        self.words.pop_front()?.parse().ok()
    }

    fn is(&mut self, word: &str) -> Option<()> {
        (self.words.pop_front()? == word).then_some(())
    }

    /// Reads the whole rule; `None` if it contains a word that the datapath never writes.
    fn read(&mut self) -> Option<()> {
        while let Some(word) = self.words.pop_front() {
            let (is, option) =
                if word == "!" { (Is::Not, self.words.pop_front()?) } else { (Is::So, word) };
            match option {
                "-m" if is == Is::So => {
                    self.module = self.words.pop_front()?;
                    if self.module == "socket" {
                        // The next word is its only option that the datapath writes, or no option.
                        let any = self.words.front() == Some(&"--nowildcard");
                        let socket = if any { XtMatch::AnySocket } else { XtMatch::Socket };
                        any.then(|| self.words.pop_front());
                        self.rule.matches.insert(socket).then_some(())?;
                    }
                }
                "-p" if is == Is::So => self.protocol = self.words.pop_front()?,
                "-j" if is == Is::So => {
                    self.protocol_alone()?;
                    return self.target();
                }
                "-g" if is == Is::So => {
                    self.protocol_alone()?;
                    self.rule.target = XtTarget::Goto(XtName::from_name(self.words.pop_front()?)?);
                    return self.words.is_empty().then_some(());
                }
                "--comment" if is == Is::So && self.module == "comment" => {
                    self.rule.comment = self.words.pop_front()?.into();
                }
                option => {
                    let found = self.matching(is, option)?;
                    // A repeated match would read back as a single one.
                    self.rule.matches.insert(found).then_some(())?;
                }
            }
        }
        None
    }

    /// Reads a protocol that no other match of the rule belongs to.
    fn protocol_alone(&mut self) -> Option<()> {
        match take(&mut self.protocol) {
            "" => Some(()),
            "udp" => self.rule.matches.insert(XtMatch::Udp).then_some(()),
            _ => None,
        }
    }

    fn matching(&mut self, is: Is, option: &str) -> Option<XtMatch> {
        let plain = |found: XtMatch| (is == Is::So).then_some(found);
        match (self.module, option) {
            (_, "-i") => {
                Some(XtMatch::InputDevice(is, DeviceName::new(self.next::<String>()?).ok()?))
            }
            (_, "-o") => {
                plain(XtMatch::OutputDevice(DeviceName::new(self.next::<String>()?).ok()?))
            }
            ("udp", "--dport") if take(&mut self.protocol) == "udp" => {
                plain(XtMatch::UdpPort(self.next()?))
            }
            ("tcp", "--tcp-flags") if take(&mut self.protocol) == "tcp" => {
                match (is, self.words.pop_front()?, self.words.pop_front()?) {
                    (Is::Not, "SYN,ACK", "SYN") => Some(XtMatch::OpensNothing),
                    (Is::So, "SYN", "SYN") => Some(XtMatch::Syn),
                    _ => None,
                }
            }
            ("mark", "--mark") => Some(XtMatch::Mark(is, bits(self.words.pop_front()?)?)),
            ("connmark", "--mark") => Some(XtMatch::Connmark(is, bits(self.words.pop_front()?)?)),
            ("conntrack", "--ctdir") => {
                plain(XtMatch::Direction(match self.words.pop_front()? {
                    "ORIGINAL" => Direction::Original,
                    "REPLY" => Direction::Reply,
                    _ => return None,
                }))
            }
            ("conntrack", "--ctstate") => {
                let name = self.words.pop_front()?;
                let state = CtState::ALL.into_iter().find(|state| state.name() == name)?;
                Some(XtMatch::State(is, state))
            }
            ("conntrack", "--ctstatus") => {
                self.is("CONFIRMED")?;
                Some(XtMatch::Confirmed(is))
            }
            ("set", "--match-set") => {
                let set = Ipset::from_name(self.words.pop_front()?)?;
                let side = match self.words.pop_front()? {
                    "src" => Side::Src,
                    "dst" => Side::Dst,
                    _ => return None,
                };
                Some(XtMatch::Set(is, set, side))
            }
            _ => None,
        }
    }

    fn target(&mut self) -> Option<()> {
        self.rule.target = match self.words.pop_front()? {
            "ACCEPT" => XtTarget::Accept,
            "DROP" => XtTarget::Drop,
            "RETURN" => XtTarget::Return,
            "MASQUERADE" => XtTarget::Masquerade,
            "MARK" => XtTarget::SetMark(self.set_xmark()?),
            "CONNMARK" => XtTarget::SetConnmark(self.set_xmark()?),
            "SET" => {
                self.is("--map-set")?;
                let set = Ipset::from_name(self.words.pop_front()?)?;
                self.is("src")?;
                self.is("--map-mark")?;
                XtTarget::MapMark(set)
            }
            "SNAT" => {
                self.is("--to-source")?;
                XtTarget::Snat(self.next()?)
            }
            "NETMAP" => {
                self.is("--to")?;
                self.is(everything(self.family))?;
                XtTarget::Netmap(self.family)
            }
            "TCPMSS" => {
                self.is("--set-mss")?;
                XtTarget::ClampMss(self.next()?)
            }
            "NFQUEUE" => {
                self.is("--queue-num")?;
                (self.next::<u16>()? == SINK_QUEUE).then_some(XtTarget::Sink)?
            }
            name => XtTarget::Jump(XtName::from_name(name)?),
        };
        self.words.is_empty().then_some(())
    }

    fn set_xmark(&mut self) -> Option<MarkBits> {
        self.is("--set-xmark")?;
        bits(self.words.pop_front()?)
    }
}

/// Reads `value/mask`, or a value alone, in hexadecimal as every iptables version prints them.
fn bits(text: &str) -> Option<MarkBits> {
    let number = |text: &str| u32::from_str_radix(text.strip_prefix("0x")?, 16).ok();
    match text.split_once('/') {
        Some((value, mask)) => Some(MarkBits { value: number(value)?, mask: number(mask)? }),
        None => Some(MarkBits { value: number(text)?, mask: u32::MAX }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::Mark;

    fn samples() -> Vec<(Family, XtRule)> {
        use XtMatch as M;
        use XtTarget as T;
        let device = || DeviceName::new("egress.vxlan").unwrap();
        let bits = MarkBits { mask: 0xff00_0000, value: 0x2700_0000 };
        let v4 = Family::V4;
        let rule = |matches: Vec<XtMatch>, target, comment: &str| XtRule {
            matches: matches.into_iter().collect(),
            target,
            comment: comment.into(),
        };
        let mut all = vec![
            (v4, rule(vec![M::InputDevice(Is::So, device())], T::Goto(XtName::Local), "")),
            (v4, rule(vec![M::InputDevice(Is::Not, device())], T::Jump(XtName::MarkRequest), "")),
            (v4, rule(vec![M::OutputDevice(device())], T::Netmap(v4), "no snat")),
            (Family::V6, rule(vec![M::OutputDevice(device())], T::Netmap(Family::V6), "")),
            (v4, rule(vec![M::UdpPort(7789)], T::Drop, "a \"b\" \\ c")),
            (v4, rule(vec![M::OpensNothing], T::Drop, "")),
            (v4, rule(vec![M::Syn], T::ClampMss(1410), "")),
            (Family::V6, rule(vec![M::Udp], T::Drop, "")),
            (v4, rule(vec![M::Socket], T::Return, "")),
            (v4, rule(vec![M::AnySocket, M::Direction(Direction::Reply)], T::Return, "")),
            (v4, rule(vec![M::Mark(Is::So, bits)], T::SetMark(bits), "x")),
            (v4, rule(vec![M::Mark(Is::Not, bits)], T::SetConnmark(bits), "x")),
            (v4, rule(vec![M::Connmark(Is::Not, bits), M::Connmark(Is::So, bits)], T::Accept, "")),
            (v4, rule(vec![], T::Snat([198, 51, 100, 1].into()), "")),
            (v4, rule(vec![], T::Masquerade, "")),
            (v4, rule(vec![], T::Sink, "")),
            (v4, rule(vec![], T::MapMark(Ipset::Marks(v4)), "")),
            (v4, rule(vec![], T::Jump(XtName::To(Mark::new(0x2600_0100))), "")),
        ];
        for is in [Is::So, Is::Not] {
            all.push((v4, rule(vec![M::Confirmed(is)], T::Drop, "")));
            all.extend(
                CtState::ALL.map(|state| (v4, rule(vec![M::State(is, state)], T::Drop, ""))),
            );
            for side in [Side::Src, Side::Dst] {
                let set = Ipset::Sources(v4, 7);
                all.push((v4, rule(vec![M::Set(is, set, side)], T::Return, "rule a/b: mark")));
            }
        }
        for direction in [Direction::Original, Direction::Reply] {
            all.push((v4, rule(vec![M::Direction(direction)], T::Drop, "")));
        }
        all
    }

    #[test]
    fn what_is_written_reads_back() {
        for (family, rule) in samples() {
            assert_eq!(read_rule(&rule.to_string(), family), rule, "{rule}");
        }
    }

    #[test]
    fn the_order_of_matches_has_no_meaning() {
        let one = read_rule("-m mark --mark 0x1/0xf -p udp -m udp --dport 7 -j DROP", Family::V4);
        let other = read_rule("-p udp -m udp --dport 7 -m mark --mark 0x1/0xf -j DROP", Family::V4);
        assert_eq!(one, other);
        assert!(!matches!(one.target, XtTarget::Unknown(_)));
    }

    #[test]
    fn what_we_never_write_is_kept_as_it_is() {
        for text in [
            "-s 10.0.0.0/8 -j DROP",
            "! -o eth0 -j DROP",
            "-p tcp -j DROP",
            "-p tcp -m tcp --tcp-flags SYN,ACK SYN -j DROP",
            "-p udp -m udp --dport 7 -p tcp -j DROP",
            "-m socket --transparent -j DROP",
            "-j DROP --and-more",
            "-j CALICO",
            "-m mark --mark 1 -j DROP",
            "-m set --match-set cali40 src -j DROP",
            "-j NFQUEUE --queue-num 0",
            "-j NFQUEUE --queue-num 65535 --queue-bypass",
            "-j SNAT --to-source 1.2.3.4-1.2.3.9",
            "-j MASQUERADE --random-fully",
            "-p tcp -m tcp --tcp-flags SYN,RST SYN -j TCPMSS --set-mss 1410",
            "-p tcp -m tcp --tcp-flags SYN SYN -j TCPMSS --clamp-mss-to-pmtu",
            "-m conntrack --ctdir ORIGINAL -m conntrack --ctdir ORIGINAL -j DROP",
            "-j",
            "",
        ] {
            let rule = read_rule(text, Family::V4);
            assert_eq!(rule.target, XtTarget::Unknown(text.into()), "{text}");
            assert_eq!(rule.to_string(), text);
        }
    }

    #[test]
    fn only_what_leads_to_a_chain_of_ours_is_a_jump() {
        let jump = |text: &str| read_jump(&words(text));
        assert_eq!(jump("PREROUTING -j EGRESSGATEWAY-MARK-REQUEST"), Some(XtName::MarkRequest));
        assert_eq!(jump("FORWARD -i eth0 -g EGRESSGATEWAY-LOCAL"), Some(XtName::Local));
        for text in [
            "PREROUTING -j cali-PREROUTING",
            "PREROUTING -j DROP -m comment --comment \"-j EGRESSGATEWAY-LOCAL\"",
            "PREROUTING -j EGRESSGATEWAY-OTHER",
            "PREROUTING -j FORWARD",
            "PREROUTING",
        ] {
            assert_eq!(jump(text), None, "{text}");
        }
    }

    #[test]
    fn damaged_lines_are_read_without_panic() {
        for (family, rule) in samples() {
            let line = rule.to_string();
            for at in 0..line.len() {
                let _cut = read_rule(&line[..at], family);
                for flip in [b' ', b'"', b'\\', b'!', b'-', b'0'] {
                    let mut other = line.clone().into_bytes();
                    other[at] = flip;
                    let text = String::from_utf8(other).unwrap();
                    let read = read_rule(&text, family);
                    if !matches!(read.target, XtTarget::Unknown(_)) {
                        assert_eq!(read_rule(&read.to_string(), family), read, "{text}");
                    }
                }
            }
        }
    }
}
