//! Somebody else who changes `nf_tables`, without a program.

use std::io;

use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr};

/// First and last message of a transaction, a new table, a table that goes.
const BEGIN: u16 = 0x10;
const END: u16 = 0x11;
const NEW: u16 = 0xa00;
const DELETE: u16 = 0xa02;

/// A socket of a network namespace.
pub(crate) struct Foreign(Socket);

impl Foreign {
    /// Opens a socket in the calling thread's namespace.
    pub(crate) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self(socket))
    }

    /// Two transactions that leave nothing behind, but for the generation.
    pub(crate) fn add_and_delete_a_table(&mut self) {
        for kind in [NEW, DELETE] {
            let mut name = vec![12, 0, 1, 0];
            name.extend(*b"foreign\0");
            let transaction =
                [message(BEGIN, 0, 10, &[]), message(kind, 1, 0, &name), message(END, 0, 10, &[])];
            // Nothing is asked for, so that there is no answer unless it is refused.
            let _either_way = self.0.send(&transaction.concat(), 0);
        }
    }
}

fn message(kind: u16, family: u8, resource: u8, attributes: &[u8]) -> Vec<u8> {
    let length = u32::try_from(20 + attributes.len()).unwrap_or_default();
    let mut message = length.to_ne_bytes().to_vec();
    message.extend(kind.to_ne_bytes());
    // NLM_F_REQUEST.
    message.extend(1_u16.to_ne_bytes());
    // No sequence number, no port, then `struct nfgenmsg`.
    message.extend([0; 8]);
    message.extend([family, 0, 0, resource]);
    message.extend(attributes);
    message
}
