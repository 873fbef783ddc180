//! Reads the sockets of this host that are bound to an address of their own.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// State of a listening TCP socket (`TCP_LISTEN` in `include/net/tcp_states.h`).
const LISTEN: &str = "0A";
/// State of a UDP socket that is not connected (`TCP_CLOSE`).
const CLOSE: &str = "07";

/// Address and description of each socket that waits for packets to one address.
///
/// The kernel shows the sockets of the network namespace of the reading thread.
pub(super) fn bound() -> Vec<(IpAddr, String)> {
    let kinds = [("tcp", "TCP", LISTEN), ("tcp6", "TCP", LISTEN), ("udp", "UDP", CLOSE)];
    let mut found = Vec::new();
    for (file, name, state) in kinds.into_iter().chain([("udp6", "UDP", CLOSE)]) {
        let Ok(file) = File::open(format!("/proc/thread-self/net/{file}")) else { continue };
        let lines = BufReader::new(file).lines().map_while(Result::ok).skip(1);
        // Listening sockets come first, and there may be many others.
        let lines = lines.take_while(|line| state == CLOSE || of(line, LISTEN).is_some());
        let sockets =
            lines.filter_map(|line| of(&line, state)).filter(|(ip, _)| !ip.is_unspecified());
        found.extend(sockets.map(|(ip, port)| (ip, format!("{name} port {port}"))));
    }
    found
}

/// Local address and port in a line of the file, if the socket has this state.
fn of(line: &str, state: &str) -> Option<(IpAddr, u16)> {
    let mut words = line.split_whitespace().skip(1);
    let (address, port) = words.next()?.split_once(':')?;
    if words.nth(1)? != state {
        return None;
    }
    let port = u16::from_str_radix(port, 16).ok()?;
    // Each 32 bits are in network byte order, and are printed as a number of the host.
    let word = |at: usize| {
        let digits = address.get(at * 8..at * 8 + 8)?;
        Some(u32::from_str_radix(digits, 16).ok()?.to_ne_bytes())
    };
    let ip = match address.len() {
        8 => Ipv4Addr::from(word(0)?).into(),
        32 => {
            let words: Vec<_> = (0..4).map(word).collect::<Option<_>>()?;
            Ipv6Addr::from(<[u8; 16]>::try_from(words.concat()).ok()?).to_canonical()
        }
        _ => return None,
    };
    Some((ip, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(target_endian = "little")]
    #[test]
    fn lines_of_sockets() {
        let line = |address: &str, state: &str| {
            format!("   0: {address} 00000000:0000 {state} 00000000:00000000 00:00000000 0 0 0 9")
        };
        let v4: IpAddr = [198, 51, 100, 7].into();
        assert_eq!(of(&line("076433C6:0016", LISTEN), LISTEN), Some((v4, 22)));
        assert_eq!(of(&line("076433C6:0016", "01"), LISTEN), None);
        let v6: IpAddr = "2001:db8::7".parse().unwrap();
        let text = "B80D0120000000000000000007000000:0035";
        assert_eq!(of(&line(text, CLOSE), CLOSE), Some((v6, 53)));
        let mapped = "0000000000000000FFFF0000076433C6:0016";
        assert_eq!(of(&line(mapped, LISTEN), LISTEN), Some((v4, 22)));
        for broken in ["", "0:", "076433C6", "€€€€€€€€:0016", "076433C6:x", "0764:0016"]
        {
            assert_eq!(of(&line(broken, LISTEN), LISTEN), None, "{broken}");
        }
        let whole = line(text, CLOSE);
        assert!((0..whole.len()).all(|end| of(&whole[..end], LISTEN).is_none()));
    }
}
