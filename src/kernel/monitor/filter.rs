//! Socket filters that drop notifications in the kernel.
//!
//! A handful of instructions per message, which costs less than queueing it: a dropped notification
//! takes no memory and wakes no process.

use socket2::SockFilter;

use crate::kernel::netlink::bpf;
use crate::state::PROTOCOL;
use bpf::{ACCEPT, DROP, FLAGS, PORT, TYPE, as_loaded, at_least, byte, half, has, is, word};

pub(crate) const NEWROUTE: u16 = 24;
pub(crate) const DELROUTE: u16 = 25;
/// `NLM_F_REPLACE` in the message about a new route: the route replaced another.
pub(crate) const REPLACE: u16 = 0x100;
/// First of the kernel's own routing tables.
///
/// The byte in `struct rtmsg` is 252 for tables with larger numbers.
pub(crate) const OWN_TABLES: u8 = 253;

// Offsets in the message, behind `struct nlmsghdr`: `struct rtmsg`.
const TABLE: u32 = 20;
const ROUTE_PROTOCOL: u32 = 21;

/// Filter that drops changes requested from this port, and unrelated routes.
///
/// Unrelated routes do not have the datapath's protocol number and cannot have replaced one that
/// has.
pub(crate) fn routing(port: u32) -> [SockFilter; 13] {
    [
        word(PORT),
        is(port.to_be(), 10, 0),
        half(TYPE),
        is(as_loaded(NEWROUTE), 1, 0),
        is(as_loaded(DELROUTE), 0, 6),
        byte(ROUTE_PROTOCOL),
        is(u32::from(PROTOCOL), 4, 0),
        half(FLAGS),
        has(as_loaded(REPLACE), 0, 3),
        byte(TABLE),
        at_least(u32::from(OWN_TABLES), 1, 0),
        ACCEPT,
        DROP,
    ]
}

/// Filter that drops changes requested from this port.
pub(crate) fn netfilter(port: u32) -> [SockFilter; 4] {
    [word(PORT), is(port.to_be(), 1, 0), ACCEPT, DROP]
}

#[cfg(test)]
mod tests {
    use super::*;
    use bpf::tests::run;

    fn message(kind: u16, flags: u16, port: u32, table: u8, protocol: u8) -> Vec<u8> {
        let mut bytes = vec![28, 0, 0, 0];
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend([0; 4]);
        bytes.extend(port.to_ne_bytes());
        bytes.extend([2, 0, 0, 0, table, protocol, 0, 1, 0, 0, 0, 0]);
        bytes
    }

    #[test]
    fn only_foreign_messages_that_may_be_about_us_pass() {
        let program = routing(0x0102_0304);
        for (kind, flags, port, table, protocol, passes) in [
            (16, 0, 0x0102_0304, 0, 0, false),
            (16, 0, 0x0403_0201, 0, 0, true),
            (16, 0, 0, 0, 0, true),
            (32, 0, 0, 0, 0, true),
            (NEWROUTE, 0x400, 0, 254, 2, false),
            (NEWROUTE, 0x400, 0, 252, 2, false),
            (NEWROUTE, 0x400, 9, 252, 69, true),
            (NEWROUTE, 0x400, 9, 254, 69, true),
            (NEWROUTE, REPLACE, 9, 252, 4, true),
            (NEWROUTE, REPLACE, 9, 100, 4, true),
            (NEWROUTE, REPLACE, 9, 253, 4, false),
            (NEWROUTE, REPLACE, 9, 254, 4, false),
            (NEWROUTE, REPLACE, 9, 255, 4, false),
            (NEWROUTE, REPLACE, 0x0102_0304, 252, 69, false),
            (DELROUTE, 0, 9, 252, 69, true),
            (DELROUTE, 0, 9, 252, 70, false),
        ] {
            let bytes = message(kind, flags, port, table, protocol);
            assert_eq!(
                run(&program, &bytes),
                passes,
                "{kind} {flags:#x} {port} {table} {protocol}"
            );
        }
        assert!(run(&netfilter(7), &message(0xa06, 0, 8, 0, 0)));
        assert!(!run(&netfilter(7), &message(0xa06, 0, 7, 0, 0)));
        assert!(!run(&program, &[0; 8]));
    }
}
