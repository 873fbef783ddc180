//! Ruleset generation, and requests with the generation in their replies.

use super::batch::number;
use super::kind;
use crate::error::{KernelError, errno};
use crate::kernel::netlink::exchange::Answered;
use crate::kernel::netlink::message::{Attributes, Malformed, Writer};
use crate::kernel::netlink::nfnetlink;
use crate::kernel::netlink::nfnetlink::{NETFILTER, Request};
use crate::kernel::netlink::socket::Socket;
use crate::state::TableFamily;

const NO_NF_TABLES: &str = "load nf_tables or use a kernel with it (CONFIG_NF_TABLES)";

/// Opens a socket for nf_tables and the other netfilter subsystems.
pub(crate) fn open() -> Result<Socket, KernelError> {
    Socket::open(NETFILTER).map_err(|error| {
        let error = KernelError::io("open a netfilter socket", &error);
        match error.errno() {
            Some(errno::EPROTONOSUPPORT) => error.with_remedy(NO_NF_TABLES),
            _ => error,
        }
    })
}

/// Sends a request about a table of this family, and passes each message of the reply to `take`.
///
/// `take` gets the low half of the ruleset generation, and the attributes.
pub(super) fn ask(
    socket: &mut Socket,
    family: TableFamily,
    request: &Request<'_>,
    write: impl FnOnce(&mut Writer),
    take: impl FnMut(u16, &[u8]) -> Result<(), Malformed>,
) -> Result<Answered, KernelError> {
    let header = |writer: &mut Writer| {
        writer.nfgen(number(family), 0);
        write(writer);
    };
    nfnetlink::ask(socket, request, header, take)
}

/// Ruleset generation: the kernel's count of transactions, by any program.
pub(crate) fn generation(socket: &mut Socket) -> Result<u32, KernelError> {
    let request = Request {
        text: "read the generation of nf_tables",
        kind: kind::GETGEN,
        flags: 0,
        answer: kind::NEWGEN,
    };
    let mut generation = None;
    let take = |_, body: &[u8]| {
        for attribute in Attributes::new(body) {
            let attribute = attribute?;
            if attribute.kind == 1 {
                generation = Some(attribute.be32()?);
            }
        }
        Ok(())
    };
    let answered = ask(socket, TableFamily::Inet, &request, |_| {}, take);
    answered.map_err(
        |error| {
            if is_absent(&error) { error.with_remedy(NO_NF_TABLES) } else { error }
        },
    )?;
    generation.ok_or_else(|| KernelError::answer(request.text, "the answer has no generation"))
}

/// Whether the error means that the kernel has no nf_tables.
pub(crate) fn is_absent(error: &KernelError) -> bool {
    let absent = [errno::EINVAL, errno::EOPNOTSUPP, errno::EPROTONOSUPPORT];
    error.errno().is_some_and(|errno| absent.contains(&errno))
}
